"""What a penalty is here: its proximal operator, its value, and what the operator takes away.

`Prox` is the type; the penalties themselves are in `signopt.prox`.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
from jax.core import Tracer
import jax.numpy as jnp
import numpy as np

Scalar = float | jax.Array
Operator = Callable[[Any, Any], Any]  # prox(x, step_size) -> x


@dataclasses.dataclass(frozen=True)
class Prox:
    r"""A penalty :math:`r` on a tree of parameters, known by its proximal operator.

    .. math::
      \operatorname{prox}_{\tau r}(y) = \operatorname*{argmin}_x \tfrac{1}{2\tau} \|x - y\|_2^2 + r(x)

    `prox(x, step_size)` applies it. One of your own needs `apply` only; `value` is for reporting objectives.

    Attributes:
      apply: `apply(x, step_size) -> x`, the operator, on a tree; shapes and dtypes stay.
      penalty_value: `penalty_value(x) -> scalar`, :math:`r(x)`.
      own_residual: `own_residual(y, step_size) -> y - prox(y)`, where that can be had without a cancellation. The
        difference of two close numbers has few correct digits and often the wrong sign.
      separable: Whether :math:`r` is a sum over entries of convex functions. Then the sign of the prox-gradient mapping
        does not depend on the step size.

    Examples:
      >>> import jax.numpy as jnp, signopt
      >>> halve = signopt.prox.Prox(lambda x, step_size: x / 2)
      >>> halve(jnp.array([3.0, -1.0]), 0.1).tolist()
      [1.5, -0.5]
    """

    apply: Callable[[Any, Scalar], Any]
    penalty_value: Callable[[Any], jax.Array] | None = None
    own_residual: Callable[[Any, Scalar], Any] | None = None
    separable: bool = False

    def __call__(self, x: Any, step_size: Scalar) -> Any:
        """Apply the operator.

        Args:
          x: A tree of floating-point arrays.
          step_size: At least 0; may be traced.

        Returns:
          A tree of the same structure, shapes and dtypes.

        Raises:
          ValueError: If `step_size` is negative, or the operator changes the structure or a shape.
          TypeError: If a leaf is not of a floating-point dtype, or the operator changes a dtype.
        """
        at_least_zero("prox", "step_size", step_size)
        _require_floating(x)
        out = self.apply(x, step_size)
        _require_alike(out, x)
        return out

    def value(self, x: Any) -> jax.Array:
        """The penalty itself, a scalar in at least float32; inf outside its domain.

        Raises:
          ValueError: If this operator was made without `penalty_value`.
        """
        if self.penalty_value is None:
            raise ValueError(
                "`Prox.value` has to be called on a penalty that knows its value, got one without. Make it with "
                "`Prox(apply, penalty_value=...)`."
            )
        return self.penalty_value(x)

    def residual(self, y: Any, step_size: Scalar) -> Any:
        """What the operator takes away, `y - prox(y, step_size)`."""
        if self.own_residual is None:
            return jax.tree.map(jnp.subtract, y, self(y, step_size))
        return self.own_residual(y, step_size)


def as_prox(prox: Any, caller: str) -> Any:
    """`prox` as an object with a residual; a plain function `prox(x, step_size) -> x` becomes a `Prox`."""
    if hasattr(prox, "residual"):
        return prox
    if callable(prox):
        return Prox(prox)
    raise TypeError(
        f"`{caller}(prox=...)` has to be a `signopt.prox.Prox` or a function `prox(x, step_size) -> x`, got "
        f"{prox!r}. `signopt.prox` has the usual ones, such as `signopt.prox.l1(1e-4)`."
    )


def per_leaf(
    apply: Callable[[jax.Array, Scalar], jax.Array],
    value: Callable[[jax.Array], jax.Array],
    residual: Callable[[jax.Array, Scalar], jax.Array] | None = None,
    *,
    separable: bool = False,
) -> Prox:
    """A penalty that is a sum over leaves, from functions of one array.

    They are given at least float32, and what they return is rounded to the dtype of the leaf.
    """

    def on_tree(function):
        def mapped(tree, step_size):
            return jax.tree.map(lambda x: function(widen(x), step_size).astype(jnp.result_type(x)), tree)

        return mapped

    def total(tree):
        return sum((value(widen(x)) for x in jax.tree.leaves(tree)), jnp.zeros([], jnp.float32))

    return Prox(on_tree(apply), total, None if residual is None else on_tree(residual), separable)


def widen(x: jax.Array) -> jax.Array:
    """`x` in at least float32."""
    return jnp.asarray(x, jnp.promote_types(jnp.result_type(x), jnp.float32))


def at_least_zero(call: str, argument: str, value: Any) -> None:
    """Raise a `ValueError` if `value` is known and negative or NaN; traced values pass."""
    if not isinstance(value, Tracer) and not np.all(np.asarray(value) >= 0):
        raise ValueError(f"`{call}({argument}=...)` has to be at least 0, got {value}.")


def positive(call: str, argument: str, value: Any) -> None:
    """Raise a `ValueError` if `value` is known and not positive; traced values pass."""
    if not isinstance(value, Tracer) and not np.all(np.asarray(value) > 0):
        raise ValueError(f"`{call}({argument}=...)` has to be positive, got {value}.")


def _require_floating(tree):
    for path, leaf in jax.tree.leaves_with_path(tree):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise TypeError(
                f"`prox(x=...)` has to be given floating-point leaves, got {jnp.result_type(leaf)} at "
                f"`x{jax.tree_util.keystr(path)}`. Leave it out with `signopt.prox.masked`."
            )


def _require_alike(out, x):
    if jax.tree.structure(out) != jax.tree.structure(x):
        raise ValueError(
            f"`prox(x, step_size)` has to return a tree like `x`, got {jax.tree.structure(out)} for "
            f"{jax.tree.structure(x)}. Apply it leaf by leaf with `jax.tree.map`."
        )
    for (path, old), new in zip(jax.tree.leaves_with_path(x), jax.tree.leaves(out), strict=True):
        where = f"`x{jax.tree_util.keystr(path)}`"
        if jnp.shape(new) != jnp.shape(old):
            raise ValueError(
                f"`prox(x, step_size)` has to keep shapes, got {jnp.shape(new)} for {where} of shape {jnp.shape(old)}. "
                "Return one number for each entry."
            )
        if jnp.result_type(new) != jnp.result_type(old):
            raise TypeError(
                f"`prox(x, step_size)` has to keep dtypes, got {jnp.result_type(new)} for {where} of dtype "
                f"{jnp.result_type(old)}. End it with `.astype(x.dtype)`."
            )
