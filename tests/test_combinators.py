"""What people wrap around a vote: optax's combinators give the same values, or the same error, whatever runs the workers."""

import functools

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

import signopt
from signopt import workers

M = 4
PARAMS = {"base": jnp.ones((3, 2)), "head": jnp.zeros(5)}
LABELS = {"base": "freeze", "head": "train"}
FROZEN = {"base": True, "head": False}


def vote(rate=0.5):
    return signopt.signsgd(rate, axis_name="w")


# Each takes its parameters from `own_params`, and a shared loss as `value`.
COMBINATORS = {
    "partition": lambda: optax.partition({"train": vote(), "freeze": optax.set_to_zero()}, LABELS),
    "partition, momentum": lambda: optax.partition(
        {"train": signopt.signum(0.5, axis_name="w", num_workers=M), "freeze": optax.set_to_zero()}, LABELS
    ),
    "selective_transform": lambda: optax.selective_transform(vote(), freeze_mask=FROZEN),
    "freeze": lambda: optax.chain(vote(), optax.freeze(FROZEN)),
    "masked right of the vote": lambda: optax.chain(vote(), optax.masked(optax.add_decayed_weights(0.5), FROZEN)),
    "masked left of the vote": lambda: optax.chain(optax.masked(optax.scale(-1.0), FROZEN), vote()),
    "schedule_free": lambda: optax.contrib.schedule_free(vote(), learning_rate=0.5, b1=0.5),
    "lookahead": lambda: optax.lookahead(vote(), sync_period=2, slow_step_size=0.5),
    "reduce_on_plateau": lambda: optax.chain(vote(), optax.contrib.reduce_on_plateau(patience=1, accumulation_size=1)),
    "apply_if_finite right of the vote": lambda: optax.chain(
        signopt.majority_vote("w"), optax.apply_if_finite(optax.sgd(0.5), max_consecutive_errors=2)
    ),
}


@functools.cache
def optimizers():
    return {name: optax.with_extra_args_support(make()) for name, make in COMBINATORS.items()}


def own_params(name):
    return optax.LookaheadParams.init_synced(PARAMS) if name == "lookahead" else PARAMS


def start():
    return {name: (own_params(name), tx.init(own_params(name))) for name, tx in optimizers().items()}


def batches(steps=3):
    rng = np.random.default_rng(0)
    draw = lambda p: rng.integers(-2, 3, (steps, M, *p.shape)).astype(np.float32)
    return jax.tree.map(draw, PARAMS)


def step(state, batch):
    """All optimizers side by side."""
    gradient = jax.tree.map(lambda x: x[0], batch)
    value = lax.pmean(jnp.sum(gradient["head"]), "w")
    new = {}
    for name, (params, opt_state) in state.items():
        updates, opt_state = optimizers()[name].update(gradient, opt_state, params, value=value)
        new[name] = (optax.apply_updates(params, updates), opt_state)
    return new, None


def mesh_of(devices, axis_type=AxisType.Auto):
    return jax.make_mesh((M,), ("w",), axis_types=(axis_type,), devices=devices[:M])


def run_simulate(devices):
    return start(), workers.simulate(step, M, axis_name="w")


def run_on_mesh(devices, axis_type=AxisType.Auto, **kwargs):
    return start(), workers.on_mesh(step, mesh_of(devices, axis_type), axis_name="w", **kwargs)


def run_shard_map(devices):
    specs = workers.partition_specs(start(), "w")
    mapped = jax.shard_map(
        workers.shared(step), mesh=mesh_of(devices), in_specs=(specs, P("w")), out_specs=(specs, P())
    )  # fmt: skip
    return start(), jax.jit(mapped)


def run_pmap(devices):
    own = jax.tree.map(lambda spec: spec == P("w"), workers.partition_specs(start(), "w"))
    state = jax.tree.map(lambda mine, x: x if mine else jnp.stack([x] * M), own, start())
    mapped = jax.pmap(step, "w", devices=devices[:M])

    def run(state, batch):
        return mapped(state, jax.tree.map(lambda x: x[:, None], batch))

    run.whole = lambda state: jax.tree.map(lambda mine, x: x if mine else x[-1], own, state)
    return state, run


def run_in_jit(devices, axis_type=AxisType.Auto):
    mesh = mesh_of(devices, axis_type)
    each = {name: workers.in_jit(tx, mesh, axis_name="w") for name, tx in optimizers().items()}

    @jax.jit
    def run(state, batch):
        value = jnp.mean(jnp.sum(batch["head"], axis=1))
        new = {}
        for name, (params, opt_state) in state.items():
            updates, opt_state = each[name].update(batch, opt_state, params, value=value)
            new[name] = (optax.apply_updates(params, updates), opt_state)
        return new, None

    return {name: (own_params(name), tx.init(own_params(name))) for name, tx in each.items()}, run


RUNNERS = {
    "simulate": run_simulate,
    "on_mesh": run_on_mesh,
    "on_mesh, unchecked": functools.partial(run_on_mesh, check_vma=False),
    "on_mesh, explicit": functools.partial(run_on_mesh, axis_type=AxisType.Explicit),
    "shard_map": run_shard_map,
    "pmap": run_pmap,
    "in_jit": run_in_jit,
    "in_jit, explicit": functools.partial(run_in_jit, axis_type=AxisType.Explicit),
}


@functools.cache
def trained(runner):
    state, run = RUNNERS[runner](jax.devices())
    for k in range(3):
        state, _ = run(state, jax.tree.map(lambda x, k=k: x[k], batches()))
    return jax.device_get(getattr(run, "whole", lambda state: state)(state))


@pytest.mark.parametrize("runner", [name for name in RUNNERS if name != "simulate"])
def test_every_combinator_gives_the_same_values_under_every_runner(runner):
    found, expected = trained(runner), trained("simulate")
    for name in COMBINATORS:
        assert jax.tree.structure(found[name]) == jax.tree.structure(expected[name]), name
        check = functools.partial(np.testing.assert_array_equal, err_msg=name)
        jax.tree.map(check, found[name], expected[name])


def test_what_is_frozen_stays_and_the_rest_moves():
    for name in ("partition", "partition, momentum", "selective_transform", "freeze"):
        params, _ = trained("simulate")[name]
        np.testing.assert_array_equal(params["base"], PARAMS["base"])
        assert (params["head"] != 0).any(), name


# ---- what differs is still refused -----------------------------------------------------------------------------

DIFFER = {
    "a masked vote": lambda: optax.masked(vote(), {"base": False, "head": True}),
    "a group that is only scaled": lambda: optax.partition({"train": vote(), "freeze": optax.scale(1e-9)}, LABELS),
    "momentum in disguise": lambda: optax.partition({"train": vote(), "freeze": optax.trace(0.0)}, LABELS),
}


@pytest.mark.parametrize("case", DIFFER)
@pytest.mark.parametrize("runner", ("simulate", "on_mesh", "in_jit"))
def test_raw_gradients_beside_the_vote_are_refused(runner, case, devices):
    """Negative control: what is a worker's own does not become shared by being small, or zero at first."""
    tx = DIFFER[case]()

    def step(state, batch):
        updates, opt_state = tx.update(jax.tree.map(lambda x: x[0], batch), state[1], state[0])
        return (optax.apply_updates(state[0], updates), opt_state), None

    if runner == "in_jit":
        tx = workers.in_jit(tx, mesh_of(devices), axis_name="w")
        run = jax.jit(lambda state, batch: tx.update(batch, state[1], state[0]))
    else:
        kinds = {"simulate": (workers.simulate, M), "on_mesh": (workers.on_mesh, mesh_of(devices))}
        run = kinds[runner][0](step, kinds[runner][1], axis_name="w")
    with pytest.raises(ValueError, match=r"the same on every worker|updates or shared state differ between workers"):
        run((PARAMS, tx.init(PARAMS)), jax.tree.map(lambda x: x[0], batches()))


OWN = {
    "a gradient": lambda w, g: w + g,
    "an index": lambda w, g: w + lax.axis_index("w"),
    "a neighbour's": lambda w, g: lax.ppermute(lax.pcast(w, "w", to="varying"), "w", [(0, 1)]),
    "a key": lambda w, g: w + jax.random.normal(jax.random.fold_in(jax.random.key(0), lax.axis_index("w")), w.shape),
    "a loop": lambda w, g: lax.fori_loop(0, 2, lambda i, x: x + lax.axis_index("w"), lax.pcast(w, "w", to="varying")),
}


@pytest.mark.parametrize("case", OWN)
def test_what_depends_on_a_worker_is_not_shared(case, devices):
    run = jax.shard_map(
        workers.shared(lambda w, g: OWN[case](w, g[0])), mesh=mesh_of(devices), in_specs=(P(), P("w")), out_specs=P()
    )
    with pytest.raises(ValueError, match="out_specs"):
        jax.jit(run)(jnp.zeros(3), jnp.ones((M, 3)))


SAME = {
    "zeros": lambda w, g: w + jnp.zeros_like(g),
    "in a jit": lambda w, g: jax.jit(lambda w, g: (g, w * 2 + jnp.zeros_like(g)))(w, g)[1],
    "two jits deep": lambda w, g: jax.jit(lambda w, g: jax.jit(jnp.where)(jnp.zeros_like(g) == 0, w, 7.0))(w, g),
    "after a vote": lambda w, g: lax.psum(g, "w") + jnp.zeros_like(g) + w,
    "under a custom rule": lambda w, g: jax.nn.relu(w + jnp.zeros_like(g)),
    "checkpointed": lambda w, g: jax.checkpoint(jnp.sin)(w + jnp.zeros_like(g)),
}


@pytest.mark.parametrize("case", SAME)
def test_what_only_has_a_gradients_shape_is_shared(case, devices):
    def run(fun):
        mapped = jax.shard_map(
            lambda w, g: fun(w, g[0]), mesh=mesh_of(devices), in_specs=(P(), P("w")), out_specs=P()
        )  # fmt: skip
        return jax.jit(mapped)(jnp.arange(3.0), jnp.ones((M, 3)))

    with pytest.raises(ValueError, match="out_specs"):
        run(SAME[case])
    unchecked = jax.shard_map(
        lambda w, g: SAME[case](w, g[0]), mesh=mesh_of(devices), in_specs=(P(), P("w")), out_specs=P(), check_vma=False
    )  # fmt: skip
    expected = jax.jit(unchecked)(jnp.arange(3.0), jnp.ones((M, 3)))
    np.testing.assert_array_equal(run(workers.shared(SAME[case])), expected)


# ---- groups without parameters ---------------------------------------------------------------------------------


@pytest.mark.parametrize("wire", ("one_bit", "two_bit", "psum"))
@pytest.mark.parametrize("runner", ("simulate", "on_mesh"))
def test_a_voting_group_may_be_empty(runner, wire, devices):
    """As an ndim partition of a model without biases makes it; and a tree may be."""
    train = lambda: signopt.signum(0.5, axis_name="w", num_workers=M, wire=wire)
    tx = optax.partition({"train": train(), "nobody": train()}, {"base": "train", "head": "train"})

    def step(state, batch):
        gradient = jax.tree.map(lambda x: x[0], batch)
        updates, opt_state = tx.update(gradient, state[1], state[0])
        nothing, empty_state = train().update({}, state[2], {})
        return (optax.apply_updates(state[0], updates), opt_state, empty_state), nothing

    kinds = {"simulate": (workers.simulate, M), "on_mesh": (workers.on_mesh, mesh_of(devices))}
    run = kinds[runner][0](step, kinds[runner][1], axis_name="w")
    state, nothing = run((PARAMS, tx.init(PARAMS), train().init({})), jax.tree.map(lambda x: x[0], batches()))
    assert nothing == {}
    assert (np.asarray(state[0]["head"]) != 0).any()
