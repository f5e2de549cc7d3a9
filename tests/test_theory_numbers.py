"""All of theory against float64 references over many orders of magnitude, and at the edges of float."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from signopt import theory

EPS = float(np.finfo(np.float32).eps)
TINY = float(np.finfo(np.float32).tiny)
WORKERS = (1, 2, 3, 4, 9, 10, 81, 83, 101, 500, 501, 999, 10_001, 1_000_000, 1_000_001)
RATIOS = 10.0 ** np.arange(-12, 2.01, 0.5)  # 10 is a wrong sign in 1e23
SIGN_ERRORS = np.concatenate([10.0 ** np.arange(-12, -0.5, 0.5), [0.25, 0.4], 0.5 - 10.0 ** np.arange(-7, -1.0), [0.5]])


def float32(x):
    """What float32 holds of x, in float64: the reference gets the same input."""
    return np.asarray(x, np.float32).astype(np.float64)


def agrees(found, expected, rounding):
    """Equal up to so many rounding errors; what float32 cannot hold is 0 or infinite."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
    largest = float(np.finfo(np.float32).max)
    expected = np.where(expected > largest, np.inf, expected)
    same = np.isnan(expected) | (found == expected)
    with np.errstate(invalid="ignore"):  # inf - inf, where they are the same
        close = np.abs(found - expected) <= EPS * rounding * np.abs(expected) + 2 * TINY
    assert np.all(same | close), (found, expected)


# ---- references, independent of the library --------------------------------------------------------------------------


def vote_error(q, m):
    """P[at least half of m are wrong], by the beta function in float64."""
    return special.betainc(m - m // 2, m // 2 + 1.0, q)


def vote_advantage(m, ratio):
    """(1 - 2P) / S: since 1 - 2P = I_{a^2}(1/2, (m + 1) / 2) at a = 1 - 2q there is nothing to cancel."""
    return special.betainc(0.5, (m + 1) / 2, special.erf(ratio / math.sqrt(2)) ** 2) / ratio


SIGN_ERROR = {
    "sign_error_markov": lambda s: np.minimum(1, 1 / s),
    "sign_error_cantelli": lambda s: 1 / (1 + s**2),
    "sign_error_gauss": lambda s: np.where(s > 2 / math.sqrt(3), 2 / (9 * s**2), 0.5 - s / (2 * math.sqrt(3))),
    "sign_error_normal": lambda s: special.ndtr(-s),
}


# ---- sweeps ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SIGN_ERROR)
@pytest.mark.parametrize("jitted", (False, True))
def test_sign_errors_are_right_from_tiny_to_huge_signals(name, jitted):
    function = getattr(theory, name)
    s = float32(np.concatenate([10.0 ** np.arange(-37, 38.0), [1.1, 1.2, 5.0, np.inf, np.nan]]))
    with np.errstate(over="ignore", under="ignore"):
        expected = SIGN_ERROR[name](s)
    found = (jax.jit(function) if jitted else function)(jnp.asarray(s, jnp.float32))
    # An exponent of S^2 / 2 turns its own rounding error into as many.
    agrees(found, expected, 8 + (4 * np.minimum(s, 14) ** 2 if name == "sign_error_normal" else 0))


@pytest.mark.parametrize("workers", WORKERS)
def test_vote_error_is_right_at_every_size_of_vote(workers):
    for q in (SIGN_ERRORS, 1 - SIGN_ERRORS):
        q = float32(q)
        expected = vote_error(q, workers)
        # P = exp(-x) has x times the rounding error that x has; the smallest float32 is at x = 87.
        with np.errstate(divide="ignore"):
            depth = np.minimum(-np.log(expected), 90)
        agrees(theory.vote_error(jnp.asarray(q, jnp.float32), workers), expected, 16 + 4 * depth)


def test_vote_error_at_its_ends_and_of_what_is_no_probability():
    for workers in (1, 2, 3, 101, 500):
        found = theory.vote_error(jnp.array([0.0, 1e-41, 1.0, jnp.nan]), workers)
        np.testing.assert_array_equal(found[2:], [1.0, np.nan])
        agrees(found[:2], [0.0, 0.0], 1)
    assert float(theory.vote_error(0.5, 101)) == pytest.approx(0.5, rel=4 * EPS)


@pytest.mark.parametrize("workers", [m for m in WORKERS if m % 2])
def test_vote_advantage_does_not_cancel_where_votes_are_guesses(workers):
    for ratio in RATIOS:
        found = theory.vote_advantage(workers, deviation=1.0, largest_gradient=float(ratio))
        assert found == pytest.approx(vote_advantage(workers, ratio), rel=32 * EPS), ratio


def test_the_obvious_formula_cancels():
    """A negative control: in float32 nothing is left of 1 - 2P at the ratio that it is needed for."""
    wrong = theory.vote_error(theory.sign_error_normal(1e-6), 101)
    assert abs(float((1 - 2 * wrong) / 1e-6) / vote_advantage(101, 1e-6) - 1) > 1e-3


@pytest.mark.parametrize("scale", (1e-300, 1e-40, 1e-6, 1.0, 1e6, 1e40, 1e300))
def test_vote_advantage_has_the_unit_of_one_over_the_deviation(scale):
    found = theory.vote_advantage(101, deviation=2 * scale, largest_gradient=scale)
    assert found * scale == pytest.approx(vote_advantage(101, 0.5) / 2, rel=32 * EPS)
    rate = theory.mh_signsgd_rate(100, gap=1.0, smoothness=4.0, advantage=found)
    assert rate == pytest.approx(0.3 / found, rel=1e-12) and rate > 0


def test_vote_advantage_at_its_ends():
    limit = 101 * math.comb(100, 50) / 2.0**100 * math.sqrt(2 / math.pi)
    for nothing in (0.0, 5e-324, 1e-200):
        found = theory.vote_advantage(101, deviation=1.0, largest_gradient=nothing)
        assert found == pytest.approx(limit, rel=8 * EPS)
    assert theory.vote_advantage(101, deviation=1.0, largest_gradient=math.inf) == 0
    traced = jax.jit(lambda s, g: theory.vote_advantage(101, deviation=s, largest_gradient=g))
    assert float(traced(1.0, 1e-6)) == pytest.approx(vote_advantage(101, 1e-6), rel=32 * EPS)
    assert math.isnan(float(traced(1.0, jnp.nan)))


def test_vote_probabilities_are_differentiable():
    """dP/dq of 3 votes is 6 q (1 - q); 1 - 2P of one normal vote falls with the ratio as its density says."""
    for q in (1e-6, 0.1, 0.5, 0.9):
        assert float(jax.grad(lambda q: theory.vote_error(q, 3))(q)) == pytest.approx(6 * q * (1 - q), rel=1e-4)
    slope = jax.grad(lambda g: theory.vote_advantage(1, deviation=1.0, largest_gradient=g))(1.0)
    density = math.exp(-0.5) / math.sqrt(2 * math.pi)
    assert float(slope) == pytest.approx(2 * density - special.erf(math.sqrt(0.5)), rel=1e-4)


BOTH, ALL = {"gap": 3.0, "smoothness": 5.0}, {"gap": 3.0, "smoothness": 5.0, "noise": 7.0}
RATES = {
    "signsgd_rate": ALL,
    "majority_vote_rate": ALL | {"num_workers": 9},
    "adversarial_vote_rate": ALL | {"num_workers": 9, "adversaries": 0.25},
    "small_batch_rate": BOTH,
    "mh_signsgd_rate": BOTH | {"advantage": 2.0},
}


def rate(name, steps, gap, smoothness, noise=0.0, num_workers=1, adversaries=0.0, advantage=1.0):
    """The five rates in float64 NumPy, from the papers."""
    steps, gap, smoothness, noise = (np.float64(x) for x in (steps, gap, smoothness, noise))
    if name == "signsgd_rate":
        return (np.sqrt(smoothness) * (gap + 0.5) + 2 * noise) / np.sqrt(steps)
    if name == "majority_vote_rate":
        return (np.sqrt(smoothness) * (gap + 0.5) + 2 * noise / np.sqrt(num_workers)) / np.sqrt(steps)
    if name == "adversarial_vote_rate":
        bad = (1 - 2 * adversaries) * np.sqrt(num_workers)
        return 2 / np.sqrt(steps) * (noise / bad + np.sqrt(smoothness) * np.sqrt(gap))
    if name == "small_batch_rate":
        return 3 * np.sqrt(smoothness / steps) * np.sqrt(gap)
    return (gap + smoothness / 2) / (advantage * np.sqrt(steps))


@pytest.mark.parametrize("name", RATES)
def test_rates_are_right_at_every_scale_for_numbers_and_traced(name):
    steps, at_one, function = 100, RATES[name], getattr(theory, name)
    traced = jax.jit(lambda steps, arguments: function(steps, **arguments))
    for scale in (1e-30, 1e-6, 1.0, 1e6, 1e30):
        known = {k: v * scale if k in ("gap", "smoothness", "noise") else v for k, v in at_one.items()}
        expected = rate(name, steps, **known)
        found = function(steps, **known)
        assert isinstance(found, float) and found == pytest.approx(expected, rel=1e-14)
        agrees(traced(steps, known), expected, 16)


@pytest.mark.parametrize("scale", (1e-30, 1e-6, 1.0, 1e6, 1e30))
def test_mixed_norms_and_greedy_rates_are_right_at_every_scale(scale, rng):
    g, sigma = (float32(scale * rng.normal(size=(3, 50))) for _ in range(2))
    sigma, wrong = np.abs(sigma), float32(rng.uniform(0, 0.5, size=(3, 50)))
    size = np.abs(g)
    expected = np.where(size > 2 / math.sqrt(3) * sigma, size, size * (size / sigma)).sum(-1)
    agrees(theory.mixed_norm(jnp.asarray(g, jnp.float32), jnp.asarray(sigma, jnp.float32)), expected, 50)
    greedy = theory.greedy_learning_rate(
        jnp.asarray(g, jnp.float32), jnp.asarray(wrong, jnp.float32), smoothness=scale * 50
    )
    agrees(greedy, (size * (1 - 2 * wrong)).sum(-1) / (scale * 50), 50)


def test_mixed_norm_shows_what_is_not_finite():
    ones = jnp.ones(3)
    bad = ones.at[1].set
    assert math.isnan(theory.mixed_norm(bad(jnp.nan), ones))
    assert math.isnan(theory.mixed_norm(ones, bad(jnp.nan)))
    assert float(theory.mixed_norm(bad(jnp.inf), ones)) == math.inf
    assert float(theory.mixed_norm(ones, bad(jnp.inf))) == 2
    assert float(theory.mixed_norm(jnp.array([1e30, 2.0]), jnp.array([1e30, 0.0]))) == pytest.approx(1e30)
    assert math.isnan(theory.greedy_learning_rate(bad(jnp.nan), 0.0, smoothness=1.0))


def test_warming_up_takes_no_time_to_find_out():
    """C grows as 8.5 / (1 - beta) and more; trying one after another would take hours."""
    for decay in (1e-6, 1e-9, 1e-12):
        beta = 1 - decay
        c = theory.warmup_steps(beta)
        enough = lambda c, beta=beta: c / 2 * beta**c <= 1 / ((1 - beta) * (1 + beta) * (c + 1))
        assert enough(c) and not enough(c - 1) and beta ** (c + 1) <= 0.5
