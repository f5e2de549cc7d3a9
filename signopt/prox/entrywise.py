"""Penalties that are sums over single entries."""

import jax
from jax.core import Tracer
import jax.numpy as jnp
import numpy as np

from signopt import _check
from signopt import _float
from signopt.prox.penalty import Prox
from signopt.prox.penalty import Scalar
from signopt.prox.penalty import per_leaf
from signopt.prox.penalty import total


def zero() -> Prox:
    r"""No penalty at all.

    .. math::
      \operatorname*{argmin}_x \tfrac{1}{2\tau} \|x - y\|_2^2 = y
    """
    nothing = lambda y, t: jnp.zeros_like(y)  # noqa: E731
    return per_leaf(lambda y, t: y, lambda x: jnp.sum(jnp.zeros_like(x)), nothing, separable=True)


def l1(strength: Scalar, *, non_negative: bool = False) -> Prox:
    r"""The l1 norm, which makes entries exactly zero.

    .. math::
      \operatorname*{argmin}_x \tfrac{1}{2\tau} \|x - y\|_2^2 + \lambda \|x\|_1
      = \operatorname{sign}(y) \max(|y| - \tau \lambda, 0)

    Args:
      strength: :math:`\lambda \ge 0`.
      non_negative: Minimize over :math:`x \ge 0` only; then it is :math:`\max(y - \tau \lambda, 0)`.

    Raises:
      ValueError: If `strength` is negative.

    Examples:
      >>> import jax.numpy as jnp, signopt
      >>> prox = signopt.prox.l1(2.0)
      >>> prox(jnp.array([3.0, -1.5, 0.5]), 0.5).tolist(), float(prox.value(jnp.array([3.0, -1.5])))
      ([2.0, -0.5, 0.0], 9.0)
    """
    _check.at_least(0, strength, "l1", "strength")
    if non_negative:
        return per_leaf(
            lambda y, t, s: jnp.maximum(y - t * s, 0),
            lambda x, s: jnp.sum(jnp.where(x < 0, jnp.inf, s * x)),
            lambda y, t, s: jnp.minimum(y, t * s),
            strengths=(strength,),
            separable=True,
        )
    return per_leaf(
        lambda y, t, s: _soft_threshold(y, t * s),
        lambda x, s: jnp.sum(s * jnp.abs(x)),
        lambda y, t, s: jnp.clip(y, -(t * s), t * s),
        strengths=(strength,),
        separable=True,
    )


def l2_squared(strength: Scalar) -> Prox:
    r"""Half the squared l2 norm: weight decay.

    .. math::
      \operatorname*{argmin}_x \tfrac{1}{2\tau} \|x - y\|_2^2 + \tfrac{\lambda}{2} \|x\|_2^2
      = \frac{y}{1 + \tau \lambda}

    Args:
      strength: :math:`\lambda \ge 0`.

    Raises:
      ValueError: If `strength` is negative.

    Examples:
      >>> import jax.numpy as jnp, signopt
      >>> signopt.prox.l2_squared(2.0)(jnp.array([3.0, -1.0]), 0.5).tolist()
      [1.5, -0.5]
    """
    _check.at_least(0, strength, "l2_squared", "strength")
    return _elastic_net(0.0, strength)


def elastic_net(l1_strength: Scalar, l2_strength: Scalar) -> Prox:
    r"""The l1 norm and half the squared l2 norm.

    .. math::
      \operatorname*{argmin}_x \tfrac{1}{2\tau} \|x - y\|_2^2 + \lambda_1 \|x\|_1 + \tfrac{\lambda_2}{2} \|x\|_2^2
      = \frac{\operatorname{sign}(y) \max(|y| - \tau \lambda_1, 0)}{1 + \tau \lambda_2}

    Args:
      l1_strength: :math:`\lambda_1 \ge 0`.
      l2_strength: :math:`\lambda_2 \ge 0`.

    Raises:
      ValueError: If a strength is negative.

    Examples:
      >>> import jax.numpy as jnp, signopt
      >>> signopt.prox.elastic_net(2.0, 2.0)(jnp.array([3.0, -1.5, 0.5]), 0.5).tolist()
      [1.0, -0.25, 0.0]
    """
    _check.at_least(0, l1_strength, "elastic_net", "l1_strength")
    _check.at_least(0, l2_strength, "elastic_net", "l2_strength")
    return _elastic_net(l1_strength, l2_strength)


def mcp(strength: Scalar, gamma: Scalar = 3.0) -> Prox:
    r"""The minimax concave penalty: zeros as with l1, but large entries are not shrunk.

    .. math::
      \operatorname*{argmin}_x \tfrac{1}{2\tau} \|x - y\|_2^2 + \sum_i \begin{cases}
        \lambda |x_i| - x_i^2 / (2 \gamma) & |x_i| \le \gamma \lambda \\ \gamma \lambda^2 / 2 & \text{else} \end{cases}

    For :math:`\tau < \gamma` this is 0 up to :math:`|y| = \tau\lambda`, then a line to :math:`y` at
    :math:`\gamma\lambda`. For :math:`\tau \ge \gamma` it jumps from 0 to y at :math:`\lambda\sqrt{\gamma\tau}`.

    Args:
      strength: :math:`\lambda \ge 0`.
      gamma: :math:`\gamma > 0`, in units of a step size: how far the penalty reaches.

    Raises:
      ValueError: If `strength` is negative or `gamma` is not positive.

    Examples:
      >>> import jax.numpy as jnp, signopt
      >>> signopt.prox.mcp(1.0, gamma=2.0)(jnp.array([0.5, 1.5, -4.0]), 1.0).tolist()
      [0.0, 1.0, -4.0]

    References:
      Zhang, `Nearly unbiased variable selection under minimax concave penalty <https://arxiv.org/abs/1002.4734>`_, 2010,
      equations 2.1 and 2.2 (there :math:`\tau = 1`). We add the case :math:`\tau \ge \gamma`.
    """
    _check.at_least(0, strength, "mcp", "strength")
    _check.positive(gamma, "mcp", "gamma")

    def cases(size, t, s, g, below, between, beyond):
        """What |y| = `size` meets. The last case of each is also where NaN goes."""
        soft = jnp.where(size <= t * s, below, jnp.where(size > g * s, beyond, between))
        hard = jnp.where(size <= s * (jnp.sqrt(g) * jnp.sqrt(t)), below, beyond)
        return jnp.where(t < g, soft, hard)

    def slope(t, g):
        return jnp.where(t < g, g - t, 1)

    def apply(y, t, s, g):
        size = jnp.abs(y)
        line = jnp.sign(y) * (g / slope(t, g)) * (size - t * s)
        return cases(size, t, s, g, jnp.zeros_like(y), line, y)

    def residual(y, t, s, g):
        size = jnp.abs(y)
        line = jnp.sign(y) * (t / slope(t, g)) * (g * s - size)
        return cases(size, t, s, g, y, line, jnp.where(jnp.isnan(y), y, 0))

    def value(x, s, g):
        size = jnp.abs(x)
        inner = size * (s - size / (2 * g))
        return jnp.sum(jnp.where(size > g * s, s * (g * s) / 2, inner))

    return per_leaf(apply, value, residual, strengths=(strength, gamma))


def box(lower: Scalar | None = None, upper: Scalar | None = None) -> Prox:
    r"""Bounds on every entry.

    .. math::
      \operatorname*{argmin}_{l \le x \le u} \|x - y\|_2^2 = \min(\max(y, l), u)

    Args:
      lower: :math:`l`, a number or an array that broadcasts against every leaf; None for no bound.
      upper: :math:`u`, likewise.

    Raises:
      ValueError: If a lower bound exceeds its upper bound.

    Examples:
      >>> import jax.numpy as jnp, signopt
      >>> prox = signopt.prox.box(-1.0, 1.0)
      >>> prox(jnp.array([3.0, -0.5]), 0.1).tolist(), float(prox.value(jnp.array([3.0, -0.5])))
      ([1.0, -0.5], inf)
    """
    bounds = {"lower": lower, "upper": upper}
    for name, bound in bounds.items():
        if bound is not None:
            _check.number(bound, "box", name)
    known = {name: np.asarray(jax.device_get(x)) for name, x in bounds.items() if not isinstance(x, Tracer | None)}
    if len(known) == 2 and not np.all(known["lower"] <= known["upper"]):
        raise ValueError(f"`box(lower=...)` has to be at most `upper`, got lower={lower} and upper={upper}.")

    def within(x):
        """The bounds for every entry of `x`, in float32 at least."""
        dtype = _float.wide_dtype(x)
        return [None if b is None else jnp.broadcast_to(jnp.asarray(b, dtype), x.shape) for b in (lower, upper)]

    def value(x):
        # Bounds as the leaf can hold them, so that what lands on one is inside.
        low, high = (None if b is None else b.astype(x.dtype) for b in within(x))
        inside = jnp.clip(x, low, high) == x
        return jnp.sum(jnp.where(inside, 0, jnp.where(jnp.isnan(x), x, jnp.inf)).astype(_float.wide_dtype(x)))

    clip = per_leaf(lambda y, t: jnp.clip(y, *within(y)), jnp.sum)
    return Prox(clip.apply, lambda tree: total(lambda x: value(jnp.asarray(x)), tree), separable=True)


def non_negative() -> Prox:
    r"""No entry below zero.

    .. math::
      \operatorname*{argmin}_{x \ge 0} \|x - y\|_2^2 = \max(y, 0)
    """
    return box(lower=0.0)


def binary(strength: Scalar) -> Prox:
    r"""Pull entries towards -1 and +1, the nearer one.

    .. math::
      \operatorname*{argmin}_x \tfrac{1}{2\tau} \|x - y\|_2^2 + \lambda \sum_i \big||x_i| - 1\big|
      = \operatorname{sign}(y) \Big(1 + \operatorname{sign}(|y| - 1) \max\big(\big||y| - 1\big| - \tau \lambda, 0\big)\Big)

    It is not convex: 0 is as near to -1 as to +1, and goes to +1. Let the strength grow during training, as a schedule of
    `optax.inject_hyperparams`, until every weight is on one of the two.

    Args:
      strength: :math:`\lambda \ge 0`. Entries within :math:`\tau\lambda` of -1 or +1 land on it.

    Raises:
      ValueError: If `strength` is negative.

    Examples:
      >>> import jax.numpy as jnp, signopt
      >>> signopt.prox.binary(1.0)(jnp.array([0.25, -0.75, 2.0]), 0.5).tolist()
      [0.75, -1.0, 1.5]

    References:
      Bai et al., `ProxQuant <https://arxiv.org/abs/1810.00861>`_, 2018, the W-shaped regularizer of section 3.
    """
    _check.at_least(0, strength, "binary", "strength")

    def nearer(y):
        return jnp.where(y < 0, -jnp.ones_like(y), jnp.ones_like(y))

    def residual(y, t, s):
        return nearer(y) * jnp.clip(jnp.abs(y) - 1, -(t * s), t * s)

    def apply(y, t, s):
        lands = jnp.abs(jnp.abs(y) - 1) <= t * s
        return jnp.where(lands, nearer(y), y - residual(y, t, s))

    return per_leaf(apply, lambda x, s: jnp.sum(s * jnp.abs(jnp.abs(x) - 1)), residual, strengths=(strength,))


def _elastic_net(l1_strength, l2_strength):
    def apply(y, t, s, d):
        return _soft_threshold(y, t * s) / (1 + t * d)

    def residual(y, t, s, d):
        decay = t * d
        share = jnp.where(decay > 1, 1 / (1 + 1 / jnp.maximum(decay, 1)), decay / (1 + jnp.minimum(decay, 1)))
        return jnp.clip(y, -(t * s), t * s) / (1 + decay) + y * share

    return per_leaf(
        apply,
        lambda x, s, d: jnp.sum(jnp.abs(x) * (s + d / 2 * jnp.abs(x))),
        residual,
        strengths=(l1_strength, l2_strength),
        separable=True,
    )


def _soft_threshold(y, threshold):
    return y - jnp.clip(y, -threshold, threshold)
