"""FSDP in plain `jax.jit`, with votes between slices: parameters are sharded inside a slice, and only signs travel between.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 NPROC=16 python examples/fsdp_plain_jit.py

The mesh has two axes. Over "shard", the fast network of a slice, the compiler gathers and scatters parameters as in any FSDP
loop. Over "slice" each device votes on its own shard. Marked with "vote": what differs from such a loop.
"""

import argparse
from typing import Any

import jax
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax

import signopt

SPECS = {"in": P(None, "shard"), "layers": P(None, "shard", None), "out": P("shard", None)}


def init(key: jax.Array, width: int, layers: int) -> dict[str, jax.Array]:
    """A residual network from 32 numbers to 8 classes."""
    keys = jax.random.split(key, 3)
    return {
        "in": jax.random.normal(keys[0], (32, width)) / 32**0.5,
        "layers": jax.random.normal(keys[1], (layers, width, width)) / (layers * width) ** 0.5,
        "out": jax.random.normal(keys[2], (width, 8)) / width**0.5,
    }


def loss_fn(params: dict[str, jax.Array], x: jax.Array, labels: jax.Array) -> jax.Array:
    """The cross-entropy of a batch, or of a slice's share of it."""

    def layer(h, weight):
        return h + jax.nn.gelu(h) @ weight, None

    h, _ = jax.lax.scan(layer, x @ params["in"], params["layers"])
    return optax.softmax_cross_entropy_with_integer_labels(h @ params["out"], labels).mean()


def main(slices: int = 2, steps: int = 200, batch_size: int = 64, width: int = 128, layers: int = 4) -> list[float]:
    """Train on points of 8 classes, and return the losses."""
    shape = (slices, jax.device_count() // slices)
    mesh = jax.make_mesh(shape, ("slice", "shard"), axis_types=(AxisType.Auto,) * 2)

    def put(tree, specs):
        return jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), tree, specs)

    params = put(init(jax.random.key(0), width, layers), SPECS)
    schedule = optax.cosine_decay_schedule(2e-3, steps)
    voted = signopt.signum(schedule, axis_name="slice", num_workers=slices, wire="one_bit")
    optimizer = signopt.workers.in_jit(voted, mesh, axis_name="slice", specs=SPECS)  # vote
    opt_state = optimizer.init(params)

    @jax.jit
    def train_step(params: Any, opt_state: Any, x: jax.Array, labels: jax.Array):
        x, labels = signopt.workers.split_batch((x, labels), slices)  # vote: a gradient for each slice
        losses, grads = jax.vmap(jax.value_and_grad(loss_fn), (None, 0, 0))(params, x, labels)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, losses.mean()

    rng, losses = np.random.default_rng(0), []
    centres = rng.normal(size=(8, 32))
    batch = NamedSharding(mesh, P(("slice", "shard")))
    for number in range(1, steps + 1):
        labels = rng.integers(8, size=batch_size)
        x = (centres[labels] + rng.normal(size=(batch_size, 32))).astype(np.float32)
        params, opt_state, loss = train_step(params, opt_state, *jax.device_put((x, labels), batch))
        losses.append(float(loss))
        if number % 50 == 0 or number == steps:
            print(f"step {number}: loss {losses[-1]:.3f}")
    # Parameters and momenta stay where they were: a shard on each device.
    momentum = optax.tree.get(opt_state, "ema")["layers"]
    print("a device's share of the layers:", params["layers"].sharding.shard_shape(params["layers"].shape))
    print("and of all slices' momenta:", momentum.sharding.shard_shape(momentum.shape))
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slices", type=int, default=2)
    parser.add_argument("--steps", type=int, default=200)
    main(**vars(parser.parse_args()))
