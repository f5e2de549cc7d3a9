"""Penalties on whole arrays: groups, matrices and chains."""

from jax import lax
import jax.numpy as jnp

from signopt import _check
from signopt import _float
from signopt.prox import chains
from signopt.prox import singular_values
from signopt.prox.penalty import Prox
from signopt.prox.penalty import Scalar
from signopt.prox.penalty import per_leaf


def l2(strength: Scalar) -> Prox:
    r"""The l2 norm of each leaf, not squared: whole leaves become zero.

    .. math::
      \operatorname*{argmin}_x \tfrac{1}{2\tau} \|x - y\|_2^2 + \lambda \|x\|_2
      = \max\Big(1 - \frac{\tau\lambda}{\|y\|_2}, 0\Big)\, y

    Args:
      strength: :math:`\lambda \ge 0`.

    Raises:
      ValueError: If `strength` is negative.

    Examples:
      >>> import jax.numpy as jnp, signopt
      >>> signopt.prox.l2(2.0)(jnp.array([6.0, 8.0]), 2.5).tolist()
      [3.0, 4.0]
    """
    _check.at_least(0, strength, "l2", "strength")
    return _shrink_norms(strength, lambda x: (x, tuple(range(x.ndim))))


def group_l1(strength: Scalar, *, axis: int | tuple[int, ...] = 0, group_size: int = 1) -> Prox:
    r"""The sum over groups of their l2 norms, so that entries become zero group by group.

    .. math::
      \operatorname*{argmin}_x \tfrac{1}{2\tau} \|x - y\|_2^2 + \lambda \sum_G \|x_G\|_2, \qquad
      x_G = \max\Big(1 - \frac{\tau\lambda}{\|y_G\|_2}, 0\Big)\, y_G

    Args:
      strength: :math:`\lambda \ge 0`.
      axis: The axis, or axes, whose index names the group: entries that share it are one. In a Dense kernel `(inputs,
        outputs)`, 0 drops inputs and 1 drops units; in a convolution's `(height, width, in, out)`, 3 drops channels.
      group_size: So many neighbours along `axis` (the last of them, if several) form one group together.

    Raises:
      ValueError: If `strength` is negative or `group_size` is not positive; when applied, if a leaf has no such axis or
        `group_size` does not divide it.

    Examples:
      >>> import jax.numpy as jnp, signopt
      >>> signopt.prox.group_l1(1.0, axis=0)(jnp.array([[3.0, 4.0], [0.3, 0.4]]), 2.5).tolist()
      [[1.5, 2.0], [0.0, 0.0]]
    """
    _check.at_least(0, strength, "group_l1", "strength")
    _check.count(group_size, "group_l1", "group_size")
    axes = tuple(axis) if isinstance(axis, tuple | list) else (axis,)

    def grouped(x):
        if any(not -x.ndim <= k < x.ndim for k in axes):
            raise ValueError(
                f"`group_l1(axis=...)` has to be an axis of every leaf, got {axis} for a leaf of shape {x.shape}. Leave "
                "that leaf out with `signopt.prox.masked`."
            )
        if x.shape[axes[-1]] % group_size:
            raise ValueError(
                f"`group_l1(group_size=...)` has to divide axis {axes[-1]} of every leaf, got {group_size} for a leaf of "
                f"shape {x.shape}. Choose a divisor of {x.shape[axes[-1]]}, or leave that leaf out with "
                "`signopt.prox.masked`."
            )
        names = {k % x.ndim for k in axes}
        if group_size == 1:
            return x, tuple(k for k in range(x.ndim) if k not in names)
        split = axes[-1] % x.ndim  # into groups, and neighbours within one
        shape = (*x.shape[:split], x.shape[split] // group_size, group_size, *x.shape[split + 1 :])
        names = {k + (k > split) for k in names}
        return x.reshape(shape), tuple(k for k in range(len(shape)) if k not in names)

    return _shrink_norms(strength, grouped)


def nuclear_norm(strength: Scalar) -> Prox:
    r"""The sum of the singular values of each matrix, which makes its rank small.

    .. math::
      \operatorname*{argmin}_X \tfrac{1}{2\tau} \|X - Y\|_F^2 + \lambda \sum_i \sigma_i(X)
      = U \operatorname{diag}(\max(\sigma_i - \tau\lambda, 0))\, V^\top, \qquad Y = U \operatorname{diag}(\sigma) V^\top

    Args:
      strength: :math:`\lambda \ge 0`.

    Returns:
      A penalty for leaves `(*batch, rows, columns)`. It is differentiable also where singular values coincide.

    Raises:
      ValueError: If `strength` is negative; when applied, if a leaf has fewer than two axes.

    Examples:
      >>> import jax.numpy as jnp, signopt
      >>> prox = signopt.prox.nuclear_norm(1.0)
      >>> prox(jnp.diag(jnp.array([3.0, 0.5])), 1.0).round(5).tolist()
      [[2.0, 0.0], [0.0, 0.0]]

    References:
      Cai, Candès and Shen, `A singular value thresholding algorithm for matrix completion
      <https://arxiv.org/abs/0810.3286>`_, 2008, theorem 2.1.
    """
    _check.at_least(0, strength, "nuclear_norm", "strength")

    def matrix(x):
        if x.ndim < 2:
            raise ValueError(
                f"`nuclear_norm(...)` has to be given matrices, got a leaf of shape {x.shape}. Leave it out with "
                "`signopt.prox.masked`."
            )
        return x

    def finite(x):
        """The decomposition of a matrix that is not finite is not defined, and takes LAPACK long."""
        return jnp.where(jnp.isfinite(x), x, 0)

    def apply(y, t, s):
        shrunk = singular_values.shrink(finite(matrix(y)), t * s)
        return jnp.where(jnp.all(jnp.isfinite(y), axis=(-2, -1), keepdims=True), shrunk, jnp.nan)

    def value(x, s):
        not_finite = jnp.sum(jnp.where(jnp.isfinite(x), 0, jnp.abs(x)))
        return jnp.sum(s * jnp.linalg.svd(finite(matrix(x)), compute_uv=False)) + not_finite

    return per_leaf(apply, value, strengths=(strength,))


def total_variation(strength: Scalar, *, axis: int = -1) -> Prox:
    r"""The sum of the jumps along an axis: pieces become constant.

    .. math::
      \operatorname*{argmin}_x \tfrac{1}{2\tau} \|x - y\|_2^2 + \lambda \sum_i |x_{i+1} - x_i|

    Exact. A million points take tenths of a second on a CPU (`experiments/prox_time.py`).

    Args:
      strength: :math:`\lambda \ge 0`.
      axis: The axis along which neighbours are compared; every line along it is a problem of its own.

    Raises:
      ValueError: If `strength` is negative; when applied, if a leaf has no such axis.

    Examples:
      >>> import jax.numpy as jnp, signopt
      >>> signopt.prox.total_variation(1.0)(jnp.array([0.0, 2.0, 10.0, 10.0]), 1.0).tolist()
      [1.0, 2.0, 9.5, 9.5]
    """
    _check.at_least(0, strength, "total_variation", "strength")

    def last(x):
        if not -x.ndim <= axis < x.ndim:
            raise ValueError(
                f"`total_variation(axis=...)` has to be an axis of every leaf, got {axis} for a leaf of shape {x.shape}. "
                "Leave that leaf out with `signopt.prox.masked`."
            )
        return jnp.moveaxis(x, axis, -1)

    return per_leaf(
        lambda y, t, s: jnp.moveaxis(chains.denoise(last(y), t * s), -1, axis),
        lambda x, s: jnp.sum(s * jnp.abs(jnp.diff(last(x)))),
        strengths=(strength,),
    )


def _shrink_norms(strength, grouped):
    """The group penalty of `grouped(leaf) -> (leaf, axes)`: what differs along these axes only is one group."""

    def apply(y, t, s):
        return y - residual(y, t, s)

    def residual(y, t, s):
        x, axes = grouped(y)
        norms = _norms(x, axes)
        dies = (norms <= t * s) & (t * s > 0)  # a norm that is NaN is not small, and shows in all of its group
        share = jnp.where(dies, 1, t * s / jnp.where(dies | (norms == 0), 1, norms))
        return jnp.where(jnp.isinf(x), 0, share * x).reshape(y.shape)

    return per_leaf(apply, lambda x, s: jnp.sum(s * _norms(*grouped(x))), residual, strengths=(strength,))


def _norms(x, axes):
    """The l2 norm over `axes`, which stay; no overflow, no underflow, and the gradient of a zero group is zero."""
    largest = lax.stop_gradient(jnp.max(jnp.abs(x), axes, keepdims=True, initial=0))
    unit = _float.unit_of(largest)
    squares = jnp.sum((x / unit) ** 2, axes, keepdims=True)
    return jnp.where(largest == 0, 0, unit * jnp.sqrt(jnp.where(largest == 0, 1, squares)))
