"""SignProx solves the problem that is written down; proximal steps land where they say."""

# optax types every tree as a union of all that it may be; tests know which.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false

import functools

from flax import linen
from flax import nnx
from flax.training import train_state
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.common import problems
from signopt import prox as proxes
from signopt import signprox
from signopt import workers
from signopt.means import mean
from signopt.prox.step import prox_step
from signopt.prox.step import scale_by_prox_gradient
from signopt.vote import majority_vote
from signopt.workers.state import PerWorkerState

AXIS = "worker"


def mapping(prox, grads, params, step_size=1.0, **kwargs):
    tx = scale_by_prox_gradient(prox, step_size, **kwargs)
    return jax.jit(tx.update)(grads, tx.init(params), params)[0]


def follow(tx, gradient, params, steps):
    """Run an optimizer on one worker; returns the last parameters."""

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(gradient(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.jit(lambda params: jax.lax.scan(step, (params, tx.init(params)), length=steps)[0][0])(params)


def follow_noisily(tx, problem, steps, seed, num_workers=8, noise=0.1):
    """The same on many, each with its own noise in every entry of the gradient."""

    def step(state, worker):
        params, opt_state, count = state
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), count), worker[0])
        grads = problem.gradient(params) + noise * jax.random.normal(key, params.shape)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state, count + 1), 0.0

    run = workers.simulate(step, num_workers, axis_name=AXIS)
    start = (problem.start, tx.init(problem.start), jnp.int32(0))
    return jax.lax.scan(lambda state, _: (run(state, jnp.arange(num_workers))[0], None), start, length=steps)[0][0]


# ---- the mapping ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (jnp.float32, jnp.bfloat16, jnp.float16))
@pytest.mark.parametrize("step_size", (None, 1e-4, 0.01, 10.0))
@pytest.mark.parametrize("prox", (proxes.zero(), proxes.l1(0.0), proxes.group_l1(0.0)), ids=("zero", "l1", "group_l1"))
def test_without_a_penalty_signprox_is_signsgd(prox, step_size, dtype, rng):
    params = {"w": jnp.asarray(rng.normal(size=(64, 8)), dtype)}
    ours, theirs = signprox(0.01, prox=prox, step_size=step_size), optax.sign_sgd(0.01)
    ours_state, theirs_state = ours.init(params), theirs.init(params)
    for scale in (1.0, 0.1, 1e-4):
        grads = {"w": jnp.asarray(rng.normal(size=(64, 8)) * scale, dtype).at[0, 0].set(0.0)}
        expected, theirs_state = theirs.update(grads, theirs_state, params)
        updates, ours_state = jax.jit(ours.update)(grads, ours_state, params)
        assert updates["w"].dtype == dtype
        np.testing.assert_array_equal(updates["w"], expected["w"])
        params = optax.apply_updates(params, updates)


def first_form(prox, grads, params, step_size):
    """The formula as published, in the dtype of the parameters: where the gradient's bits go to die."""
    return (params - prox(params - step_size * grads, step_size)) / step_size


@pytest.mark.parametrize(("strength", "at_most"), ((0.0, 0.0), (0.05, 0.002)))
def test_bfloat16_signs_survive_that_the_obvious_formula_loses(strength, at_most, rng):
    params = jnp.asarray(rng.normal(size=100_000), jnp.bfloat16)
    grads = jnp.asarray(0.1 * rng.normal(size=100_000), jnp.bfloat16)
    step_size = 0.01
    x, g = np.asarray(params, np.float64), np.asarray(grads, np.float64)
    y = x - step_size * g
    exact = np.sign(g + np.clip(y, -step_size * strength, step_size * strength) / step_size)
    wrong = lambda found: np.mean(np.sign(np.asarray(found, np.float64)) != exact)
    assert wrong(mapping(proxes.l1(strength), grads, params, step_size)) <= at_most
    assert wrong(first_form(proxes.l1(strength), grads, params, jnp.bfloat16(step_size))) > 0.5


def least_norm_subgradient_sign(penalty, params, grads):
    """The sign of the element of g + dr(x) that is closest to zero."""
    if penalty == "l1":
        low, high = grads + np.where(params > 0, 0.5, -0.5), grads + np.where(params < 0, -0.5, 0.5)
    elif penalty == "l1_non_negative":
        low, high = np.where(params > 0, grads + 0.5, -np.inf), grads + 0.5
    elif penalty == "elastic_net":
        low = grads + np.where(params > 0, 0.5, -0.5) + 0.25 * params
        high = grads + np.where(params < 0, -0.5, 0.5) + 0.25 * params
    elif penalty == "l2_squared":
        low = high = grads + 0.5 * params
    else:
        low, high = np.where(params <= -2, -np.inf, grads), np.where(params >= 2, np.inf, grads)
    return np.where(low > 0, 1, np.where(high < 0, -1, 0))


SEPARABLE = {
    "l1": proxes.l1(0.5),
    "l1_non_negative": proxes.l1(0.5, non_negative=True),
    "elastic_net": proxes.elastic_net(0.5, 0.25),
    "l2_squared": proxes.l2_squared(0.5),
    "box": proxes.box(-2.0, 2.0),
}


@pytest.mark.parametrize("name", SEPARABLE)
def test_the_sign_is_that_of_the_least_norm_subgradient_whatever_the_step_size(name, rng):
    params = rng.integers(-8, 9, size=4000) / 4  # quarters, so that everything below is exact
    params = np.abs(params) if name == "l1_non_negative" else params
    grads = rng.integers(-12, 13, size=4000) / 8
    expected = least_norm_subgradient_sign(name, params, grads)
    for step_size in (2.0**-10, 0.25, 1.0, 64.0):
        found = mapping(SEPARABLE[name], jnp.float32(grads), jnp.float32(params), step_size)
        if name in ("elastic_net", "l2_squared"):  # a division by 1 + tau lambda rounds; ties are then left out
            found = jnp.where(jnp.abs(found) < 1e-4, 0, found)
        np.testing.assert_array_equal(np.sign(found), expected, err_msg=str(step_size))


def test_the_sign_depends_on_the_step_size_for_a_group():
    """A negative control of the law above: a group penalty couples entries, so it has to fail."""
    params, grads = jnp.array([1.0, 0.125]), jnp.array([0.0, -0.25])
    signs = [jnp.sign(mapping(proxes.l2(1.0), grads, params, step_size)).tolist() for step_size in (2.0**-10, 4.0)]
    assert signs == [[1.0, -1.0], [1.0, 1.0]]


def test_entries_at_rest_abstain(rng):
    grads = jnp.asarray(rng.uniform(-0.999, 0.999, size=1000), jnp.float32)
    for step_size in (1e-3, 0.1, 0.7):
        for prox in (proxes.l1(1.0), proxes.mcp(1.0), proxes.group_l1(1.0)):
            np.testing.assert_array_equal(mapping(prox, grads, jnp.zeros(1000), step_size), jnp.zeros(1000))
        at_bound = mapping(proxes.box(-1.0, 1.0), -jnp.abs(grads) - 0.01, jnp.ones(1000), step_size)
        np.testing.assert_array_equal(at_bound, jnp.zeros(1000))


@pytest.mark.parametrize("bad", (jnp.nan, jnp.inf, -jnp.inf))
@pytest.mark.parametrize("prox", (proxes.l1(0.5), proxes.group_l1(0.5), proxes.box(-1.0, 1.0)))
def test_a_number_that_is_not_finite_costs_its_own_vote_only(prox, bad):
    params, grads = jnp.array([[1.0, -2.0, 0.5]]), jnp.array([[1.0, 1.0, -2.0]])
    tx = signprox(0.5, prox=prox, step_size=0.1)
    clean, _ = tx.update(grads.at[0, 1].set(0.0), tx.init(params), params)
    found, _ = tx.update(grads.at[0, 1].set(bad), tx.init(params), params)
    np.testing.assert_array_equal(found, clean.at[0, 1].set(0.0))


def test_a_float16_mapping_keeps_its_sign():
    """Float16 ends at 6e-8 and at 65,504; a vote shall not end there."""
    params = jnp.ones(1, jnp.float16)
    for strength, gradient in ((2.0**-4 * (1 + 2.0**-23), -(2.0**-4)), (6e4, 6e4)):
        found = mapping(proxes.l1(strength), jnp.full(1, gradient, jnp.float16), params, 2.0**-20)
        assert found.dtype == jnp.float16 and jnp.isfinite(found)[0] and found[0] > 0


def test_the_default_step_size_makes_the_run_free_of_units(rng):
    """Scaling loss and penalty by 4, or parameters by 2, scales the run and nothing else, bit for bit."""
    target = jnp.asarray(rng.normal(size=(6, 4)), jnp.float32)

    def run(loss_scale, scale, step_size):
        gradient = lambda x: loss_scale / scale * (x / scale - target)
        prox = proxes.group_l1(0.5 * loss_scale / scale)
        tx = signprox(optax.exponential_decay(0.25 * scale, 10, 0.5), prox=prox, step_size=step_size)
        return follow(tx, gradient, scale * jnp.ones((6, 4)), 40) / scale

    np.testing.assert_array_equal(run(4.0, 1.0, None), run(1.0, 1.0, None))
    np.testing.assert_array_equal(run(1.0, 2.0, None), run(1.0, 1.0, None))
    assert jnp.any(run(4.0, 1.0, 0.5) != run(1.0, 1.0, 0.5))  # a number as step size has a unit


def test_reach_makes_plain_steps_lead_as_far_as_the_sign_steps_have(rng):
    params = jnp.asarray(rng.normal(size=(5, 3)), jnp.float32)
    tx = scale_by_prox_gradient(proxes.group_l1(0.01), reach=lambda count: jnp.array([0.25, 0.125, 0.0])[count])
    state, slopes, travelled = tx.init(params), 0.0, 0.0
    for length in (0.25, 0.125, 0.0):
        grads = jnp.asarray(rng.normal(size=(5, 3)), jnp.float32)
        travelled, slopes = travelled + length, slopes + float(jnp.sqrt(jnp.mean(grads**2)))
        found, state = tx.update(grads, state, params)
        expected = mapping(proxes.group_l1(0.01), grads, params, travelled / slopes)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_without_a_slope_reach_does_no_harm():
    tx = scale_by_prox_gradient(proxes.group_l1(0.25), reach=0.5)
    found, _ = tx.update(jnp.zeros((2, 2)), tx.init(jnp.ones((2, 2))), jnp.ones((2, 2)))
    assert jnp.all(jnp.isfinite(found)) and jnp.all(found > 0)


# ---- the problem that is solved ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def lasso():
    return problems.lasso()


def falling(start, steps=2000, end=1e-6):
    return optax.exponential_decay(start, steps, end / start)


def test_signprox_reaches_the_minimum_of_the_lasso_and_its_support(lasso):
    x = follow(signprox(falling(0.05), prox=lasso.prox), lasso.gradient, lasso.start, 2000)
    assert -1e-9 <= lasso.gap(x) <= 1e-6
    polished = proxes.polish(x, lasso.prox, 1 / lasso.curvature, gradient=lasso.gradient(x))
    assert lasso.gap(polished) <= 1e-6
    np.testing.assert_array_equal(polished != 0, lasso.minimizer != 0)
    assert 20 < np.sum(lasso.minimizer != 0) < 50  # more than the spikes: the minimizer's support is the claim


def test_the_operator_after_a_sign_solves_another_problem(lasso):
    naive = optax.chain(optax.sign_sgd(falling(0.05)), prox_step(lasso.prox, falling(0.05)))
    x = follow(naive, lasso.gradient, lasso.start, 2000)
    assert lasso.gap(x) > 0.1
    assert np.mean(np.asarray(x) != 0) > 0.95


def test_signprox_reaches_the_optimum_of_scikit_learns_saga_and_its_support():
    problem = problems.logistic("breast_cancer", 0.01)
    x = follow(signprox(falling(problem.start_rate), prox=problem.prox), problem.gradient, problem.start, 2000)
    assert abs(problem.gap(x)) <= 1e-4 * problem.minimum
    assert problem.support_errors(problem.polish(x)) == 0
    assert 5 < problem.nonzero(problem.minimizer) < 15  # of 30


def test_the_default_step_size_finds_low_rank_where_one_that_falls_with_the_learning_rate_stalls(rng, x64):
    """Completion of a 15 x 15 matrix of rank 2, half of it seen."""
    truth = jnp.asarray(rng.normal(size=(15, 2)) @ rng.normal(size=(2, 15)))
    seen = jnp.asarray(rng.random((15, 15)) < 0.5)
    gradient = lambda x: jnp.where(seen, x - truth, 0)
    prox, start = proxes.nuclear_norm(0.3), jnp.zeros((15, 15))
    objective = lambda x: float(jnp.sum(gradient(x) ** 2) / 2 + prox.value(x))
    lowest = objective(follow(optax.chain(optax.sgd(1.0), prox_step(prox, 1.0)), gradient, start, 4000))
    rate = falling(0.1, end=1e-4)

    def gap(step_size):
        x = follow(signprox(rate, prox=prox, step_size=step_size), gradient, start, 2000)
        return objective(proxes.polish(x, prox, 1.0, gradient=gradient(x))) - lowest

    default, with_curvature, too_short = gap(None), gap(1.0), gap(lambda count: 0.1 * rate(count))
    assert -1e-9 < with_curvature < 1e-4 * lowest
    assert -1e-9 < default < 1e-4 * lowest
    assert too_short > 10 * default


def test_a_one_bit_vote_is_within_twice_the_gap_of_float32_proximal_sgd(lasso):
    """Noise 0.1 on 8 workers, 2000 steps; both schedules end where each did best in a search."""
    steps, seeds = 2000, jnp.arange(4)
    run = lambda tx: jax.jit(jax.vmap(lambda seed: follow_noisily(tx, lasso, steps, seed)))(seeds)
    gap = lambda ends: np.mean([lasso.gap(x) for x in ends])
    rate = falling(0.2, end=2e-4)
    averaged = gap(run(optax.chain(mean(AXIS), optax.sgd(rate), prox_step(lasso.prox, rate))))
    votes = {"axis_name": AXIS, "num_workers": 8, "wire": "one_bit"}
    voted = gap(run(signprox(falling(0.02, end=2e-6), prox=lasso.prox, beta=0.9, **votes)))
    assert averaged < 5e-5
    assert voted <= 2 * averaged


# ---- proximal steps -----------------------------------------------------------------------------------


def test_sgd_with_a_prox_step_is_the_proximal_gradient_method(rng, x64):
    matrix, target, rate, strength = rng.normal(size=(20, 10)), rng.normal(size=20), 0.01, 2.0
    gradient = lambda x: matrix.T @ (matrix @ x - target)
    x = follow(optax.chain(optax.sgd(rate), prox_step(proxes.l1(strength), rate)), gradient, jnp.zeros(10), 50)
    expected = np.zeros(10)
    for _ in range(50):
        y = expected - rate * gradient(expected)
        expected = np.sign(y) * np.maximum(np.abs(y) - rate * strength, 0)
    np.testing.assert_allclose(x, expected, atol=1e-13)
    assert 0 < np.sum(expected == 0) < 10


@pytest.mark.parametrize("dtype", (jnp.float32, jnp.bfloat16, jnp.float16))
@pytest.mark.parametrize("jitted", (True, False))
def test_parameters_land_on_exact_zeros(dtype, jitted, rng):
    params = jnp.asarray(rng.normal(size=4096), dtype)
    updates = jnp.asarray(rng.normal(size=4096) * 0.01, dtype)
    tx = prox_step(proxes.l1(1.0), 0.5)

    def step(params, updates):
        updates, _ = tx.update(updates, tx.init(params), params)
        return optax.apply_updates(params, updates), updates

    landed, moves = (jax.jit(step) if jitted else step)(params, updates)
    assert landed.dtype == moves.dtype == dtype
    target = np.asarray(params, np.float32) + np.asarray(updates, np.float32)
    target = np.sign(target) * np.maximum(np.abs(target) - 0.5, 0)
    np.testing.assert_array_equal(landed[target == 0], 0)
    assert 0.3 < np.mean(target == 0) < 0.5
    rounding = float(jnp.finfo(dtype).eps) * np.abs(np.asarray(params, np.float32))
    assert np.all(np.abs(np.asarray(landed, np.float32) - target) <= rounding + 1e-9)


def test_prox_step_follows_its_schedule_after_any_optimizer(rng):
    schedule = lambda count: jnp.array([0.0, 0.25, 1.0])[count]
    for tx in (optax.adam(0.1), optax.sign_sgd(0.1), optax.sgd(0.1)):
        tx = optax.chain(tx, prox_step(proxes.l1(1.0), schedule))
        params = jnp.array([1.0, -0.5])
        state = tx.init(params)
        for threshold in (0.0, 0.25, 1.0):
            plain, _ = tx.update(jnp.zeros(2), tx.init(params), params)
            np.testing.assert_array_equal(plain, 0.0)  # at step 0 the operator does nothing
            updates, state = tx.update(jnp.zeros(2), state, params)
            params = optax.apply_updates(params, updates)
            if threshold == 0.25:
                np.testing.assert_array_equal(params, [0.75, -0.25])
        np.testing.assert_array_equal(params, [0.0, 0.0])


@pytest.mark.parametrize("dtype", (jnp.float32, jnp.bfloat16))
def test_binary_weights_end_on_plus_and_minus_one(dtype, rng):
    params = jnp.asarray(rng.uniform(-2, 2, size=500), dtype)
    tx = prox_step(proxes.binary(1.0), 2.0)
    updates, _ = tx.update(jnp.zeros_like(params), tx.init(params), params)
    np.testing.assert_array_equal(jnp.abs(optax.apply_updates(params, updates)), 1)


# ---- penalties that are drawn -------------------------------------------------------------------------


def test_a_sampled_penalty_finds_the_minimum_of_the_mean():
    """f = |x - a|^2 / 2 with a mean of l1 penalties of strengths 0 to 1: soft thresholding at one half."""
    strengths = jnp.linspace(0.0, 1.0, 11)
    prox = proxes.sampled(lambda b: proxes.l1(strengths[b]), num_penalties=11, num_samples=2, key=jax.random.key(1))
    target = jnp.array([2.0, -1.0, 0.75])
    tx = signprox(optax.exponential_decay(0.1, 3000, 1e-3), prox=prox, step_size=0.05)
    x = follow(tx, lambda x: x - target, jnp.zeros(3), 3000)
    np.testing.assert_allclose(x, [1.5, -0.5, 0.25], atol=0.03)
    one = signprox(optax.exponential_decay(0.1, 3000, 1e-3), prox=proxes.l1(strengths[10]), step_size=0.05)
    assert jnp.abs(follow(one, lambda x: x - target, jnp.zeros(3), 3000) - x).max() > 0.2


def test_workers_draw_for_themselves_and_the_same_key_gives_the_same_run():
    prox = proxes.sampled([proxes.zero(), proxes.l1(8.0)], num_samples=1, key=jax.random.key(0))
    params, grads = jnp.ones(1), -jnp.ones(1)

    def ballots(axis_name):
        tx = scale_by_prox_gradient(prox, 0.01, axis_name=axis_name)
        run = jax.vmap(lambda _: tx.update(grads, tx.init(params), params)[0], axis_name=AXIS)
        return run(jnp.arange(32))

    assert jnp.unique(ballots(AXIS)).tolist() == [-1.0, 7.0]
    assert jnp.unique(ballots(None)).size == 1
    np.testing.assert_array_equal(ballots(AXIS), ballots(AXIS))


def test_a_prox_step_draws_anew_in_every_step():
    prox = proxes.sampled([proxes.zero(), proxes.box(0.0, 0.0)], num_samples=1, key=jax.random.key(0))
    tx, params = prox_step(prox, 1.0), jnp.ones(1)
    state, landed = tx.init(params), []
    for _ in range(16):
        updates, state = tx.update(jnp.zeros(1), state, params)
        landed.append(float((params + updates)[0]))
    assert sorted(set(landed)) == [0.0, 1.0]


# ---- composition --------------------------------------------------------------------------------------


@pytest.mark.parametrize("wire", ("one_bit", "two_bit", "psum"))
@pytest.mark.parametrize("beta", (None, 0.9))
def test_a_vote_is_the_majority_of_what_each_worker_would_do(wire, beta, rng):
    params = jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)
    grads = jnp.asarray(rng.normal(size=(5, 4, 3)), jnp.float32)
    prox = proxes.group_l1(0.5)
    alone = signprox(1.0, prox=prox, step_size=0.1, beta=beta)
    each = jax.vmap(lambda g: alone.update(g, alone.init(params), params)[0])(grads)
    expected = np.sign(np.sum(each, axis=0))

    tx = signprox(1.0, prox=prox, step_size=0.1, beta=beta, axis_name=AXIS, num_workers=5, wire=wire)

    def step(state, batch):
        updates, opt_state = tx.update(batch[0], state[1], state[0])
        return (optax.apply_updates(state[0], updates), opt_state), 0.0

    (moved, state), _ = workers.simulate(step, 5, axis_name=AXIS)((params, tx.init(params)), grads)
    np.testing.assert_allclose(moved - params, expected, atol=1e-6)
    assert isinstance(state[0], PerWorkerState)


def test_simulated_workers_and_devices_agree_bit_for_bit(devices, rng):
    params = jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)
    grads = jnp.asarray(rng.normal(size=(8, 4, 3)), jnp.float32)
    tx = signprox(0.1, prox=proxes.l1(0.5), beta=0.9, axis_name=AXIS, num_workers=8)

    def step(state, batch):
        params, opt_state = state
        updates, opt_state = tx.update(batch[0], opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), jnp.sum(params)

    mesh = jax.make_mesh((8,), (AXIS,), devices=devices, axis_types=(jax.sharding.AxisType.Auto,))
    runs = workers.simulate(step, 8, axis_name=AXIS), workers.on_mesh(step, mesh, axis_name=AXIS)
    ends = []
    for run in runs:
        state = (params, tx.init(params))
        for _ in range(3):
            state, _ = run(state, grads)
        ends.append(jax.device_get(state))
    jax.tree.map(np.testing.assert_array_equal, *ends)
    assert np.any(ends[0][0] != params)


def test_a_vote_after_the_mapping_may_be_written_out(rng):
    params = jnp.asarray(rng.normal(size=6), jnp.float32)
    grads = jnp.asarray(rng.normal(size=(3, 6)), jnp.float32)
    parts = (scale_by_prox_gradient(proxes.l1(0.5), 0.1), majority_vote(AXIS), optax.scale_by_learning_rate(0.1))
    ready = signprox(0.1, prox=proxes.l1(0.5), axis_name=AXIS)
    run = lambda tx: jax.vmap(lambda g: tx.update(g, tx.init(params), params)[0], axis_name=AXIS)(grads)
    np.testing.assert_array_equal(run(optax.chain(*parts)), run(ready))


def test_momentum_comes_before_the_mapping_and_at_its_own_scale():
    """The mapping of a constant gradient does not change while the momentum warms up."""
    params, grads = jnp.array([1.0, 1.0]), jnp.array([-1.5, -0.5])
    tx = signprox(1.0, prox=proxes.l1(1.0), beta=0.99)
    state = tx.init(params)
    for _ in range(3):
        updates, state = tx.update(grads, state, params)
        np.testing.assert_array_equal(updates, [1.0, -1.0])


def test_masks_and_partitions_leave_other_leaves_to_others(rng):
    params = {"kernel": jnp.array([2.0, 0.0]), "bias": jnp.array([2.0])}
    grads = {"kernel": jnp.array([0.25, 0.25]), "bias": jnp.array([-0.25])}
    is_kernel = {"kernel": True, "bias": False}
    inside = signprox(1.0, prox=proxes.masked(proxes.l1(0.5), is_kernel))
    labels = {"kernel": "sparse", "bias": "plain"}
    outside = optax.partition({"sparse": signprox(1.0, prox=proxes.l1(0.5)), "plain": optax.sign_sgd(1.0)}, labels)
    wrapped = optax.masked(signprox(1.0, prox=proxes.l1(0.5)), is_kernel)
    for tx in (inside, outside):
        updates, _ = tx.update(grads, tx.init(params), params)
        np.testing.assert_array_equal(updates["kernel"], [-1.0, 0.0])
        np.testing.assert_array_equal(updates["bias"], [1.0])
    updates, _ = wrapped.update(grads, wrapped.init(params), params)
    np.testing.assert_array_equal(updates["kernel"], [-1.0, 0.0])


def test_hyperparameters_can_be_injected(rng):
    params, grads = jnp.array([2.0, -1.0, 0.0]), jnp.array([0.25, 0.25, -1.0])
    plain = signprox(0.25, prox=proxes.l1(0.5), beta=0.5)
    injected = optax.inject_hyperparams(signprox, static_args="prox")(0.25, prox=proxes.l1(0.5), beta=0.5)
    make = lambda learning_rate, strength: signprox(learning_rate, prox=proxes.l1(strength), beta=0.5)
    with_strength = optax.inject_hyperparams(make)(learning_rate=0.25, strength=0.5)
    last = optax.inject_hyperparams(prox_step, static_args="prox")(proxes.l1(0.5), 0.25)
    expected, _ = plain.update(grads, plain.init(params), params)
    for tx in (injected, with_strength):
        found, state = jax.jit(tx.update)(grads, tx.init(params), params)
        np.testing.assert_array_equal(found, expected)
        state.hyperparams["learning_rate"] = jnp.float32(0.5)
        np.testing.assert_array_equal(
            tx.update(grads, state, params)[0], 2 * tx.update(grads, tx.init(params), params)[0]
        )
    np.testing.assert_array_equal(
        last.update(grads, last.init(params), params)[0],
        prox_step(proxes.l1(0.5), 0.25).update(grads, prox_step(proxes.l1(0.5), 0.25).init(params), params)[0],
    )


@pytest.mark.parametrize("make", (functools.partial(signprox, 0.01), None), ids=("signprox", "prox_step"))
def test_linen_and_nnx_loops_run_and_make_the_same_zeros(make, rng):
    kernels = lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree)
    prox = proxes.masked(proxes.group_l1(0.3, axis=0), kernels)
    tx = optax.chain(optax.adam(0.01), prox_step(prox, 0.01)) if make is None else make(prox=prox)
    images = jnp.asarray(rng.normal(size=(32, 5)), jnp.float32).at[:, 3].set(0.0)
    labels = images[:, :1] - images[:, 1:2]
    loss = lambda out: jnp.mean((out - labels) ** 2)

    dense = linen.Dense(1)
    params = dense.init(jax.random.key(0), images)["params"]
    state = train_state.TrainState.create(apply_fn=dense.apply, params=params, tx=tx)
    model = nnx.Linear(5, 1, rngs=nnx.Rngs(0))
    model.kernel[...] = params["kernel"]
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @jax.jit
    def linen_step(state):
        grads = jax.grad(lambda params: loss(state.apply_fn({"params": params}, images)))(state.params)
        return state.apply_gradients(grads=grads)

    @nnx.jit
    def nnx_step(model, optimizer):
        optimizer.update(model, nnx.grad(lambda model: loss(model(images)))(model))

    for _ in range(200):
        state = linen_step(state)
        nnx_step(model, optimizer)
    finish = lambda tree: proxes.polish(tree, prox, 0.1)
    linen_kernel = finish(state.params)["kernel"]
    nnx_kernel = finish(nnx.to_pure_dict(nnx.state(model, nnx.Param)))["kernel"]
    np.testing.assert_allclose(linen_kernel, nnx_kernel, atol=1e-5)
    assert linen_kernel[3, 0] == 0 and jnp.abs(linen_kernel[0, 0]) > 0.1


def test_a_second_step_is_not_compiled_again(rng):
    tx = signprox(optax.constant_schedule(0.1), prox=proxes.group_l1(0.5), beta=0.9)
    params = jnp.ones((3, 2), jnp.bfloat16)
    step = jax.jit(tx.update)
    state = tx.init(params)
    for _ in range(3):
        _, state = step(params, state, params)
    assert step._cache_size() == 1  # pyright: ignore[reportFunctionMemberAccess, reportAttributeAccessIssue]


# ---- bad input ----------------------------------------------------------------------------------------

ONES = jnp.ones((6, 4))


def update(tx, params=ONES, grads=ONES):
    return lambda: tx.update(grads, tx.init(ONES), params)


BAD = {
    "step_size 0": (
        lambda: scale_by_prox_gradient(proxes.l1(1.0), 0.0),
        ValueError,
        "`scale_by_prox_gradient(step_size=...)` has to be positive, got 0.0.",
    ),
    "reach": (
        lambda: scale_by_prox_gradient(proxes.l1(1.0), reach=-1.0),
        ValueError,
        "`scale_by_prox_gradient(reach=...)` has to be positive, got -1.0.",
    ),
    "neither": (
        lambda: scale_by_prox_gradient(proxes.l1(1.0)),
        ValueError,
        "`scale_by_prox_gradient(step_size=...)` has to be given, or `reach` instead, got step_size=None and "
        "reach=None. If in doubt, pass the learning rate as `reach`.",
    ),
    "both": (
        lambda: scale_by_prox_gradient(proxes.l1(1.0), 0.1, reach=0.1),
        ValueError,
        "`scale_by_prox_gradient(step_size=...)` has to be given, or `reach` instead, got step_size=0.1 and reach=0.1. "
        "If in doubt, pass the learning rate as `reach`.",
    ),
    "signprox step_size": (
        lambda: signprox(0.1, prox=proxes.l1(1.0), step_size=0.0),
        ValueError,
        "`scale_by_prox_gradient(step_size=...)` has to be positive, got 0.0.",
    ),
    "prox": (
        lambda: signprox(0.1, prox="l1"),
        TypeError,
        "`signprox(prox=...)` has to be a `signopt.prox.Prox` or a function `prox(x, step_size) -> x`, got 'l1'. "
        "`signopt.prox` has the usual ones, such as `signopt.prox.l1(1e-4)`.",
    ),
    "learning_rate": (
        lambda: prox_step(proxes.l1(1.0), -0.1),
        ValueError,
        "`prox_step(learning_rate=...)` has to be at least 0, got -0.1.",
    ),
    "params of the mapping": (
        update(signprox(0.1, prox=proxes.l1(1.0)), params=None),
        ValueError,
        "`scale_by_prox_gradient(...).update(params=...)` has to be given, got None: a penalty depends on the "
        "parameters. Call `update(updates, state, params)`.",
    ),
    "params of the step": (
        update(prox_step(proxes.l1(1.0), 0.1), params=None),
        ValueError,
        "`prox_step(...).update(params=...)` has to be given, got None: a penalty depends on the parameters. Call "
        "`update(updates, state, params)`.",
    ),
    "a prox that changes a shape": (
        update(signprox(0.1, prox=lambda x, step_size: x[0], step_size=0.1)),
        ValueError,
        "`prox(x, step_size)` has to keep shapes, got (4,) for `x` of shape (6, 4). Return one number for each entry.",
    ),
    "a prox that changes a dtype": (
        update(prox_step(lambda x, step_size: x.astype(jnp.float16), 0.1)),
        TypeError,
        "`prox(x, step_size)` has to keep dtypes, got float16 for `x` of dtype float32. End it with "
        "`.astype(x.dtype)`.",
    ),
    "groups that do not divide": (
        update(signprox(0.1, prox=proxes.group_l1(1.0, axis=0, group_size=4))),
        ValueError,
        "`group_l1(group_size=...)` has to divide axis 0 of every leaf, got 4 for a leaf of shape (6, 4). Choose a "
        "divisor of 6, or leave that leaf out with `signopt.prox.masked`.",
    ),
    "complex": (
        update(signprox(0.1, prox=proxes.l1(1.0)), grads=ONES.astype(jnp.complex64)),
        TypeError,
        "`scale_by_prox_gradient` has to be given floating-point leaves, got complex64 at `updates`. Optimize the real "
        "and the imaginary part as two leaves.",
    ),
    "num_workers": (
        lambda: signprox(0.1, prox=proxes.l1(1.0), num_workers=4),
        ValueError,
        "`signprox(num_workers=...)` has to come with an axis to vote over, got num_workers=4 and axis_name=None. Pass "
        "`axis_name=...`, or leave out `num_workers` for one worker.",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_with_the_cure(case):
    bad_call, error, sentence = BAD[case]
    with pytest.raises(error) as caught:
        bad_call()
    assert str(caught.value) == sentence


def test_a_schedule_that_ends_at_zero_ends_the_run_without_harm():
    tx = signprox(optax.linear_schedule(0.1, 0.0, 2), prox=proxes.group_l1(0.5), beta=0.9)
    params = follow(tx, lambda x: x - 1, jnp.zeros((2, 2)), 6)
    assert jnp.all(jnp.isfinite(params)) and jnp.all(params > 0)
