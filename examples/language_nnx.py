"""A byte language model in Flax nnx, by SignMuon: dropout, metrics, and a vote on one bit.

    python examples/language_nnx.py                    # this file's own text, on all devices
    python examples/language_nnx.py --text book.txt

Marked with "vote": what differs from a loop whose gradients are averaged.
"""

import argparse
from collections.abc import Iterator
import pathlib

from flax import nnx
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax

import signopt

BYTES = 256


class Block(nnx.Module):
    """Attention and a network of four times the width."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.norms = nnx.List([nnx.RMSNorm(width, rngs=rngs) for _ in range(2)])
        self.attention = nnx.MultiHeadAttention(num_heads=4, in_features=width, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(width, 4 * width, rngs=rngs), nnx.Linear(4 * width, width, rngs=rngs)
        self.dropout = nnx.Dropout(0.1)

    def __call__(self, x, rngs):
        """A stream (batch, context, width) from one."""
        mask = nnx.make_causal_mask(x[..., 0])
        x = x + self.dropout(self.attention(self.norms[0](x), mask=mask), rngs=rngs)
        return x + self.dropout(self.down(nnx.gelu(self.up(self.norms[1](x)))), rngs=rngs)


class Model(nnx.Module):
    """Embeddings, blocks, and a head."""

    def __init__(self, width: int, layers: int, context: int, rngs: nnx.Rngs):
        self.embed, self.place = nnx.Embed(BYTES, width, rngs=rngs), nnx.Embed(context, width, rngs=rngs)
        self.blocks = nnx.List([Block(width, rngs) for _ in range(layers)])
        self.norm, self.head = nnx.RMSNorm(width, rngs=rngs), nnx.Linear(width, BYTES, rngs=rngs)

    def __call__(self, read, rngs):
        """Logits (batch, context, 256) of bytes (batch, context)."""
        x = self.embed(read) + self.place(jnp.arange(read.shape[-1]))
        for block in self.blocks:
            x = block(x, rngs)
        return self.head(self.norm(x))


def hidden_matrices(params):
    """Which leaves are matrices of hidden layers: everything with two or three axes in a block, no embedding, no head."""

    def number(path, x):
        names = [str(getattr(key, "key", "")) for key in path]
        if "blocks" not in names or "kernel" not in names:
            return None
        # Attention's kernels are (width, heads, head) on the way in and (heads, head, width) on the way out.
        axes = {2: (0, 1), 3: ((0, 1), 2) if "out" in names else (0, (1, 2))}.get(x.ndim)
        return None if axes is None else optax.contrib.MuonDimensionNumbers(*axes)

    return jax.tree_util.tree_map_with_path(number, params)


def windows(text: np.ndarray, batch_size: int, context: int, steps: int) -> Iterator[np.ndarray]:
    """Pieces of the text, drawn at random."""
    rng = np.random.default_rng(0)
    for _ in range(steps):
        starts = rng.integers(len(text) - context - 1, size=(batch_size, 1))
        yield text[starts + np.arange(context + 1)].astype(np.int32)


def main(
    text: str = __file__, steps: int = 300, batch_size: int = 32, width: int = 64, layers: int = 2, context: int = 64
) -> list[dict[str, float]]:
    """Train, and return the metrics every 20 steps."""
    workers = jax.device_count()
    mesh = jax.make_mesh((workers,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    model = Model(width, layers, context, nnx.Rngs(0))
    graph, params = nnx.split(model, nnx.Param)
    schedule = optax.warmup_cosine_decay_schedule(0.0, 4e-3, steps // 10 + 1, steps + 1)
    optimizer = signopt.sign_muon(  # vote
        schedule,
        axis_name="batch",
        num_workers=workers,
        wire="one_bit",
        muon_weight_dimension_numbers=hidden_matrices,
        weight_decay=0.01,
        report=True,
    )

    def train_step(state, batch):
        params, opt_state, key = state
        key, own = jax.random.split(key)
        own = jax.random.fold_in(own, lax.axis_index("batch"))  # vote: no two workers drop the same units

        def loss_fn(params):
            logits = nnx.merge(graph, params)(batch[:, :-1], nnx.Rngs(dropout=own))
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:])
            return losses.mean(), jnp.mean(jnp.argmax(logits, -1) == batch[:, 1:])

        # vote: a worker's own gradient, and no mean of it
        value_and_grad = signopt.workers.value_and_grad(loss_fn, axis_name="batch", has_aux=True)
        (loss, accuracy), grads = value_and_grad(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state, key), (loss, accuracy)

    step = signopt.workers.on_mesh(train_step, mesh, axis_name="batch")
    metrics = nnx.MultiMetric(loss=nnx.metrics.Average("loss"), accuracy=nnx.metrics.Average("accuracy"))
    state, found = (params, optimizer.init(params), jax.random.key(1)), []
    bytes_ = np.frombuffer(pathlib.Path(text).read_bytes(), np.uint8)
    for number, batch in enumerate(windows(bytes_, batch_size, context, steps), 1):
        state, (loss, accuracy) = step(state, batch)
        metrics.update(loss=loss, accuracy=accuracy)
        if number % 20 == 0 or number == steps:
            now = {name: float(value) for name, value in metrics.compute().items()}
            now["margin"] = float(optax.tree.get(state[1], "report").margin)  # vote: how far workers agree
            found.append(now)
            metrics.reset()
            print(f"step {number}: " + ", ".join(f"{name} {value:.3f}" for name, value in now.items()))
    nnx.update(model, state[0])  # the trained model, for sampling or saving
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", default=__file__)
    parser.add_argument("--steps", type=int, default=300)
    main(**vars(parser.parse_args()))
