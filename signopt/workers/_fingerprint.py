"""A fingerprint of arrays: 32 bits that change with every bit, computed where an array lies."""

from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, UInt32


def fingerprint(tree: Any) -> UInt32[Array, " leaves"]:
    r"""Hash the bits of every leaf, with their places.

    .. math::
      h = \sum_i f(w_i \oplus k_i) \bmod 2^{32},

    over the words :math:`w_i` of a leaf, with f the finalizer of MurmurHash3, a bijection, and a key for each place. A
    change of one word always changes the hash.

    Args:
      tree: Arrays of any dtype, random keys included.

    Returns:
      A number for each leaf.
    """
    hashes = [
        jnp.sum(mixed(_words(jnp.asarray(x)), 1 + i), dtype=jnp.uint32) for i, x in enumerate(jax.tree.leaves(tree))
    ]
    return jnp.stack(hashes) if hashes else jnp.zeros([0], jnp.uint32)


def _words(x):
    """The bits of an array as flat 32-bit words; a smaller number fills one with zeros in front."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag])
    if x.dtype == bool:
        x = x.astype(jnp.uint8)
    width = min(x.dtype.itemsize, 4)
    return lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * width}")).ravel().astype(jnp.uint32)


def mixed(words, leaf=0):
    """MurmurHash3's finalizer of each word, with its place in it."""
    place = lax.iota(jnp.uint32, words.size) * jnp.uint32(0x9E3779B9) + jnp.uint32(0x85EBCA6B * leaf % 2**32)
    h = words ^ place
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return h ^ (h >> 16)
