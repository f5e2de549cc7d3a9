"""A few of the entries: the largest ones, or random ones."""

import math

import jax
from jax import lax
import jax.numpy as jnp

from signopt import _check
from signopt.codecs import codec as _codec
from signopt.codecs.codec import Codec

_COUNTED = 1 << 15  # entries from which on counting is faster than sorting
_SAMPLE = 64  # one entry in so many
_WORD = 32
_INFINITY = 0x7F800000  # the bits of it


def top_k(share: float, *, block: int | None = None, values: Codec | None = None) -> Codec:
    r"""The entries of largest magnitude.

    .. math::
      C(x)_i = x_i \text{ for the } k = \lceil \text{share} \cdot n \rceil \text{ largest } |x_i|, \quad 0 \text{ elsewhere},
      \qquad \|C(x) - x\|^2 \le \Bigl(1 - \frac{k}{n}\Bigr) \|x\|^2

    `error` is the exact share that is left behind. NaN and ±inf count as 0. Of equal magnitudes it is always the same ones
    that are sent, spread over the row.

    Takes :math:`k (32 + \lceil \log_2 n \rceil)` bits: 0.52 per entry for a hundredth of a million. With blocks, each sends
    its own k largest; the places in it take :math:`\lceil \log_2 \text{block} \rceil` bits, and the bound holds with the
    block's k and n. Blocks take turns along the row, entry by entry, so that each is a sample of the whole and little is
    lost, also where layers differ in size: of a million entries a share of .01 leaves behind

    ====================================  =========  ============  ============
    entries                               whole row  block = 4096  block = 256
    ====================================  =========  ============  ============
    normal                                .9155      .9157         .9076
    normal times 1, .1, ... 1e-7          .6217      .6227         .6023
    ====================================  =========  ============  ============

    (a block of 256 sends 3 entries, which are 1.17 %, and one of 4096 sends 41, which are 1.001 %). The largest of a whole
    row of 32,768 entries or more are found by counting those above a threshold, which is moved until the number is right.
    On a CPU that takes about half the time of a sort.

    Zeros that fill up a row are sent last.

    Args:
      share: In (0, 1].
      block: How many entries, about, compete with one another; None for the whole row.
      values: A codec for the values that are sent, for example `low_precision("bfloat16")`; None for float32.

    Raises:
      ValueError: If `share` is not in (0, 1] or `block` < 1.

    Examples:
      >>> import jax, jax.numpy as jnp, signopt
      >>> codec, x = signopt.codecs.top_k(0.5), jnp.array([1.0, -5.0, 0.0, 7.0])
      >>> codec.decode(codec.encode(x, None), x, None).tolist(), codec.bits((1 << 20,)) / (1 << 20)
      ([0.0, -5.0, 0.0, 7.0], 26.0)

    References:
      Stich, Cordonnier and Jaggi, `Sparsified SGD with Memory <https://arxiv.org/abs/1809.07599>`_, 2018, definition 2.1
      and lemma A.1.
    """
    _check.positive_share(share, "top_k", "share")
    _codec.require_block(block, "top_k")

    def chosen(x):
        """The places of what is sent, in their blocks, and in the row."""
        grid = _grid(x.shape[0], block)
        each = _number_in(grid, x)
        if block is None and x.shape[0] >= max(_COUNTED, 8 * each):
            places = _counted(x, each, *grid[:2])
            if values is not None:  # neighbours in size may share a scale
                places = places[lax.top_k(jnp.abs(take(x, _in_row(places[None], grid))), each)[1]]
            places = places[None]
        else:
            parts = jnp.pad(jnp.abs(x), (0, math.prod(grid) - x.shape[0])).reshape(grid).transpose(2, 1, 0)
            _, places = lax.top_k(parts.reshape(grid[2], -1), each)
        return places.reshape(-1), _in_row(places, grid)

    def take(x, places):
        return jnp.pad(x, (0, math.prod(_grid(x.shape[0], block)) - x.shape[0]))[places]

    def encode(x, key):
        x = _codec.finite(x, "top_k")
        places, in_row = chosen(x)
        kept = take(x, in_row)
        message = (kept,) if values is None else values.encode(kept, key)
        return message, _codec.pack(places.astype(jnp.uint32), _width(x.shape[0]))

    def decode(message, like, key):
        grid = _grid(like.shape[0], block)
        each = _number_in(grid, like)
        kept = jax.ShapeDtypeStruct((grid[2] * each,), jnp.float32)
        sent = message[0][0] if values is None else values.decode(message[0], kept, key)
        places = _codec.unpack(message[1], _width(like.shape[0]), kept.shape[0]).astype(jnp.int32)
        in_row = _in_row(places.reshape(grid[2], each), grid)
        return jnp.zeros(math.prod(grid), jnp.float32).at[in_row].set(sent, unique_indices=True)[: like.shape[0]]

    def error(x):
        x = _codec.finite(x, "top_k")
        x = _codec.near_one(x)
        kept = take(x, chosen(x)[1])
        lost = 0 if values is None or values.error is None else values.error(kept)
        return _codec.share_of_square(jnp.sum(x**2) - jnp.sum(kept**2) + jnp.sum(kept**2) * lost, x)

    def _number_in(grid, x):
        return _number(share, x.shape[0] if block is None else grid[0] * grid[1]) if x.shape[0] else 0

    def _width(n):
        rows, columns, _ = _grid(n, block)
        return max(rows * columns - 1, 0).bit_length()

    return Codec(
        encode,
        decode,
        random=values is not None and values.random,
        exact=share == 1 and (values is None or values.exact),
        error=None if values is not None and values.error is None else error,
    )


def random_k(share: float, *, unbiased: bool = False) -> Codec:
    r"""Entries drawn at random, the same for encoder and decoder, so that their places need not travel.

    .. math::
      C(x)_i = x_i \text{ with probability } p_i \approx \text{share}, \quad 0 \text{ elsewhere}, \qquad
      E\,\|C(x) - x\|^2 = \sum_i (1 - p_i)\, x_i^2

    exactly. The row is cut into :math:`k = \lceil \text{share} \cdot n \rceil` stretches whose lengths differ by one at
    most, and each sends one entry: p_i = 1 / length, which is k / n where k divides n. A draw of k out of n has the same
    error and needs a sort of random numbers. NaN and ±inf count as 0. Takes 32 k bits. Zeros that fill up a row are drawn
    like other entries.

    Args:
      share: In (0, 1].
      unbiased: Send x_i / p_i: right on average, with the relative variance :math:`\sum_i (1/p_i - 1) x_i^2 / \|x\|^2`,
        that is 1 / share - 1. Not for memory.

    Raises:
      ValueError: If `share` is not in (0, 1]; in `encode` and `decode`, without a key.

    Examples:
      >>> import jax, jax.numpy as jnp, signopt
      >>> codec, x, key = signopt.codecs.random_k(0.5), jnp.array([1.0, 1.0, 2.0, 2.0]), jax.random.key(0)
      >>> sorted(codec.decode(codec.encode(x, key), x, key).tolist()), float(codec.error(x)), codec.bits((4,))
      ([0.0, 0.0, 1.0, 2.0], 0.5, 64)

    References:
      Stich, Cordonnier and Jaggi, `Sparsified SGD with Memory <https://arxiv.org/abs/1809.07599>`_, 2018, definition 2.1
      and lemma A.1; Wangni et al., `Gradient Sparsification <https://arxiv.org/abs/1710.09854>`_, 2018, for 1 / p_i.
    """
    _check.positive_share(share, "random_k", "share")

    def encode(x, key):
        key = _check.key(key, "random_k")
        x = _codec.finite(x, "random_k")
        kept = []
        for first, number, length, part in _stretches(share, x.shape[0]):
            draws = _draw(key, part, number, length)
            entries = x[first + length * jnp.arange(number, dtype=jnp.int32) + draws]
            kept.append(_codec.bounded(entries * jnp.float32(length)) if unbiased else entries)
        return (jnp.concatenate(kept) if kept else x,)

    def decode(message, like, key):
        key = _check.key(key, "random_k", "decode")
        (sent,), parts, done = message, [], 0
        for _, number, length, part in _stretches(share, like.shape[0]):
            here = _draw(key, part, number, length)[:, None] == jnp.arange(length, dtype=jnp.int32)[None]
            entries = sent[done : done + number, None]
            parts.append(jnp.where(here, entries, jnp.zeros_like(entries)).reshape(-1))
            done += number
        return jnp.concatenate(parts) if parts else sent

    def error(x):
        x = _codec.finite(x, "random_k")
        x = _codec.near_one(x)
        lost = jnp.zeros([], jnp.float32)
        for first, number, length, _ in _stretches(share, x.shape[0]):
            square = jnp.sum(x[first : first + number * length] ** 2)
            lost = lost + square * (length - 1 if unbiased else (length - 1) / length)
        return _codec.share_of_square(lost, x)

    return Codec(encode, decode, random=True, exact=share == 1, unbiased=unbiased, error=error)


def _number(share, n):
    """⌈share · n⌉, not fooled by the rounding of the product: .07 · 100 is 7.000000000000001."""
    return min(n, math.ceil(round(share * n, 6)) or 1)


def _grid(n, block):
    """A row as (rows, columns, blocks). Blocks take turns along the row, so that all of them see all of it.

    A block is read column by column: a selection that keeps the largest so far is slow where magnitudes grow along the
    row, as those of layers may.
    """
    number = -(-n // block) if block is not None and n else 1
    size = -(-n // number)
    rows = math.isqrt(max(size - 1, 0)) + 1
    return rows, -(-size // rows), number


def _counted(x, number, rows, columns):
    """The places, in the order of reading, of the largest magnitudes, found by counting instead of sorting.

    The bits of floats >= 0 are ordered as the floats are. Of equal magnitudes the first places are taken, as by a sort.
    """
    high, group = -(-rows // _WORD), _WORD * columns
    bits = lax.bitcast_convert_type(jnp.abs(x), jnp.int32)
    full = x.shape[0] // group * group
    zeros = jnp.zeros(rows * columns - x.shape[0], jnp.int32)
    never = jnp.full(high * group - rows * columns, -1, jnp.int32)
    # What has to be filled up apart: each reader of it would compute it again.
    parts = [bits[:full], jnp.concatenate([bits[full:], zeros, never])]
    parts = [part.reshape(-1, _WORD, columns) for part in parts if part.size]
    low, above = _threshold(parts, bits[::_SAMPLE], number)
    # A bit for each entry, in words of 32 rows: those above first, then those of the threshold's size. Nothing is
    # transposed, which a CPU is slow at: a count of each column, and one within it, keep the order of reading.
    words = jnp.stack([_words(parts, lambda x: x >= above), _words(parts, lambda x: (x >= low) & (x < above))])
    ones = lax.population_count(words).astype(jnp.int32)
    ends = jnp.cumsum(jnp.sum(ones, axis=1, dtype=jnp.int32).reshape(-1))
    within = jnp.cumsum(ones, axis=1)
    rank = jnp.arange(number, dtype=jnp.int32)
    column = _first_above(rank, 2 * columns, lambda i: ends[i])
    half, place = jnp.divmod(column, columns)
    rank = rank - jnp.where(column > 0, ends[column - 1], jnp.zeros_like(column))
    group = _first_above(rank, high, lambda i: within[half, i, place])
    rank = rank - jnp.where(group > 0, within[half, group - 1, place], jnp.zeros_like(group))
    return place * rows + group * _WORD + _bit(words[half, group, place], rank)


def _first_above(rank, size, count):
    """The first of `size` places whose count is above a rank; counts grow, and the last is."""
    found = jnp.zeros_like(rank)
    for i in reversed(range((size - 1).bit_length())):
        further = found + (1 << i)
        found = jnp.where((further < size) & (count(jnp.minimum(further, size) - 1) <= rank), further, found)
    return found


def _bit(word, rank):
    """Which bit of a word is a one that has `rank` ones below it."""
    found = jnp.zeros_like(rank)
    for i in (16, 8, 4, 2, 1):
        below = lax.population_count(word & jnp.uint32((1 << i) - 1)).astype(jnp.int32)
        is_above = rank >= below
        rank = jnp.where(is_above, rank - below, rank)
        word = jnp.where(is_above, word >> jnp.uint32(i), word)
        found = jnp.where(is_above, found + i, found)
    return found


def _words(parts, test):
    """What a test says of parts (any, 32, columns), as words (high, columns)."""
    return jnp.concatenate([_words_of(part, test) for part in parts])


def _words_of(part, test):
    words = [test(part[:, i]).astype(jnp.uint32) << jnp.uint32(i) for i in range(_WORD)]
    while len(words) > 1:
        words = [a | b for a, b in zip(words[::2], words[1::2], strict=True)]
    return words[0]


def _threshold(parts, sample, number):
    """(low, above): at least `number` entries of parts (any, 32, columns) are >= low, and fewer are >= above.

    Either low and above are neighbours, or exactly `number` are >= low. A sample says where to look.
    """
    middle = number / _SAMPLE
    spread = 4 * math.sqrt(middle) + 4
    zero = sample[0] ^ sample[0]  # varies over the axes that x varies over, which a constant does not
    low, above = zero, zero + _INFINITY
    if number > _SAMPLE:
        fewest, most = max(1, math.floor(middle - spread)), min(math.ceil(middle + spread), sample.shape[0])
        low, above = _between(_ones, [sample], most, low, above)[0], _between(_ones, [sample], fewest, low, above)[1]
    return _between(_ones_by_words, parts, number, low, above)


def _ones(tests):
    return jnp.sum(tests, dtype=jnp.int32)


def _ones_by_words(tests):
    """The same of (any, 32, columns), in one pass; XLA on CPUs takes several for a sum of everything."""
    counts = [tests[:, i].astype(jnp.int32) for i in range(_WORD)]
    while len(counts) > 1:
        counts = [a + b for a, b in zip(counts[::2], counts[1::2], strict=True)]
    return jnp.sum(counts[0], dtype=jnp.int32)


def _between(ones, parts, number, *guesses):
    """`_threshold`, with two guesses that may be wrong."""
    size = sum(part.size for part in parts)

    def go_on(state):
        low, above, at_low, _, _ = state
        return (above - low > 1) & (at_low > number)

    def step(state):
        low, above, at_low, at_above, i = state
        share = (at_low - number).astype(jnp.float32) / jnp.maximum(at_low - at_above, 1).astype(jnp.float32)
        guess = low + (share * (above - low).astype(jnp.float32)).astype(jnp.int32)
        middle = jnp.where(i % 3 == 1, low + (above - low) // 2, guess)  # guesses alone may crawl
        middle = jnp.where(i == 0, guesses[0], jnp.where(i == 1, guesses[1], middle))
        middle = jnp.clip(middle, low + 1, above - 1)
        found = sum((ones(part >= middle) for part in parts[1:]), ones(parts[0] >= middle))
        enough = found >= number
        return (
            jnp.where(enough, middle, low),
            jnp.where(enough, above, middle),
            jnp.where(enough, found, at_low),
            jnp.where(enough, at_above, found),
            i + 1,
        )

    zero = guesses[0] ^ guesses[0]
    low, above, *_ = lax.while_loop(go_on, step, (zero, zero + _INFINITY, zero + size, zero, zero))
    return low, above


def _in_row(places, grid):
    """Places (blocks, k) in the order of reading to places in the row."""
    rows, columns, number = grid
    column, row = jnp.divmod(places, rows)
    return ((row * columns + column) * number + jnp.arange(number, dtype=jnp.int32)[:, None]).reshape(-1)


def _stretches(share, n):
    """(first entry, how many, their length, a name for their draws) of the longer stretches and of the shorter ones."""
    if n == 0:
        return []
    k = _number(share, n)
    length, longer = divmod(n, k)
    found = [(0, longer, length + 1, 0), (longer * (length + 1), k - longer, length, 1)]
    return [stretch for stretch in found if stretch[1]]


def _draw(key, part, number, length):
    """A place in each stretch. The remainder favours none by more than length / 2³²."""
    bits = jax.random.bits(jax.random.fold_in(key, part), (number,), jnp.uint32)
    return (bits % jnp.uint32(length)).astype(jnp.int32)
