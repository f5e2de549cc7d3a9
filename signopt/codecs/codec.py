"""What a codec is, and the arithmetic that all of them share.

Workers that hold the same numbers have to send the same bits, whatever program they run: one device or many, a row alone
or a thousand in a batch. Compilers add floats in an order of their own, and may round a product and a sum once instead of
twice. So sums are taken in a written order here, squares are exact, and so is each product that a decoder computes.
"""

from collections.abc import Callable
import dataclasses
import math
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from signopt import _bits
from signopt import _check

_RADIX = 16  # summands of one step of a sum

Message = Any


@dataclasses.dataclass(frozen=True)
class Codec:
    """How one row of numbers travels.

    Attributes:
      encode: `encode(x, key) -> message`. `x` is float32 of shape (n,), for any n, 0 included. `key` is a random key, or
        None. The message is a tree of arrays with one axis, whose shapes depend on n only: what really travels. For many
        rows, `jax.vmap`.
      decode: `decode(message, like, key) -> x`, float32. `like` is a `jax.ShapeDtypeStruct` of the row and `key` the one
        that `encode` was given.
      random: Whether `encode` needs a key.
      exact: Whether finite numbers come back as they were, so that there is nothing to remember.
      unbiased: Whether they come back on average.
      error: `error(x) -> scalar`, the number e in

        .. math::
          E\\,\\|C(x) - x\\|^2 \\le e(x)\\,\\|x\\|^2,

        with equality where the docstring says so. Below 1 the codec is a contraction with the factor :math:`\\delta = 1 -
        e`, and a memory keeps what it remembers bounded. For an unbiased codec it is the relative variance. None: there
        is no bound, or nobody has said.
    """

    encode: Callable[[jax.Array, jax.Array | None], Message]
    decode: Callable[[Message, Any, jax.Array | None], jax.Array]
    random: bool = False
    exact: bool = False
    unbiased: bool = False
    error: Callable[[jax.Array], jax.Array] | None = None

    def bits(self, shape: tuple[int, ...]) -> int:
        """The size of the message for rows of this shape, read off its arrays, so that padding counts.

        Args:
          shape: (n,) for one row; axes in front of it are more rows.

        Examples:
          >>> import signopt
          >>> signopt.codecs.scaled_sign().bits((1000,)), signopt.codecs.scaled_sign().bits((8, 1000))
          (1032, 8256)
        """

        def message(x):
            return self.encode(x, jax.random.key(0) if self.random else None)

        arrays = jax.tree.leaves(jax.eval_shape(message, jax.ShapeDtypeStruct(shape[-1:], jnp.float32)))
        return math.prod(shape[:-1]) * sum(8 * a.size * a.dtype.itemsize for a in arrays)


def identity() -> Codec:
    """Send float32 numbers as they are; NaN and ±inf count as 0, as in every codec.

    Examples:
      >>> import jax.numpy as jnp, signopt
      >>> codec, x = signopt.codecs.identity(), jnp.array([0.1, jnp.nan])
      >>> codec.decode(codec.encode(x, None), x, None), codec.bits((1000,))
      (Array([0.1, 0. ], dtype=float32), 32000)
    """

    def encode(x, key):
        del key
        return (finite(x, "identity"),)

    def decode(message, like, key):
        del like, key
        return message[0]

    return Codec(encode, decode, exact=True, error=lambda x: jnp.zeros([], jnp.float32))


def finite(x: jax.Array, call: str) -> jax.Array:
    """`x` with zeros in place of NaN and ±inf: an entry without a value costs itself, and no scale."""
    if jnp.ndim(x) != 1:
        raise ValueError(
            f"`{call}(...).encode(x=...)` has to be one row of shape (n,), got the shape {jnp.shape(x)}. Send many rows by "
            "`jax.vmap`."
        )
    return jnp.where(jnp.isfinite(x), x, jnp.zeros_like(x))


def require_block(block: int | None, call: str) -> None:
    """Raise if `block` is neither None nor a number of entries."""
    if block is not None:
        _check.count(block, call, "block")


def blocks(x: jax.Array, block: int | None) -> jax.Array:
    """A row as blocks of entries that share a scale, (number, size), filled up with zeros; None for one block."""
    number, size = _blocks(x.shape[0], block)
    return jnp.pad(x, (0, number * size - x.shape[0])).reshape(number, size)


def sizes(n: int, block: int | None) -> np.ndarray:
    """How many entries of the row each block has, as float32: the last one may have fewer."""
    number, size = _blocks(n, block)
    return np.minimum(size, n - size * np.arange(number)).astype(np.float32)


def row(entries: jax.Array, like: Any) -> jax.Array:
    """Blocks back to the row that they were cut from."""
    return entries.reshape(-1)[: like.shape[0]]


def spread(scales: jax.Array, like: Any, block: int | None) -> jax.Array:
    """The scale of each entry of a row, from those of its blocks."""
    number, size = _blocks(like.shape[0], block)
    return row(jnp.broadcast_to(scales[:, None], (number, size)), like)


def _blocks(n, block):
    size = max(1, n if block is None else min(block, n))
    return -(-n // size), size


def total(x: jax.Array) -> jax.Array:
    """The sum along the last axis, added in an order that depends on its length alone."""
    # XLA on CPUs writes down whatever has more than fifteen readers. That shall be the halves of the first sum, not the row.
    halves, n = [x], x.shape[-1]
    while n > 1:
        radix = min(_RADIX, n)
        step = -(-n // radix)
        halves = [jnp.pad(half, [(0, 0)] * (x.ndim - 1) + [(0, radix * step - n)]) for half in halves]
        parts = [_added([half[..., i * step : (i + 1) * step] for half in halves]) for i in range(radix)]
        is_first = n == x.shape[-1] and step > 1
        halves = [_added(parts[:8]), _added(parts[8:])] if is_first else [_added(parts)]
        n = step
    return _added(halves)[..., 0] if x.shape[-1] else jnp.sum(x, axis=-1)


def _added(parts: list[jax.Array]) -> jax.Array:
    """The sum of arrays: of neighbours, then of those sums."""
    while len(parts) > 1:
        parts = [a + b for a, b in zip(parts[::2], parts[1::2], strict=False)] + parts[len(parts) // 2 * 2 :]
    return parts[0]


def mean(x: jax.Array, counts: jax.Array | np.ndarray) -> jax.Array:
    """The sum along the last axis over `counts`; a power of two keeps it from overflowing."""
    unit = 2.0 ** -math.ceil(math.log2(max(x.shape[-1], 1)))
    return divide(total(x * jnp.float32(unit)), jnp.maximum(jnp.asarray(counts, jnp.float32), 1) * jnp.float32(unit))


def divide(x: jax.Array, by: jax.Array | float) -> jax.Array:
    """`x` >= 0 over a positive constant, rounded once.

    XLA multiplies by the reciprocal of what it knows to be constant, and may fuse that product with a sum. A choice that
    depends on `x` is no constant.
    """
    return x / jnp.where(x >= 0, jnp.asarray(by, jnp.float32), jnp.ones_like(x))


def largest(x: jax.Array) -> jax.Array:
    """The largest magnitude along the last axis; 0 of nothing."""
    return jnp.max(jnp.abs(x), axis=-1, initial=0)


def over(x: jax.Array, scale: jax.Array) -> jax.Array:
    """`x` over scales >= 0, and 0 over a scale of 0. Take the magnitude before anything is added to it or taken away.

    Where all divide by one number, XLA multiplies by its reciprocal, and in a batch it does not. So everybody does. The
    magnitude of a product cannot be fused with a sum.
    """
    shift = jnp.where(scale >= 2.0**64, jnp.float32(2.0**-64), jnp.float32(1))  # or the reciprocal may vanish
    safe = jnp.where(scale > 0, scale * shift, jnp.ones_like(scale))
    return (x * shift) * (1 / safe)


def near_one(x: jax.Array) -> jax.Array:
    """A row over the power of two that brings its largest entry into [1, 2): relative errors stay, squares fit."""
    unit = lax.bitcast_convert_type(largest(x), jnp.uint32) & jnp.uint32(0x7F800000)
    return over(x, lax.bitcast_convert_type(unit, jnp.float32))


def bounded(x: jax.Array) -> jax.Array:
    """`x` with the largest float32 in place of infinity."""
    limit = jnp.finfo(x.dtype).max
    return jnp.clip(x, -limit, limit)


def mean_square_root(x: jax.Array, counts: np.ndarray) -> jax.Array:
    """The root mean square along the last axis to 2⁻¹² of itself, and no less than that of the largest entry alone.

    Entries are rounded to 12 bits, whose squares are exact in float32.
    """
    unit = largest(x)
    parts = jnp.abs(over(x, unit[..., None]))
    bits = (lax.bitcast_convert_type(parts, jnp.uint32) + jnp.uint32(0x800)) & jnp.uint32(0xFFFFF000)
    return unit * jnp.sqrt(mean(jnp.square(lax.bitcast_convert_type(bits, jnp.float32)), counts))


def round_up(scale: jax.Array) -> jax.Array:
    """The least bfloat16 that is no smaller than a scale >= 0.

    A number of 16 bits times a scale of 8 is exact in float32.
    """
    bits = (lax.bitcast_convert_type(scale, jnp.uint32) + jnp.uint32(0xFFFF)) >> 16
    return lax.bitcast_convert_type(jnp.minimum(bits, 0x7F7F).astype(jnp.uint16), jnp.bfloat16)


def round_at_random(x: jax.Array, key: jax.Array) -> jax.Array:
    """Numbers >= 0 up or down to whole ones, right on average; odds are multiples of 2⁻²³."""
    down = jnp.floor(x)
    return down + (jax.random.uniform(key, x.shape, jnp.float32) < x - down).astype(jnp.float32)


def pack(codes: jax.Array, width: int) -> tuple[jax.Array, ...]:
    """Whole numbers below 2^width, of which each takes `width` bits: as 16, 8 and 4 of them at once, and the rest singly.

    Args:
      codes: (n,), of any unsigned type that holds them.
      width: 0 to 32.
    """
    words = []
    for part, first in _parts(width):
        each = codes >> first & ((1 << part) - 1)
        if part >= 8:
            each = each.astype(f"uint{part}")
        elif part == 4:  # the first half of them in low bits, the second in high ones
            half = -(-each.shape[0] // 2)
            each = jnp.pad(each.astype(jnp.uint8), (0, 2 * half - each.shape[0]))
            each = each[:half] | each[half:] << 4
        else:
            each = _bits.pack(each.astype(bool))
        words.append(each)
    return tuple(words)


def unpack(words: tuple[jax.Array, ...], width: int, n: int) -> jax.Array:
    """The n numbers that `pack` was given, as int32."""
    codes = jnp.zeros((n,), jnp.int32)
    for (part, first), each in zip(_parts(width), words, strict=True):
        if part == 4:
            each = jnp.concatenate([each & 15, each >> 4])[:n]
        elif part == 1:
            each = _bits.unpack(each)[:n]
        codes = codes | each.astype(jnp.int32) << first
    return codes


def _parts(width):
    parts, first = [], 0
    for part in (16, 8, 4, 1):
        while width - first >= part:
            parts.append((part, first))
            first += part
    return parts


def share_of_square(lost: jax.Array, x: jax.Array) -> jax.Array:
    """`lost` / ‖x‖², and 0 for a row of zeros."""
    return over(jnp.sum(lost), jnp.sum(jnp.square(x)))
