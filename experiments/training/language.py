"""Language: a byte transformer trained by votes and by means, its loss against steps, bytes and time.

Figure: the loss on held-out text of the Python standard library's source, four workers, for SGD, AdamW and Muon on means in
float32, and Signum, Lion, MH-signSGD and SignMuon by vote; against steps, against the bytes that a worker sends, and against
time on three networks by the model of the experiment `cost`. Muon for signs: 2605.16311.

    python -m experiments language
    python -m experiments language --tune --methods sign_muon,muon
    python -m experiments language --steps 2048 --seeds 1
    python -m experiments language --tune --methods adamw,onebit_adam,adamw_signs,muon_signs
    python -m experiments language --text book.txt --layers 6 --width 256 --context 256

Time and numbers to expect are in experiments/README.md.
"""

from collections.abc import Callable, Iterator
import dataclasses
import pathlib
import statistics
from typing import Any

import jax
import numpy as np
import optax
import rich.table

from experiments.common import plots
from experiments.common import progress
from experiments.common import text as texts
from experiments.common.flags import flag
from experiments.common.records import Record
from experiments.training import methods
import signopt
from signopt._tools import exchanges

AXIS = texts.AXIS
GIGABITS = (0.1, 1.0, 10.0)


@dataclasses.dataclass(frozen=True)
class Config:
    """The flags."""

    methods: tuple[str, ...] = flag(tuple(methods.FIRST), "what to compare", choices=tuple(methods.METHODS))
    learning_rates: tuple[float, ...] = flag((), "peaks to try; each method's own if empty", at_least=0)
    tune: bool = flag(False, "first find each method's learning rate on held-out training text")
    tuning_steps: int = flag(256, "training steps of that", at_least=1)
    wire: str = flag("one_bit", "how votes travel", choices=("one_bit", "two_bit", "psum"))
    workers: int = flag(4, "number of workers", at_least=1)
    batch_size: int = flag(8, "sequences per worker and step", at_least=1)
    alike: bool = flag(True, "let workers draw from the whole text, not each from a piece of its own")
    steps: int = flag(512, "training steps, a multiple of the evaluations", at_least=1)
    evaluations: int = flag(8, "how often to take the loss on held-out text", at_least=1)
    layers: int = flag(2, "blocks of the transformer", at_least=1)
    width: int = flag(64, "of its stream", at_least=16)
    context: int = flag(32, "bytes that it sees", at_least=1)
    text: str = flag("", "a file of text; the standard library's source if empty")
    latency_us: float = flag(50.0, "microseconds from one worker to another, of the plots against time", at_least=0)
    step_ms: float = flag(50.0, "milliseconds that a worker computes in a step, of the same", at_least=0)
    seeds: int = flag(3, "number of runs: seeds 0, 1, 2, ...", at_least=1)
    output: str = flag("results/language", "folder for records and plots")

    def shape(self) -> texts.Shape:
        """What is trained on what."""
        own = {name: getattr(self, name) for name in texts.Shape._fields if hasattr(self, name)}
        return texts.Shape(**own, file=self.text)


def run(config: Config) -> Iterator[Record]:
    """Train with every method, learning rate and seed.

    Yields:
      What is trained on what; a record for each learning rate that was tried while tuning; one for each training.
    """
    shape = config.shape()
    params = jax.eval_shape(lambda key: texts.init(key, shape), jax.random.key(0))
    found = texts.load(config.text)
    yield {
        "kind": "shape",
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "bytes_of_text": [len(part) for part in found],
        "crc": found.crc(),
    }
    for name in progress.track(config.methods, "methods"):
        method = methods.METHODS[name]

        def make(schedule, method=method):
            return method.make(schedule, config)

        start = method.learning_rate
        rates = config.learning_rates or (start,)
        if config.tune and start is not None:
            held_out = texts.trainer(make, shape._replace(steps=config.tuning_steps, evaluations=1), split="tune")
            tried = {}
            for rate, loss in tuned(lambda rate, train=held_out: float(train(rate, 0).held_out[-1]), start):
                tried[rate] = loss
                yield {"kind": "tune", "method": name, "learning_rate": rate, "loss": loss}
            rates = (_best(tried),)
        train = texts.trainer(make, shape)
        for rate in rates:
            for seed in range(config.seeds):
                curve = train(0.0 if rate is None else rate, seed)
                sent = bytes_per_step(method, config, params, curve.opt_state)
                yield {
                    "kind": "run",
                    "method": name,
                    "learning_rate": rate,
                    "seed": seed,
                    "bytes_per_step": sent,
                    "train": [round(float(x), 5) for x in curve.train.reshape(config.evaluations, -1).mean(1)],
                    "held_out": [round(float(x), 5) for x in curve.held_out],
                }


def bytes_per_step(method: methods.Method, config: Config, params: Any, opt_state: Any) -> float:
    """What a worker sends in a step, on average over a training that ended with this state."""

    def sent(tx):
        return signopt.wire.bytes_sent(params, config.workers, tx, axis_name=AXIS)

    first = sent(method.make(lambda count: 1.0, config))
    if method.settled is None:
        return first
    early = int(optax.tree.get(opt_state, "settled_at")) or config.steps
    return (early * first + (config.steps - early) * sent(method.settled(config))) / config.steps


def tuned(loss: Callable[[float], float], start: float) -> Iterator[tuple[float, float]]:
    """Try learning rates a factor of two apart until the best has a worse one on each side.

    Args:
      loss: Of a learning rate.
      start: The first one.

    Yields:
      Each learning rate that was tried, and its loss.

    Examples:
      >>> [rate for rate, _ in tuned(lambda rate: abs(rate - 7), 2.0)]
      [2.0, 1.0, 4.0, 8.0, 16.0]
    """
    tried = {}
    queue = [start, start / 2, start * 2]
    while queue:
        rate = queue.pop(0)
        tried[rate] = found if np.isfinite(found := loss(rate)) else np.inf
        yield rate, tried[rate]
        if not queue:
            best = _best(tried)
            queue = [next_rate for next_rate in (best / 2, best * 2) if next_rate not in tried]


def _best(tried):
    return min(tried, key=lambda rate: tried[rate])


def losses(records: list[Record], method: str) -> dict[float | None, np.ndarray]:
    """The losses on held-out text by learning rate; shape (seeds, evaluations)."""
    runs = [r for r in records[1:] if r["kind"] == "run" and r["method"] == method]
    rates = dict.fromkeys(r["learning_rate"] for r in runs)
    return {rate: np.array([r["held_out"] for r in runs if r["learning_rate"] == rate]) for rate in rates}


def table(records: list[Record]) -> rich.table.Table:
    """The loss at the end, of every seed, and what a worker sends."""
    config, shape = records[0]["config"], records[1]
    drawn = rich.table.Table(
        title=f"{shape['parameters']:,} parameters, {config['workers']} workers, {config['steps']} steps; nats per byte"
    )
    for column in ("method", "learning rate", "loss of each seed", "mean", "bits per parameter and step", "tried"):
        drawn.add_column(column, justify="left" if column == "method" else "right")
    for name in config["methods"]:
        tried = [r for r in records[1:] if r["kind"] == "tune" and r["method"] == name]
        for rate, found in losses(records, name).items():
            sent = next(r["bytes_per_step"] for r in records[1:] if r["kind"] == "run" and r["method"] == name)
            drawn.add_row(
                name,
                "" if rate is None else f"{rate:g}",
                " ".join(f"{x:.3f}" for x in found[:, -1]),
                f"{statistics.mean(found[:, -1].tolist()):.3f}",
                f"{8 * sent / shape['parameters']:.2f}",
                ", ".join(f"{r['learning_rate']:g}: {r['loss']:.3f}" for r in tried),
            )
    return drawn


def seconds_per_step(config: Record, parameters: int, name: str, gigabits: float) -> float:
    """Of a step of one method, by the cost model."""
    cluster = exchanges.Cluster(config["workers"], 1e9 * gigabits, 1e-6 * config["latency_us"], 0.0)
    voted = "int8" if config["wire"] == "psum" else config["wire"]
    wire = methods.METHODS[name].wire or voted
    compute = 1e-3 * config["step_ms"]
    if config["workers"] == 1:
        return compute
    return exchanges.step_seconds(parameters, wire, cluster, exchanges.Rates(), compute_seconds=compute)


def plot(records: list[Record], folder: str) -> list[pathlib.Path]:
    """Draw the losses against steps, megabytes, and seconds on three networks.

    Returns:
      The figures' files.
    """
    config, parameters = records[0]["config"], records[1]["parameters"]
    steps = config["steps"] / config["evaluations"] * (1 + np.arange(config["evaluations"]))
    text = pathlib.Path(config["text"]).name or "source of the standard library"
    title = f"{text}, {config['workers']} workers, {config['seeds']} seeds"
    figure, panels = plots.panels(2 + len(GIGABITS), title=title)
    for name in config["methods"]:
        found = min(losses(records, name).values(), key=lambda x: x[:, -1].mean())
        sent = next(r["bytes_per_step"] for r in records[1:] if r["kind"] == "run" and r["method"] == name)
        units = [1.0, 1e-6 * sent, *(seconds_per_step(config, parameters, name, speed) for speed in GIGABITS)]
        for axes, unit in zip(panels, units, strict=True):
            plots.band(axes, unit * steps, found.T, label=name, marker=".")
    labels = ["steps", "MB that a worker sends", *(f"seconds at {speed:g} Gbit/s" for speed in GIGABITS)]
    for axes, label in zip(panels, labels, strict=True):
        axes.set(xlabel=label, ylabel="held-out loss, nats per byte", xscale="linear" if label == "steps" else "log")
    panels[0].legend()
    return plots.save(figure, folder, "language")


def summary(records: list[Record]) -> list[list[str]]:
    """The loss at the end, and what a worker sends."""
    rows = [["method", "learning rate", "held-out loss, nats per byte", "bits per parameter and step"]]
    for name in records[0]["config"]["methods"]:
        for rate, found in losses(records, name).items():
            sent = next(r["bytes_per_step"] for r in records[1:] if r["kind"] == "run" and r["method"] == name)
            ends = found[:, -1]
            spread = f" ± {ends.std(ddof=1):.3f}" if len(ends) > 1 else ""
            bits = 8 * sent / records[1]["parameters"]
            rows.append([name, "none" if rate is None else f"{rate:g}", f"{ends.mean():.3f}{spread}", f"{bits:.2f}"])
    return rows
