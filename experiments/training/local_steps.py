"""Local steps: how rarely workers may exchange, and how late, before a byte transformer learns less.

Figure: the loss on held-out text of the Python standard library's source against the bits that each of four workers sends per
parameter and step, on average over a round. Every worker steps with Muon or with AdamW, and every 1 to 64 steps they
exchange what that came to, whole or in parts, at once or a step late, by votes times a size, by scaled signs with memory, or
in float32.

    python -m experiments local_steps
    python -m experiments local_steps --tune --runs muon/vote/16/1/0,adamw/mean/16/1/0
    python -m experiments local_steps --steps 2048 --seeds 1
    python -m experiments local_steps --tune --runs muon/vote/16/1/0 --outer_rates 0.5,0.7,1 --outer_momenta 0,0.5,0.9

A run is the inner optimizer, the border, `every`, `fragments` and `delay` of `signopt.local_steps`. Time and numbers to expect
are in experiments/README.md.
"""

from collections.abc import Callable, Iterator
import dataclasses
import itertools
import pathlib
import statistics
from typing import Any, NamedTuple

import jax
import optax
import rich.table

from experiments.common import plots
from experiments.common import progress
from experiments.common import text as texts
from experiments.common.flags import flag
from experiments.common.records import Record
from experiments.training import language
from experiments.training import methods
import signopt

AXIS = texts.AXIS
HEAD = ("inner", "border", "every", "fragments", "delay", "outer rate, momentum")
BLOCK = 256  # entries that share a scale
RUNS = (
    "sign_muon/sign/1/1/0",
    "sign_muon/sign/1/1/1",
    "muon/mean/1/1/0",
    "muon/vote/4/1/0",
    "muon/vote/8/1/0",
    "muon/mean/16/1/0",
    "muon/vote/16/1/0",
    "muon/vote/16/16/0",
    "muon/vote/16/16/1",
    "muon/ef2/16/16/1",
    "muon/ef2/4/4/1",
    "muon/vote/64/1/0",
    "adamw/mean/1/1/0",
    "adamw/mean/16/1/0",
)


class Run(NamedTuple):
    """What one name stands for."""

    inner: str
    border: str
    every: int
    fragments: int
    delay: int


def named(name: str) -> Run:
    """Read the name of a run.

    Raises:
      SystemExit: If there is no such inner optimizer or border, or a number is missing.

    Examples:
      >>> named("muon/vote/16/4/1")
      Run(inner='muon', border='vote', every=16, fragments=4, delay=1)
    """
    inner, border, *numbers = name.split("/")
    if inner not in INNERS or border not in BORDERS or len(numbers) != 3 or not all(map(str.isdecimal, numbers)):
        raise SystemExit(
            f"error: --runs has to be of names such as muon/vote/16/4/1, with one of {', '.join(INNERS)} and one of "
            f"{', '.join(BORDERS)}, got {name}"
        )
    return Run(inner, border, *map(int, numbers))


class Inner(NamedTuple):
    """What a worker steps with.

    Attributes:
      make: From a schedule to an optimizer.
      learning_rate: The peak of the schedule that tuning starts from.
    """

    make: Callable[[optax.Schedule], optax.GradientTransformation]
    learning_rate: float


def _muon(schedule):
    return optax.contrib.muon(schedule, adam_b2=0.95, muon_weight_dimension_numbers=texts.matrices)


def _adamw(schedule):
    clip = optax.clip_by_global_norm(methods.CLIP)
    return optax.chain(clip, optax.adamw(schedule, b2=0.95, weight_decay=0.0), methods.embeddings_faster())


def _sign_muon(schedule):
    return signopt.sign_muon(schedule, muon_weight_dimension_numbers=texts.matrices)


INNERS = {"muon": Inner(_muon, 0.016), "adamw": Inner(_adamw, 0.004), "sign_muon": Inner(_sign_muon, 0.004)}


def _vote(workers):
    del workers
    return signopt.majority_vote(AXIS, wire="one_bit", block=BLOCK)


def _ef2(workers):
    signs = signopt.codecs.scaled_sign(block=BLOCK)
    return signopt.mean(AXIS, uplink=signs, downlink=signs, num_workers=workers)


def _top(workers):
    largest = signopt.codecs.top_k(0.03, block=4096)
    return signopt.mean(AXIS, uplink=largest, memory="workers", num_workers=workers)


BORDERS: dict[str, Callable[[int], optax.GradientTransformation]] = {
    "mean": lambda workers: signopt.mean(AXIS),
    "vote": _vote,
    "sign": lambda workers: signopt.majority_vote(AXIS, wire="one_bit"),
    "ef2": _ef2,
    "top": _top,
}


@dataclasses.dataclass(frozen=True)
class Config:
    """The flags."""

    runs: tuple[str, ...] = flag(RUNS, "what to compare: inner/border/every/fragments/delay")
    tune: bool = flag(False, "first find each run's inner learning rate on held-out training text")
    tuning_steps: int = flag(512, "training steps of that", at_least=1)
    outer_rates: tuple[float, ...] = flag((0.7,), "of the outer SGD, where a round has more than one step", at_least=0)
    outer_momenta: tuple[float, ...] = flag((0.5,), "of the same", at_least=0)
    nesterov: bool = flag(True, "let that momentum be Nesterov's")
    workers: int = flag(4, "number of workers", at_least=1)
    batch_size: int = flag(8, "sequences per worker and step", at_least=1)
    alike: bool = flag(True, "let workers draw from the whole text, not each from a piece of its own")
    steps: int = flag(512, "training steps, a multiple of the evaluations", at_least=1)
    evaluations: int = flag(8, "how often to take the loss on held-out text", at_least=1)
    layers: int = flag(2, "blocks of the transformer", at_least=1)
    width: int = flag(64, "of its stream", at_least=16)
    context: int = flag(32, "bytes that it sees", at_least=1)
    text: str = flag("", "a file of text; the standard library's source if empty")
    seeds: int = flag(3, "number of runs: seeds 0, 1, 2, ...", at_least=1)
    output: str = flag("results/local_steps", "folder for records and plots")

    def shape(self) -> texts.Shape:
        """What is trained on what."""
        own = {name: getattr(self, name) for name in texts.Shape._fields if hasattr(self, name)}
        return texts.Shape(**own, file=self.text)


def outers(run: Run, config: Config) -> list[tuple[float, float]]:
    """The rates and momenta of an outer SGD to try: those of the flags where a round has more than one step."""
    if run.border == "sign" or run.every == 1:
        return [(1.0, 0.0)]
    return list(itertools.product(config.outer_rates, config.outer_momenta))


def optimizer(
    run: Run, config: Config, schedule: optax.Schedule, outer_rate: float, outer_momentum: float
) -> optax.GradientTransformation:
    """The chain that a run trains with: the outer step is as large as what was exchanged, or as the inner schedule."""
    border = BORDERS[run.border](config.workers)
    if run.border == "sign":  # a vote has no size
        outer = optax.scale_by_learning_rate(schedule)
    else:
        outer = optax.sgd(outer_rate, momentum=outer_momentum or None, nesterov=config.nesterov)
    return signopt.local_steps(
        INNERS[run.inner].make(schedule),
        optax.chain(border, outer),
        every=run.every,
        fragments=run.fragments,
        delay=run.delay,
        num_workers=config.workers,
    )


def bits(run: Run, config: Config, params: Any) -> float:
    """What a worker sends per parameter and step, on average over a round."""
    # Of one exchange, of which there are `fragments` in a round.
    sent = signopt.wire.bytes_sent(
        params, config.workers, optimizer(run, config, lambda count: 1.0, *outers(run, config)[0]), axis_name=AXIS
    )
    return 8 * sent * run.fragments / run.every / sum(x.size for x in jax.tree.leaves(params))


def run(config: Config) -> Iterator[Record]:
    """Train with every chain and seed.

    Yields:
      What is trained on what; a record for each learning rate that was tried while tuning; one for each training.
    """
    shape = config.shape()
    params = jax.eval_shape(lambda key: texts.init(key, shape), jax.random.key(0))
    runs = {name: named(name) for name in config.runs}
    yield {
        "kind": "shape",
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "crc": texts.load(config.text).crc(),
    }
    todo = [(name, outer) for name, one in runs.items() for outer in outers(one, config)]
    for name, outer in progress.track(todo, "runs"):
        one, named_so = runs[name], {"run": name, "outer_rate": outer[0], "outer_momentum": outer[1]}

        def trainer(split, shape, one=one, outer=outer):
            def make(schedule):
                return optimizer(one, config, schedule, *outer)

            return texts.trainer(make, shape, split=split, gradient_at=signopt.local_params)

        rate = INNERS[one.inner].learning_rate
        if config.tune:
            held_out, tried = trainer("tune", shape._replace(steps=config.tuning_steps, evaluations=1)), {}
            for peak, loss in language.tuned(lambda peak, train=held_out: float(train(peak, 0).held_out[-1]), rate):
                tried[peak] = loss
                yield {"kind": "tune"} | named_so | {"learning_rate": peak, "loss": loss}
            rate = min(tried, key=lambda peak: tried[peak])
        train, sent = trainer("validate", shape), bits(one, config, params)
        for seed in range(config.seeds):
            curve = train(rate, seed)
            yield {
                "kind": "run",
                **named_so,
                "learning_rate": rate,
                "seed": seed,
                "bits": round(sent, 4),
                "train": [round(float(x), 5) for x in curve.train.reshape(config.evaluations, -1).mean(1)],
                "held_out": [round(float(x), 5) for x in curve.held_out],
            }


def ended(records: list[Record]) -> dict[tuple[str, float, float], list[Record]]:
    """The trainings of each run and outer optimizer, in the order of seeds."""
    found = {}
    for record in records[1:]:
        if record["kind"] == "run":
            found.setdefault(_of(record), []).append(record)
    return found


def _of(record):
    return record["run"], record["outer_rate"], record["outer_momentum"]


def _head(name, outer_rate, outer_momentum):
    return [*map(str, named(name)), f"{outer_rate:g}, {outer_momentum:g}"]


def table(records: list[Record]) -> rich.table.Table:
    """The loss at the end, of every seed, and what a worker sends."""
    config, shape = records[0]["config"], records[1]
    drawn = rich.table.Table(
        title=f"{shape['parameters']:,} parameters, {config['workers']} workers, {config['steps']} steps; nats per byte"
    )
    columns = (*HEAD, "rate", "bits per parameter and step", "loss of each seed", "mean", "tried")
    for column in columns:
        drawn.add_column(column, justify="left" if column in ("inner", "border") else "right")
    for key, runs in ended(records).items():
        tried = [r for r in records[1:] if r["kind"] == "tune" and _of(r) == key]
        losses = [r["held_out"][-1] for r in runs]
        drawn.add_row(
            *_head(*key),
            f"{runs[0]['learning_rate']:g}",
            f"{runs[0]['bits']:.3f}",
            " ".join(f"{x:.3f}" for x in losses),
            f"{statistics.mean(losses):.3f}",
            ", ".join(f"{r['learning_rate']:g}: {r['loss']:.3f}" for r in tried),
        )
    return drawn


def summary(records: list[Record]) -> list[list[str]]:
    """The loss at the end, and what a worker sends."""
    rows = [[*HEAD, "bits per parameter and step", "held-out loss, nats per byte"]]
    for key, runs in ended(records).items():
        losses = [r["held_out"][-1] for r in runs]
        spread = f" ± {statistics.stdev(losses):.3f}" if len(losses) > 1 else ""
        rows.append([*_head(*key), f"{runs[0]['bits']:.3f}", f"{statistics.mean(losses):.3f}{spread}"])
    return rows


def plot(records: list[Record], folder: str) -> list[pathlib.Path]:
    """Draw the losses at the end against bits, one line for each inner optimizer, border and way of exchanging.

    Returns:
      The figures' files.
    """
    config, lines = records[0]["config"], {}
    for (name, *_), runs in ended(records).items():
        one = named(name)
        way = ("in parts" if one.fragments > 1 else "whole") + (", late" if one.delay else "")
        point = runs[0]["bits"], [r["held_out"][-1] for r in runs], one.every
        lines.setdefault(f"{one.inner}, {one.border}, {way}", []).append(point)
    text = pathlib.Path(config["text"]).name or "source of the standard library"
    title = f"{text}, {config['workers']} workers, {config['steps']} steps, {config['seeds']} seeds"
    figure, (axes,) = plots.panels(1, title=title, width=8, height=5)
    for label, points in sorted(lines.items()):
        sent, losses, every = zip(*sorted(points), strict=True)
        plots.band(axes, sent, losses, label=label, marker="o")
        for x, y, steps in zip(sent, losses, every, strict=True):
            axes.annotate(f"{steps}", (x, statistics.mean(y)), textcoords="offset points", xytext=(4, 4), fontsize=9)
    axes.set(
        xlabel="bits that a worker sends per parameter and step; numbers are steps in a round",
        ylabel="held-out loss, nats per byte",
        xscale="log",
    )
    axes.legend()
    return plots.save(figure, folder, "local_steps")
