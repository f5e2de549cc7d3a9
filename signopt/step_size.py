r"""A learning rate that a vote finds by itself.

A step of length :math:`\eta` along signs changes the loss, in expectation, by at most

.. math::
  \frac{\eta^2}{2} \|L\|_1 - \eta \sum_i |g_i| (1 - 2 P_i),

with :math:`P_i` the probability that a voter's sign is wrong, so the best step is :math:`\eta^* = \sum_i |g_i| (1 - 2 P_i)
/ \|L\|_1`: long where voters agree, short where they do not. Neither g nor P is known. How they are estimated decides what
has to travel.
"""

from collections.abc import Callable
import math
from typing import Any, Literal, NamedTuple, get_args

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt, UInt8
import numpy as np
import optax

from signopt import _axis
from signopt import _bits
from signopt import sign
from signopt import vote
from signopt import wire as wires
from signopt.diagnostics import curvature

Estimator = Literal["margin", "exact", "leave_one_out"]
Smoothness = float | jax.Array | Literal["dimension", "curvature"]


class AdaptiveMajorityVoteState(NamedTuple):
    """What a vote with a learning rate of its own keeps.

    Attributes:
      count: int32 scalar: how many votes were held. Shared.
      learning_rate: float32 scalar: what the last step was scaled by; 0 before the first. Shared.
      smoothness: float32 scalar: the :math:`\\|L\\|_1` it was found with. Shared.
      scaled: The state of the transformation that is scaled along with the votes. Shared.
    """

    count: jax.Array
    learning_rate: jax.Array
    smoothness: jax.Array
    scaled: optax.OptState


def adaptive_majority_vote(
    axis_name: _axis.AxisName,
    *,
    smoothness: Smoothness = "dimension",
    estimator: Estimator = "margin",
    wire: wires.Wire = "one_bit",
    scaled: optax.GradientTransformation | None = None,
    refresh_every: int = 100,
    key: jax.Array | None = None,
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
    *margin* needs one number per worker besides the one-bit vote: who serves coordinate i has counted the votes there, so
    it knows the margin, and uses its own :math:`|v_{m(i),i}|`. Its factor is an unbiased estimate of :math:`(1 - 2P_i)^2`
    where the formula has :math:`1 - 2 P_i`, so it takes shorter steps where voters disagree.

    Let the updates carry magnitudes: `optax.ema` to the left, not `scale_by_signum`.

    Args:
      axis_name: The workers, as in `majority_vote`: devices, or a vmapped axis over the samples or micro-batches of one
        batch (`signopt.workers.split_batch`).
      smoothness: :math:`\|L\|_1`, the sum over coordinates of how fast the gradient changes: a number; "dimension", the
        number of parameters, as in the paper; or "curvature", measured and averaged over workers: the larger of the sum
        of the magnitudes of the Hessian's diagonal and the curvature along the signs of this worker's updates. (Too small
        a number diverges, and the diagonal alone is too small unless the Hessian is near diagonal: along a
        gradient's signs a network curves up to 45 times as much; `experiments/estimators.py`.)
      estimator: "margin", "exact" or "leave_one_out".
      wire: What travels, as in `majority_vote`. Only "psum" gives every worker what "exact" and "leave_one_out" need.
      scaled: A transformation to apply to the votes before they are scaled: `optax.add_decayed_weights(0.1)` makes a step of
        :math:`\eta (\operatorname{sign}(s) + 0.1 x)`.
      refresh_every: With "curvature", the number of steps between two measurements.
      key: With "curvature", the random key of the measurements.

    Returns:
      A transformation with an `AdaptiveMajorityVoteState`, whose `learning_rate` is the same on every worker, bit for bit.
      Its `update` also takes `present`, as that of `majority_vote`, and with "curvature" it needs `params` and `value_fn`,
      this worker's loss as a function of the parameters. Updates come back in their own dtypes; `optax.scale(-1.0)` has to
      follow.

    Raises:
      ValueError: If an argument is not one of its choices, `smoothness` or `refresh_every` is not positive, the estimator
        needs another wire, or "curvature" comes without a key; in `update`, if the estimator needs more workers, the axis
        is not bound, or the updates are known to be the same on all workers.
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
    caller = "adaptive_majority_vote"
    wires.check_wire(wire, f"{caller}(wire=...)")
    if estimator not in get_args(Estimator):
        choices = ", ".join(map(repr, get_args(Estimator)))
        raise ValueError(f"`{caller}(estimator=...)` has to be one of {choices}, got {estimator!r}.")
    if estimator != "margin" and wire != "psum":
        raise ValueError(
            f'`{caller}(wire=...)` has to be "psum" with estimator={estimator!r}, which needs the sum of the votes on every '
            f'worker, got {wire!r}. Keep the wire with `estimator="margin"`.'
        )
    _check_smoothness(smoothness, refresh_every, key, caller)
    scaled_tx = optax.with_extra_args_support(optax.identity() if scaled is None else scaled)

    def init_fn(params):
        start = 0 if smoothness == "curvature" else _smoothness_of(smoothness, params)
        return AdaptiveMajorityVoteState(
            count=jnp.zeros([], jnp.int32),
            learning_rate=jnp.zeros([], jnp.float32),
            smoothness=jnp.asarray(start, jnp.float32),
            scaled=scaled_tx.init(params),
        )

    def update_fn(updates, state, params=None, *, present=None, value_fn=None, **extra_args):
        num_workers = _axis.size(axis_name, caller)
        if estimator != "exact" and num_workers == 1:
            raise ValueError(
                f"`{caller}(estimator={estimator!r})` has to run over at least 2 workers, got 1: it compares each with the "
                'others. Pass `estimator="exact", wire="psum"`, or split the batch over more workers.'
            )
        sign.require_floating(updates, caller)
        _axis.require_varying(updates, axis_name, caller)
        if smoothness == "curvature":
            total_smoothness = _measured(
                updates, state, params, value_fn, axis_name=axis_name, refresh_every=refresh_every, key=key
            )
        else:
            total_smoothness = jnp.asarray(_smoothness_of(smoothness, updates), jnp.float32)
        if wire == "psum":
            votes, progress = _by_sum(updates, axis_name, estimator, present)
        else:
            votes, progress = _by_count(updates, axis_name, wire, state.count, present)
        learning_rate = jnp.where(total_smoothness > 0, jnp.maximum(progress, 0) / total_smoothness, 0)
        votes, new_scaled = scaled_tx.update(votes, state.scaled, params, **extra_args)
        updates = jax.tree.map(lambda v: (learning_rate * v).astype(v.dtype), votes)
        return updates, AdaptiveMajorityVoteState(state.count + 1, learning_rate, total_smoothness, new_scaled)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


# ---- the vote, and the estimate of the progress that it promises: the sum of |g| (1 - 2 P) ---------------------------


def _by_sum(updates: Any, axis_name: _axis.AxisName, estimator: str, present: Any) -> tuple[Any, Float[Array, ""]]:
    """Where every worker learns the sum of the signs, it looks at all coordinates; then one number is averaged."""
    voters = _number_present(axis_name, present)
    sums = vote.sum_of_votes(updates, axis_name, present)
    votes = jax.tree.map(lambda s, x: jnp.sign(s).astype(x.dtype), sums, updates)

    def share(x, s):
        size, s = _magnitude(x), s.astype(jnp.int32)
        if estimator == "margin":
            return jnp.sum(size * _surplus(s, voters)) / _pairs(voters)
        with_sign = sign.vote(x) * s  # how many more voters, itself included, side with this worker than against it
        if estimator == "exact":
            return jnp.sum(size * with_sign) / jnp.maximum(voters, 1)
        return jnp.sum(size * (with_sign - 1)) / jnp.maximum(voters - 1, 1)

    own = jnp.asarray(sum(jax.tree.leaves(jax.tree.map(share, updates, sums))), jnp.float32)
    own = own if present is None else jnp.where(present, own, 0)
    return votes, jnp.sum(_axis.gather_scalar(own, axis_name)) / jnp.maximum(voters, 1)


def _by_count(
    updates: Any, axis_name: _axis.AxisName, wire: str, step: Int[Array, ""], present: Any
) -> tuple[Any, Float[Array, ""]]:
    """Where a worker learns the margins on the chunk that it serves, it looks at that; then one number is added up."""
    num_workers = _axis.size(axis_name, "adaptive_majority_vote")
    ballots = vote.cast(updates, wire, axis_name, step, present)
    counts = _bits.count(wires.deal(ballots, axis_name))
    decisions = vote.decide(counts, wire, num_workers, jnp.int32(1), step)
    own = _progress_where_served(updates, counts, wire, num_workers, axis_name)
    own = own if present is None else jnp.where(present, own, 0)
    decisions, shares = _collect(decisions, own, ballots.shape[-1], axis_name)
    progress = jnp.sum(shares)
    if present is not None:  # those who are here stand in for those who are not
        progress *= num_workers / jnp.maximum(_number_present(axis_name, present), 1)
    return wires.unpack(decisions, updates), progress


def _collect(
    decisions: UInt[Array, " chunk"], own: Float[Array, ""], num_words: int, axis_name: _axis.AxisName
) -> tuple[UInt[Array, " n"], Float[Array, " workers"]]:
    """`wires.collect`, with everybody's number in the same message: waiting for a second one would cost as much."""
    devices, vmapped = _axis.devices_and_vmapped(axis_name)
    shares = _axis.stack_vmapped(own, vmapped)
    if not devices:
        return decisions, shares
    words_per_number = 4 // decisions.dtype.itemsize
    message = jnp.concatenate([decisions, lax.bitcast_convert_type(shares, decisions.dtype).ravel()])
    found = _axis.join_devices(message, devices).reshape(-1, message.size)
    shares = found[:, decisions.size :].reshape(-1, words_per_number)
    return found[:, : decisions.size].ravel()[:num_words], lax.bitcast_convert_type(shares, jnp.float32)


def _surplus(sums: Int[Array, "..."], num_workers: Any) -> Float[Array, "..."]:
    """M (M - 1) times an unbiased estimate of (1 - 2 P)^2 from the sum of M signs, cut off at 0.

    In integers until it is cut off, which a CPU does four times faster: floats have to look out for NaN.
    """
    return jnp.maximum(sums * sums - num_workers, 0).astype(jnp.float32)


def _pairs(num_workers: Any) -> Float[Array, ""]:
    return jnp.maximum(jnp.asarray(num_workers, jnp.float32) * (num_workers - 1), 1)


def _progress_where_served(
    updates: Any, counts: list[UInt8[Array, " n"]], wire: str, num_workers: int, axis_name: _axis.AxisName
) -> Float[Array, ""]:
    """The margin estimate's sum over the coordinates that this worker serves.

    A device serves the chunk that it has counted. Vmapped workers on one device share its chunk out among themselves.
    """
    devices, vmapped = _axis.devices_and_vmapped(axis_name)
    chunk = counts[0].shape[0]

    def progress(values, counts):
        count = jnp.asarray(sum(_bits.unpack(plane).astype(jnp.int32) << i for i, plane in enumerate(counts)))
        sums = (count if wire == "two_bit" else 2 * count) - num_workers
        return jnp.sum(_magnitude(values) * _surplus(sums, num_workers)) / _pairs(num_workers)

    if vmapped:
        workers_here = math.prod(lax.axis_size(name) for name in vmapped)
        share = -(-chunk // workers_here)
        first = share * lax.axis_index(vmapped)
        pad = workers_here * share - chunk
        counts = [lax.dynamic_slice(jnp.pad(plane, (0, pad)), (first,), (share,)) for plane in counts]

        def own(values):
            return progress(lax.dynamic_slice(jnp.pad(values, (0, 8 * pad)), (8 * first,), (8 * share,)), counts)
    else:

        def own(values):
            return progress(values, counts)

    if not devices:
        return own(_slice_of_buffer(updates, 0, chunk))
    servers = range(math.prod(lax.axis_size(name) for name in devices))
    branches = [lambda server=server: own(_slice_of_buffer(updates, server * chunk, chunk)) for server in servers]
    return lax.switch(lax.axis_index(devices), branches)


def _slice_of_buffer(tree: Any, first: int, num_words: int) -> Float[Array, " 8*num_words"]:
    """The values whose signs lie in some words of the packed buffer; zeros where no value does."""
    leaves, last, filled, parts = jax.tree.leaves(tree), first + num_words, 8 * first, []
    for i, start in wires.layout(tree):
        size = leaves[i].size
        begin, end = max(0, 8 * (first - start)), min(size, 8 * (last - start))
        if begin < end:
            parts += [jnp.zeros(8 * start + begin - filled), leaves[i].ravel()[begin:end].astype(jnp.float32)]
            filled = 8 * start + end
    return jnp.concatenate([x for x in (*parts, jnp.zeros(8 * last - filled)) if x.size])


def _number_present(axis_name: _axis.AxisName, present: Any) -> Any:
    if present is None:
        return _axis.size(axis_name, "adaptive_majority_vote")
    return jnp.sum(_axis.gather_scalar(jnp.asarray(present).astype(jnp.int32), axis_name))


def _magnitude(x: jax.Array) -> Float[Array, "..."]:
    """|x| in float32, and 0 where it is not finite, by a test of bits as in `signopt.sign`."""
    size = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32) & np.uint32(0x7FFFFFFF)
    return lax.bitcast_convert_type(jnp.where(size < np.uint32(0x7F800000), size, np.uint32(0)), jnp.float32)


# ---- the smoothness --------------------------------------------------------------------------------------------------


def _check_smoothness(smoothness, refresh_every, key, caller):
    if isinstance(smoothness, str):
        if smoothness not in ("dimension", "curvature"):
            raise ValueError(
                f"`{caller}(smoothness=...)` has to be a positive number, 'dimension' or 'curvature', got {smoothness!r}."
            )
    elif not isinstance(smoothness, jax.Array) and not smoothness > 0:
        raise ValueError(
            f"`{caller}(smoothness=...)` has to be positive, got {smoothness}: it is the sum over coordinates of how fast "
            'the gradient changes. Pass "curvature" to have it measured.'
        )
    if refresh_every < 1:
        raise ValueError(f"`{caller}(refresh_every=...)` has to be at least 1, got {refresh_every}.")
    if isinstance(smoothness, str) and smoothness == "curvature" and key is None:
        raise ValueError(
            f'`{caller}(key=...)` has to be a random key with smoothness="curvature", got None. Pass `jax.random.key(0)`.'
        )


def _norm(tree: Any) -> Float[Array, ""]:
    """The sum of magnitudes."""
    return jnp.asarray(sum(jnp.sum(jnp.abs(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)), jnp.float32)


def _smoothness_of(smoothness: Any, params: Any) -> Any:
    if isinstance(smoothness, str):
        return sum(math.prod(x.shape) for x in jax.tree.leaves(params))
    return smoothness


def _measured(
    updates: Any,
    state: AdaptiveMajorityVoteState,
    params: Any,
    value_fn: Callable | None,
    *,
    axis_name: _axis.AxisName,
    refresh_every: int,
    key: Any,
) -> Float[Array, ""]:
    """The measured smoothness: a new one every `refresh_every` steps, the same probes on every worker."""
    if value_fn is None or params is None:
        missing = "value_fn" if value_fn is None else "params"
        raise ValueError(
            f'`adaptive_majority_vote(smoothness="curvature").update({missing}=...)` has to be given, got None. Pass '
            "`params` and this worker's loss as a function of them, `value_fn=lambda params: loss(params, batch)`."
        )
    is_due = state.count % refresh_every == 0

    def measure():
        own = _axis.to_varying(params, axis_name)
        diagonal = curvature.hessian_diagonal(value_fn, own, jax.random.fold_in(key, state.count))
        signs = jax.tree.map(lambda v, x: sign.sign(v).astype(x.dtype), updates, own)
        _, product = jax.jvp(jax.grad(value_fn), (own,), (signs,))
        along = optax.tree.vdot(signs, product)
        return jnp.maximum(_norm(diagonal), jnp.asarray(along, jnp.float32))

    own = lax.cond(is_due, measure, lambda: _axis.to_varying(jnp.float32(0), axis_name))
    found = jnp.mean(_axis.gather_scalar(own, axis_name))
    return jnp.where(is_due, found, state.smoothness)
