"""What travels, in bytes: counted in the program that would run, before anything is compiled."""

from fractions import Fraction
import math
from typing import Any, NamedTuple, cast

import jax
from jax.sharding import AbstractMesh
from jax.sharding import AxisType
import optax

from signopt import _axis
from signopt import _check
from signopt import _float
from signopt.means import mean
from signopt.vote import Wire as Wire
from signopt.vote import majority_vote
from signopt.workers import state as states

_AXIS = "worker"


def bytes_sent(
    tree: Any,
    num_workers: int,
    border: str | optax.GradientTransformation,
    *,
    axis_name: _axis.AxisName = _AXIS,
) -> int:
    """The bytes that each worker sends in one step.

    Args:
      tree: Parameters or updates; arrays or `jax.ShapeDtypeStruct`.
      num_workers: M, the number of workers.
      border: "one_bit", "two_bit" or "psum", as in `majority_vote`; "mean" for a mean in the leaves' own dtype; or any
        transformation that communicates over one axis, a whole optimizer for example.
      axis_name: The name that a transformation knows the workers by.

    Returns:
      The exact size of what this worker passes to the others by `all_to_all`, `all_gather` and `ppermute`, padding included.
      For `psum` what a ring all-reduce moves, 2 (M-1)/M of the data. Of the branches of a `lax.cond` the largest counts:
      a round of local steps, not the steps between.

    Raises:
      ValueError: If `border` is unknown, or `num_workers` is not positive.

    Examples:
      >>> import jax, signopt
      >>> params = {"w": jax.ShapeDtypeStruct((1000, 1000), "float32")}
      >>> [signopt.wire.bytes_sent(params, 8, wire) for wire in ("mean", "psum", "two_bit", "one_bit")]
      [7000000, 1750000, 437500, 218750]
      >>> signopt.wire.bytes_sent(params, 8, signopt.majority_vote("worker", wire="one_bit", block=256))
      246456

    References:
      Table 1 of Bernstein et al., `signSGD <https://arxiv.org/abs/1802.04434>`_, 2018, counts both directions of a
      star around one server: 64 M d bits for floats, 2 M d for the vote. Sharding the server leaves (M-1)/M of it.
    """
    _check.count(num_workers, "bytes_sent", "num_workers")
    if isinstance(border, str):
        _check.choice(border, ("one_bit", "two_bit", "psum", "mean"), "bytes_sent", "border")
        border = mean(axis_name) if border == "mean" else majority_vote(axis_name, wire=cast(Wire, border))
    found = messages(tree, num_workers, border, axis_name=axis_name)
    return math.ceil(sum(message.sent(num_workers) for message in found))


class Message(NamedTuple):
    """A collective of a program.

    Attributes:
      kind: What JAX calls it: the start of its primitive's name, a key of `SHARES`.
      bytes: Of this worker's operand.
    """

    kind: str
    bytes: int

    def sent(self, num_workers: int) -> Fraction:
        """What of it travels, in bytes."""
        return self.bytes * SHARES[self.kind](num_workers)


def messages(
    tree: Any, num_workers: int, border: optax.GradientTransformation, *, axis_name: _axis.AxisName = _AXIS
) -> list[Message]:
    """The collectives of one step, an entry for each array that one of them is given; arguments as in `bytes_sent`.

    Of the branches of a `lax.cond` it is those that send the most.

    Returns:
      What each collective is given, in the order of the program.

    Examples:
      >>> import jax, signopt
      >>> params = {"w": jax.ShapeDtypeStruct((1000,), "float32")}
      >>> messages(params, 2, signopt.mean("worker"))
      [Message(kind='psum', bytes=4000)]
    """
    tx = optax.with_extra_args_support(border)
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(_float.shape(x), jax.numpy.result_type(x)), tree)
    state = jax.eval_shape(tx.init, like)
    names: Any = _axis.names(axis_name)
    mesh = AbstractMesh((num_workers,), names, axis_types=(AxisType.Auto,))
    specs = states.partition_specs(state, axis_name)
    step = jax.shard_map(
        tx.update, mesh=mesh, in_specs=(jax.P(), specs, jax.P()), out_specs=(jax.P(), specs), check_vma=False
    )
    try:
        program = jax.make_jaxpr(step)(like, state, like)
    except ValueError as error:
        if "is bound" in str(error):
            error.add_note(f"`bytes_sent(axis_name=...)` has to be the axis of what is given to it, got {axis_name!r}.")
        raise
    return _messages(program.jaxpr, num_workers)


def _messages(jaxpr, num_workers) -> list[Message]:
    found = []
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        operands = [x.aval for x in equation.invars if hasattr(x.aval, "dtype")]
        kinds = [kind for kind in SHARES if name.startswith(kind)]
        found += [Message(kind, x.size * x.dtype.itemsize) for kind in kinds for x in operands]
        inner = [_messages(program, num_workers) for program in _programs(equation.params)]
        if name == "cond":
            inner = [max(inner, key=lambda branch: sum(message.sent(num_workers) for message in branch))]
        found += [message for program in inner for message in program] * equation.params.get("length", 1)
    return found


# What each worker sends of an operand, by the start of the primitive's name: they have variants, and names differ with
# versions of JAX.
SHARES = {
    "all_to_all": lambda workers: Fraction(workers - 1, workers),
    "reduce_scatter": lambda workers: Fraction(workers - 1, workers),
    "all_gather": lambda workers: Fraction(workers - 1),
    "ppermute": lambda workers: Fraction(int(workers > 1)),
    "psum": lambda workers: Fraction(2 * (workers - 1), workers),
    "pmax": lambda workers: Fraction(2 * (workers - 1), workers),
    "pmin": lambda workers: Fraction(2 * (workers - 1), workers),
}


def _programs(params: Any) -> list:
    """The programs among the parameters of an equation."""
    found = []
    for value in params.values():
        for x in value if isinstance(value, tuple | list) else [value]:
            inner = getattr(x, "jaxpr", x)
            if hasattr(inner, "eqns"):
                found.append(inner)
    return found
