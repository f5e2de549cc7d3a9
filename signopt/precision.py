r"""Parameters in bfloat16: steps that would vanish, kept.

bfloat16 has eight bits of precision, so near 1.0 it moves in steps of :math:`2^{-7}` up and :math:`2^{-8}` down, and a
sign step of 1e-3 rounds to nothing, on every coordinate and for ever. Two wrappers go around the whole optimizer: one keeps
the parameters in float32 beside the bfloat16 ones, the other rounds up or down at random, so that steps arrive on average.
Either stands right of the border and does the same on every worker.
"""

from typing import Any, NamedTuple
import warnings

import jax
from jax import lax
import jax.numpy as jnp
import optax

from signopt import _check


class MasterWeightsState(NamedTuple):
    """The parameters as they would be in float32.

    Attributes:
      inner_state: The state of the wrapped optimizer.
      master: The parameters in float32, where they are narrower; else without entries. Shared.
    """

    inner_state: optax.OptState
    master: optax.Params


class StochasticRoundingState(NamedTuple):
    """How many steps were rounded.

    Attributes:
      inner_state: The state of the wrapped optimizer.
      count: int32 scalar. Shared.
    """

    inner_state: optax.OptState
    count: jax.Array


def master_weights(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    r"""Train a float32 copy of narrower parameters, and hand out its rounding.

    .. math::
      y_{t+1} = y_t + u(g_t, y_t), \qquad x_{t+1} = \operatorname{round}(y_{t+1})

    Costs 4 bytes per parameter. The wrapped optimizer sees float32 gradients and parameters, and keeps float32 momentum
    unless told otherwise. Nothing but this optimizer may change the parameters in between.

    Args:
      tx: The whole optimizer.

    Returns:
      A transformation with a `MasterWeightsState`. Updates come back in the parameters' dtypes, and added to them give
      the rounded copy, up to one unit in the last place where a parameter more than doubles or changes its sign in a step;
      no error stays for the next step.

    Raises:
      ValueError: In `update`, without `params`.

    Examples:
      >>> import jax.numpy as jnp, optax, signopt
      >>> from signopt.precision import master_weights
      >>> weight, gradient = jnp.ones([], jnp.bfloat16), jnp.ones([], jnp.bfloat16)
      >>> for tx in (signopt.signsgd(1e-3), master_weights(signopt.signsgd(1e-3))):
      ...     params, state = weight, tx.init(weight)
      ...     for _ in range(100):
      ...         updates, state = tx.update(gradient, state, params)
      ...         params = optax.apply_updates(params, updates)
      ...     print(params)
      1
      0.898438
    """
    tx = optax.with_extra_args_support(tx)

    def init_fn(params):
        return MasterWeightsState(tx.init(_widened(params)), jax.tree.map(_master, params, _widened(params)))

    def update_fn(updates, state, params=None, **extra_args):
        params = _check.params(params, "master_weights", "updates lead to the rounded copy")
        wide = jax.tree.map(lambda p, y: y if _is_narrow(p) else p, params, state.master)
        steps, inner_state = tx.update(_widened(updates), state.inner_state, wide, **extra_args)
        new = optax.apply_updates(wide, steps)
        updates = jax.tree.map(lambda p, u, y: _onto(p, y) if _is_narrow(p) else u, params, steps, new)
        return updates, MasterWeightsState(inner_state, jax.tree.map(_master, params, new))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def stochastic_rounding(tx: optax.GradientTransformation, key: jax.Array) -> optax.GradientTransformationExtraArgs:
    r"""Round bfloat16 parameters up or down at random after each step, right on average.

    .. math::
      E[x_{t+1}] = x_t + u(g_t, x_t)

    Costs no memory, and noise of one unit in the last place. The coins come from the key and the step alone, so every
    worker throws the same.

    Args:
      tx: The whole optimizer. It sees float32 gradients and parameters; keep its momentum narrow with
        `accumulator_dtype=jnp.bfloat16`.
      key: A random key, the same on every worker.

    Returns:
      A transformation with a `StochasticRoundingState`. Leaves of other dtypes than bfloat16 are left as they are.

    Raises:
      ValueError: In `update`, without `params`.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, signopt
      >>> from signopt.precision import stochastic_rounding
      >>> params = jnp.ones(10_000, jnp.bfloat16)
      >>> tx = stochastic_rounding(signopt.signsgd(1e-3), jax.random.key(0))
      >>> updates, _ = tx.update(jnp.ones_like(params), tx.init(params), params)
      >>> params = optax.apply_updates(params, updates)
      >>> jnp.unique(params).tolist(), round(float(params.astype(jnp.float32).mean()), 3)
      ([0.99609375, 1.0], 0.999)

    References:
      Gupta et al., `Deep Learning with Limited Numerical Precision <https://arxiv.org/abs/1502.02551>`_, 2015, section 3.1.
    """
    tx = optax.with_extra_args_support(tx)

    def init_fn(params):
        return StochasticRoundingState(tx.init(_widened(params)), jnp.zeros([], jnp.int32))

    def update_fn(updates, state, params=None, **extra_args):
        params = _check.params(params, "stochastic_rounding", "updates lead to what rounding gives")
        wide = _widened(params)
        steps, inner_state = tx.update(_widened(updates), state.inner_state, wide, **extra_args)
        new = optax.apply_updates(wide, steps)
        keys = optax.tree.split_key_like(jax.random.fold_in(key, state.count), new)

        def rounded(p, u, y, k):
            dtype = jnp.result_type(p)
            return _onto(p, _round(k, y)) if dtype == jnp.bfloat16 else jnp.asarray(u).astype(dtype)

        updates = jax.tree.map(rounded, params, steps, new, keys)
        return updates, StochasticRoundingState(inner_state, state.count + 1)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def warn_if_narrow(params: Any, caller: str) -> None:
    """Say that small steps vanish in parameters narrower than float32, as an optimizer's `init` should.

    Warns:
      UserWarning: If a leaf has such a dtype. Python shows it once for each place in the code.
    """
    for path, p in jax.tree.leaves_with_path(params):
        if _is_narrow(p):
            dtype = jnp.result_type(p)
            unit = float(jnp.finfo(dtype).eps)
            warnings.warn(
                f"`{caller}` got {dtype} parameters at `params{jax.tree_util.keystr(path)}`: a sign step below "
                f"{unit / 4:.1e} on a weight of 1.0 does nothing in {dtype}. Wrap the optimizer in "
                "`signopt.precision.master_weights` or `stochastic_rounding`, or keep float32 parameters.",
                stacklevel=3,
            )
            return


def _is_narrow(p):
    dtype = jnp.result_type(p)
    return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32


def _widened(tree):
    def widen(x):
        if not _is_narrow(x):
            return x
        if isinstance(x, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(x.shape, jnp.float32)
        return jnp.asarray(x).astype(jnp.float32)

    return jax.tree.map(widen, tree)


def _master(p, y):
    """`y` for a narrow parameter; for another one its shape without entries, because all states map over parameters."""
    dtype = jnp.result_type(y)
    shape = jnp.shape(p) if _is_narrow(p) or jnp.ndim(p) == 0 else (0, *jnp.shape(p)[1:])
    if isinstance(y, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(shape, dtype)
    return jnp.asarray(y, dtype) if shape == jnp.shape(p) else jnp.zeros(shape, dtype)


def _onto(p, target):
    """The update that moves `p` to `target`, rounded; exact between neighbours in size (Sterbenz)."""
    dtype = jnp.result_type(p)
    return (target.astype(dtype).astype(jnp.float32) - jnp.asarray(p).astype(jnp.float32)).astype(dtype)


def _round(key, y):
    """float32 to bfloat16: the 16 bits that go decide the odds. A carry reaches the next number, as it should."""
    bits = lax.bitcast_convert_type(y, jnp.uint32)
    odds = jax.random.bits(key, y.shape, jnp.uint16).astype(jnp.uint32)
    kept = jnp.where(jnp.isfinite(y), bits + odds, bits) & jnp.uint32(0xFFFF0000)
    return lax.bitcast_convert_type(kept, jnp.float32).astype(jnp.bfloat16)
