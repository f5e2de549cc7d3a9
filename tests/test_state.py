"""State that belongs to one worker: its shape, where it lies, and another number of workers."""

import operator

import chex
from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

import signopt
from signopt.workers.state import PerWorkerState
from signopt.workers.state import partition_specs
from signopt.workers.state import per_worker
from signopt.workers.state import resize

M = 4
PARAMS = {"w": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(5, jnp.bfloat16), "s": jnp.float32(1.0)}


def stacked_gradients(num_workers=M, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda p: jnp.asarray(rng.normal(size=(num_workers, *p.shape)), p.dtype)
    return jax.tree.map(draw, PARAMS)


# ---- per_worker ------------------------------------------------------------------------------------------


def test_every_leaf_has_a_worker_axis_and_workers_are_numbered():
    state = per_worker(optax.trace(0.9), M).init(PARAMS)
    assert isinstance(state, PerWorkerState)
    shapes = jax.tree.map(lambda p: (M, *p.shape), PARAMS)
    assert jax.tree.map(jnp.shape, state.per_worker.trace) == shapes
    np.testing.assert_array_equal(state.worker, np.arange(M))
    assert state.worker.dtype == jnp.int32


def test_both_local_views_give_what_the_wrapped_transformation_gives():
    wrapped, inner = per_worker(optax.trace(0.9), M), optax.trace(0.9)
    gradients = stacked_gradients()
    all_workers = jax.vmap(wrapped.update)
    state = wrapped.init(PARAMS)
    for _ in range(2):
        updates, state = all_workers(gradients, state)
    for m in range(M):
        own = jax.tree.map(operator.itemgetter(m), gradients)
        own_state, view = inner.init(PARAMS), jax.tree.map(operator.itemgetter(slice(m, m + 1)), wrapped.init(PARAMS))
        for _ in range(2):
            expected, own_state = inner.update(own, own_state)
            got, view = wrapped.update(own, view)
        chex.assert_trees_all_equal(got, expected, jax.tree.map(operator.itemgetter(m), updates))
        chex.assert_trees_all_equal(view.per_worker, jax.tree.map(lambda x: x[None], own_state))
        assert view.worker.tolist() == [m]


def test_extra_arguments_and_parameters_reach_the_wrapped_transformation():
    def update(updates, state, params, *, value):
        return jax.tree.map(lambda u, p: value * (u + p), updates, params), state

    inner = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    wrapped = per_worker(inner, 1)
    got, _ = wrapped.update(jnp.ones(2), wrapped.init(None), jnp.ones(2), value=3.0)
    np.testing.assert_array_equal(got, [6.0, 6.0])


def test_the_states_of_all_workers_at_once_are_refused():
    wrapped = per_worker(optax.trace(0.9), M)
    with pytest.raises(ValueError, match=r"state of one worker, got .* 4 .*partition_specs.*in_axes=0"):
        wrapped.update(PARAMS, wrapped.init(PARAMS))


def test_num_workers_is_checked_against_the_axis():
    wrapped = per_worker(optax.trace(0.9), M, axis_name="w")
    state = per_worker(optax.trace(0.9), 3).init(PARAMS)
    with pytest.raises(ValueError, match=r"num_workers=.*'w'.* 3, got 4\..*resize"):
        jax.vmap(wrapped.update, axis_name="w")(stacked_gradients(3), state)


@pytest.mark.parametrize("num_workers", (0, -1))
def test_a_count_below_one_is_refused(num_workers):
    with pytest.raises(ValueError, match=rf"num_workers=.* at least 1, got {num_workers}"):
        per_worker(optax.trace(0.9), num_workers)


def test_a_traced_count_is_refused():
    injected = optax.inject_hyperparams(signopt.signum)(0.1, axis_name="w", num_workers=M)
    with pytest.raises(TypeError, match=r"num_workers=.*static_args"):
        injected.init(PARAMS)


# ---- partition_specs -------------------------------------------------------------------------------------


def training_state(num_workers=M):
    tx = signopt.signum(optax.constant_schedule(0.1), axis_name="w", num_workers=num_workers)
    return PARAMS, tx.init(PARAMS)


@pytest.mark.parametrize("axis_name", ("w", ("a", "b")))
def test_per_worker_state_is_split_and_the_rest_is_not(axis_name):
    state = training_state()
    specs = partition_specs(state, axis_name)
    is_spec = lambda s: isinstance(s, P)
    assert jax.tree.structure(specs, is_leaf=is_spec) == jax.tree.structure(state)
    borders = [
        s
        for s in jax.tree.leaves(specs[1], is_leaf=lambda s: isinstance(s, PerWorkerState))
        if isinstance(s, PerWorkerState)
    ]
    assert len(borders) == 1
    inside = jax.tree.leaves(borders, is_leaf=is_spec)
    everywhere = jax.tree.leaves(specs, is_leaf=is_spec)
    assert all(spec == P(axis_name) for spec in inside)
    assert sum(spec == P(axis_name) for spec in everywhere) == len(inside)
    assert all(spec in (P(), P(axis_name)) for spec in everywhere)


def nnx_state(num_workers=M):
    """A model and its optimizer as nnx hands them to a transform: flattened to paths."""
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    tx = signopt.signum(0.1, axis_name="w", num_workers=num_workers)
    return nnx.state((model, nnx.Optimizer(model, tx, wrt=nnx.Param)))


def named(state):
    """`{path: leaf}` with paths as strings of names, whatever wraps the leaves."""
    flat = jax.tree.leaves_with_path(state, is_leaf=lambda s: isinstance(s, P))
    return {jax.tree_util.keystr(path): leaf for path, leaf in flat}


def test_specs_find_per_worker_state_that_nnx_has_flattened():
    state = nnx_state()
    specs = named(partition_specs(state, "w"))
    assert list(specs) == list(named(state))
    own = {path for path, spec in specs.items() if spec == P("w")}
    assert own == {path for path, leaf in named(state).items() if leaf.ndim and leaf.shape[0] == M}
    assert all(specs[path] == P() for path in specs.keys() - own)
    assert any("ema" in path for path in own) and any("worker'" in path for path in own)


@pytest.mark.parametrize("name", ("worker", "per_worker"))
def test_a_parameter_that_is_called_worker_is_still_shared(name):
    state = {"params": {name: jnp.ones(3), "w": jnp.ones(2)}}
    specs = partition_specs(state, "w")
    assert specs["params"][name] == P()
    chex.assert_trees_all_equal(resize(state, 2), state)


# ---- resize ----------------------------------------------------------------------------------------------


def trained_state(num_workers=M):
    """A state whose workers have different momenta and different numbers of bad steps."""
    tx = signopt.signum(0.1, axis_name="w", num_workers=num_workers)
    border = lambda s: isinstance(s, PerWorkerState)
    state = tx.init(PARAMS)
    axes = jax.tree.map(lambda s: 0 if border(s) else None, state, is_leaf=border)
    update = jax.vmap(lambda g, s: tx.update(g, s, PARAMS)[1], (0, axes), axes, axis_name="w")
    for seed in range(3):
        gradients = stacked_gradients(num_workers, seed)
        gradients["s"] = gradients["s"].at[0].set(jnp.nan)
        state = update(gradients, state)
    return tx, state


def worker_mean(state):
    return jax.tree.map(lambda x: x.astype(jnp.float32).mean(0), optax.tree.get(state, "ema"))


@pytest.mark.parametrize("num_workers", (1, 2, 3, 4, 8))
def test_resize_keeps_the_mean_over_workers(num_workers):
    _, state = trained_state()
    resized = resize(state, num_workers)
    fresh = signopt.signum(0.1, axis_name="w", num_workers=num_workers).init(PARAMS)
    chex.assert_trees_all_equal_shapes_and_dtypes(resized, fresh)
    before, after = worker_mean(state), worker_mean(resized)
    np.testing.assert_allclose(after["w"], before["w"], rtol=4 * np.finfo(np.float32).eps, atol=1e-7)
    np.testing.assert_allclose(after["b"], before["b"], rtol=2**-8, atol=2**-12)  # bfloat16's half unit
    np.testing.assert_array_equal(optax.tree.get(resized, "worker"), np.arange(num_workers))
    assert np.abs(before["w"]).max() > 0


def test_resize_leaves_shared_state_alone():
    _, state = trained_state()
    resized = resize((PARAMS, state), 7)
    chex.assert_trees_all_equal(resized[0], PARAMS)
    vote = lambda s: optax.tree.get(s, "BorderState")
    chex.assert_trees_all_equal(vote(resized), vote(state))
    assert vote(resized).count == 3


def test_resize_to_the_same_number_changes_nothing():
    _, state = trained_state()
    chex.assert_trees_all_equal(resize(state, M), state)


def test_training_goes_on_with_another_number_of_workers():
    _, state = trained_state()
    resized = resize(state, 2)
    tx = signopt.signum(0.1, axis_name="w", num_workers=2)

    def step(state, batch):
        updates, opt_state = tx.update(jax.tree.map(lambda g: g[0], batch), state[1], state[0])
        return (optax.apply_updates(state[0], updates), opt_state), None

    run = signopt.workers.simulate(step, 2, axis_name="w")
    (_, opt_state), _ = run((PARAMS, resized), stacked_gradients(2))
    assert optax.tree.get(opt_state, "BorderState").count == 4
    chex.assert_trees_all_equal_shapes_and_dtypes(opt_state, resized)


def test_resize_works_on_state_that_nnx_has_flattened():
    state = nnx_state()
    resized = named(resize(state, 6))
    fresh = named(nnx_state(6))
    assert {path: leaf.shape for path, leaf in resized.items()} == {path: leaf.shape for path, leaf in fresh.items()}
    workers = [leaf for path, leaf in resized.items() if "['worker']" in path]
    assert len(workers) == 1
    np.testing.assert_array_equal(workers[0], np.arange(6))


def test_resize_to_nobody_is_refused():
    with pytest.raises(ValueError, match=r"`resize\(num_workers=...\)` has to be at least 1, got 0\."):
        resize(training_state(), 0)
