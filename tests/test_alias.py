"""The ready optimizers: without an axis they are optax's own, with one they are the papers'."""

import operator

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import reference
import signopt

M = 4
WIRES = ("one_bit", "two_bit", "psum")
PARAMS = {"w": jnp.arange(6.0).reshape(2, 3) - 2, "b": jnp.ones(5, jnp.bfloat16), "s": jnp.float32(1.0), "n": None}


def gradients(num_steps=5, leading=()):
    rng = np.random.default_rng(0)
    draw = lambda p: jnp.asarray(rng.normal(size=(num_steps, *leading, *p.shape)), p.dtype)
    return jax.tree.map(draw, PARAMS)


def assert_same_optimizer(ours, theirs):
    """The same updates and state: values, dtypes and structure."""
    state, their_state = ours.init(PARAMS), theirs.init(PARAMS)
    for step in range(5):
        chex.assert_trees_all_equal_structs(state, their_state)
        chex.assert_trees_all_equal_shapes_and_dtypes(state, their_state)
        chex.assert_trees_all_equal(state, their_state)
        g = jax.tree.map(operator.itemgetter(step), gradients())
        updates, state = ours.update(g, state, PARAMS)
        expected, their_state = theirs.update(g, their_state, PARAMS)
        chex.assert_trees_all_equal_dtypes(updates, expected)
        chex.assert_trees_all_equal(updates, expected)


SCHEDULE = optax.linear_schedule(0.1, 0.0, 10)


@pytest.mark.parametrize("rate", (0.1, SCHEDULE), ids=("constant", "schedule"))
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (signopt.signsgd, optax.sign_sgd),
        (signopt.signum, optax.signum),
        (lambda r: signopt.signum(r, 0.5), lambda r: optax.signum(r, 0.5)),
        (lambda r: signopt.signum(r, 0.5, "float32"), lambda r: optax.signum(r, 0.5, "float32")),
        (signopt.lion, optax.lion),
        (
            lambda r: signopt.lion(r, 0.8, 0.95, "float32", 0.1, {"w": True, "b": False, "s": False, "n": None}),
            lambda r: optax.lion(r, 0.8, 0.95, "float32", 0.1, {"w": True, "b": False, "s": False, "n": None}),
        ),
    ],
    ids=("signsgd", "signum", "signum-beta", "signum-dtype", "lion", "lion-everything"),
)
def test_without_an_axis_it_is_optaxs_own(rate, ours, theirs):
    assert_same_optimizer(ours(rate), theirs(rate))


def simulate(tx, stacked):
    """Updates `(steps, *shape)` of M workers, and the last state; weight decay sees PARAMS."""
    is_border = lambda s: isinstance(s, signopt.workers.state.PerWorkerState)
    state = tx.init(PARAMS)
    axes = jax.tree.map(lambda s: 0 if is_border(s) else None, state, is_leaf=is_border)
    update = jax.jit(jax.vmap(lambda g, s: tx.update(g, s, PARAMS), (0, axes), (None, axes), axis_name="w"))
    all_updates = []
    for step in range(5):
        updates, state = update(jax.tree.map(operator.itemgetter(step), stacked), state)
        all_updates.append(updates)
    return jax.tree.map(lambda *u: np.stack(u), *all_updates), state


def integer_gradients():
    """Small integers: momenta with decay 1/2 are exact."""
    rng = np.random.default_rng(1)
    draw = lambda p: jnp.asarray(rng.integers(-2, 3, (5, M, *p.shape)), p.dtype)
    return jax.tree.map(draw, PARAMS)


def expected_updates(wire, local, stacked):
    """NumPy's votes `(steps, *shape)`; `local` maps one worker's gradients to its ballots."""

    def leaf(g):
        g = np.asarray(g, np.float64)
        ballots = np.stack([local(g[:, m]) for m in range(M)], axis=1)
        return np.stack([reference.vote_on(wire, b, step) for step, b in enumerate(ballots)])

    return jax.tree.map(leaf, stacked)


OPTIMIZERS = {
    "signsgd": (lambda **kw: signopt.signsgd(1.0, **kw), reference.signsgd),
    "signum": (lambda **kw: signopt.signum(1.0, 0.5, **kw), lambda g: reference.signum(g, 0.5)[0]),
    "lion": (
        lambda **kw: signopt.lion(1.0, 0.5, 0.75, weight_decay=0.0, **kw),
        lambda g: reference.lion(g, 0.5, 0.75)[0],
    ),
}


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_with_an_axis_it_is_the_papers(name, wire):
    make, local = OPTIMIZERS[name]
    stacked = integer_gradients()
    updates, state = simulate(make(axis_name="w", wire=wire, num_workers=M), stacked)
    expected = jax.tree.map(lambda v: -v, expected_updates(wire, local, stacked))
    jax.tree.map(lambda u, e: np.testing.assert_array_equal(np.asarray(u, np.float64), e), updates, expected)
    assert optax.tree.get(state, "BorderState").count == 5


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_worker_that_breaks_is_counted_and_comes_back(name):
    """Worker 1's gradients are NaN for steps 1 and 2; nothing becomes non-finite and its later votes count."""
    make, local = OPTIMIZERS[name]
    stacked = integer_gradients()
    stacked = jax.tree.map(lambda g: g.at[1, 1].set(jnp.nan).at[2, 1].set(jnp.inf), stacked)
    updates, state = simulate(make(axis_name="w", num_workers=M), stacked)
    chex.assert_tree_all_finite((updates, state))
    expected = jax.tree.map(lambda v: -v, expected_updates("two_bit", local, stacked))
    jax.tree.map(lambda u, e: np.testing.assert_array_equal(np.asarray(u, np.float64), e), updates, expected)
    count = optax.tree.get(state, "total_notfinite")
    assert count.dtype == jnp.int32
    np.testing.assert_array_equal(count, [0, 2, 0, 0])
    # Negative control: had worker 1 stayed away for good, the last vote would differ.
    gone = jax.tree.map(lambda g: g.at[3:, 1].set(0), stacked)
    still = expected_updates("two_bit", local, gone)
    assert any(
        (np.asarray(s[-1]) != -np.asarray(e[-1])).any()
        for s, e in zip(jax.tree.leaves(still), jax.tree.leaves(expected), strict=True)
    )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weight_decay_comes_after_the_vote_and_obeys_its_mask(name):
    make, _ = OPTIMIZERS[name]
    stacked = integer_gradients()
    mask = {"w": True, "b": False, "s": True, "n": None}
    if name == "lion":
        make = lambda weight_decay=0.0, **kw: signopt.lion(1.0, 0.5, 0.75, weight_decay=weight_decay, **kw)
    plain, _ = simulate(make(axis_name="w", num_workers=M), stacked)
    decayed, _ = simulate(make(axis_name="w", num_workers=M, weight_decay=0.5, mask=mask), stacked)
    for leaf, decay in (("w", 0.5), ("b", 0.0), ("s", 0.5)):
        expected = np.asarray(plain[leaf], np.float64) - decay * np.asarray(PARAMS[leaf], np.float64)
        np.testing.assert_array_equal(np.asarray(decayed[leaf], np.float64), expected)


def test_weight_decay_without_an_axis_is_decoupled_too():
    g = jax.tree.map(lambda x: x[0], gradients())
    for make in (signopt.signsgd, signopt.signum):
        plain, decayed = make(1.0), make(1.0, weight_decay=0.5)
        u, _ = plain.update(g, plain.init(PARAMS), PARAMS)
        v, _ = decayed.update(g, decayed.init(PARAMS), PARAMS)
        np.testing.assert_array_equal(v["w"], u["w"] - 0.5 * PARAMS["w"])


def test_present_reaches_the_vote_through_every_ready_optimizer():
    stacked = jax.tree.map(lambda g: g[0], integer_gradients())
    present = np.arange(M) < 2
    for make, local in OPTIMIZERS.values():
        tx = make(axis_name="w")
        update = lambda g, here, tx=tx: tx.update(g, tx.init(PARAMS), PARAMS, present=here)[0]
        updates = jax.vmap(update, out_axes=None, axis_name="w")(stacked, present)
        ballots = np.stack([local(np.asarray(stacked["w"])[None, m])[0] for m in range(M)])
        np.testing.assert_array_equal(updates["w"], -reference.vote(ballots, present=present))


def test_the_default_wire_is_two_bit():
    stacked = integer_gradients()
    for make, _ in OPTIMIZERS.values():
        default, _ = simulate(make(axis_name="w", num_workers=M), stacked)
        two_bit, _ = simulate(make(axis_name="w", num_workers=M, wire="two_bit"), stacked)
        chex.assert_trees_all_equal(default, two_bit)


@pytest.mark.parametrize("accumulator_dtype", (None, jnp.float16, jnp.bfloat16, jnp.float32))
@pytest.mark.parametrize("dtype", (jnp.float16, jnp.bfloat16, jnp.float32))
def test_voted_signum_moves_in_the_dtype_of_the_gradient(dtype, accumulator_dtype):
    updates = list(remembering(dtype, accumulator_dtype, steps=2))
    assert [u.dtype for u in updates] == [dtype] * 2
    assert [u.tolist() for u in updates] == [[-1.0, 1.0]] * 2


def test_voted_signum_votes_with_momentum_that_does_not_fit_the_gradient():
    *_, last = remembering(jnp.float16, jnp.float32, steps=12)  # 2e-10 of momentum, 0 in float16
    assert last.tolist() == [-1.0, 1.0]


def remembering(dtype, accumulator_dtype, steps):
    """The updates of a voted signum after one small gradient, and none after it."""
    tx = signopt.signum(1.0, 0.5, accumulator_dtype, axis_name="w")
    gradient = jnp.array([[1e-6, -1e-6]], dtype)
    state = jax.vmap(tx.init)(gradient)
    update = jax.vmap(tx.update, axis_name="w")
    for _ in range(steps):
        updates, state = update(gradient, state)
        yield updates[0]
        gradient = jnp.zeros_like(gradient)


@pytest.mark.parametrize("axis_name", (None, "w"))
def test_signum_refuses_a_decay_rate_outside_0_1(axis_name):
    with pytest.raises(ValueError, match=r"`signum\(beta=\.\.\.\)` has to be in \[0, 1\), got 1\.5\."):
        signopt.signum(0.1, 1.5, axis_name=axis_name)


def test_every_transformation_is_of_optaxs_type_and_takes_extra_arguments():
    for make, _ in OPTIMIZERS.values():
        assert isinstance(make(), optax.GradientTransformationExtraArgs)
        assert isinstance(make(axis_name="w"), optax.GradientTransformationExtraArgs)


@pytest.mark.parametrize("bad", (False, True), ids=("finite", "bad"))
def test_optimizers_agree_on_one_worker(bad):
    """With one worker and two_bit, the vote over an axis of size 1 changes nothing, also where gradients are not finite."""
    stacked = gradients(5, (1,))
    if bad:
        stacked["w"] = stacked["w"].at[1, 0, 0].set(jnp.nan).at[2, 0, 1].set(-jnp.inf)
        stacked["s"] = stacked["s"].at[3].set(jnp.inf)
    pairs = [(OPTIMIZERS[name][0](axis_name="w", num_workers=1), OPTIMIZERS[name][0]()) for name in OPTIMIZERS]
    for with_axis, without in pairs:
        updates, _ = simulate(with_axis, stacked)
        state = without.init(PARAMS)
        for step in range(5):
            expected, state = without.update(jax.tree.map(operator.itemgetter((step, 0)), stacked), state, PARAMS)
            chex.assert_trees_all_equal(jax.tree.map(operator.itemgetter(step), updates), expected)
            chex.assert_tree_all_finite((expected, state))


def test_optax_s_own_momentum_would_be_lost_to_a_nan():
    """Negative control for the test above."""
    bad = jnp.array([jnp.nan])
    for ours, theirs in ((signopt.signum(1.0), optax.signum(1.0)), (signopt.lion(1.0), optax.lion(1.0))):
        lost = theirs.update(bad, theirs.init(bad), bad)[1]
        assert jnp.isnan(jax.tree.leaves(lost[0])[-1]).all()
        kept = ours.update(bad, ours.init(bad), bad)[1]
        assert (jax.tree.leaves(kept[0])[-1] == 0).all()


@pytest.mark.parametrize("name", ("signsgd", "signum", "lion", "signprox"))
@pytest.mark.parametrize("present", (True, False, jnp.asarray(False)))
def test_one_worker_without_an_axis_may_be_absent(name, present):
    kwargs = {"prox": signopt.prox.l1(0.0)} if name == "signprox" else {"weight_decay": 0.5}
    tx = getattr(signopt, name)(1.0, **kwargs)
    params, gradient = jnp.array([4.0, -2.0]), jnp.array([-1.0, -3.0])
    updates, _ = tx.update(gradient, tx.init(params), params, present=present)
    decay = -0.5 * params if "weight_decay" in kwargs else 0 * params
    np.testing.assert_array_equal(updates, decay + bool(present))


@pytest.mark.parametrize("axis_name", (None, "w"))
def test_nesterov_is_that_of_scale_by_signum(axis_name):
    rng = np.random.default_rng(0)
    g = rng.integers(-4, 5, (6, 1, 40)).astype(np.float32)
    tx = signopt.signum(1.0, 0.5, nesterov=True, axis_name=axis_name)
    state = tx.init(jnp.zeros(40))
    expected, _ = reference.signum(g[:, 0], 0.5, nesterov=True)
    plain, _ = reference.signum(g[:, 0], 0.5)
    assert (expected != plain).any()
    for step, row in enumerate(g):
        if axis_name is None:
            updates, state = tx.update(jnp.asarray(row[0]), state)
        else:
            mapped = jax.vmap(tx.update, (0, None), (None, 0), axis_name="w")(jnp.asarray(row), state)
            updates, state = mapped[0], jax.tree.map(lambda x: x[0], mapped[1])
        np.testing.assert_array_equal(updates, -expected[step])


ALIASES = {
    "signsgd": signopt.signsgd,
    "signum": signopt.signum,
    "lion": signopt.lion,
    "signprox": lambda rate, **kw: signopt.signprox(rate, prox=signopt.prox.l1(0.1), **kw),
}


@pytest.mark.parametrize("axis_name", (None, "w"))
@pytest.mark.parametrize("name", ALIASES)
def test_rates_that_are_none_are_refused(name, axis_name):
    make = lambda rate, **kw: ALIASES[name](rate, axis_name=axis_name, **kw)
    with pytest.raises(
        TypeError, match=rf"`{name}\(learning_rate=\.\.\.\)` has to be a number at least 0, got '1e-3'\."
    ):
        make("1e-3")
    for rate in (-1e-3, np.float32(-1.0), jnp.float32(-1.0), jnp.float32(jnp.nan)):
        with pytest.raises(ValueError, match=rf"`{name}\(learning_rate=\.\.\.\)` has to be at least 0, got (-|nan)"):
            make(rate)
    with pytest.raises(ValueError, match=rf"`{name}\(wire=\.\.\.\)` has to be one of 'one_bit', .*, got 'bits'\."):
        make(0.1, wire="bits")
    if name != "signprox":
        with pytest.raises(ValueError, match=rf"`{name}\(weight_decay=\.\.\.\)` has to be at least 0, got -0\.1\."):
            make(0.1, weight_decay=-0.1)
