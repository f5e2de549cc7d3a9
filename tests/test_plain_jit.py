"""A border in plain jit: the numbers of every other runner, what travels, and where everything lies."""

import functools
import re

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

import signopt
from signopt import workers

SHAPES = {"w": (16, 24), "v": (24, 8), "b": (7,)}
SPECS = {"w": P("s"), "v": P(None, "s"), "b": P()}
TYPES = (AxisType.Auto, AxisType.Explicit)
MESHES = {"workers": ((8,), ("d",)), "and shards": ((4, 2), ("d", "s")), "two axes": ((2, 4), ("a", "d"))}


def mesh_of(devices, kind="workers", axis_type=AxisType.Auto):
    shape, names = MESHES[kind]
    return jax.make_mesh(shape, names, axis_types=(axis_type,) * len(names), devices=devices)


def axes(kind):
    return ("a", "d") if kind == "two axes" else "d"


def size(kind):
    return 4 if kind == "and shards" else 8


def specs_of(kind):
    return SPECS if kind == "and shards" else dict.fromkeys(SHAPES, P())


def put(mesh, tree, specs, *front):
    return jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(mesh, P(*front, *s))), tree, specs)


def params_on(mesh, kind, shapes=SHAPES):
    return put(mesh, {name: jnp.ones(shape) for name, shape in shapes.items()}, specs_of(kind))


def gradients(num_workers, seed=0, shapes=SHAPES):
    """With zeros, so that workers abstain and tie."""
    rng = np.random.default_rng(seed)
    return {name: rng.integers(-2, 3, (num_workers, *shape)).astype(np.float32) for name, shape in shapes.items()}


def chain(kind, wire):
    """Links left and right of the border, which decays weights and has a shared state of the parameters' shapes."""
    return optax.chain(
        workers.per_worker(optax.ema(0.5, debias=False), size(kind)),
        signopt.majority_vote(axes(kind), wire=wire),
        optax.trace(0.5),
        optax.add_decayed_weights(2.0**-4),
        optax.scale_by_learning_rate(2.0**-6),
    )


def simulated(kind, tx, steps=3):
    sizes = (2, 4) if kind == "two axes" else size(kind)

    def step(state, batch):
        updates, opt_state = tx.update(jax.tree.map(lambda x: x[0], batch), state[1], state[0])
        return (optax.apply_updates(state[0], updates), opt_state), None

    run = workers.simulate(step, sizes, axis_name=axes(kind))
    params = {name: jnp.ones(shape) for name, shape in SHAPES.items()}
    state = (params, tx.init(params))
    for k in range(steps):
        state, _ = run(state, gradients(size(kind), k))
    return state


def trained(mesh, kind, tx, specs=None, steps=3):
    run = workers.in_jit(tx, mesh, axis_name=axes(kind), specs=specs)

    @jax.jit
    def step(params, opt_state, grads):
        step.traces += 1
        updates, opt_state = run.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    step.traces = 0
    params = params_on(mesh, kind)
    opt_state = run.init(params)
    for k in range(steps):
        grads = put(mesh, gradients(size(kind), k), specs_of(kind), axes(kind))
        params, opt_state = step(params, opt_state, grads)
    return (params, opt_state), step


def assert_equal(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("axis_type", TYPES, ids=lambda t: t.name)
@pytest.mark.parametrize("kind", MESHES)
@pytest.mark.parametrize("wire", ("two_bit", "psum"))
def test_plain_jit_gives_the_updates_of_simulated_workers_bit_for_bit(wire, kind, axis_type, devices):
    tx = chain(kind, wire)
    specs = SPECS if kind == "and shards" else None
    found, step = trained(mesh_of(devices, kind, axis_type), kind, tx, specs)
    assert_equal(found, simulated(kind, tx))
    assert step.traces == 1


@pytest.mark.parametrize("axis_type", TYPES, ids=lambda t: t.name)
def test_on_one_bit_too(axis_type, devices):
    tx = chain("workers", "one_bit")
    assert_equal(trained(mesh_of(devices, "workers", axis_type), "workers", tx)[0], simulated("workers", tx))


@pytest.mark.parametrize("axis_type", TYPES, ids=lambda t: t.name)
def test_specs_change_where_work_is_done_and_no_bit(axis_type, devices):
    tx = chain("and shards", "two_bit")
    mesh = mesh_of(devices, "and shards", axis_type)
    assert_equal(trained(mesh, "and shards", tx, None)[0], trained(mesh, "and shards", tx, SPECS)[0])


def test_under_set_mesh_nothing_changes(devices):
    for axis_type in TYPES:
        mesh = mesh_of(devices, "and shards", axis_type)
        tx = chain("and shards", "two_bit")
        with jax.set_mesh(mesh):
            found, _ = trained(mesh, "and shards", tx, SPECS)
        assert_equal(found, simulated("and shards", tx))


@pytest.mark.parametrize("axis_type", TYPES, ids=lambda t: t.name)
def test_gradients_of_a_vmap_are_taken_as_they_come(axis_type, devices):
    """A whole step, as in docs/loops.md: a batch that is sharded, a loss, a gradient for each worker."""
    mesh = mesh_of(devices, "and shards", axis_type)
    tx = workers.in_jit(
        optax.chain(signopt.majority_vote("d"), optax.scale_by_learning_rate(0.5)),
        mesh,
        axis_name="d",
        specs=P(None, "s"),
    )
    params = jax.device_put(jnp.ones((6, 4)), NamedSharding(mesh, P(None, "s")))
    batch = jax.device_put(np.arange(48, dtype=np.float32).reshape(8, 6) - 20, NamedSharding(mesh, P("d")))
    loss = lambda params, batch: jnp.mean(jnp.sum(batch @ params, axis=-1))

    @jax.jit
    def step(params, opt_state, batch):
        losses, grads = jax.vmap(jax.value_and_grad(loss), (None, 0))(params, workers.split_batch(batch, 4))
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), losses

    new, losses = step(params, tx.init(params), batch)
    signs = np.sign(np.asarray(batch).reshape(4, 2, 6).mean(1)).sum(0)
    np.testing.assert_array_equal(new, np.broadcast_to(1 - 0.5 * np.sign(signs)[:, None], (6, 4)))
    assert losses.shape == (4,)
    assert new.sharding.spec == P(None, "s")


# ---- extra arguments -------------------------------------------------------------------------------------------


def test_one_worker_may_be_absent_or_all(devices):
    mesh = mesh_of(devices)
    tx = workers.in_jit(signopt.majority_vote("d"), mesh, axis_name="d")
    grads = {"b": np.ones((8, 3), np.float32)}
    grads["b"][:3] = -1
    update = jax.jit(lambda g, present: tx.update(g, tx.init(None), None, present=present)[0]["b"])
    np.testing.assert_array_equal(update(grads, np.ones(8, bool)), np.ones(3))
    np.testing.assert_array_equal(update(grads, np.arange(8) < 5), -np.ones(3))
    np.testing.assert_array_equal(update(grads, True), np.ones(3))
    np.testing.assert_array_equal(update(grads, False), np.zeros(3))
    with pytest.raises(
        ValueError, match=r"`in_jit\(...\).update\(present=...\)` has to hold arrays .* 8 .* shape \(3,\)"
    ):
        update(grads, np.ones(3, bool))


def test_functions_and_their_batches_reach_the_links(devices):
    """A link left of the border that asks its worker's own loss, and one right of it that is given a shared value."""
    mesh = mesh_of(devices)

    def left(updates, state, params=None, *, value_fn, **extra_args):
        return jax.tree.map(lambda x: x * value_fn(params), updates), state

    def right(updates, state, params=None, *, scale, **extra_args):
        return jax.tree.map(lambda x: x * scale, updates), state

    init = lambda params: optax.EmptyState()
    links = [optax.GradientTransformationExtraArgs(init, link) for link in (left, right)]
    tx = workers.in_jit(optax.chain(links[0], signopt.majority_vote("d"), links[1]), mesh, axis_name="d")
    batch = np.array([1, 1, 1, 1, 1, -1, -1, -1], np.float32)[:, None]
    params = jnp.float32(2.0)

    @jax.jit
    def update(batch, value_fn, scale):
        return tx.update(np.ones(8, np.float32), tx.init(params), params, value_fn=value_fn, scale=scale)[0]

    own = lambda batch, params: params * batch[0]
    assert update(batch, jax.tree_util.Partial(own, batch), 3.0) == 3.0
    assert update(batch, jax.tree_util.Partial(own, -batch), 3.0) == -3.0
    whole = jax.jit(
        lambda batch: tx.update(
            np.ones(8, np.float32), tx.init(params), params, value_fn=lambda p: p * batch.sum(), scale=1.0
        )
    )
    assert whole(batch)[0] == 1.0
    assert whole(-batch)[0] == -1.0


# ---- frozen layers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis_type", TYPES, ids=lambda t: t.name)
def test_frozen_layers_stay_where_they_are(axis_type, devices):
    mesh = mesh_of(devices, "workers", axis_type)
    tx = optax.partition(
        {"train": signopt.signum(0.5, axis_name="d", num_workers=8), "freeze": optax.set_to_zero()},
        {"w": "train", "v": "freeze", "b": "freeze"},
    )
    (params, _), _ = trained(mesh, "workers", tx)
    assert_equal(params, simulated("workers", tx)[0])
    np.testing.assert_array_equal(params["v"], np.ones(SHAPES["v"]))
    assert (np.asarray(params["w"]) != 1).any()


# ---- what travels, and where things lie ------------------------------------------------------------------------

LARGE = {"w": (512, 1024), "v": (1024, 512), "b": (1024,)}
COLLECTIVE = re.compile(
    r"= (.*?) (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter|ragged-all-to-all)(?:-start)?\("
)


def collectives(step, *args):
    text = jax.jit(step).lower(*args).compile().as_text()
    return [(kind, re.search(r"(\w+)\[", shape)[1]) for shape, kind in COLLECTIVE.findall(text)]


def large(mesh, kind, tx, specs=None):
    """What an update of a million parameters sends."""
    run = workers.in_jit(tx, mesh, axis_name=axes(kind), specs=specs)
    params = params_on(mesh, kind, LARGE)
    grads = put(mesh, gradients(size(kind), shapes=LARGE), specs_of(kind), axes(kind))
    return collectives(run.update, grads, run.init(params), params)


@pytest.mark.parametrize("axis_type", TYPES, ids=lambda t: t.name)
@pytest.mark.parametrize("kind", ("workers", "and shards"))
@pytest.mark.parametrize(("wire", "words"), [("one_bit", "u8"), ("two_bit", "u16")])
def test_a_vote_is_two_collectives_of_packed_words_and_nothing_else(wire, words, kind, axis_type, devices):
    specs = SPECS if kind == "and shards" else None
    found = large(mesh_of(devices, kind, axis_type), kind, chain(kind, wire), specs)
    assert sorted(found) == [("all-gather", words), ("all-to-all", words)]


def test_a_ready_optimizer_sends_no_more(devices):
    tx = signopt.signum(0.1, axis_name="d", num_workers=8, weight_decay=0.1)
    assert sorted(large(mesh_of(devices), "workers", tx)) == [("all-gather", "u16"), ("all-to-all", "u16")]


def test_floats_that_travel_would_be_seen(devices):
    """Negative control: a mean, and a vote whose shards nobody declared."""
    mesh = mesh_of(devices, "and shards")
    assert ("all-reduce", "f32") in large(mesh, "and shards", signopt.mean("d"), SPECS)
    assert len(large(mesh, "and shards", chain("and shards", "two_bit"))) > 2


@pytest.mark.parametrize("axis_type", TYPES, ids=lambda t: t.name)
@pytest.mark.parametrize("jitted", (False, True))
def test_state_is_made_where_it_belongs(jitted, axis_type, devices):
    mesh = mesh_of(devices, "and shards", axis_type)
    tx = workers.in_jit(chain("and shards", "two_bit"), mesh, axis_name="d", specs=SPECS if jitted else None)
    params = params_on(mesh, "and shards")
    with jax.set_mesh(mesh):  # a jit that returns zeros of Explicit types has to know the devices
        state = (jax.jit(tx.init) if jitted else tx.init)(params)
    momentum = optax.tree.get(state, "ema")
    assert {name: x.sharding.shard_shape(x.shape) for name, x in momentum.items()} == {
        "w": (1, 8, 24), "v": (1, 24, 4), "b": (1, 7)
    }  # fmt: skip
    if not jitted:  # shared state of a link to the right of the border
        assert optax.tree.get(state, "trace")["v"].sharding.spec == params["v"].sharding.spec
    expected = chain("and shards", "two_bit").init({name: jnp.ones(shape) for name, shape in SHAPES.items()})
    assert_equal(state, expected)


def test_types_of_state_are_kept_on_an_explicit_mesh(devices):
    """As optax's `sharding_test.py` demands of its own optimizers."""
    mesh = mesh_of(devices, "and shards", AxisType.Explicit)
    tx = workers.in_jit(chain("and shards", "two_bit"), mesh, axis_name="d", specs=SPECS)
    types = lambda tree: jax.tree.map(jax.typeof, tree)
    with jax.set_mesh(mesh):
        params = params_on(mesh, "and shards")
        grads = put(mesh, gradients(4), SPECS, "d")
        state = tx.init(params)
        updates, new_state = tx.update(grads, state, params)
        assert types(jax.jit(tx.init)(params)) == types(state) == types(new_state)
        assert types(jax.jit(tx.update)(grads, state, params)) == types((updates, new_state))
        assert types(updates) == types(params)


def test_parameters_from_the_host_will_do(devices):
    tx = chain("workers", "two_bit")
    run = workers.in_jit(tx, mesh_of(devices), axis_name="d")
    params = {name: np.ones(shape, np.float32) for name, shape in SHAPES.items()}
    opt_state = run.init(params)
    for k in range(3):
        updates, opt_state = jax.jit(run.update)(gradients(8, k), opt_state, params)
        params = optax.apply_updates(params, updates)
    assert_equal((params, opt_state), simulated("workers", tx))


# ---- bad input -------------------------------------------------------------------------------------------------


def test_what_is_not_voted_on_is_refused(devices):
    mesh = mesh_of(devices)
    unvoted = r"`in_jit\(tx\)` has to be given a chain with a border .* `num_workers=...`"
    unmarked = r"has to be given state of each worker's own, got state that is the same on every worker"
    for tx, sentence in ((optax.sgd(0.1), unvoted), (signopt.signum(0.1, axis_name="d"), unmarked)):
        run = workers.in_jit(tx, mesh, axis_name="d")
        with pytest.raises(ValueError, match=sentence):
            jax.jit(run.update)(jnp.ones((8, 2)), run.init(jnp.zeros(2)), jnp.zeros(2))


def test_gradients_without_an_axis_of_workers_are_refused_with_the_cure(devices):
    tx = workers.in_jit(signopt.signsgd(0.1, axis_name="d"), mesh_of(devices), axis_name="d")
    update = lambda shape, params: tx.update({"w": jnp.ones(shape)}, tx.init(None), {"w": params})
    sentence = (
        "`in_jit(...).update(updates=...)` has to have a leading axis of 8 workers, got shape (3,) at `updates['w']`. Take "
        "the gradients with `jax.vmap(jax.value_and_grad(loss), (None, 0))(params, signopt.workers.split_batch(batch, 8))`."
    )
    with pytest.raises(ValueError, match=re.escape(sentence)):
        update((3,), jnp.ones(3))
    with pytest.raises(ValueError, match=r"8 workers before the shape of the parameter, \(8, 3\), got \(8, 3\)"):
        update((8, 3), jnp.ones((8, 3)))
    tx = workers.in_jit(signopt.signum(0.1, axis_name="d", num_workers=3), mesh_of(devices), axis_name="d")
    with pytest.raises(
        ValueError, match=r"`in_jit\(...\)` has to be given the state of all 8 workers, got shape \(3.*\)"
    ):
        tx.init(jnp.ones(2))


def test_axes_and_specs_have_to_be_the_mesh_s(devices):
    mesh = mesh_of(devices)
    with pytest.raises(
        ValueError, match=r"`in_jit\(axis_name=...\)` has to name axes of the mesh, .*\('d',\), got 'w'"
    ):
        workers.in_jit(optax.sgd(0.1), mesh, axis_name="w")
    with pytest.raises(TypeError, match=r"`in_jit\(specs=...\)` has to be .*PartitionSpec.*, got None"):
        workers.in_jit(optax.sgd(0.1), mesh, axis_name="d", specs={"w": None})
    tx = workers.in_jit(signopt.majority_vote("d"), mesh, axis_name="d", specs={"w": P("s")})
    with pytest.raises(
        ValueError, match=r"has to hold a spec for every leaf of the updates, got none for `updates\['v'\]`"
    ):
        tx.update({"w": jnp.ones((8, 2)), "v": jnp.ones((8, 2))}, tx.init(None))


def test_a_gradient_that_was_reduced_before_is_refused(devices):
    """Left of the border a link must not average."""
    reduced = optax.stateless(lambda updates, _: jax.tree.map(functools.partial(lax.pmean, axis_name="d"), updates))
    run = workers.in_jit(optax.chain(reduced, signopt.majority_vote("d")), mesh_of(devices), axis_name="d")
    with pytest.raises(ValueError, match="`majority_vote` has to be given each worker's own gradient"):
        run.update(jnp.ones((8, 2)), run.init(jnp.zeros(2)), jnp.zeros(2))
