"""Eight workers train a Flax network on handwritten digits: a float32 mean against a vote of one bit per parameter.

Every worker takes the gradient of its own batch. First the workers average gradients, 32 bits a parameter, and take a
step of SGD with momentum; then each sends only the signs of its momentum (Signum, Bernstein et al., 2018, algorithm 2)
and all take a step along the majority's. Learning rates follow a cosine to zero.

    python -m experiments train
    python -m experiments train --runner simulate --seeds 10 --wire one_bit,two_bit
    python -m experiments train --checkpoint results/checkpoint             # and after a crash the same with --resume
    mpirun -n 4 python -m experiments train --distributed                   # or srun: docs/many_hosts.md

Time and numbers to expect are in experiments/README.md.
"""

from collections.abc import Iterator
import dataclasses
import functools
import pathlib
import statistics
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.progress
import rich.table

from experiments.common import checkpoints
from experiments.common import data
from experiments.common import models
from experiments.common import optimizers
from experiments.common import plots
from experiments.common import processes
from experiments.common import runners
from experiments.common.flags import flag
from experiments.common.records import Record
import signopt

MODELS = {"digits": models.MLP, "mnist": models.CNN, "cifar10": models.CNN}
RUNNERS = {"simulate": runners.simulate, "mesh": runners.mesh, "pmap": runners.pmap}


@dataclasses.dataclass(frozen=True)
class Config:
    """The flags."""

    optimizer: tuple[str, ...] = flag(("sgd", "signum"), "what to compare", choices=tuple(optimizers.RECIPES))
    wire: tuple[str, ...] = flag(("one_bit",), "how votes travel", choices=("one_bit", "two_bit", "psum"))
    workers: int = flag(0, "number of workers; if 0, eight, or with --distributed one for each device", at_least=0)
    distributed: bool = flag(False, "be one of many processes, started by srun, mpirun, Kubernetes or by hand")
    runner: str = flag("mesh", "one device, a mesh of devices, or jax.pmap", choices=tuple(RUNNERS))
    dataset: str = flag("digits", "what to learn", choices=data.NAMES)
    data_file: str = flag("", "an .npz with x_train, y_train, x_test and y_test, for mnist and cifar10")
    validation: bool = flag(False, "test on the last fifth of the training images instead, to tune")
    shards: str = flag(
        "shuffled", "what a worker sees: any examples, or some labels only", choices=("shuffled", "sorted")
    )
    steps: int = flag(600, "training steps", at_least=1)
    batch_size: int = flag(8, "examples per worker and step", at_least=1)
    learning_rate: float | None = flag(None, "peak of the cosine schedule; each optimizer's own if None", at_least=0)
    seeds: int = flag(3, "number of runs: seeds 0, 1, 2, ...", at_least=1)
    evaluate_every: int = flag(25, "steps between two looks at the test images", at_least=1)
    checkpoint: str = flag("", "folder for checkpoints, one at each look at the test images; none if empty")
    resume: bool = flag(False, "go on from the newest checkpoint, on as many workers as this run has")
    output: str = flag("results/train", "folder for records and plots")

    def __post_init__(self):
        if not (self.workers or self.distributed):  # how many devices there are is known once all processes have met
            object.__setattr__(self, "workers", 8)


# What a run that goes on has to share with the one that wrote the checkpoint.
_FIXED = (
    "dataset",
    "data_file",
    "validation",
    "shards",
    "steps",
    "batch_size",
    "learning_rate",
    "seeds",
    "evaluate_every",
)


class TrainState(NamedTuple):
    """What a worker carries from step to step.

    Attributes:
      params: The network's parameters. Shared.
      opt_state: The optimizer's state, per worker left of its vote or mean, shared right of it.
    """

    params: Any
    opt_state: optax.OptState


def run(config: Config) -> Iterator[Record]:
    """Train with each optimizer over each wire, and look at the test images on the way.

    Returns:
      A record for each optimizer, wire, seed and look at the test images. A run that goes on repeats those from before
      its checkpoint.

    Raises:
      OSError: Before anything is trained or written, if there is nothing to go on from or it would be lost, or if many
        processes shall be one device.
    """
    if config.distributed and config.runner == "simulate":
        raise processes.ProcessError(
            "`--distributed` has to come with `--runner mesh` or `pmap`, got simulate, which has all workers on one device."
        )
    runs = [(name, wire) for name in config.optimizer for wire in _wires(config, name)]
    saved = _open_checkpoints(config, runs)  # now, not when the first record is asked for
    return _run(config, runs, saved)


def _run(config, runs, saved):
    dataset = processes.together(lambda: data.load(config.dataset, config.data_file))
    dataset = data.hold_out(dataset) if config.validation else dataset
    net = models.network(MODELS[config.dataset], dataset.train_images.shape[1:])
    columns = ("{task.description}", rich.progress.BarColumn(), rich.progress.MofNCompleteColumn(), "steps")
    elapsed = rich.progress.TimeElapsedColumn()
    with rich.progress.Progress(*columns, elapsed, disable=not processes.is_first()) as progress:
        for name, wire in runs:
            task = progress.add_task(f"{name}, {wire}", total=config.steps)
            folder = _folder(config, name, wire) if config.checkpoint else None
            for record in _train(config, dataset, net, optimizers.RECIPES[name], wire, folder, saved.get((name, wire))):
                progress.update(task, completed=record["step"])
                yield {"optimizer": name, "wire": wire} | record


def _wires(config, name):
    return config.wire if optimizers.RECIPES[name].votes else ("mean",)


def _folder(config, name, wire):
    return pathlib.Path(config.checkpoint) / f"{name}-{wire}"


def _open_checkpoints(config, runs):
    """The newest checkpoint of each run that has one."""
    if not config.checkpoint:
        if config.resume:
            raise checkpoints.CheckpointError("`--resume` has to come with `--checkpoint`, the folder to go on from.")
        return {}
    if config.runner == "pmap":
        raise checkpoints.CheckpointError(
            "`--checkpoint` has to come with `--runner mesh` or `simulate`, got pmap, whose states do not say what is "
            "one worker's own."
        )
    manifest = {"experiment": "train"} | {field: getattr(config, field) for field in _FIXED}
    claim = functools.partial(checkpoints.claim, config.checkpoint, manifest, resume=config.resume)
    processes.together(claim, only_first=True)
    if not config.resume:
        return {}
    found = processes.together(lambda: {run: checkpoints.restore(_folder(config, *run)) for run in runs})
    if not processes.same([-1 if restored is None else restored.step for restored in found.values()]):
        raise checkpoints.CheckpointError(
            f"`--checkpoint {config.checkpoint}` has to be a folder that every process sees, got other checkpoints on some. "
            "Name one on a shared file system."
        )
    return {run: restored for run, restored in found.items() if restored is not None}


def _train(config, dataset, net, recipe, wire, folder, saved):
    """Train one network per seed with one optimizer; yields records without its name."""
    peak = recipe.learning_rate if config.learning_rate is None else config.learning_rate

    def make(workers):
        return recipe.make(optax.cosine_decay_schedule(peak, config.steps), wire, workers)

    def init(optimizer, seed):
        params = net.init(jax.random.key(seed))
        return TrainState(params, optimizer.init(params))

    # Under pmap every state has an axis of workers already.
    optimizer = make(None if config.runner == "pmap" else config.workers)
    runner = RUNNERS[config.runner](_step(net, optimizer), config.workers)

    def of_seeds(optimizer):
        return jax.vmap(functools.partial(init, optimizer))

    seeds = np.arange(config.seeds)
    if saved is None:
        states, begun, found = jax.jit(of_seeds(optimizer))(seeds), 0, []
    else:
        like = jax.eval_shape(of_seeds(make(saved.about["workers"])), seeds)
        states = checkpoints.unflatten(saved, like, folder)
        each = [jax.tree.map(lambda x, i=i: x[i], states) for i in range(config.seeds)]
        each = [signopt.workers.resize(state, config.workers) for state in each]
        states = jax.tree.map(lambda *runs: jnp.stack(runs), *each)
        begun, found = saved.step, saved.about["records"]
        yield from found
    accuracies = jax.jit(jax.vmap(functools.partial(models.accuracy, net), in_axes=(0, None, None)))
    shapes = jax.eval_shape(net.init, jax.random.key(0))
    sent = signopt.wire.bytes_sent(shapes, config.workers, make(config.workers), axis_name=optimizers.AXIS)
    num_params = sum(x.size for x in jax.tree.leaves(states.params)) // config.seeds
    order = np.stack([_order(config, dataset.train_labels, seed) for seed in range(config.seeds)])

    carried, seconds = runner.start(states), found[-1]["seconds"] if found else 0.0
    for start in range(begun, config.steps, config.evaluate_every):
        chosen = order[:, start : start + config.evaluate_every]
        begin = time.perf_counter()
        carried, losses = jax.block_until_ready(
            runner.advance(carried, (dataset.train_images[chosen], dataset.train_labels[chosen]))
        )
        seconds += time.perf_counter() - begin
        done = start + chosen.shape[1]
        states = runner.read(carried)
        if not processes.is_first():
            continue
        correct = accuracies(states.params, dataset.test_images, dataset.test_labels)
        looks = [
            {
                "seed": seed,
                "step": done,
                "train_loss": float(losses[seed, -1].mean()),
                "test_accuracy": float(correct[seed]),
                "bits_per_parameter": 8 * sent / num_params,
                "megabytes": sent * config.workers * done / 1e6,
                "learning_rate": peak,
                "seconds": round(seconds, 3),
            }
            for seed in range(config.seeds)
        ]
        found = found + looks
        if folder is not None:
            checkpoints.save(folder, done, states, {"workers": config.workers, "records": found})
        yield from looks


def _order(config, labels, seed):
    if config.shards == "sorted":
        return data.sorted_batches(seed, labels, config.workers, config.batch_size, config.steps)
    return data.batches(seed, len(labels), config.workers * config.batch_size, config.steps)


def _step(net, optimizer):
    """One worker's step."""
    loss = functools.partial(models.loss, net)
    value_and_grad = signopt.workers.value_and_grad(loss, axis_name=optimizers.AXIS)

    def step(state, batch):
        value, gradients = value_and_grad(state.params, *batch)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        return TrainState(optax.apply_updates(state.params, updates), opt_state), value

    return step


def final(records: list[Record]) -> dict[tuple[str, str], list[Record]]:
    """The last record of each seed, by optimizer and wire."""
    found = {}
    for name, looks in _curves(records).items():
        last = max(record["step"] for record in looks)
        found[name] = [record for record in looks if record["step"] == last]
    return found


def table(records: list[Record]) -> rich.table.Table:
    """The end of each run, averaged over seeds."""
    config = records[0]["config"]
    seeds = f", mean and deviation of {config['seeds']} seeds" if config["seeds"] > 1 else ""
    drawn = rich.table.Table(title=f"{config['dataset']}, {config['workers']} workers, {config['steps']} steps{seeds}")
    for column in ("optimizer", "wire"):
        drawn.add_column(column)
    for column in ("test accuracy", "bits per\nparameter\nand step", "MB in total", "seconds"):
        drawn.add_column(column, justify="right", no_wrap=True)
    for (name, wire), ends in final(records).items():
        accuracies = [record["test_accuracy"] for record in ends]
        spread = f" ± {statistics.stdev(accuracies):.4f}" if len(ends) > 1 else ""
        drawn.add_row(
            name,
            wire,
            f"{statistics.mean(accuracies):.4f}{spread}",
            f"{ends[0]['bits_per_parameter']:.2f}",
            f"{ends[0]['megabytes']:.2f}",
            f"{ends[0]['seconds']:.1f}",
        )
    drawn.caption = "bits: sent by each worker; MB: by all, in one run; seconds: all seeds, with compilation"
    return drawn


def kept(records: list[Record]) -> list[Record]:
    """Every fourth look, and the end of each run: enough for curves."""
    config = records[0]["config"]
    every = 4 * config["evaluate_every"]
    return [records[0], *(r for r in records[1:] if r["step"] % every == 0 or r["step"] == config["steps"])]


def summary(records: list[Record]) -> list[list[str]]:
    """The end of each run, without times."""
    rows = [["optimizer", "wire", "test accuracy", "bits per parameter and step", "MB in total", "learning rate"]]
    for (name, wire), ends in final(records).items():
        accuracies, last = [record["test_accuracy"] for record in ends], ends[0]
        spread = f" ± {statistics.stdev(accuracies):.4f}" if len(ends) > 1 else ""
        sent = [f"{last['bits_per_parameter']:.2f}", f"{last['megabytes']:.2f}", f"{last['learning_rate']:g}"]
        rows.append([name, wire, f"{statistics.mean(accuracies):.4f}{spread}", *sent])
    return rows


def plot(records: list[Record], folder: str) -> list[pathlib.Path]:
    """Draw test accuracy against steps and against megabytes sent.

    Returns:
      The figures' files.
    """
    config = records[0]["config"]
    title = f"{config['dataset']}, {config['workers']} workers, {config['seeds']} seeds"
    figure, (by_step, by_megabytes) = plots.panels(2, title=title)
    for (name, wire), looks in _curves(records).items():
        steps = sorted({record["step"] for record in looks})
        seeds = [[record["test_accuracy"] for record in looks if record["step"] == step] for step in steps]
        megabytes = [looks[-1]["megabytes"] * step / looks[-1]["step"] for step in steps]
        for axes, x in ((by_step, steps), (by_megabytes, megabytes)):
            plots.band(axes, x, seeds, label=f"{name}, {wire}", marker=".")
    by_step.set(xlabel="steps", ylabel="test accuracy")
    by_megabytes.set(xlabel="MB sent by all workers", xscale="log")
    by_step.legend()
    return plots.save(figure, folder, "accuracy")


def _curves(records):
    curves = {}
    for record in records[1:]:
        curves.setdefault((record["optimizer"], record["wire"]), []).append(record)
    return curves
