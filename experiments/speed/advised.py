"""Is `python -m signopt advise` right? What it predicts against the clock, and its first choice against all others.

Hosts are processes in network namespaces with slow links, as in `slow_network`. On each set-up, a loss on so many hosts at such
a rate, they measure what `advise --distributed` measures and rank its choices; then every choice makes steps between them, and
is timed. How many steps a choice needs to a target does not depend on the network: simulated workers find it (`--training`), or
it is read from the records that are kept. The target is the loss that the best float32 mean has after half of the steps; rates are
the best of a grid. No figure of a paper; to expect are predictions within 15 % of the clock, and a first choice within 10 % of the
best time to the target.

Needs Linux, root and iproute2, which makes the links.

    python -m experiments advised
    python -m experiments advised --training --rounds 0
    python -m experiments advised --hosts 2 --megabits 100 --losses digits

Time and numbers to expect are in experiments/README.md.
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

from experiments.common import asking
from experiments.common import losses
from experiments.common import namespaces
from experiments.common import pasted
from experiments.common import plots
from experiments.common import progress
from experiments.common import records as recorded
from experiments.common.flags import flag
from experiments.common.records import Record
import signopt
from signopt._tools import choices
from signopt._tools import problem as problems

NEAR, NEAR_BEST = 0.15, 0.10  # an error of a prediction that is small, and a time to the target that is
KEPT = pathlib.Path(__file__).parents[1] / "measured" / "advised" / recorded.FILE
TURN = 0.2  # seconds, about
SMOOTH = 10  # steps of which a loss is the mean
LARGE = 1e9  # stands for a loss that is not finite, in differences of sums


@dataclasses.dataclass(frozen=True)
class Config:
    """The flags."""

    hosts: tuple[int, ...] = flag((2, 4), "numbers of hosts, a process each", at_least=2)
    megabits: tuple[float, ...] = flag((30.0, 100.0, 300.0), "Mbit/s of every link, each way", at_least=1)
    losses: tuple[str, ...] = flag(("digits", "text"), "what is trained", choices=("digits", "text"))
    rounds: int = flag(3, "how often each choice takes its turn; 0 for no network", at_least=0)
    training: bool = flag(False, "count steps to the target anew")
    steps: int = flag(240, "at which a training gives up", at_least=2 * SMOOTH)
    rates: int = flag(6, "learning rates of each choice, a factor of two apart", at_least=1)
    workers: int = flag(1, "devices of a host", at_least=1)
    seeds: int = flag(1, "one: nothing is random but batches, the same for all", at_least=1)
    output: str = flag("results/advised", "folder for records and plots")


def run(config: Config) -> Iterator[Record]:
    """Count steps, ask for advice, and time what was advised.

    Returns:
      A record for each choice's training, for each prediction, and for each turn of a choice.

    Raises:
      NetworkError: Before anything is measured or written, if links cannot be made here.
    """
    if config.rounds:
        namespaces.require()
    return _run(config)


def _run(config):
    if config.training:
        yield from trained(config)
    elif KEPT.exists():
        yield from (r for r in recorded.read(KEPT)[1:] if r["kind"] == "training")
    for count in config.hosts if config.rounds else ():
        for loss in config.losses:  # processes of their own, which compile once for all rates
            with namespaces.network(count) as network, asking.running(network) as ask:
                for index in range(len(choices.CHOICES)):
                    ask("choice", loss=loss, index=index, count=0)
                for megabits in config.megabits:
                    namespaces.shape(network, 1e6 * megabits)
                    where = {"hosts": count, "megabits": megabits, "loss": loss}
                    expected = {}
                    for row in ask("advise", loss=loss)[0]["rows"]:
                        expected[row["index"]] = row["seconds"]
                        yield where | row
                    title = f"{count} hosts, {megabits:g} Mbit/s, {loss}"
                    for turn in progress.track(range(config.rounds), title):
                        for index in _in_turn(len(choices.CHOICES), turn):
                            every = choices.CHOICES[index].every
                            steps = every * max(1, round(min(16, max(2, TURN / expected[index])) / every))
                            found = ask("choice", loss=loss, index=index, count=steps)
                            seconds = max(answer["seconds"] for answer in found)
                            yield {"kind": "clock", "index": index, "round": turn, "seconds": seconds} | where


def _in_turn(count, turn):
    order = list(range(count))
    return order if turn % 2 == 0 else order[::-1]


# ---- steps to the target ---------------------------------------------------------------------------------------------


def trained(config: Config) -> Iterator[Record]:
    """Count every choice's steps to the target, at the best of its rates.

    Yields:
      A record for each loss, number of workers and choice; the steps are None if it does not get there.
    """
    for loss in config.losses:
        for workers in config.hosts:
            curves = {}
            for index in progress.track(range(len(choices.CHOICES)), f"{loss}, {workers} workers: choices"):
                curves[index] = _curves(loss, workers, choices.CHOICES[index], config)
            means = [i for i, choice in enumerate(choices.CHOICES) if choice.name.startswith(choices.NOTHING)]
            half = config.steps // 2
            target = min(float(np.nanmin(curves[i][:, half])) for i in means)
            for index, found in curves.items():
                steps = [_first(curve <= target) for curve in found]
                best = min(steps)
                yield {
                    "kind": "training",
                    "loss": loss,
                    "hosts": workers,
                    "index": index,
                    "name": choices.CHOICES[index].name,
                    "target": target,
                    "steps": best if math.isfinite(best) else None,
                    "rate": _rates(choices.CHOICES[index], config.rates)[steps.index(best)],
                }


def _first(reached):
    return float(np.argmax(reached)) + 1 if reached.any() else math.inf


def _rates(choice, count):
    """A grid around what suits such optimizers: steps as large as the gradient, as large as a sign, or as Muon's."""
    sgd, muon = choice.name.startswith("SGD"), "uon" in choice.name
    middle = 0.1 if sgd else 0.01 if muon else 0.002
    return [middle * 2.0 ** (power - count // 2) for power in range(count)]


def _curves(loss, workers, choice, config):
    """Losses, smoothed, by rate and step."""
    problem = problems.of(losses.OF[loss]())
    chosen = np.random.default_rng(0).integers(problem.count, size=(config.steps, workers))
    batches = problem.batches

    def train(rate):
        optimizer = optax.with_extra_args_support(pasted.optimizer(choice, workers, rate))

        def step(state, batch):
            params, opt_state = state
            place = signopt.local_params(opt_state, params) if choice.is_local else params
            value_and_grad = signopt.workers.value_and_grad(problem.loss, axis_name=choices.AXIS)
            value, gradients = value_and_grad(place, jax.tree.map(lambda x: x[0], batch))
            updates, opt_state = optimizer.update(gradients, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), value

        together = signopt.workers.simulate(step, workers, axis_name=choices.AXIS)
        start = (problem.params, optimizer.init(problem.params))
        _, values = lax.scan(lambda s, i: together(s, jax.tree.map(lambda x: x[i], batches)), start, chosen)
        return values.mean(1)

    found = np.asarray(jax.jit(lambda rates: lax.map(train, rates))(jnp.float32(_rates(choice, config.rates))))
    sums = np.cumsum(np.pad(np.where(np.isfinite(found), found, LARGE), ((0, 0), (1, 0))), axis=1)
    smooth = (sums[:, SMOOTH:] - sums[:, :-SMOOTH]) / SMOOTH
    return np.pad(smooth, ((0, 0), (SMOOTH - 1, 0)), constant_values=np.inf)


# ---- predictions and the clock ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """A choice on a set-up.

    Attributes:
      place: Loss, hosts and Mbit/s.
      index: Of `choices.CHOICES`.
      rank: Where `advise` puts it, from 1.
      predicted: Seconds of a step, by `advise`.
      measured: By the clock, the median of turns.
      steps: To the target; None if it does not get there or nobody has counted.
    """

    place: tuple[str, int, float]
    index: int
    rank: int
    predicted: float
    measured: float
    steps: float | None

    @property
    def name(self) -> str:
        """Of the choice."""
        choice = choices.CHOICES[self.index]
        return choice.name if not choice.is_local else f"{choice.name} {choice.every}/{choice.fragments}/{choice.delay}"

    @property
    def error(self) -> float:
        """As a fraction of what was measured; negative where `advise` is too fast."""
        return self.predicted / self.measured - 1

    @property
    def to_target(self) -> float:
        """Seconds."""
        return math.inf if self.steps is None else self.steps * self.measured


def cases(records: list[Record]) -> list[Case]:
    """Every choice on every set-up, in the order of the advice."""
    seconds: dict[tuple, list[float]] = {}
    steps = {}
    for r in records[1:]:
        if r["kind"] == "clock":
            seconds.setdefault((r["loss"], r["hosts"], r["megabits"], r["index"]), []).append(r["seconds"])
        if r["kind"] == "training":
            steps[r["loss"], r["hosts"], r["index"]] = r["steps"]
    found = []
    for r in records[1:]:
        if r["kind"] == "advice":
            place = (r["loss"], r["hosts"], r["megabits"])
            measured = statistics.median(seconds[*place, r["index"]])
            count = steps.get((r["loss"], r["hosts"], r["index"]))
            found.append(Case(place, r["index"], r["rank"], r["seconds"], measured, count))
    return found


def places(found: list[Case]) -> dict[tuple[str, int, float], list[Case]]:
    """The choices of each set-up."""
    of: dict[tuple[str, int, float], list[Case]] = {}
    for case in found:
        of.setdefault(case.place, []).append(case)
    return of


def behind(own: list[Case]) -> float:
    """How much longer the first choice of a set-up takes to the target than the best; 0 if it is the best."""
    best = min(case.to_target for case in own)
    first = next(case for case in own if case.rank == 1)
    return first.to_target / best - 1 if math.isfinite(best) else math.nan


def said(found: list[Case]) -> str:
    """How often predictions and first choices are good."""
    errors = [abs(case.error) for case in found]
    of = places(found)
    good = [own for own in of.values() if statistics.median(abs(case.error) for case in own) <= NEAR]
    firsts = [abs(next(case for case in own if case.rank == 1).error) for own in of.values()]
    lines = [
        f"{sum(error <= NEAR for error in errors)} of {len(errors)} within {NEAR:.0%}, median error "
        f"{statistics.median(errors):.0%}",
        f"{sum(error <= NEAR for error in firsts)} of {len(of)} first choices within {NEAR:.0%}; median of a set-up within "
        f"{NEAR:.0%} on {len(good)} of {len(of)}",
    ]
    late = [behind(own) for own in of.values()]
    if not all(map(math.isnan, late)):
        near = sum(extra <= NEAR_BEST for extra in late)
        lines.append(f"first choice within {NEAR_BEST:.0%} on {near} of {len(of)}")
    return "\n".join(lines)


def table(records: list[Record]) -> rich.table.Table:
    """Every choice on every set-up: what was predicted, what it took, and how long it takes to the target."""
    found = cases(records)
    drawn = rich.table.Table(title=f"a step, {records[0]['cores']} cores, medians")
    for column in (
        "loss",
        "hosts",
        "Mbit/s",
        "rank",
        "choice",
        "predicted, ms",
        "takes, ms",
        "error",
        "steps",
        "s to target",
    ):
        drawn.add_column(column, justify="left" if column in ("loss", "choice") else "right")
    for own in places(found).values():
        for case in own:
            loss, hosts, megabits = case.place
            ms = [f"{1e3 * x:.1f}" for x in (case.predicted, case.measured)]
            ends = ["", ""] if case.steps is None else [f"{case.steps:.0f}", f"{case.to_target:.2f}"]
            drawn.add_row(
                loss, str(hosts), f"{megabits:g}", str(case.rank), case.name, *ms, f"{case.error:+.0%}", *ends
            )
        drawn.add_section()
    drawn.caption = said(found) if found else None
    return drawn


def summary(records: list[Record]) -> list[list[str]]:
    """For each set-up how far predictions are off, and the first choice's time to the target over the best one's."""
    rows = [
        [
            "loss, hosts, Mbit/s",
            "within 15 %",
            "median error",
            "first choice",
            "error",
            "time to the target over the best",
        ]
    ]
    for (loss, hosts, megabits), own in places(cases(records)).items():
        errors = [abs(case.error) for case in own]
        first = next(case for case in own if case.rank == 1)
        late = behind(own)
        rows.append(
            [
                f"{loss}, {hosts}, {megabits:g}",
                f"{sum(error <= NEAR for error in errors)} of {len(errors)}",
                f"{statistics.median(errors):.0%}",
                first.name,
                f"{first.error:+.0%}",
                "" if math.isnan(late) else f"{1 + late:.2f}",
            ]
        )
    return rows


def plot(records: list[Record], folder: str) -> list[pathlib.Path]:
    """Draw predictions against the clock.

    Returns:
      The figures' files.
    """
    found = cases(records)
    if not found:
        return []
    figure, (axes,) = plots.panels(1, title="python -m signopt advise, byte transformer and digits between hosts")
    for loss in dict.fromkeys(case.place[0] for case in found):
        own = [case for case in found if case.place[0] == loss]
        axes.plot([1e3 * case.measured for case in own], [1e3 * case.predicted for case in own], "o", label=loss)
    ends = np.array([f(1e3 * case.measured for case in found) for f in (min, max)])
    axes.plot(ends, ends, color="grey", linewidth=0.8)
    axes.fill_between(ends, ends * (1 - NEAR), ends * (1 + NEAR), color="grey", alpha=0.2, label=f"within {NEAR:.0%}")
    axes.set(xlabel="measured, ms of a step", ylabel="predicted, ms", xscale="log", yscale="log")
    axes.legend()
    return plots.save(figure, folder, "advised")
