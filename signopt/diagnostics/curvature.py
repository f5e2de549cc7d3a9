"""How curved a loss is, coordinate by coordinate."""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.core import Tracer
import jax.numpy as jnp
import numpy as np

from signopt import _axis
from signopt import _check
from signopt import _float


def hessian_diagonal(loss: Callable[[Any], jax.Array], params: Any, key: jax.Array, *, probes: int = 8) -> Any:
    r"""Estimate the diagonal of the Hessian from products with random signs.

    .. math::
      \operatorname{diag}(H) = E[z \odot H z], \qquad z_i = \pm 1,

    without bias, and exactly if H is diagonal. The variance of entry i is :math:`\sum_{j \ne i} H_{ij}^2` over the number
    of probes. A probe costs about two gradients.

    Inside a mesh step the Hessian is that of this worker's own loss, not the sum over the workers.

    Args:
      loss: A scalar function of the parameters, with a batch of data in it.
      params: Where.
      key: A random key.
      probes: How many z to average over.

    Returns:
      A tree like `params`.

    Raises:
      ValueError: If `probes` is not positive, or the estimate is zero everywhere: the loss has no second derivatives.
        (Where JAX traces it cannot be seen; it is zero.)
      TypeError: If the loss is no scalar, or a part of it (a `jax.custom_vjp`) cannot be differentiated twice.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from signopt.diagnostics import hessian_diagonal
      >>> hessian_diagonal(lambda x: 3 * x[0] ** 2 - x[1] ** 2, jnp.array([1.0, 5.0]), jax.random.key(0)).tolist()
      [6.0, -2.0]

    References:
      Bekas, Kokiopoulou and Saad, An estimator for the diagonal of a matrix, 2007, after Hutchinson.
    """
    _check.count(probes, "hessian_diagonal", "probes")
    over = {*_axis.varying_of(loss, params), *_axis.varying(key)}
    own = _axis.to_varying(params, tuple(over))  # `jax.grad` of what is the same on all workers adds up their gradients
    leaves, treedef = jax.tree.flatten(jax.tree.map(jnp.asarray, own))
    own = jax.tree.unflatten(treedef, leaves)

    def add_probe(total, key):
        keys = jax.random.split(key, len(leaves))
        z = [jax.random.rademacher(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
        z = [_axis.vary_alike(z, x)[0] for z, x in zip(z, leaves, strict=True)]
        z = jax.tree.unflatten(treedef, z)
        _, product = jax.jvp(jax.grad(loss), (own,), (z,))
        return jax.tree.map(lambda t, z, h: t + z.astype(t.dtype) * h.astype(t.dtype), total, z, product), None

    zero = jax.tree.map(lambda x: jnp.zeros_like(x, _float.wide_dtype(x)), own)
    try:
        total, _ = lax.scan(add_probe, zero, jax.random.split(key, probes))
    except TypeError as error:
        raise TypeError(
            "`hessian_diagonal(loss, ...)` has to be given a scalar loss that can be differentiated twice, got one for "
            f"which JAX says: {error} A `jax.custom_vjp` in it needs `jax.custom_jvp` instead."
        ) from error
    diagonal = jax.tree.map(lambda t, x: (t / probes).astype(x.dtype), total, own)
    found = jax.tree.leaves(diagonal)
    if not any(isinstance(x, Tracer) for x in found) and not any(map(np.any, jax.device_get(found))):
        raise ValueError(
            "`hessian_diagonal(loss, ...)` has to be given a loss with second derivatives, got one whose are all zero: it is "
            "piecewise linear in the parameters. Pass a smooth loss, such as a cross-entropy."
        )
    return diagonal
