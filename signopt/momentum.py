"""Left of the border: from a worker's gradient to what it votes with."""

from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import optax

from signopt import _flat
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
      TypeError: In `update`, if a leaf is not of a floating-point dtype.

    Examples:
      >>> import jax.numpy as jnp, signopt
      >>> tx = signopt.scale_by_sign(threshold=1.0)
      >>> tx.update(jnp.array([3.0, -0.5, jnp.nan, -3.0]), tx.init(None))[0]
      Array([ 1.,  0.,  0., -1.], dtype=float32)

    References:
      Bernstein et al., `signSGD <https://arxiv.org/abs/1802.04434>`_, 2018: Algorithm 1 and, for abstention, section 6.
    """
    if not isinstance(threshold, jax.Array) and not threshold >= 0:
        raise ValueError(f"`scale_by_sign(threshold=...)` has to be at least 0, got {threshold}.")

    def update_fn(updates, params=None):
        del params
        sign.require_floating(updates, "scale_by_sign")
        if not isinstance(threshold, jax.Array) and threshold == 0:
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
      ValueError: If `beta` is outside [0, 1) or `warmup_steps` is negative.
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
    check_beta(beta, "scale_by_signum")
    if not isinstance(warmup_steps, jax.Array) and warmup_steps < 0:
        raise ValueError(f"`scale_by_signum(warmup_steps=...)` has to be at least 0, got {warmup_steps}.")
    ema = optax.ema(beta, debias=False, accumulator_dtype=accumulator_dtype)
    never_warms_up = not isinstance(warmup_steps, jax.Array) and warmup_steps == 0

    def update_fn(updates, state, params=None):
        voted, new_state = ema.update(updates, state, params)
        if nesterov:
            voted = optax.tree.update_moment(updates, voted, beta, 1)
        if not never_warms_up:
            voted = jax.tree.map(lambda g, m: jnp.where(state.count < warmup_steps, g, m), updates, voted)
        return jax.tree.map(lambda g, m: sign.sign(m).astype(g.dtype), updates, voted), new_state

    return finite_only(optax.GradientTransformation(ema.init, update_fn), caller="scale_by_signum")


def average_to_vote(
    beta: float | jax.Array, accumulator_dtype: Any, *, caller: str
) -> optax.GradientTransformationExtraArgs:
    """`scale_by_signum` for one who takes signs anyway: the average itself, where it has the dtype of the gradient.

    A sign of its own would be a kernel to compile for every leaf.
    """
    ema = optax.ema(beta, debias=False, accumulator_dtype=accumulator_dtype)

    def update_fn(updates, state, params=None):
        average, new_state = ema.update(updates, state, params)

        def itself_or_sign(gradient, m):
            return m if m.dtype == gradient.dtype else sign.sign(m).astype(gradient.dtype)

        return jax.tree.map(itself_or_sign, updates, average), new_state

    return finite_only(optax.GradientTransformation(ema.init, update_fn), caller=caller)


def check_beta(beta: float | jax.Array, caller: str) -> None:
    """Raise a `ValueError` if a decay rate is outside [0, 1)."""
    if not isinstance(beta, jax.Array) and not 0 <= beta < 1:
        raise ValueError(f"`{caller}(beta=...)` has to be in [0, 1), got {beta}.")


class FiniteOnlyState(NamedTuple):
    """A state that only finite values have reached.

    Attributes:
      inner_state: The state of the wrapped transformation. Per worker.
      total_notfinite: int32 scalar: the steps in which an entry of the updates was not finite. Per worker.
    """

    inner_state: optax.OptState
    total_notfinite: jax.Array


def finite_only(
    inner: optax.GradientTransformation, *, caller: str = "finite_only"
) -> optax.GradientTransformationExtraArgs:
    """Keep NaN and inf out of `inner`: such an entry counts as 0 before `inner` sees it.

    Unlike `optax.apply_if_finite`, which skips the step of a whole tree and may not be wrapped around a vote, this acts
    entry by entry: one bad number costs one vote. An entry that overflows inside the state of `inner` (a gradient of
    1e5 in a float16 average) leaves that entry of the state as it was.

    Args:
      inner: A transformation without communication.
      caller: The call to name in an error.

    Returns:
      A transformation with a `FiniteOnlyState`.

    Raises:
      TypeError: In `update`, if a leaf is not of a floating-point dtype.
    """
    inner = optax.with_extra_args_support(inner)

    def init_fn(params):
        return FiniteOnlyState(inner.init(params), jnp.zeros([], jnp.int32))

    def update_fn(updates, state, params=None, **extra_args):
        sign.require_floating(updates, caller)
        good = jnp.array([_all_finite(flat) for flat in _flat.joined(updates)], bool)
        total = jnp.where(jnp.all(good), state.total_notfinite, optax.safe_increment(state.total_notfinite))
        updates = jax.tree.map(lambda x: _if_finite(x, lax.full_like(x, 0)), updates)
        updates, new_inner = inner.update(updates, state.inner_state, params, **extra_args)
        new_inner = jax.tree.map(_if_finite, new_inner, state.inner_state)
        return updates, FiniteOnlyState(new_inner, total)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _all_finite(x: jax.Array) -> jax.Array:
    """Of 8-bit integers: XLA on CPUs reduces booleans in a tree of kernels, which takes several times as long."""
    return jnp.min(lax.is_finite(x).astype(jnp.int8)) == 1


def _if_finite(x: jax.Array, otherwise: jax.Array) -> jax.Array:
    """Each entry of `x`, or of `otherwise` where it is not finite, in the dtype of `x`.

    By `lax`, because `jax.numpy` traces a function of its own for every shape, which hundreds of leaves would feel.
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    return lax.select(lax.is_finite(x), x, otherwise.astype(x.dtype))


def _is_sure(x: jax.Array, threshold: float | jax.Array) -> jax.Array:
    """Whether each entry exceeds `threshold` times the root mean square of the finite ones, in at least float32."""
    wide = jnp.abs(x).astype(jnp.promote_types(x.dtype, jnp.float32))
    finite = jnp.isfinite(wide)
    largest = jnp.max(wide, initial=0, where=finite)
    unit = jnp.where(largest > 0, largest, 1)  # so that squares neither overflow nor vanish
    mean_square = jnp.sum(jnp.where(finite, wide / unit, 0) ** 2) / jnp.maximum(jnp.sum(finite), 1)
    return (wide > threshold * unit * jnp.sqrt(mean_square)) | (threshold == 0)
