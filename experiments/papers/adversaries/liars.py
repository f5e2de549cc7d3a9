"""Bad workers among nine: what a vote survives, and what a mean, a median and a trimmed mean do.

Figure: test accuracy on the digits against the number of adversaries, for each kind of them: the vote without and with
momentum, the mean, and two robust means from the literature, the coordinate-wise median and the trimmed mean (Yin et
al., `Byzantine-Robust Distributed Learning <https://arxiv.org/abs/1803.01498>`_, 2018), which need all gradients in
float32. Then what longer training and larger batches recover, and the bound of Theorem 2 of `fault tolerance
<https://arxiv.org/abs/1810.05291>`_ beside a quadratic that meets its assumptions.
"""

from collections.abc import Iterator
import dataclasses
import math
import pathlib
import statistics

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax
import rich.table

from experiments.common import optimizers
from experiments.common import plots
from experiments.common import progress
from experiments.common import report
from experiments.common import runners
from experiments.common import trials
from experiments.common.flags import flag
from experiments.common.records import Record
import signopt
from signopt import adversary
from signopt import theory

AXIS = runners.AXIS

KINDS = {
    "inverted": adversary.inverted,
    "random": lambda: adversary.random(jax.random.key(0)),
    "scaled": lambda: adversary.scaled(-1000.0),
    "silent": adversary.silent,
    "colluding": adversary.colluding,
}
METHODS = ("vote", "signum + vote", "mean", "median", "trimmed mean")
# The quadratic of Theorem 2: f = |x|^2 / 2 in 20 dimensions from (1, ..., 1), normal noise of deviation 2, 64 steps.
QUADRATIC = {"dimension": 20, "noise": 2.0, "steps": 64, "seeds": 100}


@dataclasses.dataclass(frozen=True)
class Config:
    """The flags."""

    kinds: tuple[str, ...] = flag(tuple(KINDS), "what adversaries send", choices=tuple(KINDS))
    methods: tuple[str, ...] = flag(METHODS, "what to compare", choices=METHODS)
    workers: int = flag(9, "number of workers, bad ones included", at_least=1)
    adversaries: tuple[int, ...] = flag((0, 1, 2, 3, 4), "how many are bad", at_least=0)
    wire: str = flag("two_bit", "how votes travel", choices=("one_bit", "two_bit", "psum"))
    steps: int = flag(600, "training steps", at_least=1)
    batch_size: int = flag(8, "examples per worker and step", at_least=1)
    more: int = flag(4, "how many times as many steps, or examples, the runs that recover get; none if 1", at_least=1)
    bound: bool = flag(True, "also run the quadratic of Theorem 2")
    seeds: int = flag(5, "number of runs: seeds 0, 1, 2, ...", at_least=1)
    output: str = flag("results/adversaries", "folder for records and plots")


def run(config: Config) -> Iterator[Record]:
    """Train with each method among each kind of adversaries, then recover, then the bound.

    Yields:
      A record for each method, kind, number of adversaries and seed; one for each number of adversaries on the quadratic.
    """
    pairs = [(method, kind) for method in config.methods for kind in config.kinds]
    for method, kind in progress.track(pairs, "liars"):
        yield from _train(config, method, kind, config.steps, config.batch_size)
    if config.more > 1 and "signum + vote" in config.methods:
        for steps, batch in ((config.more, 1), (1, config.more)):
            yield from _train(config, "signum + vote", "inverted", steps * config.steps, batch * config.batch_size)
    if config.bound:
        yield from _quadratic(config)


def _optimizer(config, method, kind, num_adversaries, steps):
    """A chain with adversaries directly left of its border."""
    corrupt = adversary.corrupt(KINDS[kind](), num_adversaries, AXIS)

    def schedule(peak):
        return optax.cosine_decay_schedule(peak, steps)

    if method in ("vote", "signum + vote"):
        own = signopt.scale_by_signum(0.9) if method == "signum + vote" else optax.identity()
        return optax.chain(
            signopt.workers.per_worker(own, config.workers),
            corrupt,
            signopt.majority_vote(AXIS, wire=config.wire),
            optax.scale_by_learning_rate(schedule(optimizers.RECIPES["signum"].learning_rate)),
        )
    border = {
        "mean": lambda: signopt.mean(AXIS),
        "median": lambda: signopt.robust_mean(AXIS),
        "trimmed mean": lambda: signopt.robust_mean(AXIS, method="trimmed", trim=0.25),
    }[method]()
    return optax.chain(corrupt, border, optax.sgd(schedule(optimizers.RECIPES["sgd"].learning_rate), momentum=0.9))


def _train(config, method, kind, steps, batch_size):
    """Train with every number of adversaries and every seed at once."""
    bad, seeds = trials.grid(config.adversaries, seeds=config.seeds)

    def make(num_adversaries):
        return _optimizer(config, method, kind, num_adversaries, steps)

    found = trials.train(make, bad, seeds, workers=config.workers, steps=steps, batch_size=batch_size)
    for i in range(len(bad)):
        yield {
            "method": method,
            "kind": kind,
            "adversaries": int(bad[i]),
            "seed": int(seeds[i]),
            "steps": steps,
            "batch_size": batch_size,
            "test_accuracy": float(found.test_accuracy[i]),
            "train_loss": float(found.train_loss[i]) if np.isfinite(found.train_loss[i]) else None,
        }


def _quadratic(config):
    """The mean of the gradient's l1 norm under inverted votes, in the setting of Theorem 2."""
    dimension, noise, steps = QUADRATIC["dimension"], QUADRATIC["noise"], QUADRATIC["steps"]
    problem = {"gap": 0.5 * dimension, "smoothness": float(dimension), "noise": noise * dimension}
    rate = math.sqrt(problem["gap"] / (problem["smoothness"] * steps))

    def mean_norm(num_adversaries, key):
        tx = optax.chain(
            adversary.corrupt(KINDS["inverted"](), num_adversaries, AXIS),
            signopt.signsgd(rate, axis_name=AXIS, wire=config.wire),
        )

        def step(state, batch):
            x, opt_state = state
            updates, opt_state = tx.update(x + batch[0] * noise / math.sqrt(steps), opt_state, x)
            return (x + updates, opt_state), jnp.abs(x).sum()

        start = jnp.ones(dimension)
        samples = jax.random.normal(key, (steps, config.workers, dimension))
        together = signopt.workers.simulate(step, config.workers, axis_name=AXIS)
        return lax.scan(together, (start, tx.init(start)), samples)[1].mean()

    keys = jax.random.split(jax.random.key(0), QUADRATIC["seeds"])
    bad = np.array([k for k in config.adversaries if 2 * k < config.workers])
    found = jax.jit(jax.vmap(jax.vmap(mean_norm, (None, 0)), (0, None)))(bad, keys)
    for k, norms in zip(bad.tolist(), np.asarray(found), strict=True):
        yield {
            "method": "theorem 2",
            "adversaries": k,
            "norm": float(norms.mean()),
            "error": float(norms.std(ddof=1) / math.sqrt(len(norms))),
            "bound": theory.adversarial_vote_rate(
                steps, **problem, num_workers=config.workers, adversaries=k / config.workers
            ),
        }


def accuracies(
    records: list[Record], method: str, kind: str, *, steps: int | None = None, batch_size: int | None = None
) -> dict[int, list[float]]:
    """The test accuracies of all seeds, by the number of adversaries."""
    config = records[0]["config"]
    wanted = (method, kind, steps or config["steps"], batch_size or config["batch_size"])
    found = {}
    for record in records[1:]:
        if (record["method"], record.get("kind"), record.get("steps"), record.get("batch_size")) == wanted:
            found.setdefault(record["adversaries"], []).append(record["test_accuracy"])
    return found


def table(records: list[Record]) -> rich.table.Table:
    """Mean accuracy over seeds by method, kind and number of adversaries; then the bound."""
    config = records[0]["config"]
    bad = config["adversaries"]
    drawn = rich.table.Table(
        title=f"test accuracy by adversaries among {config['workers']} workers, mean of {config['seeds']} seeds"
    )
    for column in ("method", "adversaries are", *map(str, bad)):
        drawn.add_column(column, justify="left" if column in ("method", "adversaries are") else "right")
    for label, kind, found in _lines(records):
        drawn.add_row(label, kind, *(f"{statistics.mean(found[k]):.3f}" for k in bad))
    bounds = {r["adversaries"]: r for r in records[1:] if r["method"] == "theorem 2"}
    if bounds:
        for name, field in (("mean gradient norm, quadratic", "norm"), ("its bound, theorem 2", "bound")):
            drawn.add_row(name, "inverted", *(f"{bounds[k][field]:.2f}" if k in bounds else "" for k in bad))
    return drawn


def summary(records: list[Record]) -> list[list[str]]:
    """The table's rows of what votes and what lies loudest, and the bound."""
    header, *rows = report.cells(table(records))
    shown = [row for row in rows if row[0] != "vote" or row[1] in ("inverted", "colluding")]
    shown = [row for row in shown if "vote" in row[0] or row[1] in ("inverted", "scaled")]
    return [["among nine, " + header[0], *header[1:]], *shown]


def plot(records: list[Record], folder: str) -> list[pathlib.Path]:
    """Draw accuracy against the number of adversaries, a panel for each kind, and the bound.

    Returns:
      The figures' files.
    """
    config = records[0]["config"]
    title = f"digits, {config['workers']} workers, {config['seeds']} seeds"
    bounds = [record for record in records[1:] if record["method"] == "theorem 2"]
    figure, panels = plots.panels(len(config["kinds"]) + bool(bounds), title=title)
    for panel, kind in zip(panels, config["kinds"], strict=False):
        for label, of, found in _lines(records):
            if of == kind:
                bad = sorted(found)
                plots.band(panel, bad, [found[k] for k in bad], label=label, marker=".")
        panel.set(title=kind, xlabel="adversaries", ylabel="test accuracy", ylim=(0, 1))
        panel.legend(fontsize=7)
    if bounds:
        bad = [record["adversaries"] for record in bounds]
        for field, label in (("bound", "theorem 2"), ("norm", "measured")):
            panels[-1].plot(bad, [record[field] for record in bounds], marker=".", label=label)
        panels[-1].set(
            title="inverted, quadratic", xlabel="adversaries", ylabel="mean l1 norm of gradient", ylim=(0, None)
        )
        panels[-1].legend()
    return plots.save(figure, folder, "liars")


def _lines(records):
    """Each line of the figure: its label, the kind of adversaries, accuracies by their number."""
    config = records[0]["config"]
    for method in config["methods"]:
        for kind in config["kinds"]:
            yield method, kind, accuracies(records, method, kind)
    for steps, batch in ((config["more"], 1), (1, config["more"])):
        sizes = {"steps": steps * config["steps"], "batch_size": batch * config["batch_size"]}
        found = accuracies(records, "signum + vote", "inverted", **sizes)
        if config["more"] > 1 and found:
            yield f"signum + vote, {sizes['steps']} steps x {sizes['batch_size']}", "inverted", found
