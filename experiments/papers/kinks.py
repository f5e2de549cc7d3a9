"""Local minima of a network of two layers, also where a ReLU is at its kink: the first test of Yun, Sra and Jadbabaie.

A point where examples lie on a hidden unit's kink has a one-sided derivative in every direction. It is linear on each piece
into which these examples cut the unit's directions, so a descent direction is found, or excluded, by a linear program for
each piece: two to the power of the examples on the kink, for each unit. The paper needs one quadratic program for a unit;
its second-order test at a kink is left out here.
"""

import itertools
from typing import Any

import numpy as np
import scipy.optimize

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
