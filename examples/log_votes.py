"""What to log of a training by votes: to TensorBoard, and to a file of JSON lines.

    python examples/log_votes.py --folder /tmp/run
    tensorboard --logdir /tmp/run

Loss, how far workers agree, how many abstain, what was not finite, what a compressed mean still owes, and bytes. One worker gets a
NaN now and then, so that there is something to see.
"""

import argparse
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import optax
from tensorboardX import SummaryWriter

import signopt

WORKERS = 8


def optimizers() -> dict[str, optax.GradientTransformationExtraArgs]:
    """A vote and a compressed mean, which both report."""
    scaled = signopt.codecs.scaled_sign(block=256)
    border = signopt.mean("worker", uplink=scaled, downlink=scaled, num_workers=WORKERS, report=True)
    return {
        "vote": signopt.signum(2e-3, axis_name="worker", num_workers=WORKERS, wire="one_bit", report=True),
        "mean": optax.chain(border, optax.sgd(3e-3, momentum=0.9)),
    }


def loss_fn(params: dict[str, jax.Array], x: jax.Array, y: jax.Array) -> jax.Array:
    """Of a network with one hidden layer."""
    return jnp.mean((jnp.tanh(x @ params["in"]) @ params["out"] - y) ** 2)


def metrics(opt_state: Any) -> dict[str, float]:
    """Scalars from an optimizer's state, between two steps."""
    report = optax.tree.get(opt_state, "report")._asdict()
    found = {f"report/{name}": float(x) for name, x in report.items()}
    if (not_finite := optax.tree.get(opt_state, "total_notfinite")) is not None:
        found["not_finite"] = int(not_finite.max())  # of the worker with the most
    return found


def main(folder: str = "runs/log_votes", steps: int = 300) -> dict[str, dict[str, float]]:
    """Train with both, and return what was logged last."""
    keys = jax.random.split(jax.random.key(0), 3)
    params = {"in": jax.random.normal(keys[0], (16, 64)) / 4, "out": jnp.zeros((64, 1))}
    truth, last = jax.random.normal(keys[1], (16, 1)), {}
    for name, optimizer in optimizers().items():

        def step(state, batch, optimizer=optimizer):
            params, opt_state = state
            loss, grads = signopt.workers.value_and_grad(loss_fn, axis_name="worker")(params, *batch)
            updates, opt_state = optimizer.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), loss

        run = jax.jit(signopt.workers.simulate(step, WORKERS, axis_name="worker"))
        per_step = signopt.wire.bytes_sent(params, WORKERS, optimizer)
        state, path = (params, optimizer.init(params)), pathlib.Path(folder) / name
        with SummaryWriter(str(path)) as board, (path / "log.jsonl").open("w") as lines:
            for number in range(1, steps + 1):
                x = jax.random.normal(jax.random.fold_in(keys[2], number), (128, 16))
                y = jnp.sin(x @ truth / 4)
                if number % 50 == 3:
                    x = x.at[0, 0].set(jnp.nan)
                state, losses = run(state, (x, y))
                if number % 10 and number != steps:
                    continue  # reading a number waits for the step
                found = {"loss": float(jnp.nanmean(losses)), **metrics(state[1]), "bytes": per_step * number}
                for key, value in found.items():
                    board.add_scalar(key, value, number)
                lines.write(json.dumps({"step": number} | found) + "\n")
                last[name] = found
        print(name, json.dumps(last[name]))
    return last


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default="runs/log_votes")
    parser.add_argument("--steps", type=int, default=300)
    main(**vars(parser.parse_args()))
