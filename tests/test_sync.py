"""Replicas that drift apart are seen, by one bit, wherever they are looked at."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import ml_dtypes
import numpy as np
import optax
import pytest

import signopt
from signopt import workers
from signopt.workers import _fingerprint
from signopt.workers import check

M = 8
DTYPES = (np.float32, np.float16, ml_dtypes.bfloat16, np.int32, np.int8, np.uint8, bool, np.complex64)


def nudged(x, mesh, device, bit=0, entry=0):
    """A replicated array whose copy on one device differs by one bit."""
    copies = []
    for i, place in enumerate(mesh.devices.flat):
        own = np.array(x)
        if i == device:
            own.reshape(-1).view(np.uint8)[entry] ^= 1 << bit
        copies.append(jax.device_put(own, place))
    return jax.make_array_from_single_device_arrays(x.shape, NamedSharding(mesh, P()), copies)


@pytest.fixture(scope="module")
def mesh(devices):
    return jax.make_mesh((M,), ("w",), axis_types=(AxisType.Auto,), devices=devices)


# ---- the fingerprint -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
def test_every_single_bit_counts(dtype):
    x = np.arange(6).reshape(2, 3).astype(dtype)
    bits = range(1) if dtype is bool else range(8)
    variants = [x]
    for byte in range(x.nbytes):
        for bit in bits:
            other = x.copy()
            other.reshape(-1).view(np.uint8)[byte] ^= 1 << bit
            variants.append(other)
    found = np.asarray(jax.jit(lambda xs: jnp.stack([_fingerprint.fingerprint(x)[0] for x in xs]))(variants))
    assert len(set(found.tolist())) == len(variants)


def test_the_fingerprint_is_the_one_in_its_docstring():
    x = np.array([1.5, -2.0, 0.0], np.float32)

    def finalizer(h):
        h = (h ^ h >> 16) * 0x85EBCA6B % 2**32
        h = (h ^ h >> 13) * 0xC2B2AE35 % 2**32
        return h ^ h >> 16

    for leaf, found in enumerate(_fingerprint.fingerprint([x, x]).tolist()):
        keys = [(i * 0x9E3779B9 + (leaf + 1) * 0x85EBCA6B) % 2**32 for i in range(3)]
        words = x.view(np.uint32).tolist()
        assert found == sum(finalizer(w ^ k) for w, k in zip(words, keys, strict=True)) % 2**32


def test_changes_that_cancel_in_a_plain_sum_of_bits_are_seen(rng):
    x = rng.normal(size=1000).astype(np.float32)
    two_signs = np.where(np.arange(1000) < 2, -x, x)
    zeros = [np.zeros(4, np.float32), np.array([0, -0.0, 0, 0], np.float32), np.array([-0.0, 0, 0, 0], np.float32)]
    for group in ([x, -x, two_signs, np.roll(x, 1), x[::-1]], zeros):
        found = [int(_fingerprint.fingerprint(v)[0]) for v in group]
        assert len(set(found)) == len(group)
    assert _fingerprint.fingerprint([]).shape == (0,)
    keys = _fingerprint.fingerprint([jax.random.key(0), jax.random.key(1), np.zeros((0, 3))])
    assert keys[0] != keys[1]


# ---- inside a step ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("check_vma", (True, False))
def test_a_step_flags_a_nudged_replica_under_shard_map(check_vma, mesh):
    def check(state):
        return workers.assert_in_sync(state, axis_name="w")

    run = jax.jit(jax.shard_map(check, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=check_vma))
    x = np.linspace(0, 1, 100, dtype=np.float32)
    assert run({"a": nudged(x, mesh, device=-1), "b": jnp.ones(3)})
    for device in (0, 5):
        assert not run({"a": nudged(x, mesh, device, bit=3, entry=17), "b": jnp.ones(3)})


def test_a_step_flags_a_nudged_replica_under_pmap_and_vmap():
    check = lambda x: workers.assert_in_sync(x, axis_name="w")
    x = np.tile(np.linspace(0, 1, 10, dtype=np.float32), (M, 1))
    other = x.copy()
    other[3].view(np.uint32)[7] ^= 1
    for run in (jax.pmap(check, axis_name="w"), jax.vmap(check, axis_name="w")):
        assert run(x).tolist() == [True] * M
        assert run(other).tolist() == [False] * M


def test_what_is_one_worker_s_own_may_differ(mesh):
    """Momenta differ from the first step on; parameters do not."""
    tx = signopt.signum(0.125, axis_name="w", num_workers=M)

    def step(state, batch):
        params, opt_state = state
        updates, opt_state = tx.update(batch[0], opt_state, params)
        state = (optax.apply_updates(params, updates), opt_state)
        return state, workers.assert_in_sync(state, axis_name="w")

    rows = np.random.default_rng(0).normal(size=(M, 5)).astype(np.float32)
    for run in (workers.simulate(step, M, axis_name="w"), workers.on_mesh(step, mesh, axis_name="w")):
        state, flags = run((jnp.zeros(5), tx.init(jnp.zeros(5))), rows)
        assert np.asarray(flags).all()
        assert workers.assert_in_sync(state) is True


@pytest.mark.parametrize("every", (1, 3))
def test_a_run_with_a_nudged_replica_is_caught_at_the_next_check(every, mesh):
    """Trained on in the open: without the check nobody would know."""
    tx = signopt.signum(2.0**-6, axis_name="w", num_workers=M)

    def step(state, batch):
        params, opt_state = state
        grads = workers.value_and_grad(lambda p: ((p - batch[0]) ** 2).sum(), axis_name="w")(params)[1]
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    run = workers.on_mesh(step, mesh, axis_name="w")
    rows = np.random.default_rng(0).normal(size=(M, 5)).astype(np.float32)
    state, caught = (jnp.ones(5), tx.init(jnp.ones(5))), None
    for k in range(1, 9):
        state, _ = run(state, rows)
        if k == 4:
            state = (nudged(np.asarray(state[0]), mesh, device=6), state[1])
        if k % every == 0:
            try:
                workers.assert_in_sync(state)
            except ValueError:
                caught = k
                break
    assert caught == {1: 4, 3: 6}[every]


# ---- outside of jit --------------------------------------------------------------------------------------------------


def test_the_error_names_the_leaf_and_the_device(mesh):
    state = {"good": jax.device_put(jnp.ones(3), NamedSharding(mesh, P())), "alone": jnp.ones(2), "host": np.ones(2)}
    assert workers.assert_in_sync(state) is True
    state["bad"] = nudged(np.ones((4, 4), np.float32), mesh, device=2)
    sentence = (
        r"^`assert_in_sync\(state\)` has to be given shared values that are the same on every worker, got others at "
        r"`state\['bad'\]` on \S*2 than on 7 of 8 devices\. Go on from a checkpoint"
    )
    with pytest.raises(ValueError, match=sentence):
        workers.assert_in_sync(state)


def test_copies_of_a_shard_are_compared_with_each_other_only(devices):
    """FSDP inside, votes between: each shard has a copy per outer worker."""
    mesh = jax.make_mesh((2, 4), ("w", "shard"), axis_types=(AxisType.Auto,) * 2, devices=devices)
    x = np.arange(8, dtype=np.float32)
    state = jax.device_put(x, NamedSharding(mesh, P("shard")))
    assert workers.assert_in_sync(state) is True
    copies = [np.array(shard.data) for shard in state.addressable_shards]
    copies[5][0] = np.nextafter(copies[5][0], np.float32(9))
    places = [shard.device for shard in state.addressable_shards]
    pieces = [jax.device_put(*pair) for pair in zip(copies, places, strict=True)]
    with pytest.raises(ValueError, match=r"than on 1 of 2 devices"):
        workers.assert_in_sync(jax.make_array_from_single_device_arrays((8,), state.sharding, pieces))


def test_a_check_compiles_once(mesh):
    check._hash_where_it_lies.cache_clear()
    state = jax.device_put([jnp.ones(3), jnp.ones(4)], NamedSharding(mesh, P()))
    for _ in range(3):
        workers.assert_in_sync(state)
    assert check._hash_where_it_lies.cache_info().misses == 1


def test_workers_send_four_bytes_each(mesh):
    check = functools.partial(workers.assert_in_sync, axis_name="w")
    run = jax.jit(jax.shard_map(check, mesh=mesh, in_specs=P(), out_specs=P()))
    text = run.lower([jnp.ones(1000), jnp.ones(77)]).compile().as_text()
    gathers = [line for line in text.splitlines() if " all-gather(" in line or " all-reduce(" in line]
    assert len(gathers) == 1
    assert "u32[8,1]" in gathers[0]


def test_traced_values_need_an_axis():
    with pytest.raises(
        ValueError, match=r"`assert_in_sync\(axis_name=...\)` has to name the workers where values are tr"
    ):
        jax.jit(workers.assert_in_sync)(jnp.ones(3))
    with pytest.raises(ValueError, match=r"`assert_in_sync` has to be called where axis 'w' is bound"):
        workers.assert_in_sync(jnp.ones(3), axis_name="w")
