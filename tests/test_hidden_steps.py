"""Two programs at once make the steps of one, on one process and on several, many times in a row."""

import functools
import json
import re
import sys
import time
import types
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import AxisType
import numpy as np
import optax
import pytest

import signopt
from signopt import local as local_steps
from signopt import workers
from signopt.workers import _hidden
from signopt.workers import _reversed
from signopt.workers import _shared
from test_processes import TESTS
from test_processes import environment
from test_processes import free_port
from test_processes import output
from test_processes import started

M = 8
PATIENCE = 300  # seconds
RATE = optax.scale_by_learning_rate(2.0**-4)


def local(outer, every=1, delay=1, **kwargs):
    return signopt.local_steps(signopt.signum(2.0**-4), outer, every=every, delay=delay, num_workers=M, **kwargs)


def in_few_bits(axis_name: Any = "w"):
    signs = signopt.codecs.scaled_sign()
    return signopt.mean(axis_name, uplink=signs, downlink=signs, num_workers=M, server=signopt.scale_by_signum(0.9))


OPTIMIZERS = {
    "one_bit": lambda: local(optax.chain(signopt.majority_vote("w", wire="one_bit"), RATE)),
    "two_bit": lambda: local(optax.chain(signopt.majority_vote("w"), RATE)),
    "psum": lambda: local(optax.chain(signopt.majority_vote("w", wire="psum"), RATE)),
    "memory on both sides": lambda: local(optax.chain(in_few_bits(), RATE)),
    "fragments": lambda: local(
        optax.chain(signopt.majority_vote("w", wire="one_bit", block=8), optax.sgd(0.5, 0.5)), every=4, fragments=4
    ),
    "rounds inside lax.cond": lambda: local(optax.chain(signopt.majority_vote("w"), RATE), every=4),
    "a late vote": lambda: optax.chain(
        workers.per_worker(signopt.scale_by_signum(0.9), M), signopt.majority_vote("w", delay=1, num_workers=M), RATE
    ),
    "a mean of gradients, late": lambda: optax.chain(signopt.mean("w", delay=1, num_workers=M), optax.adam(0.1)),
}


def params():
    return {"w": jnp.zeros((7, 5)), "b": jnp.ones(5)}


def make_step(tx, axis_name: Any = "w", own=False):
    """A step whose metrics are means over the workers, which travel while the optimizer's do; `own` ones do not."""

    def loss(params, batch):
        return jnp.mean((batch @ params["w"] + params["b"]) ** 2)

    def step(state, batch):
        params, opt_state = state
        is_local = isinstance(opt_state, local_steps.LocalStepsState)
        here = signopt.local_params(opt_state, params) if is_local else params
        value, grads = workers.value_and_grad(loss, axis_name=axis_name)(here, batch)
        metrics = value if own else lax.pmean({"loss": value, "gradient": grads}, axis_name)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), metrics

    return step


def batch(k):
    return np.random.default_rng(k).normal(size=(2 * M, 7)).astype(np.float32)


def mesh_of(devices, shape=(M,), names=("w",), axis_type=AxisType.Auto):
    return jax.make_mesh(shape, names, axis_types=(axis_type,) * len(names), devices=devices)


def assert_alike(step, state, mesh, steps=12, axis_name: Any = "w", exact=True, **kwargs):
    """One program and two find the same states and metrics, in arrays that lie alike."""
    one, two = (workers.on_mesh(step, mesh, axis_name=axis_name, hidden=h, **kwargs) for h in (False, True))
    states = state, state
    for k in range(steps):
        found, hidden = one(states[0], batch(k)), two(states[1], batch(k))
        jax.tree.map(functools.partial(assert_leaves_alike, exact), found, hidden)
        states = found[0], hidden[0]
    return states


def assert_leaves_alike(exact, a, b):
    assert b.dtype == a.dtype and b.sharding.is_equivalent_to(a.sharding, a.ndim)
    if exact:
        np.testing.assert_array_equal(a, b)
    else:  # in reverse order sums of floats round otherwise
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_two_programs_make_the_steps_of_one(devices, name):
    tx = OPTIMIZERS[name]()
    own = name != "psum" and "mean" not in name  # no float is added up across workers: exact
    assert_alike(make_step(tx, own=own), (params(), tx.init(params())), mesh_of(devices), exact=own)


@pytest.mark.parametrize("kwargs", ({"check_vma": False}, {"axis_type": AxisType.Explicit}), ids=str)
def test_unchecked_and_on_explicit_axes_too(devices, kwargs):
    tx = OPTIMIZERS["one_bit"]()
    mesh = mesh_of(devices, axis_type=kwargs.pop("axis_type", AxisType.Auto))
    assert_alike(make_step(tx, own=True), (params(), tx.init(params())), mesh, **kwargs)


def test_over_two_axes(devices):
    names = ("a", "b")
    tx = local(optax.chain(in_few_bits(names), RATE))
    mesh = mesh_of(devices, (4, 2), names)
    assert_alike(make_step(tx, names, own=True), (params(), tx.init(params())), mesh, axis_name=names)


def test_a_state_goes_on_as_one_program_and_back(devices):
    """It is the state of `on_mesh`, so checkpoints and `resize` need nothing new."""
    tx = OPTIMIZERS["memory on both sides"]()
    step, mesh = make_step(tx, own=True), mesh_of(devices)
    one, two = (workers.on_mesh(step, mesh, axis_name="w", hidden=h) for h in (False, True))
    straight = turning = (params(), tx.init(params()))
    for k in range(9):
        straight, _ = one(straight, batch(k))
        turning, _ = (two if k // 3 % 2 else one)(turning, batch(k))
    jax.tree.map(np.testing.assert_array_equal, straight, turning)
    workers.assert_in_sync(turning)


def test_what_needs_both_the_decision_and_the_batch_comes_last(devices):
    """Here the metric, and a parameter that moves by the loss."""
    tx = OPTIMIZERS["one_bit"]()
    inner = make_step(tx, own=True)

    def step(state, batch):
        new: Any
        (new, opt_state), value = inner(state, batch)
        moved = optax.tree.norm(optax.tree.sub(new, state[0]))
        together = lax.pmax(value, "w") * moved
        return (new | {"b": new["b"] + 1e-3 * together}, opt_state), {"both": value * moved, "moved": moved}

    for check_vma in (True, False):
        assert_alike(step, (params(), tx.init(params())), mesh_of(devices), exact=False, check_vma=check_vma)


def test_calls_constants_keys_and_printing_are_cut_as_well(devices, capfd):
    tx = OPTIMIZERS["one_bit"]()
    inner, scale = make_step(tx, own=True), jnp.linspace(0.5, 1.0, 7)

    @jax.jit
    def step(state, batch):
        (new, opt_state), value = inner(state["train"], batch * scale)
        jax.debug.print("loss {}", value)
        key, noise = jax.random.split(state["key"])
        return {"train": (new, opt_state), "key": key}, value + jax.random.uniform(noise)

    state = {"train": (params(), tx.init(params())), "key": jax.random.key(0)}
    mesh = mesh_of(devices)
    found = [workers.on_mesh(step, mesh, axis_name="w", hidden=h)(state, batch(0)) for h in (False, True)]
    jax.effects_barrier()
    for (one, value), (two, other) in [found]:
        jax.tree.map(np.testing.assert_array_equal, (one["train"], value), (two["train"], other))
        assert (jax.random.key_data(one["key"]) == jax.random.key_data(two["key"])).all()
    assert capfd.readouterr().out.count("loss") == 2 * M


def test_a_step_without_a_batch_of_its_own_has_nothing_to_compute(devices):
    """What a worker sends is in its state; there is nothing to report."""

    def step(state, batch):
        shared, own = state
        return (shared + lax.pmean(own.per_worker[0], "w"), own), None

    state = jnp.zeros(3), workers.PerWorkerState(jnp.arange(3.0 * M).reshape(M, 3), jnp.arange(M))
    assert_alike(step, state, mesh_of(devices), steps=2)


def test_another_batch_size_is_cut_anew(devices):
    tx = OPTIMIZERS["one_bit"]()
    run = workers.on_mesh(make_step(tx), mesh_of(devices), axis_name="w", hidden=True)
    state = (params(), tx.init(params()))
    for k in range(4):
        state, metrics = run(state, batch(k)[: M * (1 + k % 2)])
    assert np.isfinite(metrics["loss"]).all()


@pytest.mark.parametrize("tiled", (True, False))
def test_collectives_in_reverse_order_find_what_they_find_in_order(devices, tiled):
    """Every one whose order can be turned, over each of two axes and over both."""
    mesh, names = mesh_of(devices, (4, 2), ("a", "b")), ("a", "b")
    x = jax.device_put(np.arange(128, dtype=np.int32) ** 2 % 31, jax.NamedSharding(mesh, jax.P(names)))

    def body(x):
        found = []
        for axes, size in (("a", 4), ("b", 2), (names, 8)):
            blocks = x if tiled else x.reshape(size, -1)
            found += [lax.axis_index(axes), lax.psum(x, axes), lax.pmax(x, axes), lax.pmin(x, axes)]
            found += [lax.all_gather(x, axes, tiled=tiled), lax.all_to_all(blocks, axes, 0, 0, tiled=tiled)]
            found += [lax.psum_scatter(blocks, axes, tiled=tiled)]
            gathers = functools.partial(lax.all_gather, axis_name=axes)
            found += [lax.cond(x[0] >= 0, gathers, lambda x, size=size: jnp.stack([x] * size), x)]
        return [f[None] for f in found]

    def on(mesh, bind):
        def bound(x):
            closed = jax.make_jaxpr(body)(x)
            values = dict(zip(closed.jaxpr.invars, [x], strict=True))
            for eqn in closed.jaxpr.eqns:
                values |= zip(eqn.outvars, bind(eqn, [_shared.read(values, v) for v in eqn.invars]), strict=True)
            return [values[v] for v in closed.jaxpr.outvars]

        mapped = jax.shard_map(bound, mesh=mesh, in_specs=jax.P(names), out_specs=jax.P(names), check_vma=False)
        return [
            _reversed.moved(y, x.sharding.mesh, jax.P(names))
            for y in jax.jit(mapped)(_reversed.moved(x, mesh, jax.P(names)))
        ]

    there = on(_reversed.of(mesh), _reversed.bind)
    jax.tree.map(np.testing.assert_array_equal, on(mesh, _shared.bind), there)
    # Negative control: as it is, a gathered array has the other order.
    as_it_is = on(_reversed.of(mesh), _shared.bind)
    assert sum((np.asarray(a) != np.asarray(b)).any() for a, b in zip(there, as_it_is, strict=True)) > 8


# ---- several processes -----------------------------------------------------------------------------------------------


def compared(folder, count, border, steps, order="reverse"):
    """By how much two programs differ from one, on each process in each step; None if one ends with an error or never."""
    address, end = f"localhost:{free_port()}", time.monotonic() + PATIENCE
    commands = [
        [sys.executable, str(TESTS / "one_hidden.py"), json.dumps(about), str(folder), border, str(steps), order]
        for about in ({"coordinator_address": address, "num_processes": count, "process_id": i} for i in range(count))
    ]
    with started(folder, commands, [environment(1)] * count) as found:
        while None in (codes := [process.poll() for process in found]) and not any(codes) and time.monotonic() < end:
            time.sleep(0.1)
    if any(codes) or None in codes:
        return None
    return [json.loads((folder / f"{border} {i}.json").read_text()) for i in range(count)]


@pytest.mark.parametrize("border", ("one_bit", "memory", "mean"))
def test_processes_make_the_steps_of_one_program(tmp_path, border):
    """300 steps with all-reduces in flight in both programs; floats are added up in the same order by two processes."""
    found = compared(tmp_path, 2, border, 300)
    assert found, output(tmp_path, 0)
    for differences in found:
        assert len(differences) == 300 and set(differences) == {0.0}


@pytest.mark.slow
def test_three_processes_make_the_steps_of_one_program(tmp_path):
    found = compared(tmp_path, 3, "one_bit", 300)
    assert found, output(tmp_path, 0)
    for differences in found:
        assert max(differences) < 1e-5  # gloo's rings add up the metrics in another order


def test_on_one_order_of_devices_messages_get_mixed_up(tmp_path):
    """Negative control: a process finds another's size in a message, or wrong numbers."""
    found = compared(tmp_path, 2, "mean", 300, order="same")
    assert found is None or max(map(max, found)) > 1e-3


# ---- what cannot be hidden -------------------------------------------------------------------------------------------


def error(said):
    return pytest.raises(ValueError, match=re.escape(f"`on_mesh(hidden=...)` has to be False {said}"))


def test_a_step_that_waits_for_its_batch_is_refused(devices):
    tx = local(optax.chain(signopt.majority_vote("w"), RATE), delay=0)
    run = workers.on_mesh(make_step(tx), mesh_of(devices), axis_name="w", hidden=True)
    with error(
        "for a step whose exchange needs its batch, got True: nothing can travel meanwhile. Exchange one step late"
    ):
        run((params(), tx.init(params())), batch(0))


def test_a_collective_whose_order_cannot_be_turned_is_refused(devices):
    def step(state, batch):
        return lax.ppermute(state, "w", [(i, (i + 1) % M) for i in range(M)]), batch.sum()

    state = workers.PerWorkerState(jnp.ones((M, 3)), jnp.arange(M))
    run = workers.on_mesh(step, mesh_of(devices), axis_name="w", hidden=True)
    with error("for a step that exchanges by 'ppermute', got True. What can travel while a step computes: all_gather,"):
        run(state, batch(0))


def test_it_is_refused_inside_of_jit(devices):
    tx = OPTIMIZERS["one_bit"]()
    run = workers.on_mesh(make_step(tx), mesh_of(devices), axis_name="w", hidden=True)
    with error("inside of `jax.jit` or `jax.lax.scan`, got True"):
        jax.jit(run)((params(), tx.init(params())), batch(0))


def test_donated_state_is_refused(devices):
    with error("with donate=True, got True: both programs read the old state."):
        workers.on_mesh(lambda state, batch: (state, None), mesh_of(devices), axis_name="w", hidden=True, donate=True)


def test_axes_beside_those_of_the_workers_are_refused(devices):
    mesh = mesh_of(devices, (4, 2), ("w", "model"))
    with error("on a mesh with axes beside those of the workers, got True for axis_name=('w',) of ('w', 'model')."):
        workers.on_mesh(lambda state, batch: (state, None), mesh, axis_name="w", hidden=True)


def mesh_of_others(platform, processes) -> Any:
    """What `check` looks at, for machines that are not here."""
    found = [types.SimpleNamespace(platform=platform, process_index=i) for i in processes]
    return types.SimpleNamespace(axis_names=("w",), devices=np.array(found))


@pytest.mark.parametrize(
    ("platform", "processes", "said"),
    (
        ("gpu", (0, 0), "on 'gpu' devices, got True. It is for CPUs."),
        (
            "cpu",
            (0, 0, 1, 1),
            "on several devices of each of several processes, got True for 4 devices of 2 processes.",
        ),
    ),
)
def test_machines_where_nothing_would_be_hidden_are_refused(platform, processes, said):
    _hidden.check(mesh_of_others("cpu", (0, 1, 2)), ("w",), False)
    with error(said):
        _hidden.check(mesh_of_others(platform, processes), ("w",), False)
