"""What each of several processes does in tests/test_survivors.py, which kills all but the first: train, and write down states."""

import json
import os
import pathlib
import sys

import jax

if __name__ == "__main__":  # JAX joins the other processes before anything of it is used
    jax.config.update("jax_enable_recoverability", True)
    jax.distributed.initialize(**json.loads(sys.argv[1]), heartbeat_timeout_seconds=10)

import jax.numpy as jnp
import numpy as np
import optax

import signopt
from signopt import workers

TRUTH = np.random.default_rng(1).normal(size=(16, 4)).astype(np.float32)


def batch(k, size=24):
    x = np.random.default_rng(k).normal(size=(size, 16)).astype(np.float32)
    return x, (x @ TRUTH).argmax(-1)


def optimizer(num_workers):
    return signopt.signum(2.0**-7, 0.9, axis_name="worker", num_workers=num_workers)


def make_step(num_workers):
    tx = optimizer(num_workers)

    def loss_fn(w, x, y):
        return optax.softmax_cross_entropy_with_integer_labels(x @ w, y).mean()

    def step(state, batch):
        params, opt_state = state
        loss, grads = workers.value_and_grad(loss_fn, axis_name="worker")(params, *batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    return step


def init(num_workers):
    params = jnp.zeros((16, 4))
    return params, optimizer(num_workers).init(params)


def accuracy(params):
    x, y = batch(10**6, 4000)
    return float(np.mean((x @ np.asarray(params)).argmax(-1) == y))


def main(folder, steps, marks):
    """Write parameters, this worker's momentum and the number of workers after each of the steps in `marks`."""
    run, state = workers.elastic(make_step, axis_name="worker"), init(jax.device_count())
    for k in range(steps):
        state, loss = run(state, batch(k))
        if k + 1 in marks:
            own = lambda x: np.asarray(x.addressable_data(0))
            momentum = own(optax.tree.get(state[1], "ema"))
            found = {"params": own(state[0]), "momentum": momentum, "workers": len(loss)}
            file = folder / f"{k + 1} of {jax.process_index()}.npz"
            np.savez(file.with_suffix(".part.npz"), **found)
            file.with_suffix(".part.npz").rename(file)
    os._exit(0)  # an orderly end would wait for the dead


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[2]), int(sys.argv[3]), set(json.loads(sys.argv[4])))
