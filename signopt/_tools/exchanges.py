"""The time that agreeing takes: a model of bytes, messages and work, for every way to agree.

A step is computation, which no wire changes, and an exchange: bytes over bandwidth, messages, and the work of packing,
counting and adding. No link is shared. Workers exchange in every step or rarely, whole or in fragments. Nothing overlaps but
late decisions whose exchange no `lax.cond` holds, where the backend lets collectives run beside computation: of those the
longer of travel and computation counts, and the work.

Assumed: a mean is reduced by recursive halving and doubling (2 log2 M rounds of messages), decisions are gathered by
recursive doubling (log2 M rounds), and ballots are dealt to their servers in whichever is faster of one message to every
other worker and log2 M rounds that carry log2(M)/2 times the bytes (Bruck et al., 1997). Work is added up as if it were one
core's.
"""

from collections.abc import Callable
import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import optax

from signopt import codecs
from signopt import wire as wires
from signopt.means import mean
from signopt.vote import majority_vote

WIRES = ("float32", "bfloat16", "int8", "all_gather", "two_bit", "one_bit")
PLANES = {"one_bit": 1, "two_bit": 2, "all_gather": 1}
BLOCK = 256  # entries that share a scale
_AXIS = "worker"


def _coded(uplink, downlink=None):
    return lambda workers: mean(_AXIS, uplink=uplink, downlink=downlink, num_workers=workers)


# Compressed means with memory, and a one-bit vote times the mean size: from the number of workers to the border.
CODED: dict[str, Callable[[int], optax.GradientTransformation]] = {
    "scaled_sign": _coded(codecs.scaled_sign(block=BLOCK), codecs.scaled_sign(block=BLOCK)),
    "top_k": _coded(codecs.top_k(0.01)),
    "low_precision": _coded(codecs.low_precision("int4"), codecs.low_precision("int4")),
    "sized": lambda workers: majority_vote(_AXIS, wire="one_bit", block=BLOCK),
}
# Beyond 128 voters `signopt._bits.count` no longer fits into registers, and beyond 256 it adds up groups in a loop: measured,
# four to six times the work for each ballot at M = 256 to 1,024.
MANY, _PER_PLANE = 128, 0.6


@dataclasses.dataclass(frozen=True)
class Rates:
    """Seconds of work for one parameter on one worker.

    The defaults are the fastest of 15 on two cores of a shared machine, with 4,194,304 parameters in one array and no other
    worker on it; those of codecs and of the offset the fastest of 25 with 1,048,576, less a plain step. `--stages` reads
    others.

    Attributes:
      pack: From a float to a ballot, of one plane or of two.
      count: One bit of one worker.
      unpack: From the planes to a float.
      add: One addition of floats in a reduction, into fresh memory.
      scaled_sign: All that an exchange by this codec computes: encoding, memory, deciding, decoding.
      top_k: The same, of one entry in a hundred.
      low_precision: The same, in four bits.
      sized: The same, of a vote times the mean size.
      offset: What local steps do to keep a worker's offset, in every step.
    """

    pack: float = 0.1e-9
    count: float = 0.02e-9
    unpack: float = 0.3e-9
    add: float = 0.4e-9
    scaled_sign: float = 3e-9
    top_k: float = 14e-9
    low_precision: float = 10e-9
    sized: float = 0.9e-9
    offset: float = 1e-9

    def times(self, factor: float) -> "Rates":
        """Those of a machine that is so many times slower."""
        return Rates(**{name: factor * value for name, value in dataclasses.asdict(self).items()})


class Cluster(NamedTuple):
    """Workers and what joins them.

    Attributes:
      workers: M, each with a link of its own.
      bits_per_second: Of a link, each way, for data without headers.
      latency_seconds: From one worker to another.
      message_seconds: What a message costs its sender, while others travel.
    """

    workers: int
    bits_per_second: float
    latency_seconds: float = 50e-6
    message_seconds: float = 2e-6


class Exchange(NamedTuple):
    """What one way to agree costs, apart from the bandwidth.

    Attributes:
      bytes: That a worker sends, and as many receives.
      fixed_seconds: Latencies, messages and work.
    """

    bytes: float
    fixed_seconds: float


@functools.cache
def bytes_sent(parameters: int, workers: int, wire: str, *, leaves: int = 1) -> int:
    """The bytes that each worker sends in a step.

    Args:
      parameters: In all.
      workers: Their number.
      wire: One of `WIRES` or `CODED`. "all_gather" sends a worker's packed signs to each of the others, who count for
        themselves.
      leaves: Arrays of about the same size that they are in; each is packed from a fresh byte on.

    Examples:
      >>> [bytes_sent(8_000_000, 8, wire) for wire in ("float32", "bfloat16", "int8", "two_bit", "one_bit", "all_gather")]
      [56000000, 28000000, 14000000, 3500000, 1750000, 7000000]
      >>> bytes_sent(1000, 1000, "one_bit")  # 125 bytes for 1000 servers: all but one byte in eight is filling
      1998
      >>> [bytes_sent(8_000_000, 8, wire) for wire in CODED]
      [1968792, 28455000, 7109396, 1969128]
    """
    small, larger = divmod(parameters, leaves)
    sizes = [small + 1] * larger + [small] * (leaves - larger)
    if wire in CODED:
        return wires.bytes_sent(
            [jax.ShapeDtypeStruct((size,), "float32") for size in sizes], workers, CODED[wire](workers)
        )
    if wire == "all_gather":
        return (workers - 1) * sum(-(-size // 8) for size in sizes)
    dtype, name = {"float32": ("float32", "mean"), "bfloat16": ("bfloat16", "mean"), "int8": ("float32", "psum")}.get(
        wire, ("float32", wire)
    )
    return wires.bytes_sent([jax.ShapeDtypeStruct((size,), dtype) for size in sizes], workers, name)


def work_seconds(parameters: int, workers: int, wire: str, rates: Rates) -> float:
    """The seconds that a worker computes to agree: it packs, counts its share or all, and unpacks, or adds its share.

    Other dtypes than float32 are converted there and back, which is taken to cost what one plane does.

    Examples:
      >>> rates = Rates(pack=1e-9, count=1e-10, unpack=2e-9, add=1e-9)
      >>> [round(1e3 * work_seconds(1_000_000, 8, wire, rates), 3) for wire in ("float32", "one_bit", "all_gather")]
      [0.875, 3.1, 3.8]
    """
    if wire in CODED:
        return parameters * getattr(rates, wire)
    if wire in PLANES:
        planes = PLANES[wire]
        # One ballot on every parameter, whatever M: M ballots on an M-th of them.
        ballots = planes * (1 + (_PER_PLANE * math.log2(workers) if workers > MANY else 0.0))
        if wire == "all_gather":
            ballots *= workers
        return parameters * (rates.pack + ballots * rates.count + rates.unpack)
    converted = 0.0 if wire == "float32" else rates.pack + rates.unpack
    return parameters * (rates.add * (workers - 1) / workers + converted)


def exchanges(parameters: int, wire: str, cluster: Cluster, rates: Rates, *, leaves: int = 1) -> list[Exchange]:
    """The ways to agree over a wire, of which the fastest is taken.

    Args:
      parameters: In all.
      wire: One of `WIRES` or `CODED`.
      cluster: Its bandwidth does not matter here.
      rates: Of the workers.
      leaves: Arrays that the parameters are in; reduced and packed together.

    Examples:
      >>> free = Rates(0, 0, 0, 0)
      >>> cluster = Cluster(workers=8, bits_per_second=1e9, latency_seconds=1.0, message_seconds=0.0)
      >>> exchanges(8_000_000, "float32", cluster, free)  # 2 log2 8 rounds
      [Exchange(bytes=56000000, fixed_seconds=6.0)]
      >>> exchanges(8_000_000, "one_bit", cluster, free)  # dealt directly, or in log2 8 rounds; then gathered
      [Exchange(bytes=1750000, fixed_seconds=4.0), Exchange(bytes=2375000.0, fixed_seconds=6.0)]
    """
    workers = cluster.workers
    size = bytes_sent(parameters, workers, wire, leaves=leaves)
    work = work_seconds(parameters, workers, wire, rates)
    rounds = math.ceil(math.log2(workers))
    each = cluster.latency_seconds + cluster.message_seconds
    if wire == "all_gather":
        return [Exchange(size, work + rounds * each)]
    if wire not in PLANES and wire not in CODED:
        return [Exchange(size, work + 2 * rounds * each)]
    direct = cluster.latency_seconds + (workers - 1) * cluster.message_seconds
    more = max(1.0, workers * math.log2(workers) / 2 / (workers - 1))
    return [
        Exchange(size, work + direct + rounds * each),
        Exchange(size / 2 * (1 + more), work + 2 * rounds * each),
    ]


def exchange_seconds(parameters: int, wire: str, cluster: Cluster, rates: Rates, *, leaves: int = 1) -> float:
    """The time that agreeing takes.

    Examples:
      >>> cluster = Cluster(workers=2, bits_per_second=1e8, latency_seconds=0.0, message_seconds=0.0)
      >>> [round(exchange_seconds(1_000_000, wire, cluster, Rates(0, 0, 0, 0)), 4) for wire in ("float32", "one_bit")]
      [0.32, 0.01]
    """
    ways = exchanges(parameters, wire, cluster, rates, leaves=leaves)
    return min(8 * way.bytes / cluster.bits_per_second + way.fixed_seconds for way in ways)


def step_seconds(
    parameters: int,
    wire: str,
    cluster: Cluster,
    rates: Rates,
    *,
    compute_seconds: float = 0.0,
    every: int = 1,
    fragments: int = 1,
    delay: int = 0,
    overlaps: bool = True,
) -> float:
    """The time of a step, on average over a round.

    Args:
      parameters: In all.
      wire: One of `WIRES` or `CODED`.
      cluster: The workers.
      rates: Of the workers.
      compute_seconds: Of a step without any communication.
      every: As in `signopt.local_steps`: steps in a round.
      fragments: Parts that are exchanged in turn, each once in a round.
      delay: Whether an exchange may take until the next step.
      overlaps: Whether the backend runs collectives beside computation. On CPUs XLA does not, within one program. Of late
        decisions only those that no `lax.cond` holds do: with `fragments == every`.

    Examples:
      >>> cluster, free = Cluster(2, 1e8, latency_seconds=0.0, message_seconds=0.0), Rates(*9 * [0.0])
      >>> def ms(wire, **settings):
      ...     return round(1e3 * step_seconds(1_000_000, wire, cluster, free, compute_seconds=0.1, **settings), 1)
      >>> ms("float32"), ms("one_bit"), ms("one_bit", delay=1), ms("float32", every=16), ms("float32", every=16, delay=1)
      (420.0, 110.0, 100.0, 120.0, 120.0)
      >>> ms("float32", every=4, fragments=4), ms("float32", every=4, fragments=4, delay=1), ms("float32", delay=1)
      (180.0, 100.0, 320.0)
    """
    part = -(-parameters // fragments)
    exchange = exchange_seconds(part, wire, cluster, rates)
    kept = parameters * rates.offset if every > 1 or delay else 0.0
    if delay and overlaps and fragments == every:
        work = work_seconds(part, cluster.workers, wire, rates)
        return max(compute_seconds, exchange - work) + work + kept
    return compute_seconds + exchange * fragments / every + kept


def two_level_seconds(
    parameters: int, wire: str, inner: Cluster, outer: Cluster, rates: Rates, *, compute_seconds: float = 0.0
) -> float:
    """The time of a step whose hosts average in float32 over their own devices and agree among hosts over a wire.

    Every device ends up with an inner share of the mean (a reduce-scatter), agrees on that share with the same device of
    the other hosts, over the one link of its host, and gathers the result in float32. That is what
    `signopt.workers.on_shards` does for sharded parameters. Where all devices of a host hold everything, as after
    `signopt.mean("device")`, each sends it all: g times the bytes on the link.

    Args:
      parameters: In all.
      wire: Between hosts, one of `WIRES`.
      inner: The g devices of a host; `workers=1` for one level.
      outer: The hosts; `bits_per_second` is that of a host's link, which its devices share.
      rates: Of the devices.
      compute_seconds: Of a step without any communication.

    Examples:
      >>> free = Rates(0, 0, 0, 0)
      >>> inner, outer = Cluster(8, 1e12, 0.0, 0.0), Cluster(2, 1e8, 0.0, 0.0)
      >>> one_level = exchange_seconds(8_000_000, "one_bit", outer, free)
      >>> inside = exchange_seconds(8_000_000, "float32", inner, free)
      >>> two_level_seconds(8_000_000, "one_bit", inner, outer, free) == one_level + inside
      True
    """
    g = inner.workers
    inside = exchange_seconds(parameters, "float32", inner, rates) if g > 1 else 0.0
    shared = outer._replace(bits_per_second=outer.bits_per_second / g)
    return compute_seconds + inside + exchange_seconds(-(-parameters // g), wire, shared, rates)


def break_even(
    parameters: int,
    wire: str,
    cluster: Cluster,
    rates: Rates,
    *,
    against: str = "float32",
    speed_up: float = 1.0,
    compute_seconds: float = 0.0,
) -> float:
    """The bandwidth in bits/s below which a wire makes the step so many times as fast.

    Args:
      parameters: In all.
      wire: One of `WIRES`.
      cluster: Its bandwidth does not matter.
      rates: Of the workers.
      against: The other wire.
      speed_up: How many times as fast; 1 for any gain at all, where `compute_seconds` does not matter.
      compute_seconds: Of a step without any communication.

    Returns:
      Bits per second; `math.inf` where any bandwidth is small enough, and 0 where none is, even if a wire that sends more
      in fewer messages pays above one.

    Examples:
      >>> cluster = Cluster(workers=2, bits_per_second=math.nan, latency_seconds=0.0, message_seconds=0.0)
      >>> rates = Rates(pack=1e-9, count=0.0, unpack=0.0, add=0.0)
      >>> f"{break_even(1_000_000, 'one_bit', cluster, rates):.3g}"  # 31 bits per parameter saved for 1 ns
      '3.1e+10'
      >>> break_even(1_000_000, "one_bit", cluster, Rates(0, 0, 0, 0))
      inf
      >>> break_even(1_000_000, "one_bit", cluster, rates, speed_up=33)
      0.0
    """
    best = 0.0
    for other in exchanges(parameters, against, cluster, rates):  # a single one for all but dealt ballots
        for way in exchanges(parameters, wire, cluster, rates):
            bits = 8 * (other.bytes - speed_up * way.bytes)
            lost = speed_up * (compute_seconds + way.fixed_seconds) - (compute_seconds + other.fixed_seconds)
            if bits > 0:
                best = max(best, math.inf if lost <= 0 else bits / lost)
    return best


def bandwidth(bits_per_second: float | None) -> str:
    """A bandwidth with a prefix of its unit; None for any.

    Examples:
      >>> [bandwidth(x) for x in (None, 0.0, 2.5e9)]
      ['any', 'none', '2.5 G']
    """
    if bits_per_second is None:
        return "any"
    if bits_per_second == 0:
        return "none"
    power = min(4, max(0, int(math.log10(bits_per_second) // 3)))
    return f"{bits_per_second / 10 ** (3 * power):.3g} {['', 'k', 'M', 'G', 'T'][power]}".strip()
