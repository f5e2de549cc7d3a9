"""Which axis carries what: votes on shards, means within and votes between."""

import re

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

REPLICAS, SHARDS = 2, 4
SPECS = {"w": P("shard"), "v": P(None, "shard"), "b": P()}
SHAPES = {"w": (8, 3), "v": (5, 16), "b": (7,)}
DTYPES = {"w": jnp.float32, "v": jnp.bfloat16, "b": jnp.float32}


def grid(devices, axis_type=AxisType.Auto):
    return jax.make_mesh((REPLICAS, SHARDS), ("replica", "shard"), axis_types=(axis_type,) * 2, devices=devices)


def placed(mesh, tree, *leading):
    put = lambda spec, x: jax.device_put(x, jax.NamedSharding(mesh, P(*leading, *spec)))
    return jax.tree.map(put, SPECS, tree)


def gradients():
    """Each replica's, with zeros, so that there are abstentions and ties."""
    rng = np.random.default_rng(0)
    draw = lambda name: jnp.asarray(rng.integers(-1, 2, (REPLICAS, *SHAPES[name])), DTYPES[name])
    return {name: draw(name) for name in SHAPES}


def zeros():
    return {name: jnp.zeros(SHAPES[name], DTYPES[name]) for name in SHAPES}


def descend(tx):
    """A step whose gradient is the replica's row of the batch."""

    def step(state, batch):
        params, opt_state = state
        updates, opt_state = tx.update(jax.tree.map(lambda x: x[0], batch), opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    return step


def trained(tx, devices, steps=3, **settings):
    mesh = grid(devices, settings.pop("axis_type", AxisType.Auto))
    run = workers.on_mesh(descend(tx), mesh, axis_name="replica", **settings)
    state = (placed(mesh, zeros()), tx.init(zeros()))
    for _ in range(steps):
        state, _ = run(state, placed(mesh, gradients(), "replica"))
    return state


def assert_equal(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("check_vma", (True, False))
def test_votes_on_shards_are_those_on_whole_leaves_bit_for_bit(check_vma, devices):
    vote = signopt.majority_vote("replica")
    on_shards = trained(workers.on_shards(vote, SPECS), devices, check_vma=check_vma)
    assert_equal(on_shards, trained(vote, devices, check_vma=check_vma))
    simulated = workers.simulate(descend(workers.on_shards(vote, SPECS)), REPLICAS, axis_name="replica")
    state = (zeros(), vote.init(zeros()))
    for _ in range(3):
        state, _ = simulated(state, gradients())
    assert_equal(on_shards, state)
    assert int(on_shards[1].count) == 3
    specs = {name: x.sharding.spec for name, x in on_shards[0].items()}
    assert specs == {"w": P("shard"), "v": P(None, "shard"), "b": P()}


def test_explicitly_sharded_parameters_keep_their_shards(devices):
    vote = signopt.majority_vote("replica")
    found = trained(workers.on_shards(vote, SPECS), devices, axis_type=AxisType.Explicit)
    assert_equal(found, trained(vote, devices))
    assert found[0]["v"].sharding.spec == P(None, "shard")


def test_on_one_bit_a_position_is_one_in_the_shard(devices):
    """Each shard is voted on as if it were a leaf of its own."""
    vote = signopt.majority_vote("replica", wire="one_bit")
    found, _ = trained(workers.on_shards(vote, SPECS), devices, steps=1)
    for name, axis in (("w", 0), ("v", 1)):
        shards = np.split(np.asarray(gradients()[name], np.float32), SHARDS, axis=1 + axis)
        update = jax.vmap(vote.update, in_axes=(0, None), out_axes=None, axis_name="replica")
        expected = [update(jnp.asarray(shard), vote.init(None))[0] for shard in shards]
        np.testing.assert_array_equal(np.asarray(found[name], np.float32), np.concatenate(expected, axis))
    assert set(np.unique(np.asarray(found["b"]))) <= {-1.0, 1.0}


def test_a_mean_on_shards_is_the_mean(devices):
    found, _ = trained(workers.on_shards(signopt.mean("replica"), SPECS), devices, steps=1)
    assert_equal(found, jax.tree.map(lambda g: g.mean(0), gradients()))


def test_momentum_left_of_a_vote_on_shards_keeps_its_shards(devices):
    tx = optax.chain(
        workers.per_worker(signopt.scale_by_signum(0.5), REPLICAS),
        workers.on_shards(signopt.majority_vote("replica"), SPECS),
        optax.scale_by_learning_rate(0.5),
    )
    plain = signopt.signum(0.5, 0.5, axis_name="replica", num_workers=REPLICAS)
    (params, opt_state), (expected, _) = trained(tx, devices), trained(plain, devices)
    assert_equal(params, expected)
    momentum = optax.tree.get(opt_state, "ema")
    assert momentum["v"].addressable_shards[0].data.shape == (1, 5, 16 // SHARDS)


def test_a_ready_optimizer_votes_on_its_shards(devices):
    plain = signopt.signum(0.5, 0.5, axis_name="replica", num_workers=REPLICAS, weight_decay=0.5)
    assert_equal(trained(workers.on_shards(plain, SPECS), devices), trained(plain, devices))


def test_one_spec_or_a_tree_that_ends_early_is_for_all_leaves_below(devices):
    tx = signopt.majority_vote("replica")
    state = lambda: {"layer": {"w": jnp.zeros((8, 2)), "v": jnp.zeros((4, 3))}, "b": jnp.zeros(5)}
    rows = jax.tree.map(lambda x: np.random.default_rng(0).integers(-1, 2, (REPLICAS, *x.shape)) * 1.0, state())
    rows = jax.tree.map(np.float32, rows)
    for specs in ({"layer": P("shard"), "b": P()}, {"layer": {"w": P("shard"), "v": P(None)}, "b": P()}):
        run = workers.on_mesh(descend(workers.on_shards(tx, specs)), grid(devices), axis_name="replica")
        (votes, _), _ = run((state(), tx.init(None)), rows)
        assert_equal(votes, jax.tree.map(lambda g: np.sign(g.sum(0)), rows))


WHOLE = {
    "a report": lambda: signopt.majority_vote("replica", report=True),
    "one vote late": lambda: signopt.majority_vote("replica", delay=1, num_workers=REPLICAS),
    "a scale for each block": lambda: signopt.majority_vote("replica", block=8),
    "scales and memory": lambda: signopt.mean("replica", uplink=signopt.codecs.scaled_sign(), num_workers=REPLICAS),
}


@pytest.mark.parametrize("case", WHOLE)
def test_a_border_with_more_than_entries_is_the_same_on_shards(case, devices):
    """A shard by itself would report on, scale by and remember its own entries, and every shard something else."""
    tx = WHOLE[case]()
    found = trained(workers.on_shards(tx, SPECS), devices)
    assert_equal(found, trained(tx, devices))
    assert workers.assert_in_sync(found)


def test_groups_of_a_partition_vote_on_their_shards(devices):
    """What a mask leaves out of a tree is not looked for in the specs."""
    vote = lambda: signopt.signsgd(0.5, axis_name="replica")
    tx = optax.partition({"one": vote(), "other": vote()}, {"w": "one", "v": "other", "b": "one"})
    assert_equal(trained(workers.on_shards(tx, SPECS), devices), trained(tx, devices))


def test_an_absent_replica_does_not_vote_on_its_shards(devices):
    tx = workers.on_shards(signopt.majority_vote("replica"), SPECS)

    def step(state, batch):
        present = lax.axis_index("replica") == 0
        updates, opt_state = tx.update(jax.tree.map(lambda x: x[0], batch), state[1], present=present)
        return (updates, opt_state), None

    mesh = grid(devices)
    run = workers.on_mesh(step, mesh, axis_name="replica")
    (votes, _), _ = run((placed(mesh, zeros()), tx.init(zeros())), placed(mesh, gradients(), "replica"))
    assert_equal(votes, jax.tree.map(lambda g: g[0], gradients()))


# ---- what travels --------------------------------------------------------------------------------------------

LINE = re.compile(r" = (\(?[a-z0-9]+\[.*?) (all-to-all|all-gather|all-reduce|reduce-scatter|collective-permute)\(.*")
ARRAY = re.compile(r"([a-z]+\d+)\[([\d,]*)\]")
# What XLA writes for the devices that talk to each other: lists, pairs, an iota, or axes of a mesh of its own.
LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{\{([\d,{}]*)\}\}")
IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}")
numbers = lambda text: tuple(int(n) for n in re.findall(r"\d+", text))


def group_of(line):
    """The devices that device 0's group in a collective consists of; of pairs, the first one."""
    if listed := LISTED.search(line):
        return numbers(listed.group(1).split("},{")[0])
    iota = lambda dims, order: np.arange(np.prod(dims)).reshape(dims).transpose(order or range(len(dims)))
    if found := IOTA.search(line):
        shape, dims, order = found.groups()
        return tuple(iota(numbers(dims), numbers(order or "")).reshape(numbers(shape))[0])
    axes, dims, order, used = MESH.search(line).groups()
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", axes)}
    shape = tuple(sizes.values())
    ids = iota(numbers(dims), numbers(order or "")).reshape(shape) if dims else iota(shape, ())
    return tuple(ids[tuple(slice(None) if f"'{name}'" in used else 0 for name in sizes)].ravel())


def axes_of(line, names):
    """Along which axes of a mesh of all devices, in order, a collective sends."""
    places = np.array([np.unravel_index(device, tuple(names.values())) for device in group_of(line)])
    return tuple(name for name, column in zip(names, places.T, strict=True) if len(set(column)) > 1)


def traffic(compiled, mesh):
    """`(operation, dtype, bytes of its result on one device, axes)` of every collective in a compiled program."""
    found = []
    for match in LINE.finditer(compiled.as_text()):
        arrays = ARRAY.findall(match.group(1))
        size = sum(max(1, int(re.sub(r"\D", "", dtype)) // 8) * int(np.prod(numbers(dims))) for dtype, dims in arrays)
        found.append((match.group(2), arrays[0][0], size, axes_of(match.group(0), dict(mesh.shape))))
    return found


def compiled_border(tx, mesh, params, specs):
    """The program of a border over "replica", given each replica's gradients in shards."""
    vote = jax.shard_map(
        lambda g: tx.update(jax.tree.map(lambda x: x[0], g), tx.init(params))[0],
        mesh=mesh, in_specs=P("replica"), out_specs=P(), axis_names={"replica"},
    )  # fmt: skip
    shaped = lambda spec, x: jax.ShapeDtypeStruct(
        (REPLICAS, *x.shape), x.dtype, sharding=jax.NamedSharding(mesh, P("replica", *spec))
    )
    out = jax.tree.map(lambda spec: jax.NamedSharding(mesh, spec), specs)
    return jax.jit(vote, out_shardings=out).lower(jax.tree.map(shaped, specs, params)).compile()


@pytest.mark.parametrize(("wire", "planes"), [("one_bit", 1), ("two_bit", 2)])
def test_a_vote_on_shards_sends_its_shard_over_the_replicas_and_nothing_else(wire, planes, devices):
    mesh = grid(devices)
    params = {"w": jnp.zeros((1024, 256)), "v": jnp.zeros((64, 2048)), "b": jnp.zeros(512)}
    vote = signopt.majority_vote("replica", wire=wire)
    found = traffic(compiled_border(workers.on_shards(vote, SPECS), mesh, params, SPECS), mesh)
    assert sorted(operation for operation, *_ in found) == ["all-gather", "all-to-all"]
    assert {axes for *_, axes in found} == {("replica",)}
    of_shard = {"w": params["w"].size // SHARDS, "v": params["v"].size // SHARDS, "b": params["b"].size}
    assert {size for _, _, size, _ in found} == {planes * sum(of_shard.values()) // 8}
    # Without it something goes over the shards too: the compiler gathers them to pack the whole leaf.
    whole = traffic(compiled_border(vote, mesh, params, SPECS), mesh)
    assert any("shard" in axes for *_, axes in whole)


def test_of_two_levels_the_inner_one_carries_floats_and_the_outer_one_bits(devices):
    mesh = jax.make_mesh((2, 4), ("host", "device"), axis_types=(AxisType.Auto,) * 2, devices=devices)
    tx = optax.chain(
        signopt.mean("device"), signopt.majority_vote("host", wire="one_bit"), optax.scale_by_learning_rate(0.5)
    )
    params = jnp.zeros(4096)
    vote = jax.shard_map(
        lambda g: tx.update(g[0], tx.init(params))[0], mesh=mesh, in_specs=P(("host", "device")), out_specs=P()
    )
    found = traffic(jax.jit(vote).lower(jnp.zeros((8, 4096))).compile(), mesh)
    assert sorted(found) == [
        ("all-gather", "u8", 512, ("host",)),
        ("all-reduce", "f32", 4 * 4096, ("device",)),
        ("all-to-all", "u8", 512, ("host",)),
    ]


def test_a_vote_over_a_tuple_of_axes_sends_bits_over_both(devices):
    mesh = jax.make_mesh((2, 4), ("host", "device"), axis_types=(AxisType.Auto,) * 2, devices=devices)
    tx = signopt.majority_vote(("host", "device"), wire="one_bit")
    vote = jax.shard_map(
        lambda g: tx.update(g[0], tx.init(None))[0], mesh=mesh, in_specs=P(("host", "device")), out_specs=P()
    )
    found = traffic(jax.jit(vote).lower(jnp.zeros((8, 4096))).compile(), mesh)
    assert {(dtype, axes) for _, dtype, _, axes in found} == {("u8", ("host", "device"))} and len(found) == 2


# ---- bad input -----------------------------------------------------------------------------------------------


def test_a_gradient_that_was_reduced_before_is_refused(devices):
    tx = workers.on_shards(signopt.majority_vote("replica"), SPECS)

    def step(state, batch):
        reduced = jax.tree.map(lambda x: lax.pmean(x[0], "replica"), batch)
        updates, opt_state = tx.update(reduced, state[1])
        return (updates, opt_state), None

    mesh = grid(devices)
    with pytest.raises(ValueError, match="`majority_vote` has to be given each worker's own gradient"):
        workers.on_mesh(step, mesh, axis_name="replica")((zeros(), tx.init(zeros())), gradients())


def test_every_leaf_has_to_have_a_spec(devices):
    tx = workers.on_shards(signopt.majority_vote("replica"), {"w": P("shard"), "b": P()})
    with pytest.raises(
        ValueError,
        match=r"`on_shards\(specs=...\)` has to hold a spec for every leaf .*, got none for `updates\['v'\]`",
    ):
        trained(tx, devices)


def test_specs_have_to_be_specs():
    with pytest.raises(TypeError, match=r"`on_shards\(specs=...\)` has to be .*PartitionSpec.*, got None"):
        workers.on_shards(signopt.majority_vote("replica"), {"w": None})


def test_specs_have_to_name_axes_of_the_mesh(devices):
    tx = workers.on_shards(signopt.majority_vote("replica"), P("shrad"))
    with pytest.raises(
        ValueError, match=r"has to name axes of the mesh, which has \('replica', 'shard'\), got 'shrad'"
    ):
        trained(tx, devices)


def test_axes_of_shards_have_to_be_left_to_the_compiler(devices):
    tx = workers.on_shards(signopt.majority_vote("replica"), P("shard"))
    run = workers.on_mesh(descend(tx), grid(devices), axis_name=("replica", "shard"))
    with pytest.raises(
        ValueError, match=r"left to the compiler, got 'shard', which a `jax.shard_map` already runs over"
    ):
        run((jnp.zeros(8), tx.init(jnp.zeros(8))), jnp.zeros((8, 8)))


# ---- optax's own promises on Explicit meshes -----------------------------------------------------------------

ROWS = {
    "majority_vote": signopt.majority_vote(None),
    "majority_vote, one_bit": signopt.majority_vote(None, wire="one_bit"),
    "mean": signopt.mean(None),
    "signsgd": signopt.signsgd(0.5),
    "signsgd, one_bit": signopt.signsgd(0.5, wire="one_bit"),
    "signum": signopt.signum(0.5),
    "lion": signopt.lion(0.5),
}


@pytest.mark.parametrize("row", ROWS)
def test_types_of_state_are_kept_on_an_explicit_mesh(row, devices):
    """After optax's `sharding_test.py`: `init` and `update`, jitted or not, agree on how all state is split."""
    tx = ROWS[row]
    mesh = jax.make_mesh((8,), ("x",), devices=devices)
    types = lambda tree: jax.tree.map(jax.typeof, tree)
    with jax.set_mesh(mesh):
        params = jnp.ones((2, 8, 4), out_sharding=jax.NamedSharding(mesh, P(None, "x")))
        state = tx.init(params)
        updates, new_state = tx.update(params, state, params)
        assert types(jax.jit(tx.init)(params)) == types(state)
        assert types(new_state) == types(state)
        assert types(jax.jit(tx.update)(params, state, params)) == types((updates, new_state))
        assert types(updates) == types(params)
    plain, _ = tx.update(jnp.ones((2, 8, 4)), tx.init(jnp.ones((2, 8, 4))), jnp.ones((2, 8, 4)))
    np.testing.assert_array_equal(updates, plain)


@pytest.mark.parametrize("row", ROWS)
def test_state_is_made_from_shapes_alone(row):
    assert ROWS[row].init(jax.ShapeDtypeStruct((2, 4, 8), jnp.float32)) is not None
