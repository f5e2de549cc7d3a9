"""Any tree, dtype, values, number of workers, quorum and presence: the vote is its definition, on every wire."""

from hypothesis import HealthCheck
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import reference
import signopt

WIRES = ("one_bit", "two_bit", "psum")
DTYPES = {"f4": np.dtype(np.float32), "f2": np.dtype(np.float16), "bf": np.dtype(ml_dtypes.bfloat16)}
# Few shapes, because each compiles once; many values.
TREES = {
    "leaf": (((13,), "f4"),),
    "mixed": (((3, 5), "bf"), ((), "f4"), ((0, 2), "f2"), ((9,), "f2")),
    "bytes": (((8,), "f4"), ((16, 2), "f4"), ((1,), "bf")),
}
WORKERS = (1, 2, 3, 8, 17)
COMPILED = {}


def run(tree, num_workers, wire):
    """A compiled vote over stacked workers: (rows, quorum, present, step) -> decisions."""
    key = (tree, num_workers, wire)
    if key not in COMPILED:

        def vote(rows, quorum, present, step):
            tx = signopt.majority_vote("w", wire=wire, quorum=quorum)
            update = lambda row, here: tx.update(row, signopt.border.BorderState(step), present=here)[0]
            return jax.vmap(update, out_axes=None, axis_name="w")(rows, present)

        COMPILED[key] = jax.jit(vote)
    return COMPILED[key]


@np.errstate(all="ignore")
def special(dtype):
    """Numbers at the edges of a dtype, by their bits."""
    info = ml_dtypes.finfo(dtype)
    smallest = np.array([1], np.uint16 if dtype.itemsize == 2 else np.uint32).view(dtype)[0]
    values = [0.0, -0.0, np.nan, np.inf, -np.inf, 1.0, -1.0, info.max, info.min, info.tiny, smallest, -smallest]
    return np.array(values).astype(dtype)


@st.composite
def ballots(draw):
    tree = draw(st.sampled_from(sorted(TREES)))
    num_workers = draw(st.sampled_from(WORKERS))
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    edge, zero = draw(st.sampled_from([0.0, 0.1, 0.9])), draw(st.sampled_from([0.0, 0.3, 1.0]))
    rows = []
    for shape, name in TREES[tree]:
        dtype = DTYPES[name]
        bits = rng.integers(0, 2 ** (8 * dtype.itemsize), (num_workers, *shape), np.uint64)
        raw = bits.astype(f"u{dtype.itemsize}").view(dtype)  # any bit pattern there is
        x = np.where(rng.random(raw.shape) < 0.5, raw, rng.normal(size=raw.shape).astype(dtype))
        x = np.where(rng.random(x.shape) < edge, rng.choice(special(dtype), x.shape), x)
        rows.append(np.where(rng.random(x.shape) < zero, np.zeros([], dtype), x).astype(dtype))
    quorum = draw(st.one_of(st.sampled_from([0.0, 1.0, 1 / 3, 2 / 3, 0.5]), st.floats(0, 1, width=32)))
    present = rng.random(num_workers) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    return tree, num_workers, tuple(rows), quorum, present, draw(st.integers(0, 2**31 - 1))


@np.errstate(all="ignore")  # NumPy warns of NaN bits that it widens
def check(case):
    tree, num_workers, rows, quorum, present, step = case
    votes = [reference.sign(x) for x in rows]
    for wire in WIRES:
        vote = run(tree, num_workers, wire)
        found = vote(rows, jnp.float32(quorum), present, jnp.int32(step))
        for x, t, d in zip(rows, votes, found, strict=True):
            assert d.dtype == x.dtype
            expected = reference.vote_on(wire, t, step, float(np.float32(quorum)), present)
            np.testing.assert_array_equal(np.asarray(d).astype(np.float64), expected, err_msg=wire)


fuzz = settings(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@settings(fuzz, max_examples=300)
@given(ballots())
def test_every_wire_is_its_definition(case):
    check(case)


@pytest.mark.slow
@settings(fuzz, max_examples=10_000, derandomize=False)
@given(ballots())
def test_every_wire_is_its_definition_ten_thousand_times(case):
    check(case)


def test_a_filler_that_votes_as_a_bloc_would_be_seen():
    """Negative control: the definition with every other 1-bit system's filler fails within a few cases."""
    rng = np.random.default_rng(0)
    rows = (np.where(rng.random((8, 13)) < 0.7, 0, rng.normal(size=(8, 13))).astype(np.float32),)
    found = run("leaf", 8, "one_bit")(rows, jnp.float32(0), np.ones(8, bool), jnp.int32(3))[0]
    votes = reference.sign(rows[0])
    np.testing.assert_array_equal(found, reference.one_bit_vote(votes, 3))
    assert (np.asarray(found) != reference.one_bit_vote(votes, 3, filler=reference.bloc_filler)).any()


LEFT = {
    "signsgd": lambda m, wire: signopt.signsgd(0.125, axis_name="w", num_workers=m, wire=wire),
    "signum": lambda m, wire: signopt.signum(0.125, 0.9, axis_name="w", num_workers=m, wire=wire),
    "lion": lambda m, wire: signopt.lion(0.125, weight_decay=0.0, axis_name="w", num_workers=m, wire=wire),
}


@np.errstate(all="ignore")
def no_state_is_ever_spoilt(case):
    """Whatever the gradients are, states stay finite, updates are steps of the learning rate, and workers agree."""
    tree, num_workers, rows, _, present, _ = case
    params = tuple(jnp.zeros(x.shape[1:], x.dtype) for x in rows)
    for name, make in LEFT.items():
        for wire in WIRES:
            key = (tree, num_workers, wire, name)
            tx = make(num_workers, wire)
            if key not in COMPILED:
                step = lambda row, state, here, tx=tx: tx.update(row, state, params, present=here)
                axes = jax.tree.map(
                    lambda o: None if o == "shared" else 0, signopt.workers.state.owners(tx.init(params))
                )
                COMPILED[key] = jax.jit(jax.vmap(step, (0, axes, 0), (None, axes), axis_name="w"))
            state = tx.init(params)
            for _ in range(2):
                updates, state = COMPILED[key](rows, state, present)
            assert all(np.isfinite(np.asarray(x).astype(np.float64)).all() for x in jax.tree.leaves(state))
            allowed = {0.0, 0.125, -0.125} if wire != "one_bit" else {0.125, -0.125}
            for x in updates:
                assert set(np.unique(np.asarray(x).astype(np.float64)).tolist()) <= allowed


@settings(fuzz, max_examples=30)
@given(ballots().filter(lambda case: case[0] == "mixed" and case[1] in (3, 8)))
def test_no_gradient_spoils_a_state(case):
    no_state_is_ever_spoilt(case)


@pytest.mark.slow
@settings(fuzz, max_examples=1000, derandomize=False)
@given(ballots())
def test_no_gradient_spoils_a_state_a_thousand_times(case):
    no_state_is_ever_spoilt(case)
