"""Steps that nobody waits for: is an exchange hidden where it travels about as long as a step computes?

A byte transformer on 2 and on 4 hosts, whose links are slow as in `slow_network`. Every host learns from some bytes in a step;
with few of them traffic outweighs computation. Votes travel at once, one step late while each worker goes on
(`signopt.local_steps(every=1, delay=1)`), in fragments of which one travels in each step, or once in 16 steps. Nothing that
exchanges can be faster than the longer of computation and traffic. XLA on CPUs runs the collectives of one program in turn with
its other work, so a late vote costs there what a vote costs; two programs do overlap (`on_mesh(hidden=True)`). Times are compared
with the cost model, for the link and the computation that are measured beside them, as `python -m signopt advise` does. No
figure of a paper.

Needs Linux, root and iproute2, which makes the links.

    python -m experiments hidden
    python -m experiments hidden --hosts 2 --megabits 100 --tokens 32

Time and numbers to expect are in experiments/README.md.
"""

from collections.abc import Iterator
import dataclasses
import pathlib
import statistics

import rich.table

from experiments.common import asking
from experiments.common import namespaces
from experiments.common import plots
from experiments.common import progress
from experiments.common import ways
from experiments.common.flags import flag
from experiments.common.records import Record
from experiments.speed import cost
from signopt._tools import exchanges

NEAR = 0.15  # an error of the model that is small


@dataclasses.dataclass(frozen=True)
class Config:
    """The flags."""

    hosts: tuple[int, ...] = flag((2, 4), "numbers of hosts, a process each", at_least=2)
    megabits: tuple[float, ...] = flag((100.0, 1000.0), "Mbit/s of every link, each way", at_least=1)
    tokens: tuple[int, ...] = flag((32, 4), "bytes that a host learns from in a step", at_least=1)
    ways: tuple[str, ...] = flag(ways.NAMES, "what to compare: wire/every/fragments/delay")
    width: int = flag(192, "of the transformer's stream", at_least=16)
    layers: int = flag(4, "its blocks", at_least=1)
    rounds: int = flag(5, "how often each way takes its turn", at_least=1)
    steps: int = flag(16, "in one turn; of a mean in float32 in every step a fourth of it", at_least=4)
    workers: int = flag(1, "devices of a host", at_least=1)
    seeds: int = flag(1, "one: no time depends on it", at_least=1)
    output: str = flag("results/hidden", "folder for records and plots")


def run(config: Config) -> Iterator[Record]:
    """Time steps, on every number of hosts and at every rate.

    Returns:
      A record for each link, and for each way and turn.

    Raises:
      NetworkError: Before anything is measured or written, if links cannot be made here.
    """
    namespaces.require()
    return _run(config)


def _run(config):
    for count in config.hosts:
        for tokens in config.tokens:  # processes of their own: nothing is compiled twice, or kept
            with namespaces.network(count) as network, asking.running(network) as ask:
                shape = {"width": config.width, "layers": config.layers, "tokens": tokens}
                for way in (ways.ALONE, *config.ways):
                    ask("steps", way=way, count=0, **shape)
                for megabits in config.megabits:
                    namespaces.shape(network, 1e6 * megabits)
                    where = {"hosts": count, "megabits": megabits, "tokens": tokens}
                    yield {"kind": "link"} | where | ask("link")[0]
                    name = f"{count} hosts, {megabits:g} Mbit/s, {tokens} tokens"
                    for turn in progress.track(range(config.rounds), name):
                        order = [ways.ALONE, *config.ways]
                        for way in order[turn % len(order) :] + order[: turn % len(order)]:
                            steps = config.steps // 4 if way == "float32/1/1/0" else config.steps
                            found = ask("steps", way=way, count=steps, **shape)
                            most = {name: max(answer[name] for answer in found) for name in ("seconds", "bytes_sent")}
                            size = found[0]["parameters"]
                            yield {"kind": "step", "way": way, "round": turn, "parameters": size} | where | most


@dataclasses.dataclass(frozen=True)
class Case:
    """A way on a link.

    Attributes:
      hosts: Their number.
      megabits: Of every link.
      tokens: Of a host and step.
      way: What is exchanged, how often and when.
      measured: Seconds of a step, the median of turns.
      compute: Of one that exchanges nothing.
      traffic: What its bytes take at the link's rate.
      predicted: By the cost model.
    """

    hosts: int
    megabits: float
    tokens: int
    way: str
    measured: float
    compute: float
    traffic: float
    predicted: float

    @property
    def over_bound(self) -> float:
        """How many times as long as the longer of computation and traffic."""
        return self.measured / max(self.compute, self.traffic)

    @property
    def error(self) -> float:
        """Of the model, as a fraction of what was measured; negative where it is too fast."""
        return self.predicted / self.measured - 1


def cases(records: list[Record]) -> list[Case]:
    """Every way on every link, and what the model says of it."""
    seconds, found = {}, []
    for r in records[1:]:
        if r["kind"] == "step":
            seconds.setdefault((r["hosts"], r["megabits"], r["tokens"], r["way"]), []).append(r)
    of_links = {(r["hosts"], r["megabits"], r["tokens"]): r for r in records[1:] if r["kind"] == "link"}
    for (*place, way), turns in seconds.items():
        if way == ways.ALONE:
            continue
        hosts, megabits, tokens = place
        compute = statistics.median(r["seconds"] for r in seconds[*place, ways.ALONE])
        size = turns[0]["parameters"]
        wire, schedule = cost.named(ways.modelled(way))
        link = of_links[*place]
        dealt = wire in exchanges.PLANES or wire in exchanges.CODED
        predicted = exchanges.step_seconds(
            size,
            wire,
            exchanges.Cluster(**link["deals" if dealt else "sums"]),
            exchanges.Rates(**link["rates"]),
            compute_seconds=compute,
            overlaps=ways.overlaps(way),
            **schedule,
        )
        bits = size * cost.bits(ways.modelled(way), size, hosts)
        traffic = bits / (1e6 * megabits * cost.PAYLOAD_SHARE)
        measured = statistics.median(r["seconds"] for r in turns)
        found.append(Case(hosts, megabits, tokens, way, measured, compute, traffic, predicted))
    return found


def table(records: list[Record]) -> rich.table.Table:
    """Every way on every link: what it took, at least takes, and would take by the model."""
    found = cases(records)
    size = next(r["parameters"] for r in records[1:] if r["kind"] == "step")
    drawn = rich.table.Table(title=f"a step on {size:,} parameters, {records[0]['cores']} cores, medians, ms")
    columns = ("computes", "travels", "takes", "over the\nlonger", "model", "error")
    for column in ("hosts", "Mbit/s", "tokens", "wire/every/\nfragments/delay", *columns):
        drawn.add_column(column, justify="left" if column.startswith("wire") else "right")
    for case in found:
        ms = [f"{1e3 * x:.1f}" for x in (case.compute, case.traffic, case.measured)]
        place = (str(case.hosts), f"{case.megabits:g}", str(case.tokens), case.way)
        drawn.add_row(*place, *ms, f"{case.over_bound:.2f}", f"{1e3 * case.predicted:.1f}", f"{case.error:+.0%}")
    drawn.caption = said(found)
    return drawn


def said(found: list[Case]) -> str:
    """How far the model is off."""
    errors = [abs(case.error) for case in found]
    near = sum(error <= NEAR for error in errors)
    return f"model: median error {statistics.median(errors):.0%}; {near} of {len(errors)} within {NEAR:.0%}"


def summary(records: list[Record]) -> list[list[str]]:
    """How many times the longer of computation and traffic a step takes, and how far the model is off."""
    found = cases(records)
    places = sorted({(case.hosts, case.megabits, case.tokens) for case in found}, key=lambda x: (x[1], x[0], -x[2]))
    head = [f"{hosts} hosts, {megabits:g} Mbit/s, {tokens} tokens" for hosts, megabits, tokens in places]
    of = {(case.hosts, case.megabits, case.tokens, case.way): case for case in found}
    first = records[0]["config"]["ways"][0]
    rows = [["ms of a step; times the longer of computation and traffic; error of the model", *head]]
    alone = [of[*place, first] for place in places]
    rows.append(["nothing travels", *(f"{1e3 * case.compute:.1f}" for case in alone)])
    for way in records[0]["config"]["ways"]:
        own = [of[*place, way] for place in places]
        rows.append([way, *(f"{1e3 * case.measured:.1f}; {case.over_bound:.2f}; {case.error:+.0%}" for case in own)])
    return rows


def plot(records: list[Record], folder: str) -> list[pathlib.Path]:
    """Draw the time of every way on every link, and the longer of computation and traffic.

    Returns:
      The figures' files.
    """
    found = cases(records)
    places = list(dict.fromkeys((case.hosts, case.megabits, case.tokens) for case in found))
    figure, panels = plots.panels(len(places), title="a step of a byte transformer between hosts", columns=2)
    for place, axes in zip(places, panels, strict=False):
        own = [case for case in found if (case.hosts, case.megabits, case.tokens) == place]
        heights = range(len(own))
        axes.barh(heights, [1e3 * case.measured for case in own], label="measured")
        axes.plot([1e3 * case.predicted for case in own], heights, "o", color="black", label="model")
        bound = [1e3 * max(case.compute, case.traffic) for case in own]
        axes.plot(bound, heights, "|", color="grey", markersize=14, label="longer of computation and traffic")
        axes.set_yticks(heights, [case.way for case in own], fontsize=8)
        hosts, megabits, tokens = place
        axes.set(title=f"{hosts} hosts, {megabits:g} Mbit/s, {tokens} tokens", xlabel="ms of a step", xscale="log")
    panels[0].legend(fontsize=8)
    return plots.save(figure, folder, "hidden")
