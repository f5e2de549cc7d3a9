"""The papers' bounds, against the numbers they give and against simulations.

Simulated losses are quadratics with a diagonal Hessian, where the smoothness that bounds assume is exact. Every bound is
held from above; where it is tight also from below, and where it is loose the ratio of measured to bound is stated.
"""

import functools
import math

import hypothesis
import hypothesis.strategies as st
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest

import reference
from signopt import theory

SAMPLES = 100_000

CURVATURE = np.array([4.0, 1.0, 1.0, 0.25, 0.25, 0.25, 0.1, 0.1], np.float32)
DEVIATION = np.array([1.0, 0.5, 2.0, 1.0, 0.1, 0.5, 1.0, 0.2], np.float32)
START = np.array([1.0, -1.0, 2.0, 3.0, -2.0, 1.0, 2.0, -3.0], np.float32)
SMOOTHNESS = float(CURVATURE.sum())
NOISE = float(DEVIATION.sum())
GAP = float((CURVATURE * START**2).sum() / 2)

NOISES = {  # unit variance
    "normal": jax.random.normal,
    "uniform": lambda key, shape: jax.random.uniform(key, shape, minval=-math.sqrt(3), maxval=math.sqrt(3)),
    "laplace": lambda key, shape: jax.random.laplace(key, shape) / math.sqrt(2),
}


@functools.partial(jax.jit, static_argnames=("workers", "runs", "noise"))
def descend(learning_rates, batch_sizes, workers=1, runs=64, bad=0, noise="normal"):
    """Step along the sign of a vote over gradients; returns the true gradients `(runs, steps, 8)`."""
    draw = NOISES[noise]

    def one_run(key):
        def step(x, scan):
            k, rate, batch = scan
            true = CURVATURE * x
            # The mean of a batch is normal enough to be drawn as one number; a batch of 1 is exact.
            seen = true + DEVIATION / jnp.sqrt(batch) * draw(jax.random.fold_in(key, k), (workers, 8))
            votes = jnp.where(jnp.arange(workers)[:, None] < bad, -1, 1) * jnp.sign(seen)
            return x - rate * jnp.sign(votes.sum(0)), true

        return lax.scan(step, jnp.asarray(START), (jnp.arange(len(learning_rates)), learning_rates, batch_sizes))[1]

    return jax.vmap(one_run)(jax.random.split(jax.random.key(0), runs))


def constant(value, steps):
    return jnp.full(steps, value, jnp.float32)


def l1(gradients):
    return np.abs(gradients).sum(-1)


def fraction_wrong(noise, signal_to_noise, shape=(SAMPLES,)):
    return float(jnp.mean(NOISES[noise](jax.random.key(1), shape) <= -signal_to_noise))


def within_five_errors(measured, expected, samples):
    return abs(measured - expected) <= 5 * math.sqrt(expected * (1 - expected) / samples)


def skewed(key, shape):
    """The paper's example: 50 with probability 0.1, else -1; mean 4.1."""
    return jnp.where(jax.random.bernoulli(key, 0.1, shape), 50.0, -1.0)


# ---- the sign of one worker ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", tuple(NOISES))
@pytest.mark.parametrize("ratio", (0.2, 0.7, 1.1, 1.5, 3.0))
def test_gauss_bounds_the_sign_error_of_unimodal_symmetric_noise(noise, ratio):
    bound = float(theory.sign_error_gauss(ratio))
    assert fraction_wrong(noise, ratio) <= bound + 5 * math.sqrt(bound / SAMPLES)


@pytest.mark.parametrize("ratio", (0.2, 0.7, 1.1))
def test_uniform_noise_attains_gauss_below_the_critical_line(ratio):
    bound = float(theory.sign_error_gauss(ratio))
    assert within_five_errors(fraction_wrong("uniform", ratio), bound, SAMPLES)


def test_gauss_is_continuous_at_the_critical_line():
    line = theory.CRITICAL_SIGNAL_TO_NOISE
    below, above = theory.sign_error_gauss(line * (1 - 1e-6)), theory.sign_error_gauss(line * (1 + 1e-6))
    assert float(below) == pytest.approx(1 / 6, rel=1e-5) and float(above) == pytest.approx(1 / 6, rel=1e-5)


@pytest.mark.parametrize("ratio", (0.5, 1.0, 2.0))
def test_noise_of_two_values_attains_cantelli_and_breaks_gauss(ratio):
    far = jax.random.bernoulli(jax.random.key(0), 1 / (1 + ratio**2), (SAMPLES,))
    noise = jnp.where(far, ratio, -1 / ratio)  # mean 0, variance 1
    assert float(noise.var()) == pytest.approx(1, abs=0.02)
    wrong = float(jnp.mean(-0.999 * ratio + noise >= 0))
    assert within_five_errors(wrong, float(theory.sign_error_cantelli(ratio)), SAMPLES)
    assert wrong > 1.1 * float(theory.sign_error_gauss(ratio))  # the negative control: it is not symmetric


def test_normal_noise_has_the_error_that_it_should():
    for ratio in (0.3, 1.0, 2.0):
        expected = float(theory.sign_error_normal(ratio))
        assert within_five_errors(fraction_wrong("normal", ratio), expected, SAMPLES)


def test_assuming_more_gives_better_bounds():
    ratios = jnp.linspace(0.01, 10, 500)
    markov, cantelli = theory.sign_error_markov(ratios), theory.sign_error_cantelli(ratios)
    gauss, normal = theory.sign_error_gauss(ratios), theory.sign_error_normal(ratios)
    assert jnp.all((markov >= cantelli) & (cantelli >= gauss) & (gauss >= normal))
    assert jnp.all(gauss < 0.5) and jnp.all(jnp.diff(gauss) < 0)


# ---- the vote --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", (1, 2, 5, 8, 31))
@pytest.mark.parametrize("noise", tuple(NOISES))
def test_vote_error_is_the_binomial_tail_and_below_one_over_the_root_of_m_times_s(workers, noise):
    ratio, shape = 0.4, (workers, SAMPLES // 10)
    wrong = NOISES[noise](jax.random.key(1), shape) <= -ratio
    measured = float(jnp.mean(2 * wrong.sum(0) >= workers))
    exact = float(theory.vote_error(fraction_wrong(noise, ratio), workers))
    # The second term: the error of the sign error that the tail is taken of.
    assert abs(measured - exact) <= 5 * math.sqrt(exact / shape[1]) + 5 * math.sqrt(workers / SAMPLES)
    # Equation (§) of Theorem 2(b).
    assert measured <= 1 / (math.sqrt(workers) * ratio) + 5 * math.sqrt(exact / shape[1])


def test_vote_error_matches_a_sum_of_binomial_terms():
    for q, m in ((0.1, 3), (0.3, 4), (0.45, 11)):
        tail = sum(math.comb(m, z) * (1 - q) ** z * q ** (m - z) for z in range(m // 2 + 1))
        assert float(theory.vote_error(q, m)) == pytest.approx(tail, rel=1e-5)


def test_more_workers_make_the_vote_on_skewed_noise_worse_and_averaging_better():
    votes = (1, 3, 9, 27)
    exact = [float(theory.vote_error(0.9, m)) for m in votes]
    assert exact == sorted(exact) and exact[0] == pytest.approx(0.9) and exact[2] > 0.999
    values = skewed(jax.random.key(0), (27, SAMPLES // 10))
    assert float(values.mean()) == pytest.approx(4.1, abs=0.1)
    wrong = [float(jnp.mean(jnp.sign(values[:m]).sum(0) <= 0)) for m in votes]
    assert all(within_five_errors(w, e, SAMPLES // 10) for w, e in zip(wrong[:2], exact[:2], strict=True))
    # One 50 among 27 outweighs the rest, so the mean errs only where there is none.
    assert within_five_errors(float(jnp.mean(values.mean(0) <= 0)), 0.9**27, SAMPLES // 10)


def test_vote_error_needs_a_voter():
    with pytest.raises(ValueError, match=r"`vote_error\(num_workers=...\)` has to be at least 1, got 0"):
        theory.vote_error(0.1, 0)


# ---- rates -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", (1, 9))
def test_theorems_1_and_2_hold_and_are_loose(workers):
    for steps in (100, 400):
        rate = 1 / math.sqrt(SMOOTHNESS * steps)
        gradients = descend(constant(rate, steps), constant(steps, steps), workers=workers)
        measured = l1(gradients).min(-1).mean()
        bound = theory.majority_vote_rate(steps, gap=GAP, smoothness=SMOOTHNESS, noise=NOISE, num_workers=workers)
        assert bound <= theory.signsgd_rate(steps, gap=GAP, smoothness=SMOOTHNESS, noise=NOISE)
        assert 0.02 < measured / bound < 0.1  # 0.03 to 0.05


@pytest.mark.parametrize("noise", tuple(NOISES))
@pytest.mark.parametrize("steps", (100, 1600))
def test_small_batch_rate_is_tight(noise, steps):
    rate = math.sqrt(GAP / (SMOOTHNESS * steps))
    gradients = descend(constant(rate, steps), constant(1, steps), noise=noise)
    measured = float(theory.mixed_norm(gradients, DEVIATION).mean())
    bound = theory.small_batch_rate(steps, gap=GAP, smoothness=SMOOTHNESS)
    assert 0.4 < measured / bound < 1  # 0.49 to 0.76


def test_mixed_norm_by_hand():
    # 3 is above the line; 1 is below it and counts as 1^2 / 2; noise-free and zero entries count as they are.
    value = theory.mixed_norm(jnp.array([3.0, -1.0, -5.0, 0.0]), jnp.array([1.0, 2.0, 0.0, 0.0]))
    assert float(value) == 8.5


@pytest.mark.parametrize("bad", (0, 2, 4))
def test_adversarial_rate_holds(bad):
    steps, workers = 400, 9
    rate = math.sqrt(GAP / (SMOOTHNESS * steps))
    gradients = descend(constant(rate, steps), constant(steps, steps), workers=workers, bad=bad)
    bound = theory.adversarial_vote_rate(
        steps, gap=GAP, smoothness=SMOOTHNESS, noise=NOISE, num_workers=workers, adversaries=bad / workers
    )
    assert 0.15 < float(l1(gradients).mean()) / bound < 0.8  # 0.60, 0.52, 0.24


def test_a_majority_of_adversaries_breaks_what_the_rate_needs():
    steps = 400
    rate = math.sqrt(GAP / (SMOOTHNESS * steps))
    gradients = descend(constant(rate, steps), constant(steps, steps), workers=9, bad=5)
    bound = theory.adversarial_vote_rate(
        steps, gap=GAP, smoothness=SMOOTHNESS, noise=NOISE, num_workers=9, adversaries=4 / 9
    )
    assert float(l1(gradients).mean()) > bound
    with pytest.raises(
        ValueError, match=r"`adversarial_vote_rate\(adversaries=\.\.\.\)` has to be in \[0, 1/2\), got 0.5"
    ):
        theory.adversarial_vote_rate(10, gap=1, smoothness=1, noise=1, num_workers=2, adversaries=0.5)


# ---- Signum ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("beta", "steps"), [(0.8, 19), (0.9, 54), (0.95, 132), (0.98, 399), (0.99, 894), (0.999, 11846)]
)
def test_warmup_steps_are_theorem_3s(beta, steps):
    assert theory.warmup_steps(beta) == steps


@hypothesis.given(st.floats(0.01, 0.99))
def test_warmup_steps_are_the_smallest_that_satisfy_the_definition(beta):
    assert theory.warmup_steps(beta) == reference.warmup_steps(beta)


def test_warmup_steps_are_an_int_that_signum_accepts():
    assert type(theory.warmup_steps(0.9)) is int
    assert theory.warmup_steps(0.0) == 1


@pytest.mark.parametrize("beta", (-0.1, 1.0, 2.0))
def test_warmup_steps_need_a_decay(beta):
    with pytest.raises(ValueError, match=rf"`warmup_steps\(beta=\.\.\.\)` has to be in \[0, 1\), got {beta}"):
        theory.warmup_steps(beta)


# ---- adaptive MH-signSGD ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", (1, 5, 25))
def test_vote_advantage_is_the_largest_constant_up_to_its_gradient(workers):
    largest, sigma = 1.5, 2.0
    c = theory.vote_advantage(workers, deviation=sigma, largest_gradient=largest)
    sizes = jnp.linspace(0.01, largest, 100)
    advantage = 1 - 2 * theory.vote_error(theory.sign_error_normal(sizes / sigma), workers)
    assert jnp.all(advantage >= c * sizes - 1e-5)
    assert float(advantage[-1]) == pytest.approx(c * largest, rel=1e-5)


def test_vote_advantage_grows_as_the_root_of_the_number_of_workers():
    c = [theory.vote_advantage(m, deviation=1.0, largest_gradient=0.01) for m in (101, 401)]
    assert c[1] / c[0] == pytest.approx(2, rel=0.02)
    assert c[0] == pytest.approx(2 * math.sqrt(101) / math.pi, rel=0.02)
    with pytest.raises(ValueError, match=r"`vote_advantage\(num_workers=\.\.\.\)` has to be odd, got 4"):
        theory.vote_advantage(4, deviation=1, largest_gradient=1)


@pytest.mark.parametrize("workers", (1, 9))
def test_mh_signsgd_rate_holds_for_batches_of_one(workers):
    steps = 400
    gradients = descend(constant(1 / math.sqrt(steps), steps), constant(1, steps), workers=workers)
    gradients = np.asarray(gradients)
    c = theory.vote_advantage(
        workers, deviation=float(DEVIATION.max()), largest_gradient=float(np.abs(gradients).max())
    )
    measured = (gradients**2).sum(-1).mean(0).min()
    bound = theory.mh_signsgd_rate(steps, gap=GAP, smoothness=SMOOTHNESS, advantage=c)
    assert 0.005 < measured / bound < 0.5
