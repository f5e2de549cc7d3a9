"""Left of the border: from a worker's gradient to what it votes with."""

import functools
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import optax

from signopt import _axis
from signopt import _check
from signopt import _flat
from signopt import _float
from signopt import sign


def scale_by_sign(*, threshold: float | jax.Array = 0.0) -> optax.GradientTransformation:
    r"""Replace updates by their signs, and by 0 where they are small for their leaf.

    .. math::
      t_i = \operatorname{sign}(x_i) \cdot 1\big[\,|x_i| > \kappa \operatorname{rms}(x)\,\big]

    With :math:`\kappa > 0` a worker abstains where it is unsure. `optax.scale_by_sign` with a rule for zeros, NaN and inf
    (`signopt.sign`) and with abstention.

    Args:
      threshold: :math:`\kappa \ge 0`, in units of the root mean square of the finite entries of a leaf.

    Returns:
      A transformation without state. Updates come back as -1, 0 and +1 in their own dtypes.

    Raises:
      ValueError: If `threshold` is negative.
      TypeError: If `threshold` is no number; in `update`, if a leaf is not of a floating-point dtype.

    Examples:
      >>> import jax.numpy as jnp, signopt
      >>> tx = signopt.scale_by_sign(threshold=1.0)
      >>> tx.update(jnp.array([3.0, -0.5, jnp.nan, -3.0]), tx.init(None))[0]
      Array([ 1.,  0.,  0., -1.], dtype=float32)

    References:
      Bernstein et al., `signSGD <https://arxiv.org/abs/1802.04434>`_, 2018: Algorithm 1 and, for abstention, section 6.
    """
    _check.at_least(0, threshold, "scale_by_sign", "threshold")

    def update_fn(updates, params=None):
        del params
        sign.require_floating(updates, "scale_by_sign")
        if _check.is_zero(threshold):
            return jax.tree.map(sign.sign, updates)
        return jax.tree.map(lambda x: jnp.where(_is_sure(x, threshold), sign.sign(x), 0), updates)

    return optax.stateless(update_fn)


def scale_by_signum(
    beta: float | jax.Array = 0.9,
    *,
    warmup_steps: int | jax.Array = 0,
    nesterov: bool = False,
    accumulator_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Replace updates by the sign of their exponential moving average.

    .. math::
      m_{t+1} = \beta m_t + (1 - \beta) g_t, \qquad u_t = \operatorname{sign}(m_{t+1}),

    without the learning rate of `optax.signum`, so that a vote can come in between. An entry of the gradient that is not
    finite counts as 0: the worker votes with what it remembers.

    Args:
      beta: Decay rate in [0, 1).
      warmup_steps: For so many steps use the sign of the gradient while the average warms up, as Theorem 3 asks;
        `signopt.theory.warmup_steps(beta)` is the number.
      nesterov: Use :math:`\beta m_{t+1} + (1 - \beta) g_t` instead of :math:`m_{t+1}`.
      accumulator_dtype: Dtype of the average; that of the parameters if None.

    Returns:
      A transformation whose state is a `FiniteOnlyState` around `optax.EmaState`. Per worker. Updates come back as -1, 0
      and +1 in their own dtypes.

    Raises:
      ValueError: If `beta` is outside [0, 1) or `warmup_steps` is negative; in `update`, as `finite_only` does.
      TypeError: In `update`, if a leaf is not of a floating-point dtype.

    Examples:
      >>> import jax.numpy as jnp, signopt
      >>> tx = signopt.scale_by_signum(beta=0.5)
      >>> state = tx.init(jnp.zeros(2))
      >>> updates, state = tx.update(jnp.array([4.0, -1.0]), state)
      >>> updates, state = tx.update(jnp.array([-1.0, jnp.nan]), state)
      >>> updates.tolist(), state.inner_state.ema.tolist(), int(state.total_notfinite)
      ([1.0, -1.0], [0.5, -0.25], 1)

    References:
      Algorithm 2 and Theorem 3 of Bernstein et al., `signSGD <https://arxiv.org/abs/1802.04434>`_, 2018.
    """
    _check.decay(beta, "scale_by_signum", "beta")
    _check.at_least(0, warmup_steps, "scale_by_signum", "warmup_steps")
    average = average_of(beta, warmup_steps=warmup_steps, nesterov=nesterov, accumulator_dtype=accumulator_dtype)
    return count_notfinite(signs_of(average), "scale_by_signum")


def signs_of(average: optax.GradientTransformation) -> optax.GradientTransformation:
    """The signs of what a transformation returns, in the dtypes of the updates: a sign survives every dtype."""

    def update_fn(updates, state, params=None):
        found, state = average.update(updates, state, params)
        return jax.tree.map(lambda g, m: sign.sign(m).astype(jnp.result_type(g)), updates, found), state

    return optax.GradientTransformation(average.init, update_fn)


def average_of(
    beta: float | jax.Array,
    *,
    warmup_steps: int | jax.Array = 0,
    nesterov: bool = False,
    accumulator_dtype: Any = None,
) -> optax.GradientTransformation:
    """What `scale_by_signum` takes the signs of; without extras `optax.ema`, whose state it has."""
    ema = optax.ema(beta, debias=False, accumulator_dtype=accumulator_dtype)

    def update_fn(updates, state, params=None):
        voted, new_state = ema.update(updates, state, params)
        if nesterov:
            voted = optax.tree.update_moment(updates, voted, beta, 1)
        if not _check.is_zero(warmup_steps):
            until = jnp.asarray(warmup_steps)
            is_warm = state.count.astype(until.dtype) >= until
            voted = jax.tree.map(lambda g, m: jnp.where(is_warm, m, jnp.asarray(g).astype(m.dtype)), updates, voted)
        return voted, new_state

    return optax.GradientTransformation(ema.init, update_fn)


class FiniteOnlyState(NamedTuple):
    """A state that only finite values have reached.

    Attributes:
      inner_state: The state of the wrapped transformation. Per worker.
      total_notfinite: int32 scalar: the steps in which an entry of the updates was not finite. Per worker.
    """

    inner_state: optax.OptState
    total_notfinite: jax.Array


def finite_only(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Keep NaN and inf out of `inner`: such an entry counts as 0 before `inner` sees it.

    Unlike `optax.apply_if_finite`, which skips the step of a whole tree and may not be wrapped around a vote, this acts
    entry by entry: one bad number costs one vote. An entry that overflows inside the state of `inner` (a gradient of
    1e5 in a float16 average) leaves that entry of the state as it was. It belongs outermost on the worker, around
    whatever has a norm: `per_worker(finite_only(optax.chain(...)), num_workers)`.

    Args:
      inner: A transformation without communication.

    Returns:
      A transformation with a `FiniteOnlyState`.

    Raises:
      ValueError: In `update`, if types show that the state is the same on every worker and the updates are not.
      TypeError: In `update`, if a leaf is not of a floating-point dtype.

    Examples:
      >>> import jax.numpy as jnp, optax, signopt
      >>> tx = signopt.finite_only(optax.trace(0.5))
      >>> state = tx.init(jnp.zeros(2))
      >>> for gradient in ([4.0, jnp.nan], [jnp.inf, 1.0]):
      ...     updates, state = tx.update(jnp.array(gradient), state)
      >>> updates.tolist(), int(state.total_notfinite)
      ([2.0, 1.0], 2)
    """
    return count_notfinite(inner, "finite_only")


def count_notfinite(inner: optax.GradientTransformation, caller: str) -> optax.GradientTransformationExtraArgs:
    """`finite_only`, with the call to name in an error."""
    inner = keep_finite(inner, caller)

    def init_fn(params):
        return FiniteOnlyState(inner.init(params), jnp.zeros([], jnp.int32))

    def update_fn(updates, state, params=None, **extra_args):
        sign.require_floating(updates, caller)
        total = jnp.where(_all_finite(updates), state.total_notfinite, optax.safe_increment(state.total_notfinite))
        updates, new_inner = inner.update(updates, state.inner_state, params, **extra_args)
        new_state = FiniteOnlyState(new_inner, total)
        _axis.require_own(state, new_state, caller)
        return updates, new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def keep_finite(
    inner: optax.GradientTransformation, caller: str, *, complex_too: bool = False
) -> optax.GradientTransformationExtraArgs:
    """`finite_only` that does not count, so that its state is that of `inner`."""
    inner = optax.with_extra_args_support(inner)

    def init_fn(params):
        # Zeros like a Python number are weakly typed, and what an update makes of them is not: that would compile twice.
        return jax.tree.map(lambda x: x.astype(x.dtype) if getattr(x, "weak_type", False) else x, inner.init(params))

    def update_fn(updates, state, params=None, **extra_args):
        sign.require_floating(updates, caller, complex_too=complex_too)
        updates = _as_arrays(updates)
        updates = jax.tree.map(lambda x: _if_finite(x, lax.full_like(x, 0)), updates)
        updates, new_state = inner.update(updates, state, params, **extra_args)
        _axis.require_own(state, new_state, caller)
        return updates, jax.tree.map(_if_finite, new_state, state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _all_finite(tree: Any) -> jax.Array:
    """Whether all entries of a tree are.

    Leaf by leaf where other axes may shard them: joining would gather them. Elsewhere small ones are joined, since a
    reduction of its own takes longer to compile than the rest of a leaf's update. Of 8-bit integers: XLA on CPUs reduces
    booleans in a tree of kernels, which takes several times as long.
    """
    tree = _as_arrays(tree)
    leaves = jax.tree.leaves(tree) if _axis.may_be_sharded() else _flat.joined(tree)
    one = jnp.ones([], jnp.int8)
    smallest = [lax.reduce(lax.is_finite(x).astype(jnp.int8), one, lax.min, range(x.ndim)) for x in leaves]
    return functools.reduce(lax.min, smallest, one) == 1


def _as_arrays(tree: Any) -> Any:
    """Python's and NumPy's numbers as arrays."""
    return jax.tree.map(lambda x: x if isinstance(x, jax.Array) else jnp.asarray(x), tree)


def _if_finite(x: jax.Array, otherwise: jax.Array) -> jax.Array:
    """Each entry of `x`, or of `otherwise` where it is not finite, in the dtype of `x`.

    By `lax`, because `jax.numpy` traces a function of its own for every shape, which hundreds of leaves would feel.
    """
    dtype = jnp.result_type(x)
    if not jnp.issubdtype(dtype, jnp.inexact):
        return x
    is_finite = jnp.isfinite if jnp.issubdtype(dtype, jnp.complexfloating) else lax.is_finite
    return lax.select(is_finite(x), x, jnp.asarray(otherwise).astype(dtype))


def _is_sure(x: jax.Array, threshold: float | jax.Array) -> jax.Array:
    """Whether each entry exceeds `threshold` times the root mean square of the finite ones, in at least float32."""
    wide = jnp.abs(_float.widen(x))
    finite = jnp.isfinite(wide)
    sizes = jnp.where(finite, wide, jnp.zeros_like(wide))
    entries = jnp.maximum(jnp.sum(finite, dtype=jnp.int32), 1).astype(wide.dtype)
    unit = _float.unit_of(jnp.max(sizes, initial=0))
    rms = unit * jnp.sqrt(jnp.sum((sizes / unit) ** 2) / entries)
    threshold = jnp.asarray(threshold).astype(wide.dtype)
    return (wide > threshold * rms) | (threshold == 0)
