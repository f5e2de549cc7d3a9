"""How clear a vote is: margins, agreement and abstentions, step by step."""

from typing import Any, NamedTuple
import warnings

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, UInt
import numpy as np
import optax

from signopt import _axis
from signopt import _bits
from signopt import sign
from signopt import wire as wires


class VoteStatistics(NamedTuple):
    """How the workers' signs compare. Shared: the same on every worker.

    Attributes:
      num_workers: int32 scalar; 0 before the first vote.
      margin: The mean over coordinates of |votes for - votes against| / workers, in [0, 1]. With M workers that only guess
        about sqrt(2 / (pi M)).
      agreement: The share of the votes on decided coordinates that were on the side of the majority, in [0.5, 1].
      lowest_agreement: The same for the worker that agrees least, in [0, 1]; far below the others' it is a bad one.
      abstentions: The share of ballots that were empty, in [0, 1].
    """

    num_workers: jax.Array
    margin: jax.Array
    agreement: jax.Array
    lowest_agreement: jax.Array
    abstentions: jax.Array


def vote_statistics(updates: Any, axis_name: _axis.AxisName, *, sample: int = 2**16) -> VoteStatistics:
    """Compare what the workers are about to vote with.

    Args:
      updates: This worker's, from the left of `majority_vote`; on a one-bit wire zeros are filled in later.
      axis_name: The workers, as in `majority_vote`.
      sample: About how many coordinates to look at, evenly spaced: 2 bits each travel from every worker.

    Returns:
      Statistics of those coordinates; 0 where there is nothing to count.

    Raises:
      ValueError: If `axis_name` is not bound or `sample` is not positive.
      TypeError: If a leaf is not of a floating-point dtype.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from signopt.diagnostics import vote_statistics
      >>> grads = jnp.array([[1.0, -1.0], [1.0, 1.0], [1.0, 0.0]])  # three workers; the second coordinate is tied
      >>> statistics = jax.vmap(lambda g: vote_statistics(g, "worker"), axis_name="worker", out_axes=None)(grads)
      >>> [round(float(x), 3) for x in statistics]
      [3.0, 0.5, 1.0, 1.0, 0.167]
    """
    if sample < 1:
        raise ValueError(f"`vote_statistics(sample=...)` has to be at least 1, got {sample}.")
    num_workers = _axis.size(axis_name, "vote_statistics")
    sign.require_floating(updates, "vote_statistics")
    used = _used_bits(updates)
    stride = max(1, 8 * len(used) // sample)
    own = wires.pack(updates, sign.is_positive, sign.is_negative)[::stride]
    everybody = _everybody(own, axis_name)
    plus, minus = (_bits.unpack(everybody, plane).astype(jnp.int32) for plane in (0, 1))
    looked_at = max(1, int(used[::stride].sum()))
    total = (plus - minus).sum(0)
    with_majority = (plus * (total > 0) + minus * (total < 0)).sum(1)
    on_decided = ((plus + minus) * (total != 0)).sum(1)
    by_worker = with_majority / jnp.maximum(1, on_decided)
    return VoteStatistics(
        num_workers=jnp.int32(num_workers),
        margin=jnp.abs(total).sum() / (num_workers * looked_at),
        agreement=with_majority.sum() / jnp.maximum(1, on_decided.sum()),
        lowest_agreement=by_worker.min(),
        abstentions=1 - (plus + minus).sum() / (num_workers * looked_at),
    )


def monitor_votes(axis_name: _axis.AxisName, *, sample: int = 2**16) -> optax.GradientTransformation:
    """Leave updates as they are, and keep the `vote_statistics` of the last step as state.

    It goes directly to the left of a vote::

      optax.chain(monitor_votes("worker"), majority_vote("worker"), optax.scale_by_learning_rate(1e-3))

    Args:
      axis_name: The workers, as in `majority_vote`.
      sample: As in `vote_statistics`.
    """

    def init_fn(params):
        del params
        return VoteStatistics(jnp.int32(0), *(jnp.float32(0) for _ in VoteStatistics._fields[1:]))

    def update_fn(updates, state, params=None):
        del state, params
        return updates, vote_statistics(updates, axis_name, sample=sample)

    return optax.GradientTransformation(init_fn, update_fn)


def warn_if_unanimous(statistics: VoteStatistics) -> bool:
    """Warn if several workers agree on everything: then gradients were reduced before the vote, and it decides nothing.

    `majority_vote` sees that in types where there are types; under `jax.pmap` and `check_vma=False` only this shows it.

    Args:
      statistics: What `vote_statistics` or `monitor_votes` found, outside `jax.jit`.

    Returns:
      Whether it warned.
    """
    unanimous = int(statistics.num_workers) > 1 and float(statistics.margin) == 1
    if unanimous:
        warnings.warn(
            f"All {int(statistics.num_workers)} workers vote the same on every coordinate (mean margin 1): their gradients "
            "were averaged before the vote, or all workers see the same data. Leave out `lax.pmean` and `lax.psum` of "
            "gradients, and take them with `signopt.workers.value_and_grad`.",
            stacklevel=2,
        )
    return unanimous


def _everybody(own: UInt[Array, " n"], axis_name: _axis.AxisName) -> UInt[Array, "workers n"]:
    devices, vmapped = _axis.devices_and_vmapped(axis_name)
    here = _axis.stack_vmapped(own, vmapped)
    if not devices:
        return here
    workers_here, num_words = here.shape
    found = _axis.join_devices(_axis.to_varying(here, devices), devices)
    return found.reshape(workers_here, -1, num_words).swapaxes(0, 1).reshape(-1, num_words)


def _used_bits(tree: Any) -> Int[np.ndarray, " n"]:
    """How many coordinates each word of a packed buffer holds."""
    leaves = jax.tree.leaves(tree)
    used = [np.minimum(8, leaves[i].size - np.arange(0, leaves[i].size, 8)) for i, _ in wires.layout(tree)]
    return np.concatenate([np.zeros(0, int), *used])
