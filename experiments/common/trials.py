"""Trials: many trainings on the digits at once, one for each setting and seed, in one compiled loop."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.common import data
from experiments.common import models
from experiments.common import runners
import signopt


class Outcome(NamedTuple):
    """What came of each trial; every leaf has a leading axis of trials.

    Attributes:
      test_accuracy: At the end.
      train_loss: Of the last step, the mean over workers; inf if it is not finite.
      is_finite: Whether all parameters are.
      opt_state: The optimizer's state.
    """

    test_accuracy: np.ndarray
    train_loss: np.ndarray
    is_finite: np.ndarray
    opt_state: Any


class _State(NamedTuple):
    setting: Any
    params: Any
    opt_state: optax.OptState


def train(
    make: Callable[[Any], optax.GradientTransformation],
    settings: Any,
    seeds: np.ndarray,
    *,
    workers: int,
    steps: int,
    batch_size: int,
    validation: bool = False,
    orders: Callable[[int, np.ndarray], np.ndarray] | None = None,
) -> Outcome:
    """Train the 64-64-10 network with simulated workers, once for each setting and seed.

    Args:
      make: From a setting, whose leaves are traced scalars, to an optimizer over `runners.AXIS`. Its `update` is given
        the worker's loss, `value_fn=`.
      settings: A tree of arrays with a leading axis of trials.
      seeds: The seed of each trial, of its parameters and batches. Equal seeds make a paired comparison.
      workers: Their number.
      steps: Training steps.
      batch_size: Examples per worker and step.
      validation: Test on the last fifth of the training images instead.
      orders: From a seed and all labels to which examples each worker sees, worker after worker, of shape (steps, workers *
        batch_size). None lets all see any.

    Returns:
      What came of each.
    """
    dataset = data.hold_out(data.load("digits")) if validation else data.load("digits")
    images, labels = jnp.asarray(dataset.train_images), jnp.asarray(dataset.train_labels)
    test_images, test_labels = jnp.asarray(dataset.test_images), jnp.asarray(dataset.test_labels)
    net = models.network(models.MLP, images.shape[1:])

    def loss(params, chosen):
        return models.loss(net, params, images[chosen], labels[chosen])

    value_and_grad = signopt.workers.value_and_grad(loss, axis_name=runners.AXIS)

    def step(state, chosen):
        value, gradients = value_and_grad(state.params, chosen)
        optimizer = optax.with_extra_args_support(make(state.setting))
        updates, opt_state = optimizer.update(
            gradients, state.opt_state, state.params, value_fn=lambda params: loss(params, chosen)
        )
        return _State(state.setting, optax.apply_updates(state.params, updates), opt_state), value

    def init(setting, seed):
        params = net.init(jax.random.key(seed))
        return _State(setting, params, make(setting).init(params))

    def alike(seed, labels):
        return data.batches(seed, len(labels), workers * batch_size, steps)

    order = {s: (orders or alike)(s, dataset.train_labels) for s in np.unique(seeds).tolist()}
    runner = runners.simulate(step, workers)
    states = jax.jit(jax.vmap(init))(settings, seeds)
    states, losses = runner.advance(states, np.stack([order[s] for s in seeds.tolist()]))

    def accurate(params):
        return models.accuracy(net, params, test_images, test_labels)

    def is_finite(params):
        return jnp.isfinite(optax.tree.norm(params))

    last = np.asarray(losses[:, -1], np.float64).mean(1)
    return Outcome(
        np.asarray(jax.jit(jax.vmap(accurate))(states.params)),
        np.where(np.isfinite(last), last, np.inf),
        np.asarray(jax.jit(jax.vmap(is_finite))(states.params)),
        states.opt_state,
    )


def grid(*axes: Any, seeds: int) -> tuple[np.ndarray, ...]:
    """Every combination of the axes' values and the seeds 0, 1, ..., flat: an array for each axis, then the seeds'."""
    return tuple(x.ravel() for x in np.meshgrid(*axes, np.arange(seeds), indexing="ij"))
