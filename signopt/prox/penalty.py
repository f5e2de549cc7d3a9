"""What a penalty is here: its proximal operator, its value, and what the operator takes away.

`Prox` is the type; the penalties themselves are in `signopt.prox`.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from signopt import _check
from signopt import _float

Scalar = float | jax.Array
Operator = Callable[[Any, Any], Any]  # prox(x, step_size) -> x


@dataclasses.dataclass(frozen=True)
class Prox:
    r"""A penalty :math:`r` on a tree of parameters, known by its proximal operator.

    .. math::
      \operatorname{prox}_{\tau r}(y) = \operatorname*{argmin}_x \tfrac{1}{2\tau} \|x - y\|_2^2 + r(x)

    `prox(x, step_size)` applies it. A penalty of your own needs only `apply`. Reporting an objective needs the value too.

    Attributes:
      apply: `apply(x, step_size) -> x`, the operator, on a tree. It keeps shapes and dtypes.
      penalty_value: `penalty_value(x) -> scalar`, :math:`r(x)`.
      own_residual: `own_residual(y, step_size) -> y - prox(y)`, computed without a subtraction of two close numbers. Such a
        difference has few correct digits and often the wrong sign.
      separable: Whether :math:`r` is a sum of convex functions of single entries. Then the sign of the prox-gradient
        mapping does not depend on the step size.
      random: `random(*numbers) -> Prox`, if each step draws its operator: see `sampled`.

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
    random: Callable[..., "Prox"] | None = None

    def __call__(self, x: Any, step_size: Scalar) -> Any:
        """Apply the operator.

        Args:
          x: A tree of floating-point arrays.
          step_size: At least 0; may be traced.

        Returns:
          A tree of the same structure, shapes and dtypes.

        Raises:
          ValueError: If `step_size` is negative, or the operator changes the structure or a shape.
          TypeError: If `step_size` is no number, a leaf is not of a floating-point dtype, or the operator changes a dtype.
        """
        _check.at_least(0, step_size, "prox", "step_size")
        _require_floating(x)
        out = self.apply(x, step_size)
        _require_alike(out, x)
        return out

    def value(self, x: Any) -> jax.Array:
        """The penalty itself, a scalar in at least float32; inf outside its domain, and NaN if an entry is NaN.

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

    def draw(self, *numbers: jax.Array | int) -> "Prox":
        """The operator for one step: a `sampled` penalty draws it by `numbers` (a step, a worker), others return themselves.

        The same numbers draw the same operator.
        """
        return self if self.random is None else self.random(*numbers)


def as_prox(prox: Any, caller: str) -> Prox:
    """`prox` as a `Prox`; a plain function `prox(x, step_size) -> x` becomes one."""
    if isinstance(prox, Prox):
        return prox
    if callable(prox):
        return Prox(prox)
    raise TypeError(
        f"`{caller}(prox=...)` has to be a `signopt.prox.Prox` or a function `prox(x, step_size) -> x`, got "
        f"{prox!r}. `signopt.prox` has the usual ones, such as `signopt.prox.l1(1e-4)`."
    )


def per_leaf(
    apply: Callable[..., jax.Array],
    value: Callable[..., jax.Array],
    residual: Callable[..., jax.Array] | None = None,
    *,
    strengths: tuple[Scalar, ...] = (),
    separable: bool = False,
) -> Prox:
    """A penalty that is a sum over leaves, from functions of one array.

    Args:
      apply: `apply(y, step_size, *strengths)`. All its arguments have one dtype, float32 at least. The result is rounded
        to the dtype of the leaf.
      value: `value(x, *strengths)`, likewise.
      residual: `residual(y, step_size, *strengths)`, likewise, or None.
      strengths: Numbers, possibly traced.
      separable: As in `Prox`.
    """

    def wide(x):
        x = _float.widen(x)
        return x, [jnp.asarray(strength, x.dtype) for strength in strengths]

    def on_tree(function):
        def on_leaf(x, step_size):
            y, numbers = wide(x)
            return function(y, jnp.asarray(step_size, y.dtype), *numbers).astype(jnp.result_type(x))

        return lambda tree, step_size: jax.tree.map(lambda x: on_leaf(x, step_size), tree)

    def on_leaf_value(x):
        x, numbers = wide(x)
        return value(x, *numbers)

    return Prox(
        on_tree(apply),
        lambda tree: total(on_leaf_value, tree),
        None if residual is None else on_tree(residual),
        separable,
    )


def total(value: Callable[[jax.Array], jax.Array], tree: Any) -> jax.Array:
    """The sum of `value(leaf)` over the leaves, a scalar in at least float32."""
    values = [value(x) for x in jax.tree.leaves(tree)]
    dtype = _float.wide_dtype(*values)
    return sum((x.astype(dtype) for x in values), jnp.zeros([], dtype))


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
