"""How the workers' gradients differ: by noise alone, or because their data do."""

from typing import NamedTuple

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np

from signopt import diagnostics
from signopt._tools import problem as problems

WATCHED = 2**16  # coordinates, drawn at random
EACH = 8  # mini-batches of a worker, at most
SHUFFLES = 999
SIGNIFICANT = 0.01


class Look(NamedTuple):
    """What the gradients of all workers say, where training begins.

    Attributes:
      workers: Their number.
      batches: Mini-batches of each.
      margin: |votes for - votes against| / M of signs of single gradients, the mean over coordinates.
      chance: The same of signs that are thrown.
      density: Of the mean gradient: 1 if all entries are of one magnitude, 1/d if one has everything.
      ratio: How much the workers' means differ, over what the noise in them explains; 1 for data that are alike.
      probability: How often mini-batches that are dealt at random differ as much; None if there are too few.
    """

    workers: int
    batches: int
    margin: float
    chance: float
    density: float
    ratio: float | None
    probability: float | None

    @property
    def alike(self) -> bool:
        """Whether nothing says that the workers' data differ."""
        return self.probability is None or self.probability > SIGNIFICANT


def look(problem: problems.Problem, workers: int) -> Look:
    """Take gradients of some mini-batches of every worker.

    Args:
      problem: In every process its own. Mini-batch i is worker i mod W's, of the W workers of a process.
      workers: In all processes.
    """
    processes = jax.process_count()
    here = workers // processes
    each = min(EACH, problem.count // here)
    if each == 0:  # fewer mini-batches than workers
        chosen, each = np.arange(here)[:, None] % problem.count, 1
    else:
        chosen = np.arange(each * here).reshape(each, here).T
    size = problem.size
    watched = np.sort(np.random.default_rng(0).choice(size, min(size, WATCHED), replace=False))

    @jax.jit
    def gradient(batch):
        flat = [
            jnp.ravel(x).astype(jnp.float32) for x in jax.tree.leaves(jax.grad(problem.loss)(problem.params, batch))
        ]
        return jnp.concatenate(flat)[watched]

    found = [np.asarray(gradient(jax.tree.map(lambda x, i=i: x[i], problem.batches))) for i in chosen.ravel()]
    own = np.stack(found).reshape(here, each, -1)
    if processes > 1:
        each = int(np.min(multihost_utils.process_allgather(np.int32(each))))
        own = np.asarray(multihost_utils.process_allgather(own[:, :each], tiled=True))
    return of(own)


def of(gradients: np.ndarray) -> Look:
    """What gradients (workers, batches, coordinates) say."""
    workers, batches, _ = gradients.shape
    votes = np.sign(gradients).sum(0)
    ratio, probability = difference(gradients)
    return Look(
        workers,
        batches,
        float(np.mean(abs(votes)) / workers),
        chance(workers),
        float(diagnostics.density(jnp.asarray(gradients.mean((0, 1))))),
        ratio,
        probability,
    )


def chance(workers: int) -> float:
    """The mean margin of M signs that are thrown.

    Examples:
      >>> chance(2), chance(4)
      (0.5, 0.375)
    """
    counts = np.arange(workers + 1)
    logs = np.cumsum(np.log(np.maximum(counts, 1)))
    shares = np.exp(logs[-1] - logs - logs[::-1] - workers * np.log(2))
    return round(float(np.sum(shares * abs(2 * counts - workers)) / workers), 6)


def difference(gradients: np.ndarray) -> tuple[float | None, float | None]:
    """Whether workers differ by more than their noise: F of an analysis of variance, and a permutation test of it.

    Args:
      gradients: Shape (workers, batches, coordinates).

    Returns:
      F over all coordinates together, about 1 if the mini-batches were dealt at random; and the share of random deals with
      as large a one. None where there are fewer than two batches of a worker, or no noise.

    References:
      Anderson, `A new method for non-parametric multivariate analysis of variance
      <https://doi.org/10.1111/j.1442-9993.2001.01070.pp.x>`_, 2001; on inner products, so that coordinates may depend.
    """
    workers, batches, _ = gradients.shape
    if batches < 2 or workers < 2:
        return None, None
    flat = gradients.reshape(workers * batches, -1).astype(np.float64)
    flat = flat - flat.mean(0)
    products = flat @ flat.T
    total = np.trace(products)

    def ratio(order):
        own = products[np.ix_(order, order)].reshape(workers, batches, workers, batches)
        between = sum(own[m, :, m].sum() for m in range(workers)) / batches
        within = total - between
        if within <= 1e-12 * total:
            return np.inf
        return (between / (workers - 1)) / (within / (workers * (batches - 1)))

    if total == 0:
        return None, None
    as_it_is = ratio(np.arange(len(flat)))
    rng = np.random.default_rng(0)
    shuffled = [ratio(rng.permutation(len(flat))) for _ in range(SHUFFLES)]
    as_large = sum(x >= as_it_is * (1 - 1e-9) for x in shuffled)
    return float(as_it_is), float(1 + as_large) / (1 + SHUFFLES)
