"""How dense a vector is."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from signopt import _float


def density(tree: Any) -> Float[Array, ""]:
    r"""How dense a tree is, taken as one vector: :math:`\phi(v) = \|v\|_1^2 / (d \|v\|_2^2)`.

    Args:
      tree: Arrays. `jax.tree.map(density, tree)` gives the density of each leaf.

    Returns:
      A float32 scalar: 1 if all entries have one magnitude, 1/d if all but one are zero, about :math:`2 / \pi` for normal
      numbers; 0 if all are zero or there are none.

    Examples:
      >>> import jax.numpy as jnp
      >>> from signopt.diagnostics import density
      >>> float(density([jnp.array([1.0, -1.0]), jnp.array([1.0, 1.0])])), float(density(jnp.array([0.0, 7.0])))
      (1.0, 0.5)

    References:
      Equation (1) of Bernstein et al., `signSGD <https://arxiv.org/abs/1802.04434>`_, 2018.
    """
    leaves = [x for x in jax.tree.leaves(tree) if jnp.size(x)]
    if not leaves:
        return jnp.zeros([], jnp.float32)
    dtype = _float.wide_dtype(*leaves)
    sizes = [jnp.abs(jnp.asarray(x).astype(dtype)) for x in leaves]
    unit = _float.unit_of(
        jnp.max(jnp.stack([jnp.max(x) for x in sizes]))
    )  # so that squares neither overflow nor vanish
    total = sum(jnp.sum(x / unit) for x in sizes)
    squares = sum(jnp.sum((x / unit) ** 2) for x in sizes)
    none = squares == 0
    found = total * (total / (sum(x.size for x in sizes) * jnp.where(none, 1, squares)))
    return jnp.where(none, 0, found).astype(jnp.float32)
