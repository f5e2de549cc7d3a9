r"""The majority vote: its definition, the wires that carry it, and what servers see of it.

.. math::
  d_i = \operatorname{sign}\Big(\sum_m t_{m,i}\Big), \qquad t_{m,i} = \operatorname{sign}(v_{m,i}) \in \{-1, 0, +1\},

and 0 where one sign does not outnumber the other by the quorum. That is `wire="psum"`, in as many words.

The packed wires count bits instead. A two-bit ballot stores `plus` (v > 0) and `not_minus` (v >= 0). The vote is
`plus + not_minus - 1`. Over M workers the bits count M + the sum of the votes, so comparing that count with M ± lead
decides, where *lead* is how many more votes one sign needs. A one-bit ballot stores `plus`, and what a zero is sent as
alternates. The vote is `2 * plus - 1`, so the bits count half of M + the sum. A decision travels in the encoding of a ballot.
"""

import math
from typing import Any, Literal, NamedTuple, get_args

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt, UInt8, UInt16
import optax

from signopt import _axis
from signopt import _bits
from signopt import _check
from signopt import _flat
from signopt import _float
from signopt import border as borders
from signopt import sign
from signopt.codecs import codec

Wire = Literal["one_bit", "two_bit", "psum"]

_ABSTAINS = 0xFF00  # eight empty two-bit ballots: not plus, and not minus


class VoteStatistics(NamedTuple):
    """How the workers' signs compared in a vote, over all coordinates. Shared: the same on every worker.

    Attributes:
      num_workers: int32 scalar; 0 before the first vote.
      margin: The mean over coordinates of |votes for - votes against| / workers, in [0, 1]. With M workers that only guess
        about sqrt(2 / (pi M)).
      agreement: The share of the votes on decided coordinates that were on the side of the majority, in [0.5, 1].
      lowest_agreement: The same for the worker that agrees least, in [0, 1]. Far below the others' it is a bad one.
      abstentions: The share of ballots that were empty, in [0, 1]. None is, on a one-bit wire.
    """

    num_workers: jax.Array
    margin: jax.Array
    agreement: jax.Array
    lowest_agreement: jax.Array
    abstentions: jax.Array


class Counted(NamedTuple):
    """What a server counts for `VoteStatistics` on its row; float32, so that sums over large trees do not wrap around.

    Attributes:
      with_majority: `(workers,)`: each worker's votes for the sign that won.
      on_decided: `(workers,)`: each worker's votes where a sign won.
      votes: Votes of all workers that were not empty.
      entries: Coordinates.
    """

    with_majority: jax.Array
    on_decided: jax.Array
    votes: jax.Array
    entries: jax.Array


def majority_vote(
    axis_name: _axis.AxisName,
    *,
    wire: Wire = "two_bit",
    quorum: float | jax.Array = 0.0,
    block: int | None = None,
    delay: int = False,
    report: bool = False,
    num_workers: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Replace each worker's updates by the sign that most workers agree on.

    .. math::
      d_i = \begin{cases} \operatorname{sign}(s_i) & |s_i| \ge \max(1, \lceil \rho M \rceil) \\ 0 & \text{else}
      \end{cases}, \qquad s_i = \sum_{m=1}^M \operatorname{sign}(v_{m,i}).

    This is the border of a chain: left of it values belong to one worker, right of it every worker holds the same,
    bit for bit, whatever runs the workers.

    On `wire="one_bit"` there is no third symbol. Worker m sends a zero as
    `(-1)**(step + i + popcount((step // 2 + i) & m))` and a tie, or too few votes, comes back as `(-1)**(step + i)`, with
    i the position in the flattened leaf: signs that alternate in time, so that nothing drifts, and that differ between
    workers, so that those who abstain cancel each other instead of voting as a bloc.

    Args:
      axis_name: The workers: an axis bound by `jax.vmap`, `jax.pmap` or `jax.shard_map`, a tuple of such axes, or None
        for one worker and no communication.
      wire: What travels. "two_bit" sends two bits per parameter each way and keeps zeros and ties as they are;
        "one_bit" sends one; "psum" sends an integer that holds the sum, a byte up to 127 workers, and is the reference.
      quorum: :math:`\rho` in [0, 1]: the share of all workers by which one sign has to outnumber the other.
      block: Give votes a size: multiply those of every `block` entries of a leaf by the workers' mean of |v| there, one
        more float32 each way for each block. None leaves -1, 0 and +1. A multiple of 8. Made for what local steps sum up
        to, whose size matters; 256 costs an eighth of a bit per parameter.
      delay: 1 to return the vote of the step before, so that ballots can travel while the next gradient is computed. A
        worker holds what it will vote with, a byte per parameter (its numbers, with `block`).
      report: Whether the state keeps `VoteStatistics` of the last vote: `optax.tree.get(state, "report")`. Costs each
        worker 8 bytes per worker in every step.
      num_workers: Size of the axis, with `delay=1`: what waits belongs to one worker.

    Returns:
      A transformation with a `BorderState`. Its `update` also takes `present`, a boolean scalar: a worker with
      `present=False` casts only zeros. Updates come back as -1, 0 and +1, or times a size, in their own dtypes.

    Raises:
      ValueError: If `wire` is unknown, `quorum` is outside [0, 1], `block` is no multiple of 8, `delay` is neither 0 nor 1
        or comes without `num_workers`; in `update`, if `axis_name` is not bound, or if the updates are known to be the
        same on all workers.
      TypeError: In `update`, if a leaf is not of a floating-point dtype.

    Examples:
      >>> import jax, jax.numpy as jnp, signopt
      >>> grads = jnp.array([[0.3, -1.0, 0.0], [2.0, -0.1, 0.5], [-9.0, 0.2, 0.0]])  # three workers
      >>> tx = signopt.majority_vote("worker", report=True)
      >>> vote = jax.vmap(tx.update, in_axes=(0, None), out_axes=None, axis_name="worker")
      >>> updates, state = vote(grads, tx.init(grads[0]))
      >>> updates.tolist(), round(float(state.report.margin), 3)  # (1/3 + 1/3 + 1/3) / 3
      ([1.0, -1.0, 1.0], 0.333)

    References:
      Algorithm 3 of Bernstein et al., `signSGD <https://arxiv.org/abs/1802.04434>`_, 2018, and for abstention and quorum
      its section 6. It does not say what the sign of zero is; see above. Delays, sizes and statistics are ours.
    """
    caller = "majority_vote"
    _check.choice(wire, get_args(Wire), caller, "wire")
    _check.share(quorum, caller, "quorum")
    if block is not None:
        _check.count(block, caller, "block", cure="Pass 256, or None for votes without a size.")
        if block % 8:
            raise ValueError(f"`{caller}(block=...)` has to be a multiple of 8, got {block}.")
    return borders.exchange(
        axis_name,
        by_sum(quorum, block, report) if wire == "psum" else by_bits(wire, quorum, block, report),
        caller=caller,
        delay=delay,
        num_workers=num_workers,
        report_like=statistics_like() if report else None,
    )


def _statistics(counted: Counted, context: borders.Context) -> VoteStatistics:
    """What the servers' counts say."""
    workers = jnp.float32(context.num_workers)
    with_majority, on_decided = counted.with_majority.sum(), counted.on_decided.sum()
    ballots = jnp.maximum(workers * counted.entries, 1)
    return VoteStatistics(
        num_workers=jnp.int32(context.num_workers),
        margin=(2 * with_majority - on_decided) / ballots,  # votes for less votes against, where a sign won
        agreement=with_majority / jnp.maximum(on_decided, 1),
        lowest_agreement=jnp.min(counted.with_majority / jnp.maximum(counted.on_decided, 1)),
        abstentions=jnp.maximum(1 - counted.votes / ballots, 0),  # compilers may round it below 0
    )


def statistics_like() -> VoteStatistics:
    """Their shapes and dtypes."""
    number: Any = jax.ShapeDtypeStruct((), jnp.float32)
    workers: Any = jax.ShapeDtypeStruct((), jnp.int32)
    return VoteStatistics(workers, number, number, number, number)


# ---- the definition ------------------------------------------------------------------------------------------------


def by_sum(quorum: Any, block: int | None, report: bool) -> borders.Border:
    """The network adds integers up, so every worker knows all sums and decides by itself."""

    def encode(updates, memory, context):
        return Ballot(signs_to_add(updates, context), *_sizes_to_send(updates, block, context)), memory

    def decode(sums, like, context):
        lead = _lead(quorum, context.num_workers)

        def won(s, x):
            is_won = jnp.abs(s) >= lead.astype(s.dtype)
            return jnp.where(is_won, jnp.sign(s), jnp.zeros_like(s)).astype(x.dtype)

        votes = jax.tree.map(won, sums.signs, like)
        return votes if block is None else _flat.times(votes, _mean(sums, context), block, _align(block))

    def observe(sums, updates, context):
        votes = signs_to_add(updates, context)
        pairs = list(zip(jax.tree.leaves(votes), jax.tree.leaves(sums.signs), strict=True))

        def number(holds):
            return jnp.asarray(sum((jnp.sum(holds(t, s), dtype=jnp.int32) for t, s in pairs), jnp.int32(0)))

        own = (
            number(lambda t, s: (jnp.sign(t) == jnp.sign(s)) & (s != 0)),
            number(lambda t, s: (t != 0) & (s != 0)),
            number(lambda t, s: t != 0),
        )
        found = _axis.gather(jnp.stack(own).astype(jnp.float32), context.axis_name)
        counted = Counted(found[:, 0], found[:, 1], found[:, 2].sum(), jnp.float32(_entries(updates)))
        return _statistics(counted, context)

    return borders.Border(
        encode,
        None,
        decode,
        observe=observe if report else None,
        hold=_hold(block),
        release=borders.cast_back,
        entrywise=block is None,
    )


def signs_to_add(updates: Any, context: borders.Context) -> Any:
    """This worker's votes, in the smallest integers that hold the sum of everybody's."""
    dtype = ballot_dtype(context.num_workers)
    votes = jax.tree.map(lambda x: sign.vote(x).astype(dtype), updates)
    present = context.present
    if present is None:
        return votes
    return jax.tree.map(lambda t: jnp.where(present, t, jnp.zeros_like(t)), votes)


def ballot_dtype(num_workers: int) -> jnp.dtype:
    """The smallest signed integer that cannot overflow when `num_workers` votes are added."""
    return next(jnp.dtype(t) for t in ("int8", "int16", "int32") if num_workers <= jnp.iinfo(t).max)


# ---- packed --------------------------------------------------------------------------------------------------------


def by_bits(wire: str, quorum: Any, block: int | None, report: bool) -> borders.Border:
    """Servers count packed bits."""
    nothing = _ABSTAINS if wire == "two_bit" else 0

    def encode(updates, memory, context):
        align = _align(block)
        words = cast(updates, wire, context, align=align)
        if report and wire == "one_bit":  # what only fills up is sent as 0 by all, so that it can be left out
            words &= _flat.used(updates, align)
        sizes, weight = _sizes_to_send(updates, block, context)
        rows = context.num_workers
        if block is not None:
            sizes = _flat.cut(sizes, rows, 1)
            weight = jnp.broadcast_to(weight, (rows, 1)) if context.present is not None else ()
        return Ballot(_flat.cut(words, rows, align // 8, nothing), sizes, weight), memory

    def decide(ballots, memory, context):
        counts = _bits.count(ballots.signs)
        lead = _lead(quorum, context.num_workers)
        words = decision(counts, wire, context.num_workers, lead, context.step)
        sizes = () if block is None else _mean(jax.tree.map(_float.sum_in_order, ballots), context)
        return (words, sizes), memory, count(ballots.signs, counts, wire) if report else ()

    def decode(decisions, like, context):
        words, sizes = decisions
        sizes = None if block is None else sizes.reshape(-1)
        return _flat.unpack(words.reshape(-1), like, sizes, block=block or 1, align=_align(block))

    def finish(counted, updates, context):
        return _statistics(_without_filling(counted, updates, wire, context.num_workers), context)

    return borders.Border(
        encode,
        decide,
        decode,
        observe=finish if report else None,
        hold=_hold(block),
        release=borders.cast_back,
        entrywise=block is None,
    )


def cast(updates: Any, wire: str, context: borders.Context, *, align: int | None = None) -> UInt[Array, " n"]:
    """This worker's signs as they travel: plus and not-minus, or one bit that is either where both agree."""
    signs = _flat.pack(updates, sign.is_positive, sign.is_negative, align=align)
    if context.present is not None:
        signs = jnp.where(context.present, signs, jnp.zeros_like(signs))
    if wire == "two_bit":
        return signs ^ jnp.uint16(_ABSTAINS)
    plus, minus = signs.astype(jnp.uint8), (signs >> 8).astype(jnp.uint8)
    filler = _filler(context.step, context.worker, context.num_workers)
    return plus | (~minus & _flat.repeat(filler, updates, align))


def _filler(step: Int[Array, ""], worker: Int[Array, ""], num_workers: int) -> UInt8[Array, " p"]:
    """What one worker sends for its zeros, `(-1)**(step + i + popcount((step // 2 + i) & worker))`, packed: one period.

    Only as many low bits of i matter as the largest worker has, so that the sequence repeats itself.
    """
    step, worker = step.astype(jnp.uint32), worker.astype(jnp.uint32)
    i = lax.iota(jnp.uint32, max(_bits.tile(), 2 ** (num_workers - 1).bit_length()))
    return _bits.pack((step + i + lax.population_count((step // 2 + i) & worker)) % 2 == 0)


def decision(
    counts: list[UInt8[Array, " n"]], wire: str, num_workers: int, lead: Int[Array, ""], step: Int[Array, ""]
) -> UInt[Array, " n"]:
    """Decide from how many bits were cast for each coordinate, in the encoding of a ballot."""
    if wire == "two_bit":  # the count is M + the sum of the votes
        plus = _bits.at_least(counts, num_workers + lead)
        not_minus = _bits.at_least(counts, num_workers - lead + 1)
        return _together(plus, not_minus)
    plus = _bits.at_least(counts, (num_workers + lead + 1) // 2)  # the count is half of that
    not_minus = _bits.at_least(counts, (num_workers - lead) // 2 + 1)
    return plus | (not_minus & _tie(step, plus.size))


def _together(low: UInt8[Array, " n"], high: UInt8[Array, " n"]) -> UInt16[Array, " n"]:
    """Two planes in one word."""
    return low.astype(jnp.uint16) | (high.astype(jnp.uint16) << 8)


def _tie(step: Int[Array, ""], words: int) -> UInt8[Array, " p"]:
    """`(-1)**(step + i)`, packed: every leaf and every row starts a tile."""
    even = _bits.pack(lax.iota(jnp.uint32, _bits.tile()) % 2 == 0)
    tie = jnp.where(step % 2 == 0, even, ~even)
    return tie if tie.size == 1 else jnp.tile(tie, words // tie.size)


def count(ballots: UInt[Array, "workers row"], counts: list[UInt8[Array, " row"]], wire: str) -> Counted:
    """What `VoteStatistics` needs, read off the packed ballots of a row."""
    workers = len(ballots)
    if wire == "two_bit":
        won, lost = _bits.at_least(counts, workers + 1), ~_bits.at_least(counts, workers)
        ballots = ballots ^ jnp.uint16(_ABSTAINS)  # plus and minus
        won, decided = _together(won, lost), _together(won | lost, won | lost)
    else:
        won, lost = _bits.at_least(counts, workers // 2 + 1), ~_bits.at_least(counts, (workers + 1) // 2)
        decided = won | lost
    won, decided = _bits.widened(won), _bits.widened(decided)
    entries, all_vote = 8 * counts[0].size, _bits.ones(decided)

    def of_one(cast):
        if wire == "two_bit":
            return _bits.ones(cast & won), _bits.ones(cast & decided), _bits.ones(cast)
        return _bits.ones(~(cast ^ won) & decided), all_vote, jnp.uint32(entries)

    # One worker at a time: in one expression for all XLA on CPUs counts the votes anew for each.
    found = lax.map(of_one, _bits.widened(ballots))
    with_majority, on_decided, votes = (x.astype(jnp.float32) for x in found)
    return Counted(with_majority, on_decided, _float.sum_in_order(votes), jnp.float32(entries))


def _without_filling(counted, updates, wire, num_workers) -> Counted:
    """Leave out the coordinates that no leaf has. On a one-bit wire all workers send 0 there, which is a vote for minus."""
    entries = _entries(updates)
    filling = counted.entries - jnp.float32(entries) if wire == "one_bit" else jnp.float32(0)
    return Counted(
        counted.with_majority - filling,
        counted.on_decided - filling,
        counted.votes - num_workers * filling,
        jnp.float32(entries),
    )


# ---- both ----------------------------------------------------------------------------------------------------------


class Ballot(NamedTuple):
    """What a worker sends, or the sum of what all send.

    Attributes:
      signs: Packed words, a row for each server; on `wire="psum"` a tree of small integers.
      sizes: With `block`, the mean magnitude of each block, float32; else empty.
      weight: With `block` and `present`, 1 for a worker that takes part and 0 for one that does not; else empty.
    """

    signs: Any
    sizes: Any = ()
    weight: Any = ()


def _align(block: int | None) -> int:
    """Where leaves may start: at whole tiles, and whole blocks."""
    return math.lcm(block or 1, _bits.tile())


def _lead(quorum: float | jax.Array, num_workers: int) -> Int[Array, ""]:
    """How many more votes one sign needs than the other; the small term absorbs rounding in `quorum * M`."""
    needed = jnp.ceil(jnp.asarray(quorum, jnp.float32) * num_workers - 1e-6 * num_workers)
    return jnp.maximum(1, needed.astype(jnp.int32))


def _sizes_to_send(updates, block, context) -> tuple[Any, Any]:
    """The mean magnitude of each block and this worker's weight in their mean."""
    if block is None:
        return (), ()
    align, sums = _align(block), [jnp.zeros([0], jnp.float32)]
    for part in _flat.joined(updates, align):
        size = jnp.abs(_float.widen(part))
        size = jnp.where(jnp.isfinite(size), size, jnp.zeros_like(size))
        blocks = -(-size.size // align) * (align // block)
        sums.append(codec.total(_flat.cut(size, blocks, block).astype(jnp.float32)))  # in a written order
    sizes = codec.over(jnp.concatenate(sums), jnp.asarray(_flat.block_sizes(updates, block, align)))
    if context.present is None:
        return sizes, ()
    return jnp.where(context.present, sizes, jnp.zeros_like(sizes)), jnp.asarray(context.present, jnp.float32)


def _mean(summed: Ballot, context) -> Float[Array, " blocks"]:
    """The mean of the sizes over those present, from sums."""
    voters = jnp.float32(context.num_workers) if isinstance(summed.weight, tuple) else jnp.maximum(summed.weight, 1)
    return codec.over(summed.sizes, voters)


def _hold(block):
    """How a ballot waits: as one signed byte, or as numbers where sizes count."""
    return sign.vote if block is None else borders.finite


def _entries(tree) -> int:
    return sum(x.size for x in jax.tree.leaves(tree))
