"""A gradient of one worker's own for modules of Flax's nnx, which hold statistics and random keys beside parameters."""

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp

from signopt import _axis
from signopt import _check
from signopt import _compat
from signopt.workers.gradient import check_batch
from signopt.workers.gradient import split_batch
from signopt.workers.gradient import value_and_grad


def nnx_value_and_grad(
    fun: Callable, *, axis_name: _axis.AxisName, num_workers: int | None = None, has_aux: bool = False, wrt: Any = None
) -> Callable:
    """`nnx.value_and_grad` whose gradient is each worker's own.

    A worker draws from the keys of `nnx.Rngs` with its own number folded in, so no two drop the same units; keys stay as
    they are, and counts go on. What a module keeps beside parameters, such as the statistics of BatchNorm, is averaged over
    the workers once per call: it is used by the one model that all have, and a checkpoint keeps one. Each worker still
    normalizes with its own batch.

    Args:
      fun: `(model, ...) -> loss`, a scalar of this worker's data. Other arguments are modules and `nnx.Rngs`, which are
        updated in place as usual, and trees of arrays.
      axis_name: The workers, as in `majority_vote`.
      num_workers: Where the axis is not bound, as in plain `nnx.jit` with an optimizer of `in_jit`: its size. All trees
        of arrays are batches then, and are split among the workers.
      has_aux: Whether `fun` returns `(loss, aux)`.
      wrt: What to differentiate, a filter of nnx; `nnx.Param` if None.

    Returns:
      A function of the same arguments that returns `(loss, gradient)`. With `num_workers` the loss is the mean over the
      workers, gradients have a leading axis of workers, and arrays in `aux` are those of the whole batch, scalars their mean.

    Raises:
      ValueError: If the axis is not bound and `num_workers` is None; if the workers cannot share a batch equally, or a
        module keeps something else than floating-point numbers that differs between them.

    Examples:
      >>> import jax.numpy as jnp, signopt
      >>> from flax import nnx
      >>> model = nnx.BatchNorm(1, momentum=0.5, rngs=nnx.Rngs(0))
      >>> loss = lambda model, x: jnp.mean(model(x) + model.bias)
      >>> grad = signopt.workers.nnx_value_and_grad(loss, axis_name="worker", num_workers=2)
      >>> value, gradient = grad(model, jnp.array([[1.0], [3.0], [5.0], [7.0]]))  # the means are 2 and 6
      >>> gradient["bias"][...].tolist(), model.mean[...].tolist()
      ([[2.0], [2.0]], [2.0])
    """
    from flax import nnx  # only who has modules of nnx needs it

    if num_workers is not None:
        _check.count(num_workers, "nnx_value_and_grad", "num_workers")
    wanted = nnx.filterlib.to_predicate(nnx.Param if wrt is None else wrt)
    kinds = (lambda path, x: path[0] == 0 and wanted(path[1:], x), nnx.RngKey, nnx.Any(nnx.Param, nnx.RngState), ...)

    @functools.wraps(fun)
    def wrapped(*args):
        modules = {i: x for i, x in enumerate(args) if nnx.graph.is_graph_node(x)}
        if 0 not in modules:
            raise TypeError(
                "`nnx_value_and_grad(fun)` has to be given a module of nnx as its first argument, got "
                f"{type(args[0]).__name__}. For parameters take `signopt.workers.value_and_grad`."
            )
        arrays = {i: x for i, x in enumerate(args) if i not in modules}
        graph, *parts = nnx.split(modules, *kinds)

        def one_worker(arrays, params, keys, others, statistics):
            own = jax.tree.map(lambda key: _fold_in(key, _axis.index(axis_name)), keys)

            def of_params(params):
                here = nnx.merge(graph, params, own, others, statistics, copy=True)
                found = fun(*({**arrays, **here}[i] for i in range(len(args))))
                value, aux = found if has_aux else (found, None)
                return value, (aux, nnx.split(here, *kinds)[3:])

            value_and_grad_fn = value_and_grad(of_params, axis_name=axis_name, has_aux=True)
            (value, (aux, (others, new))), gradient = value_and_grad_fn(params)
            return value, aux, gradient.get(0, nnx.State({})), (others, _averaged(statistics, new, axis_name))

        if num_workers is None:
            _axis.size(axis_name, "nnx_value_and_grad")
            value, aux, gradient, kept = one_worker(arrays, *parts)
        else:
            check_batch(arrays, num_workers, "nnx_value_and_grad")
            all_workers = jax.vmap(
                one_worker, (0, None, None, None, None), (0, 0, 0, None), axis_name=axis_name, axis_size=num_workers
            )
            try:
                value, aux, gradient, kept = all_workers(split_batch(arrays, num_workers), *parts)
            except ValueError as error:
                if _compat.says_that_workers_differ(error):
                    raise _differs() from None
                raise
            value, aux = jax.tree.map(_joined, (value, aux))
        nnx.update(modules, *kept)
        return ((value, aux) if has_aux else value), gradient

    return wrapped


def _averaged(old: Any, new: Any, axis_name: _axis.AxisName) -> Any:
    """The mean of `new` over the workers, and `old` to the bit where no worker changed it."""
    size = _axis.size(axis_name, "nnx_value_and_grad")

    def mean(x, y):
        if jnp.issubdtype(x.dtype, jnp.inexact):
            return x + (_axis.total(y - x, axis_name) / size).astype(x.dtype)
        if _axis.varying(y) - _axis.varying(x):
            raise _differs()
        return y

    return jax.tree.map(mean, old, new)


def _differs():
    return ValueError(
        "`nnx_value_and_grad(fun)` has to leave what modules keep beside parameters the same on every worker, got numbers "
        "that differ and have no mean. Return them with `has_aux=True`, or keep them in a floating-point dtype."
    )


def _joined(x: jax.Array) -> jax.Array:
    """What the workers made of their parts of a batch, as that of the whole batch; of scalars the mean."""
    return jnp.mean(x) if x.ndim == 1 else x.reshape(-1, *x.shape[2:])


def _fold_in(key: jax.Array, worker: jax.Array) -> jax.Array:
    """The key, or an array of keys, of one worker."""
    folded = jax.vmap(lambda one: jax.random.fold_in(one, worker))(key.reshape(-1))
    return folded.reshape(key.shape)
