"""Singular values made smaller, with a derivative that does not mind if some of them coincide."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.custom_jvp
def shrink(y: Float[Array, "*batch rows columns"], threshold: Float[Array, ""]) -> Float[Array, "*batch rows columns"]:
    r"""Subtract `threshold` from every singular value, down to zero.

    .. math::
      F(Y) = U \operatorname{diag}(f(\sigma))\, V^\top, \qquad f(\sigma) = \max(\sigma - t, 0).

    The derivative of the decomposition does not exist where two singular values are equal, as they are for a zero matrix.
    That of F does (Daleckii and Krein). With :math:`D = U^\top dY\, V` and its symmetric and
    antisymmetric halves A and B,

    .. math::
      dF = U \Big( \frac{f_i - f_j}{\sigma_i - \sigma_j} A + \frac{f_i + f_j}{\sigma_i + \sigma_j} B \Big) V^\top
         + (1 - UU^\top)\, dY\, V \tfrac{f}{\sigma} V^\top + U \tfrac{f}{\sigma} U^\top dY\, (1 - VV^\top).

    Args:
      y: Matrices in float32 or float64.
      threshold: :math:`t \ge 0`; may be traced.

    Returns:
      Matrices of the same shape.
    """
    return _shrink(y, threshold)[0]


def _shrink(y, threshold):
    if y.size == 0:
        return y, None
    u, s, vt = jnp.linalg.svd(y, full_matrices=False)
    f = jnp.maximum(s - threshold, 0)
    return (u * f[..., None, :]) @ vt, (u, s, f, vt)


@shrink.defjvp
def _shrink_jvp(primals, tangents):
    (y, threshold), (dy, dt) = primals, tangents
    out, parts = _shrink(y, threshold)
    if parts is None:
        return out, dy
    u, s, f, vt = parts
    ut, v = u.mT, vt.mT
    d = ut @ dy @ v
    inner = _slopes(s, f) * (d + d.mT) / 2 + _ratio(_pairs(f, jnp.add), _pairs(s, jnp.add)) * (d - d.mT) / 2
    inner -= dt * (f > 0)[..., None, :] * _eye(f)
    keep = _ratio(f, s)[..., None, :]
    beside = ((dy @ v - u @ d) * keep) @ vt  # (1 - UU') dY V ...
    below = (u * keep) @ (ut @ dy - d @ vt)  # ... dY (1 - VV')
    return out, u @ inner @ vt + beside + below


def _eye(f):
    n = f.shape[-1]
    return jnp.broadcast_to(jnp.eye(n, dtype=f.dtype), (*f.shape, n))


def _slopes(s, f):
    """(f_i - f_j) / (s_i - s_j): 1 above the threshold, 0 below it, and between for a pair across it."""
    above = f > 0
    both = above[..., :, None] & above[..., None, :]
    crossing = above[..., :, None] ^ above[..., None, :]
    apart = jnp.abs(_pairs(s, jnp.subtract))
    return jnp.where(both, 1, jnp.where(crossing, _ratio(_pairs(f, jnp.maximum), apart), 0)).astype(s.dtype)


def _pairs(x, op):
    return op(x[..., :, None], x[..., None, :])


def _ratio(numerator, denominator):
    return jnp.where(denominator > 0, numerator / jnp.where(denominator > 0, denominator, 1), 0)
