"""Packed bits: what is packed comes back, and counting packed words is counting."""

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from signopt import _bits


@pytest.fixture(params=("cpu", "tpu"))
def layout(request):
    """Both layouts of packed bits, whatever this machine is."""
    with _bits.as_on(request.param):
        yield request.param


LENGTHS = (0, 1, 7, 8, 9, 64, 1001, 1016, 1017, 1024, 1025, 3333)


def test_a_tile_is_a_word_or_128_words():
    i = np.arange(2048)
    for platform, word, bit in (
        ("cpu", i // 8, i % 8),
        ("gpu", i // 8, i % 8),
        ("tpu", i // 1024 * 128 + i % 128, i % 1024 // 128),
    ):
        with _bits.as_on(platform):
            assert _bits.tile() == 8 * _bits.lanes()
            for place in (0, 1, 8, 127, 128, 1023, 1024, 2047):
                expected = np.zeros(256, np.uint8)
                expected[word[place]] = 1 << bit[place]
                np.testing.assert_array_equal(_bits.pack(jnp.asarray(i == place)), expected)


@pytest.mark.parametrize("length", (1, 1000, 1025))
def test_a_tile_that_is_filled_up_is_laid_out_as_a_full_one(length, layout, rng):
    booleans = rng.random(length) < 0.5
    full = np.zeros(-(-length // _bits.tile()) * _bits.tile(), bool)
    full[:length] = booleans
    words = _bits.pack_tests(jnp.asarray(booleans, jnp.float32), lambda x: x > 0)
    np.testing.assert_array_equal(words, _bits.pack(jnp.asarray(full)))
    np.testing.assert_array_equal(_bits.unpack_tiles(words).reshape(-1), full)


@pytest.mark.parametrize("length", LENGTHS)
def test_unpacking_gives_back_what_was_packed_and_zeros_behind_it(length, layout, rng):
    booleans = rng.random((3, length)) < 0.5
    packed = _bits.pack(jnp.asarray(booleans))
    assert packed.dtype == jnp.uint8 and packed.shape == (3, -(-length // 8))
    unpacked = np.asarray(_bits.unpack(packed))
    np.testing.assert_array_equal(unpacked[:, :length], booleans)
    assert not unpacked[:, length:].any()


@pytest.mark.parametrize("length", LENGTHS)
def test_a_word_holds_two_planes_that_do_not_touch(length, layout, rng):
    one, other = rng.random((2, 3, length)) < 0.5
    packed = _bits.pack(jnp.asarray(one), jnp.asarray(other))
    assert packed.dtype == jnp.uint16 and packed.shape == (3, -(-length // 8))
    for plane, booleans in enumerate((one, other)):
        np.testing.assert_array_equal(np.asarray(_bits.unpack(packed, plane))[:, :length], booleans)
    np.testing.assert_array_equal(packed.astype(jnp.uint8), _bits.pack(jnp.asarray(one)))


@pytest.mark.parametrize("num_ballots", (1, 8, 300))
def test_ballots_of_two_planes_count_for_both(num_ballots, rng):
    one, other = rng.random((2, num_ballots, 40)) < np.linspace(-0.1, 1.1, 40)
    planes = _bits.count(_bits.pack(jnp.asarray(one), jnp.asarray(other)))
    values = sum(_bits.unpack(plane).astype(jnp.int32) << k for k, plane in enumerate(planes))
    np.testing.assert_array_equal(values, one.sum(0) + other.sum(0))


@pytest.mark.parametrize("num_ballots", (1, 2, 3, 4, 7, 8, 15, 16, 33, 128, 129, 256, 257, 600))
def test_counts_and_thresholds_are_those_of_the_unpacked_bits(num_ballots):
    """Several thresholds that the counts can reach, in one compiled program."""
    rng = np.random.default_rng(num_ballots)
    # Rows with every density: some coordinates have all ones, some none.
    booleans = rng.random((num_ballots, 40)) < np.linspace(-0.1, 1.1, 40)
    expected = booleans.sum(0)
    thresholds = np.unique([0, 1, num_ballots // 2, num_ballots // 2 + 1, num_ballots - 1, num_ballots])
    thresholds = thresholds[thresholds <= num_ballots]

    @jax.jit
    def run(packed):
        planes = _bits.count(packed)
        values = sum(_bits.unpack(plane).astype(jnp.int32) << k for k, plane in enumerate(planes))
        return values, jnp.stack([_bits.unpack(_bits.at_least(planes, int(t))) for t in thresholds])

    counts, reached = run(_bits.pack(jnp.asarray(booleans)))
    np.testing.assert_array_equal(counts, expected)
    np.testing.assert_array_equal(reached, expected >= thresholds[:, None])


@jax.jit
def _reached(packed, threshold):
    return _bits.unpack(_bits.at_least(_bits.count(packed), threshold))


@hypothesis.given(hnp.arrays(np.bool_, (11, 16)), st.integers(0, 11))
def test_a_threshold_may_be_traced(booleans, threshold):
    reached = _reached(_bits.pack(jnp.asarray(booleans)), jnp.int32(threshold))
    np.testing.assert_array_equal(reached, booleans.sum(0) >= threshold)
