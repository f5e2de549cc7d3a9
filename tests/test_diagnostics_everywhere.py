"""Every diagnostic in every runner, for each worker its own, and under every strict mode of JAX."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import everywhere
import signopt
from signopt import diagnostics
from signopt import theory
from test_prox_everywhere import TRACED
from test_prox_everywhere import config

AXIS = everywhere.AXIS


def loss(params, batch):
    return jnp.mean(jnp.cosh(params["w"][None] - batch)) + params["b"] ** 2 * jnp.mean(batch)


def everything(params, batches):
    """All that one worker can measure on its own mini-batches."""
    moments = diagnostics.gradient_moments(jax.grad(loss), params, batches)
    whole = lambda params: jnp.mean(jax.vmap(lambda batch: loss(params, batch))(batches))
    curvature = diagnostics.hessian_diagonal(whole, params, jax.random.key(0), probes=2)
    noise, ratios = diagnostics.deviation(moments), diagnostics.signal_to_noise(moments)
    return {
        "moments": moments,
        "variance": diagnostics.variance(moments),
        "deviation": noise,
        "curvature": curvature,
        "density": diagnostics.density(moments.mean),
        "geometry": diagnostics.geometry(moments.mean, noise, curvature),
        "ratios": ratios,
        "share": diagnostics.share_above(ratios),
        "wrong": diagnostics.sign_error_probability({"w": batches}),
        "updated": diagnostics.update_moments(moments, params),
    }


def problem(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=5), dtype), "b": jnp.asarray(0.5, dtype)}
    return params, jnp.asarray(rng.normal(size=(4, 3, 2, 5)) + 1, dtype)  # workers, mini-batches, examples


def test_every_diagnostic_is_this_workers_own_in_every_runner(devices):
    params, batches = problem()
    found = everywhere.runs(everything, params, batches, devices)
    alone = jax.jit(everything)
    plain = [jax.device_get(alone(params, own)) for own in batches]
    found["plain jit"] = jax.tree.map(lambda *x: np.stack(x), *plain)
    everywhere.assert_alike(found, rtol=1e-4, atol=1e-5)


def test_curvature_in_a_mesh_step_is_not_the_sum_over_workers(devices):
    """f(x) = x^2 on each of eight workers: 2, not 16."""
    mesh = jax.make_mesh((8,), (AXIS,), (jax.sharding.AxisType.Auto,), devices=devices)

    def body(x, scale):
        own = diagnostics.hessian_diagonal(lambda x: jnp.sum(scale[0] * x**2), x, jax.random.key(0))
        key = jax.random.fold_in(jax.random.key(0), jax.lax.axis_index(AXIS))
        by_own_key = diagnostics.hessian_diagonal(lambda x: jnp.sum(scale[0] * x**2), x, key)
        shared = diagnostics.hessian_diagonal(
            lambda x: jnp.sum(jax.lax.psum(scale[0] * x**2, AXIS)), x, jax.random.key(0)
        )
        return own[None], by_own_key[None], shared

    run = jax.shard_map(body, mesh=mesh, in_specs=(jax.P(), jax.P(AXIS)), out_specs=(jax.P(AXIS), jax.P(AXIS), jax.P()))
    own, by_own_key, shared = jax.jit(run)(jnp.ones(3), jnp.arange(8.0))
    np.testing.assert_array_equal(own, 2 * np.arange(8.0)[:, None] * np.ones(3))
    np.testing.assert_array_equal(by_own_key, own)
    np.testing.assert_array_equal(shared, np.full(3, 56.0))  # a loss that is itself a sum over workers stays one


@pytest.mark.parametrize("mode", TRACED)
@pytest.mark.parametrize("dtype", (jnp.bfloat16, jnp.float32))
def test_every_diagnostic_is_traced_in_float32_under_every_strict_mode(mode, dtype):
    params, batches = problem(dtype)
    with TRACED[mode]():
        shapes = jax.eval_shape(everything, params, batches[0])
    assert {x.dtype for x in jax.tree.leaves(shapes.pop("curvature"))} == {jnp.dtype(dtype)}
    floats = {x.dtype for x in jax.tree.leaves(shapes) if jnp.issubdtype(x.dtype, jnp.floating)}
    assert floats == {jnp.dtype(jnp.float32)}


def test_no_diagnostic_makes_a_nan_or_a_transfer_on_the_way():
    params, batches = problem()
    batches = batches.at[..., 0].set(1.0)  # a coordinate without noise
    params["w"] = params["w"].at[1].set(0.0)
    with config("jax_debug_nans", True):
        run, own = jax.jit(everything), batches[0]
        run(params, own)
        with jax.transfer_guard("disallow"):
            run(params, own)


def test_diagnostics_run_without_jit():
    params, batches = problem()
    batches = batches[:, :2]  # fewer: scans in Python are slow
    with jax.disable_jit():
        found = everything(params, batches[0])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, everything(params, batches[0])
    )


@pytest.mark.parametrize("mode", TRACED)
def test_theory_is_traced_in_float32_under_every_strict_mode(mode):
    def run(ratios, wrong):
        known = {"gap": wrong[0], "smoothness": wrong[1], "noise": wrong[2]}
        return [
            theory.sign_error_markov(ratios),
            theory.sign_error_cantelli(ratios),
            theory.sign_error_gauss(ratios),
            theory.sign_error_normal(ratios),
            theory.vote_error(wrong, 4),
            theory.vote_error(wrong, 101),
            theory.vote_advantage(101, deviation=wrong[0], largest_gradient=ratios[0, 0]),
            theory.mixed_norm(ratios, wrong),
            theory.greedy_learning_rate(ratios, wrong, smoothness=3.0),
            theory.signsgd_rate(jnp.int32(7), **known),
            theory.majority_vote_rate(7, num_workers=5, **known),
            theory.adversarial_vote_rate(7, num_workers=5, adversaries=wrong[0], **known),
            theory.small_batch_rate(7, gap=wrong[0], smoothness=wrong[1]),
            theory.mh_signsgd_rate(7, gap=wrong[0], smoothness=wrong[1], advantage=wrong[2]),
        ]

    with TRACED[mode]():
        found = jax.eval_shape(run, jnp.ones((3, 4), jnp.float32), jnp.full(4, 0.25, jnp.float32))
    assert {x.dtype for x in found} == {jnp.dtype(jnp.float32)}
    if mode == "dtype promotion":
        with TRACED[mode](), TRACED["rank promotion"]():
            narrow = jax.eval_shape(run, jnp.ones((3, 4), jnp.bfloat16), jnp.full(4, 0.25, jnp.float32))
        assert {x.dtype for x in narrow} == {jnp.dtype(jnp.float32)}


def test_votes_can_be_watched_in_every_runner(devices):
    grads = jnp.asarray(np.random.default_rng(0).normal(size=(4, 33)), jnp.float32)
    tx = optax.chain(signopt.majority_vote(AXIS, report=True))
    watch = lambda shared, own: tx.update(own + shared, tx.init(own))[1]
    everywhere.assert_alike(everywhere.runs(watch, jnp.zeros(33), grads, devices))
