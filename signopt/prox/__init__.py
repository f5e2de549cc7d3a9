r"""Proximal operators: `prox(x, step_size) -> x`, on trees of parameters.

.. math::
  \operatorname{prox}_{\tau r}(y) = \operatorname*{argmin}_x \tfrac{1}{2\tau} \|x - y\|_2^2 + r(x)

Each function here makes a `Prox` for one penalty :math:`r`; its docstring is this minimum, solved. A `Prox` also knows
the value of its penalty, for reporting an objective, and where it pays its residual :math:`y - \operatorname{prox}(y)`
without a cancellation. Leaves may have any floating-point dtype (the arithmetic is float32 at least) and may be empty;
`None` and `optax.MaskedNode` are passed over. A strength may be traced, and is differentiable like the rest, wherever
the operator itself is.

===========================================  ==============================================================
what shall be zero, or small                 penalty
===========================================  ==============================================================
single entries                               `l1`, `elastic_net`, `mcp` (large entries stay unbiased)
rows, columns, channels, whole leaves        `group_l1`, `l2`
singular values                              `nuclear_norm`
jumps                                        `total_variation`
the distance to a set                        `box`, `non_negative`, `binary`, `from_projection`
everything a little                          `l2_squared`
===========================================  ==============================================================

`masked` applies one to some leaves, `sampled` is a mean of many of which each step draws a few, and `polish` finishes
parameters with one last operator.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from signopt.prox.entrywise import binary as binary
from signopt.prox.entrywise import box as box
from signopt.prox.entrywise import elastic_net as elastic_net
from signopt.prox.entrywise import l1 as l1
from signopt.prox.entrywise import l2_squared as l2_squared
from signopt.prox.entrywise import mcp as mcp
from signopt.prox.entrywise import non_negative as non_negative
from signopt.prox.entrywise import zero as zero
from signopt.prox.penalty import Operator
from signopt.prox.penalty import Prox as Prox
from signopt.prox.penalty import Scalar
from signopt.prox.penalty import as_prox
from signopt.prox.penalty import positive
from signopt.prox.penalty import widen
from signopt.prox.sampling import SampledProx as SampledProx
from signopt.prox.sampling import sampled as sampled
from signopt.prox.structured import group_l1 as group_l1
from signopt.prox.structured import l2 as l2
from signopt.prox.structured import nuclear_norm as nuclear_norm
from signopt.prox.structured import total_variation as total_variation


def masked(prox: Prox | SampledProx | Operator, mask: Any) -> Prox:
    """`prox` on some leaves; the others, biases for example, are left alone and not counted in its value.

    Args:
      prox: What applies where the mask is True.
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
    )


def from_projection(projection: Callable[..., Any], *args: Any, tolerance: float = 8.0, **kwargs: Any) -> Prox:
    r"""The indicator of a set, from the projection onto it; `optax.projections` has many.

    .. math::
      \operatorname*{argmin}_{x \in C} \|x - y\|_2^2 = \Pi_C(y)

    Args:
      projection: `projection(tree, *args, **kwargs) -> tree`.
      *args: Further arguments of the projection, such as the radius of a ball.
      tolerance: What the value still counts as inside, in rounding errors of the largest entry.
      **kwargs: Further arguments of the projection.

    Examples:
      >>> import jax.numpy as jnp, optax, signopt
      >>> prox = signopt.prox.from_projection(optax.projections.projection_l2_ball, 5.0)
      >>> prox(jnp.array([6.0, 8.0]), 0.1).tolist(), float(prox.value(jnp.array([6.0, 8.0])))
      ([3.0, 4.0], inf)
    """

    def apply(x, step_size):
        del step_size
        wide = projection(jax.tree.map(widen, x), *args, **kwargs)
        return jax.tree.map(lambda old, new: new.astype(jnp.result_type(old)), x, wide)

    def value(x):
        rounding = max((float(jnp.finfo(jnp.result_type(leaf)).eps) for leaf in jax.tree.leaves(x)), default=0.0)
        distance = optax.tree.norm(jax.tree.map(lambda a, b: widen(a) - widen(b), x, apply(x, 1.0)), ord=jnp.inf)
        largest = optax.tree.norm(jax.tree.map(widen, x), ord=jnp.inf)
        return jnp.where(distance <= tolerance * rounding * largest, 0.0, jnp.inf)

    return Prox(apply, value)


def polish(params: Any, prox: Prox | SampledProx | Operator, step_size: Scalar, *, gradient: Any = None) -> Any:
    r"""Finish parameters with one last proximal step.

    .. math::
      \operatorname{prox}_{\tau r}(x - \tau g)

    Iterates of SignProx hover within one learning rate of zero and are never exactly on it; this puts them there.

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
    positive("polish", "step_size", step_size)
    wide = jax.tree.map(widen, params)
    if gradient is not None:
        wide = jax.tree.map(lambda x, g: x - step_size * widen(g), wide, gradient)
    landed = as_prox(prox, "polish")(wide, step_size)
    return jax.tree.map(lambda old, new: new.astype(jnp.result_type(old)), params, landed)
