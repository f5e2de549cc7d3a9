"""Codecs: what comes back, what it costs, how wrong it is, and that every program says the same."""

import functools

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec
import ml_dtypes
import numpy as np
import pytest

from signopt import codecs
from signopt.codecs import codec as _codec
from signopt.codecs import sparse

SIZES = (0, 1, 2, 7, 8, 9, 255, 256, 257, 1000)
KEY = jax.random.key(7)

# Each codec and the size of its message for n entries, in bits.
CODECS = {
    "identity": (codecs.identity(), lambda n: 32 * n),
    "sign": (codecs.sign(), lambda n: whole(n)),
    "scaled_sign": (codecs.scaled_sign(), lambda n: whole(n) + 32 * (n > 0)),
    "scaled_sign_8": (codecs.scaled_sign(block=8), lambda n: whole(n) + 32 * ceil(n, 8)),
    "stochastic_sign": (codecs.stochastic_sign(), lambda n: whole(n) + 32 * (n > 0)),
    "stochastic_sign_40": (codecs.stochastic_sign(scale=40.0), lambda n: whole(n)),
    "ternary": (codecs.ternary(), lambda n: 2 * whole(n) + 32 * (n > 0)),
    "ternary_100": (codecs.ternary(0.0, block=100), lambda n: 2 * whole(n) + 32 * ceil(n, 100)),
    "terngrad": (codecs.terngrad(block=100), lambda n: 2 * whole(n) + 32 * ceil(n, 100)),
    "qsgd_1": (codecs.qsgd(1), lambda n: 2 * whole(n) + 16 * ceil(n, 256)),
    "qsgd_7": (codecs.qsgd(7, block=None), lambda n: 8 * ceil(n, 2) + 16 * (n > 0)),
    "qsgd_300": (codecs.qsgd(300), lambda n: 8 * n + 2 * whole(n) + 16 * ceil(n, 256)),
    "bfloat16": (codecs.low_precision("bfloat16"), lambda n: 16 * n),
    "float16": (codecs.low_precision(jnp.float16), lambda n: 16 * n + 8 * ceil(n, 256)),
    "e4m3": (codecs.low_precision("float8_e4m3fn"), lambda n: 8 * n + 8 * ceil(n, 256)),
    "e5m2": (codecs.low_precision("float8_e5m2", block=100), lambda n: 8 * n + 8 * ceil(n, 100)),
    "int8": (codecs.low_precision("int8"), lambda n: 8 * n + 16 * ceil(n, 256)),
    "int4": (codecs.low_precision("int4"), lambda n: 8 * ceil(n, 2) + 16 * ceil(n, 256)),
    "bfloat16_random": (codecs.low_precision("bfloat16", stochastic=True), lambda n: 16 * n),
    "e4m3_random": (codecs.low_precision("float8_e4m3fn", stochastic=True), lambda n: 8 * n + 8 * ceil(n, 256)),
    "int4_random": (
        codecs.low_precision("int4", stochastic=True),
        lambda n: 8 * ceil(n, 2) + 16 * ceil(n, 256),
    ),
    "top_k": (codecs.top_k(0.1), lambda n: 32 * ceil(n, 10) + packed(ceil(n, 10), grid_size(n))),
    "top_k_100": (
        codecs.top_k(0.1, block=100),
        lambda n: (
            (k := ceil(n, 100) * ceil(grid_size(ceil(n, ceil(n, 100))), 10) if n else 0) * 32
            + packed(k, grid_size(ceil(n, ceil(n, 100))) if n else 0)
        ),
    ),
    "top_k_int8": (
        codecs.top_k(0.1, values=codecs.low_precision("int8")),
        lambda n: 8 * ceil(n, 10) + 16 * (n > 0) + packed(ceil(n, 10), grid_size(n)),
    ),
    "random_k": (codecs.random_k(0.1), lambda n: 32 * ceil(n, 10)),
    "random_k_unbiased": (codecs.random_k(0.3, unbiased=True), lambda n: 32 * ceil(3 * n, 10)),
}
RANDOM = [name for name, (codec, _) in CODECS.items() if codec.random]


def ceil(n, m):
    return -(-n // m)


def whole(n):
    """Single bits travel in whole bytes."""
    return 8 * ceil(n, 8)


def packed(k, places):
    """k numbers below `places`, of as few bits as those take."""
    width = max(places - 1, 0).bit_length()
    bits = 0
    for part in (16, 8, 4):
        if width >= part:
            bits += 8 * ceil(k, 2) if part == 4 else part * k
            width -= part
    return bits + width * whole(k)


def grid_size(n):
    rows = int(np.ceil(np.sqrt(n)))
    return rows * ceil(n, rows) if n else 0


def sent(codec, x, key=KEY):
    key = key if codec.random else None
    return codec.decode(codec.encode(x, key), jax.ShapeDtypeStruct(x.shape, jnp.float32), key)


@jax.jit
def run_all(x):
    """Of each codec the message, and what comes back."""
    result = {}
    for name, (codec, _) in CODECS.items():
        key = KEY if codec.random else None
        message = codec.encode(x, key)
        result[name] = message, codec.decode(message, jax.ShapeDtypeStruct(x.shape, jnp.float32), key)
    return result


def messages_of_all(x):
    return {name: message for name, (message, _) in run_all(x).items()}


def sent_by_all(x):
    return {name: received for name, (_, received) in run_all(x).items()}


@jax.jit
def errors_of_all(x):
    return {name: codec.error(x) for name, (codec, _) in CODECS.items() if codec.error}


def integers(n, rng):
    """Small whole numbers, the largest a power of two: sums, means of blocks and quotients by it are exact."""
    x = rng.integers(-40, 41, n) * (rng.random(n) < 0.8)
    x[: min(n, 1)] = 64
    return x.astype(np.float32)


# ---- references in NumPy ---------------------------------------------------------------------------------------------


def by_block(function, block):
    def run(x, u):
        step = block or max(x.size, 1)
        parts = [function(x[i : i + step], u[i : i + step]) for i in range(0, x.size, step)]
        return np.concatenate([*parts, np.zeros(0, np.float32)]).astype(np.float32)

    return run


def scaled_sign(x, u):
    return np.where(x >= 0, 1, -1) * np.float32(np.abs(x).mean(dtype=np.float64))


def ternary(x, u, threshold=0.6):
    kept = np.abs(x) > threshold * np.sqrt(np.mean(x.astype(np.float64) ** 2))
    return np.sign(x) * kept * np.float32(np.abs(x)[kept].mean(dtype=np.float64) if kept.any() else 0)


def terngrad(x, u):
    largest = np.abs(x).max()
    return np.sign(x) * largest * (u < np.abs(x) * (1 / (largest or np.float32(1))))


def multiples(levels, norm, stochastic):
    def run(x, u):
        unit = np.float32(norm(x)) / np.float32(levels)
        unit = ((unit.view(np.uint32) + 0xFFFF) & 0xFFFF0000).astype(np.uint32).view(np.float32)
        count = np.abs(x) * (1 / (unit or np.float32(1)))
        count = np.floor(count) + (u < count - np.floor(count)) if stochastic else np.round(count)
        return np.sign(x) * np.minimum(count, levels) * unit

    return run


def float_of(dtype, exponent):
    def run(x, u):
        shift = exponent - (np.frexp(np.abs(x).max())[1] if x.any() else -126)
        return np.ldexp(np.ldexp(x, shift).astype(dtype).astype(np.float32), -shift)

    return run


def top_k(x, u):
    rows = int(np.ceil(np.sqrt(x.size)))
    grid = np.resize(np.arange(rows * ceil(x.size, rows)), (rows, ceil(x.size, rows))).T.ravel()
    order = grid[grid < x.size]
    order = order[np.argsort(-np.abs(x[order]), kind="stable")][: ceil(x.size, 10)]
    return np.where(np.isin(np.arange(x.size), order), x, 0)


def largest_of(x):
    return np.abs(x).max()


REFERENCES = {
    "identity": lambda x, u: x,
    "sign": lambda x, u: np.where(x >= 0, 1, -1),
    "scaled_sign": by_block(scaled_sign, None),
    "scaled_sign_8": by_block(scaled_sign, 8),
    "stochastic_sign": by_block(lambda x, u: np.where(2 * u - 1 < x / largest_of(x), 1, -1) * largest_of(x), None),
    "stochastic_sign_40": lambda x, u: np.where(2 * u - 1 < x * np.float32(1 / 40), 40, -40),
    "ternary": by_block(ternary, None),
    "ternary_100": by_block(functools.partial(ternary, threshold=0), 100),
    "terngrad": by_block(terngrad, 100),
    "int8": by_block(multiples(127, largest_of, False), 256),
    "int4": by_block(multiples(7, largest_of, False), 256),
    "int4_random": by_block(multiples(7, largest_of, True), 256),
    "bfloat16": lambda x, u: x.astype(ml_dtypes.bfloat16),
    "float16": by_block(float_of(np.float16, 15), 256),
    "e4m3": by_block(float_of(ml_dtypes.float8_e4m3fn, 8), 256),
    "e5m2": by_block(float_of(ml_dtypes.float8_e5m2, 15), 100),
    "top_k": lambda x, u: top_k(x, u) if x.size else x,
}


@pytest.mark.parametrize("n", SIZES)
def test_what_comes_back_is_what_five_lines_of_numpy_say(n, rng):
    x = integers(n, rng)
    u = np.asarray(jax.random.uniform(KEY, (n,)))
    received = sent_by_all(jnp.asarray(x))
    for name, y in received.items():
        assert y.shape == (n,) and y.dtype == jnp.float32 and np.isfinite(y).all(), name
        if name in REFERENCES:
            np.testing.assert_array_equal(y, np.asarray(REFERENCES[name](x, u), np.float32), name)


@pytest.mark.parametrize("n", SIZES)
def test_bits_are_those_of_the_arrays_that_travel_and_of_the_formula(n):
    messages = jax.eval_shape(run_all, jax.ShapeDtypeStruct((n,), jnp.float32))
    for name, (codec, formula) in CODECS.items():
        arrays = jax.tree.leaves(messages[name][0])
        assert all(a.ndim == 1 for a in arrays), name
        travels = sum(8 * a.size * np.dtype(a.dtype).itemsize for a in arrays)
        assert codec.bits((n,)) == travels == formula(n), (name, n)
        assert codec.bits((3, 2, n)) == 6 * travels
        assert n or not travels


def test_qsgd_sends_neighbours_of_the_entry_among_the_multiples_of_its_unit(rng):
    x = jnp.asarray(rng.standard_t(3, 1000), jnp.float32)
    for levels in (1, 7, 300):
        y = sent(codecs.qsgd(levels, block=None), x)
        unit = float(jnp.linalg.norm(x)) / levels
        assert np.all(np.abs(y - x) <= unit * 1.01)
        counts = np.unique(np.abs(y)) / np.abs(y)[y != 0].min()
        np.testing.assert_array_equal(counts, np.round(counts))


# ---- the same everywhere ---------------------------------------------------------------------------------------------


# One of each kind of arithmetic.
KINDS = ("scaled_sign", "scaled_sign_8", "stochastic_sign", "ternary", "terngrad", "qsgd_7", "qsgd_1", "e4m3_random")
KINDS += ("int4_random", "top_k_int8", "top_k_100", "random_k_unbiased")


def normal_rows(rng, n=1003):
    return jnp.asarray(rng.standard_normal((8, n)) * 10 ** rng.uniform(-3, 3, (8, 1)), jnp.float32)


def test_a_row_travels_alike_alone_in_a_batch_and_on_a_mesh(rng, devices):
    """Messages, what comes back, and what is left: to the bit, also where a compiler may fuse a product and a sum."""
    rows, keys = normal_rows(rng), jax.random.split(KEY, 8)

    def run(x, key):
        result = {}
        for name in KINDS:
            codec = CODECS[name][0]
            key_or_none = key if codec.random else None
            message = codec.encode(x, key_or_none)
            received = codec.decode(message, x, key_or_none)
            result[name] = message, received, x - received
        return result

    mesh = jax.make_mesh((8,), ("worker",), devices=devices, axis_types=(AxisType.Auto,))
    spec = PartitionSpec("worker")

    def on_device(x, key):
        return jax.tree.map(lambda a: a[None], run(x[0], key[0]))

    batched = jax.jit(jax.vmap(run))(rows, keys)
    on_mesh = jax.jit(jax.shard_map(on_device, mesh=mesh, in_specs=spec, out_specs=spec))(rows, keys)
    alone = jax.jit(run)
    alone = [alone(x, key) for x, key in zip(rows, keys, strict=True)]
    alone = jax.tree.map(lambda *a: jnp.stack(a), *alone)
    for other in (batched, on_mesh):
        for name in KINDS:
            for a, b in zip(jax.tree.leaves(alone[name]), jax.tree.leaves(other[name]), strict=True):
                np.testing.assert_array_equal(
                    np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8), err_msg=name, strict=True
                )


def test_sums_are_exact_where_the_numbers_allow_and_keep_their_order(rng):
    for n in (0, 1, 15, 16, 17, 1000):
        assert float(_codec.total(jnp.arange(n, dtype=jnp.float32))) == n * (n - 1) / 2
    x = jnp.asarray(rng.standard_normal((5, 1000)), jnp.float32)
    np.testing.assert_array_equal(_codec.total(x), jnp.stack([_codec.total(row) for row in x]))
    np.testing.assert_allclose(_codec.total(x), np.sum(np.asarray(x, np.float64), axis=1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("width", (0, 1, 3, 4, 5, 8, 13, 16, 20))
def test_packed_numbers_come_back(width, rng):
    codes = rng.integers(0, 1 << width, 101).astype(np.uint32)
    words = _codec.pack(jnp.asarray(codes), width)
    assert sum(8 * w.size * w.dtype.itemsize for w in words) == packed(101, 1 << width)
    np.testing.assert_array_equal(_codec.unpack(words, width, 101), codes)


def test_strict_modes_hold_also_on_zeros(rng):
    x = jnp.asarray(integers(100, rng))
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"), jax.debug_nans(True):
        with jax.transfer_guard("disallow"):
            jax.block_until_ready((sent_by_all(x), messages_of_all(x), errors_of_all(x)))
        zero = sent_by_all(x * 0)
        for name, y in zero.items():
            expected = {"sign": 1.0, "stochastic_sign_40": 40.0}.get(name, 0.0)
            np.testing.assert_array_equal(jnp.abs(y), expected, name)
        assert all(float(e) == 0 for name, e in errors_of_all(x * 0).items() if name != "stochastic_sign_40")


def test_nothing_becomes_wider_where_doubles_are_allowed(rng, x64):
    x = jax.ShapeDtypeStruct((100,), jnp.float32)
    assert jnp.asarray(1.5).dtype == jnp.float64
    for name, (message, y) in jax.eval_shape(run_all, x).items():
        assert y.dtype == jnp.float32, name
        assert all(a.dtype.itemsize <= 4 for a in jax.tree.leaves(message)), name


# ---- what must not happen --------------------------------------------------------------------------------------------


def test_an_entry_that_is_not_finite_costs_itself_alone(rng):
    """The message is that of a row with zeros there."""
    clean, broken = (rng.standard_normal(1000).astype(np.float32) for _ in range(2))
    broken[:] = clean
    broken[[0, 300, 301, 999]] = np.nan, np.inf, -np.inf, -np.nan
    clean[[0, 300, 301, 999]] = 0
    ours, theirs = messages_of_all(jnp.asarray(broken)), messages_of_all(jnp.asarray(clean))
    for name in CODECS:
        for a, b in zip(jax.tree.leaves(ours[name]), jax.tree.leaves(theirs[name]), strict=True):
            np.testing.assert_array_equal(a, b, name)
    for name, e in errors_of_all(jnp.asarray(broken)).items():
        assert np.isfinite(e), name


@pytest.mark.parametrize("size", (3e38, 1e30, 1e-30))
def test_neither_overflow_nor_underflow_spoils_a_row(size):
    x = np.float32(size) * np.array([1.0, -1.0, 0.5, 0.25] * 25, np.float32)
    for name, y in sent_by_all(jnp.asarray(x)).items():
        assert np.isfinite(y).all(), name
        if name not in ("sign", "stochastic_sign_40"):
            assert 0 < float(np.abs(y).max()) <= 10 * size, name  # the norm is 7.6 times the largest entry
    for name, e in errors_of_all(jnp.asarray(x)).items():
        assert np.isfinite(e) or name == "stochastic_sign_40", name


def test_nothing_is_lost_where_the_arithmetic_is_exact(rng):
    x = jnp.asarray(rng.choice([-8.0, -1.0, 0.0, 1.0, 8.0], 64), jnp.float32)
    for name, y in sent_by_all(x).items():
        np.testing.assert_array_equal((x - y) + y, x, name)
        assert not CODECS[name][0].exact or np.array_equal(x, y), name


@pytest.mark.parametrize("name", ("terngrad", "qsgd_1", "e4m3", "int8", "top_k_100"))
def test_zeros_that_fill_up_a_row_take_nothing_from_its_scales(name, rng):
    codec = CODECS[name][0]
    x = jnp.asarray(rng.standard_normal(90), jnp.float32)
    short, long = jax.tree.leaves(codec.encode(x, KEY)), jax.tree.leaves(codec.encode(jnp.pad(x, (0, 10)), KEY))
    if name == "top_k_100":
        np.testing.assert_array_equal(np.sort(np.abs(short[0]))[-9:], np.sort(np.abs(long[0]))[-9:])
    else:
        np.testing.assert_allclose(short[-1].astype(jnp.float32), long[-1].astype(jnp.float32), rtol=1e-2)
    # What it says of scaled signs: the scale shrinks by the share of the zeros.
    np.testing.assert_allclose(
        codecs.scaled_sign().encode(jnp.pad(x, (0, 10)), None)[1] / codecs.scaled_sign().encode(x, None)[1],
        0.9,
        rtol=1e-6,
    )


# ---- how wrong -------------------------------------------------------------------------------------------------------

rows_of_floats = hnp.arrays(np.float32, 24, elements=st.floats(-8, 8, width=16) | st.sampled_from([0.0, 1.0, 1e-3]))


@hypothesis.given(rows_of_floats)
def test_the_error_of_a_codec_without_coins_is_what_it_says(x):
    square = np.sum(x.astype(np.float64) ** 2)
    errors = errors_of_all(jnp.asarray(x))
    for name, y in sent_by_all(jnp.asarray(x)).items():
        codec = CODECS[name][0]
        if codec.error is None or codec.random:
            continue
        lost = np.sum((np.asarray(y, np.float64) - x) ** 2)
        if name == "top_k_int8":
            assert lost <= float(errors[name]) * square + 2e-6 * square, name
        else:
            np.testing.assert_allclose(lost, float(errors[name]) * square, rtol=1e-3, atol=2e-6 * square, err_msg=name)


@hypothesis.given(rows_of_floats)
def test_contractions_contract_by_what_the_docstrings_say(x):
    n, square = x.size, np.sum(x.astype(np.float64) ** 2)
    hypothesis.assume(square > 0)
    errors = {name: float(e) for name, e in errors_of_all(jnp.asarray(x)).items()}
    density = np.abs(x).sum(dtype=np.float64) ** 2 / (n * square)
    np.testing.assert_allclose(errors["scaled_sign"], 1 - density, atol=1e-5)
    small = 1e-5
    assert errors["scaled_sign"] <= 1 - 1 / n + small
    assert errors["scaled_sign_8"] <= errors["scaled_sign"] + small  # more scales, less error
    assert errors["ternary"] < 1
    assert errors["top_k"] <= 1 - 3 / n + small
    assert errors["top_k_100"] == errors["top_k"]
    np.testing.assert_allclose(
        errors["terngrad"], np.abs(x).max() * np.abs(x).sum(dtype=np.float64) / square - 1, rtol=1e-4, atol=small
    )
    np.testing.assert_allclose(errors["stochastic_sign"], n * np.abs(x).max() ** 2 / square - 1, rtol=1e-4, atol=small)
    for levels in (1, 7, 300):
        bound = min(1.02 * n / levels**2, 1.01 * np.sqrt(n) / levels)
        assert errors[f"qsgd_{levels}"] <= bound + small


@hypothesis.given(rows_of_floats)
def test_narrow_numbers_are_as_near_as_their_table_says(x):
    received, largest = sent_by_all(jnp.asarray(x)), np.abs(x).max()
    for name, relative, absolute in (
        ("bfloat16", 2**-8, 0),
        ("float16", 2**-11, 2**-39),
        ("e4m3", 2**-4, 2**-17),
        ("e5m2", 2**-3, 2**-31),
        ("int8", 0, 1 / 252),
        ("int4", 0, 1 / 13.8),
    ):
        assert np.all(np.abs(received[name] - x) <= np.maximum(relative * np.abs(x), absolute * largest)), name


def draws(codec, x, number=4096):
    return np.asarray(jax.jit(jax.vmap(lambda key: sent(codec, x, key)))(jax.random.split(KEY, number)), np.float64)


def is_right_on_average(codec, x):
    found = draws(codec, x)
    return np.all(np.abs(found.mean(0) - x) <= 5 * found.std(0) / np.sqrt(len(found)) + 1e-6 * np.abs(x).max())


HEAVY = jnp.asarray(np.random.default_rng(1).standard_t(2, 24), jnp.float32)


@pytest.mark.parametrize("name", RANDOM)
def test_codecs_with_coins_are_right_on_average_if_they_say_so_and_as_wrong_as_they_say(name):
    codec = CODECS[name][0]
    x = jnp.round(HEAVY * 16) * 2.5 if name == "stochastic_sign_40" else HEAVY  # some entries above 40
    found = draws(codec, x)
    lost = np.sum((found - np.asarray(x, np.float64)) ** 2, axis=1)
    expected = float(codec.error(x)) * np.sum(np.asarray(x, np.float64) ** 2)
    assert abs(lost.mean() - expected) <= 5 * lost.std() / np.sqrt(len(lost)) + 1e-4 * expected
    assert is_right_on_average(codec, x) == codec.unbiased


def test_the_test_of_averages_sees_a_bias():
    """Negative control: rounding to nearest, and the largest entries, are not right on average."""
    for name in ("int4", "e4m3", "top_k", "scaled_sign"):
        assert not CODECS[name][0].unbiased
        assert not is_right_on_average(CODECS[name][0], HEAVY), name


# ---- sparse ones -----------------------------------------------------------------------------------------------------


def test_top_k_sends_the_largest_and_exactly_as_many_as_it_says(rng):
    x = jnp.asarray(rng.standard_normal(1000), jnp.float32)
    for share, k in ((0.07, 70), (0.0001, 1), (0.1234, 124), (1.0, 1000)):
        y = np.asarray(sent(codecs.top_k(share), x))
        assert np.count_nonzero(y) == k
        np.testing.assert_array_equal(np.sort(np.abs(y))[-k:], np.sort(np.abs(x))[-k:])
    assert codecs.top_k(1.0).exact and not codecs.top_k(0.5).exact


@pytest.mark.parametrize("n", (32768, 40001))
def test_entries_of_a_long_row_are_found_by_counting_and_are_those_of_a_sort(n, rng, devices):
    """Ties, zeros, numbers of every size, and a sample that misleads: alone, in a batch, and on a mesh that checks."""
    normal = rng.standard_normal((8, n))
    sampled = np.arange(n) % 64 == 0
    rows = np.stack(
        [
            normal[0],
            np.zeros(n),
            np.full(n, 3e38),
            rng.integers(-3, 4, n),
            normal[4] * (rng.random(n) < 0.01),
            normal[5] * 10.0 ** rng.uniform(-37, 37, n),
            np.where(sampled, 100 * normal[6], normal[6]),
            np.where(sampled, 0, normal[7]),
        ]
    ).astype(np.float32)
    expected = np.stack([top_k(x, None) for x in rows])
    rows[4, rows[4] == 0] = np.nan
    codec = codecs.top_k(0.1)
    batched = jax.jit(jax.vmap(codec.encode, in_axes=(0, None)))(rows, None)
    alone = jax.jit(codec.encode)
    mesh = jax.make_mesh((8,), ("worker",), devices=devices, axis_types=(AxisType.Auto,))
    spec = PartitionSpec("worker")
    on_mesh = jax.shard_map(
        lambda x: jax.tree.map(lambda a: a[None], codec.encode(x[0], None)), mesh=mesh, in_specs=spec, out_specs=spec
    )
    on_mesh = jax.jit(on_mesh)(rows)
    for i, row in enumerate(rows):
        message = alone(row, None)
        np.testing.assert_array_equal(codec.decode(message, row, None), expected[i])
        for a, b, c in zip(*map(jax.tree.leaves, (message, batched, on_mesh)), strict=True):
            np.testing.assert_array_equal(a, b[i])
            np.testing.assert_array_equal(a, c[i])


@pytest.mark.parametrize("n", (1, 33, 1003))
@pytest.mark.parametrize("share", (0.001, 0.3, 1.0))
def test_counting_takes_the_places_that_a_stable_sort_takes(n, share, rng):
    number, (rows, columns, _) = sparse._number(share, n), sparse._grid(n, None)
    counted = jax.jit(lambda x: sparse._counted(x, number, rows, columns))
    for x in (rng.standard_normal(n), rng.integers(-1, 2, n), np.zeros(n)):
        x = x.astype(np.float32)
        read = np.abs(np.pad(x, (0, rows * columns - n))).reshape(rows, columns).T.ravel()
        expected = np.argsort(-read, kind="stable")[:number]
        np.testing.assert_array_equal(np.sort(counted(x)), np.sort(expected))


def test_values_of_a_long_row_travel_by_size_so_that_neighbours_may_share_a_scale(rng):
    x = jnp.asarray(rng.standard_normal(40000), jnp.float32)
    kept = codecs.top_k(0.01, values=codecs.identity()).encode(x, None)[0][0]
    np.testing.assert_array_equal(np.abs(kept), np.sort(np.abs(x))[::-1][:400])


@pytest.mark.parametrize("block", (64, 256))
def test_blocks_that_take_turns_lose_little_against_the_whole_row(block, rng):
    """Also where layers differ in size by a factor of a million, which blocks of neighbours would lose all of."""
    layers = jnp.asarray(rng.standard_normal(8192) * np.repeat(10.0 ** -np.arange(8), 1024), jnp.float32)
    best = float(codecs.top_k(0.05).error(layers))
    assert best <= float(codecs.top_k(0.05, block=block).error(layers)) + 0.06 <= best + 0.1
    _, places = jax.lax.top_k(jnp.abs(layers.reshape(-1, block)), block // 20)
    neighbours = jnp.take_along_axis(layers.reshape(-1, block), places, axis=1)
    assert 1 - float(jnp.sum(neighbours**2) / jnp.sum(layers**2)) > best + 0.1


def test_values_of_top_k_may_travel_in_another_codec(rng):
    x = jnp.asarray(rng.standard_normal(1000), jnp.float32)
    plain, narrow = codecs.top_k(0.1), codecs.top_k(0.1, values=codecs.scaled_sign())
    assert narrow.bits((1000,)) == plain.bits((1000,)) - 32 * 100 + 104 + 32
    kept = sent(plain, x) != 0
    np.testing.assert_array_equal(sent(narrow, x) != 0, kept)
    lost = jnp.sum((sent(narrow, x) - x) ** 2) / jnp.sum(x**2)
    np.testing.assert_allclose(lost, narrow.error(x), rtol=1e-4)
    assert codecs.top_k(0.1, values=codecs.terngrad()).random
    assert codecs.top_k(0.1, values=codecs.sign()).error is None


def test_random_k_draws_one_of_each_stretch_and_each_of_them_sometimes():
    x = jnp.arange(1, 24, dtype=jnp.float32)  # 7 stretches: two of 4, five of 3
    found = draws(codecs.random_k(0.3), x) != 0
    assert np.all(found.sum(1) == 7)
    odds = np.array([1 / 4] * 8 + [1 / 3] * 15)
    assert np.all(np.abs(found.mean(0) - odds) <= 5 * np.sqrt(odds * (1 - odds) / len(found)))
    # The place is in the key alone: another one puts the entries elsewhere.
    codec, like = codecs.random_k(0.3), jax.ShapeDtypeStruct((23,), jnp.float32)
    message = codec.encode(x, KEY)
    np.testing.assert_array_equal(codec.decode(message, like, KEY), jnp.where(sent(codec, x) != 0, x, 0))
    assert not np.array_equal(codec.decode(message, like, KEY), codec.decode(message, like, jax.random.key(8)))


def test_signs_of_subnormal_numbers_are_kept():
    x = jnp.asarray(np.array([1e-45, -1e-45, 0.0, -0.0], np.float32))
    assert sent(codecs.sign(), x).tolist() == [1, -1, 1, 1]


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "message"),
    (
        (lambda: codecs.top_k(0), ValueError, r"`top_k\(share=...\)` has to be in \(0, 1\], got 0."),
        (lambda: codecs.random_k(1.5), ValueError, r"`random_k\(share=...\)` has to be in \(0, 1\], got 1.5."),
        (lambda: codecs.top_k("1"), TypeError, r"`top_k\(share=...\)` has to be a number in \(0, 1\], got '1'."),
        (
            lambda: jax.jit(lambda s: codecs.top_k(s).bits((3,)))(0.5),
            TypeError,
            r"`top_k\(share=...\)` has to be a number that is known in Python, got ",
        ),
        (lambda: codecs.qsgd(0), ValueError, r"`qsgd\(levels=...\)` has to be at least 1, got 0."),
        (lambda: codecs.qsgd(2.0), TypeError, r"`qsgd\(levels=...\)` has to be a Python integer, got 2.0."),
        (lambda: codecs.qsgd(40000), ValueError, r"`qsgd\(levels=...\)` has to be at most 32767, got 40000."),
        (lambda: codecs.low_precision("int3"), ValueError, r"`low_precision\(dtype=...\)` has to be one of .*'int3'."),
        (lambda: codecs.scaled_sign(block=0), ValueError, r"`scaled_sign\(block=...\)` has to be at least 1, got 0."),
        (lambda: codecs.ternary(-1.0), ValueError, r"`ternary\(threshold=...\)` has to be at least 0, got -1.0."),
        (
            lambda: codecs.stochastic_sign(scale=0.0),
            ValueError,
            r"`stochastic_sign\(scale=...\)` has to be positive, got 0.0.",
        ),
        (
            lambda: codecs.random_k(0.5).decode((HEAVY,), HEAVY, None),
            ValueError,
            r"`random_k\(...\).decode\(key=...\)` has to be given, got None",
        ),
        (
            lambda: codecs.sign().encode(HEAVY.reshape(2, 12), None),
            ValueError,
            r"`sign\(...\).encode\(x=...\)` has to be one row of shape \(n,\), got the shape \(2, 12\).",
        ),
    ),
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match="^" + message):
        call()


@pytest.mark.parametrize("name", RANDOM)
def test_a_random_codec_wants_a_key(name):
    with pytest.raises(ValueError, match=r"encode\(key=...\)` has to be given, got None: the codec is random"):
        CODECS[name][0].encode(HEAVY, None)
