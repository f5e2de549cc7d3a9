"""What densities say about signs and SGD."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from signopt import _check
from signopt.diagnostics.densities import density

MUCH_MORE = 3.0  # what the paper's ">> 1" means here, unless the user says otherwise


class Geometry(NamedTuple):
    """Densities, and the two ratios that the paper's comparison of signSGD and SGD turns on.

    Attributes:
      gradient_density: The density of g. Along a path the paper's bound takes the smallest.
      noise_density: The density of the standard deviations.
      curvature_density: The density of the curvature; NaN if it was not measured.
      noise_ratio: R2: noise density over gradient density.
      curvature_ratio: R1: root of the curvature density over gradient density; NaN if it was not measured.
    """

    gradient_density: jax.Array
    noise_density: jax.Array
    curvature_density: jax.Array
    noise_ratio: jax.Array
    curvature_ratio: jax.Array


def geometry(gradient: Any, noise: Any, curvature: Any = None) -> Geometry:
    r"""Compare densities: :math:`R_1 = \sqrt{\phi(L)} / \phi(g)` and :math:`R_2 = \phi(\sigma) / \phi(g)`.

    Args:
      gradient: g, such as `moments.mean`. The noise left in a mean over few samples makes it look dense.
      noise: :math:`\sigma`, such as `deviation(moments)`.
      curvature: L, such as `hessian_diagonal(loss, params, key)`; its signs do not matter. None if unknown.

    References:
      Section 3 of Bernstein et al., `signSGD <https://arxiv.org/abs/1802.04434>`_, 2018, which leaves the curvature open.
    """
    g, s = density(gradient), density(noise)
    unit = jnp.where(g > 0, g, jnp.nan)  # without a gradient there is nothing to compare
    if curvature is None:
        unknown = jnp.full([], jnp.nan, jnp.float32)
        return Geometry(g, s, unknown, noise_ratio=s / unit, curvature_ratio=unknown)
    c = density(curvature)
    return Geometry(g, s, c, noise_ratio=s / unit, curvature_ratio=jnp.sqrt(c) / unit)


def regime(found: Geometry, *, threshold: float = MUCH_MORE) -> str:
    r"""Which of the paper's three cases holds: "I", "II" or "III", or two of them where the curvature is unknown.

    I: both ratios exceed the threshold. II: neither does. III: one does.

    Args:
      found: What `geometry` returned, outside `jax.jit`.
      threshold: What ":math:`\gg 1`" means.

    Raises:
      ValueError: If `threshold` is below 1, or there was no gradient to compare with.
    """
    _check.at_least(1, threshold, "regime", "threshold")
    if jnp.isnan(found.noise_ratio):
        raise ValueError(
            "`regime(found)` has to be given a geometry with a gradient, got one whose gradient is zero or not finite."
        )
    noise_is_denser = bool(found.noise_ratio > threshold)
    if jnp.isnan(found.curvature_ratio):
        return "I or III" if noise_is_denser else "II or III"
    curvature_is_denser = bool(found.curvature_ratio > threshold)
    if noise_is_denser == curvature_is_denser:
        return "I" if noise_is_denser else "II"
    return "III"


def explain(found: Geometry, *, threshold: float = MUCH_MORE) -> str:
    """Say in words what a geometry means for the choice between signs and SGD.

    Args:
      found: What `geometry` returned, outside `jax.jit`; best measured along the path of SGD.
      threshold: As in `regime`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from signopt.diagnostics import explain, geometry
      >>> print(explain(geometry(jnp.ones(4), jnp.array([1.0, 0, 0, 0]), jnp.ones(4))))
      Regime II: signs suit this. The noise is 0.2 times and the curvature (its root) 1.0 times as dense as the gradient;
      neither is more than 3 times. Theory expects signSGD to be as fast as SGD or faster.
    """
    case = regime(found, threshold=threshold)
    curved = "of unknown density" if jnp.isnan(found.curvature_ratio) else f"{float(found.curvature_ratio):.1f} times"
    measured = (
        f"The noise is {float(found.noise_ratio):.1f} times and the curvature (its root) {curved} as dense as the gradient"
        if "unknown" not in curved
        else f"The noise is {float(found.noise_ratio):.1f} times as dense as the gradient; the curvature was not measured"
    )
    line = f"more than {threshold:g} times"
    verdict = {
        "I": (
            "SGD suits this better",
            f"both are {line}. A few coordinates carry the gradient, which signs do not see.",
        ),
        "II": ("signs suit this", f"neither is {line}. Theory expects signSGD to be as fast as SGD or faster."),
        "III": ("theory cannot tell", f"one of them is {line}. Try both."),
        "I or III": ("SGD may suit this better", f"the noise is {line}. Measure the curvature, or try both."),
        "II or III": ("signs may suit this", f"the noise is not {line}. Measure the curvature, or try signs."),
    }[case]
    return f"Regime {case}: {verdict[0]}. {measured}; {verdict[1]}"
