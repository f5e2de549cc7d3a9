"""Figures 1, 2 and 4 of signSGD, and the curvature they lack: how dense gradients, noise and curvature are on the way.

A network is trained with SGD; every so often one pass over mini-batches takes the mean and the deviation of their gradients
(Welford), and Hutchinson's probes the diagonal of the Hessian. Their densities say which regime of Bernstein et al. (2018,
section 3) the model is in: phi(g) and phi(sigma) are the paper's figure 1 (theirs: both dense and coupled, all through the
training of a ResNet), the density of the gradient at step 0 its figure 4, and histograms of the noise of some parameters its
figure 2. `--loss` names a function of your own: `package.module:function`, which returns `(params, loss, batches)` with
`loss(params, batch)` a scalar and every leaf of `batches` with a leading axis of mini-batches.

    python -m experiments geometry
    python -m experiments geometry --loss my_package.my_module:problem

Time and numbers to expect are in experiments/README.md.
"""

from collections.abc import Callable, Iterator
import dataclasses
import importlib
import pathlib
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from matplotlib.figure import Figure
import numpy as np
import optax
import rich.table

from experiments.common import data
from experiments.common import models
from experiments.common.flags import flag
from experiments.common.records import Record
import signopt
from signopt import diagnostics

MODELS = {"mlp": models.MLP, "wide": models.WideMLP, "cnn": models.CNN}


@dataclasses.dataclass(frozen=True)
class Config:
    """The flags."""

    loss: str = flag("", "package.module:function that returns (params, loss, batches); ours if empty")
    model: str = flag("mlp", "ours: which network", choices=tuple(MODELS))
    batch_size: int = flag(32, "ours: examples in a mini-batch", at_least=1)
    learning_rate: float = flag(0.1, "of SGD", at_least=0)
    steps: int = flag(300, "training steps", at_least=0)
    measure_every: int = flag(50, "steps between two measurements", at_least=1)
    probes: int = flag(8, "of the Hessian", at_least=1)
    watched: int = flag(4, "parameters whose noise is drawn as histograms", at_least=1)
    threshold: float = flag(diagnostics.MUCH_MORE, "what 'much denser' means", at_least=1)
    workers: int = flag(1, "devices to ask for", at_least=1)
    seeds: int = flag(1, "seed 0 makes the network", at_least=1)
    output: str = flag("results/geometry", "folder for records and plots")


def problem(config: Config) -> tuple[Any, Callable, Any]:
    """The user's loss, or a network on the digits."""
    if config.loss:
        module, _, name = config.loss.partition(":")
        try:
            return getattr(importlib.import_module(module), name)()
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(
                f"`--loss {config.loss}` has to be package.module:function, for something that Python can import: {error}."
            ) from error
    dataset = data.load("digits")
    net = models.network(MODELS[config.model], dataset.train_images.shape[1:])

    def loss(params, batch):
        return models.loss(net, params, *batch)

    count = len(dataset.train_labels) // config.batch_size
    kept = count * config.batch_size
    batches = signopt.workers.split_batch((dataset.train_images[:kept], dataset.train_labels[:kept]), count)
    return net.init(jax.random.key(0)), loss, batches


def run(config: Config) -> Iterator[Record]:
    """Train with SGD and look at the geometry on the way.

    Yields:
      A record for each measurement.
    """
    params, loss, batches = jax.tree.map(lambda x: x if callable(x) else jnp.asarray(x), problem(config))
    count = len(jax.tree.leaves(batches)[0])
    optimizer = optax.sgd(config.learning_rate)

    @jax.jit
    def train(params, order):
        def step(params, i):
            batch = jax.tree.map(lambda x: x[i], batches)
            updates, _ = optimizer.update(jax.grad(loss)(params, batch), optimizer.init(params))
            return optax.apply_updates(params, updates), None

        return lax.scan(step, params, order)[0]

    @jax.jit
    def measure(params, key):
        def whole(params):
            return jnp.mean(lax.map(lambda batch: loss(params, batch), batches))

        moments = diagnostics.gradient_moments(jax.grad(loss), params, batches)
        curvature = diagnostics.hessian_diagonal(whole, params, key, probes=config.probes)
        noise = diagnostics.deviation(moments)
        ratios = diagnostics.signal_to_noise(moments)
        return whole(params), diagnostics.geometry(moments.mean, noise, curvature), diagnostics.share_above(ratios)

    @jax.jit
    def noise_of(params, chosen):
        def flat(tree):
            return jnp.concatenate([x.ravel() for x in jax.tree.leaves(tree)])

        return lax.map(lambda batch: flat(jax.grad(loss)(params, batch))[chosen], batches)

    num_params = sum(x.size for x in jax.tree.leaves(params))
    chosen = np.random.default_rng(0).choice(num_params, min(config.watched, num_params), replace=False)
    order = data.batches(0, count, 1, max(1, config.steps))[:, 0]
    for start in range(0, config.steps + 1, config.measure_every):
        value, found, above = measure(params, jax.random.fold_in(jax.random.key(1), start))
        if not float(found.curvature_density) > 0:
            raise ValueError("`--loss` has to have second derivatives, got a curvature that is zero everywhere.")
        samples = np.asarray(noise_of(params, chosen))
        yield {
            "step": start,
            "loss": float(value),
            **{name: float(x) for name, x in found._asdict().items()},
            "above_critical_line": float(above),
            "regime": diagnostics.regime(found, threshold=config.threshold),
            "words": diagnostics.explain(found, threshold=config.threshold),
            "noise": (samples - samples.mean(0)).T.tolist(),
        }
        params = train(params, order[start : start + config.measure_every])


def table(records: list[Record]) -> rich.table.Table:
    """Densities and ratios, and what the typical ones mean."""
    drawn = rich.table.Table(title="geometry along the path of SGD")
    for column in ("step", "loss", "phi(g)", "phi(sigma)", "phi(L)", "R1", "R2", "S > 2/sqrt(3)", "regime"):
        drawn.add_column(column, justify="right")
    for r in records[1:]:
        drawn.add_row(
            str(r["step"]), f"{r['loss']:.3g}", f"{r['gradient_density']:.3f}", f"{r['noise_density']:.3f}",
            f"{r['curvature_density']:.3f}", f"{r['curvature_ratio']:.2f}", f"{r['noise_ratio']:.2f}",
            f"{r['above_critical_line']:.1%}", r["regime"],
        )  # fmt: skip
    drawn.caption = records[len(records) // 2]["words"]
    return drawn


def plot(records: list[Record], folder: str) -> list[pathlib.Path]:
    """Draw densities, ratios, and histograms of the noise at the first and the last measurement.

    Returns:
      The figures' files.
    """
    watched = len(records[1]["noise"])
    figure = Figure(figsize=(4 * max(3, watched), 9), layout="constrained")
    grid = figure.add_gridspec(3, 6 * watched)
    steps = [r["step"] for r in records[1:]]
    densities, ratios = figure.add_subplot(grid[0, : 3 * watched]), figure.add_subplot(grid[0, 3 * watched :])
    for name, label in (("gradient", "g"), ("noise", r"\sigma"), ("curvature", "L")):
        densities.plot(steps, [r[f"{name}_density"] for r in records[1:]], "o-", label=rf"$\phi({label})$")
    for name, label in (("curvature_ratio", "$R_1$"), ("noise_ratio", "$R_2$")):
        ratios.plot(steps, [r[name] for r in records[1:]], "o-", label=label)
    ratios.axhline(records[0]["config"]["threshold"], color="grey", linestyle="--", label="much denser")
    densities.set(xlabel="steps", ylabel="density", ylim=(0, 1))
    ratios.set(xlabel="steps", ylabel="ratio of densities", ylim=(0, None))
    for axes in (densities, ratios):
        axes.legend()
        axes.grid(alpha=0.3)
    for row, record in ((1, records[1]), (2, records[-1])):
        for i, noise in enumerate(record["noise"]):
            axes = figure.add_subplot(grid[row, 6 * i : 6 * i + 6])
            axes.hist(noise, bins=20)
            axes.set(title=f"noise of a parameter, step {record['step']}", yticks=[])
    path = pathlib.Path(folder) / "geometry.png"
    figure.savefig(path, dpi=150)
    return [path]
