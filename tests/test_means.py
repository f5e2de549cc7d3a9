"""Compressed means: what is sent and what is remembered add up, on every codec and both sides."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
import numpy as np
import optax
import pytest

import signopt
from signopt import codecs
from signopt import workers

M = 8
AXIS = "w"
KEY = jax.random.key(7)
CODECS = {
    "sign": codecs.sign(),
    "scaled_sign": codecs.scaled_sign(block=16),
    "ternary": codecs.ternary(),
    "terngrad": codecs.terngrad(),
    "qsgd": codecs.qsgd(4),
    "top_k": codecs.top_k(0.25),
    "random_k": codecs.random_k(0.25),
    "int8": codecs.low_precision("int8"),
    "int4": codecs.low_precision("int4", stochastic=True),
    "bfloat16": codecs.low_precision("bfloat16"),
    "stochastic_sign": codecs.stochastic_sign(),
}


def params():
    return {"w": jnp.zeros((9, 7)), "b": jnp.zeros(5), "s": jnp.zeros(()), "e": jnp.zeros((0, 2))}


def gradients(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(scale * rng.normal(size=(M, *p.shape)), jnp.float32), params())


def flat(tree, axes=0):
    leaves = [np.asarray(x, np.float64) for x in jax.tree.leaves(tree)]
    return np.concatenate([x.reshape(*x.shape[:axes], -1) for x in leaves], -1)


def axes_of(state):
    owned = lambda s: isinstance(s, workers.PerWorkerState)
    return jax.tree.map(lambda s: 0 if owned(s) else None, state, is_leaf=owned)


def simulated(tx):
    @jax.jit
    def update(updates, state, present):
        axes = axes_of(state)
        one = lambda updates, state, present: tx.update(updates, state, present=present)
        return jax.vmap(one, (0, axes, 0), (None, axes), axis_name=AXIS)(updates, state, present)

    return update


def memory_of(state):
    return state.own.per_worker.memory


def server_residual(state, entries):
    """The rows of all servers, without what fills them up."""
    return np.asarray(memory_of(state).server.residual, np.float64).reshape(-1)[:entries]


@pytest.mark.parametrize("name", CODECS)
def test_what_is_sent_and_what_is_remembered_is_what_was_to_be_sent(name):
    """Law 2, over steps: the sum of all means is the sum of what came out, less what is still remembered."""
    tx = signopt.mean(AXIS, uplink=CODECS[name], downlink=CODECS[name], num_workers=M, key=KEY)
    update, state, came_out, went_in = simulated(tx), tx.init(params()), 0.0, 0.0
    for k in range(6):
        own = gradients(k)
        updates, state = update(own, state, jnp.ones(M, bool))
        came_out, went_in = came_out + flat(updates), went_in + flat(own, 1).mean(0)
    owed = flat(memory_of(state).worker, 1).mean(0) + server_residual(state, went_in.size)
    scale = np.abs(went_in).max() + np.abs(owed).max()
    np.testing.assert_allclose(came_out + owed, went_in, atol=64 * scale * np.finfo(np.float32).eps)
    assert np.abs(owed).max() > 1e-3  # negative control: it does not add up without the memory


def test_conservation_is_exact_where_the_arithmetic_is():
    """Powers of two on top_k: what is sent is a number itself, so residuals are exact to the bit."""
    tx = signopt.mean(AXIS, uplink=codecs.top_k(0.25), num_workers=M)
    update, state = simulated(tx), tx.init(params())
    total = 0.0
    for k in range(5):
        own = jax.tree.map(lambda x: jnp.sign(x) * 2.0 ** jnp.round(x), gradients(k))
        before = flat(memory_of(state).worker, 1) + flat(own, 1)
        updates, state = update(own, state, jnp.ones(M, bool))
        total = flat(updates)
        sent = before - flat(memory_of(state).worker, 1)
        assert np.array_equal(sent.mean(0), total)


@pytest.mark.parametrize("memory", (None, "workers", "servers", "both"))
def test_memory_stands_where_it_is_asked_for(memory):
    codec = codecs.scaled_sign()
    tx = signopt.mean(AXIS, uplink=codec, downlink=codec, memory=memory, num_workers=M)
    state = tx.init(params())
    leaves = jax.tree.leaves(state.own)
    at_workers = {None: 0, "workers": 4, "servers": 0, "both": 4}[memory]
    at_servers = {None: 0, "workers": 0, "servers": 2, "both": 2}[memory]
    assert len(leaves) == (0 if memory is None else at_workers + at_servers + 1)
    jax.vmap(lambda u: tx.update(u, tx.init(params())) if memory is None else u, axis_name=AXIS)(gradients(0))


def test_the_vote_is_a_mean_of_signs():
    """Law 1, on ballots without zeros and ties."""
    sign = codecs.sign()
    mean = signopt.mean(AXIS, uplink=sign, server=signopt.scale_by_sign(), downlink=sign, memory=None, num_workers=7)
    vote = signopt.majority_vote(AXIS, wire="one_bit")
    own = jax.tree.map(lambda x: x[:7], gradients(0))
    found, _ = simulated(mean)(own, mean.init(params()), jnp.ones(7, bool))
    expected, _ = jax.vmap(vote.update, (0, None), None, axis_name=AXIS)(own, vote.init(params()))
    assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True))


@pytest.mark.parametrize(
    "name", ["scaled_sign", *(pytest.param(name, marks=pytest.mark.slow) for name in ("top_k", "qsgd", "int4"))]
)
def test_a_compressed_mean_gives_the_same_bits_in_every_runner(name, devices):
    """Law 5, memory included."""
    tx = signopt.mean(AXIS, uplink=CODECS[name], downlink=CODECS[name], num_workers=M, key=KEY)

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
            state, updates = run(state, gradients(k))
        found.append(jax.tree.leaves((updates, state)))
    for other in found[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("value", (jnp.nan, jnp.inf, -jnp.inf))
def test_one_bad_worker_costs_one_message(value):
    tx = signopt.mean(AXIS, uplink=codecs.scaled_sign(), downlink=codecs.scaled_sign(), num_workers=M)
    update, state = simulated(tx), tx.init(params())
    for k in range(3):
        own = jax.tree.map(lambda x: x.at[3].set(value), gradients(k))
        updates, state = update(own, state, jnp.ones(M, bool))
        assert all(jnp.isfinite(x).all() for x in jax.tree.leaves((updates, state)))
    assert all(jnp.abs(x[3]).max(initial=0) == 0 for x in jax.tree.leaves(memory_of(state).worker))


def test_an_absent_workers_residual_waits_with_its_mass():
    tx = signopt.mean(AXIS, uplink=codecs.scaled_sign(), num_workers=M)
    update = simulated(tx)
    _, state = update(gradients(0), tx.init(params()), jnp.ones(M, bool))
    before = jax.tree.map(lambda x: x[2], memory_of(state).worker)
    found = []
    for value in (1.0, jnp.nan):
        own = jax.tree.map(lambda x, v=value: x.at[2].set(v), gradients(1))
        updates, after = update(own, state, jnp.arange(M) != 2)
        found.append(flat(updates))
        waiting = jax.tree.map(lambda x: x[2], memory_of(after).worker)
        assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (before, waiting)), strict=True))
    assert np.array_equal(*found)


def test_a_report_has_the_norms():
    tx = signopt.mean(AXIS, uplink=codecs.top_k(0.25), downlink=codecs.top_k(0.25), report=True, num_workers=M)
    updates, state = simulated(tx)(gradients(0), tx.init(params()), jnp.ones(M, bool))
    del updates
    residuals = flat(memory_of(state).worker, 1)
    expected = [np.sqrt((residuals**2).sum(1).mean()), np.linalg.norm(server_residual(state, residuals.shape[1]))]
    np.testing.assert_allclose(np.asarray(state.report[1:]), expected, rtol=1e-5)
    assert float(state.report.norm) > 0


@pytest.mark.parametrize("new", (1, 3, 6, 11))
def test_resize_keeps_the_mean_residual_and_every_servers_value(new):
    codec = codecs.top_k(0.25)
    make = lambda m: signopt.mean(AXIS, uplink=codec, server=optax.trace(0.5), downlink=codec, num_workers=m)
    _, state = simulated(make(M))(gradients(0), make(M).init(params()), jnp.ones(M, bool))
    other = workers.resize(state, new)
    assert jax.tree.map(jnp.shape, other) == jax.tree.map(jnp.shape, make(new).init(params()))
    old, found = memory_of(state), memory_of(other)
    np.testing.assert_allclose(flat(found.worker, 1).mean(0), flat(old.worker, 1).mean(0), atol=1e-6)
    entries = flat(params()).size
    assert np.array_equal(server_residual(other, entries), server_residual(state, entries))
    trace = lambda memory: np.asarray(memory.server.state.trace).reshape(-1)[:entries]
    assert np.array_equal(trace(found), trace(old)) and np.abs(trace(old)).max() > 0
    own = jax.tree.map(lambda x: x[:new] if new <= M else jnp.resize(x, (new, *x.shape[1:])), gradients(1))
    updates, _ = simulated(make(new))(own, other, jnp.ones(new, bool))  # and it goes on
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(updates))


@pytest.mark.parametrize("block", (None, 8))
def test_ballots_that_wait_survive_another_number_of_workers(block):
    make = lambda m: signopt.majority_vote(AXIS, delay=1, block=block, num_workers=m)
    own = jax.tree.map(jnp.abs, gradients(0))
    _, state = simulated(make(M))(own, make(M).init(params()), jnp.ones(M, bool))
    other = workers.resize(state, 3)
    few = jax.tree.map(lambda x: -x[:3], own)
    updates, _ = simulated(make(3))(few, other, jnp.ones(3, bool))
    assert all((x > 0).all() for x in jax.tree.leaves(updates))


# ---- where signs fail and feedback works ---------------------------------------------------------------------------


def descend(tx, gradient, start, steps, rate):
    """The averages over the last half of the iterates."""

    @jax.jit
    def run(x, state):
        def step(carry, k):
            x, state = carry
            updates, state = tx.update(gradient(x, k), state)
            x = jnp.clip(x - rate * updates, -1.0, 1.0) if x.ndim == 0 else x - rate * updates
            return (x, state), x

        return jax.lax.scan(step, (x, state), jnp.arange(steps))[1]

    return np.asarray(run(start, tx.init(start)))


def both(**kwargs):
    return signopt.mean(None, uplink=codecs.scaled_sign(), **kwargs), signopt.mean(
        None, uplink=codecs.sign(), memory=None
    )


def test_a_sparse_large_gradient_outvotes_many_small_ones_only_with_memory():
    """min x/4 on [-1, 1]: the gradient is 4 with probability 1/4, else -1 (Karimireddy et al., counterexample 1)."""

    def gradient(x, k):
        return jnp.where(jax.random.bernoulli(jax.random.fold_in(KEY, k), 0.25), 4.0, -1.0) + 0 * x

    with_memory, signs = both()
    # One number is sent as it is by a scaled sign, so the memory stands behind a sign of fixed size.
    del with_memory
    found = descend(signs, gradient, jnp.zeros(()), 2000, 0.01)
    assert found[-500:].mean() > 0.5
    plain = descend(signopt.mean(None), gradient, jnp.zeros(()), 2000, 0.01)
    assert plain[-500:].mean() < -0.5
    fed_back = descend(signopt.mean(None, uplink=codecs.sign()), gradient, jnp.zeros(()), 2000, 0.01)
    assert fed_back[-500:].mean() < -0.5


def test_a_kink_across_the_axes_is_left_only_with_memory():
    """min eps |x1 + x2| + |x1 - x2| from (1, 1) (counterexample 2)."""
    eps = 0.5

    def gradient(x, k):
        del k
        sign = lambda v: jnp.where(v >= 0, 1.0, -1.0)
        return eps * sign(x[0] + x[1]) * jnp.ones(2) + sign(x[0] - x[1]) * jnp.array([1.0, -1.0])

    value = lambda x: eps * abs(x[..., 0] + x[..., 1]) + abs(x[..., 0] - x[..., 1])
    with_memory, signs = both()
    assert value(descend(with_memory, gradient, jnp.ones(2), 4000, 1e-3)[-100:]).mean() < 0.1
    assert value(descend(signs, gradient, jnp.ones(2), 4000, 1e-3)[-100:]).mean() > 0.9


def test_a_narrow_valley_is_walked_only_with_memory():
    """<a1, x>^2 + <a2, x>^2, a = ±(1, -1) + eps (1, 1), batches of one (counterexample 3)."""
    eps = 0.5
    a = jnp.array([[1 + eps, -1 + eps], [-1 + eps, 1 + eps]])

    def gradient(x, k):
        chosen = a[jax.random.randint(jax.random.fold_in(KEY, k), (), 0, 2)]
        return 2 * jnp.dot(chosen, x) * chosen

    value = lambda x: ((x @ np.asarray(a).T) ** 2).sum(-1)
    with_memory, signs = both()
    start = jnp.array([1.0, 1.0])
    assert value(descend(with_memory, gradient, start, 6000, 5e-3)[-100:]).mean() < 0.01
    assert value(descend(signs, gradient, start, 6000, 5e-3)[-100:]).mean() > 0.4


# ---- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            functools.partial(signopt.mean, AXIS, uplink=codecs.qsgd(4), num_workers=M),
            r"`mean\(key=\.\.\.\)` has to be",
        ),
        (functools.partial(signopt.mean, AXIS, uplink=codecs.sign()), r"`mean\(num_workers=\.\.\.\)` has to be given"),
        (
            functools.partial(signopt.mean, AXIS, uplink=codecs.identity(), memory="workers", num_workers=M),
            r"`mean\(memory=\.\.\.\)` has to fit the codecs, got 'workers' where `uplink` loses nothing that",
        ),
        (
            functools.partial(signopt.mean, AXIS, uplink=codecs.qsgd(4), key=0, num_workers=M),
            r"`mean\(key=\.\.\.\)` has to be a random key with this uplink, which throws coins, got 0\.",
        ),
    ],
)
def test_arguments_are_checked_at_construction(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_server_has_to_be_a_transformation():
    with pytest.raises(
        TypeError, match=r"`mean\(server=\.\.\.\)` has to be an optax transformation, got <function sgd"
    ):
        signopt.mean(AXIS, server=optax.sgd, num_workers=M)  # type: ignore[arg-type]


def test_a_server_without_parameters_is_told_from_one_with():
    signopt.mean(AXIS, server=optax.scale_by_adam(), num_workers=M)
    with pytest.raises(ValueError, match="has to work without parameters"):
        signopt.mean(AXIS, server=optax.adamw(0.1, weight_decay=0.1), num_workers=M)
