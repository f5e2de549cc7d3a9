"""Every operator is the minimum that its docstring says, and behaves at the corners."""

# optax types every tree as a union of all that it may be; tests know which.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false

import functools
import itertools

import jax
from jax import test_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from signopt import _check
from signopt import prox as proxes
from signopt.prox import chains

# ---- the penalties in NumPy: entry by entry, and on whole arrays ---------------------------------

LAMBDA, OTHER, GAMMA = 0.7, 0.4, 2.5

ENTRYWISE = {
    "zero": (proxes.zero(), lambda x: 0 * x),
    "l1": (proxes.l1(LAMBDA), lambda x: LAMBDA * np.abs(x)),
    "l1_non_negative": (proxes.l1(LAMBDA, non_negative=True), lambda x: np.where(x < 0, np.inf, LAMBDA * x)),
    "l2_squared": (proxes.l2_squared(LAMBDA), lambda x: LAMBDA / 2 * x**2),
    "elastic_net": (proxes.elastic_net(LAMBDA, OTHER), lambda x: LAMBDA * np.abs(x) + OTHER / 2 * x**2),
    "mcp": (
        proxes.mcp(LAMBDA, GAMMA),
        lambda x: np.where(np.abs(x) <= GAMMA * LAMBDA, LAMBDA * np.abs(x) - x**2 / (2 * GAMMA), GAMMA * LAMBDA**2 / 2),
    ),
    "box": (proxes.box(-0.5, 1.0), lambda x: np.where((x < -0.5) | (x > 1), np.inf, 0.0)),
    "box_below": (proxes.box(lower=-0.5), lambda x: np.where(x < -0.5, np.inf, 0.0)),
    "non_negative": (proxes.non_negative(), lambda x: np.where(x < 0, np.inf, 0.0)),
    "binary": (proxes.binary(LAMBDA), lambda x: LAMBDA * np.abs(np.abs(x) - 1)),
}
STRUCTURED = {
    "l2": (proxes.l2(LAMBDA), lambda x: LAMBDA * np.sqrt(np.sum(x**2))),
    "group_l1": (proxes.group_l1(LAMBDA, axis=0), lambda x: LAMBDA * np.sqrt((x**2).sum(1)).sum()),
    "group_l1_columns": (proxes.group_l1(LAMBDA, axis=-1), lambda x: LAMBDA * np.sqrt((x**2).sum(0)).sum()),
    "group_l1_pairs": (
        proxes.group_l1(LAMBDA, axis=0, group_size=2),
        lambda x: LAMBDA * np.sqrt((x.reshape(-1, 2 * x.shape[1]) ** 2).sum(1)).sum(),
    ),
    "nuclear_norm": (proxes.nuclear_norm(LAMBDA), lambda x: LAMBDA * np.linalg.svd(x, compute_uv=False).sum()),
    "total_variation": (proxes.total_variation(LAMBDA), lambda x: LAMBDA * np.abs(np.diff(x)).sum()),
    "total_variation_down": (
        proxes.total_variation(LAMBDA, axis=0),
        lambda x: LAMBDA * np.abs(np.diff(x, axis=0)).sum(),
    ),
}
CONVEX = [name for name in (*ENTRYWISE, *STRUCTURED) if name not in ("mcp", "binary")]
ALL = {name: prox for name, (prox, _) in (ENTRYWISE | STRUCTURED).items()}
FINITE = [name for name in ALL if not name.startswith(("box", "non_negative", "l1_non"))]

every = pytest.mark.parametrize("name", ALL)
every_convex = pytest.mark.parametrize("name", CONVEX)


def matrix(rng, shape=(6, 4), scale=1.5):
    return rng.normal(size=shape) * scale


# ---- they are the minimum ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ENTRYWISE)
@pytest.mark.parametrize("step_size", (0.3, 1.0, 2.0, 4.0))
def test_an_entrywise_operator_is_the_brute_force_minimizer(name, step_size, x64):
    prox, penalty = ENTRYWISE[name]
    y = np.linspace(-3.05, 3.05, 62)
    grid = np.linspace(-4, 4, 80_001)  # holds every bound and every kink
    grid_cost = (grid - y[:, None]) ** 2 / (2 * step_size) + penalty(grid)
    x = np.asarray(prox(jnp.asarray(y), step_size))
    cost = (x - y) ** 2 / (2 * step_size) + penalty(x)
    np.testing.assert_array_less(cost, grid_cost.min(1) + 1e-12)
    if name in CONVEX:
        np.testing.assert_allclose(x, grid[grid_cost.argmin(1)], atol=1e-4)


def all_chain_minimizers(y, strength):
    """Every way to rise, fall or stay between neighbours gives one candidate; the best of them is the minimum."""
    best, best_cost = y, np.inf
    for moves in itertools.product((-1, 0, 1), repeat=len(y) - 1):
        moves = np.array(moves)
        segment = np.concatenate([[0], np.cumsum(moves != 0)])
        pull = np.append(moves, 0) - np.insert(moves, 0, 0)
        level = np.bincount(segment, y + strength * pull) / np.bincount(segment)
        x = level[segment]
        cost = ((x - y) ** 2).sum() / 2 + strength * np.abs(np.diff(x)).sum()
        if cost < best_cost:
            best, best_cost = x, cost
    return best


@pytest.mark.parametrize("strength", (0.0, 0.1, 0.7, 2.0, 50.0))
def test_total_variation_is_the_best_of_all_chains(strength, rng, x64):
    rows = np.concatenate([rng.normal(size=(12, 6)), rng.integers(-2, 3, size=(12, 6))])
    found = proxes.total_variation(strength)(jnp.asarray(rows, jnp.float64), 1.0)
    np.testing.assert_allclose(found, [all_chain_minimizers(y, strength) for y in rows], atol=1e-13)


@every_convex
@pytest.mark.parametrize("step_size", (0.2, 3.0))
def test_what_is_taken_away_is_a_subgradient(name, step_size, rng, x64):
    prox, penalty = (ENTRYWISE | STRUCTURED)[name]
    total = lambda x: np.sum(penalty(x))
    y = matrix(rng)
    x = np.asarray(prox(jnp.asarray(y), step_size))
    slope = (y - x) / step_size
    inside = lambda z: np.asarray(prox(jnp.asarray(z), 0.0)) if name not in FINITE else z
    for size in (1e-3, 0.1, 1.0, 10.0):
        for _ in range(20):
            z = inside(x + size * rng.normal(size=x.shape))
            assert total(z) >= total(x) + np.sum(slope * (z - x)) - 1e-12 * (1 + size)


@every_convex
def test_convex_operators_are_firmly_nonexpansive(name, rng, x64):
    prox = ALL[name]
    for scale in (0.1, 1.0, 5.0):
        a, b = matrix(rng, scale=scale), matrix(rng, scale=scale)
        gap = np.asarray(prox(jnp.asarray(a), 0.8)) - np.asarray(prox(jnp.asarray(b), 0.8))
        assert np.sum(gap**2) <= np.sum(gap * (a - b)) + 1e-12


@pytest.mark.parametrize("name", ("mcp", "binary"))
def test_the_others_are_not(name, x64):
    """The law above can fail: near their jumps and slopes the two that are not convex stretch."""
    a, b = jnp.array([0.75]), jnp.array([0.85])
    if name == "binary":
        a, b = -a / 100, b / 100
    stretched = ALL[name](a, 0.9) - ALL[name](b, 0.9)
    assert jnp.abs(stretched)[0] > jnp.abs(a - b)[0]


def dual_ball(name, y, radius):
    """The projection onto the ball of the dual norm: the operator of the conjugate."""
    if name == "l1":
        return np.clip(y, -radius, radius)
    if name == "l2":
        return y * min(1, radius / np.sqrt((y**2).sum()))
    if name == "group_l1":
        return y * np.minimum(1, radius / np.sqrt((y**2).sum(1, keepdims=True)))
    if name == "nuclear_norm":
        u, s, vt = np.linalg.svd(y, full_matrices=False)
        return u * np.minimum(s, radius) @ vt
    if name == "l2_squared":  # the conjugate is a square as well
        return y / (1 + 1 / radius)
    return {"zero": 0 * y, "non_negative": np.minimum(y, 0)}[name]


@pytest.mark.parametrize("name", ("l1", "l2", "group_l1", "nuclear_norm", "l2_squared", "zero", "non_negative"))
def test_the_moreau_identity_holds(name, rng, x64):
    """y = prox_{tau r}(y) + tau prox_{r* / tau}(y / tau); for norms the second term is a projection."""
    for scale in (0.3, 3.0):
        y = matrix(rng, scale=scale)
        whole = np.asarray(ALL[name](jnp.asarray(y), 0.9)) + dual_ball(name, y, 0.9 * LAMBDA)
        np.testing.assert_allclose(whole, y, atol=1e-13)


@pytest.mark.slow
def test_mcp_agrees_with_skglm(rng, x64):
    from skglm.utils.prox_funcs import prox_MCP
    from skglm.utils.prox_funcs import value_MCP

    for strength, gamma, step_size in ((0.5, 3.0, 1.0), (1.3, 1.1, 0.9), (0.2, 20.0, 0.05)):
        y = rng.normal(size=200) * 3
        ours = proxes.mcp(strength, gamma)
        theirs = [prox_MCP(value, step_size, strength, gamma) for value in y]
        np.testing.assert_allclose(ours(jnp.asarray(y), step_size), theirs, atol=1e-13)
        np.testing.assert_allclose(ours.value(jnp.asarray(y)), value_MCP(y, strength, gamma), rtol=1e-13)


@every
def test_the_value_is_the_penalty(name, rng, x64):
    prox, penalty = (ENTRYWISE | STRUCTURED)[name]
    for x in (matrix(rng), np.asarray(prox(jnp.asarray(matrix(rng)), 1.0)), np.zeros((6, 4))):
        np.testing.assert_allclose(prox.value({"x": jnp.asarray(x), "none": None}), np.sum(penalty(x)), rtol=1e-12)


@every
@pytest.mark.parametrize("step_size", (0.0, 0.5, 5.0))
def test_the_residual_is_what_the_operator_takes_away(name, step_size, rng):
    y = jnp.asarray(matrix(rng), jnp.float32)
    removed = ALL[name].residual(y, step_size)
    np.testing.assert_allclose(removed, y - ALL[name](y, step_size), atol=4e-6)  # entries up to 6, 5 eps


# ---- total variation, at length -----------------------------------------------------------------------


def jumping(n, rng):
    steps = np.repeat(rng.normal(size=n // 50 + 1) * 3, 50)[:n]
    return {
        "noise": rng.normal(size=n),
        "steps": steps + 0.5 * rng.normal(size=n),
        "walk": np.cumsum(rng.normal(size=n)),
        "ramp": np.linspace(0, 1, n),
        "growth": np.exp(np.linspace(-30, 30, n)),
        "ties": rng.integers(0, 3, n),
        "teeth": np.where(np.arange(n) % 2, 1.0, -1.0) * np.arange(n),
    }


@pytest.mark.parametrize("n", (1, 2, 3, 127, 128, 129, 20_000))
@pytest.mark.parametrize("strength", (0.2, 5.0))
def test_total_variation_has_a_dual_certificate(n, strength, rng, x64):
    """x is optimal iff the running sum of y - x stays within the strength and reaches it, with its sign, at a jump."""
    solve = jax.jit(chains.denoise)
    for name, y in jumping(n, rng).items():
        x = np.asarray(solve(jnp.asarray(y, jnp.float64), strength))
        dual = np.cumsum(y - x)
        rounding = n**0.5 * 1e-15 * max(np.abs(np.cumsum(y)).max(), np.abs(y).max(), strength) + 1e-13
        assert abs(dual[-1]) <= rounding, name
        assert np.all(np.abs(dual) <= strength + rounding), name
        jump = np.diff(x)
        clear = np.abs(jump) > 1e-9 * np.abs(y).max()  # smaller ones are ties that rounding broke
        np.testing.assert_allclose(dual[:-1][clear], -strength * np.sign(jump[clear]), atol=rounding, err_msg=name)


def test_total_variation_in_float32_is_within_rounding_of_float64(rng):
    y = rng.normal(size=100_000).astype(np.float32)
    narrow = chains.denoise(jnp.asarray(y), 1.0)
    with jax.enable_x64(True):
        wide = chains.denoise(jnp.asarray(y, jnp.float64), 1.0)
    np.testing.assert_allclose(narrow, wide, atol=20 * np.finfo(np.float32).eps)


def test_a_strong_total_variation_gives_the_mean_and_none_gives_the_data(rng):
    y = jnp.asarray(rng.normal(size=1000), jnp.float32)
    np.testing.assert_allclose(proxes.total_variation(1e4)(y, 1.0), jnp.full(1000, y.mean()), atol=1e-7)
    np.testing.assert_array_equal(proxes.total_variation(0.0)(y, 1.0), y)


def test_total_variation_under_vmap_is_row_by_row(rng):
    rows = jnp.asarray(rng.normal(size=(5, 200)), jnp.float32)
    one = lambda y, strength: chains.denoise(y, strength)
    strengths = jnp.array([0.0, 0.1, 1.0, 10.0, 1000.0])
    batched = jax.vmap(one)(rows, strengths)
    np.testing.assert_array_equal(batched, jnp.stack([one(*pair) for pair in zip(rows, strengths, strict=True)]))
    np.testing.assert_array_equal(chains.denoise(rows, 0.5), jax.vmap(lambda y: one(y, 0.5))(rows))


# ---- corners ----------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("dtype", (jnp.bfloat16, jnp.float16))
def test_narrow_floats_get_the_float32_result_rounded(name, dtype, rng):
    y = jnp.asarray(matrix(rng), dtype)
    expected = ALL[name](y.astype(jnp.float32), 0.5).astype(dtype)
    found = ALL[name](y, 0.5)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, expected)


@every
def test_leaves_may_be_empty_none_or_masked(name):
    tree = {"a": jnp.zeros((0, 4)), "b": None, "c": (optax.MaskedNode(), jnp.ones((2, 4), jnp.bfloat16))}
    out = ALL[name](tree, 0.5)
    assert jax.tree.map(jnp.shape, out) == jax.tree.map(jnp.shape, tree)
    assert out["c"][1].dtype == jnp.bfloat16
    assert jnp.isfinite(ALL[name].value({"a": tree["a"]}))
    assert jax.tree.map(jnp.shape, ALL[name].residual(tree, 0.5)) == jax.tree.map(jnp.shape, tree)


@pytest.mark.parametrize("name", STRUCTURED)
def test_a_zero_leaf_stays_zero_with_finite_gradients(name):
    zero, prox = jnp.zeros((4, 4)), ALL[name]
    np.testing.assert_array_equal(prox(zero, 0.5), zero)
    through = jax.grad(lambda x: jnp.sum(prox(x, 0.5) ** 2 + prox.residual(x, 0.5)))(zero)
    assert jnp.all(jnp.isfinite(through))


@pytest.mark.parametrize("name", ("l2", "group_l1"))
@pytest.mark.parametrize("size", (1e-30, 1e30))
def test_norms_neither_overflow_nor_vanish(name, size):
    y = jnp.full((2, 8), size, jnp.float32)
    penalty = {"l2": proxes.l2, "group_l1": proxes.group_l1}[name]
    norm = size * (16 if name == "l2" else 8) ** 0.5
    np.testing.assert_allclose(penalty(norm / 4)(y, 1.0), 0.75 * y, rtol=1e-6)
    np.testing.assert_allclose(penalty(1.0).value(y), norm * (1 if name == "l2" else 2), rtol=1e-6)


STRENGTHS = {
    "l1": proxes.l1,
    "l2": proxes.l2,
    "l2_squared": proxes.l2_squared,
    "elastic_net": lambda strength: proxes.elastic_net(strength, 2 * strength),
    "mcp": proxes.mcp,
    "binary": proxes.binary,
    "group_l1": proxes.group_l1,
    "nuclear_norm": proxes.nuclear_norm,
    "total_variation": proxes.total_variation,
}


@pytest.mark.parametrize("name", STRENGTHS)
def test_a_traced_strength_is_a_strength(name, rng):
    y = jnp.asarray(matrix(rng), jnp.bfloat16)
    both = lambda s, t: (STRENGTHS[name](s)(y, t), STRENGTHS[name](s).residual(y, t), STRENGTHS[name](s).value(y))
    traced = jax.jit(both)(0.3, 0.5)
    for ours, expected in zip(traced, both(0.3, 0.5), strict=True):
        assert ours.dtype == expected.dtype
        np.testing.assert_allclose(ours.astype(jnp.float32), expected.astype(jnp.float32), rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("name", STRENGTHS)
def test_operators_are_differentiable_where_they_are_smooth(name, rng, x64):
    y = jnp.asarray(matrix(rng))  # no entry, norm or singular value of it is on a kink
    apply = lambda y, strength, step_size: STRENGTHS[name](strength)(y, step_size)
    test_util.check_grads(apply, (y, 0.3, 0.7), order=1, modes=("fwd", "rev"), eps=1e-6)


def test_the_nuclear_norm_is_differentiable_where_singular_values_coincide(rng, x64):
    """The derivative of the decomposition does not exist there; that of the operator does."""
    rotate, _ = np.linalg.qr(rng.normal(size=(4, 4)))
    for values, shape in (((2.0, 2.0, 2.0), (5, 3)), ((2.0, 2.0, 0.0), (3, 5)), ((0.2, 0.2, 0.0, 3.0), (4, 4))):
        y = np.zeros(shape)
        np.fill_diagonal(y, values)
        y = jnp.asarray(rotate @ y) if shape[0] == 4 else jnp.asarray(y)
        apply = lambda y: proxes.nuclear_norm(1.0)(y, 1.0)
        test_util.check_grads(apply, (y,), order=1, modes=("fwd", "rev"), eps=1e-6)


@every
def test_operators_compose_with_jit_and_vmap(name, rng):
    rows = jnp.asarray(matrix(rng, (3, 6, 4)), jnp.float32)
    one_by_one = jnp.stack([ALL[name](row, 0.5) for row in rows])
    np.testing.assert_allclose(jax.jit(jax.vmap(lambda x: ALL[name](x, 0.5)))(rows), one_by_one, atol=3e-6)


# ---- groups -----------------------------------------------------------------------------------------


def test_groups_are_named_by_the_index_along_their_axes(rng):
    kernel = jnp.asarray(rng.normal(size=(3, 3, 4, 6)), jnp.float32)  # a convolution
    alive = lambda prox: np.asarray(prox(kernel, 1.0) != 0)
    norms = lambda axes: np.sqrt((np.asarray(kernel) ** 2).sum(axes))
    out = norms((0, 1, 2))
    np.testing.assert_array_equal(
        alive(proxes.group_l1(float(np.median(out)), axis=3)).all((0, 1, 2)), out > np.median(out)
    )
    pixel = norms((2, 3))
    strength = float(np.median(pixel) * 1.01)
    np.testing.assert_array_equal(alive(proxes.group_l1(strength, axis=(0, 1))).all((2, 3)), pixel > strength)


def test_groups_of_one_are_l1(rng):
    y = jnp.asarray(rng.normal(size=20), jnp.float32)
    np.testing.assert_allclose(proxes.group_l1(0.5)(y, 1.0), proxes.l1(0.5)(y, 1.0), atol=1e-6)


# ---- made from others ---------------------------------------------------------------------------------

PROJECTIONS = {
    "projection_box": (-0.5, 0.5),
    "projection_halfspace": (np.ones(5, np.float32), 0.5),
    "projection_hypercube": (0.5,),
    "projection_hyperplane": (np.ones(5, np.float32), 0.5),
    "projection_l1_ball": (1.0,),
    "projection_l1_sphere": (1.0,),
    "projection_l2_ball": (1.0,),
    "projection_l2_sphere": (1.0,),
    "projection_linf_ball": (0.5,),
    "projection_non_negative": (),
    "projection_simplex": (1.0,),
    "projection_vector": (np.ones(5, np.float32),),
}


def test_every_projection_of_optax_is_tried():
    assert {name for name in dir(optax.projections) if name.startswith("projection_")} == set(PROJECTIONS)


@pytest.mark.parametrize("name", PROJECTIONS)
@pytest.mark.parametrize("dtype", (jnp.float32, jnp.bfloat16))
def test_a_projection_is_an_operator_whose_value_is_zero_inside_and_inf_outside(name, dtype):
    prox = proxes.from_projection(getattr(optax.projections, name), *PROJECTIONS[name])
    y = jnp.array([3.0, -2.0, 5.0, 1.5, -4.0], dtype)
    x = prox(y, 0.1)
    assert x.dtype == dtype
    expected = getattr(optax.projections, name)(y.astype(jnp.float32), *PROJECTIONS[name])
    np.testing.assert_array_equal(x, expected.astype(dtype))
    assert prox.value(x) == 0 and prox.value(y) == jnp.inf
    again = prox(x.astype(jnp.float32), 7.0)
    np.testing.assert_allclose(again, x.astype(jnp.float32), atol=3 * float(jnp.finfo(dtype).eps))


def test_a_projection_may_couple_the_leaves_of_a_tree():
    prox = proxes.from_projection(optax.projections.projection_l2_ball, scale=1.0)
    out = prox({"a": jnp.array([3.0]), "b": jnp.array([4.0])}, 1.0)
    np.testing.assert_allclose([out["a"][0], out["b"][0]], [0.6, 0.8], rtol=1e-6)


TREE = {"dense": {"kernel": np.array([[0.5, -2.0]], np.float32), "bias": np.array([0.5], np.float32)}, "none": None}


@pytest.mark.parametrize(
    "mask",
    (
        {"dense": {"kernel": True, "bias": False}, "none": None},
        lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree),
    ),
)
def test_masked_leaves_are_left_alone_and_not_counted(mask):
    prox = proxes.masked(proxes.l1(1.0), mask)
    out, removed = prox(TREE, 1.0), prox.residual(TREE, 1.0)
    np.testing.assert_array_equal(out["dense"]["kernel"], [[0.0, -1.0]])
    np.testing.assert_array_equal(out["dense"]["bias"], [0.5])
    np.testing.assert_array_equal(removed["dense"]["kernel"], [[0.5, -1.0]])
    np.testing.assert_array_equal(removed["dense"]["bias"], [0.0])
    assert prox.value(TREE) == 2.5
    assert prox.separable


def test_a_mask_may_be_a_prefix():
    prox = proxes.masked(proxes.l1(1.0), {"dense": True, "none": False})
    assert prox.value(TREE) == 3.0


def test_a_mask_hides_leaves_that_the_operator_could_not_take():
    kernels = proxes.masked(proxes.group_l1(1.0, axis=1), lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree))
    np.testing.assert_array_equal(kernels(TREE, 1.0)["dense"]["kernel"], [[0.0, -1.0]])


def many_penalties():
    return [proxes.l1(0.5), proxes.l2_squared(1.0), proxes.l2(0.25)]


def test_a_sampled_penalty_is_the_mean_of_all_when_all_are_drawn(rng):
    x = {"a": jnp.asarray(rng.normal(size=(3, 2)), jnp.float32)}
    prox = proxes.sampled(many_penalties(), num_samples=3, key=jax.random.key(0))
    for found in (prox, prox.draw(0), prox.draw(1)):
        mean = lambda what: np.mean([np.asarray(what(one)) for one in many_penalties()], axis=0)
        np.testing.assert_allclose(found(x, 0.5)["a"], mean(lambda one: one(x, 0.5)["a"]), atol=1e-6)
        np.testing.assert_allclose(found.residual(x, 0.5)["a"], mean(lambda one: one.residual(x, 0.5)["a"]), atol=1e-6)
        np.testing.assert_allclose(found.value(x), mean(lambda one: one.value(x)), rtol=1e-6)


def test_draws_are_without_replacement_fair_and_repeatable():
    num_penalties, num_samples, draws = 10, 3, 2000
    one_hot = lambda b: proxes.Prox(lambda x, step_size: jax.nn.one_hot(b, num_penalties) + 0 * x)
    prox = proxes.sampled(one_hot, num_penalties=num_penalties, num_samples=num_samples, key=jax.random.key(3))
    zero = jnp.zeros(num_penalties)
    drawn = jax.jit(jax.vmap(lambda step: prox.draw(step)(zero, 1.0)))(jnp.arange(draws))
    np.testing.assert_allclose(np.sort(drawn, axis=1)[:, -num_samples:], 1 / num_samples, rtol=1e-6)
    share = np.mean(np.asarray(drawn) > 0, axis=0)
    error = 5 * np.sqrt(0.3 * 0.7 / draws)
    np.testing.assert_allclose(share, num_samples / num_penalties, atol=error)
    assert not np.allclose(np.mean(np.asarray(drawn)[:1] > 0, axis=0), 0.3, atol=error)  # one draw is not fair
    np.testing.assert_array_equal(prox.draw(7)(zero, 1.0), prox.draw(7)(zero, 1.0))
    assert jnp.any(prox.draw(7, 0)(zero, 1.0) != prox.draw(7, 1)(zero, 1.0))


def test_polish_lands_on_zeros_in_the_dtype_of_the_parameters():
    params = {"a": jnp.array([1.0, 1e-3, -2e-3], jnp.bfloat16), "none": None}
    out = proxes.polish(params, proxes.l1(1.0), 2.0**-7)["a"]
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out.astype(jnp.float32), [1 - 2**-7, 0, 0])


def test_polish_with_the_gradient_leaves_a_minimizer_where_it_is():
    minimizer, slope = jnp.array([0.75, 0.0, -2.0]), jnp.array([-0.5, 0.375, 0.5])
    np.testing.assert_array_equal(proxes.polish(minimizer, proxes.l1(0.5), 2.0, gradient=slope), minimizer)
    assert jnp.any(proxes.polish(minimizer, proxes.l1(0.5), 2.0) != minimizer)


# ---- bad input ----------------------------------------------------------------------------------------

ONES = jnp.ones((6, 4))


def call(prox, x=ONES, step_size=1.0):
    return lambda: prox(x, step_size)


BAD = {
    **{
        f"{name}({argument})": (
            functools.partial(make, **{argument: -0.5}),
            ValueError,
            f"`{name}({argument}=...)` has to be at least 0, got -0.5.",
        )
        for name, make, argument in (
            ("l1", proxes.l1, "strength"),
            ("l2", proxes.l2, "strength"),
            ("l2_squared", proxes.l2_squared, "strength"),
            ("elastic_net", functools.partial(proxes.elastic_net, l2_strength=1.0), "l1_strength"),
            ("elastic_net", functools.partial(proxes.elastic_net, 1.0), "l2_strength"),
            ("mcp", proxes.mcp, "strength"),
            ("binary", proxes.binary, "strength"),
            ("group_l1", proxes.group_l1, "strength"),
            ("nuclear_norm", proxes.nuclear_norm, "strength"),
            ("total_variation", proxes.total_variation, "strength"),
        )
    },
    "nan": (lambda: proxes.l1(float("nan")), ValueError, "`l1(strength=...)` has to be at least 0, got nan."),
    "gamma": (lambda: proxes.mcp(1.0, 0.0), ValueError, "`mcp(gamma=...)` has to be positive, got 0.0."),
    "bounds": (
        lambda: proxes.box(1.0, 0.0),
        ValueError,
        "`box(lower=...)` has to be at most `upper`, got lower=1.0 and upper=0.0.",
    ),
    "group_size": (
        lambda: proxes.group_l1(1.0, group_size=0),
        ValueError,
        "`group_l1(group_size=...)` has to be at least 1, got 0.",
    ),
    "groups that do not divide": (
        call(proxes.group_l1(1.0, axis=1, group_size=3)),
        ValueError,
        "`group_l1(group_size=...)` has to divide axis 1 of every leaf, got 3 for a leaf of shape (6, 4). Choose a "
        "divisor of 4, or leave that leaf out with `signopt.prox.masked`.",
    ),
    "group axis": (
        call(proxes.group_l1(1.0, axis=2)),
        ValueError,
        "`group_l1(axis=...)` has to be an axis of every leaf, got 2 for a leaf of shape (6, 4). Leave that leaf out "
        "with `signopt.prox.masked`.",
    ),
    "variation axis": (
        call(proxes.total_variation(1.0), jnp.float32(1.0)),
        ValueError,
        "`total_variation(axis=...)` has to be an axis of every leaf, got -1 for a leaf of shape (). Leave that leaf "
        "out with `signopt.prox.masked`.",
    ),
    "no matrix": (
        call(proxes.nuclear_norm(1.0), jnp.ones(3)),
        ValueError,
        "`nuclear_norm(...)` has to be given matrices, got a leaf of shape (3,). Leave it out with "
        "`signopt.prox.masked`.",
    ),
    "step_size": (
        call(proxes.l1(1.0), step_size=-1.0),
        ValueError,
        "`prox(step_size=...)` has to be at least 0, got -1.0.",
    ),
    "integers": (
        call(proxes.l1(1.0), {"a": jnp.arange(3)}),
        TypeError,
        "`prox(x=...)` has to be given floating-point leaves, got int32 at `x['a']`. Leave it out with "
        "`signopt.prox.masked`.",
    ),
    "shape": (
        call(proxes.Prox(lambda x, step_size: x[:3])),
        ValueError,
        "`prox(x, step_size)` has to keep shapes, got (3, 4) for `x` of shape (6, 4). Return one number for each entry.",
    ),
    "dtype": (
        call(proxes.Prox(lambda x, step_size: x.astype(jnp.bfloat16))),
        TypeError,
        "`prox(x, step_size)` has to keep dtypes, got bfloat16 for `x` of dtype float32. End it with "
        "`.astype(x.dtype)`.",
    ),
    "structure": (
        call(proxes.Prox(lambda x, step_size: (x, x))),
        ValueError,
        "`prox(x, step_size)` has to return a tree like `x`, got PyTreeDef((*, *)) for PyTreeDef(*). Apply it leaf by "
        "leaf with `jax.tree.map`.",
    ),
    "value": (
        lambda: proxes.Prox(lambda x, step_size: x).value(ONES),
        ValueError,
        "`Prox.value` has to be called on a penalty that knows its value, got one without. Make it with "
        "`Prox(apply, penalty_value=...)`.",
    ),
    "masked": (
        lambda: proxes.masked(3.0, True),
        TypeError,
        "`masked(prox=...)` has to be a `signopt.prox.Prox` or a function `prox(x, step_size) -> x`, got 3.0. "
        "`signopt.prox` has the usual ones, such as `signopt.prox.l1(1e-4)`.",
    ),
    "polish": (
        lambda: proxes.polish(ONES, proxes.l1(1.0), 0.0),
        ValueError,
        "`polish(step_size=...)` has to be positive, got 0.0.",
    ),
    "num_samples": (
        lambda: proxes.sampled(many_penalties(), num_samples=4, key=jax.random.key(0)),
        ValueError,
        "`sampled(num_samples=...)` has to be in 1 ... 3, got 4.",
    ),
    "num_penalties": (
        lambda: proxes.sampled(proxes.l1, num_samples=1, key=jax.random.key(0)),
        ValueError,
        "`sampled(num_penalties=...)` has to be given when `penalties` is a function, got None. Say how many penalties "
        "there are.",
    ),
    "wrong num_penalties": (
        lambda: proxes.sampled(many_penalties(), num_penalties=2, num_samples=1, key=jax.random.key(0)),
        ValueError,
        "`sampled(num_penalties=...)` has to be the number of penalties, 3, got 2. Leave it out.",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_with_the_cure(case):
    bad_call, error, sentence = BAD[case]
    with pytest.raises(error) as caught:
        bad_call()
    assert str(caught.value) == sentence


def test_a_traced_strength_is_not_looked_at():
    jax.jit(lambda strength: _check.at_least(0, strength, "l1", "strength"))(-1.0)
