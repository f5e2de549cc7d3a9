"""Densities, moments, sign errors, margins and geometry: against definitions, and against what they should warn of."""

import math
import warnings

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.papers import regimes
import reference
import signopt
from signopt import diagnostics
from signopt import theory

AXIS = "worker"


def over_workers(fun, *args):
    """`fun` on simulated workers, whose results have to be the same on all."""
    return jax.jit(jax.vmap(fun, out_axes=None, axis_name=AXIS))(*args)


# ---- density ---------------------------------------------------------------------------------------------------------


@hypothesis.given(
    hnp.arrays(np.float32, 12, elements=st.floats(-1e3, 1e3, width=32)), st.sampled_from([1e-30, 1.0, 1e30])
)
def test_density_is_its_definition_at_every_scale(v, scale):
    found = float(diagnostics.density([jnp.asarray(v[:5] * np.float32(scale)), jnp.asarray(v[5:] * np.float32(scale))]))
    wide = (v * np.float32(scale)).astype(np.float64)
    hypothesis.assume(np.abs(wide).max() >= 1e-37)  # XLA flushes smaller ones to zero
    assert found == pytest.approx(np.abs(wide).sum() ** 2 / (12 * (wide**2).sum()), rel=1e-5)
    assert 1 / 12 - 1e-6 <= found <= 1 + 1e-6


def test_density_shows_what_is_not_finite():
    """It is a ratio of two infinite norms then."""
    for bad in (math.nan, math.inf):
        assert math.isnan(diagnostics.density([jnp.ones(2), jnp.array([bad, 0.0])]))


def test_density_of_the_ends_and_of_nothing():
    assert float(diagnostics.density(jnp.full(7, -3.0))) == pytest.approx(1)
    assert float(diagnostics.density(jnp.zeros(7).at[2].set(5.0))) == pytest.approx(1 / 7)
    assert float(diagnostics.density(jnp.zeros(7))) == 0
    assert float(diagnostics.density([])) == 0
    normal = jax.random.normal(jax.random.key(0), (100_000,))
    assert float(diagnostics.density(normal)) == pytest.approx(2 / math.pi, rel=0.01)


def test_density_can_be_watched_inside_a_chain():
    tx = optax.chain(optax.snapshot("density", diagnostics.density), optax.sgd(0.1))
    _, state = tx.update(jnp.array([1.0, 0.0]), tx.init(jnp.ones(2)))
    assert float(optax.tree.get(state, "density")) == 0.5


# ---- moments ---------------------------------------------------------------------------------------------------------


def moments_of(samples):
    step = lambda moments, x: (diagnostics.update_moments(moments, x), None)
    return jax.jit(lambda samples: jax.lax.scan(step, diagnostics.init_moments(samples[0]), samples)[0])(samples)


@pytest.mark.parametrize("dtype", (jnp.float32, jnp.bfloat16))
def test_welford_is_the_two_pass_formula(rng, dtype):
    samples = jnp.asarray(1000 + rng.normal(size=(50, 4)), dtype)  # where sums of squares lose everything
    moments = moments_of(samples)
    wide = np.asarray(samples, np.float64)
    assert int(moments.count) == 50 and moments.mean.dtype == jnp.float32
    assert np.allclose(moments.mean, wide.mean(0), rtol=1e-6)
    assert np.allclose(diagnostics.variance(moments), wide.var(0, ddof=1), rtol=1e-3)
    naive = (samples.astype(jnp.float32) ** 2).mean(0) - samples.astype(jnp.float32).mean(0) ** 2
    assert not np.allclose(naive, wide.var(0), rtol=1e-3)  # the negative control


def test_too_few_samples_have_no_variance():
    assert jnp.all(jnp.isnan(diagnostics.variance(moments_of(jnp.ones((1, 3))))))


def test_gradient_moments_look_at_every_mini_batch(rng):
    x = jnp.asarray(rng.normal(size=(8, 4, 3)), jnp.float32)
    gradient = jax.grad(lambda w, batch: jnp.mean((batch @ w) ** 2))
    w = jnp.ones(3)
    moments = diagnostics.gradient_moments(gradient, w, x)
    expected = np.stack([gradient(w, batch) for batch in x])
    assert int(moments.count) == 8 and np.allclose(moments.mean, expected.mean(0), rtol=1e-5)
    for batches in (x[:1], x[:0], x[:, :0]):
        with pytest.raises(
            ValueError, match=r"at least 2 mini-batches along a leading axis, none of them empty, got shape"
        ):
            diagnostics.gradient_moments(gradient, w, batches)


# ---- signs -----------------------------------------------------------------------------------------------------------


def test_signal_to_noise_against_the_critical_line():
    samples = 1.0 * jnp.array([0.1, 0.9, 1.4, 3.0]) + jax.random.normal(jax.random.key(0), (4000, 4))
    ratios = diagnostics.signal_to_noise(moments_of(samples))
    assert np.allclose(ratios, [0.1, 0.9, 1.4, 3.0], atol=5 * 2 / math.sqrt(4000))
    assert float(diagnostics.share_above(ratios)) == 0.5  # 1.4 and 3 are above 2 / sqrt(3)
    assert float(diagnostics.share_above(ratios, 2.0)) == 0.25


def test_signal_to_noise_without_noise_or_signal():
    ratios = diagnostics.signal_to_noise(moments_of(jnp.array([[1.0, 0.0], [1.0, 0.0]])))
    assert ratios.tolist() == [math.inf, 0.0]


def test_sign_error_is_measured_within_its_bounds():
    true = jnp.array([0.2, -0.8, 2.0])
    samples = true + jax.random.normal(jax.random.key(0), (20_000, 3))
    found = jax.jit(diagnostics.sign_error_probability)(samples, true)
    expected = theory.sign_error_normal(jnp.abs(true))
    assert np.all(np.abs(found - expected) <= 5 * np.sqrt(expected / 20_000))
    ratios = diagnostics.signal_to_noise(moments_of(samples))
    assert np.all(found <= theory.sign_error_gauss(ratios)) and np.all(found <= theory.sign_error_cantelli(ratios))
    skewed = jnp.where(jax.random.bernoulli(jax.random.key(0), 0.1, (20_000, 1)), 50.0, -1.0)
    assert float(jax.jit(diagnostics.sign_error_probability)(skewed)[0]) == pytest.approx(0.9, abs=0.02)
    ratio = diagnostics.signal_to_noise(moments_of(skewed))
    assert float(theory.sign_error_gauss(ratio)[0]) < 0.5  # the negative control: it breaks what Gauss assumes


def test_sign_error_needs_a_sample():
    samples = jnp.zeros((6, 5))
    with pytest.raises(ValueError, match=r"has to hold at least 1 sample along a leading axis, got shape \(0, 5\)"):
        diagnostics.sign_error_probability(samples[:0])


# ---- margins ---------------------------------------------------------------------------------------------------------


def test_vote_statistics_are_their_definitions(rng):
    values = {"a": rng.normal(size=(5, 11)), "b": rng.choice([-1.0, 0.0, 1.0], (5, 3, 7))}
    found = over_workers(
        lambda x: diagnostics.vote_statistics(x, AXIS), jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), values)
    )
    ballots = np.concatenate([reference.sign(x).reshape(5, -1) for x in values.values()], axis=1)
    total = ballots.sum(0)
    with_majority, on_decided = (ballots * np.sign(total) > 0).sum(1), ((ballots != 0) & (total != 0)).sum(1)
    assert int(found.num_workers) == 5
    assert float(found.margin) == pytest.approx(np.abs(total).mean() / 5)
    assert float(found.agreement) == pytest.approx(with_majority.sum() / on_decided.sum())
    assert float(found.lowest_agreement) == pytest.approx((with_majority / on_decided).min())
    assert float(found.abstentions) == pytest.approx((ballots == 0).mean(), abs=1e-6)


def test_a_worker_that_sends_opposites_agrees_least():
    values = (jnp.ones((5, 100)) + 0.5 * jax.random.normal(jax.random.key(0), (5, 100))).at[2].multiply(-1)
    found = over_workers(lambda x: diagnostics.vote_statistics(x, AXIS), values)
    assert float(found.lowest_agreement) < 0.1 and float(found.agreement) > 0.75


def watched_step(reduce_first):
    tx = optax.chain(signopt.majority_vote(AXIS, report=True), optax.scale(-0.1))

    def step(state, batch):
        params, opt_state = state
        grads = params + batch[0]
        grads = jax.lax.pmean(grads, AXIS) if reduce_first else grads
        updates, opt_state = tx.update(grads, opt_state)
        return (optax.apply_updates(params, updates), opt_state), None

    return tx, step


@pytest.mark.parametrize("reduce_first", (True, False))
def test_gradients_reduced_before_the_vote_are_warned_of_under_pmap(devices, reduce_first):
    tx, step = watched_step(reduce_first)
    params = jnp.ones(64)
    state = jax.tree.map(lambda x: jnp.stack([x] * 4), (params, tx.init(params)))
    noise = jax.random.normal(jax.random.key(0), (4, 1, 64))
    (_, opt_state), _ = jax.pmap(step, axis_name=AXIS, devices=devices[:4])(state, noise)
    statistics = jax.tree.map(lambda x: x[0], opt_state[0].report)
    if reduce_first:
        with pytest.warns(UserWarning, match=r"All 4 workers vote the same on every coordinate \(mean margin 1\)"):
            assert diagnostics.warn_if_unanimous(statistics)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert not diagnostics.warn_if_unanimous(statistics)
        assert 0.3 < float(statistics.margin) < 1


def test_votes_can_be_watched_on_a_mesh_and_one_worker_is_no_warning(devices):
    tx, step = watched_step(reduce_first=False)
    params = jnp.ones(64)
    mesh = jax.make_mesh((4,), (AXIS,), (jax.sharding.AxisType.Auto,), devices=devices[:4])
    noise = jax.random.normal(jax.random.key(0), (4, 64))
    (_, on_mesh), _ = signopt.workers.on_mesh(step, mesh, axis_name=AXIS)((params, tx.init(params)), noise)
    (_, simulated), _ = signopt.workers.simulate(step, 4, axis_name=AXIS)((params, tx.init(params)), noise)
    assert [float(x) for x in on_mesh[0].report] == pytest.approx([float(x) for x in simulated[0].report])
    one = over_workers(lambda x: diagnostics.vote_statistics(x, AXIS), jnp.ones((1, 8)))
    assert float(one.margin) == 1 and not diagnostics.warn_if_unanimous(one)


# ---- curvature -------------------------------------------------------------------------------------------------------


def test_hutchinson_is_exact_for_diagonal_hessians_and_unbiased_for_others(rng):
    exact = diagnostics.hessian_diagonal(
        lambda p: jnp.sum(p["a"] ** 3) + p["b"] ** 2,
        {"a": jnp.arange(1.0, 4.0), "b": jnp.float32(3)},
        jax.random.key(0),
        probes=1,
    )
    assert exact["a"].tolist() == [6.0, 12.0, 18.0] and float(exact["b"]) == 2
    a = rng.normal(size=(6, 6))
    hessian = jnp.asarray(a @ a.T, jnp.float32)
    estimate = lambda key: diagnostics.hessian_diagonal(lambda x: x @ hessian @ x / 2, jnp.zeros(6), key, probes=1)
    found = jax.jit(jax.vmap(estimate))(jax.random.split(jax.random.key(0), 4000))
    variance = (hessian**2).sum(1) - jnp.diag(hessian) ** 2
    assert np.all(np.abs(found.mean(0) - jnp.diag(hessian)) <= 5 * np.sqrt(variance / 4000))
    assert np.allclose(found.var(0), variance, rtol=0.2)


def test_losses_without_second_derivatives_are_refused():
    with pytest.raises(ValueError, match=r"has to be given a loss with second derivatives, got one whose are all zero"):
        diagnostics.hessian_diagonal(lambda x: jnp.sum(jnp.abs(x)), jnp.ones(3), jax.random.key(0))
    with pytest.raises(TypeError, match=r"has to be given a scalar loss that can be differentiated twice"):
        diagnostics.hessian_diagonal(lambda x: x**2, jnp.ones(3), jax.random.key(0))
    with pytest.raises(ValueError, match=r"`hessian_diagonal\(probes=\.\.\.\)` has to be at least 1, got 0\."):
        diagnostics.hessian_diagonal(jnp.sum, jnp.ones(3), jax.random.key(0), probes=0)

    @jax.custom_vjp
    def once(x):
        return jnp.sum(x**2)

    once.defvjp(lambda x: (once(x), x), lambda x, g: (2 * x * g,))
    found = diagnostics.hessian_diagonal(lambda x: once(x), jnp.ones(3), jax.random.key(0))
    assert found.tolist() == [2.0, 2.0, 2.0]  # its backward pass is plain JAX, which is fine


# ---- geometry --------------------------------------------------------------------------------------------------------

DENSE, SPARSE = jnp.ones(100), jnp.zeros(100).at[0].set(1.0)


@pytest.mark.parametrize(
    ("gradient", "noise", "curvature", "case", "words"),
    [
        (SPARSE, DENSE, DENSE, "I", "SGD suits this better"),
        (DENSE, SPARSE, SPARSE, "II", "signs suit this"),
        (DENSE, DENSE, DENSE, "II", "signs suit this"),
        (SPARSE, DENSE, SPARSE, "I", "SGD suits this better"),  # R1 = sqrt(1/100) / (1/100) = 10
        (SPARSE, SPARSE, DENSE, "III", "theory cannot tell"),
        (SPARSE, DENSE, None, "I or III", "SGD may suit this better"),
        (DENSE, SPARSE, None, "II or III", "signs may suit this"),
    ],
)
def test_regimes_follow_from_densities(gradient, noise, curvature, case, words):
    found = diagnostics.geometry(gradient, noise, curvature)
    assert diagnostics.regime(found) == case
    text = diagnostics.explain(found)
    assert text.startswith(f"Regime {case}: {words}") and "more than 3 times" in text


def test_ratios_by_hand_and_the_threshold():
    found = diagnostics.geometry(jnp.array([1.0, 1.0, 0.0, 0.0]), jnp.ones(4), jnp.array([-1.0, 0.0, 0.0, 0.0]))
    assert [float(x) for x in found] == [0.5, 1.0, 0.25, 2.0, 1.0]
    assert diagnostics.regime(found) == "II" and diagnostics.regime(found, threshold=1.5) == "III"
    assert "more than 1.5 times" in diagnostics.explain(found, threshold=1.5)
    with pytest.raises(ValueError, match=r"`regime\(threshold=\.\.\.\)` has to be at least 1, got 0\.5\."):
        diagnostics.regime(found, threshold=0.5)
    with pytest.raises(ValueError, match=r"has to be given a geometry with a gradient"):
        diagnostics.regime(diagnostics.geometry(jnp.zeros(4), jnp.ones(4)))


def test_geometry_can_be_traced():
    found = jax.jit(diagnostics.geometry)(DENSE, SPARSE, DENSE)
    assert float(found.noise_ratio) == pytest.approx(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("first_problem", (0, 1000))  # the rule was chosen on the former
def test_regimes_tell_who_is_faster_on_at_least_nine_in_ten_problems(first_problem):
    found = list(regimes.run(regimes.Config(first_problem=first_problem)))
    assert len(found) >= 20 and {record["regime"] for record in found} >= {"I", "II"}
    assert sum(record["agrees"] for record in found) >= 0.9 * len(found)
    assert not all(record["sgd"] < record["sign"] for record in found)  # the negative control: neither always wins
