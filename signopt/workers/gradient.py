"""A gradient that is one worker's own, from a batch dealt out to the workers."""

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp

from signopt import _axis


def value_and_grad(
    fun: Callable, argnums: int | tuple[int, ...] = 0, *, axis_name: _axis.AxisName, has_aux: bool = False
) -> Callable:
    """`jax.value_and_grad` whose gradient is this worker's own, whatever runs the workers.

    Under `shard_map(check_vma=True)` plain `jax.grad` of replicated parameters returns the gradient summed over workers.

    Args:
      fun: A scalar function of this worker's data.
      argnums: Which arguments to differentiate, as in `jax.value_and_grad`.
      axis_name: The workers, as in `majority_vote`.
      has_aux: Whether `fun` returns `(value, aux)`.

    Returns:
      A function of the same arguments that returns `(value, gradient)`.

    Examples:
      >>> import jax, jax.numpy as jnp, signopt
      >>> loss = lambda w, x: w * x
      >>> grad = signopt.workers.value_and_grad(loss, axis_name="worker")
      >>> jax.vmap(grad, in_axes=(None, 0), axis_name="worker")(2.0, jnp.array([1.0, 3.0]))[1].tolist()
      [1.0, 3.0]
    """
    value_and_grad_fn = jax.value_and_grad(fun, argnums, has_aux=has_aux)
    differentiated = {argnums} if isinstance(argnums, int) else set(argnums)

    @functools.wraps(fun)
    def wrapped(*args, **kwargs):
        _axis.size(axis_name, "value_and_grad")
        own = [_axis.to_varying(x, axis_name) if i in differentiated else x for i, x in enumerate(args)]
        return value_and_grad_fn(*own, **kwargs)

    return wrapped


def split_batch(batch: Any, num_workers: int) -> Any:
    """Deal a batch out: `(B, ...)` to `(num_workers, B / num_workers, ...)` for every leaf.

    Raises:
      ValueError: If a leaf has no leading axis, or one that `num_workers` does not divide.

    Examples:
      >>> import jax.numpy as jnp
      >>> from signopt.workers import split_batch
      >>> split_batch(jnp.arange(6), 3).tolist()
      [[0, 1], [2, 3], [4, 5]]
    """
    check_batch(batch, num_workers, "split_batch")
    return jax.tree.map(lambda x: x.reshape(num_workers, x.shape[0] // num_workers, *x.shape[1:]), batch)


def check_batch(batch: Any, num_workers: int, caller: str) -> None:
    """Raise a `ValueError` if the workers cannot share a batch equally."""
    for path, x in jax.tree.leaves_with_path(batch):
        if jnp.ndim(x) == 0 or x.shape[0] % num_workers:
            raise ValueError(
                f"`{caller}(...)` has to be given batches whose leading axis {num_workers} workers can share equally, got "
                f"shape {jnp.shape(x)} at `batch{jax.tree_util.keystr(path)}`. Drop or pad the last examples, or put what "
                "is no data into the state."
            )
