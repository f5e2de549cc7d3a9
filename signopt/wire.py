"""What travels: one buffer for a whole tree, two collectives, and their size in bytes.

The signs of a tree are packed eight to a byte, leaf by leaf, every leaf from a fresh byte on, and the packed leaves are
joined into one buffer of words, of one byte where a ballot has one bit and of two where it has two: `signopt._bits`. Each
worker then serves one chunk of the parameters, which is the parameter server of Bernstein et al. (2018), sharded over
the workers::

  ballots (n words) --all_to_all--> everybody's ballots on my chunk --decide--> my chunk --all_gather--> decisions

Two collectives per step, whatever the number of leaves, and 2 (M-1)/M bits per parameter and plane for each of M
workers; where two or four of them are processes on CPUs, large buffers are swapped in up to four collectives of the same
bytes (`signopt._swaps`). Nothing here counts parameters in 32 bits: sizes and offsets are Python integers, known when the
step is traced.
"""

from collections.abc import Callable
import itertools
import math
from typing import Any, Literal, get_args

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int8, UInt
import numpy as np

from signopt import _axis
from signopt import _bits

Wire = Literal["one_bit", "two_bit", "psum"]

PLANES = {"one_bit": 1, "two_bit": 2}

# Leaves below this many entries are joined before they are packed, larger ones after it: a kernel per leaf costs compile
# time, which thousands of small leaves would feel, and joining costs a copy, which large ones would.
_SMALL = 2**16


def bytes_sent(tree: Any, num_workers: int, wire: str) -> int:
    """The bytes that each worker sends in one step.

    Args:
      tree: Parameters or updates; arrays or `jax.ShapeDtypeStruct`.
      num_workers: M, the number of workers.
      wire: "one_bit", "two_bit" or "psum", as in `majority_vote`, or "mean" for a `lax.pmean` in the leaves' own dtype.

    Returns:
      For packed wires the exact size of what this worker passes to the others in the two collectives, padding
      included; for "psum" and "mean" what a ring all-reduce moves, 2 (M-1)/M of the data.

    Raises:
      ValueError: If `wire` is unknown, or `num_workers` is not positive.

    Examples:
      >>> import jax
      >>> params = {"w": jax.ShapeDtypeStruct((1000, 1000), "float32")}
      >>> [bytes_sent(params, 8, wire) for wire in ("mean", "psum", "two_bit", "one_bit")]
      [7000000, 1750000, 437500, 218750]

    References:
      Table 1 of Bernstein et al., `signSGD <https://arxiv.org/abs/1802.04434>`_, 2018, counts both directions of a
      star around one server: 64 M d bits for floats, 2 M d for the vote. Sharding the server leaves (M-1)/M of it.
    """
    if num_workers < 1:
        raise ValueError(f"`bytes_sent(num_workers=...)` has to be at least 1, got {num_workers}.")
    check_wire(wire, "bytes_sent(wire=...)", also=("mean",))
    if wire in PLANES:
        buffer = sum(_num_words(leaf) for leaf in jax.tree.leaves(tree))
        chunk = -(-buffer // num_workers)
        return 2 * (num_workers - 1) * chunk * PLANES[wire]
    size = sum(
        math.prod(x.shape) * (ballot_dtype(num_workers) if wire == "psum" else jnp.dtype(x.dtype)).itemsize
        for x in jax.tree.leaves(tree)
    )
    return -(-2 * (num_workers - 1) * size // num_workers)


def check_wire(wire: str, caller: str, *, also: tuple[str, ...] = ()) -> None:
    """Raise a `ValueError` that names the choices if `wire` is none of them."""
    choices = get_args(Wire) + also
    if wire not in choices:
        raise ValueError(f"`{caller}` has to be one of {', '.join(map(repr, choices))}, got {wire!r}.")


def ballot_dtype(num_workers: int) -> jnp.dtype:
    """The smallest signed integer that cannot overflow when `num_workers` votes are added."""
    return next(jnp.dtype(t) for t in ("int8", "int16", "int32") if num_workers <= jnp.iinfo(t).max)


def pack(tree: Any, *tests: Callable[[jax.Array], Bool[Array, "..."]]) -> UInt[Array, " n"]:
    """Pack a tree into one buffer of words with a plane for each test.

    Args:
      tree: Arrays.
      *tests: One or two elementwise functions from an array to booleans, False at zero.

    Returns:
      uint8 for one test, uint16 for two; zeros where a leaf does not fill its last word.
    """
    words = [_bits.pack(*(test(flat) for test in tests)) for flat in joined(tree)]
    return jnp.concatenate([jnp.zeros(0, f"uint{8 * len(tests)}"), *words])


def joined(tree: Any) -> list[jax.Array]:
    """All entries of a tree in few flat arrays, in the order of the buffer: what one kernel each can work on.

    Small leaves of one dtype are joined, each from a multiple of eight on, with zeros in between.
    """
    leaves = jax.tree.leaves(tree)
    return [_join([leaves[i] for i in group]) for group in _groups(leaves)]


def unpack(buffer: UInt[Array, " n"], like: Any) -> Any:
    """The tree of votes in a buffer: -1 where no plane is set, +1 where all are, 0 where one of two is.

    Args:
      buffer: Words of one or two planes, laid out as `pack` does.
      like: The tree that was packed.

    Returns:
      A tree like `like`, in its shapes and dtypes, of -1, 0 and +1.
    """
    leaves, treedef = jax.tree.flatten(like)
    votes = {i: jnp.zeros(x.shape, x.dtype) for i, x in enumerate(leaves) if not x.size}
    start = 0
    for group in _groups(leaves):
        sizes = [_num_words(leaves[i]) for i in group]
        words = lax.slice_in_dim(buffer, start, start + sum(sizes))
        start += sum(sizes)
        flat = (_votes(words) if len(group) == 1 else _votes_once(words)).astype(leaves[group[0]].dtype)
        for i, first in zip(group, itertools.accumulate(sizes, initial=0), strict=False):
            votes[i] = _slice(flat, 8 * first, leaves[i].size).reshape(leaves[i].shape)
    return jax.tree.unflatten(treedef, [votes[i] for i in range(len(leaves))])


def repeat(pattern: UInt[Array, " p"], like: Any) -> UInt[Array, " n"]:
    """A buffer in which every leaf holds the same words over and over; one word alone stays one, to be broadcast."""
    if pattern.size == 1:
        return pattern
    sizes = [_num_words(jax.tree.leaves(like)[i]) for i, _ in layout(like)]
    longest = jnp.tile(pattern, -(-max(sizes, default=0) // pattern.size))
    return jnp.concatenate([jnp.zeros(0, pattern.dtype), *(longest[:size] for size in sizes)])


def exchange(
    ballots: UInt[Array, " n"],
    decide: Callable[[UInt[Array, "workers chunk"]], UInt[Array, " chunk"]],
    axis_name: _axis.AxisName,
) -> UInt[Array, " n"]:
    """Let every coordinate be decided once from everybody's ballots, and tell everybody.

    Args:
      ballots: This worker's.
      decide: From the ballots of all workers on some words to the decisions there. It must not depend on which words, nor
        on the order of the workers.
      axis_name: The workers: device axes, vmapped ones, or both.

    Returns:
      The decisions, the same on every worker.
    """
    return collect(decide(deal(ballots, axis_name)), ballots.shape[-1], axis_name)


def deal(ballots: UInt[Array, " n"], axis_name: _axis.AxisName) -> UInt[Array, "workers chunk"]:
    """Everybody's ballots on the words that this worker serves, in no particular order: the first half of `exchange`."""
    devices, vmapped = _axis.devices_and_vmapped(axis_name)
    everybody_here = _axis.stack_vmapped(ballots, vmapped)
    if not devices:
        return everybody_here
    num_servers = math.prod(lax.axis_size(name) for name in devices)
    workers_here, num_words = everybody_here.shape
    chunk = -(-num_words // num_servers)
    padded = jnp.pad(everybody_here, ((0, 0), (0, num_servers * chunk - num_words)))
    by_server = padded.reshape(workers_here, num_servers, chunk).swapaxes(0, 1).reshape(num_servers, -1)
    return _axis.deal_rows(by_server, devices).reshape(-1, chunk)


def collect(decisions: UInt[Array, " chunk"], num_words: int, axis_name: _axis.AxisName) -> UInt[Array, " n"]:
    """The decisions of all servers, the same on every worker: the second half of `exchange`."""
    devices, _ = _axis.devices_and_vmapped(axis_name)
    return _axis.join_devices(decisions, devices)[:num_words] if devices else decisions


def layout(tree: Any) -> list[tuple[int, int]]:
    """Where the leaves lie in a packed buffer: the index of each and its first word, in the order of the buffer."""
    leaves = jax.tree.leaves(tree)
    order = [i for group in _groups(leaves) for i in group]
    starts = itertools.accumulate((_num_words(leaves[i]) for i in order), initial=0)
    return list(zip(order, starts, strict=False))


def _groups(leaves: list) -> list[list[int]]:
    """Which leaves are packed together, in the order of the buffer: each large one alone, the small ones by dtype."""
    large, small = [], {}
    for i, x in enumerate(leaves):
        if x.size >= _SMALL:
            large.append([i])
        elif x.size:
            small.setdefault(jnp.dtype(x.dtype), []).append(i)
    return large + list(small.values())


def _join(group: list) -> jax.Array:
    """The leaves of a group in one array, each from a multiple of eight on."""
    if len(group) == 1:
        return group[0].ravel()
    parts = []
    for x in group:
        parts += [x.ravel(), jnp.zeros(8 * _num_words(x) - x.size, x.dtype)]
    return lax.optimization_barrier(jnp.concatenate(parts))


def _num_words(x: Any) -> int:
    return -(-math.prod(x.shape) // 8)


def _votes(words: UInt[Array, " n"]) -> Int8[Array, " 8*n"]:
    ones = [_bits.unpack(words, plane).astype(jnp.int8) for plane in range(words.dtype.itemsize)]
    return ones[0] + ones[-1] - 1


def _votes_once(words: UInt[Array, " n"]) -> Int8[Array, " 8*n"]:
    """`_votes` for many users: XLA on CPUs computes a concatenation once, but anything else anew in each of them."""
    half = words.size // 2
    return jnp.concatenate([_votes(words[:half]), _votes(words[half:])])


def _slice(x: jax.Array, start: int, size: int) -> jax.Array:
    """`x[start : start + size]`, so that XLA compiles one kernel for all leaves of a size.

    It compiles one for every slice at another place if it knows the place. So the place is read from memory: a constant of
    more than one number stays there, and behind the barrier nobody looks into it.
    """
    if start == 0 or x.size > np.iinfo(np.int32).max:
        return lax.slice_in_dim(x, start, start + size)
    place, _ = lax.optimization_barrier(np.array([start, start + size], np.int32))
    return lax.dynamic_slice(x, [place], [size], allow_negative_indices=False)
