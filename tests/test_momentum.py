"""Left of the border: signs with a threshold, momentum, and what happens to numbers that are not finite."""

import contextlib

import chex
import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

import reference
import signopt

FLOATS = ("float16", "bfloat16", "float32")
SPECIAL = (0.0, -0.0, np.nan, np.inf, -np.inf, 1.0, -1.0)


def run(transform, gradients, params=None):
    """Updates `(steps, *shape)` and the last state, the steps in one scan."""
    params = gradients[0] if params is None else params

    def step(state, g):
        updates, state = transform.update(g, state, params)
        return state, updates

    state, updates = jax.jit(lambda s, g: jax.lax.scan(step, s, g))(transform.init(params), gradients)
    return updates, state


# ---- what a sign is --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (*FLOATS, "float64"))
@pytest.mark.parametrize("jit", (False, True))
def test_subnormals_vote_and_zero_nan_and_inf_do_not(dtype, jit, x64):
    info = ml_dtypes.finfo(dtype)
    tiny, normal, top = (float(x) for x in (info.smallest_subnormal, info.smallest_normal, info.max))
    x = np.array([*SPECIAL, tiny, -tiny, normal, -normal, top, -top, normal / 2], dtype)
    sign = jax.jit(signopt.sign.sign) if jit else signopt.sign.sign
    got = sign(jnp.asarray(x))
    assert got.dtype == x.dtype
    expected = [0, 0, 0, 0, 0, 1, -1, 1, -1, 1, -1, 1, -1, 1]
    np.testing.assert_array_equal(np.asarray(got, np.float64), expected)
    np.testing.assert_array_equal(reference.sign(x), expected)
    assert not np.signbit(np.asarray(got, np.float64)[:5]).any()


@hypothesis.given(hnp.arrays(np.float32, 16, elements=st.floats(width=32)))
def test_sign_agrees_with_its_definition_on_any_number(x):
    np.testing.assert_array_equal(signopt.sign.sign(jnp.asarray(x)), reference.sign(x))


@pytest.mark.parametrize("dtype", (jnp.int32, jnp.complex64, jnp.bool_))
def test_leaves_that_are_not_real_floats_are_refused(dtype):
    updates = {"w": jnp.ones(3, dtype)}
    for transform in (signopt.scale_by_sign(), signopt.scale_by_signum()):
        with pytest.raises(TypeError, match=jnp.dtype(dtype).name):
            transform.update(updates, transform.init({"w": jnp.ones(3)}))


# ---- scale_by_sign ---------------------------------------------------------------------------------------


def test_scale_by_sign_by_hand():
    # rms([3, 4, 0, 0]) = 2.5
    x = jnp.array([3.0, -4.0, 0.0, 0.0])
    for threshold, expected in ((0.0, [1, -1, 0, 0]), (1.0, [1, -1, 0, 0]), (1.3, [0, -1, 0, 0]), (1.7, [0, 0, 0, 0])):
        transform = signopt.scale_by_sign(threshold=threshold)
        np.testing.assert_array_equal(transform.update(x, transform.init(x))[0], expected)


def test_the_threshold_is_relative_to_each_leaf():
    small, large = jnp.array([1.0, 3.0, -3.0]), jnp.array([100.0, 300.0, -300.0])
    transform = signopt.scale_by_sign(threshold=1.0)
    updates, _ = transform.update({"a": small, "b": large}, transform.init(None))
    np.testing.assert_array_equal(updates["a"], [0, 1, -1])
    np.testing.assert_array_equal(updates["b"], updates["a"])


def test_an_entry_of_exactly_the_threshold_abstains():
    x = jnp.array([1.0, -1.0, 1.0, 1.0])  # every |x| is exactly rms(x)
    transform = signopt.scale_by_sign(threshold=1.0)
    np.testing.assert_array_equal(transform.update(x, transform.init(x))[0], np.zeros(4))


@pytest.mark.parametrize("scale", (1e-3, 1.0, 1e4, 1e30, 1e-30))
@pytest.mark.parametrize("dtype", FLOATS)
def test_the_threshold_survives_large_and_small_leaves(scale, dtype):
    if dtype == "float16" and not 1e-4 < scale < 1e5:
        pytest.skip("out of float16's range")
    x = jnp.asarray(np.array([3.0, -4.0, 0.5, 0.0]) * scale, dtype)
    transform = signopt.scale_by_sign(threshold=1.0)
    np.testing.assert_array_equal(transform.update(x, transform.init(x))[0].astype(jnp.float32), [1, -1, 0, 0])


def test_one_bad_entry_does_not_silence_its_leaf():
    x = jnp.array([3.0, -4.0, 0.5, jnp.nan, jnp.inf])
    for threshold in (0.0, 0.1):
        transform = signopt.scale_by_sign(threshold=threshold)
        np.testing.assert_array_equal(transform.update(x, transform.init(x))[0], [1, -1, 1, 0, 0])


def test_scale_by_sign_takes_odd_trees_and_a_traced_threshold():
    tree = {
        "e": jnp.zeros(0),
        "s": jnp.float32(2.0),
        "n": None,
        "m": optax.MaskedNode(),
        "b": jnp.ones(2, jnp.bfloat16),
    }
    for threshold in (0.0, 0.5):
        update = lambda t, x: signopt.scale_by_sign(threshold=t).update(x, optax.EmptyState())[0]
        for updates in (update(threshold, tree), jax.jit(update)(threshold, tree)):
            chex.assert_trees_all_equal_shapes_and_dtypes(updates, tree)
            assert updates["s"] == 1
    injected = optax.inject_hyperparams(signopt.scale_by_sign)(threshold=0.5)
    updates, _ = injected.update(tree, injected.init(tree), tree)
    assert updates["s"] == 1


# ---- scale_by_signum -------------------------------------------------------------------------------------

INTEGERS = st.integers(-4, 4).map(float)


@pytest.mark.parametrize("nesterov", (False, True))
@pytest.mark.parametrize("warmup_steps", (0, 3))
@hypothesis.given(hnp.arrays(np.float32, (6, 9), elements=st.one_of(INTEGERS, st.sampled_from(SPECIAL))))
def test_signum_agrees_with_its_definition(nesterov, warmup_steps, gradients):
    transform = signopt.scale_by_signum(0.5, warmup_steps=warmup_steps, nesterov=nesterov)
    updates, state = signum_run(transform, nesterov, warmup_steps)(gradients)
    expected, momenta = reference.signum(gradients, 0.5, warmup_steps, nesterov)
    np.testing.assert_array_equal(updates, expected)
    np.testing.assert_array_equal(optax.tree.get(state, "ema"), momenta[-1])
    assert optax.tree.get(state, "total_notfinite") == (~np.isfinite(gradients)).any(1).sum()


_RUNS = {}


def signum_run(transform, *key):
    """A compiled scan per setting, kept over the examples that hypothesis draws."""

    def scan(gradients):
        step = lambda state, g: transform.update(g, state)[::-1]
        state, updates = jax.lax.scan(step, transform.init(gradients[0]), gradients)
        return updates, state

    return _RUNS.setdefault(key, jax.jit(scan))


def test_nesterov_and_warm_up_change_the_vote():
    """Negative control for the test above: a gradient that turns against its momentum tells them apart."""
    gradients = np.array([[4.0], [4.0], [-3.0]], np.float32)
    signs = {
        "plain": reference.signum(gradients, 0.5)[0],
        "nesterov": reference.signum(gradients, 0.5, nesterov=True)[0],
        "warm-up": reference.signum(gradients, 0.5, warmup_steps=3)[0],
    }
    assert [int(s[-1, 0]) for s in signs.values()] == [0, -1, -1]
    slow = np.array([[9.0], [-1.0]], np.float32)
    assert reference.signum(slow, 0.5, nesterov=True)[0][-1, 0] == 1
    assert reference.signum(slow, 0.5, warmup_steps=2)[0][-1, 0] == -1


@pytest.mark.parametrize("beta", (0.0, 0.9))
def test_signum_without_extras_is_the_sign_of_optaxs_average(beta, rng):
    gradients = jnp.asarray(rng.normal(size=(20, 50)), jnp.float32)
    updates, _ = run(signopt.scale_by_signum(beta), gradients)
    average, _ = run(optax.ema(beta, debias=False), gradients)
    np.testing.assert_array_equal(updates, np.sign(average))


@pytest.mark.parametrize("accumulator_dtype", (None, "bfloat16", "float32"))
def test_the_accumulator_has_the_dtype_asked_for(accumulator_dtype):
    params = {d: jnp.ones(3, d) for d in FLOATS}
    transform = signopt.scale_by_signum(accumulator_dtype=accumulator_dtype)
    state = transform.init(params)
    for _ in range(2):
        updates, new_state = transform.update(params, state)
        chex.assert_trees_all_equal_dtypes(updates, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)
        state = new_state
    for dtype, leaf in optax.tree.get(state, "ema").items():
        assert leaf.dtype == (accumulator_dtype or dtype)


@pytest.mark.parametrize("accumulator_dtype", ("float16", "bfloat16", None))
def test_no_gradient_makes_the_state_non_finite(accumulator_dtype):
    top = np.finfo(np.float32).max
    values = np.array([np.nan, np.inf, -np.inf, top, -top, 1e5, -1e5, 65519.0, 1.0, 0.0], np.float32)
    rng = np.random.default_rng(0)
    gradients = rng.choice(values, (50, 64))
    updates, state = run(signopt.scale_by_signum(0.9, accumulator_dtype=accumulator_dtype), gradients)
    chex.assert_tree_all_finite((updates, state))
    assert set(np.unique(updates)) <= {-1.0, 0.0, 1.0}


def test_a_float16_gradient_at_the_top_of_its_range_stays_finite():
    gradients = np.full((30, 4), np.finfo(np.float16).max)
    updates, state = run(signopt.scale_by_signum(0.9), gradients)
    chex.assert_tree_all_finite(state)
    np.testing.assert_array_equal(updates, np.ones((30, 4)))


def test_a_bad_gradient_leaves_the_vote_to_memory_and_is_counted():
    gradients = np.array([[4.0, -4.0], [np.nan, np.inf], [np.nan, 0.5], [4.0, -4.0]], np.float32)
    updates, state = run(signopt.scale_by_signum(0.5), gradients)
    np.testing.assert_array_equal(updates, [[1, -1]] * 4)
    count = optax.tree.get(state, "total_notfinite")
    assert count.dtype == jnp.int32 and count.shape == ()
    assert count == 2
    # Negative control: optax's own average keeps the NaN for ever.
    assert np.isnan(run(optax.ema(0.5, debias=False), gradients)[0][-1, 0])


def test_during_warm_up_a_bad_gradient_abstains():
    gradients = np.array([[4.0], [np.nan], [-1.0], [-1.0]], np.float32)
    updates, _ = run(signopt.scale_by_signum(0.5, warmup_steps=3), gradients)
    np.testing.assert_array_equal(updates[:, 0], [1, 0, -1, -1])


def test_subnormal_momentum_still_votes_when_it_arrives():
    tiny = np.finfo(np.float32).smallest_subnormal
    updates, _ = run(signopt.scale_by_signum(0.9, warmup_steps=1), np.array([[tiny, -tiny]]))
    np.testing.assert_array_equal(updates, [[1, -1]])


# ---- finite_only -----------------------------------------------------------------------------------------


def test_finite_only_keeps_bad_entries_from_any_transformation_and_counts_steps():
    tx = signopt.finite_only(optax.trace(0.5))
    gradients = jnp.array([[4.0, jnp.nan, 1.0], [-jnp.inf, 2.0, 1.0], [1.0, 1.0, 1.0]])
    updates, state = run(tx, gradients)
    np.testing.assert_array_equal(updates, [[4, 0, 1], [2, 2, 1.5], [2, 2, 1.75]])
    assert state.total_notfinite == 2
    assert isinstance(state, signopt.momentum.FiniteOnlyState)


def test_finite_only_leaves_an_entry_that_overflows_as_it_was():
    tx = signopt.finite_only(optax.trace(1.0))
    _, state = run(tx, jnp.full((3, 1), 4e4, jnp.float16))
    np.testing.assert_array_equal(state.inner_state.trace, np.float16([4e4]))  # 8e4 does not fit
    assert state.total_notfinite == 0


@pytest.mark.parametrize("kind", ("Auto", "Explicit"))
def test_counting_gathers_no_sharded_gradient(kind, devices):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(getattr(jax.sharding.AxisType, kind),), devices=devices)
    split = jax.NamedSharding(mesh, jax.P(None, "x"))
    params = {name: jax.device_put(jnp.ones((16, 8 * n)), split) for n, name in enumerate("abc", start=1)}
    tx = signopt.finite_only(optax.trace(0.9))
    with jax.set_mesh(mesh) if kind == "Explicit" else contextlib.nullcontext():
        state = tx.init(params)
        program = jax.jit(tx.update).lower(params, state).compile()
        assert "all-gather" not in program.as_text()
        bad = params | {"b": jax.device_put(np.where(np.eye(16), np.nan, np.float32(1)), split)}
        _, state = jax.jit(tx.update)(bad, state)
        _, state = jax.jit(tx.update)(params, state)
    assert state.total_notfinite == 1
    assert state.inner_state.trace["a"].sharding.is_equivalent_to(split, 2)


def test_inject_hyperparams_takes_beta_and_warm_up():
    params = jnp.ones(3)
    injected = optax.inject_hyperparams(signopt.scale_by_signum)(beta=0.5, warmup_steps=2)
    plain = signopt.scale_by_signum(0.5, warmup_steps=2)
    gradients = jnp.array([[4.0, 1.0, 0.0], [-1.0, -2.0, 1.0], [-1.0, 4.0, -1.0]])
    got, state = run(injected, gradients, params)
    expected, plain_state = run(plain, gradients, params)
    np.testing.assert_array_equal(got, expected)
    chex.assert_trees_all_equal_structs(state.inner_state, plain_state)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"beta": 1.5}, r"`scale_by_signum\(beta=...\)` .*\[0, 1\).*got 1\.5"),
        ({"beta": -0.1}, r"`scale_by_signum\(beta=...\)` .*\[0, 1\).*got -0\.1"),
        ({"beta": jnp.float32(1.5)}, r"`scale_by_signum\(beta=...\)` .*\[0, 1\).*got 1\.5"),
        ({"warmup_steps": -1}, r"`scale_by_signum\(warmup_steps=...\)` .*got -1"),
    ],
)
def test_bad_settings_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        signopt.scale_by_signum(**kwargs)


def test_a_negative_threshold_is_refused():
    with pytest.raises(ValueError, match=r"`scale_by_sign\(threshold=...\)` .*got -1\.0"):
        signopt.scale_by_sign(threshold=-1.0)
