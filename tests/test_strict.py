"""JAX's strict modes: each ready optimizer and each transformation of the left side traces once, and keeps its types."""

import contextlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import conformance
import signopt
from signopt import adversary
from signopt import precision

# What shows when a step is traced, and what shows when it runs.
TRACED = {
    "rank_promotion, x64": {"jax_numpy_rank_promotion": "raise", "jax_enable_x64": True},
    "dtype_promotion": {"jax_numpy_dtype_promotion": "strict"},
    "checks, leaks": {"jax_enable_checks": True, "jax_check_tracer_leaks": True},
}
RUN = {
    "guards": {"jax_debug_nans": True, "jax_debug_infs": True, "jax_transfer_guard": "disallow"},
    "disable_jit": {"jax_disable_jit": True},
    "keys": {"jax_enable_custom_prng": True, "jax_threefry_partitionable": False},
}
PARAMS = {
    "matrix": np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4),
    "bfloat16": np.linspace(-1, 2, 5).astype(jnp.bfloat16),
    "scalar": np.float32(2.0),
    "float16": np.linspace(-2, 1, 9, dtype=np.float16).reshape(1, 3, 3),
}
KEY = 3


def in_state(argument, make):
    """A transformation whose argument is traced: it lies in the state, as `optax.inject_hyperparams` has it."""

    def init(params):
        return jnp.float32(argument), make(argument).init(params)

    def update(updates, state, params=None):
        updates, inner = make(state[0]).update(updates, state[1], params)
        return updates, (state[0], inner)

    return optax.GradientTransformation(init, update)


TRANSFORMATIONS = {
    "scale_by_sign": lambda: signopt.scale_by_sign(),
    "scale_by_sign threshold": lambda: signopt.scale_by_sign(threshold=0.5),
    "scale_by_sign traced": lambda: in_state(0.5, lambda x: signopt.scale_by_sign(threshold=x)),
    "scale_by_signum": lambda: signopt.scale_by_signum(0.9, nesterov=True, warmup_steps=2),
    "scale_by_signum float32": lambda: signopt.scale_by_signum(0.9, warmup_steps=2, accumulator_dtype="float32"),
    "scale_by_signum traced": lambda: in_state(2.0, lambda x: signopt.scale_by_signum(0.9, warmup_steps=x)),
    "finite_only": lambda: signopt.finite_only(optax.trace(0.9)),
    "nesterov": lambda: signopt.signum(0.1, nesterov=True, weight_decay=0.1),
    "inverted": lambda: adversary.corrupt(adversary.inverted(), 1, None),
    "random": lambda: adversary.corrupt(adversary.random(jax.random.key(KEY)), 1, None),
    "old key": lambda: adversary.corrupt(adversary.random(jax.random.PRNGKey(KEY)), 1, None),
    "colluding": lambda: adversary.corrupt(adversary.colluding(), 1, None),
    "master_weights": lambda: precision.master_weights(signopt.signum(1e-3, weight_decay=0.1)),
    "stochastic_rounding": lambda: precision.stochastic_rounding(signopt.signum(1e-3), jax.random.key(KEY)),
}
MAKERS = {row.name: row.make for row in conformance.ROWS} | TRANSFORMATIONS
WITH_KEYS = ("random", "old key", "stochastic_rounding", "mh_signsgd")


@contextlib.contextmanager
def mode(flags):
    before = {flag: getattr(jax.config, flag) for flag in flags}
    try:
        for flag, value in flags.items():
            jax.config.update(flag, value)
        yield
    finally:
        for flag, value in before.items():
            jax.config.update(flag, value)


def types(tree):
    return jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x), jax.typeof(x).weak_type), tree)


# What of optax each is to be as good as, if not optax.lion.
TWINS = {"scale_by_signum float32": lambda: optax.ema(0.9, debias=False, accumulator_dtype="float32")} | {
    name: lambda: optax.ema(0.9) for name in MAKERS if name.startswith(("mh_signsgd", "signprox-"))
}


def or_skip_with_optax(run, make, name=""):
    """`run(make)`; skipped where the same with optax's own fails."""
    try:
        run(make)
    except Exception:
        try:
            run(TWINS.get(name, lambda: optax.lion(0.01)))
        except Exception as theirs:
            pytest.skip(f"optax's own fails: {type(theirs).__name__}")
        raise


def traced(make):
    """One step changes no type of the state: then neither do three, and they are traced once."""
    transform = make()
    params = jax.tree.map(jnp.asarray, PARAMS)
    state = transform.init(params)
    updates, new_state = jax.eval_shape(transform.update, params, state, params)
    assert types(new_state) == types(state)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    assert not any(x.weak_type for x in jax.tree.leaves(updates))


def ran(make, params, zero):
    """Three steps, with gradients that turn and vanish in between."""
    transform = make()
    state = jax.jit(transform.init)(params)  # eagerly, optax's own zeros are a transfer that a guard refuses
    traces = []

    @jax.jit
    def step(gradients, params, state):
        traces.append(None)
        updates, state = transform.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    before = types(state)
    for gradients in (params, zero, params):
        params, state = step(gradients, params, state)
    assert types(state) == before
    assert len(traces) == (3 if jax.config.jax_disable_jit else 1)
    return params


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("flags", TRACED)
def test_a_step_keeps_every_type(name, flags):
    with mode(TRACED[flags]):
        or_skip_with_optax(traced, MAKERS[name], name)


@pytest.mark.parametrize("name", MAKERS)
def test_guards_against_nan_inf_and_transfers_find_nothing(name):
    transform = MAKERS[name]()
    params = jax.tree.map(jnp.asarray, PARAMS)
    zero = jax.tree.map(jnp.zeros_like, params)
    with mode(RUN["guards"]):
        or_skip_with_optax(lambda make: ran(make, params, zero), lambda: transform, name)


@pytest.mark.parametrize(
    "name", ("signum", "signum-one_bit", "signum-two_bit", "signum-psum", "mh_signsgd", "finite_only")
)
def test_without_jit_the_numbers_are_the_same(name):
    params = jax.tree.map(jnp.asarray, PARAMS)
    zero = jax.tree.map(jnp.zeros_like, params)
    expected = ran(MAKERS[name], params, zero)
    with mode(RUN["disable_jit"]):
        chex.assert_trees_all_close(ran(MAKERS[name], params, zero), expected, rtol=1e-2)


@pytest.mark.parametrize("name", WITH_KEYS)
def test_every_kind_of_random_key_serves(name):
    params = jax.tree.map(jnp.asarray, PARAMS)
    with mode(RUN["keys"]):
        ran(MAKERS[name], params, jax.tree.map(jnp.zeros_like, params))


def test_optax_s_own_runs_under_guards():
    """So that nothing above is skipped for it."""
    params = jax.tree.map(jnp.asarray, PARAMS)
    zero = jax.tree.map(jnp.zeros_like, params)
    with mode(RUN["guards"]):
        ran(lambda: optax.lion(0.01), params, zero)


def test_a_mode_that_is_broken_is_seen():
    """Negative control."""
    broken = optax.stateless(lambda updates, params: jax.tree.map(lambda g: g + jnp.ones((2, 3, 4)), updates["matrix"]))
    with mode(TRACED["rank_promotion, x64"]), pytest.raises(ValueError, match="rank_promotion"):
        or_skip_with_optax(traced, lambda: broken)
    drifting = optax.GradientTransformation(lambda p: jnp.int32(0), lambda u, s, p=None: (u, s + 0.5))
    with pytest.raises(AssertionError):
        traced(lambda: drifting)
