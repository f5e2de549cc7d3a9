"""How clear a vote is: margins, agreement and abstentions."""

from typing import Any
import warnings

from signopt import _axis
from signopt import border as borders
from signopt import vote
from signopt.vote import VoteStatistics as VoteStatistics


def vote_statistics(updates: Any, axis_name: _axis.AxisName) -> VoteStatistics:
    """Compare what the workers are about to vote with, by a two-bit vote of its own.

    A vote that is held anyway reports the same for less: `majority_vote(..., report=True)`.

    Args:
      updates: This worker's, from the left of `majority_vote`.
      axis_name: The workers, as in `majority_vote`.

    Returns:
      Statistics of all coordinates; 0 where there is nothing to count.

    Raises:
      ValueError: If `axis_name` is not bound, or the updates are known to be the same on all workers.
      TypeError: If a leaf is not of a floating-point dtype.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from signopt.diagnostics import vote_statistics
      >>> grads = jnp.array([[1.0, -1.0], [1.0, 1.0], [1.0, 0.0]])  # three workers; the second coordinate is tied
      >>> statistics = jax.vmap(lambda g: vote_statistics(g, "worker"), axis_name="worker", out_axes=None)(grads)
      >>> [round(float(x), 3) for x in statistics]
      [3.0, 0.5, 1.0, 1.0, 0.167]
    """
    tx = borders.exchange(
        axis_name,
        vote.by_bits("two_bit", 0.0, None, report=True),
        caller="vote_statistics",
        report_like=vote.statistics_like(),
    )
    state: Any = tx.update(updates, tx.init(updates))[1]
    return state.report


def warn_if_unanimous(statistics: VoteStatistics) -> bool:
    """Warn if several workers agree on everything: then gradients were reduced before the vote, and it decides nothing.

    `majority_vote` sees that in types where there are types; under `jax.pmap` and `check_vma=False` only this shows it.

    Args:
      statistics: What `vote_statistics` found or a vote reported, outside `jax.jit`.

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
