"""A Flax network that needs half of the pixels, a third of its hidden units, or one bit for each weight.

Eight workers train a 64-64-10 network on handwritten digits by a one-bit vote (SignProx with momentum), with a group
penalty on the first layer: rows of its kernel are pixels, columns are hidden units. The stronger the penalty, the more
of them become zero. What is left is trained once more without the penalty (the refit). Last, every weight is pulled to
-1 or +1 while training goes on (`signopt.prox.binary`), with a scale for each output learned beside them.

Figures and table: test accuracy against the share dropped, beside a network that was never penalized and had as many
steps; which pixels survive; the accuracy that one-bit weights cost.
"""

from collections.abc import Iterator
import dataclasses
import functools
import itertools
import pathlib
import statistics

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.table

from experiments.common import data
from experiments.common import models
from experiments.common import plots
from experiments.common import progress
from experiments.common.flags import flag
from experiments.common.records import Record
import signopt
from signopt import prox as proxes

AXIS = "worker"
GROUPS = {"pixels": 0, "units": 1}  # axis of the first kernel
UNTIL_ZERO = 0.02  # polish drops groups whose norm is below this


@dataclasses.dataclass(frozen=True)
class Config:
    """The flags."""

    groups: tuple[str, ...] = flag(("pixels", "units"), "what the penalty drops", choices=tuple(GROUPS))
    strengths: tuple[float, ...] = flag(
        (0.003, 0.01, 0.02, 0.04, 0.07, 0.1, 0.15, 0.2, 0.3), "strengths of the penalty", at_least=0
    )
    binary: bool = flag(True, "also train a network of one-bit weights")
    binary_strength: float = flag(4.0, "the pull at the end, in learning rates", at_least=0)
    binary_rate: float = flag(0.003, "peak of their cosine schedule; ten times that for the weights", at_least=0)
    validation: bool = flag(False, "test on the last fifth of the training images instead, to tune")
    workers: int = flag(8, "number of workers", at_least=1)
    wire: str = flag("one_bit", "how votes travel", choices=("one_bit", "two_bit", "psum"))
    steps: int = flag(1000, "training steps before the refit", at_least=1)
    refit_steps: int = flag(1000, "training steps of the refit", at_least=1)
    batch_size: int = flag(8, "examples per worker and step", at_least=1)
    learning_rate: float = flag(0.005, "peak of the cosine schedules", at_least=0)
    seeds: int = flag(5, "number of runs: seeds 0, 1, 2, ...", at_least=1)
    output: str = flag("results/sparse_network", "folder for records and plots")


class OneBitMLP(nnx.Module):
    """The network of `models.MLP` with weights near -1 and +1, and a scale for each output of a layer."""

    def __init__(self, image_shape: tuple[int, int, int], *, rngs: nnx.Rngs):
        between = lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -1.0, 1.0)  # noqa: E731
        sizes = (int(np.prod(image_shape)), 64, models.NUM_CLASSES)
        pairs = list(itertools.pairwise(sizes))
        self.layers = nnx.List(nnx.Linear(*pair, use_bias=False, kernel_init=between, rngs=rngs) for pair in pairs)
        self.biases = nnx.List(nnx.Param(jnp.zeros(fan_out)) for _, fan_out in pairs)
        self.scales = nnx.List(nnx.Param(jnp.full(fan_out, (2 / fan_in) ** 0.5)) for fan_in, fan_out in pairs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits of a batch of images."""
        x = images.reshape(images.shape[0], -1)
        for number, (layer, scale, bias) in enumerate(zip(self.layers, self.scales, self.biases, strict=True)):
            x = nnx.relu(x) if number else x
            x = layer(x) * scale + bias
        return x


def run(config: Config) -> Iterator[Record]:
    """Train every strength and seed, drop what is zero, refit, and look at the test images.

    Yields:
      A record for each network; one of `kind` "pixels" also says which pixels survive.
    """
    digits = data.load("digits")
    digits = data.hold_out(digits) if config.validation else digits
    kinds = (*config.groups, *(("float", "one_bit") if config.binary else ()))
    for kind in progress.track(kinds, "sets of networks"):
        yield from (_drop if kind in GROUPS else _one_bit_weights)(config, digits, kind)


def _drop(config, digits, kind):
    """All strengths and seeds are one program: a strength may be traced."""
    net = models.network(models.MLP, digits.train_images.shape[1:])
    votes = {"axis_name": AXIS, "num_workers": config.workers, "wire": config.wire}
    schedule = optax.cosine_decay_schedule(config.learning_rate, config.steps)
    refit_schedule = optax.cosine_decay_schedule(config.learning_rate, config.refit_steps)
    refit = optax.chain(signopt.signum(refit_schedule, **votes), optax.stateless(_keep_zeros))

    def train(strength, seed):
        prox = proxes.masked(
            proxes.group_l1(strength, axis=GROUPS[kind]),
            lambda params: jax.tree.map_with_path(lambda path, _: _is_first_kernel(path), params),
        )
        sparse = signopt.signprox(schedule, prox=prox, beta=0.9, **votes)
        params = _train(config, digits, net, sparse, net.init(jax.random.key(seed)), seed, config.steps)
        polished = proxes.polish(params, prox, UNTIL_ZERO / jnp.maximum(strength, 1e-6))
        refitted = _train(config, digits, net, refit, polished, seed + 1000, config.refit_steps)
        look = lambda params: models.accuracy(net, params, digits.test_images, digits.test_labels)  # noqa: E731
        alive = jnp.any(refitted["hidden"]["kernel"][...] != 0, axis=1 - GROUPS[kind])
        return look(polished), look(refitted), alive

    strengths = np.array((0.0, *config.strengths), np.float32)
    over_seeds = jax.vmap(train, in_axes=(None, 0))
    before, after, alive = jax.device_get(
        jax.jit(jax.vmap(over_seeds, in_axes=(0, None)))(strengths, np.arange(config.seeds))
    )
    for place, strength in enumerate((0.0, *config.strengths)):
        for seed in range(config.seeds):
            yield {
                "kind": kind,
                "strength": strength,
                "seed": seed,
                "dropped": float(1 - alive[place, seed].mean()),
                "accuracy_before_refit": float(before[place, seed]),
                "test_accuracy": float(after[place, seed]),
            } | ({"surviving_pixels": alive[place, seed].astype(int).tolist()} if kind == "pixels" else {})


def _one_bit_weights(config, digits, kind):
    net = models.network(OneBitMLP, digits.train_images.shape[1:])
    steps = config.steps + config.refit_steps
    rate = optax.cosine_decay_schedule(config.binary_rate, steps)
    kernel_rate = optax.cosine_decay_schedule(10 * config.binary_rate, steps)

    def kernels(params):
        return jax.tree.map_with_path(lambda path, _: _is_kernel(path), params)

    def pulled(strength):
        return signopt.prox_step(proxes.masked(proxes.binary(strength), kernels), kernel_rate)

    voted = optax.chain(
        signopt.signum(rate, axis_name=AXIS, num_workers=config.workers, wire=config.wire),
        optax.masked(optax.scale(10.0), kernels),  # weights of size one take longer steps than scales and biases
    )
    growing = optax.inject_hyperparams(pulled)(optax.linear_schedule(0.0, config.binary_strength, steps))
    tx = voted if kind == "float" else optax.chain(voted, growing)

    def train(seed):
        params = _train(config, digits, net, tx, net.init(jax.random.key(seed)), seed, steps)
        if kind == "one_bit":  # whatever is not on one of the two yet
            params = proxes.polish(params, proxes.masked(proxes.binary(1.0), kernels), 100.0)
        return params, models.accuracy(net, params, digits.test_images, digits.test_labels)

    params, found = jax.jit(jax.vmap(train))(np.arange(config.seeds))
    sizes = [np.abs(x) for path, x in jax.tree.leaves_with_path(params) if _is_kernel(path)]
    for seed in range(config.seeds):
        yield {
            "kind": f"{kind} weights",
            "seed": seed,
            "test_accuracy": float(found[seed]),
            "share_of_one_bit_weights": float(np.mean(np.concatenate([x[seed].ravel() for x in sizes]) == 1)),
        }


def _train(config, digits, net, tx, params, seed, steps):
    """Train one network on simulated workers; returns its parameters."""
    loss = functools.partial(models.loss, net)
    value_and_grad = signopt.workers.value_and_grad(loss, axis_name=AXIS)

    def step(state, batch):
        value, grads = value_and_grad(state[0], *batch)
        updates, opt_state = tx.update(grads, state[1], state[0])
        return (optax.apply_updates(state[0], updates), opt_state), value

    one = signopt.workers.simulate(step, config.workers, axis_name=AXIS)
    images, labels = jnp.asarray(digits.train_images), jnp.asarray(digits.train_labels)

    def draw(state, count):
        key = jax.random.fold_in(jax.random.key(seed), count)
        chosen = jax.random.randint(key, (config.workers * config.batch_size,), 0, labels.size)
        return one(state, (images[chosen], labels[chosen]))[0], None

    return jax.lax.scan(draw, (params, tx.init(params)), jnp.arange(steps))[0][0]


def _keep_zeros(updates, params):
    """Leave alone what is exactly zero in the first kernel: the refit trains what survived."""

    def keep(path, update, param):
        return jnp.where(param == 0, 0, update) if _is_first_kernel(path) else update

    return jax.tree.map_with_path(keep, updates, params)


def _is_kernel(path):
    return "kernel" in jax.tree_util.keystr(path)


def _is_first_kernel(path):
    return _is_kernel(path) and "hidden" in jax.tree_util.keystr(path)


def curve(records: list[Record], kind: str) -> list[tuple[float, float, float, float]]:
    """For each strength: the strength, the share dropped, the accuracy and its loss against strength 0; seed means."""
    mine = [record for record in records[1:] if record["kind"] == kind]
    mean = lambda strength, field: statistics.mean(r[field] for r in mine if r["strength"] == strength)  # noqa: E731
    strengths = sorted({record["strength"] for record in mine})
    base = mean(0.0, "test_accuracy") if strengths else 0.0
    return [(s, mean(s, "dropped"), mean(s, "test_accuracy"), base - mean(s, "test_accuracy")) for s in strengths]


def table(records: list[Record]) -> rich.table.Table:
    """The curves, and what one-bit weights cost."""
    config = records[0]["config"]
    drawn = rich.table.Table(title=f"digits, {config['workers']} workers, mean of {config['seeds']} seeds")
    for column in ("what", "strength", "dropped", "test accuracy", "lost"):
        drawn.add_column(column, justify="left" if column == "what" else "right")
    for kind in config["groups"]:
        for strength, dropped, accuracy, lost in curve(records, kind):
            drawn.add_row(kind, f"{strength:g}", f"{dropped:.3f}", f"{accuracy:.4f}", f"{lost:+.4f}")
    weights = {k: [r for r in records[1:] if r["kind"] == f"{k} weights"] for k in ("float", "one_bit")}
    if config["binary"]:
        means = {k: statistics.mean(r["test_accuracy"] for r in found) for k, found in weights.items()}
        share = weights["one_bit"][0]["share_of_one_bit_weights"]
        drawn.add_row("float weights", "", "", f"{means['float']:.4f}", "")
        lost = means["float"] - means["one_bit"]
        drawn.add_row(f"±1 weights ({share:.0%})", "", "", f"{means['one_bit']:.4f}", f"{lost:+.4f}")
    return drawn


ENOUGH = {"pixels": (0.5, 0.015), "units": (0.7, 0.01)}  # the share to drop, and what it may cost


def summary(records: list[Record]) -> list[list[str]]:
    """The smallest strengths that drop enough, and what one-bit weights cost."""
    rows = [["problem", "measured", "to expect"]]
    for kind in records[0]["config"]["groups"]:
        enough, most = ENOUGH[kind]
        points = curve(records, kind)
        strength, dropped, accuracy, lost = next((p for p in points if p[1] >= enough), points[-1])
        measured = f"{dropped:.1%} dropped, accuracy {accuracy:.4f}, {lost:.4f} lost"
        rows.append([f"network: {kind}, strength {strength:g}", measured, f"{enough:.0%} for at most {most:g}"])
    if records[0]["config"]["binary"]:
        floats, bits = (
            statistics.mean(r["test_accuracy"] for r in records[1:] if r["kind"] == f"{kind} weights")
            for kind in ("float", "one_bit")
        )
        rows.append(["network: weights of -1 and +1", f"accuracy {bits:.4f}, {floats - bits:.4f} lost", ""])
    return rows


def plot(records: list[Record], folder: str) -> list[pathlib.Path]:
    """Draw accuracy against the share dropped, and the pixels that survive in how many of the seeds.

    Returns:
      The figures' files.
    """
    config = records[0]["config"]
    title = f"digits, {config['workers']} workers, {config['seeds']} seeds"
    figure, (axes,) = plots.panels(1, title=title, width=6)
    for kind in config["groups"]:
        mine = [record for record in records[1:] if record["kind"] == kind]
        points = curve(records, kind)
        accuracies = [[r["test_accuracy"] for r in mine if r["strength"] == p[0]] for p in points]
        plots.band(axes, [p[1] for p in points], accuracies, marker=".", label=f"{kind} dropped")
    axes.set(xlabel="share dropped", ylabel="test accuracy after the refit", ylim=(0.8, 1.0))
    axes.legend()
    files = plots.save(figure, folder, "network")
    if "pixels" in config["groups"]:
        mine = [record for record in records[1:] if record["kind"] == "pixels"]
        strengths = sorted({record["strength"] for record in mine})
        title = "pixels that survive, by strength (white: in every seed)"
        figure, panels = plots.panels(len(strengths), title=title, columns=5, width=1.6, height=1.7)
        for axes, strength in zip(panels, strengths, strict=True):
            alive = np.mean([r["surviving_pixels"] for r in mine if r["strength"] == strength], axis=0)
            axes.imshow(alive.reshape(8, 8), cmap="gray", vmin=0, vmax=1)
            axes.set_title(f"{strength:g}")
            axes.set_axis_off()
        files += plots.save(figure, folder, "pixels")
    return files
