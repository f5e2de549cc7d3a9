"""Learning rates: how much smaller than AdamW's and SGD's a vote's best one is, on short and on long runs.

Table: the best peak of a cosine schedule for AdamW and SGD with momentum on float32 means, and for Signum, Lion, signSGD and
SignMuon by vote of four workers; on the network of the digits, a convolutional network with BatchNorm on the same, and a byte
transformer. Rates are a factor of two apart, until the best has a worse one on each side, on held-out training data. Then:
AdamW and Signum at the same rate, AdamW's best and down to a sixteenth of it.

    python -m experiments rates

Time and numbers to expect are in experiments/README.md.
"""

from collections.abc import Callable, Iterator
import dataclasses
import pathlib
import statistics
from typing import Any, NamedTuple

from flax import nnx
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax
import rich.console
import rich.table

from experiments.common import data
from experiments.common import models
from experiments.common import plots
from experiments.common import progress
from experiments.common import runners
from experiments.common import text as texts
from experiments.common.flags import flag
from experiments.common.records import Record
from experiments.training import language
import signopt

AXIS = runners.AXIS
VOTES = ("signum", "lion", "signsgd", "sign_muon")
METHODS = ("sgd", "adamw", *VOTES)
SHARES = (1.0, 0.5, 0.25, 0.125, 0.0625)  # of AdamW's best rate, which AdamW and votes try as well
LONGER = 4  # a long run over a short one
WARM_UP = 40  # steps
SHAPE = texts.Shape(layers=2, width=32, context=16)
# From where to look for the best of SGD and of AdamW, to save time; the search ends at the best from anywhere.
STARTS = {
    "mlp": {"sgd": 0.4, "adamw": 3.2e-2},
    "cnn": {"sgd": 0.2, "adamw": 1.6e-2},
    "transformer": {"sgd": 0.8, "adamw": 1.6e-2},
}


@dataclasses.dataclass(frozen=True)
class Config:
    """The flags."""

    problems: tuple[str, ...] = flag(tuple(STARTS), "what to train", choices=tuple(STARTS))
    methods: tuple[str, ...] = flag(METHODS, "what to compare; sign_muon on the transformer only", choices=METHODS)
    workers: int = flag(4, "number of workers", at_least=1)
    batch_size: int = flag(8, "examples per worker and step", at_least=1)
    steps: int = flag(256, f"training steps of a short run; a long one has {LONGER} times as many", at_least=1)
    seeds: int = flag(1, "number of runs of the transformer; of the others four times as many", at_least=1)
    output: str = flag("results/rates", "folder for records and plots")


class Problem(NamedTuple):
    """What is trained.

    Attributes:
      init: From a key to parameters and statistics.
      loss: From parameters, statistics and a batch to the loss and new statistics.
      draw: From a key and a number of examples to a batch.
      score: From parameters and statistics to the loss and the share of wrong answers on held-out training data.
      by: Which of the two is to be small: "loss" or "error".
      seeds: Of as many as the `Config` says, how many times.
    """

    init: Callable[[jax.Array], tuple[Any, Any]]
    loss: Callable[[Any, Any, Any], tuple[jax.Array, Any]]
    draw: Callable[[jax.Array, int], Any]
    score: Callable[[Any, Any], tuple[jax.Array, jax.Array]]
    by: str
    seeds: int


class BatchNormCNN(nnx.Module):
    """Two 3x3 convolutions of 8 and 16 channels, each with BatchNorm and 2x2 max pooling, and one dense layer."""

    def __init__(self, image_shape: tuple[int, int, int], *, rngs: nnx.Rngs):
        height, width, channels = image_shape
        self.first = nnx.Conv(channels, 8, (3, 3), use_bias=False, rngs=rngs)
        self.first_norm = nnx.BatchNorm(8, momentum=0.9, rngs=rngs)
        self.second = nnx.Conv(8, 16, (3, 3), use_bias=False, rngs=rngs)
        self.second_norm = nnx.BatchNorm(16, momentum=0.9, rngs=rngs)
        self.logits = nnx.Linear(height // 4 * (width // 4) * 16, models.NUM_CLASSES, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits of a batch of images."""
        x = images
        for convolution, norm in ((self.first, self.first_norm), (self.second, self.second_norm)):
            x = nnx.max_pool(nnx.relu(norm(convolution(x))), (2, 2), strides=(2, 2))
        return self.logits(x.reshape(x.shape[0], -1))


def _on_digits(model):
    dataset = data.hold_out(data.load("digits"))
    images, labels = jnp.asarray(dataset.train_images), jnp.asarray(dataset.train_labels)
    shape = images.shape[1:]

    def init(key):
        _, params, stats = nnx.split(model(shape, rngs=nnx.Rngs(key)), nnx.Param, ...)
        return params, stats

    def forward(params, stats, images, training):
        net = nnx.merge(graph, params, stats, copy=True)
        net.set_attributes(use_running_average=not training, raise_if_not_found=False)
        return net(images), nnx.state(net, nnx.Not(nnx.Param))

    def loss(params, stats, batch):
        logits, stats = forward(params, stats, batch[0], True)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean(), stats

    def draw(key, size):
        chosen = jax.random.randint(key, (size,), 0, len(labels))
        return images[chosen], labels[chosen]

    def score(params, stats):
        logits, _ = forward(params, stats, dataset.test_images, False)
        found = optax.softmax_cross_entropy_with_integer_labels(logits, dataset.test_labels).mean()
        return found, jnp.mean(logits.argmax(-1) != dataset.test_labels)

    graph, *_ = nnx.split(nnx.eval_shape(lambda: model(shape, rngs=nnx.Rngs(0))), nnx.Param, ...)
    return Problem(init, loss, draw, score, "error", 4)


def _transformer():
    text, context = texts.load(), SHAPE.context
    train = jnp.asarray(text.train)
    starts = np.linspace(0, len(text.tune) - context - 1, 512).astype(np.int64)
    held_out = text.tune[starts[:, None] + np.arange(context + 1)]

    def draw(key, size):
        at = jax.random.randint(key, (size, 1), 0, len(train) - context)
        return train[at + jnp.arange(context + 1)]

    def score(params, stats):
        del stats
        logits = texts.logits(params, jnp.asarray(held_out[:, :-1]))
        wrong = jnp.mean(logits.argmax(-1) != held_out[:, 1:])
        return texts.loss(params, jnp.asarray(held_out)), wrong

    def init(key):
        return texts.init(key, SHAPE), ()

    return Problem(init, lambda params, stats, batch: (texts.loss(params, batch), stats), draw, score, "loss", 1)


PROBLEMS = {
    "mlp": lambda: _on_digits(models.MLP),
    "cnn": lambda: _on_digits(BatchNormCNN),
    "transformer": _transformer,
}


def optimizer(method: str, schedule: optax.Schedule, workers: int) -> optax.GradientTransformation:
    """A method by its name; weight decay and all else as optax has it by default, 0 for votes."""
    if method in ("sgd", "adamw"):
        tx = optax.sgd(schedule, momentum=0.9) if method == "sgd" else optax.adamw(schedule)
        return optax.chain(signopt.mean(AXIS), tx)
    voting = {"axis_name": AXIS, "num_workers": workers}
    if method == "lion":
        return signopt.lion(schedule, weight_decay=0.0, **voting)
    if method == "sign_muon":
        return signopt.sign_muon(schedule, muon_weight_dimension_numbers=texts.matrices, **voting)
    return {"signum": signopt.signum, "signsgd": signopt.signsgd}[method](schedule, **voting)


def trainer(problem: Problem, method: str, config: Config) -> Callable[[float, int], dict[str, list[float]]]:
    """Compile a short run once, for all learning rates, seeds, and places in a longer run.

    Returns:
      A function from the peak of a schedule and how many short runs make the whole, to the "loss" and the "error", the
      share of wrong answers, of every seed.
    """

    def made(peak, total):
        def schedule(count):
            return peak * jnp.minimum(1, (count + 1) / WARM_UP) * (1 + jnp.cos(jnp.pi * count / total)) / 2

        return optimizer(method, schedule, config.workers)

    value_and_grad = signopt.workers.value_and_grad(problem.loss, axis_name=AXIS, has_aux=True)

    def step(state, batch):
        params, stats, opt_state, peak, total = state
        (_, stats), gradients = value_and_grad(params, stats, batch)
        stats = lax.pmean(stats, AXIS) if jax.tree.leaves(stats) else stats
        updates, opt_state = made(peak, total).update(gradients, opt_state, params)
        return (optax.apply_updates(params, updates), stats, opt_state, peak, total), None

    together = signopt.workers.simulate(step, config.workers, axis_name=AXIS)

    def init(seed, peak, total):
        params, stats = problem.init(jax.random.key(seed))
        return params, stats, made(peak, total).init(params), peak, total

    def advance(state, seed, part):
        key = jax.random.fold_in(jax.random.key(seed), 1)

        def one(state, k):
            batch = problem.draw(jax.random.fold_in(key, k), config.workers * config.batch_size)
            return together(state, batch)

        return lax.scan(one, state, part * config.steps + jnp.arange(config.steps))[0]

    seeds = np.arange(problem.seeds * config.seeds)
    start = jax.jit(jax.vmap(init, (0, None, None)))
    go_on = jax.jit(jax.vmap(advance, (0, 0, None)))
    score = jax.jit(jax.vmap(lambda state: problem.score(state[0], state[1])))

    def run(peak, parts):
        state = start(seeds, np.float32(peak), np.float32(parts * config.steps))
        for part in range(parts):
            state = go_on(state, seeds, part)
        loss, error = score(state)
        return {"loss": np.asarray(loss).tolist(), "error": np.asarray(error).tolist()}

    return run


def run(config: Config) -> Iterator[Record]:
    """Look for the best learning rate of every method, first on short runs, then on long ones.

    Yields:
      A record for each learning rate that was tried, with the loss and the share of wrong answers of every seed.
    """
    for name in progress.track(config.problems, "problems"):
        problem, of_adamw = PROBLEMS[name](), dict.fromkeys((1, LONGER), STARTS[name]["adamw"])
        for method in progress.track([m for m in METHODS if m in config.methods and _suits(name, m)], name):
            train = trainer(problem, method, config)
            for parts in (1, LONGER):
                tried = {}

                def score(rate, tried=tried, train=train, parts=parts, by=problem.by):
                    if rate not in tried:
                        tried[rate] = train(rate, parts)
                    return _small(tried[rate], by)

                if method in VOTES:
                    _search(score, [share * of_adamw[parts] for share in SHARES])
                else:
                    found = _search(score, [STARTS[name][method]])
                    if method == "adamw":
                        while found != (better := _search(score, [share * found for share in SHARES])):
                            found = better
                        of_adamw[parts] = found
                about = {"problem": name, "method": method, "steps": parts * config.steps, "by": problem.by}
                for rate in sorted(tried):
                    yield {**about, "learning_rate": rate, **tried[rate]}


def _search(score, starts):
    """The best learning rate, from the best of some on."""
    return best(dict(language.tuned(score, min(starts, key=score))))


def _small(found, by):
    """What is to be small; among as many wrong answers the loss decides, by less than one answer."""
    loss, error = (float(np.mean(found[name])) for name in ("loss", "error"))
    return loss if by == "loss" else error + 1e-5 * min(loss, 10.0)


def _suits(problem, method):
    return method != "sign_muon" or problem == "transformer"


def scores(records: list[Record], problem: str, method: str, steps: int) -> dict[float, float]:
    """What is to be small, the mean over seeds, by learning rate; what is not finite is infinite."""
    own = [r for r in records[1:] if (r["problem"], r["method"], r["steps"]) == (problem, method, steps)]
    found = {r["learning_rate"]: _small(r, r["by"]) for r in own}
    return {rate: x if np.isfinite(x) else np.inf for rate, x in found.items()}


def best(found: dict[float, float]) -> float:
    """The learning rate with the smallest score."""
    return min(found, key=lambda rate: found[rate])


def cells(records: list[Record]) -> list[tuple[str, int]]:
    """Every problem and number of steps."""
    return list(dict.fromkeys((r["problem"], r["steps"]) for r in records[1:]))


def ratios(records: list[Record], method: str, other: str) -> list[float]:
    """The best learning rate of one method over that of another, for each problem and number of steps."""
    pairs = [[scores(records, *cell[:1], name, cell[1]) for name in (method, other)] for cell in cells(records)]
    return [best(one) / best(two) for one, two in pairs if one and two]


def summary(records: list[Record]) -> list[list[list[str]]]:
    """The best rates; what they are to AdamW's and SGD's; and AdamW and Signum at the same shares of AdamW's best."""
    methods = [m for m in METHODS if m in records[0]["config"]["methods"]]
    rates = [["trained", "steps", *methods]]
    for problem, steps in cells(records):
        found = [scores(records, problem, method, steps) for method in methods]
        rates.append(
            [problem, f"{steps}", *(f"{best(x):.3g}: {_said(problem, x[best(x)])}" if x else "" for x in found)]
        )
    spread = [["best rate of", *(f"over that of {other}: smallest, median, largest" for other in ("adamw", "sgd"))]]
    for method in (m for m in VOTES if m in methods):
        both = [ratios(records, method, other) for other in ("adamw", "sgd")]
        spread.append([method, *(_three(found) for found in both)])
    shares = [["trained", "steps", "signum at its best", *(f"both at {_share(share)}" for share in SHARES)]]
    for problem, steps in cells(records):
        adamw, signum = (scores(records, problem, method, steps) for method in ("adamw", "signum"))
        if adamw and signum:
            at = [share * best(adamw) for share in SHARES]
            both = [f"{_said(problem, adamw[rate])}, {_said(problem, signum[rate])}" for rate in at]
            shares.append([problem, f"{steps}", _said(problem, signum[best(signum)]), *both])
    return [rates, spread, shares]


def _share(share):
    return "AdamW's best rate" if share == 1 else f"1/{1 / share:g} of it"


def _said(problem, score):
    return f"{score:.3f}" if problem == "transformer" else f"{1 - score:.3f}"


def _three(found):
    return ", ".join(f"{x:.3g}" for x in (min(found), statistics.median(found), max(found))) if found else ""


def table(records: list[Record]) -> rich.console.Group:
    """The summary: accuracies of images, and nats per byte of the transformer."""
    config, drawn = records[0]["config"], []
    for header, *rows in summary(records):
        drawn.append(rich.table.Table(title=f"{config['workers']} workers; accuracy, of the transformer nats per byte"))
        for column in header:
            drawn[-1].add_column(column)
        for row in rows:
            drawn[-1].add_row(*row)
    return rich.console.Group(*drawn)


def plot(records: list[Record], folder: str) -> list[pathlib.Path]:
    """Draw what is to be small against the learning rate over AdamW's best.

    Returns:
      The figures' files.
    """
    found = cells(records)
    title = f"held-out training data, {records[0]['config']['workers']} workers"
    figure, panels = plots.panels(len(found), title=title)
    for axes, (problem, steps) in zip(panels, found, strict=True):
        for method in records[0]["config"]["methods"]:
            curve = scores(records, problem, method, steps)
            if curve:
                axes.plot(sorted(curve), [curve[rate] for rate in sorted(curve)], marker=".", label=method)
        label = "nats per byte" if problem == "transformer" else "share of wrong answers"
        axes.set(title=f"{problem}, {steps} steps", xlabel="learning rate", ylabel=label, xscale="log", yscale="log")
    panels[0].legend()
    return plots.save(figure, folder, "rates")
