r"""Means over workers: in full precision, in few bits with a memory of what is missing, and robust ones.

.. math::
  p_m = v_m + e_m, \qquad q = \frac1M \sum_m \mathcal{C}(p_m) , \qquad e_m \leftarrow p_m - \mathcal{C}(p_m)

at every worker, and for the row of every server, with an optional optimizer S of its own,

.. math::
  r = S(q) + \bar e, \qquad d = \mathcal{D}(r), \qquad \bar e \leftarrow r - \mathcal{D}(r).

What is sent and what is remembered add up to what was to be sent, so nothing is lost, only late. `signopt.codecs` has the
codecs :math:`\mathcal{C}` and :math:`\mathcal{D}`.
"""

from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from signopt import _axis
from signopt import _check
from signopt import _coder
from signopt import _flat
from signopt import _float
from signopt import border as borders
from signopt.codecs import Codec

Where = Literal["workers", "servers", "both"]


class ServerMemory(NamedTuple):
    """What a server keeps about its row of the flattened parameters.

    Attributes:
      entries: int32 scalar: how many entries all rows have together; the last rows may be filled up.
      residual: What was decided and could not be said, `(row,)`, float32; empty without memory at the servers.
      state: The state of the server's own optimizer; empty without one.
    """

    entries: jax.Array
    residual: Any = ()
    state: Any = ()


class MeanStatistics(NamedTuple):
    """How large a compressed mean and its residuals are: Euclidean norms, float32. Shared.

    Attributes:
      norm: Of the mean that was decided.
      worker_residual: Of what a worker has not sent yet: the root of the mean square over workers.
      server_residual: Of what the servers have not said yet.
    """

    norm: jax.Array
    worker_residual: jax.Array
    server_residual: jax.Array


def mean(
    axis_name: _axis.AxisName,
    *,
    uplink: Codec | None = None,
    downlink: Codec | None = None,
    server: optax.GradientTransformation | None = None,
    memory: Where | None = "both",
    delay: int = False,
    report: bool = False,
    num_workers: int | None = None,
    key: jax.Array | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Replace each worker's updates by their mean over all workers, in full precision or in few bits.

    Without codecs and without a server this is the mean that votes are measured against, and the inner level where workers
    within a fast network average and only groups of them vote: `optax.chain(mean("device"), ..., majority_vote("host"))`.

    With codecs it is a compressed mean with memory, `signopt.means` says how. Memory stays in the units of the updates: put
    the learning rate left of it if it changes over time, so that what is sent late was scaled when it was due.

    Args:
      axis_name: The workers: an axis bound by `jax.vmap`, `jax.pmap` or `jax.shard_map`, a tuple of such axes, or None
        for one worker and no communication.
      uplink: A codec of `signopt.codecs` for what workers send. None sends float32.
      downlink: A codec for what servers send. None sends float32.
      server: An optimizer that every server runs on the mean of its row, 1/M of the state that each worker would have:
        `signopt.scale_by_signum()` is a momentum at the servers. It has to work entry by entry and without parameters.
      memory: Where to remember what a codec loses: at the "workers", at the "servers", "both", or nowhere (None). "both"
        means wherever there is a codec that loses something. Pass None with a codec that is right on average and errs by
        more than the row itself (`terngrad`, `stochastic_sign`, `qsgd` of few levels): a memory of it would grow for ever.
      delay: 1 to return the mean of the step before, so that it can travel while the next gradient is computed.
      report: Whether the state keeps `MeanStatistics` of the last step: `optax.tree.get(state, "report")`.
      num_workers: Size of the axis. Needed with memory, a server or a delay: their state belongs to one worker.
      key: A random key, the same on every worker, for codecs that throw coins.

    Returns:
      A transformation with a `BorderState`. Its `update` also takes `present`, a boolean scalar: the mean is over those
      present, and what an absent worker remembers waits. Updates keep their shapes and dtypes. With a codec or a server an
      entry that is not finite counts as 0; without, the mean is not finite either.

    Raises:
      ValueError: If `memory` is unknown or there is no codec for it, `num_workers` is missing, a codec needs a key, or the
        server needs parameters; in `update`, if `axis_name` is not bound, or if the updates are known to be the same on all
        workers, which means that they were added up before.
      TypeError: If a codec is no `signopt.codecs.Codec` or the server no transformation; in `update`, if a leaf is not of a
        floating-point dtype.

    Examples:
      >>> import jax, jax.numpy as jnp, signopt
      >>> tx = signopt.mean("worker")
      >>> update = jax.vmap(tx.update, in_axes=(0, None), out_axes=None, axis_name="worker")
      >>> update(jnp.array([[1.0, 2.0], [3.0, 6.0]]), tx.init(jnp.zeros(2)))[0]
      Array([2., 4.], dtype=float32)

    References:
      Karimireddy et al., `Error Feedback Fixes SignSGD <https://arxiv.org/abs/1901.09847>`_, 2019, Algorithm 2; Zheng et
      al., `dist-EF-SGD <https://arxiv.org/abs/1905.10936>`_, 2019, Algorithm 2, for memory on both sides. Ours keeps an
      entry that is not finite, and a worker that is not present, out of everything.
    """
    caller = "mean"
    if uplink is None and downlink is None and server is None:
        _require_loss(caller, memory, uplink, downlink)
        return borders.exchange(axis_name, plain(), caller=caller, delay=delay, num_workers=num_workers)
    border = _served(caller, _weighted_mean, uplink, downlink, server, memory, key, report)
    number: Any = jax.ShapeDtypeStruct((), jnp.float32)
    statistics = MeanStatistics(number, number, number)
    return borders.exchange(
        axis_name,
        border,
        caller=caller,
        delay=delay,
        num_workers=num_workers,
        key=key,
        report_like=statistics if report else None,
    )


def robust_mean(
    axis_name: _axis.AxisName,
    *,
    method: Literal["median", "trimmed"] = "median",
    trim: float = 0.25,
    uplink: Codec | None = None,
    memory: Where | None = "both",
    delay: int = False,
    num_workers: int | None = None,
    key: jax.Array | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Replace each worker's updates by a middle of all workers', entry by entry: a few that are far off change little.

    The median is the middle value, or the mean of the two. The trimmed mean leaves out the :math:`\lfloor \beta M \rfloor`
    largest and as many of the smallest, and is the mean of the others.

    Args:
      axis_name: The workers, as in `mean`.
      method: "median" or "trimmed".
      trim: :math:`\beta` in [0, 0.5), for "trimmed".
      uplink: A codec of `signopt.codecs` for what workers send. None sends float32.
      memory: As in `mean`, at the workers: what a codec loses.
      delay: As in `mean`.
      num_workers: Size of the axis. Needed with a memory or a delay.
      key: A random key, the same on every worker, for codecs that throw coins.

    Returns:
      A transformation like `mean`. An entry that is not finite counts as 0.

    Raises:
      ValueError: If `method` is unknown or `trim` is outside [0, 0.5); otherwise as `mean`.
      TypeError: As `mean`.

    Examples:
      >>> import jax, jax.numpy as jnp, signopt
      >>> tx = signopt.robust_mean("worker")
      >>> update = jax.vmap(tx.update, in_axes=(0, None), out_axes=None, axis_name="worker")
      >>> update(jnp.array([[1.0], [3.0], [-1000.0]]), tx.init(jnp.zeros(1)))[0]
      Array([1.], dtype=float32)

    References:
      Yin et al., `Byzantine-Robust Distributed Learning <https://arxiv.org/abs/1803.01498>`_, 2018, definitions 1 and 2.
    """
    caller = "robust_mean"
    _check.choice(method, ("median", "trimmed"), caller, "method")
    if not isinstance(trim, int | float) or not 0 <= trim < 0.5:
        raise ValueError(f"`{caller}(trim=...)` has to be in [0, 0.5), got {trim}.")

    def middle(decode, messages, weights, context):
        values = jax.vmap(decode)(messages, jnp.arange(context.num_workers))
        if weights is None:
            voters = jnp.int32(context.num_workers)
        else:  # those who are not there stand at the end
            values = jnp.where(weights[:, None] > 0, values, jnp.full_like(values, jnp.inf))
            voters = jnp.sum(weights > 0, dtype=jnp.int32)
        if method == "median":
            first, last = (voters - 1) // 2, voters // 2
        else:
            cut = jnp.floor(jnp.float32(trim) * voters.astype(jnp.float32) + jnp.float32(1e-4)).astype(jnp.int32)
            first, last = cut, voters - 1 - cut
        place = jnp.arange(context.num_workers)[:, None]
        kept = (place >= first) & (place <= last)
        total = _float.sum_in_order(jnp.where(kept, jnp.sort(values, axis=0), jnp.zeros_like(values)))
        return total / jnp.maximum(last - first + 1, 1).astype(total.dtype)

    border = _served(caller, middle, uplink, None, None, memory, key, False)
    return borders.exchange(axis_name, border, caller=caller, delay=delay, num_workers=num_workers, key=key)


# ---- in full precision ---------------------------------------------------------------------------------------------


def plain() -> borders.Border:
    """A mean by a sum over the network, in the leaves' own dtypes, of those present."""

    def encode(updates, memory, context):
        if context.present is None:
            return (updates, ()), memory
        here = jax.tree.map(lambda x: jnp.where(context.present, x, jnp.zeros_like(x)), updates)
        return (here, jnp.asarray(context.present, jnp.float32)), memory

    def decode(sums, like, context):
        del like
        total, weight = sums
        voters = jnp.float32(context.num_workers) if isinstance(weight, tuple) else jnp.maximum(weight, 1)
        return jax.tree.map(lambda x: x / voters.astype(x.dtype), total)

    return borders.Border(encode, None, decode, entrywise=True)


# ---- in few bits ---------------------------------------------------------------------------------------------------


class _Message(NamedTuple):
    """What a worker sends: a row for each server of everything."""

    values: Any
    weight: Any = ()  # 1 for a worker that takes part and 0 for one that does not, if some may not
    squares: Any = ()  # of the worker's residual, if somebody asked


def _weighted_mean(decode, messages, weights, context):
    """The mean over those present, added up in the order of the workers without writing down what each has sent."""
    workers = context.num_workers

    def one(m):
        value = decode(jax.tree.map(lambda x: x[m], messages), jnp.asarray(m, jnp.int32))
        return value if weights is None else value * weights[m]

    if workers <= _float.UNROLLED:
        total = one(0)
        for m in range(1, workers):
            total = total + one(m)
    else:
        total = jax.lax.fori_loop(1, workers, lambda m, total: total + one(m), one(0))
    voters = jnp.float32(workers) if weights is None else jnp.maximum(_float.sum_in_order(weights), 1)
    return total / voters


def _served(caller, aggregate, uplink, downlink, server, memory, key, report) -> borders.Border:
    """The border of a compressed mean: `aggregate` makes one row of everybody's."""
    up, down = _coder.Coder(caller, "uplink", uplink, key), _coder.Coder(caller, "downlink", downlink, key)
    _require_loss(caller, memory, uplink, downlink)
    at_workers = memory in ("workers", "both") and up.loses
    at_servers = memory in ("servers", "both") and down.loses
    if server is not None:
        if not isinstance(server, optax.GradientTransformation):
            raise TypeError(
                f"`{caller}(server=...)` has to be an optax transformation, got {server!r}. Pass "
                "`signopt.scale_by_signum()`, for example."
            )
        server = optax.with_extra_args_support(server)
        _require_no_params(caller, server)

    def encode(updates: Any, memory: Any, context: borders.Context):
        target: Any = jax.tree.map(lambda x: borders.finite(_float.widen(x)), updates)
        if at_workers:
            # With the axis that memory has on a worker's device XLA adds in place: one copy of the parameters less.
            target = jax.tree.map(lambda x, e: (x[None] + e.astype(x.dtype)[None])[0], target, memory)
        rows = borders.rows(target, context).astype(jnp.float32)
        message, sent = up.encode_all(rows, context, context.worker)
        if at_workers:
            memory = jax.tree.map(lambda x, y: (x[None] - y[None])[0], target, borders.tree(sent, target))
        weight = () if context.present is None else jnp.full([len(rows), 1], context.present, jnp.float32)
        squares = jnp.sum((rows - sent) ** 2, axis=1, keepdims=True) if report else ()
        return _Message(message, weight, squares), memory

    def decide(messages, memory, context):
        row, size = context.worker, _row_size(context.like, context)
        weights = None if isinstance(messages.weight, tuple) else messages.weight[:, 0]

        def decode(message, worker):
            return up.decode(message, size, context, worker, row)

        decided = borders.finite(aggregate(decode, messages.values, weights, context))
        norm = jnp.sum(decided**2)
        kept = memory
        if server is not None:
            served: Any = server.update(decided, memory.state, None)
            decided, state = served
            kept = kept._replace(state=jax.tree.map(_finite_or_old, state, memory.state))
        if at_servers:
            decided = decided + memory.residual
        message, said = down.encode(decided, context, jnp.int32(context.num_workers), row)
        if at_servers:
            kept = kept._replace(residual=decided - said)
        squares = ()
        if report:
            squares = (norm, _float.sum_in_order(messages.squares)[0], jnp.sum((decided - said) ** 2))
        return message, kept, squares

    def decode(decisions, like, context):
        size = _row_size(like, context)
        rows = down.decode_all(decisions, size, context, jnp.int32(context.num_workers))
        return borders.tree(rows, like)

    def observe(squares, updates, context):
        del updates
        norm, worker, server = squares
        return MeanStatistics(jnp.sqrt(norm), jnp.sqrt(worker / jnp.float32(context.num_workers)), jnp.sqrt(server))

    def init(params, num_workers):
        left = ()
        if at_workers:
            left = jax.tree.map(lambda x: jnp.zeros(_float.shape(x), _float.wide_dtype(x)), params)
        if not at_servers and server is None:
            return borders.Memory(left)
        entries = _flat.size(params, 1)
        row = jnp.zeros([_flat.row_size(entries, num_workers, 1)], jnp.float32)
        return borders.Memory(
            left,
            ServerMemory(
                entries=jnp.asarray(entries, jnp.int32),
                residual=row if at_servers else (),
                state=() if server is None else server.init(row),
            ),
        )

    remembers = at_workers or at_servers or server is not None
    return borders.Border(encode, decide, decode, init=init if remembers else None, observe=observe if report else None)


def _row_size(like, context):
    return _flat.row_size(_flat.size(like, 1), context.num_workers, 1)


def _finite_or_old(new, old):
    """A server's state keeps its last finite value: one overflow must not stay."""
    if not jnp.issubdtype(jnp.result_type(new), jnp.floating):
        return new
    return jnp.where(jnp.isfinite(new), new, old)


def _require_loss(caller, memory, uplink, downlink):
    if memory is not None:
        _check.choice(memory, get_args(Where), caller, "memory")
    for side, argument, codec in (("workers", "uplink", uplink), ("servers", "downlink", downlink)):
        if memory == side and (codec is None or codec.exact):
            raise ValueError(
                f"`{caller}(memory=...)` has to fit the codecs, got {memory!r} where `{argument}` loses nothing that could "
                "be remembered. Pass another codec of `signopt.codecs`, or leave `memory` out."
            )


def _require_no_params(caller, server):
    row = jnp.zeros([8], jnp.float32)
    try:
        jax.eval_shape(lambda: server.update(row, server.init(row), None))
    except ValueError as error:
        raise ValueError(
            f"`{caller}(server=...)` has to work without parameters, which a server does not have, got one that does not: "
            f"{error} Put what needs them right of the border."
        ) from error
