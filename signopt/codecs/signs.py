"""One bit for each entry: signs, scaled signs, and signs drawn at random."""

import jax
import jax.numpy as jnp

from signopt import _bits
from signopt import _check
from signopt.codecs import codec as _codec
from signopt.codecs.codec import Codec
from signopt.sign import is_negative


def sign() -> Codec:
    r"""The sign of each entry, and nothing of its size.

    .. math::
      C(x)_i = +1 \text{ where } x_i \ge 0, \quad -1 \text{ elsewhere}

    One bit per entry. What one bit cannot say: 0, NaN and ±inf come back as +1. So where whole parameters have no
    gradient, send `ternary`, or `scaled_sign` with memory, which turns the sign around in the next step. Signs are read
    from the bits of a float (`signopt.sign`), so subnormal numbers have one.

    There is no bound on the error: a memory on plain signs may grow for ever.

    Examples:
      >>> import jax, jax.numpy as jnp, signopt
      >>> codec, x = signopt.codecs.sign(), jnp.array([0.5, -3.0, 0.0, jnp.nan])
      >>> codec.decode(codec.encode(x, None), x, None).tolist(), codec.bits((1000,))
      ([1.0, -1.0, 1.0, 1.0], 1000)

    References:
      Bernstein et al., `signSGD: Compressed Optimisation for Non-Convex Problems <https://arxiv.org/abs/1802.04434>`_,
      2018, algorithm 1.
    """

    def encode(x, key):
        del key
        return (_pack_signs(_codec.finite(x, "sign")),)

    def decode(message, like, key):
        del key
        return _unpack_signs(message[0], like, jnp.ones([], jnp.float32))

    return Codec(encode, decode)


def scaled_sign(*, block: int | None = None) -> Codec:
    r"""Signs times the mean magnitude, of the row or of each block of it.

    .. math::
      C(x) = \frac{\|x\|_1}{n} \operatorname{sign}(x), \qquad
      \|C(x) - x\|^2 = \Bigl(1 - \frac{\|x\|_1^2}{n \|x\|_2^2}\Bigr) \|x\|^2

    exactly, because zeros come back as plus the scale (so do NaN and ±inf, which count as 0 in the scale too). A block of
    zeros has the scale 0 and comes back as zeros. Takes 1 bit per entry and 32 per block. The error is .363 for normal
    numbers and at most 1 - 1/n.

    Zeros that fill up the end of a row count in the mean of its last block: they shrink the scale by their share, and the
    identity above holds with them.

    Args:
      block: How many entries share a scale; None for the whole row.

    Raises:
      ValueError: If `block` < 1.

    Examples:
      >>> import jax, jax.numpy as jnp, signopt
      >>> codec, x = signopt.codecs.scaled_sign(), jnp.array([1.0, -3.0, 2.0, -2.0])
      >>> codec.decode(codec.encode(x, None), x, None).tolist(), round(float(codec.error(x)), 3)
      ([2.0, -2.0, 2.0, -2.0], 0.111)

    References:
      Karimireddy et al., `Error Feedback Fixes SignSGD <https://arxiv.org/abs/1901.09847>`_, 2019, algorithm 1 and lemma
      8; Zheng et al., `Communication-Efficient Distributed Blockwise Momentum SGD with Error-Feedback
      <https://arxiv.org/abs/1905.10936>`_, 2019, for the blocks.
    """
    _codec.require_block(block, "scaled_sign")

    def encode(x, key):
        del key
        x = _codec.finite(x, "scaled_sign")
        return _pack_signs(x), _codec.mean(jnp.abs(_codec.blocks(x, block)), _codec.sizes(x.shape[0], block))

    def decode(message, like, key):
        del key
        signs, scales = message
        return _unpack_signs(signs, like, _codec.spread(scales, like, block))

    def error(x):
        x = _codec.finite(x, "scaled_sign")
        x = _codec.near_one(x)
        kept = jnp.sum(jnp.abs(_codec.blocks(x, block)), axis=-1) ** 2 / _codec.sizes(x.shape[0], block)
        return _codec.share_of_square(jnp.sum(x * x) - jnp.sum(kept), x)

    return Codec(encode, decode, error=error)


def stochastic_sign(*, scale: float | None = None) -> Codec:
    r"""Signs drawn at random, right on average.

    .. math::
      C(x)_i = \pm b, \quad P(+b) = \frac{b + x_i}{2 b}, \qquad
      E\,\|C(x) - x\|^2 = \Bigl(\frac{n b^2}{\|x\|^2} - 1\Bigr) \|x\|^2

    One bit per entry, and 32 for b where it is the row's largest magnitude. Zeros, NaN and ±inf are tosses of a fair coin.

    Args:
      scale: b > 0, in the units of x. Larger entries are clipped to it, which is biased. None for the row's largest
        magnitude, which clips nothing; rows of zeros then come back as zeros.

    Raises:
      ValueError: If `scale` is not positive; in `encode`, without a key.

    Examples:
      >>> import jax, jax.numpy as jnp, signopt
      >>> codec, x, key = signopt.codecs.stochastic_sign(), jnp.array([1.0, -4.0, 2.0, 0.0]), jax.random.key(0)
      >>> jnp.abs(codec.decode(codec.encode(x, key), x, key)).tolist(), round(float(codec.error(x)), 3)
      ([4.0, 4.0, 4.0, 4.0], 2.048)

    References:
      Jin et al., `Stochastic-Sign SGD for Federated Learning with Theoretical Guarantees
      <https://arxiv.org/abs/2002.10940>`_, 2020, definition 2; Safaryan and Richtárik, `Stochastic Sign Descent Methods
      <https://arxiv.org/abs/1905.12938>`_, 2021, equation 10, with the 2-norm for b.
    """
    if scale is not None:
        _check.positive(scale, "stochastic_sign", "scale")

    def bound(x):
        return _codec.largest(x)[None] if scale is None else jnp.full((1,), scale, jnp.float32)

    def encode(x, key):
        key = _check.key(key, "stochastic_sign")
        x = _codec.finite(x, "stochastic_sign")
        b = bound(x)
        coins = 2 * jax.random.uniform(key, x.shape, jnp.float32) - 1  # exact
        plus = coins < _codec.over(x, b)
        signs = _bits.pack(plus)
        return (signs, b[: x.shape[0]]) if scale is None else (signs,)

    def decode(message, like, key):
        del key
        b = jnp.asarray(scale, jnp.float32) if scale is not None else message[1]
        return _unpack_signs(message[0], like, jnp.broadcast_to(b, like.shape))

    def error(x):
        x = _codec.finite(x, "stochastic_sign")
        x = _codec.near_one(x) if scale is None else x
        b = bound(x)
        return _codec.share_of_square(b**2 - 2 * x * jnp.clip(x, -b, b) + x**2, x)

    return Codec(encode, decode, random=True, unbiased=scale is None, error=error)


def _pack_signs(x):
    return _bits.pack(~is_negative(x))


def _unpack_signs(words, like, scale):
    return jnp.where(_bits.unpack(words)[: like.shape[0]].astype(bool), scale, -scale)
