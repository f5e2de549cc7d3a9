"""Every ready optimizer keeps every promise that optax's own optimizers keep.

The promises are optax's generic tests of its aliases and of sharding, and what its wrappers need.
"""

import chex
import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

import conformance

pytestmark = pytest.mark.parametrize("row", conformance.ROWS, ids=lambda row: row.name)


def parabola(dtype=jnp.float32):
    """Start, minimiser and value of a parabola."""
    start, end = jnp.array([-1.0, 10.0, 1.0], dtype), jnp.array([1.0, -1.0, 1.0], dtype)
    return start, end, lambda x: jnp.sum((x - end) ** 2)


def rosenbrock(dtype=jnp.float32):
    """Start, minimiser and value of Rosenbrock's valley."""
    return jnp.zeros(2, dtype), jnp.ones(2, dtype), lambda x: (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2


def one_step(optimizer, objective, **extra):
    """`(params, state) -> (params, state)`."""

    def step(params, state):
        updates, state = optimizer.update(jax.grad(objective)(params), state, params, **extra)
        return optax.apply_updates(params, updates), state

    return step


def mixed_params():
    """Every leaf that a real tree has: several dtypes, a scalar, an empty leaf, None, a masked leaf."""
    return {
        "bf16": jnp.linspace(-1, 1, 6, dtype=jnp.bfloat16),
        "f32": jnp.linspace(-1, 2, 7),
        "matrix": [jnp.ones((2, 3)), -jnp.ones((2, 5, 2))],
        "scalar": jnp.float32(3.0),
        "empty": jnp.zeros((0, 4)),
        "none": None,
        "masked": optax.MaskedNode(),
    }


def moves(updates):
    """Whether every nonempty leaf moves."""
    return all(np.asarray(u, np.float32).any() for u in jax.tree.leaves(updates) if u.size)


@pytest.mark.parametrize("problem", (parabola, rosenbrock))
def test_it_converges(row, problem):
    start, end, objective = problem()
    schedule = optax.exponential_decay(0.02 if problem is parabola else 0.003, 2000, 0.5)
    optimizer = row.make(schedule)

    @jax.jit
    def train(params, state):
        step = one_step(optimizer, objective)
        return lax.fori_loop(0, 20_000, lambda _, carry: step(*carry), (params, state))

    params, state = train(start, optimizer.init(start))
    np.testing.assert_allclose(params, end, rtol=3e-2, atol=3e-2)
    chex.assert_tree_all_finite(state)


def test_its_state_maps_over_parameters(row):
    optimizer, params = row.make(), mixed_params()
    state = optimizer.init(params)
    same = optax.tree.map_params(optimizer, lambda x: x, state)
    chex.assert_trees_all_equal_structs(same, state)
    chex.assert_trees_all_equal(same, state)


def test_it_compiles_once_and_takes_arguments_it_does_not_know(row):
    start, _, objective = rosenbrock()
    optimizer = row.make()

    traces = []

    @jax.jit
    def step(params, state, unknown):
        traces.append(row.name)
        return one_step(optimizer, objective, an_argument_it_does_not_know=unknown)(params, state)

    params, state = start, optimizer.init(start)
    for _ in range(3):
        params, state = step(params, state, 1.0)
    assert len(traces) == 1


def test_inject_hyperparams_gives_the_same_updates(row):
    params = mixed_params() | {"bf16": None}  # optax promotes low precision to the highest of the tree
    gradients = jax.tree.map(lambda p: -p, params)
    plain, injected = row.make(), row.inject()
    state, injected_state = plain.init(params), injected.init(params)
    for _ in range(2):
        updates, state = jax.jit(plain.update)(gradients, state, params)
        injected_updates, injected_state = jax.jit(injected.update)(gradients, injected_state, params)
        chex.assert_trees_all_close(injected_updates, updates, rtol=1e-3)
        chex.assert_trees_all_close(injected_state.inner_state, state, rtol=1e-4)
    assert moves(updates)
    assert "learning_rate" in injected_state.hyperparams


def test_it_preserves_shapes_dtypes_and_structure(row):
    params = mixed_params()
    optimizer = row.make()
    state = jax.jit(optimizer.init)(params)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, optimizer.init(params))
    updates, after = jax.jit(optimizer.update)(params, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
    weak = [leaf.weak_type for leaf in jax.tree.leaves((updates, after))]
    assert not any(weak)
    assert moves(updates)


def test_its_state_is_stable_through_cond_in_every_dtype(row, x64):
    params = {d: jnp.array([1.0, 2.0], d) for d in ("float16", "bfloat16", "float32", "float64")}
    optimizer = row.make()

    @jax.jit
    def step(params, state, run):
        updates, state = lax.cond(run, lambda: optimizer.update(params, state, params), lambda: (params, state))
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for run in (True, False):
        new_params, new_state = step(params, state, run)
        chex.assert_trees_all_equal_shapes_and_dtypes(new_params, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)
        params, state = new_params, new_state


def test_multi_steps_waits_and_then_moves(row):
    params = mixed_params()
    optimizer = optax.MultiSteps(row.make(), every_k_schedule=2)
    state = jax.jit(optimizer.init)(params)
    update = jax.jit(optimizer.update)
    silent, state = update(params, state, params)
    chex.assert_trees_all_equal(silent, optax.tree.zeros_like(params))
    loud, _ = update(params, state, params)
    assert moves(loud)
    chex.assert_trees_all_equal_dtypes(loud, params)


def test_it_can_be_initialised_from_shapes(row):
    params = mixed_params()
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    optimizer = row.make()
    assert optimizer.init(jax.ShapeDtypeStruct((2, 4, 8), jnp.float32)) is not None
    chex.assert_trees_all_equal_shapes_and_dtypes(
        jax.eval_shape(optimizer.init, abstract), jax.eval_shape(optimizer.init, params)
    )


def test_its_state_is_sharded_like_its_parameters(row, devices):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,), devices=devices)
    optimizer = row.make()
    types = lambda state: jax.tree.map(jax.typeof, state)
    with jax.set_mesh(mesh):
        params = jnp.zeros((2, 8, 4), jnp.float16, out_sharding=jax.NamedSharding(mesh, P(None, "x")))
        state = optimizer.init(params)
        assert types(state) == types(jax.jit(optimizer.init)(params))
        for leaf in jax.tree.leaves(state):
            if leaf.shape[-3:] == params.shape:
                assert jax.typeof(leaf).sharding.spec[-3:] == (None, "x", None)
        if row.workers:
            pytest.skip(
                "JAX has no psum over a vmapped axis of an explicitly sharded array; test_runners.py has a mesh."
            )
        eager = optimizer.update(params, state, params)[1]
        jitted = jax.jit(optimizer.update)(params, state, params)[1]
        assert types(eager) == types(jitted) == types(state)


def test_masked_and_partition_leave_its_own_leaves_alone(row):
    params = {"mine": jnp.array([1.0, -2.0, 3.0]), "other": jnp.array([4.0, -5.0])}
    optimizer = row.make()
    own, _ = jax.jit(optimizer.update)(
        {"mine": params["mine"]}, optimizer.init({"mine": params["mine"]}), {"mine": params["mine"]}
    )
    masked = optax.masked(optimizer, {"mine": True, "other": False})
    updates, _ = jax.jit(masked.update)(params, masked.init(params), params)
    np.testing.assert_array_equal(updates["mine"], own["mine"])
    np.testing.assert_array_equal(updates["other"], params["other"])
    parts = optax.partition({"a": optimizer, "b": optax.set_to_zero()}, {"mine": "a", "other": "b"})
    updates, _ = jax.jit(parts.update)(params, parts.init(params), params)
    np.testing.assert_array_equal(updates["mine"], own["mine"])
    np.testing.assert_array_equal(updates["other"], jnp.zeros(2))


@pytest.mark.parametrize("wrong", (jnp.complex64, jnp.int32))
def test_leaves_that_are_not_real_floats_are_refused(row, wrong):
    if row.workers is None and wrong == jnp.complex64 and "signprox" not in row.name:
        pytest.skip("Without an axis it is optax's own, for which a complex number has a sign.")
    params = {"w": jnp.ones(3, wrong)}
    optimizer = row.make()
    with pytest.raises(TypeError, match=jnp.dtype(wrong).name):
        optimizer.update(params, optimizer.init(params), params)


def test_it_is_ready(row):
    optimizer = row.factory(row.learning_rate, **row.kwargs)
    assert isinstance(optimizer, optax.GradientTransformationExtraArgs)
