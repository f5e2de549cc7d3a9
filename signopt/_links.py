"""The links that ready optimizers share: what stands left of the vote, the vote, and what stands right of it."""

from typing import Any, get_args

import jax
import jax.numpy as jnp
import optax

from signopt import _axis
from signopt import _check
from signopt import sign
from signopt.momentum import count_notfinite
from signopt.momentum import keep_finite
from signopt.precision import warn_if_narrow
from signopt.vote import Wire
from signopt.vote import majority_vote
from signopt.workers import state


def left(
    caller: str, tx: optax.GradientTransformation, axis_name: _axis.AxisName, num_workers: int | None
) -> optax.GradientTransformation:
    """What lies left of the vote, with a state that only finite values reach, and that counts the others if it votes."""
    finite = keep_finite(tx, caller, complex_too=True) if axis_name is None else count_notfinite(tx, caller)
    return own(caller, finite, axis_name, num_workers)


def own(
    caller: str, tx: optax.GradientTransformation, axis_name: _axis.AxisName, num_workers: int | None
) -> optax.GradientTransformation:
    """`tx` on every worker, with a state of its own if their number is known."""
    if num_workers is None:
        return tx
    if axis_name is None:
        raise ValueError(
            f"`{caller}(num_workers=...)` has to come with an axis to vote over, got num_workers={num_workers} and "
            "axis_name=None. Pass `axis_name=...`, or leave out `num_workers` for one worker."
        )
    return state.per_worker(tx, num_workers, axis_name=axis_name)


def right(
    caller: str, learning_rate: Any, axis_name: _axis.AxisName, weight_decay: Any, mask: Any, **settings: Any
) -> tuple[optax.GradientTransformation, ...]:
    """The links from the vote on: the vote with its settings, weight decay unless it is None, and the step."""
    _check.choice(settings["wire"], get_args(Wire), caller, "wire")
    if axis_name is not None:
        return (majority_vote(axis_name, **settings), *tail(caller, learning_rate, weight_decay, mask))
    for name in ("report", "delay"):
        if settings.get(name):
            raise ValueError(
                f"`{caller}({name}=...)` has to come with an axis to vote over, got {settings[name]} and axis_name=None. Pass "
                "`axis_name=...`: one worker has nothing to wait for and nobody to compare with."
            )
    return tail(caller, learning_rate, weight_decay, mask, first=_own_sign(caller))


def tail(
    caller: str,
    learning_rate: Any,
    weight_decay: Any = None,
    mask: Any = None,
    *,
    first: optax.GradientTransformation | None = None,
) -> tuple[optax.GradientTransformation, ...]:
    """Weight decay unless it is None, and the step. `first` comes before; with weight decay they are one link, as in optax."""
    _check.learning_rate(learning_rate, caller)
    step = warning(optax.scale_by_learning_rate(learning_rate), caller)
    if weight_decay is None:
        return (step,) if first is None else (first, step)
    _check.learning_rate(weight_decay, caller, "weight_decay")
    return _decayed(optax.identity() if first is None else first, weight_decay, mask), step


def _own_sign(caller):
    """The vote of one worker, without a state: `optax.scale_by_sign` that takes `present=`, by our rules for signs."""

    def own_sign(x, present):
        s = jnp.sign(x) if jnp.iscomplexobj(x) else sign.sign(x)
        return s if present is None else jnp.where(present, s, jnp.zeros_like(s))

    def update_fn(updates, state, params=None, *, present=None, **extra_args):
        del params, extra_args
        sign.require_floating(updates, caller, complex_too=True)
        return jax.tree.map(lambda x: own_sign(x, present), updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update_fn)


def warning(tx: optax.GradientTransformation, caller: str) -> optax.GradientTransformation:
    """`tx`, which says at init where steps of a sign round to nothing."""

    def init_fn(params):
        warn_if_narrow(params, caller)
        return tx.init(params)

    return optax.GradientTransformationExtraArgs(init_fn, optax.with_extra_args_support(tx).update)


def _decayed(tx, weight_decay, mask):
    """`tx`, which keeps no state, and `optax.add_decayed_weights` as one link.

    So the state is that of optax's own sign optimizers whatever the weight decay, and only a Python 0 needs no params.
    """
    tx = optax.with_extra_args_support(tx)
    decay = optax.add_decayed_weights(weight_decay, mask)

    def update_fn(updates, state, params=None, **extra_args):
        updates, _ = tx.update(updates, optax.EmptyState(), params, **extra_args)
        return (updates, state) if _check.is_zero(weight_decay) else decay.update(updates, state, params)

    return optax.GradientTransformationExtraArgs(decay.init, update_fn)
