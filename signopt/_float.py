"""Arithmetic in at least float32, and norms that neither overflow nor vanish on the way."""

import functools
import operator
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

UNROLLED = 64  # terms of a sum in a straight line


def wide_dtype(*xs: Any) -> jnp.dtype:
    """The widest floating-point dtype among `xs`, and float32 where that is narrower; also where promotion is strict."""
    dtypes = [jnp.dtype(jnp.result_type(x)) for x in xs]
    wide = [dtype for dtype in dtypes if jnp.issubdtype(dtype, jnp.inexact) and dtype.itemsize > 4]
    return max(wide, key=lambda dtype: dtype.itemsize, default=jnp.dtype(jnp.float32))


def widen(x: Any) -> jax.Array:
    """`x` in at least float32."""
    return jnp.asarray(x).astype(wide_dtype(x))


def unit_of(largest: jax.Array) -> jax.Array:
    """What to divide by before squaring: the largest magnitude, or 1 if that is zero or NaN.

    It stays an eighth below the largest float. XLA divides by multiplying with the inverse, which would be flushed to zero.
    """
    most = jnp.finfo(largest.dtype).max / 8
    return jnp.where(largest > 0, jnp.minimum(largest, most.astype(largest.dtype)), jnp.ones_like(largest))


def rms(tree: Any) -> jax.Array:
    """The root mean square over all entries of a tree, a float32 scalar; 0 for an empty one."""
    leaves = [widen(x) for x in jax.tree.leaves(tree) if jnp.size(x)]
    if not leaves:
        return jnp.zeros([], jnp.float32)
    unit = unit_of(jnp.max(jnp.stack([jnp.max(jnp.abs(x)).astype(jnp.float32) for x in leaves])))
    total = sum(jnp.sum((x / unit.astype(x.dtype)) ** 2).astype(jnp.float32) for x in leaves)
    return unit * jnp.sqrt(total / jnp.float32(sum(x.size for x in leaves)))


def shape(x: Any) -> tuple[int, ...]:
    """The shape of an array, of a number, or of what only stands for an array."""
    return tuple(x.shape) if hasattr(x, "shape") else jnp.shape(x)


def sum_in_order(x: jax.Array) -> jax.Array:
    """The sum along the first axis, from the first entry to the last: the same bits wherever it is compiled."""
    if len(x) <= UNROLLED:
        return functools.reduce(operator.add, list(x))
    return lax.fori_loop(1, len(x), lambda i, total: total + lax.dynamic_index_in_dim(x, i, keepdims=False), x[0])
