"""The engine of borders, and the laws that every border keeps."""

import functools
import re

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

import signopt
from signopt import border
from signopt import workers

M = 8
AXIS = "w"


def params():
    return {"w": jnp.zeros((3, 5)), "b": jnp.zeros(7), "s": jnp.zeros(()), "e": jnp.zeros((0,)), "n": None}


def gradients(seed, num_workers=M, zeros=False):
    """A row for each worker; integers, so that sums are exact."""
    rng = np.random.default_rng(seed)
    values = np.array([-3, -2, -1, 0, 1, 2, 3] if zeros else [-3, -2, -1, 1, 2, 3], np.float32)
    return jax.tree.map(lambda p: jnp.asarray(rng.choice(values, (num_workers, *p.shape))), params())


BORDERS = {
    "one_bit": functools.partial(signopt.majority_vote, AXIS, wire="one_bit"),
    "two_bit": functools.partial(signopt.majority_vote, AXIS, wire="two_bit", report=True),
    "psum": functools.partial(signopt.majority_vote, AXIS, wire="psum"),
    "sized": functools.partial(signopt.majority_vote, AXIS, block=8),
    "mean": functools.partial(signopt.mean, AXIS),
    "server": functools.partial(signopt.mean, AXIS, server=signopt.scale_by_signum(0.5)),
    "median": functools.partial(signopt.robust_mean, AXIS),
    "trimmed": functools.partial(signopt.robust_mean, AXIS, method="trimmed"),
}


def axes_of(state):
    owned = lambda s: isinstance(s, workers.PerWorkerState)
    return jax.tree.map(lambda s: 0 if owned(s) else None, state, is_leaf=owned)


def simulated(tx, num_workers=M):
    """`update(updates, state, present)` of all workers at once; refuses what is not the same on all of them."""

    @jax.jit
    def update(updates, state, present=None):
        axes = axes_of(state)
        one = lambda updates, state, present: tx.update(updates, state, present=present)
        in_axes = (0, axes, None if present is None else 0)
        return jax.vmap(one, in_axes, (None, axes), axis_name=AXIS, axis_size=num_workers)(updates, state, present)

    return update


def steps(update, tx, many=4, present=None, zeros=False):
    state, found = tx.init(params()), []
    for k in range(many):
        updates, state = update(gradients(k, zeros=zeros), state, present)
        found.append(updates)
    return found, state


def equal(a, b):
    return all(np.array_equal(np.asarray(x), np.asarray(y)) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


# ---- laws ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BORDERS)
def test_late_is_what_at_once_was_one_step_before(name):
    """Law 3."""
    at_once, late = BORDERS[name](num_workers=M), BORDERS[name](num_workers=M, delay=1)
    now, _ = steps(simulated(at_once), at_once, zeros=True)
    then, state = steps(simulated(late), late, 5, zeros=True)
    assert equal(then[0], jax.tree.map(jnp.zeros_like, params()))
    for expected, found in zip(now, then[1:], strict=True):
        assert equal(found, expected)
    assert workers.PerWorkerState in {type(s) for s in jax.tree.leaves(state, is_leaf=lambda s: hasattr(s, "worker"))}


@pytest.mark.parametrize("delay", (0, 1))
@pytest.mark.parametrize("name", BORDERS)
def test_a_border_gives_the_same_bits_in_every_runner(name, delay, devices):
    """Law 5."""
    tx = BORDERS[name](num_workers=M, delay=delay)

    def step(state, updates):
        updates, state = tx.update(jax.tree.map(lambda x: x[0], updates), state)
        return state, updates

    mesh = jax.make_mesh((M,), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)
    runs = [workers.simulate(step, M, axis_name=AXIS)]
    runs += [workers.on_mesh(step, mesh, axis_name=AXIS, check_vma=check) for check in (True, False)]
    found = []
    for run in runs:
        state = tx.init(params())
        for k in range(3):
            state, updates = run(state, gradients(k, zeros=True))
        found.append((jax.tree.map(lambda x: x[0], updates), state))
    for other in found[1:]:
        assert equal(other, found[0])


@pytest.mark.parametrize("order", [("outer", "inner"), ("inner", "outer")])
@pytest.mark.parametrize("name", ["two_bit", "server", "median"])
def test_device_and_vmapped_axes_mix_in_any_order(name, order, devices):
    make = BORDERS[name].func
    kwargs = {"num_workers": M} | BORDERS[name].keywords
    tx, alone = make(order, **kwargs), make(AXIS, **kwargs)
    updates = gradients(0, zeros=True)
    expected, _ = simulated(alone)(updates, alone.init(params()))
    sizes = {"outer": 4, "inner": 2}
    shape = tuple(sizes[n] for n in order)
    stacked = jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), updates)
    if order[0] == "inner":  # the mesh is over the outer axis, which comes second
        stacked = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), stacked)
    state = jax.tree.map(lambda x: x, tx.init(params()))
    owned = axes_of(state)

    def apart(x):
        x = x.reshape(*shape, *x.shape[1:])
        return jnp.swapaxes(x, 0, 1) if order[0] == "inner" else x

    is_owned = lambda s: isinstance(s, workers.PerWorkerState)
    state = jax.tree.map(lambda s: jax.tree.map(apart, s) if is_owned(s) else s, state, is_leaf=is_owned)

    def one_device(updates, state):
        drop = lambda tree: jax.tree.map(lambda x: x[0], tree)
        state = jax.tree.map(lambda s: drop(s) if is_owned(s) else s, state, is_leaf=is_owned)
        one = lambda u, s: tx.update(u, s)[0]
        return jax.vmap(one, (0, owned), None, axis_name="inner")(drop(updates), state)

    mesh = jax.make_mesh((4,), ("outer",), axis_types=(AxisType.Auto,), devices=devices[:4])
    specs = jax.tree.map(
        lambda s: jax.tree.map(lambda _: P("outer"), s) if is_owned(s) else P(), state, is_leaf=is_owned
    )
    mapped = jax.shard_map(one_device, mesh=mesh, in_specs=(P("outer"), specs), out_specs=P(), check_vma=False)
    assert equal(jax.jit(mapped)(stacked, state), expected)


@pytest.mark.parametrize("delay", (0, 1))
@pytest.mark.parametrize("name", ["two_bit", "psum", "sized", "mean", "server", "median", "trimmed"])
def test_an_absent_worker_changes_nothing_that_it_would_have_sent(name, delay):
    """Law 6: whatever it has, the others decide; and the next step is theirs too."""
    tx = BORDERS[name](num_workers=M, delay=delay)
    update, present = simulated(tx), jnp.arange(M) != 2
    found = []
    for value in (1.0, -100.0, jnp.nan):
        state = tx.init(params())
        for k in range(3):
            own = jax.tree.map(lambda x, v=value: x.at[2].set(v), gradients(k, zeros=True))
            updates, state = update(own, state, present)
        found.append(updates)
    assert equal(found[0], found[1]) and equal(found[0], found[2])
    if not delay:  # negative control
        loud = jax.tree.map(lambda x: x.at[2].set(-100.0), gradients(2, zeros=True))
        assert not equal(*(update(loud, tx.init(params()), here)[0] for here in (present, jnp.ones(M, bool))))


@pytest.mark.parametrize("name", ["mean", "median", "trimmed"])
def test_a_mean_is_over_those_present(name):
    tx = BORDERS[name](num_workers=M)
    present = jnp.array([True, False, True, True, False, False, False, True])
    values = np.array([1.0, 100, 2, 6, 100, 100, 100, 11])
    expected = {"mean": 5.0, "median": 4.0, "trimmed": 4.0}[name]
    updates = {"x": jnp.asarray(values, jnp.float32)}
    found, _ = jax.vmap(
        lambda u, p: tx.update(u, tx.init({"x": jnp.zeros(())}), present=p), out_axes=(None, None), axis_name=AXIS
    )(updates, present)
    assert float(found["x"]) == expected


@pytest.mark.parametrize("size", (1, 7, 8, 9, 1000, 3000))
@pytest.mark.parametrize("block", (8, 256))
def test_a_sized_vote_is_its_definition(size, block, rng):
    values = rng.normal(size=(5, size)).astype(np.float32)
    tx = signopt.majority_vote(AXIS, block=block)
    found, _ = jax.vmap(tx.update, (0, None), None, axis_name=AXIS)(jnp.asarray(values), tx.init(jnp.zeros(size)))
    blocks = [abs(values[:, i : i + block]).mean(1).mean() for i in range(0, size, block)]
    expected = np.sign(np.sign(values).sum(0)) * np.repeat(blocks, block)[:size]
    np.testing.assert_allclose(np.asarray(found), expected, rtol=1e-5)


@pytest.mark.parametrize("wire", ("one_bit", "two_bit", "psum"))
def test_sizes_are_the_same_on_every_wire_and_leave_the_signs_alone(wire):
    plain, sized = signopt.majority_vote(AXIS, wire=wire), signopt.majority_vote(AXIS, wire=wire, block=8)
    votes, _ = simulated(plain)(gradients(0), plain.init(params()))
    found, _ = simulated(sized)(gradients(0), sized.init(params()))
    assert equal(jax.tree.map(jnp.sign, found), votes)


@pytest.mark.parametrize("method", ("median", "trimmed"))
def test_robust_means_are_numpys(method, rng):
    values = rng.normal(size=(9, 50)).astype(np.float32)
    values[:2] *= 1000
    tx = signopt.robust_mean(AXIS, method=method, trim=0.25)
    found, _ = jax.vmap(tx.update, (0, None), None, axis_name=AXIS)(jnp.asarray(values), tx.init(jnp.zeros(50)))
    expected = np.median(values, 0) if method == "median" else np.sort(values, 0)[2:7].mean(0)
    np.testing.assert_allclose(np.asarray(found), expected, rtol=1e-5, atol=1e-6)


def test_an_outlier_ruins_a_mean_but_no_robust_mean(rng):
    """Negative control of the test above."""
    values = rng.normal(size=(9, 50)).astype(np.float32)
    values[0] = 1e6
    for name in ("mean", "median", "trimmed"):
        tx = BORDERS[name]()
        found, _ = jax.vmap(tx.update, (0, None), None, axis_name=AXIS)(jnp.asarray(values), tx.init(jnp.zeros(50)))
        assert (np.abs(np.asarray(found)).max() > 1e4) == (name == "mean")


# ---- what is remembered --------------------------------------------------------------------------------------------


def test_a_server_keeps_its_share_of_the_state():
    tx = signopt.mean(AXIS, server=optax.trace(0.9), num_workers=M)
    state = tx.init({"w": jnp.zeros((100, 10))})
    (trace,) = (x for x in jax.tree.leaves(state) if x.ndim == 2)
    assert trace.shape == (M, 125)


def test_an_optimizer_at_the_servers_does_what_it_does_at_the_workers(rng):
    grads = jnp.asarray(rng.integers(-4, 5, (3, M, 20)).astype(np.float32))
    served, plain = signopt.mean(AXIS, server=optax.trace(0.5), num_workers=M), optax.trace(0.5)
    state, other = served.init(jnp.zeros(20)), plain.init(jnp.zeros(20))
    for g in grads:
        found, state = simulated(served)(g, state)
        expected, other = plain.update(g.mean(0), other)
        assert equal(found, expected)


def test_what_is_not_finite_reaches_no_state():
    tx = signopt.mean(AXIS, server=optax.trace(0.5), num_workers=M, delay=1)
    state = tx.init(jnp.zeros(4))
    for value in (jnp.nan, jnp.inf, 1.0):
        found, state = simulated(tx)(jnp.ones((M, 4)).at[3, 1].set(value), state)
        assert jnp.isfinite(found).all()
        assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(state))


# ---- what is seen --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wire", ("one_bit", "two_bit", "psum"))
@pytest.mark.parametrize("num_workers", (1, 2, 5, 8))
def test_a_report_counts_what_was_cast(wire, num_workers):
    """On a one-bit wire nobody abstains, so there are no zeros in these gradients."""
    tx = signopt.majority_vote(AXIS, wire=wire, report=True)
    own = gradients(3, num_workers, zeros=wire != "one_bit")
    _, state = simulated(tx, num_workers)(own, tx.init(params()))
    ballots = np.concatenate([np.sign(np.asarray(x)).reshape(num_workers, -1) for x in jax.tree.leaves(own)], 1)
    total = ballots.sum(0)
    side = ballots * np.sign(total)
    right, decided = (side > 0).sum(1), (side != 0).sum(1)
    expected = [
        num_workers,
        abs(total).sum() / ballots.size,
        right.sum() / max(1, decided.sum()),
        (right / np.maximum(1, decided)).min(),
        1 - abs(ballots).sum() / ballots.size,
    ]
    np.testing.assert_allclose(np.asarray(state.report), expected, rtol=1e-6, atol=1e-6)


def test_a_ready_optimizer_tells_its_report():
    tx = optax.chain(
        workers.per_worker(signopt.scale_by_signum(0.9), M),
        signopt.majority_vote(AXIS, report=True),
        optax.scale_by_learning_rate(0.1),
    )

    def step(state, grads):
        updates, state = tx.update(jax.tree.map(lambda x: x[0], grads), state)
        return state, updates

    state, _ = workers.simulate(step, M, axis_name=AXIS)(tx.init(params()), gradients(0))
    assert int(optax.tree.get(state, "num_workers")) == M
    assert 0 < float(optax.tree.get(state, "margin")) < 1


# ---- what travels --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["one_bit", "two_bit", "sized", "server", "median"])
def test_two_collectives_carry_what_bytes_sent_says(name, devices):
    """Law 7."""
    tx = BORDERS[name](num_workers=M)
    like = {"w": jnp.zeros((100, 70)), "b": jnp.zeros(333), "c": jnp.zeros((2**16 + 3,))}
    mesh = jax.make_mesh((M,), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)
    state = tx.init(like)
    specs = workers.partition_specs(state, AXIS)

    def update(u, s):
        return tx.update(jax.tree.map(lambda x: x[0], u), s)

    mapped = jax.jit(jax.shard_map(update, mesh=mesh, in_specs=(P(AXIS), specs), out_specs=(P(), specs)))
    text = mapped.lower(jax.tree.map(lambda x: jnp.zeros((M, *x.shape)), like), state).compile().as_text()
    found = re.findall(r"= (?:\([^)]*\)|\S+) (all-to-all|all-gather|all-reduce|collective-permute)\(", text)
    assert sorted(found) == ["all-gather", "all-to-all"]
    size = {"u8": 1, "u16": 2, "u32": 4}

    def carried(kind):
        (dtype, dims) = re.search(rf"= \(?(u8|u16|u32|f32)\[([\d,]*)\]\S* ?.*{kind}\(", text).groups()
        (line,) = (line for line in text.splitlines() if f" {kind}(" in line)
        shapes = re.findall(r"(u8|u16|u32)\[([\d,]+)\]", line.partition(f" {kind}(")[0])
        del dtype, dims
        return sum(size[dtype] * int(np.prod([int(d) for d in dims.split(",")])) for dtype, dims in shapes)

    sent = (M - 1) * carried("all-to-all") // M + (M - 1) * carried("all-gather") // M
    assert sent == signopt.wire.bytes_sent(like, M, tx, axis_name=AXIS)


@pytest.mark.parametrize("name", BORDERS)
def test_an_empty_tree_has_nothing_to_agree_on(name, devices):
    tx = BORDERS[name](num_workers=M)
    mesh = jax.make_mesh((M,), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)
    for tree in ({}, {"a": None}, {"a": jnp.zeros((M, 0))}):
        inside = lambda t: jax.tree.map(lambda x: x[0], t)

        def step(state, updates, inside=inside):
            updates, state = tx.update(inside(updates), state)
            return state, updates

        for run in (workers.simulate(step, M, axis_name=AXIS), workers.on_mesh(step, mesh, axis_name=AXIS)):
            _, updates = run(tx.init(inside(tree)), tree)
            assert jax.tree.structure(updates) == jax.tree.structure(tree)


# ---- a border of one's own -----------------------------------------------------------------------------------------


def best_of(axis_name):
    """The update of the worker with the lowest loss."""

    def encode(updates, memory, context):
        loss = jnp.broadcast_to(context.extra["value"], (context.num_workers, 1))
        return (border.rows(updates, context), loss), memory

    def decide(messages, memory, context):
        rows, losses = messages
        return rows[jnp.argmin(losses[:, 0])], memory, ()

    def decode(decisions, like, context):
        return border.tree(decisions, like)

    return border.exchange(axis_name, border.Border(encode, decide, decode), caller="best_of")


def test_a_border_of_ones_own_needs_no_axes(devices):
    tx = best_of(AXIS)
    losses = jnp.array([3.0, 2.0, 0.5, 4.0, 1.0, 2.0, 2.0, 2.0])

    def step(state, batch):
        updates, loss = jax.tree.map(lambda x: x[0], batch)
        updates, state = tx.update(updates, state, value=loss)
        return state, updates

    mesh = jax.make_mesh((M,), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)
    for run in (workers.simulate(step, M, axis_name=AXIS), workers.on_mesh(step, mesh, axis_name=AXIS)):
        _, updates = run(tx.init(params()), (gradients(0), losses))
        assert equal(jax.tree.map(lambda x: x[0], updates), jax.tree.map(lambda x: x[2], gradients(0)))


# ---- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: signopt.majority_vote(AXIS, delay=2), r"`majority_vote\(delay=\.\.\.\)` has to be 0 or 1, got 2\."),
        (
            lambda: signopt.majority_vote(AXIS, delay=1),
            r"`majority_vote\(num_workers=\.\.\.\)` has to be given where workers remember or come late, got None\.",
        ),
        (
            lambda: signopt.majority_vote(AXIS, block=100),
            r"`majority_vote\(block=\.\.\.\)` has to be a multiple of 8, got",
        ),
        (
            lambda: signopt.majority_vote(AXIS, quorum=jnp.float32(1.5)),
            r"`majority_vote\(quorum=\.\.\.\)` has to be in",
        ),
        (lambda: signopt.mean(AXIS, memory="workers"), r"`mean\(memory=\.\.\.\)` has to fit the codecs, got 'workers'"),
        (
            lambda: signopt.mean(AXIS, memory="all"),
            r"`mean\(memory=\.\.\.\)` has to be one of 'workers', 'servers', 'both'",
        ),
        (
            lambda: signopt.mean(AXIS, server=optax.add_decayed_weights(0.1), num_workers=M),
            r"`mean\(server=\.\.\.\)` has to work without parameters",
        ),
        (
            lambda: signopt.robust_mean(AXIS, method="mode"),
            r"`robust_mean\(method=\.\.\.\)` has to be one of 'median', ",
        ),
        (
            lambda: signopt.robust_mean(AXIS, trim=0.5),
            r"`robust_mean\(trim=\.\.\.\)` has to be in \[0, 0\.5\), got 0\.5",
        ),
    ],
)
def test_arguments_are_checked_at_construction(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_codec_is_asked_for_by_name():
    with pytest.raises(
        TypeError, match=r"`mean\(uplink=\.\.\.\)` has to be a codec, got 'sign'\. `signopt\.codecs` has"
    ):
        signopt.mean(AXIS, uplink="sign", num_workers=M)
