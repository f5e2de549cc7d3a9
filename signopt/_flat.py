"""A tree as one flat vector, cut into a row for each server.

A leaf starts at a multiple of `align` entries: 1 for numbers, a tile for packed signs (the default: 8, so that they start a
byte, or 1,024 on a TPU), or tiles that are whole blocks where a block has a number of its own. Large leaves come first, each by itself; small ones of one dtype follow, joined. A kernel for each leaf
costs compile time, which thousands of small leaves would feel; joining costs a copy, which large leaves would.

Sizes and places are Python integers, known when a step is traced, so nothing here counts parameters in 32 bits.
"""

from collections.abc import Callable
import itertools
import math
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int8, Num, UInt
import numpy as np

from signopt import _bits
from signopt import _float

_SMALL = 2**16  # leaves with fewer entries are joined


def size(tree: Any, align: int | None = None) -> int:
    """The entries of the flat vector, those that fill up included."""
    align = align or _bits.tile()
    return sum(_aligned(x, align) for x in jax.tree.leaves(tree))


def row_size(entries: int, num_rows: int, align: int | None = None) -> int:
    """The entries of a row: as few as hold all `entries` in `num_rows` rows, in multiples of `align`."""
    align = align or _bits.tile()
    return -(-entries // (num_rows * align)) * align


def layout(tree: Any, align: int | None = None) -> list[tuple[int, int]]:
    """Where the leaves lie: the index of each that has entries, and its first entry, in the order of the vector."""
    leaves, align = jax.tree.leaves(tree), align or _bits.tile()
    order = [i for group in groups(leaves) for i in group]
    starts = itertools.accumulate((_aligned(leaves[i], align) for i in order), initial=0)
    return list(zip(order, starts, strict=False))


def groups(leaves: list) -> list[list[int]]:
    """Which leaves lie together, in the order of the vector: each large one alone, the small ones by dtype."""
    large, small = [], {}
    for i, x in enumerate(leaves):
        if jnp.size(x) >= _SMALL:
            large.append([i])
        elif jnp.size(x):
            small.setdefault(jnp.result_type(x), []).append(i)
    return large + list(small.values())


def joined(tree: Any, align: int | None = None) -> list[jax.Array]:
    """The vector in few pieces, in order: what one kernel each can work on. A large leaf is not filled up."""
    leaves, align = jax.tree.leaves(tree), align or _bits.tile()
    return [_join([leaves[i] for i in group], align) for group in groups(leaves)]


def rows(tree: Any, num_rows: int, align: int | None = None) -> Float[Array, "rows row"]:
    """A tree as rows of numbers in at least float32, with zeros where nothing lies."""
    align = align or _bits.tile()
    parts = [_float.widen(part) for part in joined(tree, align)]
    padded = [part if part.size % align == 0 else jnp.pad(part, (0, -part.size % align)) for part in parts]
    dtype = jnp.result_type(*parts) if parts else jnp.dtype(jnp.float32)
    flat = jnp.concatenate([x.astype(dtype) for x in padded]) if padded else jnp.zeros([0], dtype)
    return cut(flat, num_rows, align)


def cut(flat: jax.Array, num_rows: int, align: int | None = None, fill: int = 0) -> jax.Array:
    """A vector as rows, filled up at the end."""
    row = row_size(flat.size, num_rows, align)
    missing = num_rows * row - flat.size
    whole = flat if not missing else jnp.pad(flat, (0, missing), constant_values=flat.dtype.type(fill))
    return whole.reshape(num_rows, row)


def tree(numbers: Float[Array, "rows row"], like: Any, align: int | None = None) -> Any:
    """The tree in rows of numbers, in the shapes and dtypes of `like`: the inverse of `rows`."""
    flat, leaves, parts, start, align = numbers.reshape(-1), jax.tree.leaves(like), [], 0, align or _bits.tile()
    for group in groups(leaves):
        length = sum(_aligned(leaves[i], align) for i in group)
        parts.append(lax.slice_in_dim(flat, start, start + length))
        start += length
    return split(parts, like, align)


def split(parts: list[jax.Array], like: Any, align: int | None = None) -> Any:
    """The tree in pieces of its vector, one for each group of leaves, in the shapes and dtypes of `like`."""
    align = align or _bits.tile()
    leaves, treedef = jax.tree.flatten(like)
    found = {i: jnp.zeros(jnp.shape(x), jnp.result_type(x)) for i, x in enumerate(leaves) if not jnp.size(x)}
    for group, part in zip(groups(leaves), parts, strict=True):
        flat = part.astype(jnp.result_type(leaves[group[0]]))
        starts = itertools.accumulate((_aligned(leaves[i], align) for i in group), initial=0)
        for i, first in zip(group, starts, strict=False):
            found[i] = _slice(flat, first, jnp.size(leaves[i])).reshape(jnp.shape(leaves[i]))
    return jax.tree.unflatten(treedef, [found[i] for i in range(len(leaves))])


# ---- packed --------------------------------------------------------------------------------------------------------


def pack(tree: Any, *tests: Callable[[jax.Array], Bool[Array, "..."]], align: int | None = None) -> UInt[Array, " n"]:
    """The vector as packed words, with a plane for each test.

    Args:
      tree: Arrays.
      *tests: One or two elementwise functions from an array to booleans, False at zero.
      align: Leaves start at multiples of so many entries; whole tiles.

    Returns:
      uint8 for one test, uint16 for two; zeros where a leaf does not fill its last word.
    """
    align, words = align or _bits.tile(), []
    for flat in joined(tree, align):
        words.append(_bits.pack_tests(flat, *tests))
        missing = -flat.size % align // _bits.tile() * _bits.lanes()
        if missing:
            words.append(jnp.zeros([missing], words[-1].dtype))
    return jnp.concatenate([jnp.zeros([0], f"uint{8 * len(tests)}"), *words])


def unpack(
    words: UInt[Array, " n"],
    like: Any,
    sizes: Float[Array, " blocks"] | None = None,
    *,
    block: int = 1,
    align: int | None = None,
) -> Any:
    """The tree of votes in packed words: -1 where no plane is set, +1 where all are, 0 where one of two is.

    Args:
      words: Of one or two planes, laid out as `pack` does.
      like: The tree that was packed.
      sizes: What to multiply the votes by: a number for each `block` entries.
      block: Divides `align`.
      align: As in `pack`.

    Returns:
      A tree like `like`, in its shapes and dtypes.
    """
    leaves, parts, start, align = jax.tree.leaves(like), [], 0, align or _bits.tile()
    for group in groups(leaves):
        length = sum(_aligned(leaves[i], align) for i in group)
        own = lax.slice_in_dim(words, start // 8, (start + length) // 8)
        if _bits.lanes() > 1:
            votes = _votes(own, jnp.result_type(leaves[group[0]]) if sizes is None else jnp.int8)
        else:
            votes = _votes(own) if len(group) == 1 else _votes_once(own)
        parts.append(votes if sizes is None else _times(votes, sizes, start, block))
        start += length
    return split(parts, like, align)


def times(tree: Any, sizes: Float[Array, " blocks"], block: int, align: int) -> Any:
    """A tree whose every `block` entries are multiplied by a number of their own."""
    parts, start = [], 0
    for part in joined(tree, align):
        padded = jnp.pad(part, (0, -part.size % align))
        parts.append(_times(padded, sizes, start, block))
        start += padded.size
    return split(parts, tree, align)


def repeat(pattern: UInt[Array, " p"], like: Any, align: int | None = None) -> UInt[Array, " n"]:
    """Packed words in which every leaf holds the same over and over; one word alone stays one, to be broadcast."""
    align = align or _bits.tile()
    if pattern.size == 1:
        return pattern
    if align // 8 % pattern.size == 0:
        return jnp.tile(pattern, size(like, align) // (8 * pattern.size))
    leaves = jax.tree.leaves(like)
    lengths = [_aligned(leaves[i], align) // 8 for i, _ in layout(like, align)]
    longest = jnp.tile(pattern, -(-max(lengths, default=0) // pattern.size))
    return jnp.concatenate([jnp.zeros([0], pattern.dtype), *(longest[:length] for length in lengths)])


def used(like: Any, align: int | None = None) -> UInt[Array, " n"]:
    """Packed words that are one wherever a leaf has an entry."""
    align, words = align or _bits.tile(), [jnp.zeros([0], jnp.uint8)]
    leaves = jax.tree.leaves(like)
    for i, _ in layout(like, align):
        whole = jnp.size(leaves[i]) // _bits.tile() * _bits.lanes()
        words.append(jnp.full([whole], 0xFF, jnp.uint8))
        tail = np.arange(8 * whole, _aligned(leaves[i], align)) < jnp.size(leaves[i])
        words.append(
            jnp.asarray(np.packbits(tail.reshape(-1, 8, _bits.lanes()), axis=1, bitorder="little").reshape(-1))
        )
    return jnp.concatenate(words)


def block_sizes(like: Any, block: int, align: int) -> np.ndarray:
    """How many entries of a leaf lie in each block; 1 where none does, to be divided by."""
    leaves = jax.tree.leaves(like)
    found = [np.zeros(0, np.float32)]
    for i, _ in layout(like, align):
        first = np.arange(0, _aligned(leaves[i], align), block)
        found.append(np.clip(jnp.size(leaves[i]) - first, 1, block).astype(np.float32))
    return np.concatenate(found)


# ---- one group -----------------------------------------------------------------------------------------------------


def _join(group: list, align: int) -> jax.Array:
    """The leaves of a group in one array, each from a multiple of `align` on."""
    if len(group) == 1:
        return group[0].reshape(-1)
    parts = []
    for x in group:
        parts += [x.reshape(-1), jnp.zeros([_aligned(x, align) - x.size], x.dtype)]
    return lax.optimization_barrier(jnp.concatenate(parts))


def _aligned(x: Any, align: int) -> int:
    return -(-math.prod(jnp.shape(x)) // align) * align


def _votes(words: UInt[Array, " n"], dtype: Any = jnp.int8) -> Num[Array, " 8*n"]:
    ones = [_bits.unpack_tiles(words, plane).astype(jnp.int8) for plane in range(words.dtype.itemsize)]
    return (ones[0] + ones[-1] - jnp.int8(1)).astype(dtype).reshape(-1)


def _votes_once(words: UInt[Array, " n"]) -> Int8[Array, " 8*n"]:
    """`_votes` for many users: XLA on CPUs computes a concatenation once, but anything else anew in each of them."""
    half = words.size // 2
    return jnp.concatenate([_votes(words[:half]), _votes(words[half:])])


def _times(flat: jax.Array, sizes: Float[Array, " blocks"], start: int, block: int) -> Float[Array, " n"]:
    factors = lax.slice_in_dim(sizes, start // block, (start + flat.size) // block)
    return (flat.astype(jnp.float32).reshape(-1, block) * factors[:, None]).reshape(-1)


def _slice(x: jax.Array, start: int, size: int) -> jax.Array:
    """`x[start : start + size]`, so that XLA compiles one kernel for all leaves of a size.

    It compiles one for every slice at another place if it knows the place. So the place is read from memory: a constant of
    more than one number stays there, and behind the barrier nobody looks into it.
    """
    if start == 0 or x.size > np.iinfo(np.int32).max:
        return lax.slice_in_dim(x, start, start + size)
    place, _ = lax.optimization_barrier(np.array([start, start + size], np.int32))
    return lax.dynamic_slice(x, [place], [size], allow_negative_indices=False)
