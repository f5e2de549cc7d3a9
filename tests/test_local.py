"""Local steps against NumPy, their laws, and what happens to workers that are late, away or broken."""

import functools
import re

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
import numpy as np
import optax
import pytest

import signopt
from signopt import workers
from signopt.local import LocalStepsState

M = 4
STEPS = 12
LEAVES = {"w": (3, 5), "b": (7,), "s": ()}
WAYS = {  # every, fragments, delay
    "every step": (1, 1, 0),
    "every step, late": (1, 1, 1),
    "rounds": (3, 1, 0),
    "late rounds": (3, 1, 1),
    "fragments": (4, 4, 0),
    "late fragments": (4, 4, 1),
    "fragments in some steps": (6, 3, 0),
    "late fragments in some steps": (6, 3, 1),
}
ways = pytest.mark.parametrize("way", WAYS)
some_ways = pytest.mark.parametrize(
    "way", ("every step, late", "rounds", "late rounds", "late fragments in some steps")
)


def params():
    return {name: jnp.zeros(shape) for name, shape in LEAVES.items()}


def targets(num_workers=M, steps=STEPS):
    """Where each worker wants to go in each step, `(steps, workers, *shape)`: quarters, so that sums of few are exact."""
    rng = np.random.default_rng(0)
    draw = lambda shape: (rng.integers(-16, 17, (steps, num_workers, *shape)) / 4).astype(np.float32)
    return {name: draw(shape) for name, shape in LEAVES.items()}


def make_step(tx, *, present=None, spoil=None):
    """A step towards this worker's target; metrics are where the worker stood."""

    def step(state, batch):
        params, opt_state = state
        here = signopt.local_params(opt_state, params)
        gradient = jax.tree.map(lambda p, t: p - t[0], here, batch["target"])
        if spoil is not None:
            gradient = jax.tree.map(lambda g: jnp.where(batch["broken"][0], spoil, g), gradient)
        extra = {} if present is None else {"present": batch["present"][0]}
        updates, opt_state = tx.update(gradient, opt_state, params, **extra)
        return (optax.apply_updates(params, updates), opt_state), here

    return step


def batch_of(step, num_workers=M, present=None, broken=None):
    batch = {"target": jax.tree.map(lambda x: x[step], targets(num_workers))}
    if present is not None:
        batch["present"] = np.asarray(present, bool)
    if broken is not None:
        batch["broken"] = np.asarray(broken, bool)
    return batch


def vote_outer(wire="two_bit", rate=2.0**-2):
    return optax.chain(signopt.majority_vote("w", wire=wire), optax.scale(-rate))


def mean_outer(rate=1.0, **kwargs):
    return optax.chain(signopt.mean("w"), optax.sgd(rate, **kwargs))


def local_steps(way, inner=None, outer=None, num_workers=M):
    every, fragments, delay = WAYS[way]
    return signopt.local_steps(
        optax.sgd(0.5) if inner is None else inner,
        vote_outer() if outer is None else outer,
        every=every,
        fragments=fragments,
        delay=delay,
        num_workers=num_workers,
    )


@functools.cache
def trained(way, steps=STEPS):
    """The states that one optimizer passes through, on one device."""
    tx = local_steps(way)
    run = workers.simulate(make_step(tx), M, axis_name="w")
    states = [(params(), tx.init(params()))]
    for step in range(steps):
        states.append(run(states[-1], batch_of(step))[0])
    return states


def offsets(state):
    return state[1].own.per_worker.offset


def outer_updates(state, after):
    return jax.tree.map(lambda a, b: np.asarray(b) - np.asarray(a), state[0], after[0])


# ---- the definition, in NumPy ------------------------------------------------------------------------------------------


class Adam:
    """Kingma and Ba's, for one worker."""

    def __init__(self, rate):
        self.rate, self.m, self.v, self.t = rate, 0.0, 0.0, 0

    def __call__(self, gradient, here):
        self.t += 1
        self.m = 0.9 * self.m + 0.1 * gradient
        self.v = 0.999 * self.v + 0.001 * gradient**2
        return -self.rate * self.m / (1 - 0.9**self.t) / (np.sqrt(self.v / (1 - 0.999**self.t)) + 1e-8)


class DecayedSGD:
    """SGD with decoupled weight decay, which shows at what parameters it is called."""

    def __call__(self, gradient, here):
        return -0.5 * (gradient + 0.25 * here)


class Nesterov:
    """DiLoCo's outer optimizer on the mean of pseudo-gradients."""

    def __init__(self, rate=0.7, momentum=0.9):
        self.rate, self.momentum, self.trace = rate, momentum, 0.0

    def __call__(self, pseudo, anchor):
        self.trace = self.momentum * self.trace + pseudo.mean(0)
        return -self.rate * (pseudo.mean(0) + self.momentum * self.trace)


class Vote:
    """The sign that most workers agree on, with weight decay at the anchor."""

    def __call__(self, pseudo, anchor):
        return -(2.0**-2) * (np.sign(np.sign(pseudo).sum(0)) + 0.25 * anchor)


def definition(name, way, inner, outer):
    """The anchor after every step, of one leaf, in float64."""
    every, fragments, delay = WAYS[way]
    goal = targets()[name].reshape(STEPS, M, -1).astype(np.float64)
    size = goal.shape[-1]
    part = -(-size // fragments)
    anchor, offset = np.zeros(size), np.zeros((M, size))
    inners, outers, anchors = [inner() for _ in range(M)], [outer() for _ in range(fragments)], []
    for step in range(STEPS):
        before = offset.copy()
        here = anchor + offset
        moved = np.stack([inners[m](here[m] - goal[step, m], here[m]) for m in range(M)])
        offset = offset + moved
        done = step + 1 - delay
        if done > 0 and done % (every // fragments) == 0:
            turn = (done // (every // fragments) - 1) % fragments
            mine = slice(turn * part, (turn + 1) * part)
            sent = before if delay else offset
            decision = outers[turn](-sent[:, mine], anchor[mine])
            offset[:, mine] = moved[:, mine] if delay else 0.0
            anchor = anchor.copy()
            anchor[mine] += decision
        anchors.append(anchor)
    return np.stack(anchors).reshape(STEPS, *LEAVES[name])


REFERENCES = {
    "DiLoCo": (
        functools.partial(Adam, 0.125),
        Nesterov,
        optax.adam(0.125),
        mean_outer(0.7, momentum=0.9, nesterov=True),
    ),
    "votes": (
        DecayedSGD,
        Vote,
        optax.chain(optax.add_decayed_weights(0.25), optax.sgd(0.5)),
        optax.chain(signopt.majority_vote("w"), optax.add_decayed_weights(0.25), optax.scale(-(2.0**-2))),
    ),
}


@ways
@pytest.mark.parametrize("method", REFERENCES)
def test_anchors_are_those_of_the_definition(method, way):
    inner_reference, outer_reference, inner, outer = REFERENCES[method]
    tx = local_steps(way, inner, outer)
    run = workers.simulate(make_step(tx), M, axis_name="w")
    state = params(), tx.init(params())
    want = {name: definition(name, way, inner_reference, outer_reference) for name in LEAVES}
    for step in range(STEPS):
        state, _ = run(state, batch_of(step))
        for name in LEAVES:
            np.testing.assert_allclose(
                state[0][name], want[name][step], rtol=1e-5, atol=1e-5, err_msg=f"{name}, {step}"
            )
    assert all(np.abs(x).max() > 0.1 for x in want.values())  # it moved


def test_another_order_of_fragments_would_be_seen():
    """Negative control of the test above: parts that leave in the reverse order end elsewhere."""
    right, wrong = (definition("b", way, DecayedSGD, Vote) for way in ("fragments", "rounds"))
    assert np.abs(right[-1] - wrong[-1]).max() > 0.2


# ---- laws --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wire", ("one_bit", "two_bit"))
def test_every_step_with_a_plain_inner_step_is_the_outer_optimizer_alone(wire):
    outer = optax.chain(signopt.majority_vote("w", wire=wire), optax.add_decayed_weights(0.5), optax.scale(-0.25))
    tx = signopt.local_steps(optax.sgd(1.0), outer, every=1, num_workers=M)

    def alone(state, batch):
        params, opt_state = state
        gradient = jax.tree.map(lambda p, t: p - t[0], params, batch["target"])
        updates, opt_state = outer.update(gradient, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    states = [(params(), tx.init(params())), (params(), outer.init(params()))]
    runs = [workers.simulate(step, M, axis_name="w") for step in (make_step(tx), alone)]
    for step in range(STEPS):
        states = [run(state, batch_of(step))[0] for run, state in zip(runs, states, strict=True)]
        jax.tree.map(np.testing.assert_array_equal, states[0][0], states[1][0])
        jax.tree.map(np.testing.assert_array_equal, states[0][1].outer_state, states[1][1])


@pytest.mark.parametrize(("late", "at_once"), [("every step, late", "every step"), ("late fragments", "fragments")])
def test_a_late_decision_is_the_one_that_would_have_been_made_at_once(late, at_once):
    """What the workers held when step k began is decided in step k as without delay at the end of step k - 1."""
    tx = local_steps(at_once, inner=optax.set_to_zero())  # so that nothing but the given offsets is exchanged
    run = workers.simulate(make_step(tx), M, axis_name="w")
    states = trained(late)
    for step in range(1, STEPS):
        anchor, opt_state = states[step]
        assert isinstance(opt_state, LocalStepsState)
        like = opt_state._replace(
            count=opt_state.count - 1,
            own=opt_state.own._replace(
                per_worker=tx.init(params()).own.per_worker._replace(offset=offsets(states[step]))
            ),
        )
        decided, _ = run((anchor, like), batch_of(step))
        jax.tree.map(np.testing.assert_array_equal, decided[0], states[step + 1][0])
        jax.tree.map(np.testing.assert_array_equal, decided[1].outer_state, states[step + 1][1].outer_state)


@pytest.mark.parametrize(
    ("way", "is_late"), [("every step, late", True), ("late fragments", True), ("fragments", False)]
)
def test_a_late_exchange_needs_nothing_that_its_step_computes(way, is_late):
    """So it can travel meanwhile: another batch in this step changes neither the anchor nor what the border remembers."""
    run = workers.simulate(make_step(local_steps(way)), M, axis_name="w")
    state = trained(way)[5]
    one, other = (run(state, batch_of(step))[0] for step in (5, 6))
    shared = lambda state: jax.tree.leaves((state[0], state[1].outer_state))
    pairs = zip(shared(one), shared(other), strict=True)
    assert all(np.array_equal(a, b) for a, b in pairs) == is_late
    assert not np.array_equal(offsets(one)["w"], offsets(other)["w"])


@pytest.mark.parametrize("way", [way for way, (_, _, delay) in WAYS.items() if delay])
def test_the_first_late_step_decides_nothing(way):
    """Also on a wire on which zeros are sent as signs."""
    tx = local_steps(way, outer=vote_outer("one_bit"))
    state = params(), tx.init(params())
    after, _ = workers.simulate(make_step(tx), M, axis_name="w")(state, batch_of(0))
    jax.tree.map(np.testing.assert_array_equal, after[0], state[0])
    jax.tree.map(np.testing.assert_array_equal, after[1].outer_state, state[1].outer_state)
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(offsets(after)))


@pytest.mark.parametrize("delay", (0, 1))
def test_nothing_of_the_way_is_lost(delay):
    """With an averaging outer step the mean of the workers' places moves by the mean of their inner steps, and not else."""
    tx = signopt.local_steps(optax.sgd(0.5), mean_outer(), every=4, fragments=4, delay=delay, num_workers=M)
    run = workers.simulate(make_step(tx), M, axis_name="w")
    state = params(), tx.init(params())
    mean_of = lambda state: {n: np.asarray(state[0][n]) + np.asarray(offsets(state)[n]).mean(0) for n in LEAVES}
    for step in range(STEPS):
        after, here = run(state, batch_of(step))
        for name in LEAVES:
            inner = -0.5 * (np.asarray(here[name]) - targets()[name][step]).mean(0)
            np.testing.assert_allclose(mean_of(after)[name] - mean_of(state)[name], inner, atol=4e-6)
        state = after


# ---- runners -----------------------------------------------------------------------------------------------------------


def by_simulate(step, state, devices):
    return workers.simulate(step, M, axis_name="w")


def by_mesh(step, state, devices, **kwargs):
    mesh = jax.make_mesh((M,), ("w",), axis_types=(AxisType.Auto,), devices=devices[:M])
    return workers.on_mesh(step, mesh, axis_name="w", **kwargs)


def by_pmap(step, state, devices):
    axes = jax.tree.map(lambda owner: None if owner == "shared" else 0, workers.state.owners(state))
    run = jax.pmap(step, "w", in_axes=(axes, 0), out_axes=(axes, 0), devices=devices[:M])
    return lambda state, batch: run(state, jax.tree.map(lambda x: x[:, None], batch))


def by_jit(tx, state, devices):
    """In plain `jit`, where a worker's gradient comes from its row of the batch."""
    mesh = jax.make_mesh((M,), ("w",), axis_types=(AxisType.Auto,), devices=devices[:M])
    in_jit = workers.in_jit(tx, mesh, axis_name="w")

    @jax.jit
    def run(state, batch):
        params, opt_state = state
        here = signopt.local_params(opt_state, params)  # of all workers, who are here at once
        gradient = jax.tree.map(lambda p, t: p - t, here, batch["target"])
        updates, opt_state = in_jit.update(gradient, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), here

    return run


RUNNERS = {
    "on_mesh": by_mesh,
    "on_mesh, unchecked": functools.partial(by_mesh, check_vma=False),
    "pmap": by_pmap,
    "in_jit": by_jit,
}


@some_ways
@pytest.mark.parametrize("runner", RUNNERS)
def test_every_runner_gives_the_same_bits(way, runner, devices):
    tx = local_steps(way)
    state = params(), tx.init(params())
    run = RUNNERS[runner](tx if runner == "in_jit" else make_step(tx), state, devices)
    for step in range(STEPS):
        state, _ = run(state, batch_of(step))
        jax.tree.map(np.testing.assert_array_equal, state, trained(way)[step + 1])


@pytest.mark.parametrize("way", ("late rounds", "late fragments"))
def test_memory_of_the_border_has_its_worker_in_front(way, devices):
    """Momentum left of an outer vote is a worker's own, part by part, in every runner."""
    outer = optax.chain(workers.per_worker(optax.trace(0.5), M), vote_outer())
    tx = local_steps(way, outer=outer)
    start = params(), tx.init(params())
    parts = (WAYS[way][1],) if WAYS[way][1] > 1 else ()
    trace, who = start[1].outer_state[0]
    assert who.shape == (M,)
    assert trace.trace["b"].shape == ((M, *parts, 2) if parts else (M, 7))
    runs = [by_simulate, by_mesh, by_pmap]
    states = [start] * 3
    runs = [run(make_step(tx), start, devices) for run in runs]
    for step in range(STEPS):
        states = [run(state, batch_of(step))[0] for run, state in zip(runs, states, strict=True)]
    for other in states[1:]:
        jax.tree.map(np.testing.assert_array_equal, states[0], other)
    assert workers.resize(states[0], 2)[1].outer_state[0].per_worker.trace["b"].shape[0] == 2


@pytest.mark.parametrize("way", ("late rounds", "late fragments"))
def test_memory_on_both_sides_gives_the_same_bits_in_rounds_and_in_parts(way, devices):
    signs = signopt.codecs.scaled_sign(block=8)
    border = signopt.mean("w", uplink=signs, downlink=signs, num_workers=M)
    tx = local_steps(way, outer=optax.chain(border, optax.sgd(0.5, momentum=0.5)))
    start = params(), tx.init(params())
    runs = [run(make_step(tx), start, devices) for run in (by_simulate, by_mesh)]
    states = [start] * 2
    for step in range(STEPS):
        states = [run(state, batch_of(step))[0] for run, state in zip(runs, states, strict=True)]
    jax.tree.map(np.testing.assert_array_equal, *states)
    assert all(np.any(np.asarray(x)) for x in jax.tree.leaves(states[0][0]))


def test_means_in_floats_agree_between_runners_to_the_last_bits(devices):
    """Sums in another order differ by half a unit in the last place each; the parameters are below 4."""
    inner, outer = REFERENCES["DiLoCo"][2:]
    tx = local_steps("rounds", inner, outer)
    states = [(params(), tx.init(params()))] * 2
    runs = [run(make_step(tx), states[0], devices) for run in (by_simulate, by_mesh)]
    for step in range(STEPS):
        states = [run(state, batch_of(step))[0] for run, state in zip(runs, states, strict=True)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), *(s[0] for s in states))


def test_an_outer_optimizer_without_a_border_is_refused(devices):
    for way in ("every step", "rounds"):
        tx = local_steps(way, outer=optax.sgd(1.0))
        state = params(), tx.init(params())
        for runner in (by_simulate, by_mesh):
            with pytest.raises(ValueError, match=r"has to return shared state that is the same on every worker"):
                runner(make_step(tx), state, devices)(state, batch_of(0))


def test_a_round_is_a_real_branch_and_fragments_need_none(devices):
    """The traffic of every step is the same with fragments, and a step between rounds has none."""

    def lowered(way):
        tx = local_steps(way)
        state = params(), tx.init(params())
        mesh = jax.make_mesh((M,), ("w",), axis_types=(AxisType.Auto,), devices=devices[:M])
        run = jax.jit(workers.on_mesh(make_step(tx), mesh, axis_name="w"))
        return run.lower(state, batch_of(0)).as_text()

    branch = r"stablehlo\.(case|if)\b"
    travels = r"stablehlo\.(all_to_all|all_gather|all_reduce|collective_permute)\b"
    for way, (every, fragments, _) in WAYS.items():
        text = lowered(way)
        assert bool(re.search(branch, text)) == (every != fragments), way
        assert re.search(travels, text), way


# ---- going on ----------------------------------------------------------------------------------------------------------


@ways
def test_a_run_that_was_killed_goes_on_to_the_same_bits(way):
    """From what a checkpoint holds, at any step of a round."""
    tx = local_steps(way)
    run = workers.simulate(make_step(tx), M, axis_name="w")
    for killed_at in range(1, 7):
        saved = jax.tree.map(np.asarray, trained(way)[killed_at])
        state, _ = run(jax.tree.map(jnp.asarray, saved), batch_of(killed_at))
        jax.tree.map(np.testing.assert_array_equal, state, trained(way)[killed_at + 1])


@pytest.mark.parametrize("way", ("rounds", "late fragments"))
@pytest.mark.parametrize("num_workers", (2, 8))
def test_another_number_of_workers_starts_from_the_mean_offset(way, num_workers):
    before = trained(way)[4]
    after = workers.resize(before, num_workers)
    for name in LEAVES:
        mean = np.asarray(offsets(before)[name]).mean(0)
        np.testing.assert_allclose(offsets(after)[name], np.broadcast_to(mean, (num_workers, *mean.shape)), atol=1e-6)
    tx = local_steps(way, num_workers=num_workers)
    run = workers.simulate(make_step(tx), num_workers, axis_name="w")
    for step in range(4, 8):
        after, _ = run(after, batch_of(step, num_workers))
    assert any(np.any(np.asarray(x)) for x in jax.tree.leaves(outer_updates(before, after)))


# ---- workers that are away, or broken ----------------------------------------------------------------------------------


@some_ways
def test_a_worker_that_is_away_loses_nothing_and_changes_nothing(way):
    """Worker 1 is away in every other step: what it does then has no effect, and what it had waits."""
    tx = local_steps(way)
    run = workers.simulate(make_step(tx, present=True, spoil=jnp.nan), M, axis_name="w")
    state = params(), tx.init(params())
    other = state
    for step in range(STEPS):
        away = step % 2 == 1
        present = [True, not away, True, True]
        after, _ = run(state, batch_of(step, present=present, broken=[False] * M))
        other, _ = run(other, batch_of(step, present=present, broken=[False, away, False, False]))
        jax.tree.map(np.testing.assert_array_equal, after, other)
        if away:
            mine = lambda state: jax.tree.map(lambda x: x[1], state[1].own.per_worker)
            jax.tree.map(np.testing.assert_array_equal, mine(after), mine(state))
        state = after


def test_the_vote_of_a_round_is_of_those_present():
    """Workers 0 and 1 pull up, 2 and 3 pull down harder; with 3 away for the round, up wins."""
    tx = signopt.local_steps(optax.sgd(0.5), vote_outer(rate=1.0), every=2, num_workers=M)
    goals = np.float32([1, 1, -8, -8])

    def step(state, batch):
        params, opt_state = state
        gradient = signopt.local_params(opt_state, params) - batch["goal"][0]
        updates, opt_state = tx.update(gradient, opt_state, params, present=batch["present"][0])
        return (optax.apply_updates(params, updates), opt_state), None

    run = workers.simulate(step, M, axis_name="w")
    state = jnp.zeros(()), tx.init(jnp.zeros(()))
    for present in ([1, 1, 1, 1], [1, 1, 1, 0]):
        state, _ = run(state, {"goal": goals, "present": np.array(present, bool)})
    assert float(state[0]) == 1.0
    assert offsets(state).tolist() == [0.0, 0.0, 0.0, -4.0]  # worker 3's first step waits
    for _ in range(2):
        state, _ = run(state, {"goal": goals, "present": np.ones(M, bool)})
    assert offsets(state).tolist() == [0.0] * M


def test_a_worker_that_was_away_for_a_whole_round_comes_back_at_the_anchor():
    tx = local_steps("rounds")
    run = workers.simulate(make_step(tx, present=True), M, axis_name="w")
    state = params(), tx.init(params())
    for step in range(6):
        state, here = run(state, batch_of(step, present=[True, True, True, not 3 <= step < 6]))
    state, here = run(state, batch_of(6, present=[True] * M))
    for name in LEAVES:
        stood = np.asarray(here[name])
        np.testing.assert_array_equal(stood[3], stood[0])  # all of them are at the anchor when a round begins


@some_ways
@pytest.mark.parametrize("bad", (np.nan, 3e38))
def test_a_broken_worker_reaches_no_offset_and_no_anchor(way, bad):
    tx = local_steps(way, inner=optax.sgd(4.0, momentum=0.9))
    run = workers.simulate(make_step(tx, spoil=jnp.float32(bad)), M, axis_name="w")
    state = params(), tx.init(params())
    for step in range(STEPS):
        state, _ = run(state, batch_of(step, broken=[False, step % 3 == 0, False, False]))
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))
    notfinite = state[1].own.per_worker.inner_state.total_notfinite
    assert notfinite.tolist() == [0, 0 if bad == 3e38 else 4, 0, 0]


# ---- the inner optimizer -----------------------------------------------------------------------------------------------


def count_of(state):
    (count,) = optax.tree.get_all_with_path(state[1].own.per_worker.inner_state, "count")
    return np.asarray(count[1])


def test_schedules_count_their_own_steps():
    inner = optax.sgd(lambda count: 0.5**count)
    outer = optax.chain(signopt.majority_vote("w"), optax.scale_by_learning_rate(lambda count: 0.25 + count))
    for way, rounds in (("rounds", 4), ("fragments", 3)):
        tx = local_steps(way, inner, outer)
        run = workers.simulate(make_step(tx), M, axis_name="w")
        state = params(), tx.init(params())
        for step in range(STEPS):
            state, _ = run(state, batch_of(step))
        assert count_of(state).tolist() == [STEPS] * M
        assert np.all(np.asarray(state[1].outer_state[1].count) == rounds)


def test_inner_state_is_kept_through_rounds_or_started_anew():
    for reset, want in ((False, [1, 2, 3, 4, 5, 6]), (True, [1, 2, 0, 1, 2, 0])):
        tx = signopt.local_steps(optax.adam(0.1), vote_outer(), every=3, num_workers=M, reset_inner=reset)
        run = workers.simulate(make_step(tx), M, axis_name="w")
        state = params(), tx.init(params())
        seen = []
        for step in range(6):
            state, _ = run(state, batch_of(step))
            seen.append(int(count_of(state)[0]))
        assert seen == want


def test_gradients_are_accumulated_inside():
    """MultiSteps as inner optimizer: an offset moves in every second step only."""
    tx = local_steps("rounds", inner=optax.MultiSteps(optax.sgd(0.5), 2).gradient_transformation())
    run = workers.simulate(make_step(tx), M, axis_name="w")
    state = params(), tx.init(params())
    moved = []
    for step in range(2):
        state, _ = run(state, batch_of(step))
        moved.append(bool(np.any(np.asarray(offsets(state)["w"]))))
    assert moved == [False, True]


@pytest.mark.parametrize("way", ("every step, late", "rounds", "late fragments"))
@pytest.mark.parametrize("dtype", ("bfloat16", "float32"))
def test_dtypes_and_types_stay(way, dtype):
    like = {"x": jnp.ones((5,), dtype), "e": jnp.zeros((0,), dtype), "none": None}
    tx = local_steps(way, inner=optax.adam(0.125))
    init = jax.jit(tx.init)(like)
    axes = jax.tree.map(lambda owner: None if owner == "shared" else 0, workers.state.owners(init))
    update = lambda state: tx.update(like, state, like)
    updates, state = jax.jit(jax.vmap(update, (axes,), (None, axes), axis_name="w", axis_size=M))(init)
    shape = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype, jax.typeof(x).weak_type), tree)
    assert shape(updates) == shape(like)
    assert shape(state) == shape(init)


def test_the_state_maps_over_parameters():
    for way in ("rounds", "fragments"):
        tx = local_steps(way, outer=optax.chain(vote_outer(), optax.trace(0.5)))
        state = tx.init(params())
        marked = optax.tree.map_params(tx, lambda x: None, state)
        assert jax.tree.leaves(marked.own.per_worker.offset) == jax.tree.leaves(marked.outer_state[1]) == []
        assert [x.shape for x in jax.tree.leaves(marked.own.worker)] == [(M,)]


def test_one_worker_needs_no_axis_and_no_runner():
    outer = optax.chain(signopt.majority_vote(None), optax.scale(-1.0))
    for fragments in (1, 2):
        tx = signopt.local_steps(optax.sgd(0.5), outer, every=2, fragments=fragments, num_workers=1)
        x, state = jnp.zeros(3), tx.init(jnp.zeros(3))
        for _ in range(2):
            gradient = signopt.local_params(state, x) - jnp.array([1.0, -1.0, 4.0])
            updates, state = jax.jit(tx.update)(gradient, state, x)
            x = optax.apply_updates(x, updates)
        assert x.tolist() == [1.0, -1.0, 1.0]


# ---- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"every": 0}, ValueError, "`local_steps(every=...)` has to be at least 1, got 0."),
        ({"fragments": 0}, ValueError, "`local_steps(fragments=...)` has to be at least 1, got 0."),
        ({"num_workers": 0}, ValueError, "`local_steps(num_workers=...)` has to be at least 1, got 0."),
        ({"every": 2.5}, TypeError, "`local_steps(every=...)` has to be a Python integer, got 2.5."),
        ({"num_workers": None}, TypeError, "`local_steps(num_workers=...)` has to be a Python integer, got None."),
        ({"fragments": 3}, ValueError, "`local_steps(fragments=...)` has to divide every=4, got 3."),
        ({"fragments": 8}, ValueError, "`local_steps(fragments=...)` has to divide every=4, got 8."),
        ({"delay": 2}, ValueError, "`local_steps(delay=...)` has to be 0 or 1, got 2."),
        ({"delay": None}, ValueError, "`local_steps(delay=...)` has to be 0 or 1, got None."),
        (
            {"fragments": 2, "reset_inner": True},
            ValueError,
            "`local_steps(reset_inner=...)` has to be False with fragments=2, got True",
        ),
    ],
)
def test_arguments_that_mean_nothing_are_refused(arguments, error, says):
    with pytest.raises(error, match=re.escape(says)):
        signopt.local_steps(optax.sgd(1.0), vote_outer(), **{"every": 4, "num_workers": M} | arguments)


def test_it_asks_for_parameters_and_floats():
    tx = local_steps("rounds")
    says = (
        "`local_steps(...).update(params=...)` has to be given, got None: a worker steps from `params` plus its offset."
    )
    with pytest.raises(ValueError, match=re.escape(says)):
        tx.update(params(), tx.init(params()))
    whole = {"n": jnp.zeros(3, jnp.int32)}
    one = signopt.local_steps(optax.sgd(1.0), optax.sgd(1.0), every=1, num_workers=1)
    with pytest.raises(TypeError, match=r"`local_steps`"):
        one.update(whole, one.init(whole), whole)


def test_local_params_says_what_it_needs():
    tx = local_steps("rounds")
    state = tx.init(params())
    for wrong, found in ((optax.sgd(0.1).init(params()), 0), ((state, state), 2)):
        says = f"`local_params(opt_state)` has to be given a state that holds one of `local_steps`, got {found}."
        with pytest.raises(ValueError, match=re.escape(says)):
            signopt.local_params(wrong, params())
    with pytest.raises(ValueError, match=re.escape("got one inside `optax.MultiSteps`")):
        signopt.local_params(optax.MultiSteps(tx, 2).init(params()), params())
    with pytest.raises(ValueError, match=re.escape("`local_params(params)` has to be the parameters that")):
        signopt.local_params(state, {"w": jnp.zeros(2)})


def test_local_params_finds_its_state_inside_a_chain():
    tx = optax.chain(optax.clip(1.0), local_steps("rounds"))
    here = signopt.local_params(tx.init(params()), params())
    assert jax.tree.map(jnp.shape, here) == {name: (M, *shape) for name, shape in LEAVES.items()}
