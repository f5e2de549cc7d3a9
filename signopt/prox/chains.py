"""Exact one-dimensional total-variation denoising, in vector operations only.

Take any level :math:`c`. Which entries of the solution lie above it is a two-label problem with costs :math:`c - y_i`: a
minimum cut. So a solution is found by cutting. Every segment has the mean of its data as its level. It is cut where its
entries would rather lie on different sides of that, and this is repeated until no entry wants to move.

A round costs a few scans over the data, for all segments at once. Most segments are cut near their middle, so a million
points take about twenty rounds. Data that grow geometrically take more, but the range of the floats bounds that too.

The textbook algorithms (the taut string, Condat's, Johnson's) are sequential. That is right for one core, but an
accelerator cannot use it, and `jax.vmap` makes it quadratic, because it copies their buffers in every iteration.
"""

from collections.abc import Callable
import math
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float

from signopt import _axis


@jax.jit
def denoise(y: Float[Array, "*rows n"], strength: Float[Array, ""] | float) -> Float[Array, "*rows n"]:
    r"""Minimize the distance to `y` plus the total variation of every row.

    .. math::
      \operatorname*{argmin}_x \tfrac12 \|x - y\|_2^2 + \lambda \sum_i |x_{i+1} - x_i|

    Args:
      y: Rows of data in float32 or float64.
      strength: :math:`\lambda \ge 0`; may be traced.

    Returns:
      The minimizer. Within a segment of equal values it is the mean of the data, plus or minus what the two neighbours
      pull. It is differentiated in this form, so gradients with respect to `y` and `strength` are exact wherever the
      segments do not change. An infinite entry stays, and pulls at its neighbours; NaN shows in all of its row.

    References:
      Hochbaum, `An efficient algorithm for image segmentation, Markov random fields and related problems
      <https://doi.org/10.1145/502090.502093>`_, 2001, for the cut at every level. We cut all segments of a chain at
      once, and find a cut by a scan: the messages of the two-label problem are :math:`D \mapsto \operatorname{clip}(D +
      a, l, h)`, and two of these make another.
    """
    if y.size == 0:
        return y
    y, strength = _axis.vary_alike(y, jnp.asarray(strength, y.dtype))
    safe, scale = _without_overflow(y)
    flat = safe.reshape(-1)
    strengths = jnp.broadcast_to(scale * strength, y.shape).reshape(-1)
    strengths = jnp.minimum(strengths, jnp.finfo(y.dtype).max / 8)  # beyond it rows are constant anyway
    row_end = (jnp.arange(1, flat.size + 1) % y.shape[-1]) == 0
    row_end, flat = _axis.vary_alike(row_end, flat)
    is_end, pull = _segments(lax.stop_gradient(flat), lax.stop_gradient(strengths), row_end)
    found = _level(flat, strengths, is_end, pull).reshape(y.shape) / scale
    found = jnp.where(jnp.isinf(y), y, found)
    return jnp.where(jnp.any(jnp.isnan(y), axis=-1, keepdims=True), jnp.nan, found)


def _without_overflow(y):
    """Rows whose sums are finite, and the power of two that each was multiplied by: 1 but for rows near the largest float.

    An infinite entry becomes four times as large as any other, and NaN becomes 0.
    """
    limit = float(jnp.finfo(y.dtype).max) / (8 * y.shape[-1])
    largest = jnp.max(jnp.where(jnp.isfinite(y), jnp.abs(y), 0), axis=-1, keepdims=True)
    down = 2.0 ** -math.ceil(math.log2(32 * y.shape[-1]))
    scale = lax.stop_gradient(jnp.where(largest > limit / 4, jnp.full_like(largest, down), jnp.ones_like(largest)))
    safe = jnp.where(jnp.isinf(y), jnp.sign(y) * limit, jnp.where(jnp.isnan(y), 0, y * scale))
    return safe, scale


def _segments(y, strengths, row_end):
    """Where segments end, and how many neighbours pull each entry up (at its right or left end), minus those down."""

    def cut(carry):
        is_end, pull, _ = carry
        above = _above_level(y, strengths, is_end, pull, _level(y, strengths, is_end, pull))
        rise = jnp.diff(above.astype(pull.dtype), append=above[-1:].astype(pull.dtype))
        rise = jnp.where(is_end, 0, rise)  # +1: the right neighbour lies higher now
        pull = pull + rise - jnp.roll(rise, 1)
        return is_end | (rise != 0), pull, jnp.any(rise != 0)

    start = (row_end, jnp.zeros_like(y), row_end[-1])  # the last entry ends a row: True
    is_end, pull, _ = lax.while_loop(lambda carry: carry[2], cut, start)
    return is_end, pull


def _level(y, strengths, is_end, pull):
    """For every entry: the best common value of its segment."""
    first = jnp.roll(is_end, 1).at[0].set(True)

    def add(left, right):
        return (
            left[0] | right[0],
            *(jnp.where(right[0], r, le + r) for le, r in zip(left[1:], right[1:], strict=True)),
        )

    no, zero = jnp.zeros_like(first[0]), jnp.zeros_like(y[0])
    _, total, pulled, count = _scan(add, (first, y, pull, jnp.ones_like(y)), (no, zero, zero, zero))
    level = (total + strengths * pulled) / count
    return _from_the_right(is_end, level)


def _above_level(y, strengths, is_end, pull, level):
    """For every entry: whether it lies above its segment's level in the best two-label solution."""
    bound = jnp.where(is_end, 0, strengths)

    def follow(left, right):
        return left[0] + right[0], jnp.clip(left[1] + right[0], *right[1:]), jnp.clip(left[2] + right[0], *right[1:])

    cost = (level - y) - strengths * pull
    far = jnp.full_like(y[0], jnp.inf)
    start, low, high = _scan(follow, (cost, -bound, bound), (jnp.zeros_like(far), -far, far))
    message = jnp.clip(start, low, high)  # what entry i tells i + 1: its cost of lying above, within what a cut costs
    before = jnp.roll(message, 1).at[0].set(0)
    wish = before + cost
    decided = is_end | (jnp.abs(wish) > bound)
    return _from_the_right(decided, wish < 0)


def _from_the_right(known, values):
    """Every entry's own value where `known`, else that of the next known entry to its right."""

    def take(right, left):
        return right[0] | left[0], jnp.where(left[0], left[1], right[1])

    return _scan(take, (known, values), (jnp.zeros_like(known[0]), jnp.zeros_like(values[0])), reverse=True)[1]


def _scan(op: Callable[[Any, Any], Any], elements: Any, identity: Any, reverse: bool = False, block: int = 128) -> Any:
    """`lax.associative_scan` in blocks: the same result from a program that stays small however long the input.

    Blocks are reduced side by side, entry by entry; their totals are scanned by the same rule; then every block starts
    from the total of those before it. Two passes over the data and `2 * block` steps per level.
    """
    if reverse:
        flipped = jax.tree.map(jnp.flip, elements)
        return jax.tree.map(jnp.flip, _scan(op, flipped, identity, block=block))
    length = jax.tree.leaves(elements)[0].shape[0]
    step = lambda carry, element: (op(carry, element),) * 2  # noqa: E731
    if length <= block:
        return lax.scan(step, identity, elements)[1]

    num_blocks = -(-length // block)
    pad = lambda x, fill: jnp.concatenate([x, jnp.full(num_blocks * block - length, fill, x.dtype)])  # noqa: E731
    columns = jax.tree.map(lambda x, fill: pad(x, fill).reshape(num_blocks, block).T, elements, identity)
    none_yet = jax.tree.map(lambda fill: jnp.full(num_blocks, fill, fill.dtype), identity)
    totals = lax.scan(lambda carry, element: (op(carry, element), None), none_yet, columns)[0]
    upto = _scan(op, totals, identity, block=block)
    before = jax.tree.map(lambda x, fill: jnp.roll(x, 1).at[0].set(fill), upto, identity)
    out = lax.scan(step, before, columns)[1]
    return jax.tree.map(lambda x: x.T.reshape(-1)[:length], out)
