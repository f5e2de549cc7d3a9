r"""The border: where workers agree, and the only place of a chain where anything travels.

::

   on every worker, different        |               the border                |   on every worker, the same
   gradient > momentum > ... --------+--> encode --> decide --> decode --------+--> weight decay > -learning rate > ...

Left of it a value belongs to one worker. Right of it every worker holds the same value, bit for bit. A `Border` says what
happens in between, by three pure functions:

``encode``
  On every worker: from its updates to a message with a row for each server. Every worker is also a server. It serves one
  row, which is 1/M of the parameters.
``decide``
  On every server: from one row of every worker's message to a decision about that row.
``decode``
  On every worker: from all decisions to updates.

`exchange` makes a transformation of a `Border`. It knows axes, devices and states, so that a border need not: it deals the
rows out with one `all_to_all`, and collects the decisions with one `all_gather`, whatever a message consists of. A border
whose servers would only add has no `decide`: then the network adds, by `psum`.

::

   message (a row for each server) --all_to_all--> a row of everybody's --decide--> a decision --all_gather--> all decisions

A border may remember. What `encode` could not send stays at the worker, what `decide` could not say stays at the server; both
are handed back in the next step. It may report: a few numbers that a server sees on the way travel with its decision and
are added up over the servers. And any border may come late: with `delay=1` a step exchanges what the step before it would
have, so that nothing in the exchange waits for what this step computes.

`signopt.vote` is the border of signs, `signopt.means` that of numbers. A new one is a file that says what is encoded and
what is decided.
"""

from collections.abc import Callable, Mapping
import math
from typing import Any, NamedTuple, cast

import jax
from jax import lax
import jax.numpy as jnp
import optax

from signopt import _axis
from signopt import _check
from signopt import _compat
from signopt import _flat
from signopt import _float
from signopt import _shards
from signopt import sign
from signopt.workers import state as states


class Context(NamedTuple):
    """What a border may know beside what it is given.

    Attributes:
      axis_name: The workers.
      num_workers: M, how many there are, and so how many servers and rows.
      worker: int32 scalar: 0 ... M - 1, which of them this is. In `decide`, the server, and so its row.
      step: int32 scalar: the number of exchanges before this one.
      present: Whether this worker takes part; None if all do. Boolean scalar.
      like: What is exchanged: a tree of `jax.ShapeDtypeStruct`.
      key: A random key for this step, the same on every worker, or None.
      extra: What else `update` was called with, such as `value=loss`.
    """

    axis_name: _axis.AxisName
    num_workers: int
    worker: jax.Array
    step: jax.Array
    present: jax.Array | None = None
    like: Any = ()
    key: jax.Array | None = None
    extra: Mapping[str, Any] = {}


def context_of(axis_name: _axis.AxisName, step: jax.Array, caller: str = "exchange", **known: Any) -> Context:
    """What a border may know where this is traced."""
    return Context(axis_name, _axis.size(axis_name, caller), _axis.index(axis_name), step, **known)


class Memory(NamedTuple):
    """What a border remembers. Per worker.

    Attributes:
      worker: What this worker has not sent yet: a tree like the parameters.
      server: What this worker, as the server of a row, has not said yet or keeps about it.
    """

    worker: Any = ()
    server: Any = ()


def finite(x: jax.Array) -> jax.Array:
    """`x`, and 0 where it is not finite: what may enter a state."""
    return jnp.where(jnp.isfinite(x), x, jnp.zeros_like(x))


def cast_back(held: jax.Array, like: jax.Array) -> jax.Array:
    """`held` in the dtype of `like`."""
    return held.astype(like.dtype)


class Border(NamedTuple):
    """How workers agree. All functions are pure; `signopt.border` says when each runs.

    Attributes:
      encode: `(updates, memory, context) -> (message, memory)`. A message is a tree of arrays whose first axis is the
        server: `(num_workers, ...)`. Updates may be traced for any number of leaves; all are of floating-point dtypes.
      decide: `(messages, memory, context) -> (decision, memory, report)`. The first axis of `messages` is the worker, in
        order, so that sums are the same in every runner. Decisions and reports are trees of arrays of any shape. None if
        the network shall add the messages up; then every leaf of a message has a shape of its own, without rows.
      decode: `(decisions, like, context) -> updates`. The first axis of `decisions` is the server; without `decide` they
        are the sums. `like` is the tree that was encoded.
      init: `(params, num_workers) -> Memory`, before the first step; None if nothing is remembered.
      keep: `(updates, context) -> tree`: what the server on this worker may see of the worker's own without its
        travelling. `decide` finds it in `context.extra["kept"]`.
      observe: `(reports, updates, context) -> report`: what to make of the servers' reports, added up; without `decide`, of
        the sums. None drops them.
      hold: With `delay`, how an array of updates waits for its turn, in fewer bytes if it can. Only finite values may.
      release: `(held, like) -> array`: the inverse of `hold`, as far as `encode` can tell.
      entrywise: Whether every entry is agreed on by itself. Then each shard of a parameter can be; otherwise the border
        sees whole leaves.
    """

    encode: Callable
    decide: Callable | None
    decode: Callable
    init: Callable | None = None
    keep: Callable | None = None
    observe: Callable | None = None
    hold: Callable = finite
    release: Callable = cast_back
    entrywise: bool = False


class BorderState(NamedTuple):
    """What an exchange keeps.

    Attributes:
      count: int32 scalar: the exchanges so far. Shared.
      report: What the servers saw in the last one; empty if nobody asked. Shared.
      own: A `PerWorkerState` with what is remembered and what waits; empty for most borders.
    """

    count: jax.Array
    report: Any = ()
    own: Any = ()


class Own(NamedTuple):
    """What one worker remembers and what waits for the next step. Per worker.

    Attributes:
      memory: See `Memory`.
      held: With `delay`, the updates that the next step exchanges.
      held_present: Whether this worker takes part with them. Boolean scalar.
    """

    memory: Memory = Memory()
    held: Any = ()
    held_present: Any = ()


def exchange(
    axis_name: _axis.AxisName,
    border: Border,
    *,
    caller: str = "exchange",
    delay: int = False,
    num_workers: int | None = None,
    key: jax.Array | None = None,
    report_like: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Make a transformation of a border.

    Args:
      axis_name: The workers: an axis bound by `jax.vmap`, `jax.pmap` or `jax.shard_map`, a tuple of such axes, or None
        for one worker and no communication.
      border: What is encoded, decided and decoded.
      caller: The call to name in an error.
      delay: 0, or 1 to return in every step what the step before it would have returned. The first returns zeros. (The
        default is a False, which `optax.inject_hyperparams` leaves alone, as it does not leave a 0.)
      num_workers: Size of the axis. Needed if the border remembers or is late: such state belongs to one worker.
      key: A random key, the same on every worker, for borders that throw coins.
      report_like: A tree of the shapes and dtypes of what `border.observe` makes, for a state that keeps that of the last
        step, and zeros before the first. None keeps nothing.

    Returns:
      A transformation with a `BorderState`. Its `update` also takes `present`, a boolean scalar: an exchange goes on
      without a worker that passes False, and changes nothing that this worker remembers.

    Raises:
      ValueError: If `delay` is neither 0 nor 1, or `num_workers` is missing; in `update`, if the axis is not bound or has
        another size, or the updates are known to be the same on all workers.
      TypeError: In `update`, if a leaf is not of a floating-point dtype.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from signopt import border
      >>> def encode(updates, memory, context):
      ...     return border.rows(updates, context), memory
      >>> def decide(messages, memory, context):
      ...     return messages.max(0), memory, ()
      >>> def decode(decisions, like, context):
      ...     return border.tree(decisions, like)
      >>> tx = border.exchange("worker", border.Border(encode, decide, decode))
      >>> update = jax.vmap(tx.update, in_axes=(0, None), out_axes=None, axis_name="worker")
      >>> update(jnp.array([[1.0, -2.0], [0.5, 3.0]]), tx.init(jnp.zeros(2)))[0]
      Array([1., 3.], dtype=float32)
    """
    if isinstance(delay, jax.Array):
        raise TypeError(
            f"`{caller}(delay=...)` has to be a Python 0 or 1, got {delay!r}. Inside `optax.inject_hyperparams`, name it in "
            "`static_args`."
        )
    if delay not in (0, 1):
        raise ValueError(f"`{caller}(delay=...)` has to be 0 or 1, got {delay}.")
    delay = int(delay)
    remembers = border.init is not None or delay
    if num_workers is not None:
        _check.count(num_workers, caller, "num_workers")
    elif remembers and axis_name is not None:
        raise ValueError(
            f"`{caller}(num_workers=...)` has to be given where workers remember or come late, got None. Pass the size of "
            f"axis {axis_name!r}."
        )

    def init_own(params):
        memory = Memory() if border.init is None else border.init(params, num_workers or 1)
        if not delay:
            return Own(memory)
        held = jax.tree.map(lambda x: border.hold(jnp.zeros(_float.shape(x), jnp.result_type(x))), params)
        return Own(memory, held, jnp.zeros([], bool))

    def update_own(updates, own, params=None, *, context, first):
        del params
        if not delay:
            out, memory, seen, _ = run(border, updates, own.memory, context)
            return (out, seen), Own(memory)
        late = jax.tree.map(border.release, own.held, updates)
        held = jax.tree.map(border.hold, updates)
        out, memory, seen, held = run(border, late, own.memory, context._replace(present=own.held_present), held)
        # The first step has nothing to exchange yet. What all workers do then changes nothing that they remember.
        out = jax.tree.map(lambda x: jnp.where(first, jnp.zeros_like(x), x), out)
        memory = jax.tree.map(lambda new, old: jnp.where(first, old, new), memory, own.memory)
        present = jnp.ones([], bool) if context.present is None else jnp.asarray(context.present, bool)
        return (out, seen), Own(memory, held, _axis.to_varying(present, axis_name))

    own_tx: Any = optax.GradientTransformationExtraArgs(init_own, cast(Any, update_own))
    if remembers and num_workers is not None:
        own_tx = states.per_worker(own_tx, num_workers, axis_name=axis_name)

    def init_fn(params):
        nothing = () if report_like is None else jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), report_like)
        return BorderState(jnp.zeros([], jnp.int32), nothing, own_tx.init(params) if remembers else ())

    def update_fn(updates, state, params=None, *, present=None, **extra_args):
        del params
        _axis.size(axis_name, caller)
        sign.require_floating(updates, caller)
        updates = jax.tree.map(jnp.asarray, updates)
        _axis.require_varying(updates, axis_name, caller)
        step = jnp.maximum(state.count - delay, 0)
        context = context_of(
            axis_name,
            step,
            caller,
            present=present,
            like=jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), updates),
            key=None if key is None else jax.random.fold_in(key, step),
            extra=extra_args,
        )
        own = state.own if remembers else Own()
        (updates, seen), own = own_tx.update(updates, own, context=context, first=state.count == 0)
        report = () if report_like is None else seen
        return updates, BorderState(jnp.asarray(optax.safe_increment(state.count)), report, own if remembers else ())

    # A report is about all entries, and what is remembered has the size of whole leaves.
    if border.entrywise and not remembers and report_like is None:
        update_fn = _shards.cut(update_fn)
    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def run(border: Border, updates: Any, memory: Memory, context: Context, held: Any = ()) -> tuple[Any, Memory, Any, Any]:
    """Exchange once: the updates that all agree on, what is remembered, what the servers reported, added up, and `held`.

    The decisions are read only when `held`, the last of this step's own work, is there, so the exchange may take the step.
    """
    message, left = border.encode(updates, memory.worker, context)
    present = context.present
    if present is not None:  # what an absent worker would have sent stays with it
        left = jax.tree.map(lambda new, old: jnp.where(present, new, old), left, memory.worker)
    if border.decide is None:
        at_server, decisions = memory.server, _axis.total(message, context.axis_name)
        seen = decisions
    else:
        kept = () if border.keep is None else border.keep(updates, context)
        decisions, at_server, reports = _serve(border.decide, message, memory.server, kept, context)
        seen = jax.tree.map(_float.sum_in_order, reports)
    if jax.tree.leaves(held):
        decisions, held = _compat.after_all((decisions, held))
    report = () if border.observe is None else border.observe(seen, updates, context)
    return border.decode(decisions, updates, context), Memory(left, at_server), report, held


def _serve(decide, message, memory, kept, context):
    """Let every server decide about its row: all decisions and reports, and what this server remembers."""
    axis_name = context.axis_name
    words, split = _words(message, 1)
    messages = split(_axis.deal(words, axis_name))  # (workers, servers here, ...)
    # Everything below is computed once for all workers that share a device.
    _, vmapped = _axis.devices_and_vmapped(axis_name)
    here = jax.tree.map(lambda x: _axis.stack_vmapped(x, vmapped), (memory, context.worker, kept))

    def one_server(messages, memory, server, kept):
        known = context._replace(worker=server, present=None, extra={**context.extra, "kept": kept})
        return decide(messages, memory, known)

    if vmapped:
        found = jax.vmap(one_server, in_axes=(1, 0, 0, 0))(messages, *here)
    else:
        one = one_server(jax.tree.map(lambda x: x[:, 0], messages), *jax.tree.map(lambda x: x[0], here))
        found = jax.tree.map(lambda x: jnp.asarray(x)[None], one)
    decision, memory, report = found
    words, split = _words((decision, report), 1)
    decisions, reports = split(_axis.collect(words, axis_name))
    if jax.tree.leaves(report):
        decisions = jax.tree.map(_side_by_side, decisions)
    return decisions, jax.tree.map(lambda x: _axis.own_row(x, axis_name), memory), reports


def _side_by_side(rows):
    """Rows that were cut from longer ones, next to each other in memory.

    Else whoever reads them on a CPU computes for each number where it lies: 1.3 times a vote without a report.
    """
    if len(rows) > _float.UNROLLED:
        return rows
    found = jnp.zeros_like(rows)
    for i in range(len(rows)):
        found = lax.dynamic_update_slice_in_dim(found, lax.slice_in_dim(rows, i, i + 1), i, 0)
    return found


def _words(tree, batch_axes):
    """Arrays as one array of words, `(*batch, n)`, and the function that takes such an array apart again.

    The words are unsigned integers as wide as the numbers of the largest array, so that this one is not copied bit by bit.
    """
    leaves, treedef = jax.tree.flatten(tree)
    batch = leaves[0].shape[:batch_axes]
    largest = max(leaves, key=lambda x: x.size * x.dtype.itemsize)
    width = min(largest.dtype.itemsize, 4)
    word = jnp.dtype(f"uint{8 * width}")
    shapes = [(x.shape[batch_axes:], x.dtype) for x in leaves]
    words = jnp.concatenate([_to_words(x.reshape(*batch, -1), word) for x in leaves], axis=-1)

    def split(words):
        found, start = [], 0
        for shape, dtype in shapes:
            count = math.prod(shape)
            size = -(-count * dtype.itemsize // width)
            own = lax.slice_in_dim(words, start, start + size, axis=-1)
            found.append(_from_words(own, dtype, count).reshape(*words.shape[:-1], *shape))
            start += size
        return jax.tree.unflatten(treedef, found)

    return words, split


def _to_words(x, word):
    if x.dtype == word:
        return x
    if x.dtype.itemsize >= word.itemsize:
        return lax.bitcast_convert_type(x, word).reshape(*x.shape[:-1], -1)
    ratio = word.itemsize // x.dtype.itemsize
    padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % ratio)])
    return lax.bitcast_convert_type(padded.reshape(*padded.shape[:-1], -1, ratio), word)


def _from_words(words, dtype, count):
    if words.dtype == dtype:
        return words
    if dtype.itemsize > words.dtype.itemsize:
        apart = words.reshape(*words.shape[:-1], -1, dtype.itemsize // words.dtype.itemsize)
        return lax.bitcast_convert_type(apart, dtype)
    return lax.bitcast_convert_type(words, dtype).reshape(*words.shape[:-1], -1)[..., :count]


def rows(updates: Any, context: Context, align: int = 1) -> jax.Array:
    """A tree as a row of numbers for each server, in at least float32; `tree` is its inverse."""
    return _flat.rows(updates, context.num_workers, align)


def tree(decisions: jax.Array, like: Any, align: int = 1) -> Any:
    """Rows of numbers as a tree of the shapes and dtypes of `like`."""
    return _flat.tree(decisions, like, align)
