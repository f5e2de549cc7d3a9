"""One rule for arguments: a traced value cannot be checked, a concrete one is, whatever its type.

Every error names the call, the argument, the rule and the value.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.core import Tracer
import numpy as np


def at_least(least: float, value: Any, call: str, argument: str, cure: str = "") -> None:
    """Raise if `value` is known and not a number, or one below `least` or NaN somewhere."""
    _require(lambda x: x >= least, f"at least {least:g}", value, call, argument, cure)


def positive(value: Any, call: str, argument: str, cure: str = "") -> None:
    """Raise if `value` is known and not a number, or one that is not positive somewhere."""
    _require(lambda x: x > 0, "positive", value, call, argument, cure)


def number(value: Any, call: str, argument: str, cure: str = "") -> None:
    """Raise if `value` is known and not a number, or NaN somewhere."""
    _require(lambda x: ~np.isnan(x), "other than NaN", value, call, argument, cure)


def share(value: Any, call: str, argument: str, cure: str = "") -> None:
    """Raise if `value` is known and not a number in [0, 1]."""
    _require(lambda x: (x >= 0) & (x <= 1), "in [0, 1]", value, call, argument, cure)


def positive_share(value: Any, call: str, argument: str, cure: str = "") -> None:
    """Raise if `value` is no known number in (0, 1]: a size that shapes depend on cannot be traced."""
    if isinstance(value, Tracer):
        raise TypeError(f"`{call}({argument}=...)` has to be a number that is known in Python, got {value!r}.")
    _require(lambda x: (x > 0) & (x <= 1), "in (0, 1]", value, call, argument, cure)


def minority(value: Any, call: str, argument: str, cure: str = "") -> None:
    """Raise if `value` is known and not a number in [0, 1/2)."""
    _require(lambda x: (x >= 0) & (x < 0.5), "in [0, 1/2)", value, call, argument, cure)


def decay(value: Any, call: str, argument: str, cure: str = "") -> None:
    """Raise if `value` is known and not a number in [0, 1): a decay rate of 1 never forgets."""
    _require(lambda x: (x >= 0) & (x < 1), "in [0, 1)", value, call, argument, cure)


def learning_rate(value: Any, call: str, argument: str = "learning_rate") -> None:
    """Raise if a learning rate is known and not a number, or negative; schedules pass."""
    if not callable(value):
        at_least(0, value, call, argument)


def count(value: Any, call: str, argument: str, least: int = 1, cure: str = "") -> None:
    """Raise if `value` is no Python integer of at least `least`: a size that shapes depend on cannot be traced."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or isinstance(value, jax.Array):
        raise TypeError(
            f"`{call}({argument}=...)` has to be a Python integer, got {value!r}. Inside `optax.inject_hyperparams`, name "
            "it in `static_args`."
        )
    _require(lambda x: x >= least, f"at least {least}", value, call, argument, cure)


def choice(value: Any, choices: tuple[str, ...], call: str, argument: str) -> None:
    """Raise if `value` is none of `choices`."""
    if value not in choices:
        raise ValueError(f"`{call}({argument}=...)` has to be one of {', '.join(map(repr, choices))}, got {value!r}.")


def key(found: Any, call: str, method: str = "encode") -> Any:
    """The random key that a codec was given; raise if it was given none."""
    if found is None:
        raise ValueError(
            f"`{call}(...).{method}(key=...)` has to be given, got None: the codec is random. Give "
            "`jax.random.key(seed)`, another one in each step."
        )
    return found


def params(found: Any, call: str, why: str) -> Any:
    """The parameters that an update was given; raise if it was given none."""
    if found is None:
        raise ValueError(
            f"`{call}(...).update(params=...)` has to be given, got None: {why}. Call `update(updates, state, params)`."
        )
    return found


def is_zero(value: Any) -> bool:
    """Whether `value` is a Python 0, which leaves a computation out. A traced one may be anything later."""
    return isinstance(value, int | float) and value == 0


def _require(holds: Callable, rule: str, value: Any, call: str, argument: str, cure: str) -> None:
    if isinstance(value, Tracer):
        return
    known = np.asarray(jax.device_get(value))  # by an explicit transfer: users may have forbidden implicit ones
    more = f" {cure}" if cure else ""
    if known.dtype.kind in "bOSUMm":  # also bfloat16 and its like, kind V, are numbers
        raise TypeError(f"`{call}({argument}=...)` has to be a number {rule}, got {value!r}.{more}")
    if not np.all(holds(known.astype(np.float64))):
        raise ValueError(f"`{call}({argument}=...)` has to be {rule}, got {value}.{more}")
