"""One step function, every way to run it: the same gradients give the same updates, bit for bit."""

import functools
import operator
import re

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

import reference
import signopt
from signopt import workers

M = 8
WIRES = ("one_bit", "two_bit", "psum")
STEPS = 4
BETA = 0.5  # A power of two and small integers: every momentum below is exact, so rounding cannot hide a difference.
RATE = 2.0**-6


def params():
    return {"w": jnp.zeros((3, 5)), "b": jnp.zeros(7, jnp.bfloat16), "s": jnp.zeros(()), "e": jnp.zeros((0,))}


def batches():
    """Integer gradients `(steps, workers * 2, *shape)`, with zeros, so that workers abstain and tie."""
    rng = np.random.default_rng(0)
    draw = lambda p: rng.integers(-2, 3, (STEPS, M * 2, *p.shape)).astype(np.float32)
    return jax.tree.map(draw, params())


def loss(params, batch):
    """Linear in the parameters: the gradient is the mean of the worker's two rows, exactly."""
    per_leaf = jax.tree.map(lambda p, g: (p.astype(jnp.float32) * g.mean(0)).sum(), params, batch)
    return sum(jax.tree.leaves(per_leaf))


@functools.cache
def optimizers(axis_name):
    """Every ready optimizer on every wire."""
    shared = {"axis_name": axis_name, "num_workers": M}
    return {
        (name, wire): make(wire=wire, **shared)
        for wire in WIRES
        for name, make in {
            "signsgd": functools.partial(signopt.signsgd, RATE),
            "signum": functools.partial(signopt.signum, RATE, BETA),
            "lion": functools.partial(signopt.lion, RATE, BETA, BETA, weight_decay=0.0),
        }.items()
    }


def init(axis_name):
    return {name: (params(), tx.init(params())) for name, tx in optimizers(axis_name).items()}


def make_step(axis_name):
    """A step for one worker that trains all optimizers side by side: one compilation for the nine."""

    def train(tx, state, batch):
        params, opt_state = state
        value_and_grad = workers.value_and_grad(loss, axis_name=axis_name)
        value, gradient = value_and_grad(params, batch)
        updates, opt_state = tx.update(gradient, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), (value, gradient)

    def step(state, batch):
        outs = {name: train(tx, state[name], batch) for name, tx in optimizers(axis_name).items()}
        value, gradient = outs["signsgd", "psum"][1]
        return {name: out[0] for name, out in outs.items()}, {"loss": value, "gradient": gradient}

    return step


def split(batch, num_workers=M):
    """`(workers * 2, ...)` as `(workers, 2, ...)`."""
    return jax.tree.map(lambda x: x.reshape(num_workers, 2, *x.shape[1:]), batch)


def axes_of(state, mapped=0):
    """`mapped` inside a PerWorkerState, None elsewhere: vmap's view of the partition specs."""
    is_border = lambda s: isinstance(s, signopt.workers.state.PerWorkerState)
    return jax.tree.map(lambda s: jax.tree.map(lambda _: mapped, s) if is_border(s) else None, state, is_leaf=is_border)


def specs_of(state, axis_name):
    return workers.partition_specs(state, axis_name)


def mesh_of(devices, shape, names, axis_type=AxisType.Auto):
    return jax.make_mesh(shape, names, axis_types=(axis_type,) * len(shape), devices=devices)


# ---- the runners: each maps (devices, state, one whole batch) -> (state, metrics stacked per worker) --------


def run_vmap(devices):
    state = init("w")
    axes = axes_of(state)
    step = jax.vmap(make_step("w"), (axes, 0), (axes, 0), axis_name="w")
    return state, jax.jit(lambda s, b: step(s, split(b)))


def run_pmap(devices):
    state = init("w")
    axes = axes_of(state)
    step = jax.pmap(make_step("w"), "w", in_axes=(axes, 0), out_axes=(axes, 0), devices=devices)
    return state, lambda s, b: step(s, split(b))


def run_shard_map(devices, *, shape=(M,), names=("w",), check_vma=True, axis_type=AxisType.Auto):
    axis_name = names[0] if len(names) == 1 else names
    mesh = mesh_of(devices, shape, names, axis_type)
    state = init(axis_name)
    specs = specs_of(state, axis_name)
    step = make_step(axis_name)

    def stacked(state, batch):
        state, metrics = step(state, batch)
        return state, jax.tree.map(lambda x: x[None], metrics)

    mapped = jax.shard_map(
        stacked, mesh=mesh, in_specs=(specs, P(axis_name)), out_specs=(specs, P(axis_name)), check_vma=check_vma
    )
    place = lambda tree, specs: jax.device_put(
        tree, jax.tree.map(lambda s: jax.NamedSharding(mesh, s), specs, is_leaf=lambda s: isinstance(s, P))
    )
    jitted = jax.jit(mapped)
    return place(state, specs), lambda s, b: jitted(s, place(b, jax.tree.map(lambda _: P(axis_name), b)))


def run_mixed(devices, *, check_vma=True):
    """Four devices with two workers each: `("device", "local")` is one axis of eight."""
    names = ("device", "local")
    mesh = mesh_of(devices[:4], (4,), ("device",))
    state = init(names)
    specs, axes = specs_of(state, "device"), axes_of(state)
    step = jax.vmap(make_step(names), (axes, 0), (axes, 0), axis_name="local")
    mapped = jax.shard_map(
        lambda s, b: step(s, split(b, 2)),
        mesh=mesh,
        in_specs=(specs, P("device")),
        out_specs=(specs, P("device")),
        check_vma=check_vma,
    )
    return state, jax.jit(mapped)


def run_simulate(devices, *, num_workers=M, axis_name="w"):
    return init(axis_name), workers.simulate(make_step(axis_name), num_workers, axis_name=axis_name)


def run_on_mesh(devices, *, shape=(M,), names=("w",), axis_type=AxisType.Auto, **kwargs):
    axis_name = names[0] if len(names) == 1 else names
    mesh = mesh_of(devices, shape, names, axis_type)
    return init(axis_name), workers.on_mesh(make_step(axis_name), mesh, axis_name=axis_name, **kwargs)


TWO = {"shape": (4, 2), "names": ("a", "b")}
RUNNERS = {
    "vmap": run_vmap,
    "pmap": run_pmap,
    "shard_map": run_shard_map,
    "shard_map, unchecked": functools.partial(run_shard_map, check_vma=False),
    "shard_map, explicit": functools.partial(run_shard_map, axis_type=AxisType.Explicit),
    "shard_map, two axes": functools.partial(run_shard_map, **TWO),
    "shard_map, two axes, unchecked": functools.partial(run_shard_map, **TWO, check_vma=False),
    "devices and vmap": run_mixed,
    "devices and vmap, unchecked": functools.partial(run_mixed, check_vma=False),
    "simulate": run_simulate,
    "simulate, two axes": functools.partial(run_simulate, num_workers=(4, 2), axis_name=("a", "b")),
    "on_mesh": run_on_mesh,
    "on_mesh, unchecked": functools.partial(run_on_mesh, check_vma=False),
    "on_mesh, explicit": functools.partial(run_on_mesh, axis_type=AxisType.Explicit),
    "on_mesh, two axes": functools.partial(run_on_mesh, **TWO),
}


@functools.cache
def expected_params():
    """NumPy's parameters after every step, `{(optimizer, wire): {leaf: (steps, *shape)}}`."""
    rows = jax.tree.map(lambda g: g.reshape(STEPS, M, 2, *g.shape[2:]).mean(2), batches())
    local = {
        "signsgd": reference.signsgd,
        "signum": lambda g: reference.signum(g, BETA)[0],
        "lion": lambda g: reference.lion(g, BETA, BETA)[0],
    }

    def train(name, wire, gradients):
        ballots = np.stack([local[name](gradients[:, m]) for m in range(M)], axis=1)
        votes = [reference.vote_on(wire, ballots[step], step) for step in range(STEPS)]
        return -RATE * np.cumsum(votes, axis=0)

    return {(name, wire): jax.tree.map(functools.partial(train, name, wire), rows) for name in local for wire in WIRES}


@functools.cache
def trained_with(name):
    """`(state, metrics)` after every step, on the host; one compilation per runner."""
    state, run = RUNNERS[name](jax.devices()[:M])
    history = []
    for step in range(STEPS):
        state, metrics = run(state, jax.tree.map(operator.itemgetter(step), batches()))
        history.append(jax.device_get((state, metrics)))
    return history


@pytest.mark.parametrize("name", RUNNERS)
def test_every_runner_gives_the_same_updates_bit_for_bit(name):
    for step, (state, _) in enumerate(trained_with(name)):
        for optimizer, expected in expected_params().items():
            got = jax.tree.map(lambda p: np.asarray(p, np.float64), state[optimizer][0])
            wanted = jax.tree.map(operator.itemgetter(step), expected)
            jax.tree.map(functools.partial(np.testing.assert_array_equal, err_msg=str(optimizer)), got, wanted)


@pytest.mark.parametrize("name", RUNNERS)
def test_every_worker_has_its_own_rows_gradient_and_momentum(name):
    """Metrics are stacked in worker order, and worker m's momentum is made of worker m's gradients."""
    gradients = jax.tree.map(lambda g: g.reshape(STEPS, M, 2, *g.shape[2:]).mean(2), batches())
    for step, (_, metrics) in enumerate(trained_with(name)):
        for leaf, expected in gradients.items():
            got = np.asarray(metrics["gradient"][leaf], np.float64).reshape(M, *expected.shape[2:])
            np.testing.assert_array_equal(got, expected[step], leaf)
    expected = np.stack([reference.signum(gradients["w"][:, m], BETA)[1][-1] for m in range(M)])
    assert len({row.tobytes() for row in expected}) == M
    for wire in WIRES:
        momentum = optax.tree.get(trained_with(name)[-1][0]["signum", wire][1], "ema")["w"]
        np.testing.assert_array_equal(momentum, expected)


# ---- composing -------------------------------------------------------------------------------------------


def small(axis_name):
    """One small optimizer: signum on a vector of five."""
    tx = signopt.signum(RATE, BETA, axis_name=axis_name, num_workers=M)

    def step(state, batch):
        step.traces += 1
        w, opt_state = state
        value, gradient = workers.value_and_grad(lambda w, b: (w * b.mean(0)).sum(), axis_name=axis_name)(w, batch)
        updates, opt_state = tx.update(gradient, opt_state, w)
        return (optax.apply_updates(w, updates), opt_state), value

    step.traces = 0
    return (jnp.zeros(5), tx.init(jnp.zeros(5))), step


def small_batches(num_steps=6):
    return np.random.default_rng(1).normal(size=(num_steps, M * 2, 5)).astype(np.float32)


def build(runner, devices, step):
    if runner == "simulate":
        return workers.simulate(step, M, axis_name="w")
    return workers.on_mesh(step, mesh_of(devices, (M,), ("w",)), axis_name="w")


@pytest.mark.parametrize("runner", ("simulate", "on_mesh"))
def test_a_step_is_traced_once(runner, devices):
    state, step = small("w")
    run = build(runner, devices, step)
    for batch in small_batches(3):
        state, _ = run(state, batch)
    assert step.traces == 1


@pytest.mark.parametrize("runner", ("simulate", "on_mesh"))
def test_a_run_nests_in_jit_and_scan(runner, devices):
    state, step = small("w")
    run = build(runner, devices, step)
    scanned, values = jax.jit(lambda state, batches: lax.scan(run, state, batches))(state, small_batches())
    assert values.shape == (6, M)
    for batch in small_batches():
        state, _ = run(state, batch)
    np.testing.assert_array_equal(scanned[0], state[0])
    assert np.abs(state[0]).max() > 0


def test_on_mesh_can_donate_its_state(devices):
    state, step = small("w")
    run = workers.on_mesh(step, mesh_of(devices, (M,), ("w",)), axis_name="w", donate=True)
    first, _ = run(state, small_batches()[0])
    second, _ = run(first, small_batches()[1])
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(second))


def test_state_on_a_mesh_lies_where_its_specs_say(devices):
    state, step = small("w")
    state, values = build("on_mesh", devices, step)(state, small_batches()[0])
    specs = workers.partition_specs(state, "w")
    same = lambda x, spec: x.sharding.is_equivalent_to(jax.NamedSharding(x.sharding.mesh, spec), x.ndim)
    assert all(jax.tree.leaves(jax.tree.map(same, state, specs)))
    assert P("w") in jax.tree.leaves(specs, is_leaf=lambda s: isinstance(s, P))
    assert values.shape == (M,)


# ---- a gradient per worker ---------------------------------------------------------------------------------

ROWS = np.arange(M * 3, dtype=np.float32).reshape(M, 3) - 11.0


def gradient_metric(grad, axis_name="w"):
    """A step that returns the gradient it sees of sum(w * row)."""

    def step(w, batch):
        value, gradient = grad(lambda w, b: (w * b[0]).sum())(w, batch)
        return w, {"value": value, "gradient": gradient}

    return step


def plain(fun):
    return jax.value_and_grad(fun)


def own(fun):
    return workers.value_and_grad(fun, axis_name="w")


def on_plain_shard_map(step, devices, check_vma=True):
    mesh = mesh_of(devices, (M,), ("w",))
    stack = lambda w, b: jax.tree.map(lambda x: x[None], step(w, b)[1])
    return jax.jit(jax.shard_map(stack, mesh=mesh, in_specs=(P(), P("w")), out_specs=P("w"), check_vma=check_vma))


def per_worker_gradients(runner, grad, devices):
    step, w = gradient_metric(grad), jnp.ones(3)
    if runner == "vmap":
        return jax.jit(jax.vmap(step, (None, 0), (None, 0), axis_name="w"))(w, ROWS[:, None])[1]
    if runner == "pmap":
        return jax.pmap(step, "w", in_axes=(None, 0), devices=devices)(w, ROWS[:, None])[1]
    if runner.startswith("shard_map"):
        return on_plain_shard_map(step, devices, check_vma=runner == "shard_map")(w, ROWS)
    return build(runner, devices, step)(w, ROWS)[1]


@pytest.mark.parametrize("runner", ("vmap", "pmap", "shard_map", "shard_map, unchecked", "simulate", "on_mesh"))
def test_value_and_grad_is_this_workers_under_every_runner(runner, devices):
    metrics = per_worker_gradients(runner, own, devices)
    np.testing.assert_array_equal(metrics["gradient"], ROWS)
    np.testing.assert_array_equal(metrics["value"], ROWS.sum(1))


def test_plain_grad_under_check_vma_is_already_summed(devices):
    metrics = per_worker_gradients("shard_map", plain, devices)
    np.testing.assert_array_equal(metrics["gradient"], np.broadcast_to(ROWS.sum(0), ROWS.shape))


def test_value_and_grad_returns_auxiliary_output(devices):
    def grad(fun):
        with_aux = workers.value_and_grad(lambda w, b: (fun(w, b), b[0]), axis_name="w", has_aux=True)

        def value_and_grad(w, b):
            (value, aux), gradient = with_aux(w, b)
            return value + 0 * aux.sum(), gradient

        return value_and_grad

    for runner in ("vmap", "on_mesh"):
        metrics = per_worker_gradients(runner, grad, devices)
        np.testing.assert_array_equal(metrics["gradient"], ROWS)


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("momentum", (False, True))
def test_a_vote_over_a_gradient_that_was_already_reduced_is_refused(wire, momentum, devices):
    make = signopt.signum if momentum else signopt.signsgd
    tx = make(RATE, axis_name="w", wire=wire, num_workers=M if momentum else None)

    def step(state, batch):
        w, opt_state = state
        gradient = jax.grad(lambda w: (w * batch[0]).sum())(w)
        updates, opt_state = tx.update(gradient, opt_state, w)
        return (w + updates, opt_state), None

    run = build("on_mesh", devices, step)
    with pytest.raises(ValueError, match=r"workers\.value_and_grad"):
        run((jnp.zeros(3), tx.init(jnp.zeros(3))), ROWS)


# ---- what travels --------------------------------------------------------------------------------------------

COLLECTIVE = re.compile(
    r"= (\(?[a-z0-9]+\[.*?) (all-to-all|all-gather|all-reduce|reduce-scatter|collective-permute|ragged-all-to-all)(?:-start)?\("
)
ARRAY = re.compile(r"([a-z]+)(\d+)\[([\d,]*)\]")


def collectives(compiled):
    """`(operation, dtype, bytes of its result on one device)` of every collective in a compiled program."""
    found = []
    for shape, operation in COLLECTIVE.findall(compiled.as_text()):
        arrays = ARRAY.findall(shape)
        size = sum(int(b) // 8 * int(np.prod([int(n) for n in dims.split(",") if n])) for _, b, dims in arrays)
        found.append((operation, arrays[0][0] + arrays[0][1], size))
    return found


def compiled_vote(wire, tree, devices):
    mesh = mesh_of(devices, (M,), ("w",))
    tx = signopt.mean("w") if wire == "mean" else signopt.majority_vote("w", wire=wire)
    state = tx.init(tree)
    vote = jax.shard_map(
        lambda g: tx.update(jax.tree.map(lambda x: x[0], g), state)[0], mesh=mesh, in_specs=P("w"), out_specs=P()
    )
    return jax.jit(vote).lower(jax.tree.map(lambda x: jnp.zeros((M, *x.shape), x.dtype), tree)).compile()


TREES = {
    "one leaf": {"w": jnp.zeros(4096)},
    "odd leaf": {"w": jnp.zeros(1001)},
    "many leaves": {f"w{n}": jnp.zeros(n) for n in range(40)} | {"m": jnp.zeros((33, 65)), "s": jnp.zeros(())},
    "a large leaf": {"w": jnp.zeros(70_001), "v": jnp.zeros(70_000, jnp.bfloat16), "b": jnp.zeros(3)},
}


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("wire", ("one_bit", "two_bit"))
def test_a_packed_vote_is_two_collectives_that_carry_what_bytes_sent_says(wire, tree, devices):
    tree = TREES[tree]
    found = collectives(compiled_vote(wire, tree, devices))
    assert sorted(operation for operation, _, _ in found) == ["all-gather", "all-to-all"]
    # Each worker keeps one of the M chunks of what it scatters, and sends its decisions to the M - 1 others.
    sent = sum(size // M * (M - 1) for _, _, size in found)
    assert signopt.wire.bytes_sent(tree, M, wire) == sent


@pytest.mark.parametrize(("wire", "bits"), [("one_bit", 2), ("two_bit", 4), ("psum", 16), ("mean", 64)])
def test_bytes_sent_are_the_bits_per_parameter_of_the_paper(wire, bits):
    size = 1 << 20
    sent = signopt.wire.bytes_sent({"w": jax.ShapeDtypeStruct((size,), jnp.float32)}, M, wire)
    assert isinstance(sent, int)
    assert sent == bits * size * (M - 1) // (8 * M)


@pytest.mark.parametrize(("wire", "planes"), [("one_bit", 1), ("two_bit", 2)])
def test_a_step_of_fifty_leaves_sends_its_bits_and_hardly_more(wire, planes, devices):
    """A whole step of Signum over about 4 million parameters: weights, and biases of odd sizes."""
    tree = {f"w{i}": jnp.zeros((400, 400 + i)) for i in range(25)} | {f"b{i}": jnp.zeros(400 + i) for i in range(25)}
    size = sum(x.size for x in jax.tree.leaves(tree))
    tx = signopt.signum(0.1, axis_name="w", num_workers=M, wire=wire)
    step = lambda state, batch: tx.update(jax.tree.map(lambda x: x[0], batch), state, tree)[::-1]
    run = workers.on_mesh(step, mesh_of(devices, (M,), ("w",)), axis_name="w")
    struct = lambda x: jax.ShapeDtypeStruct((M, *x.shape), x.dtype)
    state = jax.eval_shape(tx.init, tree)
    found = collectives(jax.jit(run).lower(state, jax.tree.map(struct, tree)).compile())
    assert sorted(operation for operation, _, _ in found) == ["all-gather", "all-to-all"]
    sent = sum(nbytes // M * (M - 1) for _, _, nbytes in found)
    assert signopt.wire.bytes_sent(tree, M, wire) == sent
    assert 1 <= 8 * sent / (planes * 2 * (M - 1) / M * size) <= 1.01


def test_a_psum_vote_travels_in_the_smallest_integers(devices):
    found = collectives(compiled_vote("psum", TREES["one leaf"], devices))
    assert {(operation, dtype) for operation, dtype, _ in found} == {("all-reduce", "s8")}


def test_one_worker_sends_nothing():
    for wire in (*WIRES, "mean"):
        assert signopt.wire.bytes_sent(TREES["one leaf"], 1, wire) == 0
