"""Penalties that are sums over single entries."""

from jax.core import Tracer
import jax.numpy as jnp

from signopt.prox.penalty import Prox
from signopt.prox.penalty import Scalar
from signopt.prox.penalty import at_least_zero
from signopt.prox.penalty import per_leaf
from signopt.prox.penalty import positive


def zero() -> Prox:
    r"""No penalty at all.

    .. math::
      \operatorname*{argmin}_x \tfrac{1}{2\tau} \|x - y\|_2^2 = y
    """
    return per_leaf(lambda y, t: y, lambda x: jnp.zeros([], x.dtype), lambda y, t: jnp.zeros_like(y), separable=True)


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
    at_least_zero("l1", "strength", strength)
    if non_negative:
        return per_leaf(
            lambda y, t: jnp.maximum(y - t * strength, 0),
            lambda x: jnp.sum(jnp.where(x < 0, jnp.inf, strength * x)),
            lambda y, t: jnp.minimum(y, t * strength),
            separable=True,
        )
    return per_leaf(
        lambda y, t: _soft_threshold(y, t * strength),
        lambda x: strength * jnp.sum(jnp.abs(x)),
        lambda y, t: jnp.clip(y, -(t * strength), t * strength),
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
    at_least_zero("l2_squared", "strength", strength)
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
    at_least_zero("elastic_net", "l1_strength", l1_strength)
    at_least_zero("elastic_net", "l2_strength", l2_strength)
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
    at_least_zero("mcp", "strength", strength)
    positive("mcp", "gamma", gamma)

    def residual(y, t):
        size = jnp.abs(y)
        slope = jnp.where(t < gamma, 1 - t / gamma, 1)
        line = jnp.sign(y) * t * (strength - size / gamma) / slope
        soft = jnp.where(size <= t * strength, y, jnp.where(size <= gamma * strength, line, 0))
        hard = jnp.where(size <= strength * jnp.sqrt(gamma * t), y, 0)
        return jnp.where(t < gamma, soft, hard)

    def value(x):
        size = jnp.abs(x)
        inner = strength * size - size**2 / (2 * gamma)
        return jnp.sum(jnp.where(size <= gamma * strength, inner, gamma * strength**2 / 2))

    return per_leaf(lambda y, t: y - residual(y, t), value, residual)


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
    known = not isinstance(lower, Tracer) and not isinstance(upper, Tracer)
    if known and lower is not None and upper is not None and not jnp.all(jnp.asarray(lower) <= jnp.asarray(upper)):
        raise ValueError(f"`box(lower=...)` has to be at most `upper`, got lower={lower} and upper={upper}.")
    return per_leaf(
        lambda y, t: jnp.clip(y, lower, upper),
        lambda x: jnp.where(jnp.all(x == jnp.clip(x, lower, upper)), 0.0, jnp.inf),
        separable=True,
    )


def non_negative() -> Prox:
    r"""No entry below zero.

    .. math::
      \operatorname*{argmin}_{x \ge 0} \|x - y\|_2^2 = \max(y, 0)
    """
    return l1(0.0, non_negative=True)


def binary(strength: Scalar) -> Prox:
    r"""Pull entries towards -1 and +1, the nearer one.

    .. math::
      \operatorname*{argmin}_x \tfrac{1}{2\tau} \|x - y\|_2^2 + \lambda \sum_i \big||x_i| - 1\big|
      = \operatorname{sign}(y) \Big(1 + \operatorname{sign}(|y| - 1) \max\big(\big||y| - 1\big| - \tau \lambda, 0\big)\Big)

    Not convex: 0 is as near to -1 as to +1, and goes to +1. Let the strength grow during training, as a schedule of
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
    at_least_zero("binary", "strength", strength)
    nearer = lambda y: jnp.where(y < 0, -1, 1).astype(y.dtype)  # noqa: E731

    def apply(y, t):
        return nearer(y) + nearer(y) * _soft_threshold(jnp.abs(y) - 1, t * strength)

    def residual(y, t):
        return nearer(y) * jnp.clip(jnp.abs(y) - 1, -(t * strength), t * strength)

    return per_leaf(apply, lambda x: strength * jnp.sum(jnp.abs(jnp.abs(x) - 1)), residual)


def _elastic_net(l1_strength, l2_strength):
    return per_leaf(
        lambda y, t: _soft_threshold(y, t * l1_strength) / (1 + t * l2_strength),
        lambda x: l1_strength * jnp.sum(jnp.abs(x)) + l2_strength / 2 * jnp.sum(x**2),
        lambda y, t: (jnp.clip(y, -(t * l1_strength), t * l1_strength) + y * (t * l2_strength)) / (1 + t * l2_strength),
        separable=True,
    )


def _soft_threshold(y, threshold):
    return y - jnp.clip(y, -threshold, threshold)
