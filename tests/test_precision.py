"""Narrow parameters: a run that stalls, and two wrappers that keep it going."""

import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import signopt
from signopt import precision
from signopt import workers

KEY = jax.random.key(0)
WRAPPERS = {
    "master_weights": precision.master_weights,
    "stochastic_rounding": lambda tx: precision.stochastic_rounding(tx, KEY),
}


def distance(tx, dtype, steps=1500, rate=1e-3, num_workers=4):
    """How far voted Signum stays from the minimum of a quadratic, from weights of 1.0 to targets below."""
    optimizer = tx(signopt.signum(optax.cosine_decay_schedule(rate, steps), axis_name="w", num_workers=num_workers))
    target = jnp.linspace(0.3, 0.9, 64)

    def step(state, noise):
        params, opt_state = state
        loss = lambda p: 0.5 * jnp.sum((p.astype(jnp.float32) - target - 0.1 * noise[0]) ** 2)
        grads = workers.value_and_grad(loss, axis_name="w")(params)[1]
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    run = workers.simulate(step, num_workers, axis_name="w")
    noise = jax.random.normal(jax.random.key(1), (steps, num_workers, 64))
    params = jnp.ones(64, dtype)
    (params, _), _ = jax.lax.scan(run, (params, optimizer.init(params)), noise)
    return float(jnp.abs(params.astype(jnp.float32) - target).mean())


@pytest.mark.slow
def test_a_run_in_bfloat16_stalls_and_a_wrapped_one_does_not():
    plain = lambda tx: tx
    assert distance(plain, jnp.float32) < 0.02
    stalled = distance(plain, jnp.bfloat16)
    assert stalled > 0.3  # the mean of 1.0 - target is 0.4: hardly a weight moved
    for wrapper in WRAPPERS.values():
        assert distance(wrapper, jnp.bfloat16) < 0.02
    assert distance(WRAPPERS["master_weights"], jnp.float16) < 0.02


@pytest.mark.parametrize("dtype", (jnp.bfloat16, jnp.float16))
def test_master_weights_are_the_run_in_float32_rounded(dtype, rng):
    rows = jnp.asarray(rng.normal(size=(50, 40)), dtype)
    start = jnp.asarray(rng.normal(size=40), dtype)

    def train(tx, params):
        state = tx.init(params)
        for row in rows:
            updates, state = tx.update(row.astype(params.dtype), state, params)
            assert updates.dtype == params.dtype
            params = optax.apply_updates(params, updates)
        return params, state

    tx = signopt.signum(1e-3, weight_decay=0.1)
    wide, _ = train(tx, start.astype(jnp.float32))
    narrow, state = train(precision.master_weights(tx), start)
    np.testing.assert_array_equal(state.master, wide)
    ulp = jnp.abs(wide) * float(jnp.finfo(dtype).eps)
    assert (jnp.abs(narrow.astype(jnp.float32) - wide.astype(dtype).astype(jnp.float32)) <= ulp).all()


def test_float32_leaves_are_left_to_the_optimizer(rng):
    params = {"wide": jnp.asarray(rng.normal(size=5), jnp.float32), "none": None}
    grads = {"wide": jnp.asarray(rng.normal(size=5), jnp.float32), "none": None}
    tx = signopt.signum(0.1)
    expected = tx.update(grads, tx.init(params), params)[0]
    for wrapper in WRAPPERS.values():
        wrapped = wrapper(tx)
        found = wrapped.update(grads, wrapped.init(params), params)[0]
        np.testing.assert_array_equal(found["wide"], expected["wide"])


def test_stochastic_rounding_is_right_on_average_and_lands_on_neighbours(rng):
    """Five standard errors; rounding to nearest is the control that fails."""
    n = 200_000
    for value in (1.0 + 0.3 / 128, -0.7310585, 1e-3, 3.0e38):
        y = jnp.full(n, value, jnp.float32)
        found = precision._round(KEY, y).astype(jnp.float32)
        lower, upper = float(found.min()), float(found.max())
        assert lower <= float(y[0]) <= upper
        assert set(np.unique(found).tolist()) == {lower, upper}
        share = (float(y[0]) - lower) / (upper - lower)
        error = math.sqrt(share * (1 - share) / n)
        assert abs(float((found == upper).mean()) - share) < 5 * error
        nearest = float(y.astype(jnp.bfloat16)[0].astype(jnp.float32) == upper)
        assert abs(nearest - share) > 5 * error
    exact = jnp.array([0.0, -0.0, 1.0, -1.5, jnp.inf, -jnp.inf, jnp.nan, 2.0**-126], jnp.float32)
    np.testing.assert_array_equal(precision._round(KEY, exact).astype(jnp.float32), exact)


def test_every_worker_throws_the_same_coins_and_each_step_others(devices):
    params = jnp.ones(1000, jnp.bfloat16)
    tx = precision.stochastic_rounding(signopt.signum(1e-3, axis_name="w", num_workers=2), KEY)

    def step(state, batch):
        params, opt_state = state
        updates, opt_state = tx.update(batch[0], opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), updates

    mesh = jax.make_mesh((2,), ("w",), axis_types=(jax.sharding.AxisType.Auto,), devices=devices[:2])
    rows = np.ones((2, 1000), jnp.bfloat16)
    found = []
    for run in (workers.simulate(step, 2, axis_name="w"), workers.on_mesh(step, mesh, axis_name="w")):
        state, first = run((params, tx.init(params)), rows)
        (params_after, _), _ = run(state, rows)
        np.testing.assert_array_equal(first[0], first[1])
        assert (np.asarray(params_after) != np.asarray(state[0])).any()
        found.append(np.asarray(params_after).astype(np.float32))
    np.testing.assert_array_equal(*found)


def test_init_takes_shapes_and_update_needs_params():
    shapes = {"w": jax.ShapeDtypeStruct((3,), jnp.bfloat16)}
    for name, wrapper in WRAPPERS.items():
        tx = wrapper(signopt.signum(0.1))
        state = jax.eval_shape(tx.init, shapes)
        assert {x.dtype.name for x in jax.tree.leaves(state) if x.shape == (3,)} == {"float32"}
        with pytest.raises(ValueError, match=rf"`{name}\(...\)\.update\(params=...\)` has to be given, got None: "):
            tx.update({"w": jnp.ones(3, jnp.bfloat16)}, tx.init({"w": jnp.ones(3, jnp.bfloat16)}))


def test_narrow_parameters_are_warned_about_and_wide_ones_are_not():
    sentence = (
        r"^`signum` got bfloat16 parameters at `params\['b'\]`: a sign step below 2\.0e-03 on a weight of 1\.0 does nothing "
        r"in bfloat16\. Wrap the optimizer in `signopt\.precision\.master_weights`"
    )
    params = {"a": jnp.ones(2), "b": jnp.ones(2, jnp.bfloat16), "i": jnp.ones(2, int)}
    with pytest.warns(UserWarning, match=sentence) as found:
        precision.warn_if_narrow(params | {"c": params["b"]}, "signum")
    assert len(found) == 1
    # The number in the sentence is the border: below it a step is lost, above it one arrives.
    one = jnp.ones([], jnp.bfloat16)
    border = float(jnp.finfo(jnp.bfloat16).eps) / 4
    assert one - jnp.asarray(0.99 * border, jnp.bfloat16) == one
    assert one - jnp.asarray(1.01 * border, jnp.bfloat16) < one
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        precision.warn_if_narrow({"a": jnp.ones(2), "i": jnp.ones(2, int)}, "signum")


@pytest.mark.parametrize("name", ("signsgd", "signum", "lion", "signprox"))
def test_ready_optimizers_warn_when_they_start(name):
    kwargs = {"prox": signopt.prox.zero()} if name == "signprox" else {}
    optimizer = getattr(signopt, name)(1e-3, axis_name="w", **kwargs)
    with pytest.warns(UserWarning, match=rf"^`{name}` got float16 parameters at `params\['w'\]`"):
        optimizer.init({"w": jnp.ones(2, jnp.float16)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        precision.master_weights(optimizer).init({"w": jnp.ones(2, jnp.float16)})
