"""Workers with parameters of their own: noise between averages, a pull to an anchor, a leader, and coordinates read late."""

from collections.abc import Callable, Iterator
import functools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.common import data
from experiments.common import models
from experiments.common import runners
from experiments.common.records import Record
import signopt
from signopt import border

AXIS = runners.AXIS
WORKERS, STEPS = 8, 400


# ---- training on the digits ------------------------------------------------------------------------------------------


@functools.cache
def _digits():
    """Images and labels to train on, to tune on, and to test on."""
    whole = data.load("digits")
    held_out = data.hold_out(whole)
    tuned = held_out.train_images, held_out.train_labels
    parts = (tuned, (held_out.test_images, held_out.test_labels), (whole.test_images, whole.test_labels))
    return jax.tree.map(jnp.asarray, parts)


def train(
    make: Callable[[Any], optax.GradientTransformation],
    settings: Any,
    seeds: np.ndarray,
    *,
    batch_size: int,
    steps: int = STEPS,
    workers: int = WORKERS,
    examples: int = 1144,
    noise: Callable[[Any], Any] = lambda setting: 0.0,
    pull: Callable[[Any], Any] = lambda setting: 0.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Accuracies of the 64-64-10 network, trained by local steps, for each setting and seed: on images to tune on, and to test.

    Args:
      make: From a setting to an optimizer that holds one `local_steps`.
      settings: A tree of arrays with a leading axis of trials.
      seeds: The seed of each trial.
      batch_size: Examples per worker and step.
      steps: Training steps.
      workers: Their number.
      examples: To train on; each worker has a share of its own.
      noise: From a setting to the deviation of what is added to a worker's gradient.
      pull: From a setting to the strength of the pull to the anchor, mu.
    """
    (images, labels), *unseen = _digits()
    net = models.network(models.MLP, images.shape[1:])
    share = examples // workers

    def one(setting, seed):
        tx = optax.with_extra_args_support(make(setting))

        def step(state, batch):
            params, opt_state = state
            chosen, key = batch["chosen"][0], jax.random.wrap_key_data(batch["key"][0])
            here = signopt.local_params(opt_state, params)

            def loss(w):
                away = optax.tree.norm(optax.tree.sub(w, params), squared=True)
                return models.loss(net, w, images[chosen], labels[chosen]) + pull(setting) / 2 * away

            value, gradients = signopt.workers.value_and_grad(loss, axis_name=AXIS)(here)
            drawn = optax.tree.random_like(key, gradients)
            gradients = jax.tree.map(lambda g, z: g + noise(setting) * z, gradients, drawn)
            updates, opt_state = tx.update(gradients, opt_state, params, value=value)
            return (optax.apply_updates(params, updates), opt_state), None

        together = signopt.workers.simulate(step, workers, axis_name=AXIS)
        first, second = jax.random.split(jax.random.key(seed))
        start = net.init(first)

        def body(state, number):
            one, two = jax.random.split(jax.random.fold_in(second, number))
            chosen = jax.random.randint(one, (workers, batch_size), 0, share) + share * jnp.arange(workers)[:, None]
            keys = jax.vmap(jax.random.key_data)(jax.random.split(two, workers))
            return together(state, {"chosen": chosen, "key": keys})

        (params, _), _ = lax.scan(body, (start, tx.init(start)), jnp.arange(steps))
        return tuple(models.accuracy(net, params, *part) for part in unseen)

    tuned, tested = jax.jit(jax.vmap(one))(settings, seeds)
    return np.asarray(tuned), np.asarray(tested)


def best_of(lines: dict[str, np.ndarray], rates: np.ndarray, tuned: np.ndarray, tested: np.ndarray) -> Iterator[Record]:
    """For each line, the settings that it may choose from: test accuracies of the one that is best on images to tune on."""
    for line, allowed in lines.items():
        choice = allowed[int(np.argmax(tuned[allowed].mean(1)))]
        edge = bool(rates[choice] in (rates.min(), rates.max()))
        yield {"line": line, "values": tested[choice].tolist(), "learning_rate": float(rates[choice]), "edge": edge}


def averaging(inner: Any, every: int, outer_border: Any = None, workers: int = WORKERS) -> optax.GradientTransformation:
    """Local steps, and a mean of what they came to."""
    outer = optax.chain(signopt.mean(AXIS) if outer_border is None else outer_border, optax.sgd(1.0))
    return signopt.local_steps(inner, outer, every=every, num_workers=workers)


def noise(seeds: int) -> Iterator[Record]:
    """Test accuracy by noise on each worker's steps: with means every 16 steps, and with gossip on a ring as well.

    Yields:
      A record for each way to average and deviation.
    """
    strengths = (0.0, 0.01, 0.03, 0.1, 0.3)
    settings, numbers = (
        x.ravel() for x in np.meshgrid(np.asarray(strengths, np.float32), np.arange(seeds), indexing="ij")
    )
    for line in ("mean", "ring and mean"):

        def make(setting, line=line):
            del setting
            sgd = optax.sgd(optax.cosine_decay_schedule(0.2, STEPS), momentum=0.9)
            return averaging(sgd if line == "mean" else optax.chain(sgd, signopt.gossip_mean(AXIS)), 16)

        _, found = train(make, settings, numbers, batch_size=8, examples=400, noise=lambda setting: setting)
        for i, strength in enumerate(strengths):
            yield {"line": line, "x": strength, "values": found[i * seeds : (i + 1) * seeds].tolist()}


def _grid(*axes, seeds):
    """All settings, and their trials: with each seed."""
    settings = [np.asarray(x.ravel(), np.float32) for x in np.meshgrid(*axes, indexing="ij")]
    return settings, tuple(x.repeat(seeds) for x in settings), np.tile(np.arange(seeds), len(settings[0]))


def proximal(seeds: int) -> Iterator[Record]:
    """Test accuracy at small batches, one worker: SGD and Adam, and both with a pull to an anchor that moves every 16 steps.

    Yields:
      A record for each optimizer and batch size, at the best rate and pull on images held out.
    """
    for inner, first in ((optax.sgd, 2.0**-4), (optax.adam, 2.0**-8)):
        (rates, pulls), trials, numbers = _grid(first * 2.0 ** np.arange(-2, 4), (0.0, 0.1, 1.0), seeds=seeds)

        def make(setting, inner=inner):
            return averaging(inner(optax.cosine_decay_schedule(setting[0], STEPS)), 16, workers=1)

        lines = {inner.__name__: np.flatnonzero(pulls == 0), f"{inner.__name__}, pulled": np.flatnonzero(pulls > 0)}
        for batch_size in (1, 8):
            found = train(make, trials, numbers, batch_size=batch_size, workers=1, pull=lambda setting: setting[1])
            for record in best_of(lines, rates, *(x.reshape(len(rates), seeds) for x in found)):
                yield record | {"x": batch_size}


def leader() -> optax.GradientTransformationExtraArgs:
    """A border: everybody's updates become those of the worker with the lowest loss."""

    def encode(updates, memory, context):
        value = jnp.broadcast_to(context.extra["value"], (context.num_workers,))
        return {"rows": border.rows(updates, context), "value": value.astype(jnp.float32)}, memory

    def decide(messages, memory, context):
        del context
        return messages["rows"][jnp.argmin(messages["value"])], memory, ()

    def decode(decisions, like, context):
        del context
        return border.tree(decisions, like)

    return border.exchange(AXIS, border.Border(encode, decide, decode))


def leaders(seeds: int) -> Iterator[Record]:
    """Test accuracy by steps between exchanges: the leader's place, or the mean of all; with a pull between them, or none.

    Yields:
      A record for each method and period.
    """
    (rates, pulls), trials, numbers = _grid(2.0 ** np.arange(-6, -2), (0.0, 0.1), seeds=seeds)
    for every in (16,):
        for name in ("mean", "leader"):

            def make(setting, name=name, every=every):
                inner = optax.sgd(optax.cosine_decay_schedule(setting[0], STEPS), momentum=0.9)
                return averaging(inner, every, leader() if name == "leader" else None)

            found = train(make, trials, numbers, batch_size=8, pull=lambda setting: setting[1])
            lines = {name: np.flatnonzero(pulls == 0), f"{name}, pulled": np.flatnonzero(pulls > 0)}
            for record in best_of(lines, rates, *(x.reshape(len(rates), seeds) for x in found)):
                yield record | {"x": every}


# ---- coordinates that are read late ----------------------------------------------------------------------------------


def late(seeds: int, steps: int = 20_000, size: int = 10) -> Iterator[Record]:
    """Hogwild's step sizes on ridge regression from far away, every coordinate read some random steps late.

    The loss is strongly convex on the whole space, so no bound on the gradients holds. The squared distance shall fall as
    one over the steps.

    Yields:
      A record for each rule and longest delay: the squared distance at the end, and the exponent of its fall over the last
      two thirds.
    """
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(200, size))
    inputs /= np.linalg.norm(inputs, axis=1, keepdims=True)
    outputs = inputs @ rng.normal(size=size) + 0.3 * rng.normal(size=200)
    hessian = inputs.T @ inputs / 200 + 0.1 * np.eye(size)
    minimizer = jnp.asarray(np.linalg.solve(hessian, inputs.T @ outputs / 200), jnp.float32)
    convexity, smoothness, alpha = float(np.linalg.eigvalsh(hessian)[0]), 1.1, 4.0
    inputs, outputs = jnp.asarray(inputs, jnp.float32), jnp.asarray(outputs, jnp.float32)
    lines = ("Hogwild's rule", "a constant rate")
    for delay in (0, 4, 16, 64):
        begin = max(2 * delay, 4 * smoothness * alpha / convexity)

        def run(falls, seed, delay=delay, begin=begin):
            def body(history, step):
                ages, chosen = jax.random.split(jax.random.fold_in(jax.random.key(seed), step))
                read = history[jax.random.randint(ages, (size,), 0, delay + 1), jnp.arange(size)]
                i = jax.random.randint(chosen, (), 0, 200)
                gradient = inputs[i] * (inputs[i] @ read - outputs[i]) + 0.1 * read
                new = history[0] - alpha / (convexity * (falls * step + begin)) * gradient
                return jnp.concatenate([new[None], history[:-1]]), jnp.sum((new - minimizer) ** 2)

            start = jnp.broadcast_to(minimizer + 100.0, (delay + 1, size))
            return lax.scan(body, start, jnp.arange(steps))[1]

        over_seeds = jax.vmap(run, (None, 0))
        both = np.asarray(jax.jit(jax.vmap(over_seeds, (0, None)))(jnp.array([1.0, 0.0]), jnp.arange(seeds)), float)
        for line, found in zip(lines, both, strict=True):
            tenth = steps // 10
            parts = [found[:, begin : begin + tenth].mean() for begin in (3 * tenth, 9 * tenth)]
            exponent = float(np.log(parts[1] / parts[0]) / np.log(9.5 / 3.5))
            yield {"line": line, "x": delay, "values": found[:, -tenth:].mean(1).tolist(), "exponent": exponent}
