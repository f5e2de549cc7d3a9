"""Figure 2 of MH-signSGD: the learning rate that a vote finds by itself against the best of a sweep.

Four workers with 64 images each train the paper's network, two 5x5 convolutions with 2x2 pooling and a dense layer of 512
units, on the digits (or on MNIST, from a file). Voted signSGD and voted Signum get every learning rate of a sweep, a
factor of ten apart, on seed 0; the best at the end also runs on the other seeds. Adaptive MH-signSGD (Yang et al., 2020, algorithm 1 and
equation 1) gets nothing: neither a learning rate nor a schedule. Everything is constant over time but what it finds.
"""

from collections.abc import Iterator
import dataclasses
import functools
import pathlib
import statistics
import time

import jax
import numpy as np
import optax
import rich.table

from experiments.common import data
from experiments.common import models
from experiments.common import plots
from experiments.common import progress
from experiments.common import runners
from experiments.common.flags import flag
from experiments.common.records import Record
import signopt

AXIS = runners.AXIS

# Every method from a learning rate and the number of workers; the adaptive ones take none.
SWEPT = {
    "signSGD": lambda rate, workers: signopt.signsgd(rate, axis_name=AXIS, wire="one_bit"),
    "Signum": lambda rate, workers: signopt.signum(rate, axis_name=AXIS, num_workers=workers, wire="one_bit"),
}
ADAPTIVE = {
    "adaptive": lambda workers: signopt.mh_signsgd(axis_name=AXIS, num_workers=workers),
    "adaptive, the paper's": lambda workers: signopt.mh_signsgd(
        axis_name=AXIS, num_workers=workers, beta=0.0, estimator="exact", wire="psum"
    ),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """The flags."""

    dataset: str = flag("digits", "what to learn", choices=data.NAMES)
    data_file: str = flag("", "an .npz with x_train, y_train, x_test and y_test, for mnist and cifar10")
    workers: int = flag(4, "number of workers", at_least=2)
    batch_size: int = flag(64, "examples per worker and step", at_least=1)
    steps: int = flag(1000, "training steps", at_least=1)
    learning_rates: tuple[float, ...] = flag((1e-5, 1e-4, 1e-3, 1e-2, 1e-1), "what the others may choose from")
    seeds: int = flag(5, "number of runs: seeds 0, 1, 2, ...", at_least=1)
    evaluate_every: int = flag(50, "steps between two looks at the test images", at_least=1)
    output: str = flag("results/adaptive", "folder for records and plots")


def run(config: Config) -> Iterator[Record]:
    """Run the adaptive methods on all seeds, and of each other method the best of a sweep on seed 0.

    Yields:
      A record for each method, learning rate, seed and look at the test images.
    """
    dataset = data.load(config.dataset, config.data_file)
    net = models.network(models.CNN, dataset.train_images.shape[1:])
    for name, make in ADAPTIVE.items():
        for seed in progress.track(range(config.seeds), f"{name}: seeds"):
            for record in _train(config, dataset, net, make(config.workers), seed):
                yield {"method": name, "tuned": None} | record
    for name, make in SWEPT.items():
        accuracies = {}
        for rate in progress.track(config.learning_rates, f"{name}: learning rates"):
            for record in _train(config, dataset, net, make(rate, config.workers), seed=0):
                yield {"method": name, "tuned": rate} | record
            accuracies[rate] = record["test_accuracy"]
        best = max(accuracies, key=accuracies.__getitem__)
        for seed in progress.track(range(1, config.seeds), f"{name}: seeds"):
            for record in _train(config, dataset, net, make(best, config.workers), seed):
                yield {"method": name, "tuned": best} | record


def _train(config, dataset, net, optimizer, seed):
    """Train one network; yields records without the method's name."""
    loss = functools.partial(models.loss, net)
    value_and_grad = signopt.workers.value_and_grad(loss, axis_name=AXIS)

    def step(state, batch):
        params, opt_state = state
        value, gradients = value_and_grad(params, *batch)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        found = optax.tree.get(opt_state, "learning_rate", filtering=lambda path, value: True)
        return (optax.apply_updates(params, updates), opt_state), (
            value,
            jax.numpy.float32(0) if found is None else found,
        )

    runner = runners.mesh(step, config.workers)
    params = net.init(jax.random.key(seed))
    state = runner.start(jax.tree.map(lambda x: np.asarray(x)[None], (params, optimizer.init(params))))
    order = data.batches(seed, len(dataset.train_labels), config.workers * config.batch_size, config.steps)
    accuracy = jax.jit(functools.partial(models.accuracy, net))
    begin = time.perf_counter()
    for start in range(0, config.steps, config.evaluate_every):
        chosen = order[None, start : start + config.evaluate_every]
        state, (losses, rates) = runner.advance(state, (dataset.train_images[chosen], dataset.train_labels[chosen]))
        params = jax.tree.map(lambda x: x[0], runner.read(state)[0])
        yield {
            "seed": seed,
            "step": start + chosen.shape[1],
            "train_loss": float(losses[0, -1].mean()),
            "learning_rate": float(rates[0, -1, 0]),
            "test_accuracy": float(accuracy(params, dataset.test_images, dataset.test_labels)),
            "seconds": round(time.perf_counter() - begin, 3),
        }


def best_rates(records: list[Record]) -> dict[str, float | None]:
    """The learning rate of each method that was best on seed 0; None for those that find theirs."""
    found = {}
    for record in records[1:]:
        if record["step"] == records[0]["config"]["steps"] and record["seed"] == 0:
            accuracy, _ = found.get(record["method"], (-1.0, None))
            if record["test_accuracy"] > accuracy:
                found[record["method"]] = (record["test_accuracy"], record["tuned"])
    return {name: rate for name, (_, rate) in found.items()}


def final(records: list[Record]) -> dict[str, list[Record]]:
    """The last record of each seed, by method, at its best learning rate."""
    last = records[0]["config"]["steps"]
    return {
        name: [r for r in records[1:] if (r["method"], r["tuned"], r["step"]) == (name, rate, last)]
        for name, rate in best_rates(records).items()
    }


def table(records: list[Record]) -> rich.table.Table:
    """Test accuracy at the end, averaged over seeds."""
    config = records[0]["config"]
    drawn = rich.table.Table(title=f"{config['dataset']}, {config['workers']} workers, {config['steps']} steps")
    for column in ("method", "learning rate", "test accuracy", "seeds", "seconds"):
        drawn.add_column(column, justify="left" if column == "method" else "right")
    for name, ends in final(records).items():
        accuracies = [record["test_accuracy"] for record in ends]
        spread = f" ± {statistics.stdev(accuracies):.4f}" if len(ends) > 1 else ""
        tuned = ends[0]["tuned"]
        rate = (
            f"{tuned:g}, best of {len(config['learning_rates'])}"
            if tuned
            else f"{ends[0]['learning_rate']:.1e} at the end"
        )
        seconds = sum(record["seconds"] for record in ends)
        drawn.add_row(name, rate, f"{statistics.mean(accuracies):.4f}{spread}", str(len(ends)), f"{seconds:.0f}")
    return drawn


def plot(records: list[Record], folder: str) -> list[pathlib.Path]:
    """Draw test accuracy against steps, the sweeps, and the learning rates that were found.

    Returns:
      The figures' files.
    """
    config = records[0]["config"]
    title = f"{config['dataset']}, {config['workers']} workers, {config['seeds']} seeds"
    figure, (by_step, by_rate, found) = plots.panels(3, title=title)
    for name, tuned in best_rates(records).items():
        own = [record for record in records[1:] if record["method"] == name]
        kept = [record for record in own if record["tuned"] == tuned]
        steps = sorted({record["step"] for record in kept})

        def of_seeds(field, kept=kept, steps=steps):
            return [[record[field] for record in kept if record["step"] == step] for step in steps]

        label = name if tuned is None else f"{name}, rate {tuned:g}"
        plots.band(by_step, steps, of_seeds("test_accuracy"), label=label)
        if tuned is None:
            plots.band(found, steps, of_seeds("learning_rate"), label=label)
            by_rate.axhline(
                float(np.mean(of_seeds("test_accuracy")[-1])), color=found.lines[-1].get_color(), label=label
            )
        else:
            ends = [r for r in own if r["seed"] == 0 and r["step"] == config["steps"]]
            by_rate.plot([r["tuned"] for r in ends], [r["test_accuracy"] for r in ends], "o-", label=name)
    by_step.set(xlabel="steps", ylabel="test accuracy", ylim=(0.8, 1.0))
    by_rate.set(xlabel="learning rate", ylabel="test accuracy at the end", xscale="log")
    found.set(xlabel="steps", ylabel="learning rate that was found", yscale="log")
    for axes in (by_step, by_rate, found):
        axes.legend()
    return plots.save(figure, folder, "network")
