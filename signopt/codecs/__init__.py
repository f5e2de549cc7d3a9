r"""Codecs: how one row of float32 numbers travels in fewer bits.

==================  ====================  ===========================================  ==================================
codec               bits per entry        error: :math:`E\|C(x) - x\|^2 / \|x\|^2`     comes back
==================  ====================  ===========================================  ==================================
`identity`          32                    0                                            as it was
`low_precision`     16, 8 or 4            rounding                                     nearly; on average if stochastic
`qsgd`              2 to 16               at most min(n / s², √n / s) per block        right on average
`terngrad`          2                     ‖x‖∞ ‖x‖₁ / ‖x‖² - 1                         right on average
`ternary`           2                     1 - k s² / ‖x‖²: .19 for normal numbers      too small
`scaled_sign`       1                     1 - ‖x‖₁² / (n ‖x‖²): .36 if normal          too small
`stochastic_sign`   1                     n ‖x‖∞² / ‖x‖² - 1                           right on average
`sign`              1                     none                                         without its size
`top_k`             share (32 + log₂ n)   at most 1 - share                            too small
`random_k`          32 share              1 - share                                    too small; on average if unbiased
==================  ====================  ===========================================  ==================================

A codec whose error is below 1 loses nothing in the end if what it did not send is remembered; one that is right on average
needs no memory, but many workers. A NaN or an infinity counts as 0, in the entry and in every scale. `Codec.bits` counts
what really travels. The same row and key give the same message in every program, alone and in a batch.

A codec of one's own is two functions. Here a byte carries the sign and every second exponent, so that each number comes
back as one of 0.125, 0.5, 2, 8, ..., the next below it, and loses less than three quarters of itself.

>>> import jax, jax.numpy as jnp, signopt
>>> def encode(x, key):
...     bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
...     exponents = jnp.where(jnp.isfinite(x), bits >> 23 & 0xFF, 0) >> 1
...     return ((bits >> 31 << 7 | exponents).astype(jnp.uint8),)
>>> def decode(message, like, key):
...     words = message[0].astype(jnp.uint32)
...     return jax.lax.bitcast_convert_type(words >> 7 << 31 | (words & 0x7F) << 24, jnp.float32)
>>> exponents = signopt.codecs.Codec(encode, decode, error=lambda x: jnp.float32(0.75**2))
>>> x = jnp.array([0.6, -3.0, 0.0, jnp.inf])
>>> exponents.decode(exponents.encode(x, None), x, None).tolist(), exponents.bits((1000,))
([0.5, -2.0, 0.0, 0.0], 8000)
"""

from signopt.codecs.codec import Codec as Codec
from signopt.codecs.codec import identity as identity
from signopt.codecs.rounding import low_precision as low_precision
from signopt.codecs.rounding import qsgd as qsgd
from signopt.codecs.signs import scaled_sign as scaled_sign
from signopt.codecs.signs import sign as sign
from signopt.codecs.signs import stochastic_sign as stochastic_sign
from signopt.codecs.sparse import random_k as random_k
from signopt.codecs.sparse import top_k as top_k
from signopt.codecs.ternaries import ternary as ternary
from signopt.codecs.ternaries import terngrad as terngrad
