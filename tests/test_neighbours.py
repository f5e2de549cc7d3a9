"""A parameter-free neighbour for one worker that is not in the library: what it does, and what that is worth.

ALIAS (Medyakov et al., Sign-SGD via Parameter-Free Optimization, 2025, option I) steps by the root of how far the loss may
fall, seen from the way gone, over how fast the gradient has changed per step so far. Measured in experiments/README.md.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.common import runners
from experiments.common import trials
from experiments.papers import regimes
import reference
import signopt


class AliasState(NamedTuple):
    """Where the last step was taken from, and what has been seen on the way."""

    count: jax.Array
    last_params: Any
    smoothness: jax.Array
    progress: jax.Array
    gap: jax.Array


def alias(*, first_step=1e-4, same_batch=True, gradients=None):
    """Signs times the step that ALIAS finds. `same_batch` takes a second gradient of each batch, where the last step began."""

    def total(fun, *trees):
        return sum(jax.tree.leaves(jax.tree.map(lambda *x: jnp.sum(fun(*x)), *trees)), jnp.float32(0))

    def init_fn(params):
        zero = jnp.float32(0)
        last = params if same_batch else (params, params)
        return AliasState(jnp.int32(0), last, zero, zero, zero)

    def update_fn(updates, state, params=None, *, value_fn=None, **_):
        last, before = (state.last_params, None) if same_batch else state.last_params
        if same_batch:
            assert value_fn is not None
            before = jax.grad(value_fn)(last)
        before = before if gradients is None else gradients(before)
        moved = optax.tree.norm(optax.tree.sub(params, last), ord="inf")
        change = total(lambda x, y: jnp.abs(x - y), updates, before)
        smoothness = state.smoothness + jnp.where(moved > 0, change / jnp.where(moved > 0, moved, 1), 0)
        progress = state.progress + total(lambda g, x, y: g * (y - x), updates, params, last)
        is_first = state.count == 0
        gap = jnp.where(is_first, first_step * total(jnp.abs, updates), jnp.maximum(state.gap, progress))
        step = jnp.where(smoothness > 0, jnp.sqrt(gap / jnp.where(smoothness > 0, smoothness, 1)), first_step)
        last = params if same_batch else (params, updates)
        updates = jax.tree.map(lambda x: -step * jnp.sign(x), updates)
        return updates, AliasState(state.count + 1, last, smoothness, progress, gap)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def over_the_axis(**kwargs):
    """The same inside `trials.train`, whose workers are an axis even if there is one."""
    return optax.chain(signopt.mean(runners.AXIS), alias(gradients=lambda g: jax.lax.pmean(g, runners.AXIS), **kwargs))


@pytest.mark.parametrize("same_batch", (True, False))
def test_alias_is_its_definition(rng, same_batch):
    curvature, start = rng.uniform(0.5, 1.5, 5), rng.normal(size=5)
    expected = reference.alias(lambda x: curvature * x, start, steps=30, first_step=1e-3)
    tx = alias(first_step=1e-3, same_batch=same_batch)
    x: Any = jnp.asarray(start, jnp.float32)
    loss = lambda x: jnp.sum(jnp.asarray(curvature, jnp.float32) * x**2) / 2
    state = tx.init(x)
    for _ in range(30):
        updates, state = tx.update(jax.grad(loss)(x), state, x, value_fn=loss)
        x = optax.apply_updates(x, updates)
    assert np.allclose(x, expected, atol=1e-3)


# ---- what it is worth: the numbers of experiments/README.md ----------------------------------------------------------


def two_gradients(rate):
    return alias()


def one_gradient(rate):
    return alias(same_batch=False)


def over_tuned(make, kind, number, *, scale):
    """The loss over the last tenth of 400 steps, over that of signSGD with the best of 24 constant rates."""
    curvature, noise, start = (x.astype(np.float32) for x in regimes.problem(kind, number))
    run = functools.partial(regimes.losses, curvature=curvature, noise=scale * noise, start=start, steps=400, runs=4)
    one_rate = np.ones(1, np.float32)
    return regimes.best(run(make, rates=one_rate)[0])[1] / regimes.best(run(signopt.signsgd)[0])[1]


@pytest.mark.slow
@pytest.mark.parametrize(("make", "enough"), [(two_gradients, True), (one_gradient, False)])
def test_with_noise_alias_is_within_twice_a_tuned_rate_if_it_sees_each_batch_twice(make, enough):
    ratios = [over_tuned(make, kind, number, scale=1.0) for kind in ("I", "II") for number in range(12)]
    print(sum(ratio <= 2 for ratio in ratios), "of 24, median", np.median(ratios))
    assert (sum(ratio <= 2 for ratio in ratios) >= 20) == enough


@pytest.mark.slow
def test_without_noise_a_tuned_rate_ends_far_below_alias():
    """Its steps fall as 1 / sqrt(t) whatever the loss does."""
    ratios = [over_tuned(two_gradients, kind, number, scale=0.0) for kind in ("I", "II") for number in range(12)]
    print(sum(ratio <= 2 for ratio in ratios), "of 24, median", np.median(ratios))
    assert np.median(ratios) > 20


@pytest.mark.slow
def test_on_the_toy_alias_beats_a_fixed_rate_threefold():
    noise = np.zeros(100, np.float32)
    noise[0] = 100 / 16
    start = np.asarray(jax.random.normal(jax.random.key(0), (100,)))
    run = functools.partial(regimes.losses, curvature=np.ones(100, np.float32), noise=noise, start=start, runs=10)
    found, _ = run(two_gradients, steps=10_000, rates=np.ones(1, np.float32))
    fixed, _ = run(signopt.signsgd, steps=10_000, rates=np.full(1, 0.05, np.float32))
    tails = [float(x[..., -1000:].mean()) for x in (found, fixed)]
    print(tails)
    assert tails[1] > 3 * tails[0]


def accuracies(make, settings, **shape):
    settings, seeds = trials.grid(np.asarray(settings, np.float32), seeds=5)
    found = trials.train(make, settings, seeds, steps=1000, **shape)
    means = found.test_accuracy.reshape(-1, 5).mean(1)
    print(means)
    return means


@pytest.mark.slow
def test_on_the_digits_alias_needs_no_tuning_if_it_sees_each_batch_twice():
    one = {"workers": 1, "batch_size": 256}
    first_steps = (1e-8, 1e-6, 1e-4, 1e-2)
    best = accuracies(lambda r: signopt.signsgd(r, axis_name=runners.AXIS), (1e-3, 3e-3, 1e-2), **one).max()
    assert np.all(accuracies(lambda f: over_the_axis(first_step=f), first_steps, **one) > best - 0.01)
    assert np.ptp(accuracies(lambda f: over_the_axis(first_step=f, same_batch=False), first_steps, **one)) > 0.5
    split = accuracies(
        lambda b: signopt.mh_signsgd(axis_name=runners.AXIS, num_workers=4, beta=b), (0.95,), workers=4, batch_size=64
    )
    assert split < best - 0.01
