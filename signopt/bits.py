"""Eight signs to a byte, and arithmetic on the packed bytes themselves.

Bit k of byte j stands for coordinate 8 j + k. Votes are counted without unpacking them: a *bit-sliced* counter keeps
the count of coordinate i in bit i of several planes, the lowest bits of all counts in plane 0, the next in plane 1 and
so on, so one instruction on a vector register of b bits counts for b coordinates at once.
"""

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, UInt8

_UNROLLED = 128  # ballots that one straight-line program counts; above, a loop over groups of 15
_GROUP = 15  # fills four planes exactly


def pack(bits: Bool[Array, "... n"]) -> UInt8[Array, "... b"]:
    """Booleans to bytes along the last axis; the last byte is filled up with zeros.

    Examples:
      >>> import jax.numpy as jnp
      >>> pack(jnp.array([True, False, True])).tolist()
      [5]
    """
    return jnp.packbits(bits, axis=-1, bitorder="little")


def unpack(packed: UInt8[Array, "... b"]) -> UInt8[Array, "... 8*b"]:
    """Bytes to zeros and ones along the last axis: the inverse of `pack`.

    Examples:
      >>> import jax.numpy as jnp
      >>> unpack(jnp.array([5], jnp.uint8)).tolist()
      [1, 0, 1, 0, 0, 0, 0, 0]
    """
    return jnp.unpackbits(packed, axis=-1, bitorder="little")


def count(ballots: UInt8[Array, "m n"]) -> list[UInt8[Array, " n"]]:
    """Count the ones among m packed ballots, coordinate by coordinate.

    Args:
      ballots: m >= 1 packed ballots.

    Returns:
      The planes of the counts, lowest bit first; enough of them to hold m.

    Examples:
      >>> import jax.numpy as jnp
      >>> ones, twos = count(jnp.array([[0b011], [0b001], [0b001]], jnp.uint8))
      >>> [int(o) + 2 * int(t) for o, t in zip(unpack(ones)[:3], unpack(twos)[:3])]
      [3, 1, 0]
    """
    if ballots.shape[0] <= _UNROLLED:
        return _count_unrolled(list(ballots))
    groups = -(-ballots.shape[0] // _GROUP)
    missing = groups * _GROUP - ballots.shape[0]
    grouped = jnp.pad(ballots, ((0, missing), (0, 0))).reshape(groups, _GROUP, -1)
    zero = ballots[0] ^ ballots[0]  # varies over the axes that the ballots vary over, which a constant does not
    start = [zero] * ballots.shape[0].bit_length()

    def add_group(planes, group):
        return _add(planes, _count_unrolled(list(group))), None

    return lax.scan(add_group, start, grouped)[0]


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
