"""DiLoCo-style training between hosts: each makes 16 steps of its own, then they vote on what those came to.

    python examples/local_steps_two_hosts.py --coordinator HOST0:9876 --hosts 2 --index 0     # on the first
    python examples/local_steps_two_hosts.py --coordinator HOST0:9876 --hosts 2 --index 1     # on the second
    python examples/local_steps_two_hosts.py                                                  # on one, to try it out

A host averages over its own devices in every step, and hosts exchange a tenth of a bit per parameter and step.
"""

import argparse

import jax
from jax.experimental import multihost_utils
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax

import signopt

EVERY = 16


def init(key: jax.Array, width: int) -> dict[str, jax.Array]:
    """A network from 32 numbers to 8 classes."""
    keys = jax.random.split(key, 3)
    return {
        "in": jax.random.normal(keys[0], (32, width)) / 32**0.5,
        "middle": jax.random.normal(keys[1], (width, width)) / width**0.5,
        "out": jax.random.normal(keys[2], (width, 8)) / width**0.5,
    }


def loss_fn(params: dict[str, jax.Array], batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    """The cross-entropy of a batch."""
    h = jax.nn.gelu(batch[0] @ params["in"])
    logits = (h + jax.nn.gelu(h @ params["middle"])) @ params["out"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()


def make(hosts: int, steps: int) -> optax.GradientTransformationExtraArgs:
    """Adam inside, votes times their mean size and Nesterov's momentum outside."""
    inner = optax.adam(optax.cosine_decay_schedule(3e-3, steps))
    outer = optax.chain(
        signopt.majority_vote("host", wire="one_bit", block=256),  # between hosts, in every 16th
        optax.sgd(0.7, momentum=0.5, nesterov=True),
    )
    return optax.chain(
        signopt.mean("device"),  # of a host's own devices, in every step
        signopt.local_steps(inner, outer, every=EVERY, num_workers=hosts),
    )


def batches(number: int, rows: int):
    """Examples of this host's own: points around 8 centres, the same on all hosts."""
    centres = np.random.default_rng(0).normal(size=(8, 32))
    rng = np.random.default_rng(1 + jax.process_index())
    for _ in range(number):
        labels = rng.integers(8, size=rows)
        yield (centres[labels] + rng.normal(size=(rows, 32))).astype(np.float32), labels.astype(np.int32)


def main(
    coordinator: str = "", hosts: int = 2, index: int = 0, steps: int = 20 * EVERY, rows: int = 64, width: int = 128
) -> list[float]:
    """Train for whole rounds, and return the mean loss of each."""
    if coordinator:
        jax.distributed.initialize(coordinator, hosts, index)  # before anything asks for a device
    mesh = jax.make_mesh((hosts, jax.device_count() // hosts), ("host", "device"), axis_types=(AxisType.Auto,) * 2)
    params, optimizer = init(jax.random.key(0), width), make(hosts, steps)

    def step(state, batch):
        params, opt_state = state
        value_and_grad = signopt.workers.value_and_grad(loss_fn, axis_name=("host", "device"))
        loss, grads = value_and_grad(signopt.local_params(opt_state, params), batch)  # where this host is
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    run = signopt.workers.on_mesh(step, mesh, axis_name=("host", "device"), state_axis_name="host")
    state = (params, optimizer.init(params))
    split = NamedSharding(mesh, P(("host", "device")))
    own_rows = rows // jax.process_count()
    found, losses = [], []
    for number, local in enumerate(batches(steps, own_rows), 1):
        batch = jax.tree.map(lambda x: jax.make_array_from_process_local_data(split, x), local)
        state, loss = run(state, batch)
        losses.append(loss)
        if number % EVERY == 0:  # evaluate and save `state[0]` here: between rounds hosts are elsewhere
            every = multihost_utils.process_allgather(losses, tiled=True)
            found.append(float(np.mean(jax.tree.map(np.mean, every))))
            losses = []
            if jax.process_index() == 0:
                print(f"round {number // EVERY}: loss {found[-1]:.3f}")
    size = sum(x.size for x in jax.tree.leaves(params))
    border = signopt.majority_vote("host", wire="one_bit", block=256)
    sent = 8 * signopt.wire.bytes_sent(params, hosts, border, axis_name="host") / EVERY / size
    if jax.process_index() == 0:
        print(f"a host sends {sent:.2f} bits per parameter and step")
    if coordinator:
        jax.distributed.shutdown()
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--coordinator", default="")
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--index", type=int, default=0)
    parser.add_argument("--steps", type=int, default=20 * EVERY)
    main(**vars(parser.parse_args()))
