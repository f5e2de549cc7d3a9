"""What each of several processes does in tests/test_hidden_steps.py: train as one program and as two, and compare every step.

The computation has an all-reduce of as many numbers as the exchange: two that get mixed up would fit.
"""

import json
import os
import pathlib
import sys

import jax

if __name__ == "__main__":  # JAX joins the other processes before anything of it is used
    jax.distributed.initialize(**json.loads(sys.argv[1]))

import jax.numpy as jnp
import numpy as np
import optax

import signopt
from signopt import workers
from signopt.workers import _reversed

SIZE = 2**14
RATE = 2.0**-7


def optimizer(border, num_workers):
    borders = {
        "mean": lambda: signopt.mean("w"),
        "one_bit": lambda: signopt.majority_vote("w", wire="one_bit"),
        "memory": lambda: signopt.mean(
            "w", uplink=signopt.codecs.scaled_sign(), downlink=signopt.codecs.scaled_sign(), num_workers=num_workers
        ),
    }
    outer = optax.chain(borders[border](), optax.sgd(1.0 if border != "one_bit" else RATE))
    return signopt.local_steps(optax.sgd(RATE), outer, every=1, delay=1, num_workers=num_workers)


def make_step(tx):
    def loss(w, batch):
        return jnp.mean((w - batch) ** 2)

    def step(state, batch):
        params, opt_state = state
        value, grads = workers.value_and_grad(loss, axis_name="w")(signopt.local_params(opt_state, params), batch)
        seen = jax.lax.pmean((value, grads), "w")
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), seen

    return step


def batch(k, num_workers):
    return np.random.default_rng(k).normal(size=(num_workers, SIZE)).astype(np.float32)


def train(border, steps, hidden):
    """After every step, what this process holds of parameters, offset and metrics; and the last state."""
    count = jax.device_count()
    mesh = jax.make_mesh((count,), ("w",), axis_types=(jax.sharding.AxisType.Auto,))
    tx = optimizer(border, count)
    run = workers.on_mesh(make_step(tx), mesh, axis_name="w", hidden=hidden)
    state = (jnp.zeros(SIZE), tx.init(jnp.zeros(SIZE)))
    for k in range(steps):
        state, metrics = run(state, batch(k, count))
        looked_at = (state[0], state[1].own.per_worker.offset, metrics)
        yield [np.array(x.addressable_data(0)) for x in jax.tree.leaves(looked_at)]


def main(folder, border, steps, order):
    """Write in how many steps two programs differ from one, and by how much."""
    if order == "same":  # negative control
        _reversed.of = lambda mesh: mesh
    differences = [
        max(float(np.abs(a - b).max()) for a, b in zip(one, two, strict=True))
        for one, two in zip(train(border, steps, False), list(train(border, steps, True)), strict=True)
    ]
    (folder / f"{border} {jax.process_index()}.json").write_text(json.dumps(differences))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), sys.argv[5])
    os._exit(0)  # a process whose messages got mixed up would wait for the others
