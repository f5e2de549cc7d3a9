"""The mean of a gradient and its noise, and how often the noise hides a sign."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float

from signopt import _axis
from signopt import _float
from signopt import sign
from signopt import theory


class Moments(NamedTuple):
    """What one pass over samples of a tree keeps.

    Attributes:
      count: int32 scalar: the number of samples.
      mean: Their mean: a tree of their shapes, in at least float32.
      squares: The sum of squared deviations from it; likewise.
    """

    count: jax.Array
    mean: Any
    squares: Any


def init_moments(like: Any) -> Moments:
    """Moments of no samples yet, for samples of the shapes of `like`."""
    zeros = jax.tree.map(lambda x: jnp.zeros_like(x, _float.wide_dtype(x)), like)
    return Moments(jnp.zeros([], jnp.int32), zeros, zeros)


def update_moments(moments: Moments, sample: Any) -> Moments:
    r"""Take one more sample in.

    .. math::
      \bar x \leftarrow \bar x + \frac{x - \bar x}{n}, \qquad
      Q \leftarrow Q + \frac{n - 1}{n} (x - \bar x_\text{old})^2

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from signopt.diagnostics import init_moments, update_moments, deviation
      >>> moments = init_moments(jnp.zeros(1))
      >>> for x in (1.0, 3.0):
      ...     moments = update_moments(moments, jnp.array([x]))
      >>> moments.mean.tolist(), moments.squares.tolist()
      ([2.0], [2.0])

    References:
      Welford, Note on a method for calculating corrected sums of squares and products, 1962.
    """
    count = moments.count + 1
    share = lambda x: 1 / count.astype(x.dtype)  # noqa: E731
    change = jax.tree.map(lambda x, m: jnp.asarray(x).astype(m.dtype) - m, sample, moments.mean)
    mean = jax.tree.map(lambda m, c: m + share(m) * c, moments.mean, change)
    squares = jax.tree.map(lambda q, c: q + (1 - share(q)) * c**2, moments.squares, change)
    return Moments(count, mean, squares)


def variance(moments: Moments) -> Any:
    """The unbiased variance of one sample, entry by entry; NaN for fewer than two samples."""

    def unbiased(squares):
        count = moments.count.astype(squares.dtype)
        return squares / jnp.where(count > 1, count - 1, jnp.nan)

    return jax.tree.map(unbiased, moments.squares)


def deviation(moments: Moments) -> Any:
    r"""The standard deviation :math:`\sigma` of one sample, entry by entry; NaN for fewer than two samples."""
    return jax.tree.map(jnp.sqrt, variance(moments))


def gradient_moments(gradient: Callable[[Any, Any], Any], params: Any, batches: Any) -> Moments:
    """The moments of the gradient over mini-batches, in one pass.

    Four mini-batches are taken in at a time: the moments are then read and written once for all four, and the pass is hardly
    slower than a loop that only adds gradients up. Up to four gradients are held in memory for it.

    Inside a mesh step the gradients are this worker's own, not added up over the workers that `batches` are spread over.

    Args:
      gradient: From parameters and a mini-batch to a tree like the parameters.
      params: Where.
      batches: A tree whose leaves have a leading axis of mini-batches; `signopt.workers.split_batch` makes one.

    Returns:
      Moments whose samples are mini-batch gradients: their deviation is that of one sample over the root of the size of a
      mini-batch.

    Raises:
      ValueError: If there are fewer than two mini-batches, or an empty one: that shows no noise.
    """
    for path, x in jax.tree.leaves_with_path(batches):
        if jnp.ndim(x) == 0 or x.shape[0] < 2 or x.size == 0:
            raise ValueError(
                "`gradient_moments(batches=...)` has to hold at least 2 mini-batches along a leading axis, none of them "
                f"empty, got shape {jnp.shape(x)} at `batches{jax.tree_util.keystr(path)}`. Split a batch with "
                "`signopt.workers.split_batch(batch, 8)`."
            )

    over = tuple(frozenset().union(*map(_axis.varying, jax.tree.leaves(batches))))
    own = _axis.to_varying(params, over)  # `jax.grad` of what is the same on all workers adds up their gradients

    def step(moments, batch):
        return update_moments(moments, gradient(own, batch)), None

    start = init_moments(params)
    varies = _axis.varying_of(lambda: step(start, jax.tree.map(lambda x: x[0], batches))[0][1:])
    start = Moments(start.count, *_axis.to_varying(tuple(start[1:]), varies))
    return lax.scan(step, start, batches, unroll=4)[0]


def signal_to_noise(moments: Moments) -> Any:
    r"""The ratio :math:`S = |\bar g| / \sigma` of each entry, for the noise of one sample.

    The mean of n samples is itself noisy: where there is no signal at all S is about :math:`1 / \sqrt n`. Zero where mean
    and deviation are both zero.
    """

    def ratio(mean, noise):
        neither = (mean == 0) & (noise == 0)
        return jnp.where(neither, 0, jnp.abs(mean) / jnp.where(neither, 1, noise))

    return jax.tree.map(ratio, moments.mean, deviation(moments))


def share_above(ratios: Any, line: float = theory.CRITICAL_SIGNAL_TO_NOISE) -> Float[Array, ""]:
    r"""The share of entries above a line; by default :math:`2 / \sqrt 3`, where the follow-up paper's theory changes.

    Above it a worker's sign is right with probability 5/6 at least, if the noise is unimodal and symmetric.
    """
    leaves = jax.tree.leaves(ratios)
    above = sum((jnp.sum(x > line, dtype=jnp.int32) for x in leaves), jnp.zeros([], jnp.int32))
    return above.astype(jnp.float32) / max(1, sum(jnp.size(x) for x in leaves))


def sign_error_probability(samples: Any, gradient: Any = None) -> Any:
    r"""How often a sample's sign is not the gradient's, entry by entry.

    .. math::
      P_i = \frac12 \Big(1 - \operatorname{sign}(g_i) \frac1n \sum_{j=1}^n \operatorname{sign}(\tilde g_{j,i})\Big),

    A sample without a sign counts as half an error, since it neither helps nor harms. Where the gradient has no sign the
    probability is ½. Bounds from the signal-to-noise ratio: `signopt.theory.sign_error_gauss` (unimodal, symmetric noise) and
    `sign_error_cantelli` (any).

    Args:
      samples: A tree whose leaves have a leading axis of samples.
      gradient: The true gradient; the mean of the samples if None. That one agrees with its own samples too often: with
        n samples of pure noise P is about :math:`\frac12 - \frac{1}{\sqrt{2 \pi n}}`.

    Returns:
      A tree like the gradient, in float32.

    Raises:
      ValueError: If there are no samples.

    Examples:
      >>> import jax.numpy as jnp
      >>> from signopt.diagnostics import sign_error_probability
      >>> sign_error_probability(jnp.array([[5.0, 1.0], [-1.0, 1.0], [-1.0, 0.0], [1.0, 1.0]])).tolist()
      [0.5, 0.125]
    """
    for path, x in jax.tree.leaves_with_path(samples):
        if jnp.ndim(x) == 0 or x.shape[0] == 0:
            raise ValueError(
                "`sign_error_probability(samples=...)` has to hold at least 1 sample along a leading axis, got shape "
                f"{jnp.shape(x)} at `samples{jax.tree_util.keystr(path)}`."
            )

    def mean(x):
        return jnp.sum(_float.widen(x) / x.shape[0], axis=0)

    def share_wrong(x, g):
        signs = mean(sign.sign(x)).astype(jnp.float32)
        return (1 - sign.sign(g).astype(jnp.float32) * signs) / 2

    gradient = jax.tree.map(mean, samples) if gradient is None else gradient
    return jax.tree.map(share_wrong, samples, gradient)
