"""Gradients from values alone, and means over neighbours: what they promise."""

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import everywhere
import signopt
from signopt.workers import zeroth_order_gradient

AXIS = everywhere.AXIS


def quadratic(params, shift=0.0):
    """A loss with different curvatures, two leaves, and a gradient that is easy to write down."""
    return jnp.sum(jnp.arange(1.0, 7.0) * (params["a"] - shift) ** 2) / 2 + 3 * jnp.sum(params["b"])


PARAMS = {"a": jnp.linspace(-1, 1, 6), "b": jnp.ones((2, 2))}


# ---- zeroth order ----------------------------------------------------------------------------------------------------


def test_all_coordinates_give_finite_differences():
    value, found = zeroth_order_gradient(quadratic, 1e-2, 10, jax.random.key(0), kind="coordinates")(PARAMS)
    expected = jax.grad(quadratic)(PARAMS)
    np.testing.assert_allclose(found["a"], expected["a"] + 1e-2 * jnp.arange(1.0, 7.0) / 2, atol=2e-3)
    np.testing.assert_allclose(found["b"], expected["b"], atol=2e-3)
    assert value == quadratic(PARAMS)


@pytest.mark.parametrize("kind", ("normal", "coordinates"))
def test_its_mean_is_the_gradient_and_its_variance_that_of_theory(kind):
    draw = jax.jit(jax.vmap(lambda k: zeroth_order_gradient(quadratic, 1e-3, 2, k, kind=kind)(PARAMS)[1]))
    found = draw(jax.random.split(jax.random.key(1), 20_000))
    found = np.concatenate([np.asarray(x, np.float64).reshape(20_000, -1) for x in jax.tree.leaves(found)], 1)
    expected = np.concatenate([np.ravel(x) for x in jax.tree.leaves(jax.grad(quadratic)(PARAMS))])
    error = found.std(0) / np.sqrt(20_000)
    assert np.all(np.abs(found.mean(0) - expected) < 5 * error + 5e-3)
    squared, size = np.sum(expected**2), len(expected)
    variance = {"normal": (size + 1) / 2, "coordinates": size / 2 - 1}[kind] * squared
    assert found.var(0).sum() == pytest.approx(variance, rel=0.05)


def test_workers_with_one_key_need_only_exchange_slopes(devices):
    key, shifts = jax.random.key(2), jnp.arange(4.0)

    def estimates(params, shift):
        together = zeroth_order_gradient(quadratic, 1e-2, 3, key, border=signopt.mean(AXIS))(params, shift)[1]
        return together, zeroth_order_gradient(quadratic, 1e-2, 3, key)(params, shift)[1]

    found = everywhere.runs(estimates, PARAMS, shifts, devices)
    everywhere.assert_alike(dict(found), rtol=1e-4, atol=1e-3)
    together, own = found["vmap"]
    assert np.ptp(own["a"], 0).min() > 0.1
    for both, each in zip(jax.tree.leaves(together), jax.tree.leaves(own), strict=True):
        np.testing.assert_allclose(both, np.broadcast_to(each.mean(0), each.shape), rtol=1e-4, atol=1e-3)
    floats = signopt.wire.bytes_sent(jnp.zeros(3), 4, signopt.mean(AXIS), axis_name=AXIS)
    assert floats <= 2 * 4 * 3


def test_a_vote_over_slopes_descends_by_a_bit_for_each_direction():
    vote = signopt.majority_vote("w", wire="one_bit")

    def step(state, shift):
        params, number = state
        key = jax.random.fold_in(jax.random.key(3), number)
        _, found = zeroth_order_gradient(quadratic, 1e-2, 1, key, border=vote)(params, 0.1 * shift[0])
        rate = 0.05 * (1 - number / 600)
        return (jax.tree.map(lambda x, g: x - rate * g, params, found), number + 1), None

    def bounded(params, shift):
        return quadratic({"a": params["a"], "b": params["b"] ** 2 / 2}, shift)

    run = signopt.workers.simulate(step, 4, axis_name="w")
    start = ({"a": jnp.ones(6), "b": jnp.zeros((2, 2))}, jnp.int32(0))
    (params, _), _ = lax.scan(run, start, jnp.zeros((600, 4)))
    assert quadratic({"a": params["a"], "b": jnp.zeros(1)}) < 0.1 * quadratic({"a": jnp.ones(6), "b": jnp.zeros(1)})


@pytest.mark.parametrize(
    ("kwargs", "reason"),
    [
        ({"smoothing": 0.0}, r"`zeroth_order_gradient\(smoothing=...\)` has to be positive"),
        ({"directions": 0}, r"`zeroth_order_gradient\(directions=...\)` has to be at least 1"),
        ({"kind": "sphere"}, r"`zeroth_order_gradient\(kind=...\)` has to be one of"),
        ({"kind": "coordinates", "directions": 11}, r"has to be at most the number of parameters, 10"),
        ({"border": optax.trace(0.9)}, r"has to be a border without memory"),
    ],
)
def test_wrong_arguments_are_errors_that_say_what_to_do(kwargs, reason):
    arguments = {"smoothing": 1e-3, "directions": 2, "key": jax.random.key(0)} | kwargs
    with pytest.raises(ValueError, match=reason):
        zeroth_order_gradient(quadratic, **arguments)(PARAMS)


# ---- gossip ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("neighbours", ((-1, 1), (1,), (1, 2)))
def test_gossip_is_a_doubly_stochastic_matrix_in_every_runner(neighbours, devices):
    tx = signopt.gossip_mean(AXIS, neighbours)
    own = {"x": jax.random.normal(jax.random.key(0), (4, 5)), "u": jax.random.normal(jax.random.key(1), (4, 5))}

    def moved(shared, own):
        del shared
        updates, _ = tx.update(own["u"], tx.init(own["x"]), own["x"])
        return own["x"] + updates

    found = everywhere.runs(moved, jnp.zeros(()), own, devices)
    matrix = sum(np.roll(np.eye(4), place, 1) for place in (0, *neighbours)) / (1 + len(neighbours))
    np.testing.assert_allclose(found["vmap"], matrix @ np.asarray(own["x"] + own["u"]), atol=1e-6)
    everywhere.assert_alike(found)


def test_gossip_does_without_a_worker_that_is_absent_or_not_finite():
    tx = signopt.gossip_mean("w", (-1, 1))
    params = jnp.array([0.0, 4.0, 8.0, jnp.nan])

    def moved(x, present):
        updates, _ = tx.update(jnp.zeros_like(x), tx.init(x), x, present=present)
        return x + updates

    found = jax.vmap(moved, axis_name="w")(params, jnp.array([True, False, True, True]))
    np.testing.assert_allclose(found[:3], [0.0, 4.0, 8.0])
    found = jax.vmap(moved, axis_name="w")(params, jnp.ones(4, bool))
    np.testing.assert_allclose(found[:3], [4 / 3, 4.0, 20 / 3], rtol=1e-6)


def gossip_then_mean(every, num_workers=4):
    inner = optax.chain(optax.sgd(0.1), signopt.gossip_mean("w"))
    return signopt.local_steps(
        inner, optax.chain(signopt.mean("w"), optax.sgd(1.0)), every=every, num_workers=num_workers
    )


def test_between_means_gossip_moves_the_mean_as_averaging_would_and_holds_workers_together():
    targets = jnp.arange(8.0)

    def train(tx):
        def step(state, target):
            params, opt_state = state
            here = signopt.local_params(opt_state, params)
            updates, opt_state = tx.update(here - target[0], opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), here

        run = signopt.workers.simulate(step, 8, axis_name="w")
        state = jnp.zeros(()), tx.init(jnp.zeros(()))
        return lax.scan(run, state, jnp.broadcast_to(targets, (40, 8)))

    (params, _), places = train(gossip_then_mean(40, 8))
    local = signopt.local_steps(optax.sgd(0.1), optax.chain(signopt.mean("w"), optax.sgd(1.0)), every=40, num_workers=8)
    (alone, _), apart = train(local)
    assert params == pytest.approx(float(alone), rel=1e-5) == pytest.approx(3.5 * (1 - 0.9**40), rel=1e-4)
    assert places[-1].std() < 0.6 * apart[-1].std()


@pytest.mark.parametrize("neighbours", ((), (1, 1)))
def test_neighbours_have_to_be_different(neighbours):
    with pytest.raises(ValueError, match="has to be different places"):
        signopt.gossip_mean("w", neighbours)


def test_a_neighbour_is_never_the_worker_itself():
    tx = signopt.gossip_mean("w", (-1, 1))
    with pytest.raises(ValueError, match="among 2 workers"):
        jax.vmap(lambda x: tx.update(x, tx.init(x), x)[0], axis_name="w")(jnp.ones(2))


def test_gossip_sends_a_float_for_each_neighbour():
    bits = 8 * signopt.wire.bytes_sent(jnp.zeros(1000), 8, signopt.gossip_mean("worker"))
    assert bits == 2 * 32 * 1000
