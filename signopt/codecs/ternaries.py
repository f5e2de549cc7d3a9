"""Two bits for each entry: minus, nothing or plus, chosen by a threshold or at random."""

import jax
import jax.numpy as jnp

from signopt import _bits
from signopt import _check
from signopt.codecs import codec as _codec
from signopt.codecs.codec import Codec


def ternary(threshold: float = 0.6, *, block: int | None = None) -> Codec:
    r"""Signs of the entries that stand out, times their mean magnitude.

    .. math::
      C(x)_i = s \operatorname{sign}(x_i) \text{ where } |x_i| > \kappa \operatorname{rms}(x), \quad 0 \text{ elsewhere},
      \qquad s = \frac{1}{k} \sum_{\text{sent}} |x_i|, \qquad
      \|C(x) - x\|^2 = \Bigl(1 - \frac{k s^2}{\|x\|^2}\Bigr) \|x\|^2

    exactly, where k entries are sent; s is the best scale for them. Zeros, NaN and ±inf come back as 0. Takes 2 bits per
    entry and 32 per block. For normal numbers the error is least, .190, at :math:`\kappa = .612`; `scaled_sign` has .363.

    Zeros that fill up the end of a row count in the root mean square and lower the threshold of its last block, and change
    nothing else.

    Args:
      threshold: :math:`\kappa \ge 0`, in root mean squares of the block.
      block: How many entries share a scale; None for the whole row.

    Raises:
      ValueError: If `threshold` < 0 or `block` < 1.

    Examples:
      >>> import jax, jax.numpy as jnp, signopt
      >>> codec, x = signopt.codecs.ternary(1.0), jnp.array([1.0, -5.0, 0.0, 7.0])
      >>> codec.decode(codec.encode(x, None), x, None).tolist(), round(float(codec.error(x)), 3)
      ([0.0, -6.0, 0.0, 6.0], 0.04)

    References:
      Li and Liu, `Ternary Weight Networks <https://arxiv.org/abs/1605.04711>`_, 2016, equations 3 to 5, with .7 of the mean
      magnitude for a threshold; Max, Quantizing for Minimum Distortion, 1960, table 1, for .612 and .190.
    """
    _check.at_least(0, threshold, "ternary", "threshold")
    _codec.require_block(block, "ternary")

    def chosen(x):
        parts = _codec.blocks(x, block)
        kept = jnp.abs(parts) > jnp.asarray(threshold, jnp.float32) * _root_mean_square(parts, x, block)[:, None]
        sent = jnp.where(kept, jnp.abs(parts), jnp.zeros_like(parts))
        return kept, _codec.mean(sent, jnp.sum(kept, axis=-1, dtype=jnp.int32))

    def encode(x, key):
        del key
        x = _codec.finite(x, "ternary")
        kept, scales = chosen(x)
        return *_pack(_codec.row(kept, x), x), scales

    def decode(message, like, key):
        del key
        return _unpack(message, like, block)

    def error(x):
        x = _codec.finite(x, "ternary")
        x = _codec.near_one(x)
        kept, scales = chosen(x)
        return _codec.share_of_square(
            jnp.sum(x**2) - jnp.sum(jnp.where(kept, scales[:, None] ** 2, jnp.zeros_like(scales)[:, None])), x
        )

    return Codec(encode, decode, error=error)


def terngrad(*, block: int | None = None) -> Codec:
    r"""Signs of entries drawn with odds that grow with their size; right on average.

    .. math::
      C(x)_i = s \operatorname{sign}(x_i)\, b_i, \quad P(b_i = 1) = \frac{|x_i|}{s}, \quad s = \|x\|_\infty, \qquad
      E\,\|C(x) - x\|^2 = \Bigl(\frac{\|x\|_\infty \|x\|_1}{\|x\|_2^2} - 1\Bigr) \|x\|^2

    exactly, for each block. Zeros, NaN and ±inf come back as 0; zeros that fill up a row change nothing. Takes 2 bits per
    entry and 32 per block.

    Args:
      block: How many entries share a scale; None for the whole row. The variance falls with the block.

    Raises:
      ValueError: If `block` < 1; in `encode`, without a key.

    Examples:
      >>> import jax, jax.numpy as jnp, signopt
      >>> codec, x, key = signopt.codecs.terngrad(), jnp.array([0.0, -4.0, 4.0, 0.0]), jax.random.key(0)
      >>> codec.decode(codec.encode(x, key), x, key).tolist(), float(codec.error(x))
      ([0.0, -4.0, 4.0, 0.0], 0.0)

    References:
      Wen et al., `TernGrad: Ternary Gradients to Reduce Communication in Distributed Deep Learning
      <https://arxiv.org/abs/1705.07878>`_, 2017, equations 1 to 4. Without their clipping at 2.5 standard deviations: clip
      before.
    """
    _codec.require_block(block, "terngrad")

    def encode(x, key):
        key = _check.key(key, "terngrad")
        x = _codec.finite(x, "terngrad")
        scales = _codec.largest(_codec.blocks(x, block))
        odds = jnp.abs(_codec.over(x, _codec.spread(scales, x, block)))
        return *_pack(jax.random.uniform(key, x.shape, jnp.float32) < odds, x), scales

    def decode(message, like, key):
        del key
        return _unpack(message, like, block)

    def error(x):
        x = _codec.finite(x, "terngrad")
        x = _codec.near_one(x)
        parts = _codec.blocks(x, block)
        return _codec.share_of_square(
            _codec.largest(parts) * jnp.sum(jnp.abs(parts), axis=-1) - jnp.sum(parts**2, axis=-1), x
        )

    return Codec(encode, decode, random=True, unbiased=True, error=error)


def _root_mean_square(parts, x, block):
    return _codec.mean_square_root(parts, _codec.sizes(x.shape[0], block))


def _pack(kept, x):
    return _bits.pack(kept & (x > 0)), _bits.pack(kept & (x < 0))


def _unpack(message, like, block):
    plus, minus = (_bits.unpack(words)[: like.shape[0]].astype(bool) for words in message[:2])
    scale = _codec.spread(message[2], like, block)
    return jnp.where(plus, scale, jnp.where(minus, -scale, jnp.zeros_like(scale)))
