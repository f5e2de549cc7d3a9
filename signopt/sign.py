"""What a sign is, decided once.

A sign is read from the bits of a float, by integer tests that are the same on every backend:

=====================  ====
value                  sign
=====================  ====
positive, finite        +1
negative, finite        -1
0, -0, NaN, inf, -inf    0
=====================  ====

Subnormal numbers count as what they are, positive or negative, also where the arithmetic of a backend flushes
them to zero. Everything that votes in this library votes with these signs.
"""

from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np


def is_positive(x: jax.Array) -> jax.Array:
    """Whether each entry casts a vote of +1.

    With the bits of a float read as an unsigned integer, the positive finite numbers are 1 ... MAX, in order; one
    subtraction moves them to 0 ... MAX - 1 and everything else above.

    Args:
      x: Any floating-point array.

    Returns:
      Booleans of the shape of `x`.
    """
    as_int, largest, _ = _bit_pattern(x)
    return as_int - 1 < largest


def is_negative(x: jax.Array) -> jax.Array:
    """Whether each entry casts a vote of -1; the mirror image of `is_positive`."""
    as_int, largest, sign_bit = _bit_pattern(x)
    return as_int - (sign_bit + 1) < largest


def sign(x: jax.Array) -> jax.Array:
    """The sign of each entry: -1, 0 or +1.

    Args:
      x: Any floating-point array.

    Returns:
      An array of the shape and dtype of `x`. Zeros are +0.

    Examples:
      >>> import jax.numpy as jnp
      >>> from signopt.sign import sign
      >>> sign(jnp.array([2.5, -1e-45, 0.0, -0.0, jnp.nan, jnp.inf])).tolist()
      [1.0, -1.0, 0.0, 0.0, 0.0, 0.0]
    """
    return vote(x).astype(jnp.result_type(x))


def vote(x: jax.Array) -> jax.Array:
    """`sign` as int8, one byte per entry."""
    return is_positive(x).astype(jnp.int8) - is_negative(x).astype(jnp.int8)


def require_floating(tree: Any, caller: str, *, complex_too: bool = False) -> None:
    """Refuse leaves that have no sign of this kind.

    Args:
      tree: Any tree of arrays.
      caller: The call to name in the error, without backticks.
      complex_too: Whether complex leaves pass, where a step is optax's own.

    Raises:
      TypeError: If a leaf is complex, an integer or a boolean, or narrower than 16 bits.
    """
    for path, leaf in jax.tree.leaves_with_path(tree):
        dtype, rule = jnp.result_type(leaf), ""
        if jnp.issubdtype(dtype, jnp.complexfloating):
            if complex_too:
                continue
            cure = "Optimize the real and the imaginary part as two leaves"
        elif not jnp.issubdtype(dtype, jnp.floating):
            cure = "Leave it out with `optax.masked` or `optax.partition`"
        elif jnp.finfo(dtype).bits < 16:
            rule = " of at least 16 bits"
            cure = "Keep parameters and gradients in bfloat16 or wider, and round a copy to compute with"
        else:
            continue
        raise TypeError(
            f"`{caller}` has to be given floating-point leaves{rule}, got {dtype} at "
            f"`updates{jax.tree_util.keystr(path)}`. {cure}."
        )


def _bit_pattern(x):
    """The bits of `x` as unsigned integers, those of the largest finite number, and those of -0."""
    x = jnp.asarray(x)
    uint = jnp.dtype(f"uint{jnp.finfo(x.dtype).bits}")
    largest = np.asarray(jnp.finfo(x.dtype).max, x.dtype).view(uint)[()]
    return lax.bitcast_convert_type(x, uint), largest, uint.type(1 << (8 * uint.itemsize - 1))
