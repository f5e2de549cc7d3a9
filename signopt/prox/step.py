r"""Proximal steps whose updates are signs: SignProx, and a proximal step as the last link of any chain.

To minimize :math:`f(x) + r(x)`, SignProx steps along the signs of the prox-gradient mapping,

.. math::
  x_{t+1} = x_t - \delta_t \operatorname{sign}\big(x_t - \operatorname{prox}_{\tau r}(x_t - \tau g_t)\big),

one bit for each entry. `scale_by_prox_gradient` is this mapping. It is zero exactly where :math:`f + r` is stationary.

The proximal operator after a sign step, :math:`\operatorname{prox}_{\delta r}(x_t - \delta_t \operatorname{sign}(g_t))`,
is something else. A sign step has a fixed length, which no weaker penalty can balance. `prox_step` after a sign is this
second form. It is useful as decoupled weight decay is, but its fixed points are not those of :math:`f + r`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from signopt import _axis
from signopt import _check
from signopt import _float
from signopt import sign
from signopt.prox.penalty import Operator
from signopt.prox.penalty import Prox
from signopt.prox.penalty import Scalar
from signopt.prox.penalty import as_prox

_SMALLEST_STEP = 1e-30  # what a schedule that ends at zero is taken for


class ScaleByProxGradientState(NamedTuple):
    """How far the steps have led, for a step size that follows from it.

    Attributes:
      count: int32 scalar: the step that schedules and random draws are at. The same on every worker.
      travelled: float32 scalar: the sum of `reach` over all steps; 0 without it. The same on every worker.
      slopes: float32 scalar: the sum of the gradients' root mean squares; 0 without `reach`. Per worker.
    """

    count: jax.Array
    travelled: jax.Array
    slopes: jax.Array


def scale_by_prox_gradient(
    prox: Prox | Operator,
    step_size: optax.ScalarOrSchedule | None = None,
    *,
    reach: optax.ScalarOrSchedule | None = None,
    axis_name: _axis.AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Replace a gradient by the prox-gradient mapping, which is zero exactly where loss plus penalty is stationary.

    .. math::
      G_\tau(x) = \frac{x - \operatorname{prox}_{\tau r}(x - \tau g)}{\tau}
                = g + \frac{y - \operatorname{prox}_{\tau r}(y)}{\tau}, \qquad y = x - \tau g.

    It is computed in the second form, in float32 at least, from the residual that the operator itself gives. In the first
    form x cancels, and the gradient's last bits are lost, or all of them. Where the operator returns exactly zero the
    mapping is :math:`x / \tau`, so an entry that rests on zero abstains.

    Args:
      prox: A penalty of `signopt.prox`, or a function `prox(x, step_size) -> x`. A `sampled` one is drawn anew in every
        step. Under `optax.inject_hyperparams`, name it in `static_args`.
      step_size: :math:`\tau > 0`, a number or a schedule. Its unit is that of parameters squared over that of the loss.
        For a sum of convex functions of single entries the sign of the mapping does not depend on it.
      reach: Given instead of a step size, how far each entry moves in a step, in the units of parameters: the learning
        rate :math:`\delta` of a sign step. Then :math:`\tau_t = \sum_{s \le t} \delta_s / \sum_{s \le t}
        \operatorname{rms}(g_s)`, with which plain gradient steps would have led as far as the sign steps have.
      axis_name: The workers, if each shall draw for itself from a `sampled` penalty.

    Returns:
      A transformation that needs `params` in `update`. Updates come back in their own dtypes. An entry that was not
      finite stays so, and casts no vote.

    Raises:
      ValueError: If not exactly one of `step_size` and `reach` is given, or it is not positive; in `update`, if `params`
        is missing or `prox` changes a shape.
      TypeError: If `prox` is no function; in `update`, if a leaf is not of a floating-point dtype or `prox` changes one.

    Examples:
      >>> import jax.numpy as jnp, signopt
      >>> tx = signopt.scale_by_prox_gradient(signopt.prox.l1(0.5), 1.0)
      >>> params, grads = jnp.array([2.0, 0.0, 0.0]), jnp.array([0.25, 0.25, -1.0])
      >>> tx.update(grads, tx.init(params), params)[0].tolist()
      [0.75, 0.0, -0.5]

    References:
      Xu and Kamilov, *SignProx: One-bit proximal algorithm for nonconvex stochastic optimization*, ICASSP 2019. They
      write the first form.
    """
    caller = "scale_by_prox_gradient"
    prox = as_prox(prox, caller)
    if (step_size is None) == (reach is None):
        raise ValueError(
            f"`{caller}(step_size=...)` has to be given, or `reach` instead, got step_size={step_size} and reach={reach}. "
            "If in doubt, pass the learning rate as `reach`."
        )
    name, length = ("step_size", step_size) if reach is None else ("reach", reach)
    if not callable(length):
        _check.positive(length, caller, name)

    def init_fn(params):
        del params
        return ScaleByProxGradientState(
            jnp.zeros([], jnp.int32), jnp.zeros([], jnp.float32), jnp.zeros([], jnp.float32)
        )

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        params = _check.params(params, caller, "a penalty depends on the parameters")
        sign.require_floating(updates, caller)
        tau = jnp.asarray(length(state.count) if callable(length) else length, jnp.float32)
        grads = jax.tree.map(lambda x, g: _float.widen(g).astype(_float.wide_dtype(x, g)), params, updates)
        finite = jax.tree.map(lambda g: jnp.where(jnp.isfinite(g), g, 0), grads)
        travelled, slopes = state.travelled, state.slopes
        if reach is not None:
            travelled, slopes = travelled + tau, slopes + _float.rms(finite)
            tau = travelled / jnp.where(slopes > 0, slopes, 1)
        tau = jnp.maximum(tau, _SMALLEST_STEP)
        drawn = prox.draw(state.count, _axis.index(axis_name)) if prox.random else prox
        # Where entries hang together, one that is not finite shall cost its own vote only.
        taken = grads if prox.separable else finite
        arrived = jax.tree.map(lambda x, g: x.astype(g.dtype) - tau.astype(g.dtype) * g, _as_arrays(params), taken)
        landed = drawn(arrived, tau)
        is_exact = drawn.own_residual is not None
        removed = drawn.residual(arrived, tau) if is_exact else jax.tree.map(jnp.subtract, arrived, landed)

        def mapping(raw, g, x, y, p, residual):
            x, per_tau = x.astype(g.dtype), 1 / tau.astype(g.dtype)
            out = g + residual * per_tau
            if not is_exact:  # the difference of y and p is rounding error if p is where x was
                out = jnp.where((p == x) & (y != x), 0, out)
            out = jnp.where(p == 0, x * per_tau, out)
            if not prox.separable:
                residual = jnp.where(jnp.isfinite(raw), residual, 0)
            return jnp.where(residual == 0, raw, _keep_sign(out, jnp.isfinite(raw) & jnp.isfinite(x), raw.dtype))

        mapped = jax.tree.map(mapping, _as_arrays(updates), taken, _as_arrays(params), arrived, landed, removed)
        return mapped, ScaleByProxGradientState(jnp.asarray(optax.safe_increment(state.count)), travelled, slopes)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class ProxStepState(NamedTuple):
    """How many proximal steps were taken.

    Attributes:
      count: int32 scalar: the step that schedules and random draws are at. Shared.
    """

    count: jax.Array


def prox_step(prox: Prox | Operator, learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformationExtraArgs:
    r"""Let parameters land on a proximal step: the last link of a chain.

    .. math::
      u \;\mapsto\; \operatorname{prox}_{\alpha_t r}(x + u) - x

    After `optax.sgd` this is the proximal gradient method. After a sign or Adam the penalty is decoupled, as AdamW's decay
    is. Its zeros are exact, but its fixed points are not those of loss plus penalty: `scale_by_prox_gradient` has those.

    Args:
      prox: A penalty of `signopt.prox`, or a function `prox(x, step_size) -> x`. Under `optax.inject_hyperparams`, name
        it in `static_args`.
      learning_rate: :math:`\alpha \ge 0`, the step size of the operator, a number or a schedule: that of the chain.

    Returns:
      A transformation that needs `params` in `update`. Updates come back in their own dtypes. `optax.apply_updates`
      lands on the zeros of the operator exactly, in every dtype, and elsewhere within one rounding error of the larger
      of the old and the new value.

    Raises:
      ValueError: If `learning_rate` is negative; in `update`, if `params` is missing or `prox` changes a shape.
      TypeError: If `prox` is no function; in `update`, if a leaf is not of a floating-point dtype or `prox` changes one.

    Examples:
      >>> import jax.numpy as jnp, optax, signopt
      >>> tx = optax.chain(optax.sgd(0.5), signopt.prox_step(signopt.prox.l1(1.0), 0.5))
      >>> params, grads = jnp.array([2.0, 0.75]), jnp.array([1.0, 0.5])
      >>> updates, _ = tx.update(grads, tx.init(params), params)
      >>> optax.apply_updates(params, updates).tolist()
      [1.0, 0.0]
    """
    caller = "prox_step"
    prox = as_prox(prox, caller)
    _check.learning_rate(learning_rate, caller)

    def init_fn(params):
        del params
        return ProxStepState(jnp.zeros([], jnp.int32))

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        params = _check.params(params, caller, "a penalty depends on the parameters")
        sign.require_floating(updates, caller)
        rate = jnp.asarray(learning_rate(state.count) if callable(learning_rate) else learning_rate)

        def arrive(x, u):
            dtype = _float.wide_dtype(x, u)
            return jnp.asarray(x).astype(dtype) + jnp.asarray(u).astype(dtype)

        landed = prox.draw(state.count)(jax.tree.map(arrive, params, updates), rate)

        def land(x, u, target):
            held = target.astype(jnp.result_type(x))  # first: what the parameter can hold, then how to get there
            dtype = _float.wide_dtype(x)
            return (held.astype(dtype) - jnp.asarray(x).astype(dtype)).astype(jnp.result_type(u))

        moves = jax.tree.map(land, params, updates, landed)
        return moves, ProxStepState(jnp.asarray(optax.safe_increment(state.count)))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def polish(params: Any, prox: Prox | Operator, step_size: Scalar, *, gradient: Any = None) -> Any:
    r"""Finish parameters with one last proximal step.

    .. math::
      \operatorname{prox}_{\tau r}(x - \tau g)

    Iterates of SignProx hover within one learning rate of zero and are never exactly on it. This puts them there.

    Args:
      params: Parameters.
      prox: The penalty they were trained with.
      step_size: :math:`\tau > 0`. Entries of an l1 penalty closer to zero than about :math:`\tau\lambda` are dropped, so
        take a few times the last learning rate over the strength, or with a gradient, one over the curvature.
      gradient: :math:`g`, the gradient of the loss at `params`, if it can be had without noise. With it a minimiser
        stays where it is; without it the entries that remain are shrunk once more by the penalty.

    Returns:
      Parameters of the same shapes and dtypes.

    Raises:
      ValueError: If `step_size` is not positive.

    Examples:
      >>> import jax.numpy as jnp, signopt
      >>> signopt.prox.polish(jnp.array([0.75, 1e-3]), signopt.prox.l1(0.25), 1.0).tolist()
      [0.5, 0.0]
      >>> slope = jnp.array([-0.25, 0.125])
      >>> signopt.prox.polish(jnp.array([0.75, 1e-3]), signopt.prox.l1(0.25), 1.0, gradient=slope).tolist()
      [0.75, 0.0]
    """
    _check.positive(step_size, "polish", "step_size")
    wide = jax.tree.map(_float.widen, params)
    if gradient is not None:

        def forward(x, g):
            return x - jnp.asarray(step_size, x.dtype) * jnp.asarray(g).astype(x.dtype)

        wide = jax.tree.map(forward, wide, gradient)
    landed = as_prox(prox, "polish")(wide, step_size)
    return jax.tree.map(lambda old, new: new.astype(jnp.result_type(old)), params, landed)


def _as_arrays(tree):
    return jax.tree.map(jnp.asarray, tree)


def _keep_sign(x, finite, dtype):
    """`x` in `dtype`; where `finite`, it does not become infinite on the way, nor zero: what is left of it is a vote."""
    info = jnp.finfo(dtype)
    size = jnp.abs(x)
    kept = jnp.minimum(size, info.max.astype(x.dtype))
    if info.minexp > jnp.finfo(x.dtype).minexp:
        kept = jnp.maximum(kept, info.tiny.astype(x.dtype))
    return jnp.where(finite & (x != 0), jnp.sign(x) * kept, x).astype(dtype)
