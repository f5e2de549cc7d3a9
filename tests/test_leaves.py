"""Every kind of leaf that users have, through every ready optimizer and every transformation: right, or a clear error."""

import chex
from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import conformance
import signopt
from signopt import adversary
from signopt import precision
from signopt import prox

LEAVES = {
    "float": 1.5,
    "numpy float32": np.float32(-2.0),
    "numpy float64": np.float64(0.5),
    "numpy array": np.array([1.0, -1.0, 3.0], np.float32),
    "scalar": jnp.float32(-3.0),
    "empty": jnp.zeros((0, 4)),
    "none": None,
    "masked": optax.MaskedNode(),
    "bfloat16": jnp.array([[1.0, -2.0]], jnp.bfloat16),
    "float16": jnp.array([0.5, -0.25, 2.0], jnp.float16),
    "box": nn.Partitioned(jnp.array([1.0, -4.0]), ("x",)),
} | {f"of {n}": jnp.linspace(-1.0, 1.3, n) for n in range(1, 18)}


# What takes long to compile: the transformations below have all sizes.
FEW = {name: leaf for name, leaf in LEAVES.items() if not name.startswith("of ")}
SOME = FEW | {f"of {n}": LEAVES[f"of {n}"] for n in (1, 8, 9)}


def check(transform, leaves, moved):
    """Two steps: updates look like the leaves, state stays as it was, and `moved(update, leaf)` holds."""
    state = transform.init(leaves)
    step = jax.jit(lambda state: transform.update(leaves, state, leaves))
    for _ in range(2):
        updates, new_state = step(state)
        assert jax.tree.structure(updates) == jax.tree.structure(leaves)
        chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)
        state = new_state
    for (path, u), x in zip(jax.tree.leaves_with_path(updates), jax.tree.leaves(leaves), strict=True):
        assert jnp.shape(u) == jnp.shape(x), path
        assert jnp.result_type(u) == jnp.result_type(x), path
        assert moved(np.asarray(u, np.float64), np.asarray(x, np.float64)).all(), (path, u, x)


def down(u, x):
    """Against a gradient of the sign of x."""
    return np.sign(u) == -np.sign(x)


def along(u, x):
    return np.sign(u) == np.sign(x)


@pytest.mark.parametrize("row", conformance.ROWS, ids=lambda row: row.name)
def test_every_ready_optimizer_takes_every_leaf(row):
    check(row.make(), FEW if "prox" in row.name else SOME, down)


WIDE = [row for row in conformance.ROWS if not row.name.endswith(("-one_bit", "-psum"))]


@pytest.mark.parametrize("row", WIDE, ids=lambda row: row.name)
def test_every_ready_optimizer_takes_every_leaf_in_x64(row, x64):
    check(row.make(), FEW | {"float64": jnp.array([1e-300, -1.0], jnp.float64)}, down)


L1 = prox.l1(1e-6)
TRANSFORMATIONS = {
    "scale_by_sign": (lambda: signopt.scale_by_sign(), along),
    "scale_by_sign threshold": (lambda: signopt.scale_by_sign(threshold=1e-3), along),
    "scale_by_signum": (lambda: signopt.scale_by_signum(0.9, nesterov=True, warmup_steps=1), along),
    "finite_only": (lambda: signopt.finite_only(optax.trace(0.9)), along),
    "majority_vote": (lambda: signopt.majority_vote(None), along),
    "majority_vote one_bit": (lambda: signopt.majority_vote(None, wire="one_bit"), along),
    "mean": (lambda: signopt.mean(None), along),
    "scale_by_prox_gradient": (lambda: signopt.scale_by_prox_gradient(L1, 0.1), along),
    "prox_step": (lambda: optax.chain(optax.scale(-0.5), signopt.prox_step(L1, 0.1)), down),
    "corrupt": (lambda: adversary.corrupt(adversary.inverted(), 1, None), down),
    "corrupt scaled": (lambda: adversary.corrupt(adversary.scaled(-2.0), 1, None), down),
    "corrupt random": (
        lambda: adversary.corrupt(adversary.random(jax.random.key(0)), 1, None),
        lambda u, x: abs(u) == abs(x),
    ),
    "corrupt silent": (lambda: adversary.corrupt(adversary.silent(), 1, None), lambda u, x: u == 0),
    "corrupt colluding": (lambda: adversary.corrupt(adversary.colluding(), 1, None), down),
    "master_weights": (lambda: precision.master_weights(signopt.signum(0.1)), down),
    "stochastic_rounding": (lambda: precision.stochastic_rounding(signopt.signum(0.1), jax.random.key(0)), down),
}


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_every_transformation_takes_every_leaf(name):
    make, moved = TRANSFORMATIONS[name]
    check(make(), LEAVES, moved)


WITHOUT_SIGN = ("float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "float4_e2m1fn", "int32", "uint8", "bool")


@pytest.mark.parametrize("row", conformance.ROWS, ids=lambda row: row.name)
def test_leaves_without_a_sign_are_refused(row):
    optimizer = row.make()
    state = optimizer.init({"w": jnp.ones(3)})
    for dtype in WITHOUT_SIGN:
        leaves = {"w": jnp.ones(3, dtype)}
        with pytest.raises(TypeError, match=rf"has to be given floating-point leaves.* {dtype} at `updates\['w'\]`"):
            jax.eval_shape(optimizer.update, leaves, state, leaves)


@pytest.mark.parametrize("make", (signopt.signsgd, signopt.signum, signopt.lion))
def test_complex_leaves_without_a_vote_are_optax_s_own(make):
    """The sign of a complex number is its direction there."""
    params = jnp.array([3.0 + 4.0j, -1.0j], jnp.complex64)
    twin = {signopt.signsgd: optax.sign_sgd, signopt.signum: optax.signum, signopt.lion: optax.lion}[make]
    updates, _ = make(0.1).update(params, make(0.1).init(params), params)
    expected, _ = twin(0.1).update(params, twin(0.1).init(params), params)
    np.testing.assert_array_equal(updates, expected)


def test_a_python_number_is_a_whole_model():
    tx = signopt.signum(0.25)
    params, state = 1.0, tx.init(1.0)
    for _ in range(3):
        updates, state = tx.update(params, state, params)
        params = optax.apply_updates(params, updates)
    assert params == 0.25


def test_master_weights_map_over_parameters_of_several_dtypes():
    tx = precision.master_weights(signopt.signum(0.1))
    params = {"wide": jnp.ones((4, 2)), "narrow": jnp.ones((4, 3), jnp.bfloat16), "scalar": jnp.float32(1.0)}
    state = tx.init(params)
    names = optax.tree.map_params(tx, lambda _, name: name, state, {key: key for key in params})
    assert names.master == names.inner_state[0].ema == {key: key for key in params}
    same = optax.tree.map_params(tx, lambda x, p: x, state, params)
    chex.assert_trees_all_equal(same, state)
    assert sum(x.nbytes for x in jax.tree.leaves(state.master)) == 4 * 12 + 4  # nothing for the matrix that is wide
