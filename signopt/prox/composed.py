"""Penalties made from others, and from projections."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from signopt import _float
from signopt.prox.penalty import Operator
from signopt.prox.penalty import Prox
from signopt.prox.penalty import as_prox


def masked(prox: Prox | Operator, mask: Any) -> Prox:
    """`prox` on some leaves; the others, biases for example, are left alone and not counted in its value.

    Args:
      prox: What applies where the mask is True. A `sampled` one is still drawn anew in every step.
      mask: Booleans: a tree like the parameters or a prefix of it, or a function from parameters to such a tree, as in
        `optax.masked`.

    Raises:
      ValueError: When applied, if the mask does not fit the tree.

    Examples:
      >>> import jax.numpy as jnp, signopt
      >>> prox = signopt.prox.masked(signopt.prox.l1(1.0), {"kernel": True, "bias": False})
      >>> prox({"kernel": jnp.array([0.5, 2.0]), "bias": jnp.array([0.5])}, 1.0)
      {'bias': Array([0.5], dtype=float32), 'kernel': Array([0., 1.], dtype=float32)}
    """
    prox = as_prox(prox, "masked")

    def chosen(tree):
        prefix = mask(tree) if callable(mask) else mask
        keep = jax.tree.map(lambda choice, part: jax.tree.map(lambda _: bool(choice), part), prefix, tree)
        return keep, jax.tree.map(lambda yes, x: x if yes else optax.MaskedNode(), keep, tree)

    def on_chosen(function, elsewhere):
        def mapped(tree, step_size):
            keep, part = chosen(tree)
            done = iter(jax.tree.leaves(function(part, step_size)))
            return jax.tree.map(lambda yes, x: next(done) if yes else elsewhere(x), keep, tree)

        return mapped

    return Prox(
        apply=on_chosen(prox, lambda x: x),
        penalty_value=lambda tree: prox.value(chosen(tree)[1]),
        own_residual=on_chosen(prox.residual, jnp.zeros_like) if prox.own_residual else None,
        separable=prox.separable,
        random=(lambda *numbers: masked(prox.draw(*numbers), mask)) if prox.random else None,
    )


def from_projection(projection: Callable[..., Any], *args: Any, tolerance: float = 8.0, **kwargs: Any) -> Prox:
    r"""The indicator of a set, from the projection onto it; `optax.projections` has many.

    .. math::
      \operatorname*{argmin}_{x \in C} \|x - y\|_2^2 = \Pi_C(y)

    Args:
      projection: `projection(tree, *args, **kwargs) -> tree`.
      *args: Further arguments of the projection, such as the radius of a ball.
      tolerance: How far outside the value still counts as inside, in rounding errors of the largest entry.
      **kwargs: Further arguments of the projection.

    Examples:
      >>> import jax.numpy as jnp, optax, signopt
      >>> prox = signopt.prox.from_projection(optax.projections.projection_l2_ball, 5.0)
      >>> prox(jnp.array([6.0, 8.0]), 0.1).tolist(), float(prox.value(jnp.array([6.0, 8.0])))
      ([3.0, 4.0], inf)
    """

    def apply(x, step_size):
        del step_size
        wide = projection(jax.tree.map(_float.widen, x), *args, **kwargs)
        return jax.tree.map(lambda old, new: new.astype(jnp.result_type(old)), x, wide)

    def largest(tree):
        """The largest magnitude in a tree, in its widest dtype; 0 for an empty one."""
        leaves = [jnp.max(jnp.abs(x), initial=0) for x in jax.tree.leaves(tree)]
        dtype = _float.wide_dtype(*leaves)
        return jnp.max(jnp.stack([jnp.zeros([], dtype), *(x.astype(dtype) for x in leaves)]))

    def value(x):
        rounding = max((float(jnp.finfo(jnp.result_type(leaf)).eps) for leaf in jax.tree.leaves(x)), default=0.0)
        wide = jax.tree.map(_float.widen, x)
        distance = largest(jax.tree.map(lambda a, b: a - _float.widen(b), wide, apply(x, 1.0)))
        outside = jnp.where(jnp.isnan(distance), distance, jnp.inf)
        return jnp.where(distance <= tolerance * rounding * largest(wide), 0.0, outside)

    return Prox(apply, value)
