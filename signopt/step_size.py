r"""A learning rate that a vote finds by itself.

A step of length :math:`\eta` along signs changes the loss, in expectation, by at most

.. math::
  \frac{\eta^2}{2} \|L\|_1 - \eta \sum_i |g_i| (1 - 2 P_i),

with :math:`P_i` the probability that a voter's sign is wrong, so the best step is :math:`\eta^* = \sum_i |g_i| (1 - 2 P_i)
/ \|L\|_1`: long where voters agree, short where they do not. Neither g nor P is known. How they are estimated decides what
has to travel.
"""

from collections.abc import Callable
import functools
import operator
from typing import Any, Literal, NamedTuple, get_args

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8
import numpy as np
import optax

from signopt import _axis
from signopt import _bits
from signopt import _check
from signopt import _flat
from signopt import _float
from signopt import border as borders
from signopt import sign
from signopt import vote
from signopt.diagnostics import curvature

Estimator = Literal["margin", "exact", "leave_one_out"]


class Measuring(NamedTuple):
    """What a smoothness may be measured from, on one worker.

    Attributes:
      updates: What this worker votes with.
      params: The parameters.
      value_fn: This worker's loss as a function of the parameters.
      step: int32 scalar: the votes before this one.
      previous: float32 scalar: what was found in the last step; 0 before the first.
    """

    updates: Any
    params: Any
    value_fn: Callable[[Any], jax.Array] | None
    step: jax.Array
    previous: jax.Array


Smoothness = float | jax.Array | Callable[[Measuring], jax.Array] | None


class AdaptiveMajorityVoteState(NamedTuple):
    """What a vote with a learning rate of its own keeps.

    Attributes:
      vote: The state of the vote. Shared.
      learning_rate: float32 scalar: what the last step was scaled by; 0 before the first. Shared.
      smoothness: float32 scalar: the :math:`\\|L\\|_1` it was found with. Shared.
      scaled: The state of what is scaled along with the votes; empty without. Shared.
    """

    vote: borders.BorderState
    learning_rate: jax.Array
    smoothness: jax.Array
    scaled: optax.OptState = ()


class Progress(NamedTuple):
    """What servers report: their shares of the sum of |g| (1 - 2 P), and how many of their workers are present. Shared."""

    share: jax.Array
    present: jax.Array


class Seen(NamedTuple):
    """What a vote with a learning rate of its own reports. Shared.

    Attributes:
      progress: What the rate is found from.
      statistics: `VoteStatistics`, if they were asked for.
    """

    progress: Progress
    statistics: Any = ()


def adaptive_majority_vote(
    axis_name: _axis.AxisName,
    *,
    smoothness: Smoothness = None,
    estimator: Estimator = "margin",
    wire: vote.Wire = "two_bit",
    report: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Replace each worker's updates by the sign that most workers agree on, times a learning rate found on the way.

    With M workers, :math:`v_m` what worker m votes with, :math:`s = \sum_m \operatorname{sign}(v_m)` and :math:`\bar v` the
    mean of :math:`v_m`, the updates become :math:`\eta \operatorname{sign}(s)` with

    .. math::
      \eta_\text{exact} = \frac{\langle \bar v, s \rangle}{M \|L\|_1}, \qquad
      \eta_\text{leave one out} = \frac{\frac1M \sum_m \langle v_m, s - \operatorname{sign}(v_m) \rangle}{(M-1) \|L\|_1},
      \qquad
      \eta_\text{margin} = \frac{1}{\|L\|_1} \sum_i |v_{m(i),i}| \max\Big(0, \frac{s_i^2 - M}{M (M-1)}\Big).

    *exact* is the papers': :math:`\bar v` for the gradient, and for :math:`P_i` the share of workers that disagree with it.
    It is too large where there is only noise. *leave one out* compares each worker with the others only, and is unbiased.
    Both need the sum of the signs on every worker, so `wire="psum"`, and one number per worker; no gradient travels.
    *margin* needs one number per worker besides the vote: who serves coordinate i has counted the votes there, so
    it knows the margin, and uses its own :math:`|v_{m(i),i}|`. Its factor is an unbiased estimate of :math:`(1 - 2P_i)^2`
    where the formula has :math:`1 - 2 P_i`, so it takes shorter steps where voters disagree.

    Let the updates carry magnitudes: `optax.ema` to the left, not `scale_by_signum`.

    Args:
      axis_name: The workers, as in `majority_vote`: devices, or a vmapped axis over the samples or micro-batches of one
        batch (`signopt.workers.split_batch`).
      smoothness: :math:`\|L\|_1`, the sum over coordinates of how fast the gradient changes: a number; None for the number
        of parameters, as in the paper; or a function from what a worker knows (`Measuring`) to a number, whose mean over
        workers is taken, such as `measured_smoothness(key)`. Too small a number diverges.
      estimator: "margin", "exact" or "leave_one_out".
      wire: What travels, as in `majority_vote`. Only "psum" gives every worker what "exact" and "leave_one_out" need.
      report: Whether the state keeps `VoteStatistics` of the last vote, as in `majority_vote`.

    Returns:
      A transformation with an `AdaptiveMajorityVoteState`, whose `learning_rate` is the same on every worker, bit for bit.
      Its `update` also takes `present`, as that of `majority_vote`, and for a smoothness that is measured `params` and
      `value_fn`, this worker's loss as a function of the parameters. Updates come back in their own dtypes;
      `optax.scale(-1.0)` has to follow.

    Raises:
      ValueError: If an argument is not one of its choices, `smoothness` is not positive, or the estimator needs another wire;
        in `update`, if the estimator needs more workers, the axis is not bound, or the updates are known to be the same on
        all workers.
      TypeError: In `update`, if a leaf is not of a floating-point dtype.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from signopt.step_size import adaptive_majority_vote
      >>> grads = jnp.array([[3.0, -1.0], [1.0, 1.0], [2.0, -1.0]])  # three workers
      >>> tx = adaptive_majority_vote("worker", estimator="exact", wire="psum")
      >>> update = jax.vmap(tx.update, in_axes=(0, None), out_axes=None, axis_name="worker")
      >>> updates, state = update(grads, tx.init(grads[0]))
      >>> updates.tolist(), float(state.learning_rate)  # (2 * 1 + 1/3 * 1/3) / 2
      ([1.0555555820465088, -1.0555555820465088], 1.0555555820465088)

    References:
      Algorithms 1 and 2 and equation (1) of Yang et al., Adaptive Multi-Hierarchical signSGD, 2020. It takes L for the
      smoothness, which has to be the sum over coordinates; *leave one out* and *margin* are ours.
    """
    return at_found_rate("adaptive_majority_vote", axis_name, smoothness, estimator, wire, None, report)


def at_found_rate(
    caller: str,
    axis_name: _axis.AxisName,
    smoothness: Smoothness,
    estimator: Estimator,
    wire: vote.Wire,
    scaled: optax.GradientTransformation | None,
    report: bool,
) -> optax.GradientTransformationExtraArgs:
    """`adaptive_majority_vote` whose rate also scales what `scaled` adds to the votes, such as a weight decay."""
    _check.choice(wire, get_args(vote.Wire), caller, "wire")
    _check.choice(estimator, get_args(Estimator), caller, "estimator")
    if estimator != "margin" and wire != "psum":
        raise ValueError(
            f'`{caller}(wire=...)` has to be "psum" with estimator={estimator!r}, which needs the sum of the votes on every '
            f'worker, got {wire!r}. Keep the wire with `estimator="margin"`.'
        )
    if smoothness is not None and not callable(smoothness):
        _check.positive(
            smoothness, caller, "smoothness", "Pass `signopt.measured_smoothness(key)` to have it measured."
        )
    number: Any = jax.ShapeDtypeStruct((), jnp.float32)
    voting: Any = borders.exchange(
        axis_name,
        _by_sum(estimator, report) if wire == "psum" else _by_count(wire, report),
        caller=caller,
        report_like=Seen(Progress(number, number), vote.statistics_like() if report else ()),
    )
    scaled_tx = None if scaled is None else optax.with_extra_args_support(scaled)

    def init_fn(params):
        start = 0 if callable(smoothness) else _given(smoothness, params)
        return AdaptiveMajorityVoteState(
            vote=voting.init(params),
            learning_rate=jnp.zeros([], jnp.float32),
            smoothness=jnp.asarray(start, jnp.float32),
            scaled=() if scaled_tx is None else scaled_tx.init(params),
        )

    def update_fn(updates, state, params=None, *, value_fn=None, **extra_args):
        num_workers = _axis.size(axis_name, caller)
        if estimator != "exact" and num_workers == 1:
            raise ValueError(
                f"`{caller}(estimator={estimator!r})` has to run over at least 2 workers, got 1: it compares each with the "
                'others. Pass `estimator="exact", wire="psum"`, or split the batch over more workers.'
            )
        votes, voted = voting.update(updates, state.vote, **extra_args)
        if callable(smoothness):
            known = Measuring(updates, params, value_fn, state.vote.count, state.smoothness)
            own = jnp.asarray(smoothness(known), jnp.float32)
            total = _float.sum_in_order(_axis.gather_scalar(own, axis_name)) / num_workers
        else:
            total = jnp.asarray(_given(smoothness, updates), jnp.float32)
        # Those who are present stand in for those who are not.
        seen = voted.report.progress
        progress = seen.share * (num_workers / jnp.maximum(seen.present, 1))
        rate = jnp.where(total > 0, jnp.maximum(progress, 0) / jnp.where(total > 0, total, 1), 0)
        new_scaled = state.scaled
        if scaled_tx is not None:
            votes, new_scaled = scaled_tx.update(votes, state.scaled, params, **extra_args)
        votes = jax.tree.map(lambda v: (rate * v.astype(jnp.float32)).astype(v.dtype), votes)
        return votes, AdaptiveMajorityVoteState(voted, rate, total, new_scaled)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def measured_smoothness(key: jax.Array, *, refresh_every: int = 100) -> Callable[[Measuring], jax.Array]:
    r"""Measure :math:`\|L\|_1` on the way: pass it as `smoothness` to `mh_signsgd` or `adaptive_majority_vote`.

    The larger of the sum of the magnitudes of the Hessian's diagonal, and the curvature along the signs of this worker's
    updates. The diagonal alone is too small unless the Hessian is near diagonal: along a gradient's signs a network curves
    up to 45 times as much (`python -m experiments adaptive`).

    Args:
      key: A random key for the probes, the same on every worker.
      refresh_every: The number of steps between two measurements.

    Returns:
      A function of `Measuring`, which needs `value_fn` and `params` in `update`.

    Raises:
      ValueError: If `refresh_every` is not positive; in `update`, if `value_fn` or `params` is missing.

    Examples:
      >>> import jax, jax.numpy as jnp, signopt
      >>> measure = signopt.measured_smoothness(jax.random.key(0))
      >>> point = jnp.array([1.0, 2.0])
      >>> loss = lambda x: jnp.sum(jnp.array([1.0, 3.0]) * x**2) / 2
      >>> zero = jnp.int32(0)
      >>> float(measure(signopt.step_size.Measuring(point, point, loss, zero, jnp.float32(0))))
      4.0
    """
    _check.count(refresh_every, "measured_smoothness", "refresh_every")

    def smoothness(known):
        for name, found in (("value_fn", known.value_fn), ("params", known.params)):
            if found is None:
                raise ValueError(
                    f"`measured_smoothness(...)` needs `update({name}=...)`, got None. Pass `params` and this worker's loss as "
                    "a function of them, `value_fn=lambda params: loss(params, batch)`."
                )
        axes = tuple(frozenset().union(*map(_axis.varying, jax.tree.leaves(known.updates))))

        def measure():
            own = _axis.to_varying(known.params, axes)
            diagonal = curvature.hessian_diagonal(known.value_fn, own, jax.random.fold_in(key, known.step))
            signs = jax.tree.map(lambda v, x: sign.sign(v).astype(x.dtype), known.updates, own)
            _, product = jax.jvp(jax.grad(known.value_fn), (own,), (signs,))
            along = jnp.asarray(optax.tree.vdot(signs, product), jnp.float32)
            sizes = [jnp.sum(jnp.abs(_float.widen(x))).astype(jnp.float32) for x in jax.tree.leaves(diagonal)]
            return _axis.to_varying(jnp.maximum(sum(sizes, jnp.float32(0)), along), axes)

        is_due = known.step % refresh_every == 0
        return lax.cond(is_due, measure, lambda: _axis.to_varying(known.previous, axes))

    return smoothness


def _given(smoothness: Any, params: Any) -> Any:
    if smoothness is None:
        return sum(jnp.size(x) if not hasattr(x, "shape") else int(np.prod(x.shape)) for x in jax.tree.leaves(params))
    return smoothness


# ---- the vote, and the estimate of the progress that it promises: the sum of |g| (1 - 2 P) ---------------------------


def _by_sum(estimator: str, report: bool) -> borders.Border:
    """Every worker learns the sum of the signs, and looks at all coordinates; then one number is averaged."""
    plain: Any = vote.by_sum(0.0, None, report)

    def observe(sums, updates, context):
        statistics = plain.observe(sums, updates, context) if report else ()
        here = jnp.ones([], jnp.float32) if context.present is None else jnp.asarray(context.present, jnp.float32)
        voters = jnp.float32(context.num_workers)
        if context.present is not None:
            voters = jnp.maximum(_float.sum_in_order(_axis.gather_scalar(here, context.axis_name)), 1)

        def share(x, s):
            size, s = _magnitude(x), s.astype(jnp.float32)
            if estimator == "margin":
                return jnp.sum(size * jnp.maximum(s * s - voters, 0)) / jnp.maximum(voters * (voters - 1), 1)
            with_sign = (
                sign.vote(x).astype(jnp.float32) * s
            )  # how many more voters, itself included, side with this worker
            if estimator == "exact":
                return jnp.sum(size * with_sign) / voters
            return jnp.sum(size * (with_sign - 1)) / jnp.maximum(voters - 1, 1)

        shares = map(share, jax.tree.leaves(updates), jax.tree.leaves(sums.signs))
        everybody = _axis.gather_scalar(sum(shares, jnp.float32(0)) * here, context.axis_name)
        # The mean over those present, as if all were.
        progress = Progress(_float.sum_in_order(everybody) / voters, jnp.float32(context.num_workers))
        return Seen(progress, statistics)

    return plain._replace(observe=observe)


def _by_count(wire: str, report: bool) -> borders.Border:
    """The server of a row learns the margins there, and looks at its own magnitudes there; the shares are added up."""
    packed: Any = vote.by_bits(wire, 0.0, None, report)

    def keep(updates, context):
        present = jnp.ones([], jnp.float32) if context.present is None else jnp.asarray(context.present, jnp.float32)
        return _flat.joined(updates), _axis.to_varying(present, context.axis_name)

    def decide(ballots, memory, context):
        counts = lax.optimization_barrier(_bits.count(ballots.signs))  # which is read twice, written down once
        words = vote.decision(counts, wire, context.num_workers, jnp.int32(1), context.step)
        pieces, present = context.extra["kept"]
        share = _progress_where_served(pieces, counts, wire, context.num_workers, context.worker)
        counted = vote.count(ballots.signs, counts, wire) if report else ()
        return (words, ()), memory, (Progress(share * present, present), counted)

    def observe(reports, updates, context):
        progress, counted = reports
        return Seen(progress, packed.observe(counted, updates, context) if report else ())

    return packed._replace(decide=decide, keep=keep, observe=observe)


def _progress_where_served(
    pieces: list[jax.Array], counts: list[UInt8[Array, " row"]], wire: str, num_workers: int, row: Int[Array, ""]
) -> Float[Array, ""]:
    """The margin estimate's sum over a row, given the pieces of the flat vector and the row's counts.

    The row is a traced number, so the program is the same for every server. Of each piece at most a row's worth is read, and
    nothing of one that does not reach into the row. Places are counted in words.
    """
    chunk, start = counts[0].size, 0
    total = _axis.to_varying(jnp.float32(0), tuple(_axis.varying(counts[0])))
    # The count of a vote whose margin promises nothing.
    balance = num_workers if wire == "two_bit" else num_workers // 2
    for piece in pieces:
        words = -(-piece.size // _bits.tile()) * _bits.lanes()
        length = min(words, chunk)
        begin = row * chunk - start  # of the row, in this piece
        first = jnp.clip(begin, 0, words - length)

        def share(piece=piece, words=words, length=length, begin=begin, first=first):
            padded = piece if piece.size == 8 * words else jnp.pad(piece, (0, 8 * words - piece.size))
            if padded.size <= np.iinfo(np.int32).max:
                values = lax.dynamic_slice(padded, (8 * first,), (8 * length,))
            else:
                values = lax.dynamic_slice_in_dim(padded.reshape(words, 8), first, length).reshape(-1)
            place = first - begin  # of what is read, in the row; what it has not is filled up with balanced votes
            fills = [np.uint8(0xFF * (balance >> i & 1)) for i in range(len(counts))]
            planes = [
                lax.dynamic_slice(jnp.pad(plane, (length, length), constant_values=fill), (place + length,), (length,))
                for plane, fill in zip(counts, fills, strict=True)
            ]
            bits = (_bits.unpack(plane).astype(jnp.int32) << i for i, plane in enumerate(planes))
            count = functools.reduce(operator.add, bits)
            sums = (count if wire == "two_bit" else 2 * count) - num_workers
            # In integers until it is cut off, which a CPU does four times faster: floats have to look out for NaN.
            return jnp.sum(_magnitude(values) * jnp.maximum(sums * sums - num_workers, 0).astype(jnp.float32))

        reaches = (begin < words) & (begin + chunk > 0)
        zero = _axis.to_varying(jnp.float32(0), tuple(_axis.varying(counts[0]) | _axis.varying(piece)))
        total += lax.cond(reaches, share, lambda zero=zero: zero)
        start += words
    return total / max(num_workers * (num_workers - 1), 1)


def _magnitude(x: jax.Array) -> Float[Array, "..."]:
    """|x| in float32, and 0 where it is not finite, by a test of bits as in `signopt.sign`."""
    size = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32) & np.uint32(0x7FFFFFFF)
    return lax.bitcast_convert_type(jnp.where(size < np.uint32(0x7F800000), size, np.uint32(0)), jnp.float32)
