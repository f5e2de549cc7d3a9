"""The papers' bounds, by theorem number."""

import itertools


def warmup_steps(beta: float) -> int:
    r"""The steps for which Theorem 3 steps with the sign of the gradient while the momentum warms up.

    .. math::
      C(\beta) = \min\Big\{C \ge 1 : \frac{C}{2} \beta^C \le \frac{1}{(1 - \beta^2)(C + 1)} \text{ and }
      \beta^{C+1} \le \frac12 \Big\}

    Args:
      beta: Decay rate of the momentum, in [0, 1).

    Returns:
      C, for `signopt.scale_by_signum(beta, warmup_steps=C)`.

    Raises:
      ValueError: If `beta` is outside [0, 1).

    Examples:
      >>> from signopt import theory
      >>> theory.warmup_steps(0.9), theory.warmup_steps(0.99)
      (54, 894)

    References:
      Theorem 3 of Bernstein et al., `signSGD <https://arxiv.org/abs/1802.04434>`_, 2018, where C(0.9) = 54.
    """
    if not 0 <= beta < 1:
        raise ValueError(f"`warmup_steps(beta)` has to be in [0, 1), got {beta}.")
    return next(
        c for c in itertools.count(1) if c / 2 * beta**c <= 1 / ((1 - beta**2) * (c + 1)) and beta ** (c + 1) <= 0.5
    )
