r"""The majority vote: its definition and the wires that carry it.

.. math::
  d_i = \operatorname{sign}\Big(\sum_m t_{m,i}\Big), \qquad t_{m,i} = \operatorname{sign}(v_{m,i}) \in \{-1, 0, +1\},

and 0 where the sum is smaller in magnitude than the quorum. That is `wire="psum"`, in as many words. The packed wires
count bits instead. A ballot of two bits, *plus* and *not minus*, is worth their sum minus one, so M workers cast 2 M
bits whose number of ones is M plus the sum of the votes; a ballot of one bit is worth twice that bit minus one. Either
way a decision compares one count with two thresholds, and travels back in the encoding of a ballot.
"""

from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Int, UInt, UInt8
import optax

from signopt import _axis
from signopt import _bits
from signopt import _shards
from signopt import sign
from signopt import wire as wires

_EVEN = 0b01010101  # the even coordinates of a byte
_ODD = 0b10101010


class MajorityVoteState(NamedTuple):
    """How many votes were held.

    Attributes:
      count: int32 scalar. Shared: the same on every worker. It times the signs that settle zeros on a one-bit wire.
    """

    count: jax.Array


def majority_vote(
    axis_name: _axis.AxisName, *, wire: wires.Wire = "two_bit", quorum: float | jax.Array = 0.0
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

    Returns:
      A transformation whose `update` also takes `present`, a boolean scalar: a worker with `present=False` casts only
      zeros. Updates come back as -1, 0 and +1 in their own dtypes.

    Raises:
      ValueError: If `wire` is unknown or `quorum` is outside [0, 1]; in `update`, if `axis_name` is not bound, or if the
        updates are known to be the same on all workers.
      TypeError: In `update`, if a leaf is not of a floating-point dtype.

    Examples:
      >>> import jax, jax.numpy as jnp, signopt
      >>> grads = jnp.array([[0.3, -1.0, 0.0], [2.0, -0.1, 0.5], [-9.0, 0.2, 0.0]])  # three workers
      >>> tx = signopt.majority_vote("worker")
      >>> vote = jax.vmap(tx.update, in_axes=(0, None), out_axes=None, axis_name="worker")
      >>> vote(grads, tx.init(grads[0]))
      (Array([ 1., -1.,  1.], dtype=float32), MajorityVoteState(count=Array(1, dtype=int32)))

    References:
      Algorithm 3 of Bernstein et al., `signSGD <https://arxiv.org/abs/1802.04434>`_, 2018, and for abstention and quorum
      its section 6. It does not say what the sign of zero is; see above.
    """
    caller = "majority_vote"
    wires.check_wire(wire, f"{caller}(wire=...)")
    if not isinstance(quorum, jax.Array) and not 0 <= quorum <= 1:
        raise ValueError(f"`{caller}(quorum=...)` has to be in [0, 1], got {quorum}.")

    def init_fn(params):
        del params
        return MajorityVoteState(jnp.zeros([], jnp.int32))

    def update_fn(updates, state, params=None, *, present=None, **extra_args):
        del params, extra_args
        num_workers = _axis.size(axis_name, caller)
        sign.require_floating(updates, caller)
        _axis.require_varying(updates, axis_name, caller)
        margin = _margin(quorum, num_workers)
        if wire == "psum":
            decisions = _vote_by_sum(updates, axis_name, margin, present)
        else:
            decisions = wires.unpack(packed_vote(updates, axis_name, wire, margin, state.count, present), updates)
        return decisions, MajorityVoteState(state.count + 1)

    return optax.GradientTransformationExtraArgs(init_fn, _shards.cut(update_fn))


def _margin(quorum: float | jax.Array, num_workers: int) -> Int[Array, ""]:
    """How many more workers one sign needs than the other; the small term absorbs rounding in `quorum * M`."""
    needed = jnp.ceil(quorum * num_workers - 1e-6 * num_workers)
    return jnp.maximum(1, needed).astype(jnp.int32)


def sum_of_votes(updates: Any, axis_name: _axis.AxisName, present: Any) -> Any:
    """The sum of everybody's votes, in the smallest integers that hold it."""
    dtype = wires.ballot_dtype(_axis.size(axis_name, "majority_vote"))
    votes = jax.tree.map(lambda x: sign.vote(x).astype(dtype), updates)
    if present is not None:
        votes = jax.tree.map(lambda t: t * jnp.asarray(present).astype(dtype), votes)
    return _axis.total(votes, axis_name)


def _vote_by_sum(updates: Any, axis_name: _axis.AxisName, margin: Int[Array, ""], present: Any) -> Any:
    """The definition."""
    sums = sum_of_votes(updates, axis_name, present)
    return jax.tree.map(lambda s, x: jnp.where(abs(s) >= margin, jnp.sign(s), 0).astype(x.dtype), sums, updates)


def packed_vote(
    updates: Any,
    axis_name: _axis.AxisName,
    wire: str,
    margin: Int[Array, ""],
    step: Int[Array, ""],
    present: Any = None,
) -> UInt[Array, " n"]:
    """The decisions as they travel: what `majority_vote` unpacks."""
    num_workers = _axis.size(axis_name, "majority_vote")

    def count_and_decide(everybody):
        return decide(_bits.count(everybody), wire, num_workers, margin, step)

    return wires.exchange(cast(updates, wire, axis_name, step, present), count_and_decide, axis_name)


def cast(updates: Any, wire: str, axis_name: _axis.AxisName, step: Int[Array, ""], present: Any) -> UInt[Array, " n"]:
    """This worker's signs as they travel: plus and not-minus, or one bit that is either where both agree."""
    signs = wires.pack(updates, sign.is_positive, sign.is_negative)
    if present is not None:
        signs = jnp.where(present, signs, 0)
    if wire == "two_bit":
        return signs ^ jnp.uint16(0xFF00)
    plus, minus = signs.astype(jnp.uint8), (signs >> 8).astype(jnp.uint8)
    num_workers = _axis.size(axis_name, "majority_vote")
    return plus | (~minus & wires.repeat(_filler(step, _axis.index(axis_name), num_workers), updates))


def _filler(step: Int[Array, ""], worker: Int[Array, ""], num_workers: int) -> UInt8[Array, " p"]:
    """What one worker sends for its zeros, `(-1)**(step + i + popcount((step // 2 + i) & worker))`, packed: one period.

    Only as many low bits of i matter as the largest worker has, so that the sequence repeats itself.
    """
    step, worker = step.astype(jnp.uint32), worker.astype(jnp.uint32)
    i = lax.iota(jnp.uint32, max(8, 2 ** (num_workers - 1).bit_length()))
    return _bits.pack((step + i + lax.population_count((step // 2 + i) & worker)) % 2 == 0)


def decide(
    counts: list[UInt8[Array, " n"]], wire: str, num_workers: int, margin: Int[Array, ""], step: Int[Array, ""]
) -> UInt[Array, " n"]:
    """Decide from how many bits were cast for each coordinate, in the encoding of a ballot."""
    if wire == "two_bit":  # the count is M + the sum of the votes
        plus = _bits.at_least(counts, num_workers + margin)
        not_minus = _bits.at_least(counts, num_workers - margin + 1)
        return plus.astype(jnp.uint16) | (not_minus.astype(jnp.uint16) << 8)
    plus = _bits.at_least(counts, (num_workers + margin + 1) // 2)  # the count is half of that
    not_minus = _bits.at_least(counts, (num_workers - margin) // 2 + 1)
    tie = jnp.where(step % 2 == 0, jnp.uint8(_EVEN), jnp.uint8(_ODD))  # (-1)**(step + i): every leaf starts a byte
    return plus | (not_minus & tie)
