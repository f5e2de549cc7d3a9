r"""A gradient from function values alone, along directions that all workers know from one key.

.. math::
  \hat g = \frac{w}{n} \sum_{i=1}^n \frac{f(x + \nu u_i) - f(x)}{\nu} \, u_i

Directions :math:`u_i` are normal (and w = 1) or distinct coordinates (w = d); both give the gradient of a smoothed loss in
expectation. The slopes, the n fractions, are all that depends on a worker's data: workers with one key need not exchange
more than those.
"""

from collections.abc import Callable
from typing import Literal, get_args

import jax
from jax import lax
import jax.numpy as jnp
import optax

from signopt import _axis
from signopt import _check
from signopt import _float
from signopt import sign

Directions = Literal["normal", "coordinates"]


def zeroth_order_gradient(
    loss: Callable,
    smoothing: float | jax.Array,
    directions: int,
    key: jax.Array,
    *,
    kind: Directions = "normal",
    border: optax.GradientTransformation | None = None,
) -> Callable:
    """Estimate a gradient from values of a loss, in the place of `value_and_grad`.

    Without a border the estimate is this worker's own, and belongs left of a vote or a mean as any gradient does. With one,
    only the slopes travel, and the estimate is the same on all workers: `mean(axis)` sends a float for each direction,
    `majority_vote(axis)` a bit or two. Then `key` has to be the same on all workers.

    The loss is evaluated once more than there are directions, one at a time. No more than one direction is held in memory.

    Args:
      loss: A scalar function of the parameters and of what else the result is called with.
      smoothing: How far along a direction the loss is evaluated. Below the root of the parameters' precision (3e-4 for
        float32) rounding wins.
      directions: How many; of coordinates at most as many as parameters.
      key: A random key, another one in each step.
      kind: "normal" directions, or distinct "coordinates". All coordinates give the gradient by finite differences.
      border: How workers agree on the slopes: one without memory. None for this worker's own estimate.

    Returns:
      A function `(params, *args) -> (value, gradient)`. The value is this worker's own; the gradient has the parameters'
      shapes and dtypes.

    Raises:
      ValueError: If `smoothing` is not positive, `directions` is not, or `kind` is unknown; when called, if there are more
        directions than coordinates, or the border remembers.
      TypeError: If `directions` is no Python integer; when called, if a parameter is not of a floating-point dtype.

    Examples:
      >>> import jax, jax.numpy as jnp, signopt
      >>> loss = lambda w: 3 * w[0] - w[1]
      >>> estimate = signopt.workers.zeroth_order_gradient(loss, 0.5, 2, jax.random.key(0), kind="coordinates")
      >>> value, gradient = estimate(jnp.array([1.0, 1.0]))
      >>> float(value), gradient.tolist()
      (2.0, [3.0, -1.0])

    References:
      Balasubramanian and Ghadimi, `Zeroth-order (non)-convex stochastic optimization
      <https://arxiv.org/abs/1809.06474>`_, 2018. Seeds in the place of directions: Salimans et al.,
      `Evolution strategies <https://arxiv.org/abs/1703.03864>`_, 2017. A bit for a slope: Cai et al., `FeedSign
      <https://arxiv.org/abs/2501.17610>`_, 2025.
    """
    caller = "zeroth_order_gradient"
    _check.positive(smoothing, caller, "smoothing")
    _check.count(directions, caller, "directions")
    _check.choice(kind, get_args(Directions), caller, "kind")

    def value_and_grad(params, *args):
        sign.require_floating(params, caller)
        params = jax.tree.map(jnp.asarray, params)
        size = sum(x.size for x in jax.tree.leaves(params))
        if kind == "coordinates" and directions > size:
            raise ValueError(
                f"`{caller}(directions=...)` has to be at most the number of parameters, {size}, with "
                f"kind='coordinates', got {directions}."
            )
        places = jax.random.permutation(key, size)[:directions] if kind == "coordinates" else jnp.arange(directions)
        weight = size if kind == "coordinates" else 1
        value = loss(params, *args)

        def direction(place):
            return _coordinate(params, place) if kind == "coordinates" else _normal(params, place, key)

        def slope(place):
            moved = jax.tree.map(lambda x, u: (x + smoothing * u).astype(x.dtype), params, direction(place))
            return (loss(moved, *args) - value) / smoothing

        slopes = lax.map(slope, places)
        if border is not None:
            state = border.init(slopes)
            if any(jnp.issubdtype(jnp.result_type(x), jnp.floating) for x in jax.tree.leaves(state)):
                raise ValueError(
                    f"`{caller}(border=...)` has to be a border without memory, got one with the state {state!r}: nothing "
                    "is kept from one estimate to the next."
                )
            agreed, _ = border.update(slopes, state)
            slopes = jnp.asarray(agreed)

        def add(total, drawn):
            place, slope = drawn
            return jax.tree.map(
                lambda t, u: t + slope.astype(t.dtype) * u.astype(t.dtype), total, direction(place)
            ), None

        zero = [jnp.zeros(x.shape, _float.wide_dtype(x)) for x in jax.tree.leaves(params)]
        zero = [_axis.vary_alike(z, slopes, x)[0] for z, x in zip(zero, jax.tree.leaves(params), strict=True)]
        total, _ = lax.scan(add, jax.tree.unflatten(jax.tree.structure(params), zero), (places, slopes))
        return value, jax.tree.map(lambda t, x: (weight / directions * t).astype(x.dtype), total, params)

    return value_and_grad


def _normal(params, number, key):
    """Normal numbers like the parameters: those of a direction's number."""
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.fold_in(key, number), max(1, len(leaves)))
    drawn = [jax.random.normal(k, x.shape, _float.wide_dtype(x)) for k, x in zip(keys, leaves, strict=False)]
    return jax.tree.unflatten(treedef, drawn)


def _coordinate(params, place):
    """One at a place of all parameters in a row, zeros elsewhere."""
    leaves, treedef = jax.tree.flatten(params)
    found, start = [], 0
    for x in leaves:
        is_there = jnp.arange(x.size).reshape(x.shape) == place - start
        found.append(is_there.astype(_float.wide_dtype(x)))
        start += x.size
    return jax.tree.unflatten(treedef, found)
