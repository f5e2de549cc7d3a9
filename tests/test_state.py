"""State that belongs to one worker: its shape, where it lies, and another number of workers."""

import operator

import chex
from flax import nnx
from flax.training import train_state
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


def mesh(num_workers=M):
    kinds = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((num_workers,), ("w",), axis_types=kinds, devices=jax.devices()[:num_workers])


def on_devices(tx, state, specs, **settings):
    """A step in a `shard_map` of one's own."""
    step = lambda g, s: tx.update(jax.tree.map(lambda x: x[0], g), s, PARAMS)
    mapped = jax.shard_map(step, mesh=mesh(), in_specs=(P("w"), specs), out_specs=(P(), specs), **settings)
    return jax.jit(mapped)(stacked_gradients(), state)


def test_a_state_of_more_workers_is_refused_in_a_shard_map_of_one_s_own():
    tx = signopt.signum(0.1, axis_name="w", num_workers=M)
    state = tx.init(PARAMS)
    specs = partition_specs(state, "w")
    updates, _ = on_devices(tx, state, specs)
    assert set(np.unique(updates["w"])) <= {np.float32(-0.1), 0, np.float32(0.1)}
    with pytest.raises(ValueError, match=rf"state of one worker, got those of 2 at once.*resize\(state, {M}\)"):
        on_devices(tx, resize(state, 2 * M), specs)


CHAINS = {
    "signum": lambda: signopt.signum(0.1, axis_name="w"),
    "lion": lambda: signopt.lion(0.1, axis_name="w"),
    "mh_signsgd": lambda: signopt.mh_signsgd(axis_name="w"),
    "scale_by_signum": lambda: optax.chain(signopt.scale_by_signum(), signopt.majority_vote("w")),
    "finite_only": lambda: optax.chain(signopt.finite_only(optax.trace(0.9)), signopt.majority_vote("w")),
}


@pytest.mark.parametrize("name", CHAINS)
def test_momentum_that_claims_to_be_shared_is_refused_before_jax_advises_to_look_away(name):
    tx = CHAINS[name]()
    state = tx.init(PARAMS)
    message = rf"`{name}\(\.\.\.\)\.update\(state=\.\.\.\)` has to be given state of each worker's own.*axis 'w' .*num_workers="
    with pytest.raises(ValueError, match=message):
        on_devices(tx, state, P())
    # Types that are not there show nothing: this is the way to lose the momenta of all workers but one.
    on_devices(tx, state, P(), check_vma=False)


def test_momentum_that_is_made_in_the_step_and_marked_as_the_worker_s_own_is_not_refused():
    tx = signopt.signum(0.1, axis_name="w")

    def step(g):
        state = jax.tree.map(lambda x: jax.lax.pcast(x, "w", to="varying"), tx.init(PARAMS))
        return tx.update(jax.tree.map(lambda x: x[0], g), state, PARAMS)[0]

    updates = jax.jit(jax.shard_map(step, mesh=mesh(), in_specs=P("w"), out_specs=P()))(stacked_gradients())
    chex.assert_trees_all_equal_shapes(updates, PARAMS)


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


@pytest.mark.parametrize(
    "state",
    [
        {"worker": jnp.ones(M), "per_worker": jnp.ones(M)},
        {"worker": jnp.int32(1), "per_worker": jnp.ones(M)},
        {"worker": jnp.arange(M), "per_worker": jnp.ones(3)},
        {"worker": 1, "per_worker": 2.0},
        {"worker": {"a": jnp.arange(M)}, "per_worker": None},
    ],
    ids=("floats", "scalar", "sizes", "python", "nothing"),
)
def test_a_user_s_names_do_not_make_a_state_per_worker(state):
    specs = partition_specs({"mine": state}, "w")
    assert set(jax.tree.leaves(specs, is_leaf=lambda s: isinstance(s, P))) == {P()}


def test_what_may_or_may_not_be_per_worker_state_is_an_error():
    state = {"mine": {"worker": jnp.arange(M), "per_worker": {"a": jnp.ones((M, 2))}}}
    message = (
        r"`signopt\.workers\.PerWorkerState`, got .* at `state\['mine'\]`.*`PerWorkerState\(\*\*that\)`.*another name"
    )
    for function in (lambda s: partition_specs(s, "w"), lambda s: resize(s, 2)):
        with pytest.raises(ValueError, match=message):
            function(state)
        function({"mine": PerWorkerState(**state["mine"])})


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


def test_a_train_state_goes_on_with_another_number_of_workers():
    make = lambda num_workers: signopt.signum(0.1, axis_name="w", num_workers=num_workers)
    state = train_state.TrainState.create(apply_fn=None, params=PARAMS, tx=make(M))
    step = lambda state, batch: (state.apply_gradients(grads=jax.tree.map(lambda g: g[0], batch)), None)
    state, _ = signopt.workers.simulate(step, M, axis_name="w")(state, stacked_gradients())
    resized = resize(state, 2)
    with pytest.raises(ValueError, match=rf"num_workers=.*'w'.* 2, got {M}\..*resize"):
        signopt.workers.simulate(step, 2, axis_name="w")(resized, stacked_gradients(2))
    after, _ = signopt.workers.simulate(step, 2, axis_name="w")(resized.replace(tx=make(2)), stacked_gradients(2))
    assert after.step == 2
    assert optax.tree.get(after.opt_state, "ema")["w"].shape == (2, 2, 3)


def test_an_optimizer_of_nnx_goes_on_with_another_number_of_workers():
    make = lambda num_workers: signopt.signum(0.1, axis_name="w", num_workers=num_workers)
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, make(M), wrt=nnx.Param)
    resized = resize(optimizer, 6)
    resized.tx = make(6)
    fresh = nnx.Optimizer(model, make(6), wrt=nnx.Param)
    assert named(jax.tree.map(jnp.shape, nnx.state(resized))) == named(jax.tree.map(jnp.shape, nnx.state(fresh)))
    np.testing.assert_array_equal(resized.opt_state[0].worker[...], np.arange(6))
    assert jax.tree.structure(nnx.state(resized)) == jax.tree.structure(nnx.state(fresh))


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
