"""sign_muon: a vote of orthogonalized momenta, against NumPy's, and equal however workers are run."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers
import pytest

import reference
import signopt
from signopt import matrices
from signopt import workers

M, STEPS, BETA, RATE = 8, 3, 0.5, 2.0**-6
WIRES = ("one_bit", "two_bit", "psum")
COEFFS = (3.4445, -4.7750, 2.0315)
# Newton-Schulz in float32: five steps of coefficients up to 5 on numbers below 2.
CLOSE = 1e-4


def newton_schulz(x, steps=5):
    """The polar factor, nearly, of one matrix: Muon's five lines in float64."""
    x = np.asarray(x, np.float64)
    x = x / max(np.linalg.norm(x), 1e-300)
    a, b, c = COEFFS
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def momenta(gradients, beta, nesterov=True):
    """What each step votes with, before it is orthogonalized, of gradients (steps, ...)."""
    m, voted = np.zeros(gradients.shape[1:]), []
    for g in np.asarray(gradients, np.float64):
        m = beta * m + (1 - beta) * g
        voted.append(beta * m + (1 - beta) * g if nesterov else m)
    return np.stack(voted)


PARAMS = {
    "wide": jnp.zeros((4, 9)),
    "tall": jnp.zeros((8, 3)),
    "vector": jnp.zeros(7),
    "stack": jnp.zeros((2, 3, 4)),
    "scalar": jnp.zeros(()),
    "none": None,
    "empty": jnp.zeros((0, 4)),
}


def gradients(steps=STEPS, num_workers=M, params=PARAMS):
    """Normal gradients of which some are alike on all workers, (steps, workers, *shape)."""
    rng = np.random.default_rng(0)

    def draw(p):
        return (rng.normal(size=(steps, 1, *p.shape)) + rng.normal(size=(steps, num_workers, *p.shape))).astype(
            np.float32
        )

    return jax.tree.map(draw, params)


def polar_of(name, voted):
    """NumPy's ballots before the sign: orthogonalized where optax's default rule says so."""
    if name in ("wide", "tall"):
        return np.stack([newton_schulz(v) for v in voted.reshape(-1, *voted.shape[-2:])]).reshape(voted.shape)
    return voted


def simulated(tx, stacked, params=PARAMS, **extra):
    """The updates of each step, and the last state."""
    state = tx.init(params)
    is_own = lambda s: isinstance(s, workers.PerWorkerState)
    axes = jax.tree.map(lambda s: 0 if is_own(s) else None, state, is_leaf=is_own)
    update = jax.jit(jax.vmap(lambda g, s: tx.update(g, s, params, **extra), (0, axes), (None, axes), axis_name="w"))
    found = []
    for step in range(STEPS):
        updates, state = update(jax.tree.map(lambda g: g[step], stacked), state)  # noqa: B023
        found.append(updates)
    return jax.tree.map(lambda *u: np.stack(u), *found), state


# ---- what it computes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nesterov", (True, False))
@pytest.mark.parametrize("wire", WIRES)
def test_it_votes_with_numpys_signs(wire, nesterov):
    stacked = gradients()
    tx = signopt.sign_muon(1.0, BETA, axis_name="w", num_workers=M, wire=wire, nesterov=nesterov)
    updates, _ = simulated(tx, stacked)
    for name in ("wide", "tall", "vector", "stack", "scalar"):
        voted = np.stack([polar_of(name, momenta(stacked[name][:, m], BETA, nesterov)) for m in range(M)], axis=1)
        sure = (np.abs(voted) > CLOSE).all(1)
        expected = np.stack([-reference.vote_on(wire, reference.sign(v), step) for step, v in enumerate(voted)])
        assert sure.mean() > 0.95, name
        np.testing.assert_array_equal(updates[name][sure], expected[sure], name)


def test_orthogonalizing_changes_the_vote():
    """Negative control: the vote of plain momenta is another one."""
    stacked = gradients()
    ours, _ = simulated(signopt.sign_muon(1.0, BETA, axis_name="w", num_workers=M, nesterov=False), stacked)
    plain, _ = simulated(signopt.signum(1.0, BETA, axis_name="w", num_workers=M), stacked)
    assert (ours["wide"] != plain["wide"]).mean() > 0.1
    for name in ("vector", "stack", "scalar"):
        np.testing.assert_array_equal(ours[name], plain[name])


def test_its_state_is_that_of_signum():
    kwargs = {"axis_name": "w", "num_workers": M}
    ours, theirs = signopt.sign_muon(1.0, **kwargs), signopt.signum(1.0, **kwargs)
    chex.assert_trees_all_equal_structs(ours.init(PARAMS), theirs.init(PARAMS))


@pytest.mark.parametrize("shape", ((4, 9), (8, 3), (6, 6), (1, 5)))
def test_the_polar_factor_is_numpys(shape, rng):
    x = rng.normal(size=shape)
    found = matrices.orthogonalized(jnp.asarray(x, jnp.float32), MuonDimensionNumbers(), COEFFS, 5)
    np.testing.assert_allclose(found, newton_schulz(x), atol=CLOSE)


def test_it_is_near_the_polar_factor_of_a_singular_value_decomposition(rng):
    x = rng.normal(size=(6, 10))
    u, _, v = np.linalg.svd(x, full_matrices=False)
    ours = np.asarray(matrices.orthogonalized(jnp.asarray(x, jnp.float32), MuonDimensionNumbers(), COEFFS, 5))
    assert (np.sign(ours) == np.sign(u @ v)).mean() > 0.9 > (np.sign(x) == np.sign(u @ v)).mean()


@pytest.mark.parametrize("scale", (1e-35, 1e-25, 1e25, 1e37))
def test_votes_do_not_depend_on_the_scale_of_gradients(scale, rng):
    x = jnp.asarray(rng.normal(size=(5, 6)), jnp.float32)
    polar = lambda x: matrices.orthogonalized(x, MuonDimensionNumbers(), COEFFS, 5)
    np.testing.assert_allclose(polar(x * jnp.float32(scale)), polar(x), atol=CLOSE)


def test_zeros_vote_for_nothing():
    """A matrix of zeros, and rows and columns of zeros in one that is not, also where rows are more than columns."""
    tx = signopt.sign_muon(1.0)
    for shape in ((4, 6), (6, 4)):
        gradient = np.ones(shape, np.float32) + np.eye(*shape, dtype=np.float32)
        gradient[1], gradient[:, 2] = 0, 0
        params = {"some": jnp.asarray(gradient), "none": jnp.zeros(shape)}
        updates, _ = tx.update(params, tx.init(params), params)
        np.testing.assert_array_equal(updates["some"] != 0, gradient != 0)
        assert not updates["none"].any()


@pytest.mark.parametrize("dtype", (jnp.float16, jnp.bfloat16))
def test_narrow_gradients_are_orthogonalized_in_float32(dtype, rng):
    x = jnp.asarray(rng.normal(size=(5, 6)) * 100, dtype)
    tx = signopt.sign_muon(1.0, 0.0, nesterov=False)
    updates, _ = tx.update(x, tx.init(x), x)
    expected = newton_schulz(np.asarray(x, np.float64))
    assert updates.dtype == dtype
    sure = np.abs(expected) > CLOSE
    np.testing.assert_array_equal(np.asarray(updates, np.float64)[sure], -np.sign(expected)[sure])


# ---- which leaf is a matrix ---------------------------------------------------------------------------------------


def muon_labels(params, dims):
    """Which leaves optax's muon orthogonalizes: those whose momentum it keeps under "muon"."""
    state = optax.contrib.muon(1.0, muon_weight_dimension_numbers=dims).init(params)
    mu = optax.tree.get(state.inner_states["muon"], "mu")
    is_masked = lambda x: x is None or isinstance(x, optax.MaskedNode)
    return jax.tree.map(lambda x: not is_masked(x), mu, is_leaf=is_masked)


DIMENSIONS = {
    "default": None,
    "one for all under a prefix": {"a": MuonDimensionNumbers(), "b": None, "c": None},
    "of each": {"a": {"w": None, "v": MuonDimensionNumbers(1, 0)}, "b": MuonDimensionNumbers(1, 2), "c": None},
    "a function": lambda params: jax.tree.map(
        lambda x: MuonDimensionNumbers((0, 1, 2), 3) if x.ndim == 4 else None, params
    ),
}


@pytest.mark.parametrize("case", DIMENSIONS)
def test_leaves_are_matrices_by_optaxs_rule(case):
    shapes = {"a": {"w": (3, 4), "v": (4, 2)}, "b": (2, 3, 4), "c": (3, 3, 2, 5)}
    params = jax.tree.map(jnp.zeros, shapes, is_leaf=lambda s: isinstance(s, tuple))
    ours = matrices.dimension_numbers(params, DIMENSIONS[case])
    is_leaf = lambda x: x is None or isinstance(x, MuonDimensionNumbers)
    assert jax.tree.map(lambda d: d is not None, ours, is_leaf=is_leaf) == muon_labels(params, DIMENSIONS[case])


def test_a_stack_is_as_many_matrices_and_a_convolution_one(rng):
    polar = lambda x, *dims: np.asarray(
        matrices.orthogonalized(jnp.asarray(x, jnp.float32), MuonDimensionNumbers(*dims), COEFFS, 5)
    )
    stack = rng.normal(size=(2, 4, 3)) * np.array([1.0, 1e-30])[:, None, None]
    np.testing.assert_allclose(polar(stack, 1, 2), [newton_schulz(x) for x in stack], atol=CLOSE)
    kernel = rng.normal(size=(3, 3, 2, 5))
    np.testing.assert_allclose(
        polar(kernel, (0, 1, 2), 3), newton_schulz(kernel.reshape(18, 5)).reshape(kernel.shape), atol=CLOSE
    )


# ---- faults and arguments -----------------------------------------------------------------------------------------


def test_a_bad_entry_counts_as_zero_and_leaves_no_trace():
    stacked = gradients()
    bad = jax.tree.map(np.copy, stacked)
    bad["wide"][1, 2, 0, 0] = np.nan
    bad["vector"][1, 3, 0] = np.inf
    mended = jax.tree.map(lambda x: np.where(np.isfinite(x), x, 0), bad)
    tx = signopt.sign_muon(1.0, BETA, axis_name="w", num_workers=M)
    (updates, state), (expected, _) = simulated(tx, bad), simulated(tx, mended)
    chex.assert_trees_all_equal(updates, expected)
    chex.assert_tree_all_finite(state)
    np.testing.assert_array_equal(optax.tree.get(state, "total_notfinite"), np.isin(np.arange(M), (2, 3)))


def test_an_absent_worker_does_not_vote():
    stacked = jax.tree.map(lambda g: g[0], gradients())
    tx = signopt.sign_muon(1.0, BETA, axis_name="w")
    vote = jax.vmap(
        lambda g, here: tx.update(g, tx.init(PARAMS), PARAMS, present=here)[0], out_axes=None, axis_name="w"
    )
    few = vote(stacked, np.arange(M) < 3)
    voted = [polar_of("wide", stacked["wide"][m][None])[0] for m in range(3)]
    sure = (np.abs(voted) > CLOSE).all(0)
    np.testing.assert_array_equal(few["wide"][sure], -reference.vote(reference.sign(voted))[sure])
    assert (few["wide"] != vote(stacked, np.ones(M, bool))["wide"]).any()


def test_weight_decay_is_decoupled_and_masked():
    stacked = gradients()
    params = jax.tree.map(jnp.ones_like, PARAMS)
    decayed = {"axis_name": "w", "num_workers": M, "weight_decay": 0.5}
    plain, _ = simulated(signopt.sign_muon(1.0, BETA, axis_name="w", num_workers=M), stacked, params)
    mask = lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree)
    ours, _ = simulated(signopt.sign_muon(1.0, BETA, mask=mask, **decayed), stacked, params)
    np.testing.assert_array_equal(ours["wide"], plain["wide"] - 0.5)
    np.testing.assert_array_equal(ours["vector"], plain["vector"])


def test_one_worker_is_its_local_form():
    stacked = gradients(num_workers=1)
    voted, _ = simulated(signopt.sign_muon(1.0, BETA, axis_name="w", num_workers=1), stacked)
    tx = signopt.sign_muon(1.0, BETA)
    state = tx.init(PARAMS)
    for step in range(STEPS):
        updates, state = jax.jit(tx.update)(jax.tree.map(lambda g: g[step, 0], stacked), state, PARAMS)  # noqa: B023
        chex.assert_trees_all_equal(updates, jax.tree.map(lambda u: u[step], voted))  # noqa: B023


@pytest.mark.parametrize(
    ("error", "message", "kwargs"),
    (
        (ValueError, "`sign_muon(beta=...)` has to be in [0, 1), got 1.5.", {"beta": 1.5}),
        (ValueError, "`sign_muon(ns_steps=...)` has to be at least 1, got 0.", {"ns_steps": 0}),
        (
            ValueError,
            "`sign_muon(ns_coeffs=...)` has to be three numbers, or three for each of at most ns_steps=5 steps, got shape (2,).",
            {"ns_coeffs": (1.0, 2.0)},
        ),
        (ValueError, "`sign_muon(num_workers=...)` has to come with an axis to vote over", {"num_workers": 2}),
        (TypeError, "`sign_muon(ns_steps=...)` has to be a Python integer, got 2.5.", {"ns_steps": 2.5}),
    ),
)
def test_it_refuses(error, message, kwargs):
    with pytest.raises(error, match=re.escape(message)):
        signopt.sign_muon(0.1, **kwargs)


def test_strict_modes_hold():
    params = {"matrix": jnp.ones((3, 4)), "vector": jnp.ones(3)}
    tx = signopt.sign_muon(0.1, weight_decay=0.1)
    state = tx.init(params)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"), jax.debug_nans(True):
        updates, state = tx.update(params, state, params)
    with jax.transfer_guard("disallow"):
        updates, _ = jax.jit(tx.update)(params, state, params)
    chex.assert_tree_all_finite(updates)


# ---- runners ------------------------------------------------------------------------------------------------------

RUN_PARAMS = {"wide": jnp.zeros((4, 9)), "vector": jnp.zeros(7), "bf16": jnp.zeros((4, 4), jnp.bfloat16)}


def step(state, batch):
    params, opt_state = state
    tx = optimizer()
    gradient = jax.tree.map(lambda g, p: g[0].astype(p.dtype), batch, params)
    updates, opt_state = tx.update(gradient, opt_state, params)
    return (optax.apply_updates(params, updates), opt_state), jnp.zeros([])


@functools.cache
def optimizer(wire="one_bit"):
    return signopt.sign_muon(RATE, BETA, axis_name="w", num_workers=M, wire=wire)


def mesh_of(devices, axis_type=AxisType.Auto):
    return jax.make_mesh((M,), ("w",), axis_types=(axis_type,), devices=devices)


def by_pmap(devices):
    state = (RUN_PARAMS, optimizer().init(RUN_PARAMS))
    is_own = lambda s: isinstance(s, workers.PerWorkerState)
    axes = jax.tree.map(lambda s: jax.tree.map(lambda _: 0, s) if is_own(s) else None, state, is_leaf=is_own)
    mapped = jax.pmap(step, "w", in_axes=(axes, 0), out_axes=(axes, 0), devices=devices)
    return lambda state, batch: mapped(state, jax.tree.map(lambda x: x[:, None], batch))


RUNNERS = {
    "simulate": lambda devices: workers.simulate(step, M, axis_name="w"),
    "on_mesh": lambda devices: workers.on_mesh(step, mesh_of(devices), axis_name="w"),
    "on_mesh, unchecked": lambda devices: workers.on_mesh(step, mesh_of(devices), axis_name="w", check_vma=False),
    "on_mesh, explicit": lambda devices: workers.on_mesh(step, mesh_of(devices, AxisType.Explicit), axis_name="w"),
    "pmap": by_pmap,
}


@pytest.mark.parametrize("name", RUNNERS)
def test_every_runner_gives_the_same_updates(name, devices):
    """Products of matrices may add in another order: entries that are zero but for that are left out."""
    batches = gradients(params=RUN_PARAMS)
    run, state = RUNNERS[name](devices), (RUN_PARAMS, optimizer().init(RUN_PARAMS))
    before = jax.tree.map(lambda p: np.zeros(p.shape), RUN_PARAMS)
    stored = {n: np.asarray(jnp.asarray(g).astype(RUN_PARAMS[n].dtype), np.float64) for n, g in batches.items()}
    for k in range(STEPS):
        state, _ = run(state, jax.tree.map(lambda g: g[k], batches))  # noqa: B023
        after = jax.tree.map(lambda p: np.asarray(p, np.float64), state[0])
        for leaf in ("wide", "vector"):
            voted = np.stack([polar_of(leaf, momenta(stored[leaf][:, m], BETA))[k] for m in range(M)])
            sure = (np.abs(voted) > CLOSE).all(0)
            expected = -RATE * reference.vote_on("one_bit", reference.sign(voted), k)
            np.testing.assert_array_equal((after[leaf] - before[leaf])[sure], expected[sure], leaf)
        assert (np.abs(after["bf16"] - before["bf16"]) == RATE).all()
        before = after


OPERATION = re.compile(
    r"= (\(?[a-z0-9]+\[.*?) (all-to-all|all-gather|all-reduce|reduce-scatter|collective-permute)(?:-start)?\("
)


@pytest.mark.parametrize(("wire", "planes"), (("one_bit", 1), ("two_bit", 2)))
def test_it_takes_two_collectives_and_the_bits_of_a_vote(wire, planes, devices):
    """2 (M-1)/M bits for each parameter and plane, where leaves fill their bytes, whatever their kinds and number."""
    params = {"a": jnp.zeros((64, 32)), "b": [jnp.zeros((32, 64))] * 3, "c": jnp.zeros(64), "d": jnp.zeros((4, 8, 16))}
    tx = optimizer(wire)
    batch = jax.tree.map(lambda p: jax.ShapeDtypeStruct((M, *p.shape), p.dtype), params)

    def train(state, batch):
        updates, opt_state = tx.update(jax.tree.map(lambda g: g[0], batch), state[1], state[0])
        return (optax.apply_updates(state[0], updates), opt_state), jnp.zeros([])

    run = workers.on_mesh(train, mesh_of(devices), axis_name="w")
    text = jax.jit(run).lower((params, tx.init(params)), batch).compile().as_text()
    assert sorted(operation for _, operation in OPERATION.findall(text)) == ["all-gather", "all-to-all"]
    size = sum(p.size for p in jax.tree.leaves(params))
    assert 8 * signopt.wire.bytes_sent(params, M, wire) == planes * 2 * (M - 1) * size // M


def test_a_sharded_matrix_is_orthogonalized_whole(devices):
    """FSDP: replicas vote, an inner axis that is left to the compiler shards the matrix."""
    mesh = jax.make_mesh((2, 4), ("replica", "shard"), axis_types=(AxisType.Auto,) * 2, devices=devices)
    tx = signopt.sign_muon(1.0, 0.0, nesterov=False, axis_name="replica", num_workers=2)
    params = jax.device_put(jnp.zeros((8, 16)), jax.NamedSharding(mesh, P("shard", None)))
    batch = np.random.default_rng(0).normal(size=(2, 8, 16)).astype(np.float32)

    def train(state, batch):
        updates, opt_state = tx.update(batch[0], state[1], state[0])
        return (optax.apply_updates(state[0], updates), opt_state), jnp.zeros([])

    (after, _), _ = workers.on_mesh(train, mesh, axis_name="replica")((params, tx.init(params)), batch)
    voted = np.stack([newton_schulz(b) for b in batch])
    shards = np.stack([np.concatenate([newton_schulz(s) for s in np.split(b, 4)]) for b in batch])
    sure = (np.abs(voted) > CLOSE).all(0)
    np.testing.assert_array_equal(np.asarray(after)[sure], -reference.vote(reference.sign(voted))[sure])
    assert (np.asarray(after) != -reference.vote(reference.sign(shards)))[sure].any()  # a shard's own is another
