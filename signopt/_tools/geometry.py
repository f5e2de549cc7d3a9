"""Do signs suit my loss? How dense gradients, noise and curvature are while it is trained.

The loss is trained with SGD. Every so often one pass over the mini-batches takes the mean and the deviation of their
gradients, and Hutchinson's probes take the diagonal of the Hessian. Their densities say in which regime of Bernstein et
al. (2018, section 3) the loss is: I, where SGD should be faster; II, where signs should; or III, where theory says nothing.

    python -m signopt geometry --loss my_package.my_module:problem
"""

import argparse
from collections.abc import Iterator
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax

from signopt import diagnostics
from signopt._tools import problem as problems


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    problems.argument(parser)
    add, number = parser.add_argument, problems.number
    add("--learning_rate", type=number(float, 0), default=0.1, help="of SGD (default: 0.1)")
    add("--steps", type=number(int, 0), default=300, help="training steps (default: 300)")
    add("--measure_every", type=number(int, 1), default=50, help="steps between two looks (default: 50)")
    add("--probes", type=number(int, 1), default=8, help="of the Hessian (default: 8)")
    much = diagnostics.MUCH_MORE
    add("--threshold", type=number(float, 1), default=much, help=f"what 'much denser' means (default: {much:g})")


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Train with SGD and look at the geometry on the way.

    Yields:
      A record for each look.
    """
    yield from along_the_path(
        problems.load(options.loss),
        learning_rate=options.learning_rate,
        steps=options.steps,
        measure_every=options.measure_every,
        probes=options.probes,
        threshold=options.threshold,
    )


def along_the_path(
    problem: problems.Problem,
    *,
    learning_rate: float,
    steps: int,
    measure_every: int,
    probes: int,
    threshold: float = diagnostics.MUCH_MORE,
    watched: int = 0,
) -> Iterator[dict[str, Any]]:
    """Train with SGD and look at the geometry on the way.

    Args:
      problem: What to train.
      learning_rate: Of SGD.
      steps: Training steps.
      measure_every: Steps between two looks.
      probes: Of the Hessian.
      threshold: What "much denser" means.
      watched: Parameters whose noise in every mini-batch is recorded, too.

    Yields:
      A record for each look.

    Raises:
      UsageError: If the loss has no second derivatives.
    """
    loss, batches = problem.loss, problem.batches
    optimizer = optax.sgd(learning_rate)

    @jax.jit
    def train(params, order):
        def step(params, i):
            batch = jax.tree.map(lambda x: x[i], batches)
            updates, _ = optimizer.update(jax.grad(loss)(params, batch), optimizer.init(params))
            return optax.apply_updates(params, updates), None

        return lax.scan(step, params, order)[0]

    @jax.jit
    def look(params, key):
        def whole(params):
            return jnp.mean(lax.map(lambda batch: loss(params, batch), batches))

        moments = diagnostics.gradient_moments(jax.grad(loss), params, batches)
        curvature = diagnostics.hessian_diagonal(whole, params, key, probes=probes)
        noise = diagnostics.deviation(moments)
        ratios = diagnostics.signal_to_noise(moments)
        return whole(params), diagnostics.geometry(moments.mean, noise, curvature), diagnostics.share_above(ratios)

    @jax.jit
    def noise_of(params, chosen):
        def flat(tree):
            return jnp.concatenate([x.ravel() for x in jax.tree.leaves(tree)])

        return lax.map(lambda batch: flat(jax.grad(loss)(params, batch))[chosen], batches)

    params, rng = problem.params, np.random.default_rng(0)
    chosen = rng.choice(problem.size, min(watched, problem.size), replace=False)
    epochs = -(-max(1, steps) // problem.count)
    order = np.concatenate([rng.permutation(problem.count) for _ in range(epochs)])[: max(1, steps)]
    for start in range(0, steps + 1, measure_every):
        problems.progress(f"step {start} of {steps}")
        value, found, above = look(params, jax.random.fold_in(jax.random.key(1), start))
        if not float(found.curvature_density) > 0:
            raise problems.UsageError(
                "`--loss` has to have second derivatives, got a curvature that is zero everywhere."
            )
        record = {
            "step": start,
            "loss": float(value),
            **{name: float(x) for name, x in found._asdict().items()},
            "above_critical_line": float(above),
            "regime": diagnostics.regime(found, threshold=threshold),
            "words": diagnostics.explain(found, threshold=threshold),
        }
        if watched:
            samples = np.asarray(noise_of(params, chosen))
            record["noise"] = (samples - samples.mean(0)).T.tolist()
        yield record
        params = train(params, order[start : start + measure_every])
    problems.progress("")


COLUMNS = ["step", "loss", "phi(g)", "phi(sigma)", "phi(L)", "R1", "R2", "S > 2/sqrt(3)", "regime"]


def row(record: dict[str, Any]) -> list[str]:
    """A look as a row of the table whose header is `COLUMNS`."""
    densities = [f"{record[f'{name}_density']:.3f}" for name in ("gradient", "noise", "curvature")]
    ratios = [f"{record[name]:.2f}" for name in ("curvature_ratio", "noise_ratio")]
    above = f"{record['above_critical_line']:.1%}"
    return [str(record["step"]), f"{record['loss']:.3g}", *densities, *ratios, above, record["regime"]]


def report(records: list[dict[str, Any]]) -> str:
    """Densities and ratios, and what the look in the middle means."""
    drawn = problems.table(COLUMNS, [row(record) for record in records])
    said = records[len(records) // 2]
    legend = (
        "phi: densities of gradient, noise and curvature, from 1/d to 1. R1, R2: curvature's and noise's over the "
        "gradient's. S: how many gradients are loud enough for their sign."
    )
    why = ", the look in the middle: where training begins gradients are not typical" if len(records) > 1 else ""
    return "\n".join([drawn, "", legend, f"At step {said['step']}{why}. {said['words']}"])
