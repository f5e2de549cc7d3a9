"""The lines to paste of `python -m signopt advise`, as an optimizer."""

from typing import Any

import optax

from signopt._tools import choices

SETTLED = 20  # steps after which 1-bit Adam sends bits


def optimizer(choice: choices.Choice, workers: int, rate: Any) -> optax.GradientTransformation:
    """What the lines define, at another learning rate; 1-bit Adam switches soon.

    Args:
      choice: One of `choices.CHOICES`.
      workers: Their number.
      rate: The learning rate; it may be traced.
    """
    code = choices.code(choice, workers).replace("learning_rate = 1e-3  # yours\n", "")
    found = {"learning_rate": rate}
    exec(
        code.replace("onebit_adam(learning_rate", f"onebit_adam(learning_rate, settled=0.0, look_every={SETTLED}"),
        found,
    )
    return found["optimizer"]
