"""Image classification as in Flax's ImageNet example, by votes: BatchNorm, float16 with DynamicScale, checkpoints of Orbax.

    python examples/imagenet_linen.py                      # random images, on all devices
    python examples/imagenet_linen.py --folder /tmp/run    # stop it and start it again: it goes on

Marked with "vote": what differs from a loop whose gradients are averaged.
"""

import argparse
from collections.abc import Iterator
import pathlib
from typing import Any

import flax.linen as nn
from flax.training.dynamic_scale import DynamicScale
from flax.training.train_state import TrainState
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

import signopt

CLASSES = 10
WEIGHT_DECAY = 1e-4


class ResNet(nn.Module):
    """A small one: a stage for each number of channels."""

    channels: tuple[int, ...] = (32, 64, 128)

    @nn.compact
    def __call__(self, x, train):
        """Logits (batch, classes) of images (batch, size, size, 3)."""

        def norm(x):
            return nn.BatchNorm(use_running_average=not train, momentum=0.9, dtype=jnp.float16)(x)

        x = x.astype(jnp.float16)
        for i, width in enumerate(self.channels):
            strides = (1, 1) if i == 0 else (2, 2)
            y = nn.relu(norm(nn.Conv(width, (3, 3), strides, use_bias=False, dtype=jnp.float16)(x)))
            y = norm(nn.Conv(width, (3, 3), use_bias=False, dtype=jnp.float16)(y))
            x = nn.relu(y + nn.Conv(width, (1, 1), strides, use_bias=False, dtype=jnp.float16)(x))
        return nn.Dense(CLASSES, dtype=jnp.float32)(x.mean((1, 2)))


class State(TrainState):
    """What is trained, and what the model and the scaling of its loss remember."""

    batch_stats: Any
    dynamic_scale: DynamicScale


def create(size: int, steps: int, channels: tuple[int, ...], workers: int) -> State:
    """A model, and Signum by vote with a cosine schedule."""
    model = ResNet(channels)
    variables = jax.jit(model.init, static_argnames="train")(
        jax.random.key(0), jnp.zeros((1, size, size, 3)), train=False
    )
    schedule = optax.warmup_cosine_decay_schedule(0.0, 3e-3, steps // 10 + 1, steps + 1)
    tx = signopt.signum(  # vote
        schedule, axis_name="batch", num_workers=workers, wire="one_bit", weight_decay=WEIGHT_DECAY, mask=_is_kernel
    )
    return State.create(
        apply_fn=model.apply,
        params=variables["params"],
        tx=tx,
        batch_stats=variables["batch_stats"],
        dynamic_scale=DynamicScale(growth_interval=200, scale=jnp.float32(2.0**12)),
    )


def _is_kernel(params):
    return jax.tree.map(lambda x: x.ndim > 1, params)


def train_step(state: State, batch: tuple[jax.Array, jax.Array]) -> tuple[State, dict[str, jax.Array]]:
    """One worker's step on its own images."""
    images, labels = batch

    def loss_fn(params):
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, new = state.apply_fn(variables, images, train=True, mutable=["batch_stats"])
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return loss, (logits, new["batch_stats"])

    # vote: without `axis_name=`, which would average the gradients. A gradient that overflows abstains.
    grad_fn = state.dynamic_scale.value_and_grad(loss_fn, has_aux=True)
    dynamic_scale, _, (loss, (logits, stats)), grads = grad_fn(state.params)
    state = state.apply_gradients(
        grads=grads,
        batch_stats=lax.pmean(stats, "batch"),
        dynamic_scale=jax.tree.map(lambda x: lax.pmin(x, "batch"), dynamic_scale),  # vote: one scale for all
    )
    return state, {"loss": loss, "accuracy": jnp.mean(jnp.argmax(logits, -1) == labels)}


def images(batch_size: int, size: int, start: int, steps: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Random images whose classes are told by their colours; put your own pipeline here."""
    colours = np.random.default_rng(0).normal(size=(CLASSES, 3))
    for step in range(start, steps):
        rng = np.random.default_rng((1, step))  # the same batch for a step after a restart
        labels = rng.integers(CLASSES, size=batch_size)
        noise = rng.normal(size=(batch_size, size, size, 3))
        yield (noise + colours[labels][:, None, None]).astype(np.float32), labels


def main(
    folder: str = "", steps: int = 200, batch_size: int = 64, size: int = 32, channels: tuple[int, ...] = (32, 64, 128)
) -> list[float]:
    """Train, from the newest checkpoint in `folder` on, and return the losses of this run."""
    workers = jax.device_count()
    mesh = jax.make_mesh((workers,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    state, manager = create(size, steps, channels, workers), None
    if folder:
        options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
        manager = ocp.CheckpointManager(pathlib.Path(folder).absolute(), options=options)
        if manager.latest_step() is not None:
            state = manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(state))
    # vote: without checks, in which the gradient of shared parameters would be a sum over workers
    step = signopt.workers.on_mesh(train_step, mesh, axis_name="batch", check_vma=False)
    losses = []
    for batch in images(batch_size, size, int(state.step), steps):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"].mean()))
        done = int(state.step)
        if done % 20 == 0 or done == steps:
            print(f"step {done}: loss {losses[-1]:.3f}, accuracy {float(metrics['accuracy'].mean()):.3f}")
        if manager is not None and (done % 50 == 0 or done == steps):
            # vote: the whole state, with every worker's momentum
            manager.save(done, args=ocp.args.StandardSave(state))
    if manager is not None:
        manager.close()
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default="")
    parser.add_argument("--steps", type=int, default=200)
    main(**vars(parser.parse_args()))
