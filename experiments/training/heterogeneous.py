"""Workers whose data differ: votes, votes that abstain, memory, and means.

Eight workers share the digits by labels: each draws the shares of the labels in its shard from a Dirichlet distribution, from
all alike (infinity) to nearly one label each; "sorted" gives every worker its eighth of the images in the order of their
labels. Rates are chosen once for each method and degree, on the last fifth of the training images with seeds of their own,
from a grid with a factor of two, which grows until the best is not at its edge; then every method trains on all training
images with the seeds that are reported.

    python -m experiments heterogeneous
    python -m experiments heterogeneous --seeds 3 --alphas 0.1

Time and numbers to expect are in experiments/README.md.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
import dataclasses
import pathlib
from typing import Any

import numpy as np
import optax
import rich.table

from experiments.common import data
from experiments.common import plots
from experiments.common import progress
from experiments.common import runners
from experiments.common import trials
from experiments.common.flags import flag
from experiments.common.records import Record
import signopt
from signopt import codecs

AXIS = runners.AXIS
SORTED, ALIKE = 0.0, float("inf")


@dataclasses.dataclass(frozen=True)
class Config:
    """The flags."""

    methods: tuple[str, ...] = flag((), "what to compare; all if none is named")
    alphas: tuple[float, ...] = flag(
        (SORTED, 0.1, 0.3, 1.0, ALIKE), "how alike the workers' labels are: inf all, 0 sorted", at_least=0
    )
    workers: int = flag(8, "number of workers", at_least=2)
    batch_size: int = flag(8, "examples per worker and step", at_least=1)
    steps: int = flag(600, "training steps", at_least=1)
    seeds: int = flag(10, "number of runs: seeds 0, 1, 2, ...", at_least=1)
    tuning_seeds: int = flag(2, "number of runs that choose a rate: seeds 1000, 1001, ...", at_least=1)
    output: str = flag("results/heterogeneous", "folder for records and plots")


def methods(config: Config) -> dict[str, tuple[Callable[[Any], optax.GradientTransformation], float]]:
    """From a learning rate or schedule to an optimizer, and the rate in the middle of its grid."""
    here: dict[str, Any] = {"axis_name": AXIS, "num_workers": config.workers}
    scaled = codecs.scaled_sign(block=256)

    def ternary(rate):
        return optax.chain(
            signopt.workers.per_worker(
                optax.chain(optax.ema(0.9, debias=False), signopt.scale_by_sign(threshold=2.0)), config.workers
            ),
            signopt.majority_vote(AXIS),
            optax.scale_by_learning_rate(rate),
        )

    def compressed(inner, **how):
        border = signopt.mean(AXIS, num_workers=config.workers, **how)
        return lambda rate: optax.chain(border, inner(rate))

    both = {"uplink": scaled, "downlink": scaled}
    momentum = lambda rate: optax.sgd(rate, momentum=0.9)  # noqa: E731
    return {
        "Signum, one-bit vote": (lambda rate: signopt.signum(rate, wire="one_bit", **here), 8e-3),
        "ternary vote": (ternary, 8e-3),
        "EF-Signum": (lambda rate: signopt.ef_signum(rate, **here), 8e-3),
        "EF-signSGD": (lambda rate: signopt.ef_signsgd(rate, **here), 1.0),
        "SGD, scaled signs both ways": (compressed(momentum, **both), 0.2),
        "SGD, scaled signs without memory": (compressed(momentum, memory=None, **both), 0.2),
        "SGD, top 1 % with memory": (compressed(momentum, uplink=codecs.top_k(0.01)), 0.2),
        "1-bit Adam": (lambda rate: signopt.onebit_adam(rate, b2=0.98, look_every=40, settled=0.0, **here), 1.6e-2),
        "Adam, float32 mean": (lambda rate: optax.chain(signopt.mean(AXIS), optax.adam(rate)), 1.6e-2),
        "SGD, float32 mean": (lambda rate: optax.chain(signopt.mean(AXIS), momentum(rate)), 0.2),
    }


def orders(seed: int, labels: np.ndarray, config: Config, alpha: float) -> np.ndarray:
    """Which examples each worker sees, worker after worker; shape (steps, workers * batch_size)."""
    shape = (config.workers, config.batch_size, config.steps)
    if alpha == SORTED:
        return data.sorted_batches(seed, labels, *shape)
    if alpha == ALIKE:
        return data.batches(seed, len(labels), config.workers * config.batch_size, config.steps)
    rng = np.random.default_rng(seed)
    shares = rng.dirichlet(np.full(labels.max() + 1, alpha), config.workers)
    places = [np.flatnonzero(labels == label) for label in range(labels.max() + 1)]
    drawn = []
    for share in shares:
        own = rng.choice(len(share), config.steps * config.batch_size, p=share)
        picked = np.empty(len(own), int)
        for label, place in enumerate(places):
            picked[own == label] = rng.choice(place, (own == label).sum())
        drawn.append(picked.reshape(config.steps, config.batch_size))
    return np.concatenate(drawn, axis=1)


def run(config: Config) -> Iterator[Record]:
    """Choose a rate for every method and degree, and train with it.

    Yields:
      A record for each method, degree and seed.
    """
    known = methods(config)
    for name in progress.track(config.methods or tuple(known), "methods"):
        make, middle = known[name]
        for alpha in config.alphas:

            def train(rates, seeds, *, validation, make=make, alpha=alpha):
                def optimizer(rate):
                    relative = optax.cosine_decay_schedule(1.0, config.steps)
                    return make(lambda count: rate * relative(count))

                return trials.train(
                    optimizer,
                    np.asarray(rates, np.float32),
                    np.asarray(seeds),
                    workers=config.workers,
                    steps=config.steps,
                    batch_size=config.batch_size,
                    validation=validation,
                    orders=lambda seed, labels: orders(seed, labels, config, alpha),
                ).test_accuracy

            def tried(powers, train=train, middle=middle):
                rates, seeds = trials.grid([middle * 2.0**power for power in powers], seeds=config.tuning_seeds)
                return train(rates, 1000 + seeds, validation=True).reshape(len(powers), -1).mean(1)

            best = middle * 2.0 ** inner_best(tried, range(-3, 3))
            chosen = np.arange(config.seeds)
            accuracies = train([best] * config.seeds, chosen, validation=False)
            for i, accuracy in zip(chosen, accuracies, strict=True):
                yield {
                    "method": name,
                    "alpha": alpha,
                    "learning_rate": best,
                    "seed": int(i),
                    "test_accuracy": float(accuracy),
                }


def inner_best(tried: Callable[[Sequence[int]], Sequence[float]], powers: Iterable[int]) -> int:
    """The power with the best result, of a range that grows on the side of the best until that is not at its edge.

    It grows no further than to three times its length.

    Args:
      tried: From powers to a result for each; the larger the better.
      powers: Those to begin with, in order.

    Examples:
      >>> inner_best(lambda powers: [-((power - 4) ** 2) for power in powers], range(-3, 3))
      4
    """
    results = dict(zip(powers, tried(list(powers)), strict=True))
    best, most = max(results, key=results.__getitem__), 3 * len(results)
    while best in (low := min(results), high := max(results)) and len(results) < most:
        more = [low - 1] if best == low else [high + 1]
        results |= zip(more, tried(more), strict=True)
        best = max(results, key=results.__getitem__)
    return best


def _name(alpha: float) -> str:
    return {SORTED: "sorted", ALIKE: "alike"}.get(alpha, f"{alpha:g}")


def groups(records: list[Record]) -> dict[str, dict[float, list[float]]]:
    """Accuracies of all seeds, by method and degree."""
    found: dict[str, dict[float, list[float]]] = {}
    for record in records[1:]:
        found.setdefault(record["method"], {}).setdefault(record["alpha"], []).append(record["test_accuracy"])
    return found


def table(records: list[Record]) -> rich.table.Table:
    """Mean accuracy, and its spread over seeds, of each method at each degree."""
    config, found = records[0]["config"], groups(records)
    drawn = rich.table.Table(
        title=f"digits, {config['workers']} workers, {config['steps']} steps, {config['seeds']} seeds: test accuracy"
    )
    drawn.add_column("labels by Dirichlet", justify="left")
    alphas = list(next(iter(found.values())))
    for alpha in alphas:
        drawn.add_column(_name(alpha), justify="right")
    for method, by_alpha in found.items():
        drawn.add_row(method, *(f"{np.mean(x):.3f} ± {np.std(x):.3f}" for x in by_alpha.values()))
    return drawn


def plot(records: list[Record], folder: str) -> list[pathlib.Path]:
    """Draw accuracy against how alike the workers' labels are.

    Returns:
      The figures' files.
    """
    config, found = records[0]["config"], groups(records)
    title = f"digits, {config['workers']} workers, {config['seeds']} seeds"
    figure, (axes,) = plots.panels(1, title=title, width=7, height=4.5)
    for method, by_alpha in found.items():
        plots.band(axes, [_name(alpha) for alpha in by_alpha], list(by_alpha.values()), label=method, marker="o")
    axes.set(xlabel="how alike the workers' labels are", ylabel="test accuracy")
    axes.legend(loc="lower right")
    return plots.save(figure, folder, "heterogeneous")
