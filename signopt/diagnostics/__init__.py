r"""Does a model like signs? What to measure, and what it means.

Signs throw magnitudes away. That costs little where gradients are dense (all of about one size) compared with their noise
and with the curvature, and much where a few coordinates carry the gradient. The density of a vector v of d entries,

.. math::
  \phi(v) = \frac{\|v\|_1^2}{d \, \|v\|_2^2} \in \Big[\frac1d, 1\Big],

of the gradient g, of its standard deviation :math:`\sigma` and of the curvature L says which is the case: see `geometry`
and `regime`. Everything here is a pure function of trees; `optax.snapshot("density", density)`, `monitor_moments` and
`monitor_votes` (in `signopt.margins`, and here by name) record it inside a chain.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float
import optax

from signopt import _axis
from signopt import sign
from signopt import theory
from signopt.diagnostics.curvature import hessian_diagonal as hessian_diagonal
from signopt.diagnostics.votes import VoteStatistics as VoteStatistics
from signopt.diagnostics.votes import vote_statistics as vote_statistics
from signopt.diagnostics.votes import warn_if_unanimous as warn_if_unanimous

MUCH_MORE = 3.0  # what the paper's ">> 1" means here, unless the user says otherwise


def density(tree: Any) -> Float[Array, ""]:
    r"""How dense a tree is, taken as one vector: :math:`\phi(v) = \|v\|_1^2 / (d \|v\|_2^2)`.

    Args:
      tree: Arrays. `jax.tree.map(density, tree)` gives the density of each leaf.

    Returns:
      A float32 scalar: 1 if all entries have one magnitude, 1/d if all but one are zero, about :math:`2 / \pi` for normal
      numbers; 0 if all are zero or there are none.

    Examples:
      >>> import jax.numpy as jnp
      >>> from signopt.diagnostics import density
      >>> float(density([jnp.array([1.0, -1.0]), jnp.array([1.0, 1.0])])), float(density(jnp.array([0.0, 7.0])))
      (1.0, 0.5)

    References:
      Equation (1) of Bernstein et al., `signSGD <https://arxiv.org/abs/1802.04434>`_, 2018.
    """
    sizes = [jnp.abs(x.astype(jnp.float32)) for x in jax.tree.leaves(tree) if x.size]
    if not sizes:
        return jnp.float32(0)
    largest = jnp.max(jnp.stack([x.max() for x in sizes]))
    unit = jnp.where(largest > 0, largest, 1)  # so that squares neither overflow nor vanish
    total = jnp.sum(jnp.stack([jnp.sum(x / unit) for x in sizes]))
    squares = jnp.sum(jnp.stack([jnp.sum((x / unit) ** 2) for x in sizes]))
    return jnp.where(largest == 0, 0, total**2 / (sum(x.size for x in sizes) * jnp.where(largest == 0, 1, squares)))


# ---- moments ---------------------------------------------------------------------------------------------------------


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
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)), like)
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
    share = 1 / count
    change = jax.tree.map(jnp.subtract, sample, moments.mean)
    mean = jax.tree.map(lambda m, c: m + share * c, moments.mean, change)
    squares = jax.tree.map(lambda q, c: q + (1 - share) * c**2, moments.squares, change)
    return Moments(count, mean, squares)


def merge_moments(a: Moments, b: Moments) -> Moments:
    """The moments of two sets of samples together.

    References:
      Chan, Golub and LeVeque, Updating formulae and a pairwise algorithm for computing sample variances, 1979.
    """
    count = a.count + b.count
    share = b.count / jnp.maximum(count, 1)
    mean = jax.tree.map(lambda x, y: x + (y - x) * share, a.mean, b.mean)
    squares = jax.tree.map(
        lambda p, q, x, y: p + q + (y - x) ** 2 * (a.count * share), a.squares, b.squares, a.mean, b.mean
    )
    return Moments(count, mean, squares)


def variance(moments: Moments) -> Any:
    """The unbiased variance of one sample, entry by entry; NaN for fewer than two samples."""
    spread = jnp.where(moments.count > 1, moments.count - 1, jnp.nan)
    return jax.tree.map(lambda q: q / spread, moments.squares)


def deviation(moments: Moments) -> Any:
    r"""The standard deviation :math:`\sigma` of one sample, entry by entry; NaN for fewer than two samples."""
    return jax.tree.map(jnp.sqrt, variance(moments))


def moments_across(tree: Any, axis_name: _axis.AxisName) -> Moments:
    """The moments of the workers' values of a tree, the same on every worker: each worker is one sample."""
    num_workers = _axis.size(axis_name, "moments_across")
    wide = jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree)
    mean = jax.tree.map(lambda x: x / num_workers, _axis.total(_axis.to_varying(wide, axis_name), axis_name))
    squares = _axis.total(jax.tree.map(lambda x, m: (x - m) ** 2, wide, mean), axis_name)
    return Moments(jnp.int32(num_workers), mean, squares)


def gradient_moments(gradient: Callable[[Any, Any], Any], params: Any, batches: Any) -> Moments:
    """The moments of the gradient over mini-batches, in one pass.

    Four mini-batches are taken in at a time, so that the moments are read and written once for all four, which makes the pass
    hardly slower than a loop that only adds gradients up; up to four gradients are held in memory for it.

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

    def step(moments, batch):
        return update_moments(moments, gradient(params, batch)), None

    return lax.scan(step, init_moments(params), batches, unroll=4)[0]


def monitor_moments() -> optax.GradientTransformation:
    """Leave updates as they are, and keep their `Moments` over all steps so far as state.

    To the left of a border it sees one worker's gradients and belongs inside `signopt.workers.per_worker`. Along the path of
    training the moments contain the drift of the gradient, too; `gradient_moments` takes them at one point.
    """

    def init_fn(params):
        return init_moments(params)

    def update_fn(updates, state, params=None):
        del params
        return updates, update_moments(state, updates)

    return optax.GradientTransformation(init_fn, update_fn)


# ---- signs -----------------------------------------------------------------------------------------------------------


def signal_to_noise(moments: Moments) -> Any:
    r"""The ratio :math:`S = |\bar g| / \sigma` of each entry, for the noise of one sample.

    The mean of n samples is itself noisy: where there is no signal at all S is about :math:`1 / \sqrt n`. Zero where mean
    and deviation are both zero.
    """
    return jax.tree.map(
        lambda m, s: jnp.where((m == 0) & (s == 0), 0, jnp.abs(m) / s), moments.mean, deviation(moments)
    )


def share_above(ratios: Any, line: float = theory.CRITICAL_SIGNAL_TO_NOISE) -> Float[Array, ""]:
    r"""The share of entries above a line; by default :math:`2 / \sqrt 3`, where the follow-up paper's theory changes.

    Above it a worker's sign is right with probability 5/6 at least, if the noise is unimodal and symmetric.
    """
    leaves = jax.tree.leaves(ratios)
    above = jnp.asarray(sum(jnp.sum(x > line) for x in leaves))
    return above / max(1, sum(x.size for x in leaves))


def sign_error_probability(samples: Any, gradient: Any = None, *, axis_name: _axis.AxisName = None) -> Any:
    r"""How often a sample's sign is not the gradient's, entry by entry.

    .. math::
      P_i = \frac12 \Big(1 - \operatorname{sign}(g_i) \frac1n \sum_{j=1}^n \operatorname{sign}(\tilde g_{j,i})\Big),

    which counts a sample without a sign as half an error, since it neither helps nor harms, and is ½ where the gradient
    has none. Bounds from the signal-to-noise ratio: `signopt.theory.sign_error_gauss` (unimodal, symmetric noise) and
    `sign_error_cantelli` (any).

    Args:
      samples: A tree whose leaves have a leading axis of samples; with `axis_name`, each worker's own sample without one.
      gradient: The true gradient; the mean of the samples if None. That one agrees with its own samples too often: with
        n samples of pure noise P is about :math:`\frac12 - \frac{1}{\sqrt{2 \pi n}}`.
      axis_name: The workers whose samples to compare, if they are spread over workers.

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
    for path, x in [] if axis_name is not None else jax.tree.leaves_with_path(samples):
        if x.ndim == 0 or x.shape[0] == 0:
            raise ValueError(
                "`sign_error_probability(samples=...)` has to hold at least 1 sample along a leading axis, got shape "
                f"{x.shape} at `samples{jax.tree_util.keystr(path)}`."
            )

    def mean(tree):
        if axis_name is None:
            return jax.tree.map(lambda x: jnp.mean(x.astype(jnp.float32), axis=0), tree)
        return moments_across(tree, axis_name).mean

    signs = mean(jax.tree.map(sign.sign, samples))
    gradient = mean(samples) if gradient is None else gradient
    return jax.tree.map(lambda s, g: (1 - sign.sign(g) * s) / 2, signs, gradient)


# ---- geometry --------------------------------------------------------------------------------------------------------


class Geometry(NamedTuple):
    """Densities, and the two ratios that the paper's comparison of signSGD and SGD turns on.

    Attributes:
      gradient_density: The density of g. Along a path the paper's bound takes the smallest.
      noise_density: The density of the standard deviations.
      curvature_density: The density of the curvature; NaN if it was not measured.
      noise_ratio: R2: noise density over gradient density.
      curvature_ratio: R1: root of the curvature density over gradient density; NaN if it was not measured.
    """

    gradient_density: jax.Array
    noise_density: jax.Array
    curvature_density: jax.Array
    noise_ratio: jax.Array
    curvature_ratio: jax.Array


def geometry(gradient: Any, noise: Any, curvature: Any = None) -> Geometry:
    r"""Compare densities: :math:`R_1 = \sqrt{\phi(L)} / \phi(g)` and :math:`R_2 = \phi(\sigma) / \phi(g)`.

    Args:
      gradient: g, such as `moments.mean`. The noise left in a mean over few samples makes it look dense.
      noise: :math:`\sigma`, such as `deviation(moments)`.
      curvature: L, such as `hessian_diagonal(loss, params, key)`; its signs do not matter. None if unknown.

    References:
      Section 3 of Bernstein et al., `signSGD <https://arxiv.org/abs/1802.04434>`_, 2018, which leaves the curvature open.
    """
    g, s = density(gradient), density(noise)
    c = jnp.float32(jnp.nan) if curvature is None else density(curvature)
    unit = jnp.where(g > 0, g, jnp.nan)  # without a gradient there is nothing to compare
    return Geometry(g, s, c, noise_ratio=s / unit, curvature_ratio=jnp.sqrt(c) / unit)


def regime(found: Geometry, *, threshold: float = MUCH_MORE) -> str:
    r"""Which of the paper's three cases holds: "I", "II" or "III", or two of them where the curvature is unknown.

    I: both ratios exceed the threshold. II: neither does. III: one does.

    Args:
      found: What `geometry` returned, outside `jax.jit`.
      threshold: What ":math:`\gg 1`" means.

    Raises:
      ValueError: If `threshold` is below 1, or there was no gradient to compare with.
    """
    if not threshold >= 1:
        raise ValueError(f"`regime(threshold=...)` has to be at least 1, got {threshold}.")
    if jnp.isnan(found.noise_ratio):
        raise ValueError(
            "`regime(found)` has to be given a geometry with a gradient, got one whose gradient is zero or not finite."
        )
    noise_is_denser = bool(found.noise_ratio > threshold)
    if jnp.isnan(found.curvature_ratio):
        return "I or III" if noise_is_denser else "II or III"
    curvature_is_denser = bool(found.curvature_ratio > threshold)
    if noise_is_denser == curvature_is_denser:
        return "I" if noise_is_denser else "II"
    return "III"


def explain(found: Geometry, *, threshold: float = MUCH_MORE) -> str:
    """Say in words what a geometry means for the choice between signs and SGD.

    Args:
      found: What `geometry` returned, outside `jax.jit`; best measured along the path of SGD.
      threshold: As in `regime`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from signopt.diagnostics import explain, geometry
      >>> print(explain(geometry(jnp.ones(4), jnp.array([1.0, 0, 0, 0]), jnp.ones(4))))
      Regime II: signs suit this. The noise is 0.2 times and the curvature (its root) 1.0 times as dense as the gradient;
      neither is more than 3 times. Theory expects signSGD to be as fast as SGD or faster.
    """
    case = regime(found, threshold=threshold)
    curved = "of unknown density" if jnp.isnan(found.curvature_ratio) else f"{float(found.curvature_ratio):.1f} times"
    measured = (
        f"The noise is {float(found.noise_ratio):.1f} times and the curvature (its root) {curved} as dense as the gradient"
        if "unknown" not in curved
        else f"The noise is {float(found.noise_ratio):.1f} times as dense as the gradient; the curvature was not measured"
    )
    line = f"more than {threshold:g} times"
    verdict = {
        "I": (
            "SGD suits this better",
            f"both are {line}. A few coordinates carry the gradient, which signs do not see.",
        ),
        "II": ("signs suit this", f"neither is {line}. Theory expects signSGD to be as fast as SGD or faster."),
        "III": ("theory cannot tell", f"one of them is {line}. Try both."),
        "I or III": ("SGD may suit this better", f"the noise is {line}. Measure the curvature, or try both."),
        "II or III": ("signs may suit this", f"the noise is not {line}. Measure the curvature, or try signs."),
    }[case]
    return f"Regime {case}: {verdict[0]}. {measured}; {verdict[1]}"
