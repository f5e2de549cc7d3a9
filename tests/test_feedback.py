"""Optimizers with memory: what only they claim."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import signopt
from signopt import workers

M, AXIS = 4, "w"
MAKE = {
    "ef_signsgd": lambda **kw: signopt.ef_signsgd(0.1, **kw),
    "ef_signum": lambda **kw: signopt.ef_signum(0.02, **kw),
    "onebit_adam": lambda **kw: signopt.onebit_adam(0.05, b2=0.9, settled=0.5, **kw),
}


def train(tx, steps=600, shift=0.0):
    """A parabola whose workers disagree about its minimum by `shift`; their mean is 1, 2, ..."""
    target = jnp.arange(1.0, 6.0)

    def step(state, batch):
        params, opt_state = state
        grads = params - target - batch[0]
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    run = workers.simulate(step, M, axis_name=AXIS)
    own = shift * jnp.array([-3.0, 1.0, 1.0, 1.0])[:, None] * jnp.ones((M, 5))
    state = (jnp.zeros(5), tx.init(jnp.zeros(5)))
    for _ in range(steps):
        state, _ = run(state, own)
    return np.asarray(state[0] - target), state[1]


@pytest.mark.parametrize("name", MAKE)
def test_it_finds_the_mean_of_workers_that_disagree(name):
    error, _ = train(MAKE[name](axis_name=AXIS, num_workers=M), shift=2.0)
    assert np.abs(error).max() < 0.5


def test_a_vote_does_not():
    """Negative control: it finds the median worker's minimum."""
    error, _ = train(signopt.signum(0.02, axis_name=AXIS, num_workers=M), shift=2.0)
    assert np.abs(error - 2.0).max() < 0.25


def test_error_feedback_on_one_worker_is_its_equations(rng):
    grads = rng.normal(size=(20, 7)).astype(np.float32)
    tx = signopt.mean(None, uplink=signopt.codecs.scaled_sign())
    state, residual = tx.init(jnp.zeros(7)), np.zeros(7)
    for g in grads:
        found, state = tx.update(jnp.asarray(g), state)
        target = g + residual
        expected = np.abs(target).mean() * np.where(target >= 0, 1, -1)
        residual = target - expected
        np.testing.assert_allclose(np.asarray(found), expected, rtol=1e-5)


def test_a_scheduled_rate_scales_what_is_remembered_when_it_was_due():
    """With a rate that falls to 0 the residual of the last large step is still paid."""
    schedule = lambda step: jnp.where(step == 0, 1.0, 0.0)
    tx = signopt.ef_signsgd(schedule)
    state, total = tx.init(jnp.zeros(2)), 0.0
    for _ in range(20):
        updates, state = tx.update(jnp.array([3.0, 1.0]), state)
        total = total + updates
    np.testing.assert_allclose(np.asarray(total), [-3.0, -1.0], atol=1e-3)


def test_onebit_adam_is_adam_until_its_second_moment_settles(rng):
    grads = jnp.asarray(rng.normal(size=(30, 6)), jnp.float32)
    tx, adam = signopt.onebit_adam(0.1, b2=0.9, look_every=10), optax.adam(0.1, b2=0.9)
    state, other = tx.init(jnp.zeros(6)), adam.init(jnp.zeros(6))
    switched, ours, theirs = None, jax.jit(tx.update), jax.jit(adam.update)
    for k, g in enumerate(grads):
        found, state = ours(g, state)
        expected, other = theirs(g, other)
        if switched is None:
            np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=1e-4, atol=1e-6)
        settled = int(optax.tree.get(state, "settled_at"))
        switched = switched or (k if settled else None)
    assert settled in (20, 30)


def test_from_then_on_only_bits_travel():
    like = {"w": jnp.zeros((300, 40))}
    sent = signopt.wire.bytes_sent(like, 8, signopt.onebit_adam(1e-3, axis_name="worker", num_workers=8))
    dense = signopt.wire.bytes_sent(like, 8, "mean")
    signs = signopt.mean("worker", uplink=signopt.codecs.scaled_sign(block=256), num_workers=8)
    up_only = signopt.wire.bytes_sent(like, 8, signs)
    assert sent == dense  # the larger of the two branches
    assert up_only < 0.6 * dense


def test_the_second_moment_never_settles_if_it_must_not_change_at_all():
    """Negative control: a threshold of 1 on noise."""
    tx = signopt.onebit_adam(0.1, b2=0.9, settled=1.0)
    state, update = tx.init(jnp.zeros(3)), jax.jit(tx.update)
    for k in range(60):
        _, state = update(jax.random.normal(jax.random.key(k), (3,)), state)
    assert int(state[0].settled_at) == 0


@pytest.mark.parametrize("name", MAKE)
def test_one_bad_worker_leaves_everything_finite(name):
    tx = MAKE[name](axis_name=AXIS, num_workers=M)

    def step(state, batch):
        params, opt_state = state
        updates, opt_state = tx.update(batch[0], opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    run, state = workers.simulate(step, M, axis_name=AXIS), (jnp.zeros(5), tx.init(jnp.zeros(5)))
    for value in (jnp.nan, jnp.inf, 1.0) * 8:
        state, _ = run(state, jnp.ones((M, 5)).at[1].set(value))
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(state))


# ---- low rank ------------------------------------------------------------------------------------------------------


def low_rank_step(grads, tx, state, present=None):
    def step(state, batch):
        g, here = jax.tree.map(lambda x: x[0], batch)
        updates, state = tx.update(g, state, present=here if present is not None else None)
        return state, updates

    here = jnp.ones(M, bool) if present is None else present
    state, updates = workers.simulate(step, M, axis_name=AXIS)(state, (grads, here))
    return jax.tree.map(lambda x: x[0], updates), state


def test_what_low_rank_sends_and_remembers_adds_up(rng):
    tx = signopt.low_rank_mean(AXIS, rank=2, num_workers=M)
    like = {"w": jnp.zeros((20, 12)), "b": jnp.zeros(5)}
    state, went_in, came_out = tx.init(like), 0.0, 0.0
    for _ in range(5):
        grads = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=(M, *x.shape)), jnp.float32), like)
        updates, state = low_rank_step(grads, tx, state)
        went_in, came_out = went_in + np.asarray(grads["w"]).mean(0), came_out + np.asarray(updates["w"])
        np.testing.assert_allclose(updates["b"], np.asarray(grads["b"]).mean(0), rtol=1e-5, atol=1e-6)
    owed = np.asarray(state.own.per_worker["w"]).mean(0)
    np.testing.assert_allclose(came_out + owed, went_in, atol=1e-4)
    assert np.abs(owed).max() > 0.01


def test_the_factors_turn_to_the_largest_directions(rng):
    """The same matrix again and again: what is left goes to what the best approximation leaves."""
    u, s, v = np.linalg.svd(rng.normal(size=(16, 10)))
    matrix = (u[:, :10] * (s * 2.0 ** -np.arange(10))) @ v
    tx = signopt.low_rank_mean(None, rank=2)
    state = tx.init(jnp.zeros((16, 10)))
    context_free = []
    for _ in range(8):
        state = state._replace(own=jnp.zeros((16, 10)))
        found, state = tx.update(jnp.asarray(matrix, jnp.float32), state)
        context_free.append(np.linalg.norm(matrix - np.asarray(found)))
    best = np.linalg.norm(np.sort(s * 2.0 ** -np.arange(10))[::-1][2:])
    assert best * 0.999 <= context_free[-1] <= best * 1.01 < context_free[0]


def test_dense_steps_come_first(rng):
    tx = signopt.low_rank_mean(AXIS, rank=1, num_workers=M, dense_steps=1)
    grads = jnp.asarray(rng.normal(size=(M, 8, 8)), jnp.float32)
    state = tx.init(grads[0])
    first, state = low_rank_step(grads, tx, state)
    second, state = low_rank_step(grads, tx, state)
    np.testing.assert_allclose(first, np.asarray(grads).mean(0), rtol=1e-5, atol=1e-6)
    assert np.linalg.matrix_rank(np.asarray(second), tol=1e-4) == 1


def test_a_rank_that_no_matrix_has_is_refused():
    with pytest.raises(
        ValueError, match=r"`low_rank_mean\(rank=\.\.\.\)` has to be at most what a matrix allows, here 4, got 9"
    ):
        signopt.low_rank_mean(None, rank=9).init({"w": jnp.zeros((4, 7)), "b": jnp.zeros(100)})
    with pytest.raises(ValueError, match=r"`low_rank_mean\(num_workers=\.\.\.\)` has to be given, got None"):
        signopt.low_rank_mean(AXIS, rank=1)
