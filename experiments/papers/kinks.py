"""Local minima of a network of two layers, also where a ReLU is at its kink: the first test of Yun, Sra and Jadbabaie.

A point where examples lie on a hidden unit's kink has a one-sided derivative in every direction. It is linear on each piece
into which these examples cut the unit's directions, so a descent direction is found, or excluded, by a linear program for
each piece: two to the power of the examples on the kink, for each unit. The paper needs one quadratic program for a unit;
its second-order test at a kink is left out here.
"""

from collections.abc import Iterator
import itertools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.optimize

from experiments.common.records import Record
from experiments.papers import problems
import signopt

TOLERANCE = 1e-6


def steepest(
    params: Any, inputs: np.ndarray, outputs: np.ndarray, *, near: float = 1e-6
) -> tuple[float, dict[str, np.ndarray]]:
    """The one-sided derivative of the mean squared error in the steepest direction whose entries are at most one.

    Args:
      params: "inner", `(units, size)`, and "outer", `(units,)`.
      inputs: `(examples, size)`.
      outputs: `(examples,)`.
      near: How close to zero an input to a ReLU counts as at its kink.

    Returns:
      The derivative, negative if there is a way down and 0 at a stationary point, and the direction.
    """
    inner, outer = (np.asarray(params[name], float) for name in ("inner", "outer"))
    inputs = np.asarray(inputs, float)
    at = inputs @ inner.T
    weight = (np.maximum(at, 0) @ outer - np.asarray(outputs, float)) / len(inputs)
    by_outer = np.maximum(at, 0).T @ weight
    total, direction = -np.abs(by_outer).sum(), {"inner": np.zeros_like(inner), "outer": -np.sign(by_outer)}
    for unit in range(len(inner)):
        kink = np.flatnonzero(np.abs(at[:, unit]) <= near)
        smooth = weight * outer[unit] * (at[:, unit] > near)
        smooth[kink] = 0.0
        best, found = 0.0, np.zeros(inputs.shape[1])
        for sides in itertools.product((-1.0, 1.0), repeat=len(kink)):
            active = kink[np.array(sides, float) > 0] if len(kink) else kink
            slope = inputs.T @ smooth + inputs[active].T @ (weight[active] * outer[unit])
            walls = -np.array(sides)[:, None] * inputs[kink] if len(kink) else None
            limits = np.zeros(len(kink)) if len(kink) else None
            done = scipy.optimize.linprog(slope, A_ub=walls, b_ub=limits, bounds=(-1, 1))
            if done.fun < best:
                best, found = done.fun, done.x
        total, direction["inner"][unit] = total + best, found
    return float(total), direction


def verdict(params: Any, inputs: np.ndarray, outputs: np.ndarray) -> str:
    """Whether there is a "descent direction", or the point is "stationary"."""
    return "stationary" if steepest(params, inputs, outputs)[0] > -TOLERANCE else "descent direction"


def descents(seeds: int) -> Iterator[Record]:
    """How steep the way down is that is left, at the start of the problem `relu` and after full-batch steps from there.

    Yields:
      A record for each optimizer and number of steps, and one for the gradient as JAX takes it.
    """
    problem = problems.PROBLEMS["relu"]
    instances = jax.vmap(problem.draw)(jax.random.split(jax.random.key(0), seeds))
    whole = jnp.arange(instances["inputs"].shape[1])

    def slopes(params):
        each = (
            jax.tree.map(lambda x, i=i: x[i], (params, instances["inputs"], instances["outputs"])) for i in range(seeds)
        )
        return [-steepest(*one)[0] for one in each]

    def gradient(params, instance):
        return jax.grad(problem.loss)(params, instance, whole)

    seen = jax.vmap(gradient)(instances["start"], instances)
    norms = sum(jnp.abs(x).reshape(seeds, -1).sum(1) for x in jax.tree.leaves(seen))
    yield {"line": "JAX's gradient", "x": 0, "values": np.asarray(norms).tolist()}
    for line, make in {"sgd": optax.sgd, "signsgd": signopt.signsgd}.items():
        yield {"line": line, "x": 0, "values": slopes(instances["start"])}
        for steps in (100, 10_000):
            tx = make(optax.cosine_decay_schedule(0.1 if line == "sgd" else 0.01, steps))

            def descend(instance, tx=tx, steps=steps):
                def step(state, _):
                    params, opt_state = state
                    updates, opt_state = tx.update(gradient(params, instance), opt_state, params)
                    return (optax.apply_updates(params, updates), opt_state), None

                start = instance["start"]
                return lax.scan(step, (start, tx.init(start)), length=steps)[0][0]

            yield {"line": line, "x": steps, "values": slopes(jax.jit(jax.vmap(descend))(instances))}
