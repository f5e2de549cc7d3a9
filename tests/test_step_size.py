"""A vote that finds its own learning rate: its estimates, the same everywhere, and what they are worth."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.papers.adaptive import toy as toy_noise
import reference
import signopt
from signopt import _axis
from signopt import step_size
from signopt import theory

AXIS = "worker"
WIRES = ("one_bit", "two_bit", "psum")


def tree_like(rng, workers):
    """Leaves that fill no byte, one, and several; coordinates of very different sizes; some without a sign."""
    tree = {
        "a": rng.normal(size=(workers, 5)),
        "b": rng.normal(size=(workers, 4, 9)),
        "c": rng.normal(size=(workers, 8)),
    }
    tree["a"][:, 2] = 0
    tree["b"][0, 1] = 0
    tree["c"] *= 100
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def update_all(tx, updates, state: Any = None, **extra) -> Any:
    """One update of all workers, simulated."""
    state = tx.init(jax.tree.map(lambda x: x[0], updates)) if state is None else state
    return compiled_update(tx)(updates, extra, state)


@functools.cache
def compiled_update(tx):
    update = lambda u, extra, state: tx.update(u, state, **extra)
    return jax.jit(jax.vmap(update, in_axes=(0, 0, None), out_axes=None, axis_name=AXIS))


def mesh_of(devices, workers):
    return jax.make_mesh((workers,), (AXIS,), (jax.sharding.AxisType.Auto,), devices=devices[:workers])


# ---- references ------------------------------------------------------------------------------------------------------


def sums_of(wire, values, step):
    """The sum of the votes for each coordinate of one leaf `(workers, n)`, fillers of a one-bit wire included."""
    ballots = reference.sign(values)
    if wire == "one_bit":
        fillers = [reference.filler(step, np.arange(values.shape[1]), m) for m in range(len(values))]
        ballots = np.where(ballots == 0, np.stack(fillers), ballots)
    return ballots.sum(0)


def margin_progress(leaves, wire, step):
    """The margin estimate times the smoothness, by its definition: worker m serves the m-th chunk of the buffer."""
    workers = len(leaves[0])
    num_bytes = [-(-x.shape[1] // 8) for x in leaves]
    chunk = -(-sum(num_bytes) // workers)
    progress, start = 0.0, 0
    for values, size in zip(leaves, num_bytes, strict=True):
        factor = np.maximum(0, sums_of(wire, values, step) ** 2 - workers) / (workers * (workers - 1))
        server = (start + np.arange(values.shape[1]) // 8) // chunk
        progress += (np.abs(values[server, np.arange(values.shape[1])]) * factor).sum()
        start += size
    return progress


def counted_progress(values):
    """The paper's words: the mean gradient, and how many voters' signs differ from its."""
    mean = values.mean(0)
    wrong = (np.sign(values) != np.sign(mean)).mean(0)
    return float((np.abs(mean) * (1 - 2 * wrong)).sum())


# ---- the estimates ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", (1, 2, 5))
def test_exact_is_the_papers_count_of_disagreements(rng, workers):
    values = rng.normal(size=(workers, 40)) + 0.3
    tx = step_size.adaptive_majority_vote(AXIS, estimator="exact", wire="psum", smoothness=2.0)
    _, state = update_all(tx, jnp.asarray(values, jnp.float32))
    assert float(state.learning_rate) == pytest.approx(counted_progress(values) / 2, rel=1e-5)


@pytest.mark.parametrize(("workers", "wire"), [(2, "two_bit"), (3, "one_bit"), (8, "one_bit"), (8, "two_bit")])
def test_margin_is_its_definition_on_every_packed_wire(rng, wire, workers):
    tree = tree_like(rng, workers)
    tx = step_size.adaptive_majority_vote(AXIS, wire=wire)
    leaves = [np.asarray(x, np.float64).reshape(workers, -1) for x in jax.tree.leaves(tree)]
    state = None
    for step in range(2):
        _, state = update_all(tx, tree, state)
        expected = margin_progress(leaves, wire, step) / sum(x.shape[1] for x in leaves)
        assert float(state.learning_rate) == pytest.approx(expected, rel=1e-5)


def test_margin_over_psum_averages_what_all_workers_see(rng):
    values = rng.normal(size=(5, 40)) + 0.3
    _, state = update_all(step_size.adaptive_majority_vote(AXIS, wire="psum"), jnp.asarray(values, jnp.float32))
    factor = np.maximum(0, np.sign(values).sum(0) ** 2 - 5) / 20
    assert float(state.learning_rate) == pytest.approx((np.abs(values).mean(0) * factor).mean(), rel=1e-5)


def test_leave_one_out_is_unbiased_and_exact_is_not():
    """Voters that only guess promise no progress: the first sees none, the second sees some."""
    noise = jax.random.normal(jax.random.key(0), (4000, 6, 10))
    found = {}
    for estimator in ("leave_one_out", "exact"):
        tx = step_size.adaptive_majority_vote(AXIS, estimator=estimator, wire="psum", smoothness=1.0)
        share = lambda values, tx=tx: tx.update(values, tx.init(values))[1].vote.report.progress.share
        found[estimator] = jax.jit(jax.vmap(jax.vmap(share, out_axes=None, axis_name=AXIS)))(noise)
    error = float(found["leave_one_out"].std()) / math.sqrt(4000)
    assert abs(float(found["leave_one_out"].mean())) <= 5 * error
    # Of six voters each agrees with itself: E|g| / 6 for each of ten coordinates.
    assert float(found["exact"].mean()) == pytest.approx(10 * math.sqrt(2 / math.pi) / 6, abs=5 * error)


@pytest.mark.parametrize("wrong", (0.1, 0.4))
def test_the_margins_factor_estimates_the_squared_advantage_without_bias(wrong):
    workers, n = 7, np.arange(8)
    probability = np.array([math.comb(7, k) * (1 - wrong) ** k * wrong ** (7 - k) for k in n])
    sums = 2 * n - workers
    raw = (sums**2 - workers) / (workers * (workers - 1))
    assert (probability * raw).sum() == pytest.approx((1 - 2 * wrong) ** 2)
    for number, total in zip(n, sums, strict=True):  # its only bias is the cut-off
        values = jnp.where(jnp.arange(workers) < number, 1.0, -1.0)[:, None]
        _, state = update_all(step_size.adaptive_majority_vote(AXIS, smoothness=1.0), values)
        factor = max(0, total**2 - workers) / (workers * (workers - 1))
        assert float(state.learning_rate) == pytest.approx(factor, abs=1e-6)


def test_estimates_agree_where_there_is_no_noise(rng):
    values = jnp.broadcast_to(jnp.asarray(rng.normal(size=40), jnp.float32), (4, 40))
    pairs: Any = (("exact", "psum"), ("leave_one_out", "psum"), ("margin", "one_bit"), ("margin", "two_bit"))
    for estimator, wire in pairs:
        tx = step_size.adaptive_majority_vote(AXIS, estimator=estimator, wire=wire)
        _, state = update_all(tx, values)
        greedy = theory.greedy_learning_rate(values[0], 0.0, smoothness=40)
        assert float(state.learning_rate) == pytest.approx(float(greedy), rel=1e-5)


def test_noise_without_a_signal_is_answered_by_short_steps():
    noise = jax.random.normal(jax.random.key(0), (9, 4000))
    _, state = update_all(step_size.adaptive_majority_vote(AXIS), noise)
    # E max(0, s^2 - 9) / 72 = (72 * 16 + 18 * 40 + 2 * 72) / (512 * 72) for nine coin flips
    assert float(state.learning_rate) == pytest.approx(2016 / (512 * 72) * math.sqrt(2 / math.pi), rel=0.15)
    _, state = update_all(step_size.adaptive_majority_vote(AXIS), noise + 10)
    assert float(state.learning_rate) == pytest.approx(10, rel=0.02)


# ---- the vote --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wire", WIRES)
def test_votes_are_those_of_majority_vote_times_the_learning_rate(rng, wire):
    tree = tree_like(rng, 4)
    adaptive, plain = step_size.adaptive_majority_vote(AXIS, wire=wire), signopt.majority_vote(AXIS, wire=wire)
    state: Any = None
    plain_state: Any = None
    for _ in range(2):
        updates, state = update_all(adaptive, tree, state)
        votes, plain_state = update_all(plain, tree, plain_state)
        scaled = jax.tree.map(lambda v, rate=state.learning_rate: rate * v, votes)
        assert all(np.array_equal(u, v) for u, v in zip(*map(jax.tree.leaves, (updates, scaled)), strict=True))
        assert float(state.learning_rate) > 0


@pytest.mark.parametrize(("wire", "check_vma"), [*((wire, True) for wire in WIRES), ("one_bit", False)])
def test_the_learning_rate_is_the_same_on_every_device_and_in_simulation(rng, devices, wire, check_vma):
    tree, workers = tree_like(rng, 8), 8
    tx = step_size.adaptive_majority_vote(AXIS, wire=wire)

    def step(state, batch):
        updates, state = tx.update(jax.tree.map(lambda x: x[0], batch), state)
        return state, (optax.tree.get(state, "learning_rate"), updates)

    start = tx.init(jax.tree.map(lambda x: x[0], tree))
    mesh = mesh_of(devices, workers)
    state, (rates, updates) = signopt.workers.on_mesh(step, mesh, axis_name=AXIS, check_vma=check_vma)(start, tree)
    simulated, (_, like) = signopt.workers.simulate(step, workers, axis_name=AXIS)(start, tree)
    assert len({np.float32(rate).tobytes() for rate in np.asarray(rates)}) == 1
    assert float(state.learning_rate) == pytest.approx(float(simulated.learning_rate), rel=1e-6)
    signs = lambda tree: [np.sign(np.asarray(x)) for x in jax.tree.leaves(tree)]
    assert all(np.array_equal(a, b) for a, b in zip(signs(updates), signs(like), strict=True))


def test_workers_simulated_on_several_devices_vote_as_they_do_on_one(rng, devices):
    tree = tree_like(rng, 8)
    tx = step_size.adaptive_majority_vote(("device", "sample"))
    start = tx.init(jax.tree.map(lambda x: x[0], tree))
    update = jax.vmap(lambda u: tx.update(u, start), out_axes=None, axis_name="sample")
    mesh = jax.make_mesh((4,), ("device",), (jax.sharding.AxisType.Auto,), devices=devices[:4])
    spec = jax.P("device")
    updates, state = jax.jit(jax.shard_map(update, mesh=mesh, in_specs=spec, out_specs=jax.P(), check_vma=False))(tree)
    expected, one_device = update_all(step_size.adaptive_majority_vote(AXIS), tree)
    assert all(
        np.array_equal(np.sign(a), np.sign(b)) for a, b in zip(*map(jax.tree.leaves, (updates, expected)), strict=True)
    )
    assert float(state.learning_rate) == pytest.approx(float(one_device.learning_rate), rel=1e-6)


def test_the_margin_costs_no_collective_of_its_own(devices):
    tree = {"w": jnp.ones((8, 300)), "b": jnp.ones((8, 3))}
    mesh = mesh_of(devices, 8)

    def collectives(tx):
        start = tx.init(jax.tree.map(lambda x: x[0], tree))
        update = lambda u: tx.update(jax.tree.map(lambda x: x[0], u), start)
        mapped = jax.shard_map(update, mesh=mesh, in_specs=jax.P(AXIS), out_specs=jax.P())
        text = str(jax.make_jaxpr(mapped)(tree))
        return {name: text.count(f"= {name}") for name in ("all_to_all", "all_gather", "psum")}

    assert collectives(step_size.adaptive_majority_vote(AXIS)) == collectives(signopt.majority_vote(AXIS))


@pytest.mark.parametrize(("estimator", "wire"), [("margin", "one_bit"), ("margin", "two_bit"), ("exact", "psum")])
def test_absent_workers_do_not_change_what_the_others_find_on_average(rng, estimator, wire):
    values = jnp.broadcast_to(jnp.asarray(np.full(640, 2.0), jnp.float32), (8, 640)).at[3].set(jnp.nan)
    present = jnp.arange(8) != 3
    tx = step_size.adaptive_majority_vote(AXIS, estimator=estimator, wire=wire)
    updates, state = update_all(tx, values, present=present)
    assert jnp.all(jnp.sign(updates) == 1)
    # Seven agree: 2 exactly; on a packed wire the eighth ballot is blank (7^2 - 8) / 56, or a coin flip.
    expected = {"psum": 2, "two_bit": 2 * 41 / 56, "one_bit": (2 * 56 / 56 + 2 * 28 / 56) / 2}[wire]
    assert float(state.learning_rate) == pytest.approx(expected, rel=0.02)


def test_nan_and_inf_count_as_zero():
    values = jnp.array([[1.0, jnp.nan, -jnp.inf], [1.0, 2.0, -2.0], [1.0, 2.0, -2.0]])
    for estimator in ("exact", "leave_one_out"):
        tx = step_size.adaptive_majority_vote(AXIS, estimator=estimator, wire="psum", smoothness=1.0)
        updates, state = update_all(tx, values)
        assert jnp.all(jnp.isfinite(updates)) and float(state.learning_rate) > 1
    _, state = update_all(step_size.adaptive_majority_vote(AXIS), jnp.full((3, 24), jnp.nan))
    assert float(state.learning_rate) == 0


@pytest.mark.parametrize("dtype", (jnp.bfloat16, jnp.float16, jnp.float32))
def test_updates_keep_their_dtype_and_the_rate_is_float32(dtype):
    updates, state = update_all(step_size.adaptive_majority_vote(AXIS), jnp.ones((3, 10), dtype))
    assert updates.dtype == dtype and state.learning_rate.dtype == jnp.float32
    assert jnp.all(updates == 1)


# ---- the chain -------------------------------------------------------------------------------------------------------


def test_weight_decay_shrinks_with_the_learning_rate_that_was_found():
    params = jnp.array([10.0, -4.0])
    grads = jnp.array([[1.0, 1.0], [1.0, 1.0]])
    tx = signopt.mh_signsgd(axis_name=AXIS, beta=0.0, weight_decay=0.1, smoothness=4.0)
    updates: Any
    updates, state = jax.jit(jax.vmap(lambda g: tx.update(g, tx.init(params), params), axis_name=AXIS))(grads)
    rate = float(optax.tree.get(state, "learning_rate")[0])
    assert rate == 0.5
    assert updates[0].tolist() == pytest.approx([-rate * (1 + 1.0), -rate * (1 - 0.4)])


def test_the_first_step_is_as_long_as_without_momentum():
    grads = jnp.array([[3.0, -1.0], [3.0, -1.0]])
    for beta in (0.0, 0.95):
        tx = signopt.mh_signsgd(axis_name=AXIS, beta=beta)
        updates, _ = jax.jit(jax.vmap(lambda g, tx=tx: tx.update(g, tx.init(g)), axis_name=AXIS))(grads)
        assert np.allclose(np.asarray(updates), [-2.0, 2.0], rtol=1e-6)


def run_parabola(tx, curvature, steps=3, workers=4, params=None):
    params = jnp.ones(curvature.shape) if params is None else params
    loss = lambda x: jnp.sum(curvature * x**2) / 2

    def step(state, batch):
        params, opt_state = state
        value_fn = lambda x: loss(x) + 0 * jnp.sum(batch)
        _, grads = signopt.workers.value_and_grad(value_fn, axis_name=AXIS)(params)
        updates, opt_state = tx.update(grads, opt_state, params, value_fn=value_fn)
        state = optax.apply_updates(params, updates), opt_state
        return state, optax.tree.get(opt_state, "smoothness")

    run = signopt.workers.simulate(step, workers, axis_name=AXIS)
    found, state = [], (params, tx.init(params))
    for _ in range(steps):
        state, smoothness = run(state, jnp.zeros((workers, 1)))
        found.append(float(smoothness[0]))
    return state, found


def test_curvature_measures_a_diagonal_hessian_exactly_and_reaches_the_minimum():
    curvature = jnp.array([1.0, 2.0, 4.0, 0.5])
    tx = signopt.mh_signsgd(
        axis_name=AXIS, num_workers=4, beta=0.0, smoothness=signopt.measured_smoothness(jax.random.key(0))
    )
    (params, _), found = run_parabola(tx, curvature, steps=40)
    assert found == [7.5] * 40
    assert float(jnp.sum(curvature * params**2)) < 1e-4 * 7.5


def test_curvature_sees_what_a_vote_does_in_all_coordinates_at_once():
    """The Hessian of (sum x)^2 / 2 is all ones: its diagonal sums up to 8, and along equal signs it curves by 64."""
    tx = step_size.adaptive_majority_vote(
        AXIS, smoothness=signopt.measured_smoothness(jax.random.key(0), refresh_every=1)
    )
    update = lambda g, state, params: tx.update(g, state, params, value_fn=lambda x: jnp.sum(x) ** 2 / 2)
    update = jax.vmap(update, in_axes=(0, None, None), out_axes=None, axis_name=AXIS)
    half = jnp.tile(jnp.array([1.0, -1.0]), (2, 4))
    for gradients, expected in ((jnp.ones((2, 8)), 64.0), (half, 8.0)):
        _, state = update(gradients, tx.init(jnp.ones(8)), jnp.ones(8))
        assert float(state.smoothness) >= expected - 1e-4
        assert float(state.smoothness) == pytest.approx(expected, rel=1.5 if expected == 8 else 1e-6)


def test_smoothness_is_the_dimension_or_a_number():
    pairs: Any = ((None, 4), (9.0, 9), (jnp.float32(3.0), 3))
    for smoothness, expected in pairs:
        tx = signopt.mh_signsgd(axis_name=AXIS, smoothness=smoothness, beta=0.0)
        assert run_parabola(tx, jnp.ones(4), steps=1)[1] == [expected]


def test_too_small_a_smoothness_diverges_and_enough_does_not():
    for smoothness, converges in ((40.0, True), (8.0, False)):
        tx = signopt.mh_signsgd(axis_name=AXIS, beta=0.0, smoothness=smoothness)
        (params, _), _ = run_parabola(tx, jnp.ones(40), steps=20)
        assert (float(jnp.sum(params**2)) < 1) == converges


def test_curvature_is_refreshed_as_often_as_it_says():
    tx = step_size.adaptive_majority_vote(
        AXIS, smoothness=signopt.measured_smoothness(jax.random.key(0), refresh_every=3)
    )
    update = lambda g, state, params: tx.update(g, state, params, value_fn=lambda x: jnp.sum(x**4))
    update = jax.jit(jax.vmap(update, in_axes=(0, None, None), out_axes=None, axis_name=AXIS))
    state: Any = tx.init(jnp.ones(8))
    found = []
    for step in range(7):  # the curvature of x^4 changes with x; the caller moves it by hand
        _, state = update(jnp.ones((2, 8)), state, jnp.full(8, 1.0 + step))
        found.append(float(state.smoothness))
    assert found == pytest.approx([12 * 8 * (1.0 + step // 3 * 3) ** 2 for step in range(7)])


def test_curvature_works_on_devices(devices):
    tx = signopt.mh_signsgd(axis_name=AXIS, num_workers=4, smoothness=signopt.measured_smoothness(jax.random.key(0)))

    def step(state, batch):
        params, opt_state = state
        loss = lambda x: jnp.sum(3.0 * x**2) / 2 + jnp.sum(batch) * jnp.sum(x)
        _, grads = signopt.workers.value_and_grad(loss, axis_name=AXIS)(params)
        updates, opt_state = tx.update(grads, opt_state, params, value_fn=loss)
        return (optax.apply_updates(params, updates), opt_state), optax.tree.get(opt_state, "smoothness")

    run = signopt.workers.on_mesh(step, mesh_of(devices, 4), axis_name=AXIS)
    _, found = run((jnp.ones(5), tx.init(jnp.ones(5))), jnp.zeros((4, 1)))
    assert found.tolist() == [15.0] * 4


# ---- what it is worth ------------------------------------------------------------------------------------------------


@functools.cache
def toy_tail(name, voters, steps, seeds):
    config = toy_noise.Config(workers=voters, fewer=(voters,))
    optimizer, _, _ = toy_noise.methods(config)[f"{name}, {voters} voters"]
    found, _ = toy_noise.losses(optimizer, voters=voters, noise=1.0, steps=steps, seeds=seeds)
    return float(found[:, -1000:].mean())


def test_one_bit_and_nothing_to_tune_beat_a_fixed_rate_and_the_papers_estimator_on_the_toy():
    adaptive = toy_tail("adaptive", 8, 3000, 4)
    assert toy_tail("vote", 8, 3000, 4) >= 1.5 * adaptive
    assert toy_tail("adaptive, the paper's", 8, 3000, 4) >= adaptive


@pytest.mark.slow
@pytest.mark.parametrize("voters", (8, 64))
def test_one_bit_and_nothing_to_tune_beat_a_fixed_rate_threefold_after_ten_thousand_steps(voters):
    adaptive = toy_tail("adaptive", voters, 10_000, 10)
    assert toy_tail("vote", voters, 10_000, 10) >= 3 * adaptive
    assert toy_tail("adaptive, the paper's", voters, 10_000, 10) >= adaptive


@pytest.mark.slow
def test_the_papers_figure_1_with_256_voters():
    assert toy_tail("vote", 256, 10_000, 10) >= 5 * toy_tail("adaptive, the paper's", 256, 10_000, 10)


def test_the_first_steps_on_the_toy_are_those_without_noise():
    """Until the loss has fallen from 50 to 2 with the paper's estimator, and for twenty slower steps with the default."""
    for optimizer, voters, steps, ratio in (
        (toy_noise.papers(32), 32, 5, 2.0),
        (signopt.mh_signsgd(axis_name=toy_noise.AXIS, num_workers=8), 8, 20, 1.3),
    ):
        losses = functools.partial(toy_noise.losses, optimizer, voters=voters, steps=steps, seeds=10)
        pair = np.asarray(jax.vmap(lambda noise, losses=losses: losses(noise=noise)[0])(jnp.array([1.0, 0.0]))).mean(1)
        assert np.all(pair[0] / pair[1] < ratio) and np.all(pair[0] / pair[1] > 1 / ratio)
        assert pair[0][-1] < 0.3 * pair[0][0]


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (
            {"smoothness": 0.0},
            r"`adaptive_majority_vote\(smoothness=\.\.\.\)` has to be positive, got 0\.0\. Pass `signopt\.measured",
        ),
        ({"smoothness": -1}, r"has to be positive, got -1"),
        ({"estimator": "median"}, r"one of 'margin', 'exact', 'leave_one_out', got 'median'\."),
        ({"estimator": "exact"}, r"has to be \"psum\" with estimator='exact', .* got 'two_bit'\. Keep"),
        ({"wire": "three_bit"}, r"`adaptive_majority_vote\(wire=\.\.\.\)` has to be one of .* got 'three_bit'"),
    ],
)
def test_arguments_are_checked_at_construction(kwargs, message):
    with pytest.raises(ValueError, match=message):
        step_size.adaptive_majority_vote(AXIS, **kwargs)


def test_words_are_no_smoothness():
    with pytest.raises(
        TypeError, match=r"`adaptive_majority_vote\(smoothness=\.\.\.\)` has to be a number positive, got 'trace'"
    ):
        step_size.adaptive_majority_vote(AXIS, smoothness="trace")
    with pytest.raises(
        ValueError, match=r"`measured_smoothness\(refresh_every=\.\.\.\)` has to be at least 1, got 0\."
    ):
        signopt.measured_smoothness(jax.random.key(0), refresh_every=0)


def test_beta_is_checked_at_construction():
    with pytest.raises(ValueError, match=r"`mh_signsgd\(beta=\.\.\.\)` has to be in \[0, 1\), got 1\.0\."):
        signopt.mh_signsgd(axis_name=AXIS, beta=1.0)


@pytest.mark.parametrize(("estimator", "wire"), [("margin", "one_bit"), ("leave_one_out", "psum")])
def test_one_worker_cannot_leave_one_out(estimator, wire):
    tx = step_size.adaptive_majority_vote(None, estimator=estimator, wire=wire)
    with pytest.raises(ValueError, match=r"has to run over at least 2 workers, got 1: .* Pass `estimator=\"exact\""):
        tx.update(jnp.ones(3), tx.init(jnp.ones(3)))


def test_one_worker_can_be_exact():
    tx = step_size.adaptive_majority_vote(None, estimator="exact", wire="psum")
    updates, _ = tx.update(jnp.array([3.0, -1.0]), tx.init(jnp.ones(2)))
    assert np.asarray(updates).tolist() == [2.0, -2.0]


def test_curvature_needs_the_loss_and_the_parameters():
    tx = step_size.adaptive_majority_vote(AXIS, smoothness=signopt.measured_smoothness(jax.random.key(0)))
    for given, missing in (({}, "value_fn"), ({"value_fn": jnp.sum}, "params")):
        update = lambda g, given=given: tx.update(g, tx.init(g), **given)
        with pytest.raises(
            ValueError, match=rf"`measured_smoothness\(\.\.\.\)` needs `update\({missing}=\.\.\.\)`, got None"
        ):
            jax.vmap(update, axis_name=AXIS)(jnp.ones((2, 3)))


def test_reduced_gradients_are_refused(devices):
    tx = step_size.adaptive_majority_vote(AXIS)
    update = lambda u: tx.update(jax.lax.psum(u[0], AXIS), tx.init(u[0]))[0]
    with pytest.raises(ValueError, match=r"`adaptive_majority_vote` has to be given each worker's own gradient"):
        jax.shard_map(update, mesh=mesh_of(devices, 2), in_specs=jax.P(AXIS), out_specs=jax.P())(jnp.ones((2, 3)))


def test_scalars_are_gathered_in_the_order_of_workers():
    found = jax.vmap(lambda x: _axis.gather_scalar(x, AXIS), out_axes=None, axis_name=AXIS)(jnp.arange(5.0))
    assert found.tolist() == [0, 1, 2, 3, 4]
