"""Every penalty in every runner, and under every strict mode of JAX."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import everywhere
from signopt import majority_vote
from signopt import prox as proxes
from signopt import prox_step
from signopt import scale_by_prox_gradient
from signopt import signprox
from signopt import workers
from signopt.prox import chains

AXIS = everywhere.AXIS


def penalties(key=None):
    """All of them, made anew: under some modes a key, or a constant, has to be made inside."""
    key = jax.random.key(0) if key is None else key
    several = [proxes.zero(), proxes.l1(0.4), proxes.l2(0.3), proxes.box(-0.5, 0.5)]
    strengths = lambda b: proxes.l1(0.1 * b.astype(jnp.float32))
    some = proxes.sampled(several, num_samples=2, key=key)
    return {
        "zero": proxes.zero(),
        "l1": proxes.l1(0.3),
        "l1_non_negative": proxes.l1(0.3, non_negative=True),
        "l2_squared": proxes.l2_squared(0.3),
        "elastic_net": proxes.elastic_net(0.3, 0.2),
        "mcp": proxes.mcp(0.3),
        "box": proxes.box(-0.5, 0.7),
        "box_of_arrays": proxes.box(np.full(4, -0.5), np.linspace(0.1, 0.7, 4)),
        "non_negative": proxes.non_negative(),
        "binary": proxes.binary(0.3),
        "l2": proxes.l2(0.3),
        "group_l1": proxes.group_l1(0.3),
        "group_l1_pairs": proxes.group_l1(0.3, axis=1, group_size=2),
        "nuclear_norm": proxes.nuclear_norm(0.3),
        "total_variation": proxes.total_variation(0.3),
        "total_variation_down": proxes.total_variation(0.3, axis=0),
        "from_projection": proxes.from_projection(optax.projections.projection_l2_ball, 2.0),
        "masked": proxes.masked(proxes.l2(0.3), True),
        "sampled": some,
        "sampled_by_index": proxes.sampled(strengths, num_penalties=5, num_samples=2, key=key),
        "masked_sampled": proxes.masked(some, True),
        "plain": lambda x, step_size: jax.tree.map(lambda x: x / 2, x),
    }


def everything(name, prox, params, grads, axis_name=None):
    """What a step asks of a penalty: the mapping has its operator and its residual, the value is for reports."""
    mapping, step = scale_by_prox_gradient(prox, 0.5, axis_name=axis_name), prox_step(prox, 0.5)
    found = {
        "mapping": mapping.update(grads, mapping.init(params), params)[0],
        "step": step.update(grads, step.init(params), params)[0],
    }
    return found if name == "plain" else found | {"value": prox.value(params)}


def problem(dtype=jnp.float32):
    params = {"a": jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)), dtype)}
    grads = {"a": jnp.asarray(np.random.default_rng(1).normal(size=(4, 6, 4)), dtype)}
    return params, grads


def test_every_penalty_is_the_same_in_every_runner(devices):
    params, grads = problem()

    def one_worker(params, grads):
        return {name: everything(name, prox, params, grads, AXIS) for name, prox in penalties().items()}

    found = everywhere.runs(one_worker, params, grads, devices)
    alone = jax.jit(lambda p, g: {name: everything(name, prox, p, g) for name, prox in penalties().items()})
    plain = [jax.device_get(alone(params, jax.tree.map(lambda g, i=i: g[i], grads))) for i in range(4)]
    found["plain jit"] = jax.tree.map(lambda *x: np.stack(x), *plain)
    for name in ("sampled", "sampled_by_index", "masked_sampled"):  # workers draw for themselves, one worker does not
        drawn = [run[name].pop("mapping")["a"] for run in found.values()]
        for other in drawn[1:-1]:
            np.testing.assert_allclose(other, drawn[0], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(drawn[-1][0], drawn[0][0], rtol=1e-5, atol=1e-6)
        assert np.any(np.abs(drawn[-1] - drawn[0]) > 1e-3)
    everywhere.assert_alike(found, atol=3e-6)


@pytest.mark.parametrize("name", ("total_variation", "sampled", "masked_sampled", "nuclear_norm"))
def test_signprox_takes_the_same_steps_on_a_mesh_as_simulated(name, devices):
    params, grads = problem()
    tx = signprox(0.1, prox=penalties()[name], beta=0.5, axis_name=AXIS, num_workers=4)

    def step(state, batch):
        params, opt_state = state
        updates, opt_state = tx.update(jax.tree.map(lambda g: g[0], batch), opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), 0.0

    mesh = jax.make_mesh((4,), (AXIS,), (jax.sharding.AxisType.Auto,), devices=devices[:4])
    ends = []
    for run in (
        workers.simulate(step, 4, axis_name=AXIS),
        workers.on_mesh(step, mesh, axis_name=AXIS),
        workers.on_mesh(step, mesh, axis_name=AXIS, check_vma=False),
    ):
        state = (params, tx.init(params))
        for _ in range(3):
            state, _ = run(state, grads)
        ends.append(jax.device_get(state[0]["a"]))
    np.testing.assert_array_equal(ends[1], ends[0])
    np.testing.assert_array_equal(ends[2], ends[0])
    assert np.any(ends[0] != params["a"])


def test_a_drawn_prox_step_right_of_a_vote_keeps_parameters_shared(devices):
    """Right of the border all draw the same, so the types may not say that it differs."""
    params, grads = problem()
    tx = optax.chain(majority_vote(AXIS), optax.scale(-0.1), prox_step(penalties()["masked_sampled"], 0.1))

    def step(state, batch):
        params, opt_state = state
        updates, opt_state = tx.update(jax.tree.map(lambda g: g[0], batch), opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), 0.0

    mesh = jax.make_mesh((4,), (AXIS,), (jax.sharding.AxisType.Auto,), devices=devices[:4])
    on_mesh = workers.on_mesh(step, mesh, axis_name=AXIS)((params, tx.init(params)), grads)[0]
    simulated = workers.simulate(step, 4, axis_name=AXIS)((params, tx.init(params)), grads)[0]
    np.testing.assert_allclose(on_mesh[0]["a"], simulated[0]["a"], atol=1e-6)


def test_a_strength_may_differ_between_workers(devices):
    rows = jnp.asarray(np.random.default_rng(0).normal(size=(3, 50)), jnp.float32)
    find = lambda rows, strength: chains.denoise(rows, strength)
    found = everywhere.runs(find, rows, jnp.array([0.0, 0.1, 1.0, 100.0]), devices)
    assert np.any(found["mesh"][0] != found["mesh"][3])
    everywhere.assert_alike(found)


def test_a_mask_keeps_drawing():
    prox = proxes.sampled([proxes.zero(), proxes.box(0.0, 0.0)], num_samples=1, key=jax.random.key(0))
    both = proxes.masked(prox, {"a": True, "b": False})
    params = {"a": jnp.ones(1), "b": jnp.ones(1)}
    landed = [both.draw(step)(params, 1.0) for step in range(8)]
    assert sorted({float(x["a"][0]) for x in landed}) == [0.0, 1.0]
    assert {float(x["b"][0]) for x in landed} == {1.0}
    inside = [proxes.masked(prox.draw(step), {"a": True, "b": False})(params, 1.0) for step in range(8)]
    jax.tree.map(np.testing.assert_array_equal, landed, inside)
    assert proxes.l1(1.0).draw(3)(params, 0.5)["a"] == 0.5  # the others draw themselves


# ---- strict modes ------------------------------------------------------------------------------------


@contextlib.contextmanager
def config(name, value):
    old = getattr(jax.config, name)
    jax.config.update(name, value)
    try:
        yield
    finally:
        jax.config.update(name, old)


def all_penalties(params, grads, key=None):
    return {name: everything(name, prox, params, grads) for name, prox in penalties(key).items()}


def assert_close(found, expected):
    eps = float(np.finfo(np.float32).eps)
    for (path, a), b in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=16 * eps, atol=16 * eps, err_msg=jax.tree_util.keystr(path))


@pytest.fixture(scope="module")
def expected():
    params, grads = problem()
    return jax.device_get(jax.jit(all_penalties)(params, jax.tree.map(lambda g: g[0], grads)))


TRACED = {
    "rank promotion": lambda: config("jax_numpy_rank_promotion", "raise"),
    "dtype promotion": lambda: config("jax_numpy_dtype_promotion", "strict"),
    "x64": lambda: jax.enable_x64(True),
    "tracer leaks": lambda: config("jax_check_tracer_leaks", True),
    "typed keys off": lambda: config("jax_enable_custom_prng", False),
}


@pytest.mark.parametrize("mode", TRACED)
@pytest.mark.parametrize("dtype", (jnp.bfloat16, jnp.float32))
def test_every_penalty_is_traced_in_its_dtype_under_every_strict_mode(mode, dtype):
    params, grads = problem(dtype)
    key = jax.random.PRNGKey(0) if mode == "typed keys off" else jax.random.key(0)
    with TRACED[mode]():
        shapes = jax.eval_shape(lambda p, g: all_penalties(p, g, key), params, jax.tree.map(lambda g: g[0], grads))
    for name, one in shapes.items():
        assert one["mapping"]["a"].dtype == one["step"]["a"].dtype == dtype, name
        assert name == "plain" or one["value"].dtype == jnp.float32, name


def test_no_penalty_makes_a_nan_or_a_transfer_on_the_way(expected):
    params, grads = problem()
    grads = jax.tree.map(lambda g: g[0], grads)
    with config("jax_debug_nans", True):
        run = jax.jit(all_penalties)
        run(params, grads)
        with jax.transfer_guard("disallow"):
            found = run(params, grads)
    assert_close(jax.device_get(found), expected)


def test_every_penalty_runs_without_jit(expected):
    params, grads = problem()
    with jax.disable_jit():
        found = all_penalties(params, jax.tree.map(lambda g: g[0], grads))
    assert_close(jax.device_get(found), expected)


@pytest.mark.parametrize("mode", ("rank promotion", "dtype promotion", "x64"))
def test_state_keeps_its_types_for_three_steps(mode):
    with TRACED[mode]():
        params = {"a": jnp.ones((6, 4), jnp.bfloat16), "b": jnp.ones((2, 4), jnp.float32)}
        schedule = optax.exponential_decay(0.1, 3, 0.5) if mode != "dtype promotion" else 0.1
        tx = optax.chain(scale_by_prox_gradient(proxes.l2(0.1), reach=schedule), prox_step(proxes.l1(0.1), 0.1))
        state = tx.init(params)
        types = jax.tree.map(lambda x: (x.dtype, x.weak_type), state)
        step = jax.jit(tx.update)
        for _ in range(3):
            updates, state = step(params, state, params)
            assert jax.tree.map(lambda x: (x.dtype, x.weak_type), state) == types
            assert jax.tree.map(lambda x: x.dtype, updates) == jax.tree.map(lambda x: x.dtype, params)
        assert step._cache_size() == 1


def test_wide_leaves_keep_their_digits_beside_narrow_ones(x64):
    with config("jax_numpy_dtype_promotion", "strict"):
        params = {"a": jnp.asarray(np.full((2, 4), 1 / 3)), "b": jnp.full((2, 4), 1 / 3, jnp.float32)}
        grads = jax.tree.map(lambda x: x / 7, params)
        mixed = {name: prox for name, prox in penalties().items() if name != "from_projection"}  # optax adds leaves up
        shapes = jax.eval_shape(lambda p, g: {n: everything(n, prox, p, g) for n, prox in mixed.items()}, params, grads)
        for name, found in shapes.items():
            for what in ("mapping", "step"):
                assert found[what]["a"].dtype == jnp.float64 and found[what]["b"].dtype == jnp.float32, name
        exact = everything("l1", proxes.l1(0.1), params, grads)["mapping"]["a"]
        np.testing.assert_allclose(exact, 1 / 21 + 0.1, rtol=1e-7)  # 0.1 was rounded to float32 nowhere


def test_parameters_may_be_python_floats():
    for name, prox in penalties().items():
        if name in ("l1", "mcp", "binary", "elastic_net", "l2", "sampled_by_index", "box", "non_negative"):
            found = everything(name, prox, {"a": 0.75}, {"a": 0.25})
            assert all(jnp.shape(x) == () for x in jax.tree.leaves(found))
