"""A few bits for each entry: whole multiples of a unit, and narrow floats."""

from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from signopt import _check
from signopt.codecs import codec as _codec
from signopt.codecs.codec import Codec

_INTEGERS = {"int8": 127, "int4": 7}
# The exponent that the largest entry of a block gets: the last one of which no mantissa overflows.
_FLOATS = {"bfloat16": None, "float16": 15, "float8_e4m3fn": 8, "float8_e5m2": 15}


def qsgd(levels: int, *, block: int | None = 256) -> Codec:
    r"""Whole multiples of a fraction of the norm, drawn at random; right on average.

    .. math::
      C(x)_i = u \operatorname{sign}(x_i)\, \xi_i, \quad u = \frac{\|x\|_2}{s}, \quad
      \xi_i = \lfloor |x_i| / u \rfloor \text{ or one more}, \qquad
      E\,\|C(x) - x\|^2 \le \min\Bigl(\frac{n}{s^2}, \frac{\sqrt n}{s}\Bigr) \|x\|^2

    for each block of n entries, s being `levels`. `error` is the exact variance :math:`\sum_i u^2 f_i (1 - f_i)`, f_i the
    fraction of :math:`|x_i| / u`. Zeros, NaN and ±inf come back as 0; zeros that fill up a row change nothing.

    Takes :math:`\lceil \log_2 (2 s + 1) \rceil` bits per entry (2 for 1 level, 3 for up to 3, 4 for up to 7) and 16 per
    block. The paper's Elias codes are shorter on average, but their length depends on the data. The arrays of a compiled
    program have fixed sizes, large enough for the longest code, so nothing would be saved.

    The unit u travels as a bfloat16, rounded up (and the norm is known to 2⁻¹² of itself), so that a multiple of it is
    exact in float32. C stays unbiased; the bound grows by at most 1 % (its second part) or 2 % (its first).

    Args:
      levels: s in 1 ... 32767.
      block: How many entries share a norm; None for the whole row.

    Raises:
      ValueError: If `levels` or `block` is out of range; in `encode`, without a key.

    Examples:
      >>> import jax, jax.numpy as jnp, signopt
      >>> codec, x, key = signopt.codecs.qsgd(5), jnp.array([3.0, -4.0, 0.0]), jax.random.key(0)
      >>> codec.decode(codec.encode(x, key), x, key).tolist(), codec.bits((1024,))
      ([3.0, -4.0, 0.0], 4160)

    References:
      Alistarh et al., `QSGD: Communication-Efficient SGD via Gradient Quantization and Encoding
      <https://arxiv.org/abs/1610.02132>`_, 2017, section 3.1 and lemma 3.1.
    """
    _check.count(levels, "qsgd", "levels")
    if levels > 32767:
        raise ValueError(f"`qsgd(levels=...)` has to be at most 32767, got {levels}. Send `low_precision` instead.")
    _codec.require_block(block, "qsgd")

    def unit(parts, counts):
        norm = _codec.mean_square_root(parts, counts) * jnp.sqrt(jnp.asarray(counts))
        # No smaller than the largest entry, which the sum's rounding may pass.
        return _codec.divide(jnp.maximum(norm, _codec.largest(parts)), levels)

    return _multiples(levels, unit, block, stochastic=True, call="qsgd")


def low_precision(dtype: Any, *, block: int | None = 256, stochastic: bool = False) -> Codec:
    r"""Numbers of 16, 8 or 4 bits, with a scale for each block.

    =================================  ==============  ===========  ================================================
    dtype                              bits per entry  and block    :math:`|C(x)_i - x_i|`, rounded to nearest
    =================================  ==============  ===========  ================================================
    ``"bfloat16"``                     16              0            :math:`2^{-8} |x_i|`
    ``"float16"``                      16              8            :math:`\max(2^{-11} |x_i|, 2^{-39} \|x\|_\infty)`
    ``"float8_e4m3fn"``                8               8            :math:`\max(2^{-4} |x_i|, 2^{-17} \|x\|_\infty)`
    ``"float8_e5m2"``                  8               8            :math:`\max(2^{-3} |x_i|, 2^{-31} \|x\|_\infty)`
    ``"int8"``                         8               16           :math:`\|x\|_\infty / 252`
    ``"int4"``                         4               16           :math:`\|x\|_\infty / 13.8`
    =================================  ==============  ===========  ================================================

    with the largest magnitude of the block. The scale of floats is a power of two. That of integers is a 127th or a 7th of
    the largest magnitude as a bfloat16, rounded up: integers are symmetric. `error` is exact: the error of x itself, or
    with random rounding the variance :math:`\sum_i (u_i - x_i)(x_i - l_i)` between the neighbours l and u. Zeros, NaN and
    ±inf come back as 0; zeros that fill up a row change nothing. Units below 2⁻¹²⁶ are 0.

    Args:
      dtype: A name of the table, or the dtype.
      block: How many entries share a scale; None for the whole row.
      stochastic: Round up or down at random, right on average, with a key. Otherwise to nearest, half to even: less error,
        and what memory wants.

    Raises:
      ValueError: If `dtype` is not in the table or `block` < 1; in `encode`, if stochastic and without a key.

    Examples:
      >>> import jax, jax.numpy as jnp, signopt
      >>> codec, x = signopt.codecs.low_precision("int4"), jnp.array([7.0, -1.6, 0.2])
      >>> codec.decode(codec.encode(x, None), x, None).tolist(), codec.bits((1024,))
      ([7.0, -2.0, 0.0], 4160)

    References:
      Dettmers, `8-Bit Approximations for Parallelism in Deep Learning <https://arxiv.org/abs/1511.04561>`_, 2016; Gupta et
      al., `Deep Learning with Limited Numerical Precision <https://arxiv.org/abs/1502.02551>`_, 2015, section 3.1, for
      rounding at random.
    """
    name = dtype if isinstance(dtype, str) else jnp.dtype(dtype).name
    _check.choice(name, (*_FLOATS, *_INTEGERS), "low_precision", "dtype")
    _codec.require_block(block, "low_precision")
    if name in _FLOATS:
        return _floats(jnp.dtype(name), _FLOATS[name], block, stochastic)
    levels = _INTEGERS[name]

    def unit(parts, counts):
        del counts
        return _codec.divide(_codec.largest(parts), levels)

    return _multiples(levels, unit, block, stochastic, call="low_precision")


def _multiples(levels, unit, block, stochastic, call):
    """Whole multiples, at most `levels`, of a unit that each block has."""
    width = (2 * levels).bit_length()
    code = jnp.uint8 if width <= 8 else jnp.uint16

    def units(x):
        return _codec.round_up(unit(_codec.blocks(x, block), _codec.sizes(x.shape[0], block)))

    def count(x, units):
        each = _codec.spread(units.astype(jnp.float32), x, block)
        return jnp.abs(_codec.over(x, each))

    def encode(x, key):
        x = _codec.finite(x, call)
        scales = units(x)
        counts = count(x, scales)
        counts = _codec.round_at_random(counts, _check.key(key, call)) if stochastic else jnp.round(counts)
        counts = jnp.minimum(counts, levels).astype(jnp.int32)
        return _codec.pack((jnp.where(x < 0, -counts, counts) + levels).astype(code), width), scales

    def decode(message, like, key):
        del key
        words, scales = message
        counts = _codec.unpack(words, width, like.shape[0]) - levels
        return counts.astype(jnp.float32) * _codec.spread(scales.astype(jnp.float32), like, block)

    def error(x):
        x = _codec.finite(x, call)
        x = _codec.near_one(x)
        scales = units(x)
        counts = count(x, scales)
        up, down = jnp.ceil(counts) - counts, counts - jnp.floor(counts)
        lost = up * down if stochastic else jnp.minimum(up, down) ** 2
        return _codec.share_of_square(_codec.spread(scales.astype(jnp.float32), x, block) ** 2 * lost, x)

    return Codec(encode, decode, random=stochastic, unbiased=stochastic, error=error)


def _floats(dtype, exponent, block, stochastic):
    """Floats of a narrower dtype, after each block was moved to where that has its range."""

    def shifts(x):
        """For each block the exponent of its largest entry, biased, as float32 has it."""
        largest = _codec.largest(_codec.blocks(x, block))
        return (lax.bitcast_convert_type(largest, jnp.uint32) >> 23).astype(jnp.uint8)

    def move(x, shifts, direction):
        each = direction * (exponent + 126 - _codec.spread(shifts.astype(jnp.int32), x, block))
        half = each // 2
        return x * _power_of_two(half) * _power_of_two(each - half)  # one factor alone may overflow

    def moved(x):
        return x if exponent is None else move(x, shifts(x), 1)

    def encode(x, key):
        x = _codec.finite(x, "low_precision")
        y = moved(x)
        if stochastic:
            down, up = _neighbours(jnp.abs(y), dtype)
            odds = (jnp.abs(y) - down) / jnp.where(up > down, up - down, jnp.ones_like(up))
            draw = jax.random.uniform(_check.key(key, "low_precision"), x.shape, jnp.float32)
            y = jnp.where(y < 0, -jnp.where(draw < odds, up, down), jnp.where(draw < odds, up, down))
        narrow = jnp.clip(y, -_largest(dtype), _largest(dtype)).astype(dtype)
        return (narrow,) if exponent is None else (narrow, shifts(x))

    def decode(message, like, key):
        del like, key
        y = message[0].astype(jnp.float32)
        return y if exponent is None else move(y, message[1], -1)

    def error(x):
        x = _codec.finite(x, "low_precision")
        x = _codec.near_one(x)
        y = moved(x)
        if stochastic:
            down, up = _neighbours(jnp.abs(y), dtype)
            lost = (up - jnp.abs(y)) * (jnp.abs(y) - down)
        else:
            lost = (y.astype(dtype).astype(jnp.float32) - y) ** 2
        unit = jnp.ones([], jnp.float32) if exponent is None else move(jnp.ones_like(x), shifts(x), -1)
        return _codec.share_of_square(lost * unit**2, x)

    return Codec(encode, decode, random=stochastic, unbiased=stochastic, error=error)


def _neighbours(y, dtype):
    """The numbers of a narrower dtype on both sides of y >= 0, as float32; the same twice where y is the largest."""
    uint = jnp.dtype(f"uint{8 * dtype.itemsize}")
    nearest = jnp.minimum(y, _largest(dtype)).astype(dtype)
    above = nearest.astype(jnp.float32) > y
    down = lax.bitcast_convert_type(nearest, uint) - above.astype(uint)
    up = jnp.minimum(down + jnp.ones_like(down), lax.bitcast_convert_type(jnp.finfo(dtype).max.astype(dtype), uint))
    return tuple(lax.bitcast_convert_type(bits, dtype).astype(jnp.float32) for bits in (down, up))


def _largest(dtype):
    return jnp.asarray(jnp.finfo(dtype).max, jnp.float32)


def _power_of_two(exponent):
    """2^exponent for whole numbers in -126 ... 127, exactly."""
    return lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)
