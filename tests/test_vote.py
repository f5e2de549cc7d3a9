"""The vote against its definition, and what follows from the definition."""

import functools
import math
import re

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
from jax import lax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

import reference
import signopt
from signopt import _bits
from signopt import _flat

AXIS = "workers"
WIRES = ("one_bit", "two_bit", "psum")
SLOW = tuple(pytest.param(m, marks=pytest.mark.slow) for m in (4, 7, 33, 130, 300))
WORKERS = (1, 2, 3, 5, 8, 16, *SLOW)
QUORA = (0.0, 0.5)
WIDE = (np.float16, ml_dtypes.bfloat16, np.float32, np.float64)
NARROW = WIDE[:3]


def special_values(dtype):
    """Every kind of number that a sign rule can get wrong."""
    info = ml_dtypes.finfo(dtype)
    finite = [1.0, float(info.smallest_normal), float(info.smallest_subnormal), float(info.max)]
    return np.array([0.0, -0.0, np.nan, np.inf, -np.inf, *finite, *(-x for x in finite)], dtype)


def random_tree(rng, num_workers, dtypes):
    """One gradient per worker: odd sizes, a scalar, empty leaves, None and a masked leaf, every dtype."""
    draw = lambda dtype, *shape: rng.choice(special_values(dtype), (num_workers, *shape))
    tree = {str(np.dtype(dtype)): (draw(dtype, 13), draw(dtype, 3, 5)) for dtype in dtypes}
    return tree | {
        "scalar": draw(np.float32),
        "unanimous": np.full((num_workers, 9), -1, np.float32),
        "empty": draw(np.float32, 0),
        "empty_matrix": draw(np.float32, 3, 0),
        "none": None,
        "masked": optax.MaskedNode(),
        "word": draw(np.float32, 32),
        "words": [draw(np.float32, 65), draw(np.float32, 8), draw(np.float32, 1)],
    }


def update_at(transform, step, updates, present=None):
    """One vote at a given step, seen by one worker."""
    state = signopt.border.BorderState(count=step)
    return transform.update(updates, state, None, present=present)


@functools.cache
def voting(wire, quorum=0.0):
    """`vote(updates, step, present)` for stacked updates. `out_axes=None` refuses what is not unanimous."""
    transform = signopt.majority_vote(AXIS, wire=wire, quorum=quorum)

    def one_worker(updates, step, present):
        return update_at(transform, step, updates, present)[0]

    return jax.jit(
        jax.vmap(one_worker, in_axes=(0, None, 0), out_axes=None, axis_name=AXIS),
    )


def expected_tree(wire, updates, step, quorum=0.0, present=None):
    """The NumPy definition, leaf by leaf, in the leaf's dtype."""
    define = lambda x: reference.vote_on(wire, reference.sign(x), step, quorum, present)
    return jax.tree.map(lambda x: define(x).astype(x.dtype), updates)


def assert_same_tree(got, expected):
    """The same structure, shapes, dtypes and values; no tolerance, and -0 is not a vote."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    named = jax.tree.leaves_with_path(expected)
    for actual, (path, leaf) in zip(jax.tree.leaves(got), named, strict=True):
        assert actual.dtype == leaf.dtype, path
        assert actual.shape == leaf.shape, path
        np.testing.assert_array_equal(np.asarray(actual, np.float64), leaf.astype(np.float64), str(path))
        assert not np.signbit(np.asarray(actual, np.float64)[leaf == 0]).any(), f"-0 at {path}"


# ---- the definition --------------------------------------------------------------------------------


@functools.cache
def all_votes(num_workers):
    """Every wire and quorum in one compiled program."""
    rules = [(wire, quorum) for wire in WIRES for quorum in QUORA]

    def one_worker(updates, step, present):
        def run(wire, quorum):
            transform = signopt.majority_vote(AXIS, wire=wire, quorum=quorum)
            return update_at(transform, step, updates, present)[0]

        return {rule: run(*rule) for rule in rules}

    return jax.jit(jax.vmap(one_worker, (0, None, 0), None, axis_name=AXIS, axis_size=num_workers))


def assert_votes_agree(num_workers, dtypes):
    rng = np.random.default_rng(num_workers)
    for step, attendance in ((0, 1.0), (7, 0.6)):
        updates = random_tree(rng, num_workers, dtypes)
        present = rng.random(num_workers) < attendance
        got = all_votes(num_workers)(updates, jnp.int32(step), present)
        for (wire, quorum), votes in got.items():
            assert_same_tree(votes, expected_tree(wire, updates, step, quorum, present))


@pytest.mark.parametrize("num_workers", WORKERS)
def test_every_wire_agrees_with_its_definition_in_every_dtype(num_workers, x64):
    assert_votes_agree(num_workers, WIDE)


@pytest.mark.parametrize("num_workers", (2, 5, *SLOW))
def test_every_wire_agrees_with_its_definition_in_32_bit_mode(num_workers):
    assert_votes_agree(num_workers, NARROW)


@pytest.mark.parametrize("wire", ("one_bit", "two_bit"))
def test_decisions_reports_and_sizes_do_not_depend_on_the_layout_of_bits(wire, rng):
    """Leaves that are no whole tiles, large and small, and zeros and ties."""
    shapes = {"large": (2**16 + 77,), "whole": (1024,), "small": (3, 333), "narrow": (5,)}
    updates = {name: rng.integers(-1, 2, (4, *shape)).astype(np.float32) for name, shape in shapes.items()}
    transforms = [
        signopt.majority_vote(AXIS, wire=wire, report=True),
        signopt.majority_vote(AXIS, wire=wire, block=256),
    ]

    def found(platform):
        def one_worker(updates):
            first = lambda tx: tx.init(updates)._replace(count=jnp.int32(7))
            return [(votes, state.report) for votes, state in (tx.update(updates, first(tx)) for tx in transforms)]

        with _bits.as_on(platform):
            return jax.jit(jax.vmap(one_worker, out_axes=None, axis_name=AXIS))(updates)

    rows, tiles = found("cpu"), found("tpu")
    assert_same_tree(tiles[0][0], expected_tree(wire, updates, 7))
    for x, y in zip(jax.tree.leaves(rows[0]), jax.tree.leaves(tiles[0]), strict=True):
        np.testing.assert_array_equal(x, y)
    for x, y in zip(jax.tree.leaves(rows[1]), jax.tree.leaves(tiles[1]), strict=True):
        np.testing.assert_array_equal(np.sign(x), np.sign(y))
        # A size is a sum over blocks and workers and two quotients, of which each may be rounded otherwise.
        np.testing.assert_allclose(x, y, rtol=4 * np.finfo(np.float32).eps)


@pytest.mark.slow
def test_a_tree_of_500_leaves_is_voted_on_leaf_by_leaf(rng):
    sizes = rng.integers(0, 40, 500)
    updates = [rng.integers(-1, 2, (3, n)).astype(np.float32) for n in sizes]
    for wire in WIRES:
        got = voting(wire)(updates, jnp.int32(3), np.ones(3, bool))
        assert_same_tree(got, expected_tree(wire, updates, 3))


def kernels_of(program, *args):
    """The bodies of the compiled kernels, without the names of what is in them."""
    text = jax.jit(program).lower(*args).compile().as_text()
    bodies = re.findall(r"^%fused_computation[^\n]*\{\n(.*?)^\}", text, flags=re.MULTILINE | re.DOTALL)
    return {re.sub(r"%[\w.-]+|, metadata=\{[^}]*\}", "", body) for body in bodies}


def test_leaves_of_one_size_share_their_kernels():
    words = jax.ShapeDtypeStruct((30 * 125,), jnp.uint8)
    few, many = ([jax.ShapeDtypeStruct((1000,), jnp.float32)] * n for n in (15, 30))

    def step(params, words):
        return jax.tree.map(lambda x, vote: x - 0.1 * vote, params, _flat.unpack(words, params))

    def step_from_known_places(params, words):
        votes = signopt._bits.unpack(words).astype(jnp.float32)
        return [x - 0.1 * votes[1000 * i : 1000 * (i + 1)] for i, x in enumerate(params)]

    assert len(kernels_of(step, many, words)) <= len(kernels_of(step, few, words)) + 1
    assert len(kernels_of(step_from_known_places, many, words)) >= 30


@pytest.mark.parametrize("wire", WIRES)
def test_a_leaf_of_more_than_2_to_the_32_entries_compiles(wire, devices):
    """Nothing counts entries in 32 bits, neither here nor in the compiled program."""
    mesh = jax.make_mesh((2,), ("w",), axis_types=(jax.sharding.AxisType.Auto,), devices=devices[:2])
    tx = signopt.majority_vote("w", wire=wire)
    vote = jax.shard_map(lambda g: tx.update(g[0], tx.init(None))[0], mesh=mesh, in_specs=jax.P("w"), out_specs=jax.P())
    size = 2**32 + 9
    compiled = jax.jit(vote).lower(jax.ShapeDtypeStruct((2, size), jnp.bfloat16)).compile()
    assert compiled.out_info.shape == (size,)
    assert (
        signopt.wire.bytes_sent(compiled.out_info, 2, wire) >= {"one_bit": 1, "two_bit": 2, "psum": 8}[wire] * size // 8
    )


@pytest.mark.slow
def test_a_leaf_of_more_than_2_to_the_31_entries_is_voted_on():
    """By one worker, whose vote is its sign; 10 GB."""
    minus = [0, 2**30, 2**31, 2**31 + 8]
    values = np.ones(2**31 + 9, np.float16)
    values[minus] = -3
    tx = signopt.majority_vote(None)
    votes = np.asarray(jax.jit(tx.update)(values, tx.init(None))[0])
    np.testing.assert_array_equal(np.flatnonzero(votes < 0), minus)
    assert np.count_nonzero(votes) == votes.size


@pytest.mark.parametrize("num_workers", (3, 8))
def test_large_leaves_agree_with_the_definition(num_workers, rng):
    shapes = ((70_001,), (5,), (257, 300), (1 << 16,))
    updates = [rng.integers(-1, 2, (num_workers, *s)).astype(ml_dtypes.bfloat16) for s in shapes]
    for wire in WIRES:
        got = voting(wire)(updates, jnp.int32(1), np.ones(num_workers, bool))
        assert_same_tree(got, expected_tree(wire, updates, 1))


def test_the_reference_itself_by_hand():
    ballots = np.array([[1, 1, 0, -1, 0], [1, -1, 0, -1, 1], [-1, 0, 0, -1, 0]], np.float64)
    np.testing.assert_array_equal(reference.vote(ballots), [1, 0, 0, -1, 1])
    np.testing.assert_array_equal(reference.vote(ballots, quorum=0.5), [0, 0, 0, -1, 0])
    np.testing.assert_array_equal(reference.vote(ballots, present=[0, 1, 1]), [0, -1, 0, -1, 1])
    # Worker 0 alternates along the leaf; worker 1 flips where i is odd, worker 2 where the next bit of i is set.
    np.testing.assert_array_equal(reference.filler(0, np.arange(4), 0), [1, -1, 1, -1])
    np.testing.assert_array_equal(reference.filler(0, np.arange(4), 1), [1, 1, 1, 1])
    np.testing.assert_array_equal(reference.filler(1, np.arange(4), 2), [-1, 1, 1, -1])


@pytest.mark.parametrize(
    ("quorum", "num_workers", "least"), [(0.0, 8, 1), (0.5, 8, 4), (0.5, 7, 4), (0.28, 25, 7), (1.0, 5, 5)]
)
def test_a_quorum_counts_the_margin_exactly(quorum, num_workers, least, x64):
    # Column v has v + 1 votes for +1; 0.28 * 25 is a hair above 7 in double precision.
    ballots = (np.arange(num_workers)[:, None] <= np.arange(num_workers)).astype(np.float32)
    expected = (np.arange(1, num_workers + 1) >= least).astype(np.float32)
    for wire in ("two_bit", "psum"):
        got = voting(wire, quorum)(ballots, jnp.int32(0), np.ones(num_workers, bool))
        np.testing.assert_array_equal(got, expected)


# ---- laws, on values that hypothesis draws -----------------------------------------------------------

SHAPE = (5, 37)
SPECIAL = st.sampled_from(special_values(np.float32).tolist())
GRADIENTS = hnp.arrays(np.float32, SHAPE, elements=SPECIAL)
STEPS = st.integers(0, 2**31 - 2)
PRESENT = hnp.arrays(np.bool_, SHAPE[0])
SIGNS = hnp.arrays(np.float32, SHAPE, elements=st.sampled_from([-1.0, 1.0]))
EVERYBODY = np.ones(SHAPE[0], bool)


@pytest.mark.parametrize("wire", WIRES)
@hypothesis.given(GRADIENTS, STEPS, PRESENT)
def test_vote_is_its_definition_whoever_is_present(wire, gradients, step, present):
    got = voting(wire)(gradients, jnp.int32(step), present)
    expected = reference.vote_on(wire, reference.sign(gradients), step, present=present)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("wire", ("two_bit", "psum"))
@hypothesis.given(GRADIENTS, st.permutations(range(SHAPE[0])))
def test_vote_ignores_the_order_of_workers(wire, gradients, order):
    votes = voting(wire)
    shuffled = votes(gradients[np.array(order)], jnp.int32(0), EVERYBODY)
    np.testing.assert_array_equal(votes(gradients, jnp.int32(0), EVERYBODY), shuffled)


@hypothesis.given(SIGNS, st.permutations(range(SHAPE[0])))
def test_one_bit_vote_ignores_the_order_where_nothing_is_zero(gradients, order):
    votes = voting("one_bit")
    shuffled = votes(gradients[np.array(order)], jnp.int32(0), EVERYBODY)
    np.testing.assert_array_equal(votes(gradients, jnp.int32(0), EVERYBODY), shuffled)


@pytest.mark.parametrize("wire", ("two_bit", "psum"))
@hypothesis.given(GRADIENTS, PRESENT)
def test_vote_is_odd(wire, gradients, present):
    votes = voting(wire)
    against = votes(-gradients, jnp.int32(0), present)
    np.testing.assert_array_equal(against, -votes(gradients, jnp.int32(0), present))


@hypothesis.given(SIGNS, STEPS)
def test_one_bit_vote_equals_the_others_where_nothing_is_zero_or_tied(gradients, step):
    got = [voting(wire)(gradients, jnp.int32(step), EVERYBODY) for wire in WIRES]
    np.testing.assert_array_equal(got[0], got[1])
    np.testing.assert_array_equal(got[1], got[2])


@pytest.mark.parametrize("wire", WIRES)
@hypothesis.given(SIGNS, st.integers(0, SHAPE[1] - 1), st.integers(0, SHAPE[0] - 1))
def test_one_more_vote_for_never_turns_a_decision_against(wire, gradients, column, worker):
    gradients[worker, column] = -1.0
    before = voting(wire)(gradients, jnp.int32(0), EVERYBODY)
    gradients[worker, column] = 1.0
    after = voting(wire)(gradients, jnp.int32(0), EVERYBODY)
    assert after[column] >= before[column]


def test_gradients_in_different_units_do_not_weigh_more(rng):
    gradients = rng.choice([-1.0, 1.0], SHAPE).astype(np.float32)
    scaled = gradients * np.float32(10.0) ** np.arange(-10, 15, 5)[:, None].astype(np.float32)
    for wire in WIRES:
        same = [voting(wire)(g, jnp.int32(0), EVERYBODY) for g in (gradients, scaled)]
        np.testing.assert_array_equal(*same)


# ---- the state ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("wire", WIRES)
def test_the_state_counts_steps_and_never_changes_its_structure(wire):
    transform = signopt.majority_vote(AXIS, wire=wire)
    state = transform.init({"w": jnp.zeros(3)})
    assert isinstance(state, signopt.border.BorderState)
    assert state.count.dtype == jnp.int32 and state.count == 0
    vmapped = jax.vmap(lambda g: transform.update(g, state)[1], out_axes=None, axis_name=AXIS)
    after = vmapped({"w": jnp.ones((2, 3))})
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert after.count.dtype == jnp.int32 and after.count == 1


def test_present_may_be_a_python_bool():
    transform = signopt.majority_vote(AXIS)
    state = transform.init(jnp.zeros(3))

    def one_worker(gradient, present):
        return transform.update(gradient, state, present=present)[0]

    gradients = jnp.ones((2, 3))
    for present, expected in ((True, 1.0), (False, 0.0), (None, 1.0)):
        vote = jax.vmap(functools.partial(one_worker, present=present), axis_name=AXIS)(gradients)
        np.testing.assert_array_equal(vote, np.full((2, 3), expected))


def test_update_takes_extra_arguments_it_does_not_know():
    transform = signopt.majority_vote(AXIS)
    assert isinstance(transform, optax.GradientTransformationExtraArgs)
    state = transform.init(jnp.zeros(3))
    update = lambda g: transform.update(g, state, None, value=1.0)[0]
    np.testing.assert_array_equal(jax.vmap(update, axis_name=AXIS)(jnp.ones((2, 3))), np.ones((2, 3)))


# ---- parameters that have no gradient ------------------------------------------------------------------

UNSEEN = 70


def furthest_from_start(votes):
    """The largest distance, in steps, of any parameter from where it began."""
    return np.abs(np.cumsum(votes, axis=0)).max()


@pytest.mark.parametrize("num_workers", (1, 2, 3, 5, 8))
def test_a_parameter_without_gradient_stays(num_workers):
    zeros = jnp.zeros((num_workers, UNSEEN))

    def one_worker(updates):
        def votes(wire):
            transform = signopt.majority_vote(AXIS, wire=wire)

            def step(state, _):
                direction, state = transform.update(updates, state)
                return state, direction

            return lax.scan(step, transform.init(updates), length=1000)[1]

        return {wire: votes(wire) for wire in WIRES}

    votes = jax.jit(jax.vmap(one_worker, out_axes=None, axis_name=AXIS))(zeros)
    assert furthest_from_start(votes["psum"]) == 0
    assert furthest_from_start(votes["two_bit"]) == 0
    assert furthest_from_start(votes["one_bit"]) == 1
    # Negative control: with the same filler from everybody the same parameter walks away.
    ballots = np.zeros((num_workers, UNSEEN))
    bloc = [reference.one_bit_vote(ballots, s, filler=reference.bloc_filler) for s in range(100)]
    assert furthest_from_start(bloc) == 100


def learn_embedding(vote, num_workers, seen_by, num_steps=1000):
    """Relative error of rows of which at each step only `seen_by` workers have a gradient."""
    rng = np.random.default_rng(1)
    target = rng.normal(size=64).astype(np.float32)
    rank = np.argsort(rng.random((num_steps, num_workers, 64)), axis=1)
    noise = (0.1 * rng.normal(size=rank.shape)).astype(np.float32)
    rates = (0.02 * (1 - np.arange(num_steps) / num_steps)).astype(np.float32)

    @jax.jit
    def train(rank, noise):
        def step(row, inputs):
            count, rank, noise, rate = inputs
            gradients = jnp.where(rank < seen_by, row - target + noise, 0.0)
            return row - rate * vote(gradients, count), None

        return lax.scan(step, jnp.zeros(64), (jnp.arange(num_steps), rank, noise, rates))[0]

    return np.linalg.norm(train(rank, noise) - target) / np.linalg.norm(target)


def vote_with_bloc_filler(gradients, count):
    """What every other 1-bit system does: zeros and ties are sent as +1."""
    return jnp.sign(jnp.where(gradients == 0, 1.0, jnp.sign(gradients)).sum(0) + 0.5)


@pytest.mark.parametrize("wire", WIRES)
def test_rows_that_few_workers_see_are_learned(wire):
    everybody = jnp.ones(20, bool)
    vote = lambda g, count: voting(wire)(g, count, everybody)
    assert learn_embedding(vote, num_workers=20, seen_by=3) < 0.02


def test_rows_that_few_workers_see_are_not_learned_when_abstainers_vote_as_a_bloc():
    assert learn_embedding(vote_with_bloc_filler, num_workers=20, seen_by=3) > 0.9


# ---- absent workers --------------------------------------------------------------------------------------

NUM_WORKERS, BATCH, NUM_STEPS, SEEDS = 8, 8, 600, 5
ABSENCES = {"first half": np.arange(8) >= 4, "even ones": np.arange(8) % 2 == 1}


def load_digits():
    from sklearn import datasets

    x, y = datasets.load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    return jnp.asarray(x[order] / 16, jnp.float32), jnp.asarray(y[order])


def perceptron(params, x):
    return jax.nn.relu(x @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]


def train_digits(vote):
    """Test accuracy of Signum with 8 workers, one row per pattern of absence and one column per seed.

    `vote(momentum, count, present)` returns the direction; the learning rate falls to zero on a cosine.
    """
    x, y = load_digits()
    x_train, y_train = x[:1437], y[:1437]
    rate = optax.cosine_decay_schedule(0.005, NUM_STEPS)

    def loss(params, rows):
        logits = perceptron(params, x_train[rows])
        return optax.softmax_cross_entropy_with_integer_labels(logits, y_train[rows]).mean()

    def one_worker(params, rows, present):
        def step(carry, inputs):
            params, momentum = carry
            count, rows = inputs
            gradient = jax.grad(loss)(params, rows)
            momentum = optax.tree.update_moment(gradient, momentum, 0.9, 1)
            direction = vote(momentum, count, present)
            params = jax.tree.map(lambda p, d: p - rate(count) * d, params, direction)
            return (params, momentum), None

        start = (params, optax.tree.zeros_like(params))
        return lax.scan(step, start, (jnp.arange(NUM_STEPS), rows))[0][0]

    def one_run(key, present):
        init_key, rows_key = jax.random.split(key)
        k1, k2 = jax.random.split(init_key)
        params = {
            "w1": jax.random.normal(k1, (64, 64)) / 8,
            "b1": jnp.zeros(64),
            "w2": jax.random.normal(k2, (64, 10)) / 8,
            "b2": jnp.zeros(10),
        }
        rows = jax.random.randint(rows_key, (NUM_WORKERS, NUM_STEPS, BATCH), 0, len(x_train))
        workers = jax.vmap(one_worker, (None, 0, 0), None, axis_name=AXIS)
        guess = perceptron(workers(params, rows, present), x[1437:]).argmax(-1)
        return (guess == y[1437:]).mean()

    keys = jax.random.split(jax.random.key(0), SEEDS)
    runs = jax.vmap(jax.vmap(one_run, (0, None)), (None, 0))
    return np.asarray(jax.jit(runs)(keys, np.stack(list(ABSENCES.values()))))


def train_digits_on(wire):
    transform = signopt.majority_vote(AXIS, wire=wire)
    return train_digits(lambda m, count, present: update_at(transform, count, m, present)[0])


@pytest.fixture(scope="module")
def accuracy_on_psum():
    return train_digits_on("psum")


@pytest.mark.parametrize("wire", ("one_bit", "two_bit"))
def test_half_the_workers_may_be_absent(wire, accuracy_on_psum):
    accuracy = train_digits_on(wire)
    assert accuracy_on_psum.mean() > 0.97
    assert np.abs(accuracy.mean(axis=1) - accuracy_on_psum.mean(axis=1)).max() <= 0.01


def test_half_the_workers_may_not_be_absent_when_they_vote_as_a_bloc(accuracy_on_psum):
    def bloc(momentum, count, present):
        cast = lambda m: jnp.where(present & (m != 0), jnp.sign(m), 1.0)
        total = lax.psum(jax.tree.map(cast, momentum), AXIS)
        return jax.tree.map(lambda t: jnp.sign(t + 0.5), total)

    assert train_digits(bloc).mean() < accuracy_on_psum.mean() - 0.5


# ---- a worker whose gradient is not finite ---------------------------------------------------------------


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("bad", (np.nan, np.inf, -np.inf))
def test_a_worker_whose_gradient_is_not_finite_abstains(wire, bad, rng):
    gradients = rng.choice([-1.0, 1.0], SHAPE).astype(np.float32)
    broken, absent = gradients.copy(), EVERYBODY.copy()
    broken[2], absent[2] = bad, False
    got = voting(wire)(broken, jnp.int32(5), EVERYBODY)
    np.testing.assert_array_equal(got, voting(wire)(gradients, jnp.int32(5), absent))
    assert np.isfinite(got).all()


# ---- bad input -------------------------------------------------------------------------------------------


def vote_once(updates, **kwargs):
    transform = signopt.majority_vote(AXIS, **kwargs)
    update = lambda g: transform.update(g, transform.init(g))[0]
    return jax.vmap(update, axis_name=AXIS)(updates)


def test_the_wires_are_named_when_the_wire_is_unknown():
    sentence = "`majority_vote(wire=...)` has to be one of 'one_bit', 'two_bit', 'psum', got '3_bit'."
    with pytest.raises(ValueError, match=re.escape(sentence)):
        signopt.majority_vote(AXIS, wire="3_bit")


@pytest.mark.parametrize("quorum", (-0.1, 1.5, math.nan))
def test_a_quorum_outside_0_1_is_refused(quorum):
    sentence = f"`majority_vote(quorum=...)` has to be in [0, 1], got {quorum}."
    with pytest.raises(ValueError, match=re.escape(sentence)):
        signopt.majority_vote(AXIS, quorum=quorum)


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize(
    ("dtype", "cure"),
    [
        ("int32", "Leave it out with `optax.masked` or `optax.partition`."),
        ("bool", "Leave it out with `optax.masked` or `optax.partition`."),
        ("complex64", "Optimize the real and the imaginary part as two leaves."),
    ],
)
def test_leaves_that_are_not_real_floats_are_refused(wire, dtype, cure):
    sentence = f"`majority_vote` has to be given floating-point leaves, got {dtype} at `updates['w']`. {cure}"
    with pytest.raises(TypeError, match=re.escape(sentence)):
        vote_once({"w": jnp.ones((2, 3), dtype)}, wire=wire)


@pytest.mark.parametrize("wire", WIRES)
def test_an_axis_that_is_not_bound_is_refused(wire):
    transform = signopt.majority_vote("nobody", wire=wire)
    updates = jnp.ones(3)
    with pytest.raises(ValueError, match="nobody"):
        transform.update(updates, transform.init(updates))
