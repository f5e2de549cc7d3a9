"""What one of several processes does in tests/test_processes.py, which starts it with `START`."""

import functools
import itertools
import json
import time

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax

import signopt
from signopt import workers
from signopt.workers import check as processes
import test_runners

# JAX joins the other processes before anything of it is used, and `test_runners` makes arrays when it is imported.
START = """
import json, pathlib, sys
import jax
about, job, folder, *rest = sys.argv[1:]
jax.distributed.initialize(**json.loads(about))
import one_process
getattr(one_process, job)(pathlib.Path(folder), *rest)
"""
M = test_runners.M
WIRES = test_runners.WIRES


def batches():
    """Gradients that round, a third of them zero: adding them up in another order would be seen."""
    rng = np.random.default_rng(0)
    draw = lambda g: (rng.normal(size=g.shape) * (rng.random(g.shape) < 0.7)).astype(np.float32)
    return jax.tree.map(draw, test_runners.batches())


def optimizer(wire, axis_name):
    return signopt.signum(0.1, 0.9, axis_name=axis_name, num_workers=M, wire=wire, weight_decay=0.01)


def init(axis_name):
    params = test_runners.params()
    return {wire: (params, optimizer(wire, axis_name).init(params)) for wire in WIRES}


def make_step(axis_name):
    """A step for one worker, which trains over each wire."""

    def step(state, batch):
        new_state = {}
        for wire, (params, opt_state) in state.items():
            tx = optimizer(wire, axis_name)
            value, gradient = workers.value_and_grad(test_runners.loss, axis_name=axis_name)(params, batch)
            updates, opt_state = tx.update(gradient, opt_state, params)
            new_state[wire] = (optax.apply_updates(params, updates), opt_state)
        return new_state, value

    return step


def on_mesh(shape=(M,), names=("w",), axis_type=AxisType.Auto, **kwargs):
    axis_name = names[0] if len(names) == 1 else names
    mesh = test_runners.mesh_of(jax.devices()[:M], shape, names, axis_type)
    return init(axis_name), workers.on_mesh(make_step(axis_name), mesh, axis_name=axis_name, **kwargs)


def pmap():
    """`jax.pmap` takes and returns what belongs to this process's own devices: a copy of all that is shared for each."""
    state, here = init("w"), jax.local_device_count()
    axes = test_runners.axes_of(state)
    copies = lambda axis, x: own_share(x) if axis == 0 else jnp.stack([x] * here)
    state = jax.tree.map(copies, axes, state, is_leaf=lambda x: x is None)
    step = jax.pmap(make_step("w"), "w")
    return state, lambda state, batch: step(state, jax.tree.map(own_share, test_runners.split(batch)))


RUNNERS = {
    "on_mesh": on_mesh,
    "on_mesh, unchecked": functools.partial(on_mesh, check_vma=False),
    "on_mesh, explicit": functools.partial(on_mesh, axis_type=AxisType.Explicit),
    "on_mesh, two axes": functools.partial(on_mesh, (4, 2), ("a", "b")),
    "pmap": pmap,
}


def own_share(x):
    """What this process's devices hold of an array with a leading axis of workers."""
    each = len(x) // jax.process_count()
    return x[jax.process_index() * each :][:each]


def on_host(tree):
    """All of every array, on every process."""
    return jax.tree.map(lambda x: np.asarray(multihost_utils.process_allgather(x, tiled=True)), tree)


def train(state, run, shift=0):
    """The last state; with a shift every worker has its neighbour's batches."""
    for step in range(test_runners.STEPS):
        state, _ = run(state, jax.tree.map(lambda x, i=step: np.roll(x[i], shift, axis=0), batches()))
    return state


def runners(folder, *names):
    """Train with each runner that is named, and save the leaves of its last state."""
    for name in names:
        state = train(*RUNNERS[name]())
        if name == "pmap":  # what is shared has a copy for each device, the rest lies with its process
            whole = lambda axis, x: on_host(x) if axis == 0 else np.asarray(x[-1])
            state = jax.tree.map(whole, test_runners.axes_of(state), state, is_leaf=lambda x: x is None)
        else:
            state = on_host(state)
        np.savez(folder / f"{name} {jax.process_index()}.npz", *as_bytes(state))


def large(devices):
    """The decisions of two large votes over each packed wire."""
    mesh = test_runners.mesh_of(devices, (len(devices),), ("w",))
    votes = {wire: signopt.majority_vote("w", wire=wire) for wire in ("one_bit", "two_bit")}
    like = jnp.zeros(2**19 * len(devices) + 5)

    def step(state, seed):
        gradient = jax.random.normal(jax.random.key(seed[0]), like.shape)
        gradient = jnp.where(abs(gradient) > 0.3, gradient, 0)
        updated = {wire: votes[wire].update(gradient, old) for wire, (_, old) in state.items()}
        return {wire: (decided.astype(jnp.int8), new) for wire, (decided, new) in updated.items()}, None

    run = workers.on_mesh(step, mesh, axis_name="w")
    state = {wire: (like.astype(jnp.int8), tx.init(None)) for wire, tx in votes.items()}
    for i in range(2):
        state, _ = run(state, len(devices) * i + np.arange(len(devices)))
    return as_bytes(on_host(state))


def large_votes(folder):
    np.savez(folder / f"large {jax.process_index()}.npz", *large(jax.devices()))


def as_bytes(tree):
    return [np.asarray(x).reshape(-1).view(np.uint8) for x in jax.tree.leaves(tree)]


# ---- what differs between processes ----------------------------------------------------------------------------------


def voted(params=None, batch=None, learning_rate=0.125, wire="two_bit", steps=1):
    """Some steps of a small vote on all devices, and the mesh."""
    mesh = test_runners.mesh_of(jax.devices(), (M,), ("w",))
    tx = signopt.signum(learning_rate, axis_name="w", num_workers=M, wire=wire)

    def step(state, batch):
        params, opt_state = state
        updates, opt_state = tx.update(jax.tree.map(lambda x: x * batch["x"].sum(), params), opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), batch["label"]

    run = workers.on_mesh(step, mesh, axis_name="w")
    params = {"w": np.ones(3, np.float32)} if params is None else params
    state = (params, tx.init(jax.tree.map(jnp.asarray, params)))
    batch = {"x": np.ones((M, 2), np.float32), "label": np.arange(M)} if batch is None else batch
    for _ in range(steps):
        state, labels = run(state, batch)
    assert on_host(labels).tolist() == [[i] for i in range(M)]
    return state


def differences(folder):
    """What each process says to what another one was given; None where it trained."""
    me = jax.process_index()
    other = me == jax.process_count() - 1
    pick = lambda usual, odd: odd if other else usual
    ones = np.ones(3, np.float32)
    mesh = test_runners.mesh_of(jax.devices(), (M,), ("w",))

    def another_version():
        version, optax.__version__ = optax.__version__, pick(optax.__version__, "0.0.1")
        try:
            voted()
        finally:
            optax.__version__ = version

    def not_compared():
        """Negative control: what would happen."""
        compare, processes.compare = processes.compare, lambda *args: None
        try:
            state = voted(learning_rate=pick(0.125, 0.25))
        finally:
            processes.compare = compare
        workers.assert_in_sync(state)

    def replicas(odd):
        copies = [jax.device_put(ones + (odd and i == 1), device) for i, device in enumerate(jax.local_devices())]
        return {"w": jax.make_array_from_single_device_arrays((3,), NamedSharding(mesh, P()), copies)}

    def own_mesh():
        """Only one process looks at its own devices: nobody else may have to come."""
        if other:
            own = test_runners.mesh_of(jax.local_devices(), (jax.local_device_count(),), ("w",))
            assert workers.assert_in_sync(jax.device_put(ones, NamedSharding(own, P()))) is True

    def local_batches():
        """A process that has only its own rows gives them as a part of the whole."""
        rows = NamedSharding(mesh, P("w"))
        whole = {"x": np.arange(2 * M, dtype=np.float32).reshape(M, 2) - 7, "label": np.arange(M, dtype=np.int32)}
        parts = jax.tree.map(lambda x: jax.make_array_from_process_local_data(rows, own_share(x)), whole)
        for a, b in zip(as_bytes(on_host(voted(batch=parts))), as_bytes(on_host(voted(batch=whole))), strict=True):
            np.testing.assert_array_equal(a, b)

    cases = {
        "nothing": voted,
        "three steps": lambda: voted(steps=3),
        "a dtype": lambda: voted({"w": ones.astype(pick(np.float32, jnp.bfloat16))}),
        "a shape": lambda: voted({"w": np.ones(pick(3, 4), np.float32)}),
        "a leaf": lambda: voted(pick({"w": ones}, {"w": ones, "b": ones})),
        "values": lambda: voted({"w": ones + other}),
        "weakly typed values": lambda: voted({"w": jnp.full(3, 1.0 + other)}),
        "the batch": lambda: voted(
            batch={"x": np.ones((M * (1 + other), 2), np.float32), "label": np.arange(M * (1 + other))}
        ),
        "a version": another_version,
        "the learning rate": lambda: voted(learning_rate=pick(0.125, 0.25)),
        "the wire": lambda: voted(wire=pick("one_bit", "two_bit")),
        "not compared": not_compared,
        "trees alike": lambda: workers.assert_alike(state={"w": ones}),
        "trees": lambda: workers.assert_alike(mesh, state={"w": np.ones(pick(3, 4))}),
        "replicas alike": lambda: workers.assert_in_sync(replicas(False)),
        "replicas": lambda: workers.assert_in_sync(replicas(other)),
        "placed replicas alike": lambda: voted(replicas(False)),
        "placed replicas": lambda: voted(replicas(other)),
        "own mesh": own_mesh,
        "local batches": local_batches,
        "still alive": voted,
    }
    said = {}
    for name, case in cases.items():
        try:
            case()
            said[name] = None
        except ValueError as error:
            said[name] = str(error)
    (folder / f"said {me}.json").write_text(json.dumps(said))


def everything(folder, *names):
    runners(folder, *names)
    differences(folder)


# ---- a process that dies ---------------------------------------------------------------------------------------------


def train_for_ever(folder):
    state, run = on_mesh_small()
    for step in itertools.count():
        state = run(state, np.ones((jax.device_count(), 3), np.float32))[0]
        jax.block_until_ready(state)
        if step == 3:
            (folder / f"trains {jax.process_index()}").touch()
        time.sleep(0.01)


def on_mesh_small():
    tx = signopt.signsgd(0.1, axis_name="w")
    mesh = test_runners.mesh_of(jax.devices(), (jax.device_count(),), ("w",))
    step = lambda w, batch: (w + tx.update(batch[0], tx.init(w), w)[0], None)
    return jnp.zeros(3), workers.on_mesh(step, mesh, axis_name="w")
