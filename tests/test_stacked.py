"""A vote in plain jit: the numbers of every other runner, and what the compiler makes travel."""

import math
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

M = 4


def optimizer(wire="psum", **kwargs):
    return signopt.signum(2.0**-6, 0.5, axis_name="w", num_workers=M, wire=wire, **kwargs)


@pytest.mark.parametrize("wire", ("one_bit", "two_bit", "psum"))
def test_stacked_gradients_give_the_updates_of_simulated_workers(wire, rng):
    tx = optimizer(wire)
    stacked = workers.stacked(tx, axis_name="w")
    params = {"a": jnp.zeros((3, 5)), "b": jnp.zeros(7)}
    rows = jax.tree.map(lambda p: rng.integers(-2, 3, (5, M, *p.shape)).astype(np.float32), params)

    def step(state, batch):
        updates, opt_state = tx.update(jax.tree.map(lambda x: x[0], batch), state[1], state[0])
        return (optax.apply_updates(state[0], updates), opt_state), None

    run = workers.simulate(step, M, axis_name="w")
    state = (params, tx.init(params))
    update, opt_state = jax.jit(stacked.update), stacked.init(params)
    for k in range(5):
        gradients = jax.tree.map(lambda x, k=k: x[k], rows)
        state, _ = run(state, gradients)
        updates, opt_state = update(gradients, opt_state, params)
        params = optax.apply_updates(params, updates)
    for a, b in zip(jax.tree.leaves((params, opt_state)), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(a, b)


def groups(line):
    """Which devices exchange data in an instruction of a compiled program."""
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}?, ", line):
        return [list(map(int, pair.split(","))) for pair in re.findall(r"\{?(\d+,\d+)\}?", pairs[1])]
    if mesh := re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\S+)? \{(.*?)\}", line):
        sizes = [int(size) for size in re.findall(r"=(\d+)", mesh[1])]
        names = re.findall(r"'(\w+)'=", mesh[1])
        assert "device_ids" not in mesh[0]
        chosen = [names.index(name) for name in re.findall(r"'(\w+)'", mesh[2])]
        ids = np.moveaxis(np.arange(math.prod(sizes)).reshape(sizes), chosen, range(-len(chosen), 0))
        return ids.reshape(-1, math.prod(sizes[i] for i in chosen)).tolist()
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        sizes = list(map(int, iota[3].split(",")))
        order = list(map(int, iota[4].split(","))) if iota[4] else range(len(sizes))
        ids = np.arange(math.prod(sizes)).reshape(sizes).transpose(order)
        return ids.reshape(int(iota[1]), int(iota[2])).tolist()
    listed = re.search(r"replica_groups=\{\{(.*?)\}\}", line)
    assert listed, line
    return [list(map(int, group.split(","))) for group in listed[1].split("},{")]


def collectives(text):
    """What each collective of a compiled program moves: dtype, entries, and the groups it moves it in."""
    kinds = r"all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    for line in text.splitlines():
        if found := re.search(rf"= (.*?) (?:{kinds})(?:-start)?\(", line):
            for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", found[1]):
                yield dtype, math.prod(map(int, filter(None, shape.split(",")))), groups(line)


def compiled(step, *args):
    return list(collectives(jax.jit(step).lower(*args).compile().as_text()))


def setting(devices, wire="psum"):
    """Two dense layers, sharded over two devices inside each of four workers."""
    mesh = jax.make_mesh((M, 2), ("data", "shard"), axis_types=(AxisType.Auto,) * 2, devices=devices)
    put = lambda tree, specs: jax.device_put(tree, jax.tree.map(lambda s: NamedSharding(mesh, s), specs))
    tx = workers.stacked(optimizer(wire), axis_name="w")
    params = put({"a": jnp.ones((64, 32)), "b": jnp.ones((32, 16))}, {"a": P(None, "shard"), "b": P("shard")})
    start = tx.init(params)
    opt_state = put(start, workers.partition_specs(start, "data"))
    batch = put(np.ones((64, 64), np.float32), P("data"))
    loss = lambda params, batch: jnp.mean((jnp.tanh(batch @ params["a"]) @ params["b"]) ** 2)

    def voted(params, opt_state, batch):
        losses, grads = jax.vmap(jax.value_and_grad(loss), (None, 0))(params, workers.split_batch(batch, M))
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, losses

    def averaged(params, opt_state, batch):
        value, grads = jax.value_and_grad(loss)(params, batch)
        return optax.apply_updates(params, grads), opt_state, value

    return voted, averaged, (params, opt_state, batch)


def between_workers(found):
    """The widest dtype, in bytes, of arrays that cross from one worker's pair of devices to another's, and their size."""
    width = {"s8": 1, "u8": 1, "pred": 1, "f32": 4, "s32": 4, "u32": 4}
    crossing = [(width[d], n) for d, n, group in found if any(len({i // 2 for i in ids}) > 1 for ids in group)]
    return max((w for w, n in crossing if n > M), default=0), sum(n for _, n in crossing)


def test_nothing_wider_than_a_byte_travels_between_workers(devices):
    voted, averaged, args = setting(devices)
    width, size = between_workers(compiled(voted, *args))
    assert width == 1
    assert size >= (64 * 32 + 32 * 16) // 2  # each device votes on its shard
    assert between_workers(compiled(averaged, *args))[0] == 4  # the control: a mean of floats is seen


def test_parameters_and_momenta_keep_their_shards(devices):
    voted, _, (params, opt_state, batch) = setting(devices)
    new, new_state, _ = jax.jit(voted)(params, opt_state, batch)
    assert new["a"].sharding.spec == P(None, "shard")
    assert new["b"].sharding.spec[0] == "shard"
    momentum = optax.tree.get(new_state, "ema")["a"]
    assert momentum.shape == (M, 64, 32)
    assert momentum.sharding.spec[0] == "data"
    assert momentum.addressable_shards[0].data.size == 64 * 32 // 2
    np.testing.assert_array_equal(np.asarray(new["b"]), np.full((32, 16), 1 - 2.0**-6, np.float32))


def test_what_is_not_voted_on_is_refused():
    plain = workers.stacked(optax.sgd(0.1), axis_name="w")
    with pytest.raises(
        ValueError, match=r"`stacked\(tx\)` has to be given a chain that votes or averages over axis_name='w'"
    ):
        plain.update(jnp.eye(2), plain.init(jnp.zeros(2)), jnp.zeros(2))
    unmarked = workers.stacked(signopt.signum(0.1, axis_name="w"), axis_name="w")
    with pytest.raises(ValueError, match=r"Make it with `num_workers=...`"):
        unmarked.update(jnp.eye(2), unmarked.init(jnp.zeros(2)), jnp.zeros(2))
    with pytest.raises(ValueError, match=r"`stacked\(axis_name=...\)` has to be one name, got \('a', 'b'\)"):
        workers.stacked(optax.sgd(0.1), axis_name=("a", "b"))
