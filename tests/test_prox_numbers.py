"""Every penalty against a float64 reference over many orders of magnitude, and with entries that are not finite."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from signopt import prox as proxes
from signopt import scale_by_prox_gradient
from test_prox import all_chain_minimizers

EPS = float(np.finfo(np.float32).eps)
GAMMA = 3.0  # in units of the step size, which is 1 here

# ---- references: prox(y) at step size 1 and value(y), in float64 NumPy ------------------------------------------------


def soft(y, s):
    return np.sign(y) * np.maximum(np.abs(y) - s, 0)


def mcp(y, s):
    size = np.abs(y)
    line = np.sign(y) * (size - s) * (GAMMA / (GAMMA - 1))
    return np.where(size <= s, 0, np.where(size > GAMMA * s, y, line))


def mcp_value(y, s):
    size = np.abs(y)
    return np.where(size <= GAMMA * s, s * size - size**2 / (2 * GAMMA), GAMMA * s**2 / 2).sum()


def binary(y, s):
    side, size = np.where(y < 0, -1, 1), np.abs(y)
    return np.where(np.abs(size - 1) <= s, side, y - side * np.sign(size - 1) * s)


def shrink_rows(y, s):
    norm = np.sqrt((y**2).sum(-1, keepdims=True))
    return np.where(norm > s, y - y * (s / np.where(norm > 0, norm, 1)), 0)


def nuclear(y, s):
    u, sigma, vt = np.linalg.svd(y, full_matrices=False)
    return u * np.maximum(sigma - s, 0) @ vt


def chains(y, s):
    return np.stack([all_chain_minimizers(row, s) for row in y])


# name: (penalty of a strength, prox, value, whether errors are relative to an entry, a row or the whole)
CASES = {
    "zero": (lambda s: proxes.zero(), lambda y, s: y, lambda y, s: 0.0, None),
    "l1": (proxes.l1, soft, lambda y, s: s * np.abs(y).sum(), None),
    "l1_non_negative": (
        functools.partial(proxes.l1, non_negative=True),
        lambda y, s: np.maximum(y - s, 0),
        lambda y, s: np.inf,
        None,
    ),
    "l2_squared": (proxes.l2_squared, lambda y, s: y / (1 + s), lambda y, s: s / 2 * (y**2).sum(), None),
    "elastic_net": (
        lambda s: proxes.elastic_net(s, s),
        lambda y, s: soft(y, s) / (1 + s),
        lambda y, s: s * np.abs(y).sum() + s / 2 * (y**2).sum(),
        None,
    ),
    "mcp": (lambda s: proxes.mcp(s, GAMMA), mcp, mcp_value, None),
    "box": (lambda s: proxes.box(-s, s), lambda y, s: np.clip(y, -s, s), lambda y, s: np.inf, None),
    "non_negative": (lambda s: proxes.non_negative(), lambda y, s: np.maximum(y, 0), lambda y, s: np.inf, None),
    "binary": (proxes.binary, binary, lambda y, s: s * np.abs(np.abs(y) - 1).sum(), None),
    "l2": (proxes.l2, lambda y, s: shrink_rows(y.reshape(1, -1), s).reshape(y.shape), None, (0, 1)),
    "group_l1": (proxes.group_l1, shrink_rows, lambda y, s: s * np.sqrt((y**2).sum(-1)).sum(), 1),
    "nuclear_norm": (
        proxes.nuclear_norm,
        nuclear,
        lambda y, s: s * np.linalg.svd(y, compute_uv=False).sum(),
        (0, 1),
    ),
    "total_variation": (proxes.total_variation, chains, lambda y, s: s * np.abs(np.diff(y)).sum(), 1),
}


@functools.cache
def program():
    """All penalties in one program, whose strength is traced."""

    def run(y, s):
        made = {name: make(s) for name, (make, *_) in CASES.items()}
        return {name: (prox(y, 1.0), prox.residual(y, 1.0), prox.value(y)) for name, prox in made.items()}

    return jax.jit(run)


def check(y, s):
    y, s = np.asarray(y, np.float32), np.float32(s)
    found = jax.device_get(program()(y, s))
    y, s = y.astype(np.float64), float(s)
    for name, (_, prox, value, axes) in CASES.items():
        out, removed, worth = (np.asarray(x, np.float64) for x in found[name])
        expected = prox(y, s)
        size = np.abs(y) if axes is None else np.abs(y).max(axes, keepdims=True)
        size = np.maximum(size, np.abs(expected))
        allowed = 8 * EPS * size * (4 if axes == (0, 1) else 1) + 4e-38
        assert np.all(np.abs(out - expected) <= allowed), (name, out, expected)
        assert np.all(np.abs(removed - (y - expected)) <= 2 * allowed), name
        if value is not None:
            right = value(y, s)
            right = np.inf if right > np.finfo(np.float32).max else right
            assert worth == right or abs(worth - right) <= 32 * EPS * abs(right) + 1e-37, (name, worth, right)


MIXED = np.random.default_rng(0).normal(size=(3, 6)) * 10.0 ** np.array([-12, -8, -4, -2, 0, 0])


@pytest.mark.parametrize("exponent", range(-36, 37, 6))
def test_operators_and_values_are_right_at_every_scale(exponent):
    """Entries and strengths of one scale; a prox of a norm scales along."""
    y = np.random.default_rng(1).normal(size=(3, 6))
    for strength in (0.0, 0.1, 1.0, 3.0):
        check(y * 10.0**exponent, strength * 10.0**exponent)


@pytest.mark.parametrize("strength", (0.0, *10.0 ** np.arange(-12.0, 13.0, 3)))
def test_small_entries_survive_beside_large_ones_at_every_strength(strength):
    check(MIXED, strength)
    check(MIXED[:, ::-1], strength)


def test_rows_near_the_largest_float_do_not_overflow():
    largest = np.float32(3e38)
    y = np.array([[1, -1, 1, 1, -1, 0.5], [1e-30, 2e-30, 0, 0, 0, 1e-30], [1, 1, 1, 1, 1, 1]]) * largest
    found = jax.device_get(jax.jit(lambda y, s: proxes.total_variation(s)(y, 1.0))(np.float32(y), np.float32(1e38)))
    expected = chains(y.astype(np.float64) / 1e38, 1.0) * 1e38
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e32)
    np.testing.assert_allclose(found[1], np.full(6, y[1].mean()), rtol=1e-5)
    for y in (jnp.array([1e38, 1e38]), jnp.array([1e-37, 1e-37])):
        norm = math.sqrt(2) * float(y[0])
        np.testing.assert_allclose(proxes.l2(1.0).value(y), norm, rtol=1e-6)
        np.testing.assert_allclose(proxes.l2(norm / 4)(y, 1.0), 0.75 * y, rtol=1e-6)


BAD_ROW = {"l2": slice(None), "nuclear_norm": slice(None), "group_l1": 1, "total_variation": 1}


@pytest.mark.parametrize("strength", (0.0, 0.3))
def test_nan_shows_where_it_is_and_in_what_hangs_on_it_and_nowhere_else(strength):
    y = np.random.default_rng(2).normal(size=(3, 6)).astype(np.float32)
    bad = y.copy()
    bad[1, 2] = np.nan
    clean, found = jax.device_get((program()(y, np.float32(strength)), program()(bad, np.float32(strength))))
    for name in CASES:
        spoilt = np.zeros((3, 6), bool)
        spoilt[BAD_ROW.get(name, (1, 2))] = True
        np.testing.assert_array_equal(np.isnan(found[name][0]), spoilt, err_msg=name)
        np.testing.assert_allclose(found[name][0][~spoilt], clean[name][0][~spoilt], rtol=1e-6, err_msg=name)
        assert math.isnan(found[name][2]) or name == "zero" or not np.isfinite(clean[name][2]), name


def test_an_infinite_entry_leaves_its_neighbours_alone():
    y = np.random.default_rng(3).normal(size=(3, 6)).astype(np.float32)
    for sign in (1.0, -1.0):
        bad = y.copy()
        bad[1, 2] = sign * np.inf
        found = jax.device_get(program()(bad, np.float32(0.3)))
        huge = bad.copy()
        huge[1, 2] = sign * 1e30
        like = jax.device_get(program()(huge, np.float32(0.3)))
        others = np.ones((3, 6), bool)
        others[1, 2] = False
        for name, (out, _, worth) in found.items():
            if name == "nuclear_norm":  # there is no limit
                assert np.all(np.isnan(out)) and worth == np.inf
                continue
            np.testing.assert_allclose(out[others], like[name][0][others], rtol=1e-5, atol=1e-6, err_msg=name)
            right = sign * np.inf
            if name == "box":
                right = sign * np.float32(0.3)
            elif name in ("non_negative", "l1_non_negative"):
                right = max(right, 0.0)
            assert out[1, 2] == right, name
            assert worth == (like[name][2] if name in ("zero", "mcp") else np.inf), name  # these two are bounded


def test_a_mapping_casts_a_vote_at_every_scale():
    """Of residual over step size nothing overflows to what casts no vote."""
    for step_size, size in ((1e-20, 1e25), (1e-30, 1e-3), (1e20, 1e-15)):
        tx = scale_by_prox_gradient(proxes.l1(1e-3), step_size)
        params, grads = jnp.full(3, size), jnp.array([1e-6, -1e-6, 0.0])
        found = jax.jit(tx.update)(grads, tx.init(params), params)[0]
        assert jnp.all(jnp.isfinite(found)) and jnp.all(found > 0), step_size


def test_a_slope_that_is_not_finite_does_not_stay_in_the_state():
    for prox in (proxes.l1(0.1), proxes.l2(0.1)):
        tx = scale_by_prox_gradient(prox, reach=0.1)
        params = jnp.ones(3)
        update = jax.jit(tx.update)
        _, state = update(jnp.array([1.0, jnp.nan, jnp.inf]), tx.init(params), params)
        assert all(bool(jnp.isfinite(x)) for x in jax.tree.leaves(state))
        updates, _ = update(jnp.ones(3), state, params)
        assert jnp.all(jnp.isfinite(updates))
