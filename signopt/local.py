r"""Local steps: how often the workers exchange, and whether they wait for it.

The parameters are the *anchor* x, the same on every worker. What worker m has moved by itself since the last exchange
is its *offset* :math:`o_m`, per-worker state. It takes its gradient at :math:`x + o_m`, and its inner optimizer moves the
offset. In a round the outer optimizer, which holds the border, gets the pseudo-gradients :math:`-o_m` and moves the anchor,
and every offset starts from zero.

**Late decisions.** With `delay=1` step k exchanges the offset that step k - 1 left behind, so the exchange needs nothing
that step k computes. Meanwhile worker m stands at :math:`x + o_m` and makes an inner step :math:`u_m` from there. The
decision D moves the anchor, and what was sent leaves the offset:

.. math::
  (x + o_m) + u_m \;\to\; (x + D) + (o_m + u_m - o_m) = (x + D) + u_m .

So the new offset is the inner step alone, and no copy of what travels is needed: it is in the state already.

**Fragments.** With `fragments=F` every leaf is flattened, filled up with zeros and cut into F equal parts. One part is
exchanged at a time, in turn, and outer state is kept for each of them.
"""

from typing import Any, NamedTuple, cast

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int
import optax

from signopt import _axis
from signopt import _check
from signopt import momentum
from signopt import sign
from signopt.workers import state as workers


class OwnSteps(NamedTuple):
    """What one worker did by itself. Per worker.

    Attributes:
      offset: How far it is from the anchor. Same tree, shapes and dtypes as the parameters, in their units.
      inner_state: The state of the inner optimizer, inside a `FiniteOnlyState`.
    """

    offset: optax.Params
    inner_state: optax.OptState


class LocalStepsState(NamedTuple):
    """Where the workers are, beside the anchor.

    Attributes:
      own: A `PerWorkerState` of `OwnSteps`. Per worker.
      outer_state: The state of the outer optimizer; with fragments every leaf has one more axis of that size, in front,
        or after the axis of the workers where a leaf is per worker.
      count: int32 scalar: updates so far. Shared.
    """

    own: workers.PerWorkerState
    outer_state: optax.OptState
    count: jax.Array


def local_steps(
    inner: optax.GradientTransformation,
    outer: optax.GradientTransformation,
    *,
    every: int,
    num_workers: int,
    fragments: int = 1,
    delay: int = 0,
    reset_inner: bool = False,
    axis_name: _axis.AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Let every worker train by itself, and exchange what that came to once in a while.

    .. math::
      o_m \leftarrow o_m + \mathrm{inner}\big(\nabla f_m(x + o_m),\, x + o_m\big), \qquad
      \text{in a round:} \quad x \leftarrow x + \mathrm{outer}(-o_1, \dots, -o_M), \quad o_m \leftarrow 0.

    `params` is the anchor x. Take the gradient at `local_params(opt_state, params)`, evaluate and save `params`. Between
    rounds updates are zero. An outer `optax.sgd(1.0)` behind `mean` averages the workers' parameters (local SGD, FedAvg);
    behind a vote it moves by its sign. Everything right of the border (weight decay, schedules of the outer rate, prox)
    belongs into `outer`; schedules of `inner` count a worker's own steps, those of `outer` rounds.

    * `fragments=1`: a round is every `every`-th step, inside one `lax.cond` on the shared count, the same in all workers.
      `every=1` has no `lax.cond`.
    * `fragments=F`: a part is exchanged every `every / F` steps and each part once in `every`. With F = `every` the traffic
      of all steps is the same, and nothing is inside `lax.cond`.
    * `delay=1`: the exchange is of what the step before left behind, so that it can travel while this step's gradient is
      computed. XLA overlaps it only where no `lax.cond` is around it: with `fragments == every`, and so with `every=1`.
      On CPUs it overlaps nothing by itself, and as a second program anything: `signopt.workers.on_mesh(..., hidden=True)`.

    Fragments flatten every leaf. Parameters that other axes of a mesh shard are gathered for that: exchange those whole.

    Memory per worker: the offset, which is one copy of the parameters, and the state of `inner`. A worker with
    `present=False` makes no step and sends nothing, and its offset waits for the next round. Entries of a gradient that
    are not finite count as 0, and never reach an offset or the state of `inner`.

    A last round that is not full stays in the offsets: choose a number of steps that `every` divides, and with `delay=1`
    one more. Accumulate gradients in `inner` (`optax.MultiSteps` there is one worker's own), not around.

    Args:
      inner: What a worker steps with, learning rate included: any optax optimizer without communication between these
        workers. It gets the local parameters.
      outer: The border and all that is right of it: `optax.chain(majority_vote("w"), optax.sgd(0.01))`. It gets the anchor;
        with fragments it gets a part of every leaf as a vector, so a mask has to go by names or be made before.
      every: H, steps from one exchange of an entry to its next; at least 1.
      num_workers: M, the size of the axis that `outer` exchanges over.
      fragments: F, parts that are exchanged in turn; has to divide `every`.
      delay: 0 to decide at once; 1 to decide one step later.
      reset_inner: Start the state of `inner` anew in every round; without fragments only.
      axis_name: That axis, as for `signopt.workers.per_worker`: its size is checked against `num_workers`, and Flax's boxes
        are told its name; with None neither is.

    Returns:
      A transformation whose `update` takes `params`, and passes `present` and other extra arguments on to both
      optimizers. Updates have the parameters' dtypes.

    Raises:
      ValueError: If `every`, `fragments` or `num_workers` is not positive, if `fragments` does not divide `every`, if
        `delay` is neither 0 nor 1, or if `reset_inner` is asked for with fragments; in `update`, without `params`.
      TypeError: If one of them is no Python integer; in `update`, if a leaf is not of a floating-point dtype.

    Examples:
      Two workers at 1 and at 3 walk halfway to their own target in each step, and every second step they average.

      >>> import jax, jax.numpy as jnp, optax, signopt
      >>> outer = optax.chain(signopt.mean("w"), optax.sgd(1.0))
      >>> tx = signopt.local_steps(optax.sgd(0.5), outer, every=2, num_workers=2)
      >>> def step(state, target):
      ...     params, opt_state = state
      ...     gradient = signopt.local_params(opt_state, params) - target[0]
      ...     updates, opt_state = tx.update(gradient, opt_state, params)
      ...     return (optax.apply_updates(params, updates), opt_state), None
      >>> run = signopt.workers.simulate(step, 2, axis_name="w")
      >>> state = jnp.zeros(()), tx.init(jnp.zeros(()))
      >>> for _ in range(2):
      ...     state, _ = run(state, jnp.array([1.0, 3.0]))
      ...     print(float(state[0]), state[1].own.per_worker.offset.tolist())
      0.0 [0.5, 1.5]
      1.5 [0.0, 0.0]

    References:
      Douillard et al., `DiLoCo <https://arxiv.org/abs/2311.08105>`_, 2023, Algorithm 1: `inner` is AdamW, `outer` a mean and
      Nesterov's momentum. Douillard et al., `Streaming DiLoCo <https://arxiv.org/abs/2501.18512>`_, 2025, section 2: its
      fragments are layers, ours are parts of every leaf, and it mixes what it gets with local parameters by a factor.
      Maziane et al., `LOSCAR-SGD <https://arxiv.org/abs/2605.20866>`_, 2026: the correction of a late decision.
    """
    caller = "local_steps"
    _check.count(every, caller, "every")
    _check.count(num_workers, caller, "num_workers")
    _check.count(fragments, caller, "fragments")
    if every % fragments:
        raise ValueError(
            f"`{caller}(fragments=...)` has to divide every={every}, got {fragments}. A part is exchanged every "
            "`every / fragments` steps."
        )
    if isinstance(delay, bool) or delay not in (0, 1):
        raise ValueError(f"`{caller}(delay=...)` has to be 0 or 1, got {delay!r}.")
    if reset_inner and fragments > 1:
        raise ValueError(
            f"`{caller}(reset_inner=...)` has to be False with fragments={fragments}, got {reset_inner!r}: there is no step "
            "in which all of a worker's parameters start anew."
        )
    own: Any = workers.per_worker(_own_steps(inner, delay, reset_inner), num_workers, axis_name=axis_name)
    parts = _Parts(optax.with_extra_args_support(outer), fragments)
    pause = every // fragments  # steps from one exchange to the next

    def init_fn(params):
        return LocalStepsState(own.init(params), parts.init(params), jnp.zeros([], jnp.int32))

    def update_fn(updates, state, params=None, *, present=None, **extra_args):
        sign.require_floating(updates, caller)
        anchor = _check.params(params, caller, "a worker steps from `params` plus its offset")
        age = state.count + 1 - delay  # steps whose outcome can be exchanged now
        is_always_due = pause == 1 and delay == 0
        is_due = jnp.ones([], bool) if is_always_due else (age > 0) & (age % pause == 0)
        turn = (age // pause - 1) % fragments

        def leaves(x):
            return is_due & parts.is_in(x, turn)

        sent, own_state = own.update(
            updates, state.own, anchor, is_due=is_due, leaves=leaves, present=present, **extra_args
        )

        def exchange(sent, outer_state):
            at = state.own.worker.ndim  # of the axis of parts, in the view that this worker has of its own state
            return parts.update(sent, outer_state, anchor, turn, at, present=present, **extra_args)

        if pause > 1:  # most steps are no round
            moved, outer_state = _only_if(is_due, exchange, sent, state.outer_state)
        else:
            moved, outer_state = exchange(sent, state.outer_state)
            if delay:  # the first step has nothing to exchange, and no border may take its zeros for a message
                moved = jax.tree.map(lambda x: jnp.where(is_due, x, jnp.zeros_like(x)), moved)
                outer_state = jax.tree.map(lambda x, old: jnp.where(is_due, x, old), outer_state, state.outer_state)
        return moved, LocalStepsState(own_state, outer_state, state.count + 1)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def local_params(opt_state: optax.OptState, params: optax.Params) -> optax.Params:
    """Where this worker is: the anchor plus its offset.

    Args:
      opt_state: The state of `local_steps`, or of a chain that holds it; inside a step, as one worker sees it.
      params: The anchor.

    Returns:
      A tree like `params`. Given the state of several workers at once, every leaf has a leading axis of workers.

    Raises:
      ValueError: If there is no state of `local_steps` in `opt_state`, more than one, or one inside `optax.MultiSteps`; if
        it is of other parameters.

    Examples:
      >>> import jax.numpy as jnp, optax, signopt
      >>> tx = signopt.local_steps(optax.sgd(0.1), optax.sgd(1.0), every=4, num_workers=1)
      >>> params = jnp.array([1.0, 2.0])
      >>> updates, opt_state = tx.update(jnp.array([1.0, -1.0]), tx.init(params), params)
      >>> updates.tolist(), signopt.local_params(opt_state, params).round(2).tolist()
      ([0.0, 0.0], [0.8999999761581421, 2.0999999046325684])
    """
    caller = "local_params"
    kinds = (LocalStepsState, optax.MultiStepsState)
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, kinds))
    if any(isinstance(x, optax.MultiStepsState) and _holds_local_steps(x) for x in nodes):
        raise ValueError(
            f"`{caller}(opt_state)` has to be given a state of `local_steps` that takes part in every step, got one inside "
            "`optax.MultiSteps`, which would average the gradients of several local steps as if they were of one point. "
            "Put `optax.MultiSteps` into `inner`."
        )
    found = [x for x in nodes if isinstance(x, LocalStepsState)]
    if len(found) != 1:
        raise ValueError(
            f"`{caller}(opt_state)` has to be given a state that holds one of `local_steps`, got {len(found)}. Pass the "
            "state that `local_steps(...).init` returned, or that of the chain around it."
        )
    (own,) = (state.own for state in found)
    anchors, treedef = jax.tree.flatten(params)
    steps: Any = own.per_worker
    offsets = jax.tree.leaves(steps.offset)
    if own.worker.shape == (1,):
        offsets = [x[0] for x in offsets]
    shapes = [jnp.shape(x)[own.worker.size > 1 :] if own.worker.ndim else jnp.shape(x) for x in offsets]
    if shapes != [jnp.shape(x) for x in anchors]:
        raise ValueError(
            f"`{caller}(params)` has to be the parameters that `local_steps` was initialised with, of shapes {shapes}, got "
            f"{[jnp.shape(x) for x in anchors]}."
        )
    here = [jnp.broadcast_to(p, jnp.shape(o)) + o for p, o in zip(anchors, offsets, strict=True)]
    return jax.tree.unflatten(treedef, here)


def _holds_local_steps(state):
    leaves = jax.tree.leaves(state.inner_opt_state, is_leaf=lambda x: isinstance(x, LocalStepsState))
    return any(isinstance(x, LocalStepsState) for x in leaves)


def _own_steps(inner, delay, reset_inner):
    """One worker's side: an inner step, and which of its offset leaves with this exchange.

    Its updates are what is exchanged: the offset after this step, or before it if the decision is late.
    """
    inner = cast(Any, momentum.count_notfinite(inner, "local_steps"))

    def init_fn(params):
        offset = jax.tree.map(lambda p: jnp.zeros_like(p, dtype=jnp.result_type(p)), params)  # weakly typed in no case
        return OwnSteps(offset, inner.init(params))

    def update_fn(updates, state, params=None, *, is_due, leaves, present=None, **extra_args):
        here = jax.tree.map(lambda p, o: p + o, params, state.offset)
        steps, inner_state = inner.update(updates, state.inner_state, here, present=present, **extra_args)
        steps = jax.tree.map(lambda u, o: u.astype(o.dtype), steps, state.offset)
        arrived = jax.tree.map(lambda o, u: _finite_or(o + u, o), state.offset, steps)
        sent = state.offset if delay else arrived
        # What was exchanged leaves; with a late decision the step made meanwhile stays.
        kept = jax.tree.map(lambda u: _finite_or(u, jnp.zeros_like(u)) if delay else jnp.zeros_like(u), steps)
        offset = jax.tree.map(lambda o, k: jnp.where(leaves(o), k, o), arrived, kept)
        if reset_inner:
            fresh = inner.init(here)._replace(total_notfinite=inner_state.total_notfinite)
            inner_state = jax.tree.map(lambda new, x: jnp.where(is_due, new, x), fresh, inner_state)
        new_state = OwnSteps(offset, inner_state)
        if present is not None:
            new_state = jax.tree.map(lambda new, old: jnp.where(present, new, old), new_state, state)
        return sent, new_state

    return optax.GradientTransformationExtraArgs(init_fn, cast(Any, update_fn))


class _Parts:
    """An outer optimizer that sees one part of every leaf at a time, and has a state for each of them."""

    def __init__(self, outer: optax.GradientTransformationExtraArgs, fragments: int):
        self.outer = outer
        self.fragments = fragments

    def init(self, params):
        if self.fragments == 1:
            return self.outer.init(params)
        cut = jax.tree.map(self._cut, params)
        owners = workers.owners(jax.eval_shape(self.outer.init, jax.tree.map(lambda x: x[0], cut)))
        # The axis of workers stays in front, and who they are is the same for all parts.
        axes = jax.tree.map({"shared": 0, "per_worker": 1, "worker": None}.get, owners)
        return jax.vmap(self.outer.init, out_axes=axes, axis_size=self.fragments)(cut)

    def is_in(self, x: jax.Array, turn: Int[Array, ""]) -> Bool[Array, "*shape"]:
        """Which entries of a leaf are in the part whose turn it is."""
        if self.fragments == 1:
            return jnp.ones([], bool)
        return (lax.iota(jnp.int32, x.size) // max(1, self._size(x)) == turn).reshape(x.shape)

    def update(self, sent, state, params, turn, at, **extra_args):
        """The outer step for the pseudo-gradients of the part whose turn it is; zeros elsewhere."""
        if self.fragments == 1:
            return self.outer.update(jax.tree.map(jnp.negative, sent), state, params, **extra_args)
        axes = jax.tree.map({"shared": 0, "per_worker": at, "worker": None}.get, workers.owners(state))

        def take(x):
            return lax.dynamic_index_in_dim(self._cut(x), turn, keepdims=False)

        def read(x, axis):
            return x if axis is None else lax.dynamic_index_in_dim(x, turn, axis, keepdims=False)

        def write(x, new, axis):
            return x if axis is None else lax.dynamic_update_index_in_dim(x, new, turn, axis)

        own, mine = jax.tree.map(lambda x: -take(x), sent), jax.tree.map(read, state, axes)
        updates, new = self.outer.update(own, mine, jax.tree.map(take, params), **extra_args)
        return jax.tree.map(lambda u, p: self._put(u, p, turn), updates, params), jax.tree.map(write, state, new, axes)

    def _size(self, x):
        return -(-x.size // self.fragments)

    def _cut(self, x):
        if isinstance(x, jax.ShapeDtypeStruct):
            return jnp.zeros((self.fragments, self._size(x)), x.dtype)
        padding = self.fragments * self._size(x) - x.size
        return jnp.pad(jnp.ravel(x), (0, padding)).reshape(self.fragments, self._size(x))

    def _put(self, part, like, turn):
        rows = jnp.zeros((self.fragments, *part.shape), part.dtype)
        rows = _axis.to_varying(rows, tuple(_axis.varying(part)))
        return lax.dynamic_update_index_in_dim(rows, part, turn, 0).ravel()[: like.size].reshape(like.shape)


def _only_if(is_due: Bool[Array, ""], exchange, sent: Any, outer_state: Any) -> tuple[Any, Any]:
    """`exchange(sent, outer_state)` in a round; else zeros, and the state as it is, of the same types."""
    types = jax.eval_shape(exchange, sent, outer_state)

    def rest(_, outer_state):
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), types[0])
        return jax.tree.map(
            lambda x, like: _axis.to_varying(x, tuple(_axis.varying(like))), (zeros, outer_state), types
        )

    return lax.cond(is_due, exchange, rest, sent, outer_state)


def _finite_or(x: jax.Array, otherwise: jax.Array) -> jax.Array:
    return jnp.where(jnp.isfinite(x), x, otherwise)
