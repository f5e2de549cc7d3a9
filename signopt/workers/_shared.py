"""What every worker shares although its type says otherwise: the frozen layer that moves by zeros.

Under `jax.shard_map(check_vma=True)` types say what differs between workers, and they follow shapes as well as values:
`jnp.zeros_like(gradient)` is zero on every worker, and its type says that it may differ. So does the type of a frozen
parameter to which such zeros were added. Nothing can turn such a value back into a shared one for free. But it can be
computed once more, from what it depends on and without the casts, and then JAX itself types it as shared. If it does depend
on a worker's own value, no such computation exists, and it stays what it is.
"""

from collections.abc import Callable
import contextlib
import functools
from typing import Any

import jax
from jax.extend.core import Jaxpr
from jax.extend.core import Literal

from signopt import _axis

_CASTS = ("pvary", "pcast")
_CALLS = ("jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "remat2", "checkpoint")


def shared(fun: Callable) -> Callable:
    """Type each result of a function as shared between workers, unless it depends on a worker's own value.

    It is for a `jax.shard_map` of your own whose `out_specs=P()` refuses frozen parameters: `optax.set_to_zero`,
    `optax.freeze` and their like make zeros in the shape of a gradient, and types take these for the worker's own.
    `on_mesh` and `in_jit` do this by themselves.

    Args:
      fun: What `jax.shard_map` runs, on arrays and trees of them.

    Returns:
      A function of the same arguments with the same results. Where types are not tracked it is `fun`.

    Examples:
      >>> import jax, jax.numpy as jnp, signopt
      >>> mesh = jax.make_mesh((1,), ("worker",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> frozen = lambda weight, gradient: weight + jnp.zeros_like(gradient[0])
      >>> step = jax.shard_map(
      ...     signopt.workers.shared(frozen), mesh=mesh, in_specs=(jax.P(), jax.P("worker")), out_specs=jax.P())
      >>> step(jnp.ones(2), jnp.ones((1, 2))).tolist()
      [1.0, 1.0]
    """

    @functools.wraps(fun)
    def wrapped(*args, **kwargs):
        leaves = jax.tree.leaves((args, kwargs))
        if not any(_axis.varying(x) for x in leaves):
            return fun(*args, **kwargs)
        return settled(fun, lambda leaves: [_axis.varying(x) for x in leaves])(*args, **kwargs)

    return wrapped


def settled(fun: Callable, unwanted: Callable[[list[Any]], list[Any]]) -> Callable:
    """Call a function, and compute those of its results anew whose types name axes that they should not.

    Args:
      fun: A function of arrays and trees of them.
      unwanted: Gets the leaves of its result; says for each whether its type is unwanted.
    """

    def wrapped(*args, **kwargs):
        closed, shape = jax.make_jaxpr(fun, return_shape=True)(*args, **kwargs)
        known = _evaluate(closed.jaxpr, closed.consts, jax.tree.leaves((args, kwargs)))
        results = [read(known, v) for v in closed.jaxpr.outvars]
        anew = {v: x for v, x in known.items() if not _axis.varying(x)}
        for i, wrong in enumerate(unwanted(results)):
            if wrong:
                with contextlib.suppress(_DependsOnTheWorkerError):
                    results[i] = _compute(closed.jaxpr, anew, closed.jaxpr.outvars[i])
        return jax.tree.unflatten(jax.tree.structure(shape), results)

    return wrapped


class _DependsOnTheWorkerError(Exception):
    """No computation from shared values exists."""


def _evaluate(jaxpr: Jaxpr, consts: list[Any], args: list[Any]) -> dict[Any, Any]:
    """The value of every variable."""
    known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
    for eqn in jaxpr.eqns:
        known |= zip(eqn.outvars, bind(eqn, [read(known, v) for v in eqn.invars]), strict=True)
    return known


def _compute(jaxpr: Jaxpr, known: dict[Any, Any], wanted: Any) -> Any:
    """The value of a variable, computed from shared values only, which are `known` and become more."""
    makers = {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}
    stack = [wanted]
    while stack:  # no recursion: a chain of equations may be longer than Python's stack
        v = stack[-1]
        if isinstance(v, Literal) or v in known:
            stack.pop()
            continue
        if v not in makers:
            raise _DependsOnTheWorkerError
        eqn = makers[v]
        inner = called_by(eqn)
        if inner is not None:
            known[v] = _compute_call(eqn, inner, functools.partial(_compute, jaxpr, known), v)
            continue
        if missing := [u for u in eqn.invars if not isinstance(u, Literal) and u not in known]:
            stack += missing
            continue
        values = [read(known, u) for u in eqn.invars]
        if eqn.primitive.name in _CASTS:
            known[v] = values[0]
        elif eqn.effects or _names_axes(eqn):
            raise _DependsOnTheWorkerError
        else:
            known |= zip(eqn.outvars, bind(eqn, values), strict=True)
    return read(known, wanted)


def _compute_call(eqn, inner, outside, wanted):
    """The same inside a call; only those of its arguments are looked at that the result depends on."""

    class Arguments(dict):
        def __contains__(self, v):
            return super().__contains__(v) or v in outer

        def __missing__(self, v):
            self[v] = outside(outer[v]) if not isinstance(outer[v], Literal) else outer[v].val
            return self[v]

    body, consts = inner
    outer = dict(zip(body.invars, eqn.invars[len(eqn.invars) - len(body.invars) :], strict=True))
    known = Arguments(zip(body.constvars, consts, strict=True))
    return _compute(body, known, body.outvars[eqn.outvars.index(wanted)])


def called_by(eqn):
    """The program that an equation calls, and its constants, if it is nothing but a call."""
    if eqn.primitive.name not in _CALLS:
        return None
    found = next(eqn.params[name] for name in ("jaxpr", "call_jaxpr", "fun_jaxpr") if name in eqn.params)
    return opened(found)


def opened(program: Any) -> tuple[Jaxpr, list[Any]]:
    """A program and the constants that it holds: in jax 0.12 any program may hold some, before only a closed one."""
    return getattr(program, "jaxpr", program), getattr(program, "consts", [])


def _names_axes(eqn):
    """Whether the result of an equation may differ between workers though its arguments do not."""
    named = [eqn.params.get(name) for name in ("axes", "axis_name", "axis_index_groups")]
    if any(isinstance(name, str) for entry in named if entry is not None for name in _axis.names(entry)):
        return True
    return any(isinstance(x, Jaxpr) or hasattr(x, "jaxpr") for x in jax.tree.leaves(list(eqn.params.values())))


def bind(eqn, values):
    with eqn.ctx.manager:
        found = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
    return found if eqn.primitive.multiple_results else [found]


def read(known, v):
    return v.val if isinstance(v, Literal) else known[v]
