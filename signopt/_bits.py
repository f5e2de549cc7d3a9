"""Eight signs to a byte, and arithmetic on the packed bytes themselves.

Which coordinates share a word is the platform's business (`lanes`). On CPUs and GPUs bit k of word j stands for the
coordinate 8 j + k. A TPU computes on tiles of 8 x 128, and a last axis of eight would be filled up to 128 there; so bit k of
word 128 t + l stands for the coordinate 1024 t + 128 k + l. A last tile that is not full is packed as on a CPU. So n
coordinates are ceil(n / 8) words everywhere.

A word of one byte holds a bit for each of its coordinates, a word of two bytes two, bits k and 8 + k, so that both are read
off the same number at once, and every kernel works on one array.

Votes are counted without unpacking them: a *bit-sliced* counter keeps the count of coordinate i in bit i of several
planes, the lowest bits of all counts in plane 0, the next in plane 1 and so on, so one instruction on a vector register of
b bits counts for b coordinates at once.
"""

from collections.abc import Callable, Iterator
import contextlib
import functools
import operator

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Num, UInt, UInt8, UInt32

_UNROLLED = 256  # ballots that one straight-line program counts
_GROUP = 128  # at most as many at once in the loop that counts more
_VECTOR = 64  # words

_platform: str | None = None  # see `as_on`


def lanes() -> int:
    """How many words hold a tile, where this is traced: 1, or 128 on a TPU."""
    return 128 if (_platform or jax.default_backend()) == "tpu" else 1


def tile() -> int:
    """The coordinates of a tile: 8, or 1,024 on a TPU. Leaves start at multiples of it."""
    return 8 * lanes()


@contextlib.contextmanager
def as_on(platform: str) -> Iterator[None]:
    """Trace with the layout of another platform: to compile for a machine that is not here. No trace may be cached."""
    global _platform
    before, _platform = _platform, platform
    try:
        yield
    finally:
        _platform = before


def pack(*planes: Bool[Array, "... n"]) -> UInt[Array, "... b"]:
    """Booleans to words along the last axis; the last word is filled up with zeros.

    Args:
      *planes: One, or two of the same shape.

    Returns:
      uint8 for one plane, uint16 for two.

    Examples:
      >>> import jax.numpy as jnp
      >>> pack(jnp.array([True, False, True])).tolist()
      [5]
      >>> pack(jnp.array([True, False, True]), jnp.array([False, False, True])).tolist()
      [1029]
    """
    size = planes[0].shape[-1]
    full = size // tile() * tile()
    if full == size:
        return _pack_whole(planes, lanes())
    # What is left over apart: padding all of it would cost a test for each.
    left = -(-(size - full) // 8)
    behind = [(0, 0)] * (planes[0].ndim - 1) + [(0, full + 8 * left - size)]
    rest = [jnp.pad(plane[..., full:], behind) for plane in planes]
    words = [_pack_whole(rest, lanes() if left == lanes() else 1)]
    if full:
        words.insert(0, _pack_whole([plane[..., :full] for plane in planes], lanes()))
    return jnp.concatenate(words, axis=-1)


def pack_tests(flat: Num[Array, " n"], *tests: Callable[[jax.Array], jax.Array]) -> UInt[Array, " b"]:
    """Pack what elementwise tests, False at zero, say of a vector; the last tile is filled up.

    On a TPU the numbers are laid out in tiles before they are tested: a vector of booleans would be written down first.
    """
    if lanes() == 1:
        return pack(*(test(flat) for test in tests))
    full = flat.size // tile() * tile()
    parts = [flat[:full], jnp.pad(flat[full:], (0, -flat.size % tile()))]
    tiles = [part.reshape(-1, 8, lanes()) for part in parts if part.size]
    words = [_pack_tiles([test(x) for test in tests], 1).reshape(-1) for x in tiles]
    return jnp.concatenate([jnp.zeros([0], f"uint{8 * len(tests)}"), *words])


def unpack_tiles(words: UInt[Array, " b"], plane: int = 0) -> UInt8[Array, "..."]:
    """What `unpack` returns of whole tiles, in any shape of the same order, so that it is reshaped only as floats."""
    if lanes() == 1:
        return unpack(words, plane)
    tiles = (words >> (8 * plane)).astype(jnp.uint8).reshape(-1, 1, lanes())
    return (tiles >> lax.broadcasted_iota(jnp.uint8, (1, 8, 1), 1)) & jnp.uint8(1)


def unpack(words: UInt[Array, "... b"], plane: int = 0) -> UInt8[Array, "... 8*b"]:
    """Words to the zeros and ones of a plane along the last axis: the inverse of `pack`.

    Examples:
      >>> import jax.numpy as jnp
      >>> unpack(jnp.array([5], jnp.uint8)).tolist()
      [1, 0, 1, 0, 0, 0, 0, 0]
    """
    words = (words >> (8 * plane)).astype(jnp.uint8)
    in_tiles = words.shape[-1] // lanes() * lanes()
    if lanes() == 1 or not in_tiles:
        return jnp.unpackbits(words, axis=-1, bitorder="little")
    tiles = words[..., :in_tiles].reshape(*words.shape[:-1], -1, 1, lanes())
    shifts = lax.broadcasted_iota(jnp.uint8, (1,) * (tiles.ndim - 2) + (8, 1), tiles.ndim - 2)
    bits = ((tiles >> shifts) & jnp.uint8(1)).reshape(*words.shape[:-1], 8 * in_tiles)
    if in_tiles == words.shape[-1]:
        return bits
    return jnp.concatenate([bits, jnp.unpackbits(words[..., in_tiles:], axis=-1, bitorder="little")], axis=-1)


def count(ballots: UInt[Array, "m n"]) -> list[UInt8[Array, " n"]]:
    """Count the ones that m packed ballots cast for each coordinate, in one plane or two.

    Args:
      ballots: m >= 1 packed ballots.

    Returns:
      The planes of the counts, lowest bit first; enough of them to hold m, or 2 m where ballots have two planes.

    Examples:
      >>> import jax.numpy as jnp
      >>> ones, twos = count(jnp.array([[0b011], [0b001], [0b001]], jnp.uint8))
      >>> [int(o) + 2 * int(t) for o, t in zip(unpack(ones)[:3], unpack(twos)[:3])]
      [3, 1, 0]
    """
    planes = _count_words(ballots)
    if ballots.dtype == jnp.uint8:
        return planes
    low, high = ([(plane >> shift).astype(jnp.uint8) for plane in planes] for shift in (0, 8))
    return _add([*low, jnp.zeros_like(low[0])], high)


def at_least(planes: list[UInt8[Array, " n"]], threshold: int | Int[Array, ""]) -> UInt8[Array, " n"]:
    """Compare bit-sliced counts with one number.

    `count >= threshold` is the carry out of `count + ~threshold + 1`, and a carry is the majority of three bits.

    Args:
      planes: Counts, as `count` returns them.
      threshold: Not negative, and no more than the planes can hold.

    Returns:
      Packed booleans: 1 where the count is at least `threshold`.
    """
    carry = jnp.full_like(planes[0], 0xFF)
    for i, plane in enumerate(planes):
        complement = jnp.asarray(((threshold >> i) & 1) - 1).astype(jnp.uint8)
        carry = _majority(plane, carry, complement)
    return carry


def widened(words: UInt[Array, "... n"]) -> UInt[Array, "... m"]:
    """The same bits in words of four bytes, which a CPU counts faster, filled up with zeros. On a TPU as they are."""
    together = 4 // words.dtype.itemsize if lanes() == 1 else 1
    if together == 1:
        return words
    filled = [(0, 0)] * (words.ndim - 1) + [(0, -words.shape[-1] % together)]
    words = jnp.pad(words, filled).reshape(*words.shape[:-1], -1, together)
    return lax.bitcast_convert_type(words, jnp.uint32)


def ones(words: UInt[Array, "... n"]) -> UInt32[Array, "..."]:
    """The number of ones along the last axis, up to 2**32 - 1.

    Examples:
      >>> import jax.numpy as jnp
      >>> ones(jnp.array([[5, 1], [0, 255]], jnp.uint8)).tolist()
      [3, 8]
    """
    return jnp.sum(lax.population_count(words).astype(jnp.uint32), axis=-1, dtype=jnp.uint32)


def _pack_whole(planes, lanes):
    """Pack where tiles are full."""
    batch, size = planes[0].shape[:-1], planes[0].shape[-1]
    tiles = (*batch, size // 8, 8) if lanes == 1 else (*batch, size // (8 * lanes), 8, lanes)
    return _pack_tiles([plane.reshape(tiles) for plane in planes], len(batch) + 1).reshape(*batch, size // 8)


def _pack_tiles(planes, axis):
    """Pack along an axis of eight.

    One sum for all planes; `jnp.packbits` of each would read twice what they are computed from.
    """
    dtype = jnp.dtype(f"uint{8 * len(planes)}")
    others = [i for i in range(planes[0].ndim) if i != axis]

    def spread(plane, first):
        return plane.astype(dtype) << lax.expand_dims(jnp.arange(first, first + 8, dtype=dtype), others)

    return jnp.sum(functools.reduce(operator.or_, map(spread, planes, (0, 8))), axis=axis, dtype=dtype)


def _count_words(ballots):
    """Count the ones at each place of a word."""
    if ballots.shape[0] <= _UNROLLED:
        return _count_unrolled(list(ballots))
    voters, size = ballots.shape
    groups = -(-voters // _GROUP)
    # Also to whole vectors: XLA's loop over an odd size goes word by word.
    padded = jnp.pad(ballots, ((0, -voters % groups), (0, -size % _VECTOR)))
    zero = padded[0] ^ padded[0]  # varies over the axes that the ballots vary over, which a constant does not

    def add_group(planes, group):
        return _add(planes, _count_unrolled(list(group))), None

    planes, _ = lax.scan(add_group, [zero] * voters.bit_length(), padded.reshape(groups, -1, padded.shape[1]))
    return [plane[:size] for plane in planes]


def _count_unrolled(ones):
    """A tree of carry-save adders: three bits of one weight become one of it and one of the next."""
    planes = []
    while ones:
        carries = []
        while len(ones) > 1:
            a, b, *rest = ones
            c, *rest = rest or [jnp.zeros_like(a)]
            ones = [*rest, a ^ b ^ c]
            carries.append(_majority(a, b, c))
        planes += ones
        ones = carries
    return planes


def _add(a, b):
    """Bit-sliced a + b, of as many planes as a."""
    carry = jnp.zeros_like(a[0])
    planes = []
    for i, x in enumerate(a):
        y = b[i] if i < len(b) else jnp.zeros_like(x)
        planes.append(x ^ y ^ carry)
        carry = _majority(x, y, carry)
    return planes


def _majority(a: jax.Array, b: jax.Array, c: jax.Array) -> jax.Array:
    return (a & b) | ((a | b) & c)
