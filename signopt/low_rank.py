r"""Means of matrices in low rank: two thin factors travel instead of the matrix.

.. math::
  p_m = v_m + e_m, \quad P = \operatorname{orth}\Big(\frac1M \sum_m p_m Q\Big), \quad
  Q \leftarrow \frac1M \sum_m p_m^\top P, \quad u = P Q^\top, \quad e_m \leftarrow p_m - u

Each step goes on from the Q of the last one, so that over time the factors turn towards the largest singular directions of
what the workers send. Everything that is no matrix is averaged as it is, in the message of the first factors.
"""

import math
from typing import Any, NamedTuple, cast

import jax
from jax import lax
import jax.numpy as jnp
import optax

from signopt import _axis
from signopt import _check
from signopt import _float
from signopt import border as borders
from signopt import sign
from signopt.means import plain
from signopt.workers import state as states


class LowRankMeanState(NamedTuple):
    """What a mean in low rank keeps.

    Attributes:
      count: int32 scalar: the steps so far. Shared.
      factors: For each matrix Q, `(columns, rank)` float32; empty for other leaves. Shared.
      own: A `PerWorkerState` with what each worker has not sent yet, a tree like the parameters.
    """

    count: jax.Array
    factors: Any
    own: Any


def low_rank_mean(
    axis_name: _axis.AxisName,
    *,
    rank: int,
    num_workers: int | None = None,
    dense_steps: int = 0,
    key: jax.Array | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Replace each worker's updates by a mean over all workers of low rank, with memory of what is missing.

    A leaf of more than one axis is a matrix: its last axis is the columns, all others are the rows. One whose factors would
    be no smaller than itself is averaged as it is, and so are vectors and scalars. Two `psum` a step, whatever the number of
    leaves: :math:`2 \frac{M-1}{M} r (n + k)` float32 per worker for a matrix of n x k.

    Args:
      axis_name: The workers, as in `mean`.
      rank: r >= 1. The more, the less is late.
      num_workers: Size of the axis: what a worker has not sent yet belongs to it. None without an axis.
      dense_steps: For so many steps at the start average everything as it is, while gradients still change fast.
      key: A random key for the first factors, the same on every worker. None takes `jax.random.key(0)`.

    Returns:
      A transformation with a `LowRankMeanState`. Its `update` also takes `present`, as that of `mean`. Updates keep their
      shapes and dtypes. An entry that is not finite counts as 0.

    Raises:
      ValueError: If `rank` is not positive, or `dense_steps` negative; in `init`, if there are matrices and none has a rank
        as large; in `update`, as `mean` does.
      TypeError: If `rank` is no Python integer; in `update`, if a leaf is not of a floating-point dtype.

    Examples:
      >>> import jax.numpy as jnp, signopt
      >>> tx = signopt.low_rank_mean(None, rank=1)
      >>> outer = jnp.outer(jnp.array([1.0, 2.0, 3.0, 4.0]), jnp.array([1.0, -1.0, 2.0]))
      >>> found, _ = tx.update(outer, tx.init(outer))
      >>> bool(jnp.allclose(found, outer, atol=1e-5))  # a matrix of rank one is sent as it is
      True

    References:
      Vogels et al., `PowerSGD <https://arxiv.org/abs/1905.13727>`_, 2019, Algorithms 1 and 2. They leave out the residual
      of a step whose worker is absent or not finite; here it waits.
    """
    caller = "low_rank_mean"
    _check.count(rank, caller, "rank")
    _check.count(dense_steps, caller, "dense_steps", least=0)
    if num_workers is None and axis_name is not None:
        raise ValueError(
            f"`{caller}(num_workers=...)` has to be given, got None: what a worker has not sent yet belongs to it. Pass the "
            f"size of axis {axis_name!r}."
        )

    def init_own(params):
        return jax.tree.map(lambda x: jnp.zeros(_float.shape(x), _float.wide_dtype(x)), params)

    def update_own(updates, residual, params=None, *, factors, context):
        del params
        target = jax.tree.map(
            lambda x, e: borders.finite(_float.widen(x)) + e.astype(_float.wide_dtype(x)), updates, residual
        )

        def dense():
            nothing = jax.tree.map(lambda x: _axis.to_varying(jnp.zeros_like(x), axis_name), target)
            return _mean(target, context), factors, nothing

        def compressed():
            matrices = jax.tree.map(lambda x: _as_matrix(x) if _pays(x, rank) else x, target)
            first = jax.tree.map(lambda x, q: x @ q if q.size else x, matrices, factors)
            first = _mean(first, context)
            left = jax.tree.map(lambda p, q: jnp.linalg.qr(p)[0] if q.size else p, first, factors)
            second = jax.tree.map(lambda x, p, q: x.T @ p if q.size else q, matrices, left, factors)
            right = _mean(second, context)
            found = jax.tree.map(
                lambda x, p, q: (p @ q.T).reshape(x.shape) if q.size else p.reshape(x.shape), target, left, right
            )
            return found, right, jax.tree.map(jnp.subtract, target, found)

        if dense_steps:
            found, new_factors, left = lax.cond(context.step < dense_steps, dense, compressed)
        else:
            found, new_factors, left = compressed()
        if context.present is not None:
            left = jax.tree.map(lambda new, old: jnp.where(context.present, new, old), left, residual)
        return (found, new_factors), left

    own_tx: Any = optax.GradientTransformationExtraArgs(init_own, cast(Any, update_own))
    if num_workers is not None:
        own_tx = states.per_worker(own_tx, num_workers, axis_name=axis_name)

    def init_fn(params):
        leaves, treedef = jax.tree.flatten(params)
        _require_rank(caller, rank, params)
        keys = jax.random.split(jax.random.key(0) if key is None else key, max(1, len(leaves)))
        drawn = [
            jax.random.normal(keys[i], (_float.shape(x)[-1], rank) if _pays(x, rank) else (0,), jnp.float32)
            for i, x in enumerate(leaves)
        ]
        return LowRankMeanState(jnp.zeros([], jnp.int32), jax.tree.unflatten(treedef, drawn), own_tx.init(params))

    def update_fn(updates, state, params=None, *, present=None, **extra_args):
        del params, extra_args
        context = borders.context_of(axis_name, state.count, caller, present=present)
        sign.require_floating(updates, caller)
        updates = jax.tree.map(jnp.asarray, updates)
        _axis.require_varying(updates, axis_name, caller)
        (found, factors), own = own_tx.update(updates, state.own, factors=state.factors, context=context)
        found = jax.tree.map(lambda x, u: x.astype(u.dtype), found, updates)
        return found, LowRankMeanState(jnp.asarray(optax.safe_increment(state.count)), factors, own)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _mean(tree, context):
    return borders.run(plain(), tree, borders.Memory(), context)[0]


def _as_matrix(x):
    return x.reshape(-1, x.shape[-1])


def _pays(x, rank):
    shape = _float.shape(x)
    if len(shape) < 2 or not math.prod(shape):
        return False
    rows, columns = math.prod(shape[:-1]), shape[-1]
    return rank * (rows + columns) < rows * columns


def _require_rank(caller, rank, params):
    shapes = [_float.shape(x) for x in jax.tree.leaves(params)]
    allowed = [min(math.prod(s[:-1]), s[-1]) for s in shapes if len(s) > 1 and math.prod(s)]
    if allowed and rank > max(allowed):
        raise ValueError(
            f"`{caller}(rank=...)` has to be at most what a matrix allows, here {max(allowed)}, got {rank}. Pass a smaller "
            "one; `mean` averages matrices as they are."
        )
