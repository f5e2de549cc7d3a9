"""Gradients that JAX has not added up: the numbers of every other runner, what travels, and what is refused."""

import functools
import re

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

import signopt
from signopt import workers

SHAPES = {"w": (16, 24), "v": (24, 8), "b": (8,)}
MESHES = {"workers": ((8,), ("d",)), "and shards": ((4, 2), ("d", "s"))}
SPECS = {"workers": dict.fromkeys(SHAPES, P()), "and shards": {"w": P("s"), "v": P(None, "s"), "b": P()}}


def mesh_of(devices, kind, axis_type=AxisType.Explicit):
    shape, names = MESHES[kind]
    return jax.make_mesh(shape, names, axis_types=(axis_type,) * len(names), devices=devices)


def put(mesh, tree, specs):
    return jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), tree, specs)


def params_on(mesh, kind):
    """Few binary digits, so that sums are exact in every order."""
    rng = np.random.default_rng(7)
    params = {name: rng.integers(-4, 5, shape).astype(np.float32) / 8 for name, shape in SHAPES.items()}
    return put(mesh, params, SPECS[kind])


def batch(seed=0):
    """A column of zeros makes gradients that are zero."""
    rng = np.random.default_rng(seed)
    x, t = (rng.integers(-2, 3, (32, size)).astype(np.float32) for size in (16, 8))
    x[:, 0] = 0
    return x, t


def at(mesh, *entries):
    """Where a result of a product lies; names that the mesh does not have are left out."""
    return NamedSharding(mesh, P(*(entry if entry in mesh.axis_names else None for entry in entries)))


def loss_fn(params, x, t, product=lambda a, b, _: a @ b, add=jnp.add):
    """Linear in each leaf."""
    return jnp.mean(t * add(product(product(x, params["w"], (None,)), params["v"], ("s",)), params["b"]))


def explicit_loss(mesh, params, x, t):
    product = lambda a, b, last: jnp.dot(a, b, out_sharding=at(mesh, "d", *last))

    def add(y, b):
        b = jax.reshard(b, NamedSharding(mesh, P(at(mesh, "s").spec[0], reduced={"d"})))
        return y + jax.lax.broadcast_in_dim(b, y.shape, (1,), out_sharding=at(mesh, "d", "s"))

    return loss_fn(params, x, jax.reshard(t, at(mesh, "d", "s")), product, add)


def tagged(x):
    at = jax.typeof(x).sharding
    return jax.reshard(x, NamedSharding(at.mesh, P(*at.spec.partitions, reduced={"d"})))


def unreduced_like(x):
    at = jax.typeof(x).sharding
    return NamedSharding(at.mesh, P(*at.spec.partitions, unreduced={"d"}))


def signum(kind, wire):
    return signopt.signum(2.0**-4, 0.5, axis_name="d", num_workers=MESHES[kind][0][0], wire=wire)


def unreduced_step(mesh, tx, parts=1):
    @jax.jit
    def step(params, opt_state, x, t):
        step.traces += 1
        of_tagged = jax.tree.map(tagged, params)
        loss = functools.partial(explicit_loss, mesh)
        if parts == 1:
            grads = jax.grad(loss)(of_tagged, x, t)
        else:
            cut = lambda a: a.reshape(mesh.shape["d"], -1, parts, a.shape[1]).transpose(2, 0, 1, 3)
            join = lambda a: a.reshape(-1, a.shape[2])
            zeros = jax.tree.map(lambda p: jax.reshard(jnp.zeros_like(p), unreduced_like(p)), params)

            def add(total, part):
                grads = jax.grad(lambda params: loss(params, *map(join, part)) / parts)(of_tagged)
                return jax.tree.map(jnp.add, total, grads), None

            grads, _ = jax.lax.scan(add, zeros, (cut(x), cut(t)))
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    step.traces = 0
    return step


def trained(devices, kind, wire, parts=1, steps=3):
    mesh = mesh_of(devices, kind)
    tx = workers.unreduced(signum(kind, wire), axis_name="d")
    step, params = unreduced_step(mesh, tx, parts), params_on(mesh, kind)
    state = (params, tx.init(params))
    for k in range(steps):
        state = step(*state, *put(mesh, batch(k), (P("d"), P("d"))))
    return state, step, mesh


def on_mesh(devices, kind, wire, steps=3):
    mesh, tx = mesh_of(devices, kind, AxisType.Auto), signum(kind, wire)
    if kind == "and shards":
        tx = workers.on_shards(tx, SPECS[kind])

    def step(state, batch):
        _, grads = workers.value_and_grad(loss_fn, axis_name="d")(state[0], *batch)
        updates, opt_state = tx.update(grads, state[1], state[0])
        return (optax.apply_updates(state[0], updates), opt_state), None

    run = workers.on_mesh(step, mesh, axis_name="d")
    params = params_on(mesh, kind)
    state = (params, tx.init(params))
    for k in range(steps):
        state, _ = run(state, batch(k))
    return state


def assert_equal(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize(
    ("kind", "wire"),
    [
        ("workers", "one_bit"),
        ("and shards", "one_bit"),
        ("and shards", "two_bit"),
        pytest.param("workers", "two_bit", marks=pytest.mark.slow),
    ],
)
def test_it_trains_as_on_a_mesh_bit_for_bit(devices, kind, wire):
    """Parameters, and every worker's momentum, of which some entries are zero and some ballots tie."""
    state, step, _ = trained(devices, kind, wire)
    assert step.traces == 1
    assert_equal(state, on_mesh(devices, kind, wire))
    momentum = optax.tree.get(state[1], "ema")["w"]
    assert momentum.sharding.spec == P("d", *SPECS[kind]["w"], *(None,) * (2 - len(SPECS[kind]["w"])))
    momentum = np.asarray(momentum)
    assert not np.array_equal(momentum[0], momentum[1])


@pytest.mark.parametrize("kind", ("and shards", pytest.param("workers", marks=pytest.mark.slow)))
def test_micro_batches_add_up_to_the_batch(devices, kind):
    assert_equal(*(trained(devices, kind, "two_bit", parts, steps=1)[0] for parts in (1, 2)))


def collectives(text):
    """Kind and dtypes of each that moves more than a number."""
    found = []
    for line in text.splitlines():
        hit = re.search(r" (all-to-all|all-gather|all-reduce|reduce-scatter|collective-permute)(-start)?\(", line)
        if hit:
            shapes = re.findall(r"([a-z]+\d+)\[([\d,]*)\]", line[: hit.start()])
            if any(dims for _, dims in shapes):
                found.append((hit[1], {dtype for dtype, _ in shapes}))
    return found


@pytest.mark.parametrize("parts", (1, 2))
def test_only_packed_votes_travel(devices, parts):
    (params, opt_state), step, mesh = trained(devices, "workers", "two_bit", parts, steps=1)
    text = step.lower(params, opt_state, *put(mesh, batch(), (P("d"), P("d")))).compile().as_text()
    assert sorted(collectives(text), key=str) == [("all-gather", {"u16"}), ("all-to-all", {"u16"})]


def gradients(devices, tag=tagged):
    """Unreduced ones on eight devices, as a function of the parameters for a `jax.jit`, and the parameters."""
    mesh = mesh_of(devices, "workers")
    x, t = put(mesh, batch(), (P("d"), P("d")))
    return lambda params: jax.grad(functools.partial(explicit_loss, mesh))(jax.tree.map(tag, params), x, t), params_on(
        mesh, "workers"
    )


def test_the_mean_of_workers_is_the_gradient_that_jax_would_have_reduced(devices):
    grads, params = gradients(devices)
    tx = workers.unreduced(signopt.mean("d"), axis_name="d")
    found = jax.jit(lambda params: tx.update(grads(params), tx.init(params))[0])(params)
    x, t = batch()
    assert_equal(found, jax.grad(loss_fn)(jax.device_get(params), x, t))


def test_one_worker_may_be_absent(devices):
    """Each worker's gradient is its own place's: without the others its signs decide."""
    grads, params = gradients(devices)
    tx = workers.unreduced(signopt.majority_vote("d"), axis_name="d")
    update = jax.jit(lambda params, present: tx.update(grads(params), tx.init(params), present=present)[0])
    x, t = batch()
    for k in (0, 5):
        own = jax.grad(loss_fn)(jax.device_get(params), x[4 * k : 4 * k + 4], t[4 * k : 4 * k + 4])
        assert_equal(update(params, np.arange(8) == k), jax.tree.map(np.sign, own))


def test_the_tag_of_parameters_may_stay(devices):
    grads, params = gradients(devices)
    tx = workers.unreduced(optax.chain(signopt.majority_vote("d"), optax.add_decayed_weights(0.5)), axis_name="d")

    def update(params, tag):
        state = tx.init(jax.tree.map(tag, params))
        return tx.update(grads(params), state, jax.tree.map(tag, params))[0]

    found, expected = (jax.jit(functools.partial(update, tag=tag))(params) for tag in (tagged, lambda x: x))
    assert_equal(found, expected)


@pytest.mark.parametrize("kind", ("reshard", "numpy"))
def test_a_gradient_that_was_reduced_is_refused(devices, kind):
    grads, params = gradients(devices)
    tx = workers.unreduced(signopt.majority_vote("d"), axis_name="d")

    def update(params):
        found = grads(params)
        whole = NamedSharding(jax.typeof(found["v"]).sharding.mesh, P())
        found["v"] = jax.reshard(found["v"], whole) if kind == "reshard" else np.zeros(SHAPES["v"], np.float32)
        return tx.update(found, tx.init(params))[0]

    rule = (
        r"`unreduced\(...\).update\(updates=...\)` has to be given gradients that are unreduced over \{'d'\}, got "
        r"float32\[24,8\] at `updates\['v'\]`. .*reduced=\{'d'\}"
    )
    with pytest.raises(ValueError, match=rule):
        jax.jit(update)(params)


def test_it_is_about_an_axis_of_the_mesh(devices):
    grads, params = gradients(devices)
    tx = workers.unreduced(signopt.majority_vote("e"), axis_name="e")
    rule = r"`unreduced\(axis_name=...\)` has to name axes of the mesh, which has \('d',\), got \('e',\)"
    with pytest.raises(ValueError, match=rule):
        tx.init(params)
    with pytest.raises(ValueError, match=rule):
        jax.jit(lambda params: tx.update(grads(params), ())[0])(params)
    with pytest.raises(ValueError, match=r"`unreduced\(axis_name=...\)` has to name an axis of the mesh, got None"):
        workers.unreduced(signopt.majority_vote(None), axis_name=None)
