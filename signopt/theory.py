r"""The papers' bounds, as functions.

=============================================  ======================================================================
Bernstein et al. 2018, `signSGD`_
=============================================  ======================================================================
section 3, Theorem 1                           `sign_error_markov`, `signsgd_rate`
section 4, Theorem 2                           `sign_error_cantelli`, `sign_error_gauss`, `vote_error`,
                                               `majority_vote_rate`
section 5, Theorem 3                           `warmup_steps`
=============================================  ======================================================================

=============================================  ======================================================================
Bernstein et al. 2019, `fault tolerance`_
=============================================  ======================================================================
Theorem 1                                      `mixed_norm`, `small_batch_rate`
Theorem 2                                      `adversarial_vote_rate`
=============================================  ======================================================================

=============================================  ======================================================================
Yang et al. 2020, Adaptive MH-signSGD
=============================================  ======================================================================
Theorem 1, Corollary 2                         `vote_advantage`, `mh_signsgd_rate`
Proposition 3                                  `greedy_learning_rate`
=============================================  ======================================================================

Throughout, the *gap* is :math:`f_0 - f_*`; the *smoothness* is :math:`\|L\|_1`, the sum over coordinates of constants
with :math:`|f(y) - f(x) - g(x)^T (y - x)| \le \frac12 \sum_i L_i (y_i - x_i)^2`; the *noise* is :math:`\|\sigma\|_1`, the
sum of the standard deviations of one sample's gradient; and the *signal-to-noise ratio* of a coordinate is :math:`S =
|g_i| / \sigma_i`. Gradients are unbiased and steps independent given the parameters. Each bound says what else it
assumes. `tests/test_theory.py` measures how tight it is.

Arguments may be numbers, arrays or traced; sizes such as the number of workers are Python integers. Results are accurate
to a few rounding errors in float32, at every magnitude.

.. _signSGD: https://arxiv.org/abs/1802.04434
.. _fault tolerance: https://arxiv.org/abs/1810.05291
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import jax.scipy.special
from jaxtyping import ArrayLike
import numpy as np

from signopt import _check
from signopt import _float

# Above it the noise of a unimodal, symmetric gradient hardly ever hides its sign: Gauss's bound changes its form here.
CRITICAL_SIGNAL_TO_NOISE = 2 / math.sqrt(3)

Number = float | jax.Array

_DEPTH = 40  # integrands are cut where they are e^-40 of their largest value
_NODES, _WEIGHTS = (x / 2 for x in np.polynomial.legendre.leggauss(32))  # on [-1/2, 1/2]


# ---- the sign of one worker ------------------------------------------------------------------------------------------


def sign_error_markov(signal_to_noise: ArrayLike) -> jax.Array:
    r"""Bound the probability of a wrong sign for any noise of finite variance: :math:`q \le 1 / S`.

    Loose: at :math:`S = 2` it allows 0.5 where `sign_error_cantelli`, under the same assumption, allows 0.2.

    References:
      The proof of Theorem 1 of `signSGD`_.
    """
    return 1 / jnp.maximum(1, _float.widen(signal_to_noise))


def sign_error_cantelli(signal_to_noise: ArrayLike) -> jax.Array:
    r"""Bound the probability of a wrong sign for any noise of finite variance: :math:`q \le 1 / (1 + S^2)`.

    Noise of two values attains it, one of them just past zero, so no better bound exists without another assumption. It is
    below one half only for :math:`S > 1`; there more workers help.

    References:
      The proof of Theorem 2(a) of `signSGD`_.
    """
    s = _float.widen(signal_to_noise)
    inverse = 1 / jnp.maximum(1, s)  # of the larger of 1 and S, so that squares do not overflow
    return inverse**2 / (inverse**2 + jnp.minimum(1, s) ** 2)


def sign_error_gauss(signal_to_noise: ArrayLike) -> jax.Array:
    r"""Bound the probability of a wrong sign for unimodal, symmetric noise.

    .. math::
      q \le \begin{cases} \frac{2}{9 S^2} & S > \frac{2}{\sqrt 3} \\ \frac12 - \frac{S}{2 \sqrt 3} & \text{else}
      \end{cases}

    Uniform noise attains it up to :math:`2 / \sqrt 3`. Always below one half, so that more workers always help.

    Examples:
      >>> from signopt import theory
      >>> theory.sign_error_gauss(1 / 3).item(), theory.sign_error_gauss(2.0).item()  # 1/2 - 1/(6 sqrt 3), 1/18
      (0.40377..., 0.05555...)

    References:
      The proof of Theorem 2(b) of `signSGD`_.
    """
    s = _float.widen(signal_to_noise)
    far = (1 / jnp.maximum(s, CRITICAL_SIGNAL_TO_NOISE)) ** 2 * (2 / 9)
    return jnp.where(s > CRITICAL_SIGNAL_TO_NOISE, far, 0.5 - s / (2 * math.sqrt(3)))


def sign_error_normal(signal_to_noise: ArrayLike) -> jax.Array:
    r"""The probability of a wrong sign under normal noise: :math:`q = \Phi(-S)`, exactly."""
    return jax.scipy.special.ndtr(-_float.widen(signal_to_noise))


# ---- the vote --------------------------------------------------------------------------------------------------------


def vote_error(sign_error: ArrayLike, num_workers: int) -> jax.Array:
    r"""The probability that a vote is not right: exactly the tail of a binomial distribution.

    .. math::
      P\Big[Z \le \frac M2\Big], \qquad Z \sim \operatorname{Bin}(M, 1 - q)

    A tie is not right, so two workers are worse than one by this count.

    Args:
      sign_error: q, in [0, 1], the same for each of the independent workers.
      num_workers: M.

    Examples:
      >>> from signopt import theory
      >>> [round(float(theory.vote_error(0.25, m)), 3) for m in (1, 3)]  # 1/4 and (1 + 9) / 64
      [0.25, 0.156]

    References:
      Equation (§) of Theorem 2(b) of `signSGD`_.
    """
    _check.count(num_workers, "vote_error", "num_workers")
    q = _float.widen(sign_error)
    smaller = jnp.where(q <= 0.5, q, 1 - q)
    k = (num_workers - 1) // 2
    wrong = _most_are_wrong(smaller, k)
    wrong = jnp.where(q <= 0.5, wrong, 1 - wrong)
    if num_workers % 2:
        return wrong
    return wrong + _central(k + 1) / 2 * _room_to_the(smaller, k + 1)  # half of the ties of all: see `_most_are_wrong`


# ---- rates with growing batches --------------------------------------------------------------------------------------


def signsgd_rate(steps: Number, *, gap: Number, smoothness: Number, noise: Number) -> Number:
    r"""Bound :math:`E[\min_k \|g_k\|_1]` for signSGD, one worker or a vote of several.

    .. math::
      E\Big[\min_{k < K} \|g_k\|_1\Big] \le \frac{1}{\sqrt K} \Big[\sqrt{\|L\|_1} \Big(f_0 - f_* + \frac12\Big)
      + 2 \|\sigma\|_1 \Big]

    at a learning rate of :math:`1 / \sqrt{\|L\|_1 K}` and K samples per worker in each of K steps, so
    :math:`N = K^2` samples in all; the paper writes the square of both sides, with :math:`\sqrt N = K`.

    Args:
      steps: K.
      gap: :math:`f_0 - f_*`.
      smoothness: :math:`\|L\|_1`.
      noise: :math:`\|\sigma\|_1` of one sample.

    References:
      Theorems 1 and 2(a) of `signSGD`_.
    """
    return (_root(smoothness) * (gap + 0.5) + 2 * noise) / _root(steps)


def majority_vote_rate(steps: Number, *, gap: Number, smoothness: Number, noise: Number, num_workers: int) -> Number:
    r"""Bound :math:`E[\min_k \|g_k\|_1]` for a vote of M workers with unimodal, symmetric noise.

    `signsgd_rate` with :math:`\|\sigma\|_1 / \sqrt M` for :math:`\|\sigma\|_1`: what averaging would do.

    References:
      Theorem 2(b) of `signSGD`_.
    """
    return signsgd_rate(steps, gap=gap, smoothness=smoothness, noise=noise / _root(num_workers))


def adversarial_vote_rate(
    steps: Number, *, gap: Number, smoothness: Number, noise: Number, num_workers: int, adversaries: Number
) -> Number:
    r"""Bound the mean of :math:`E\|g_k\|_1` over K steps when a fraction of the workers sends inverted signs.

    .. math::
      \frac1K \sum_k E\|g_k\|_1 \le \frac{2}{\sqrt K} \Big[\frac{\|\sigma\|_1}{(1 - 2 \alpha) \sqrt M}
      + \sqrt{\|L\|_1 (f_0 - f_*)}\Big]

    at a learning rate of :math:`\sqrt{(f_0 - f_*) / (\|L\|_1 K)}` and K samples per worker and step, for unimodal,
    symmetric noise. The paper writes the square of both sides, with :math:`\sqrt N = K`.

    Args:
      steps: K.
      gap: :math:`f_0 - f_*`.
      smoothness: :math:`\|L\|_1`.
      noise: :math:`\|\sigma\|_1` of one sample.
      num_workers: M, bad ones included.
      adversaries: :math:`\alpha` in [0, 1/2).

    Raises:
      ValueError: If half of the workers or more are bad.

    References:
      Theorem 2 of the follow-up on `fault tolerance`_.
    """
    _check.minority(adversaries, "adversarial_vote_rate", "adversaries")
    seen = noise / ((1 - 2 * adversaries) * _root(num_workers))
    return 2 / _root(steps) * (seen + _root(smoothness) * _root(gap))


# ---- rates with small batches ----------------------------------------------------------------------------------------


def mixed_norm(gradient: ArrayLike, deviation: ArrayLike) -> jax.Array:
    r"""What small batches make small: the l1 norm above the critical line, a weighted l2 norm below.

    .. math::
      \sum_{S_i > 2/\sqrt 3} |g_i| + \sum_{S_i \le 2/\sqrt 3} \frac{g_i^2}{\sigma_i}

    Args:
      gradient: g, along the last axis.
      deviation: :math:`\sigma \ge 0`, of a shape that broadcasts against it.

    References:
      Theorem 1 of the follow-up on `fault tolerance`_.
    """
    dtype = _dtype(gradient, deviation)
    size, sigma = _broadcast(jnp.abs(jnp.asarray(gradient, dtype)), jnp.asarray(deviation, dtype))
    above = size > CRITICAL_SIGNAL_TO_NOISE * sigma
    below = size * (size / jnp.where(above | (sigma == 0), 1, sigma))
    return jnp.sum(jnp.where(above, size, below), axis=-1)


def small_batch_rate(steps: Number, *, gap: Number, smoothness: Number) -> Number:
    r"""Bound the mean of the `mixed_norm` of the gradient over K steps of signSGD with one sample each.

    .. math::
      \frac1K \sum_{k < K} E\Big[\sum_{S_i > 2/\sqrt 3} |g_{k,i}| + \sum_{S_i \le 2/\sqrt 3} \frac{g_{k,i}^2}{\sigma_i}
      \Big] \le 3 \sqrt{\frac{\|L\|_1 (f_0 - f_*)}{K}}

    at a learning rate of :math:`\sqrt{(f_0 - f_*) / (\|L\|_1 K)}`, for unimodal, symmetric noise. The tightest of these
    rates, and the one to plot.

    References:
      Theorem 1 of the follow-up on `fault tolerance`_.
    """
    return 3 * _root(smoothness) * _root(gap) / _root(steps)


# ---- Signum ----------------------------------------------------------------------------------------------------------


def warmup_steps(beta: float) -> int:
    r"""The steps for which Theorem 3 steps with the sign of the gradient while the momentum warms up.

    .. math::
      C(\beta) = \min\Big\{C \ge 1 : \frac{C}{2} \beta^C \le \frac{1}{(1 - \beta^2)(C + 1)} \text{ and }
      \beta^{C+1} \le \frac12 \Big\}

    Args:
      beta: Decay rate of the momentum, in [0, 1).

    Returns:
      C, for `signopt.scale_by_signum(beta, warmup_steps=C)`.

    Raises:
      ValueError: If `beta` is outside [0, 1).

    Examples:
      >>> from signopt import theory
      >>> theory.warmup_steps(0.9), theory.warmup_steps(0.99)
      (54, 894)

    References:
      Theorem 3 of Bernstein et al., `signSGD <https://arxiv.org/abs/1802.04434>`_, 2018, where C(0.9) = 54.
    """
    _check.decay(beta, "warmup_steps", "beta")
    if beta == 0:
        return 1

    def is_enough(c):
        return c / 2 * beta**c <= 1 / ((1 - beta) * (1 + beta) * (c + 1)) and beta ** (c + 1) <= 0.5

    # The first condition holds for a few c, then fails up to the peak of c^2 beta^c near -2 / log(beta) and beyond, then
    # holds for good; the second holds from one c on.
    half = max(1, math.floor(math.log(0.5) / math.log(beta)) - 2)
    for c in range(half, half + 4):
        if is_enough(c):
            return c
    low = max(half + 3, math.floor(-2 / math.log(beta)))
    high = 2 * low
    while not is_enough(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    return high


# ---- adaptive MH-signSGD ---------------------------------------------------------------------------------------------


def vote_advantage(num_workers: int, *, deviation: Number, largest_gradient: Number) -> Number:
    r"""The constant c of MH-signSGD's theorems for normal noise: :math:`1 - 2 P_i \ge c |g_i|` for the vote's errors.

    .. math::
      c = \frac{1 - 2 P(G)}{G}, \qquad P(G) = P\Big[\operatorname{Bin}(M, \Phi(-G/\sigma)) \ge \frac M2 \Big],

    which holds for all :math:`|g_i| \le G`, since :math:`1 - 2P` is concave in :math:`|g_i|`. As G falls it rises to
    :math:`\frac{2}{\sigma \sqrt{2 \pi}} M \binom{M-1}{(M-1)/2} 2^{1-M} \approx \frac{2 \sqrt M}{\pi \sigma}`.

    Args:
      num_workers: M, odd, so that no vote is tied.
      deviation: :math:`\sigma`, the largest standard deviation of a coordinate of a worker's gradient.
      largest_gradient: G, the largest magnitude of a coordinate of the true gradient on the path.

    Raises:
      ValueError: If `num_workers` is even.

    References:
      Theorem 1 of Yang et al., Adaptive Multi-Hierarchical signSGD, 2020, writes :math:`c = b_1 \sqrt M + b_2` for
      constants it does not give. This one is exact, and grows as :math:`\sqrt M` as long as :math:`\sqrt M G \ll \sigma`.
    """
    caller = "vote_advantage"
    _check.count(num_workers, caller, "num_workers")
    if num_workers % 2 == 0:
        raise ValueError(f"`{caller}(num_workers=...)` has to be odd, got {num_workers}.")
    _check.positive(deviation, caller, "deviation")
    _check.at_least(0, largest_gradient, caller, "largest_gradient")
    k = (num_workers - 1) // 2
    if isinstance(largest_gradient, int | float) and isinstance(deviation, int | float):
        return float(_advantage(_float.widen(largest_gradient / deviation), k)) / deviation
    dtype = _dtype(largest_gradient, deviation)
    noise = jnp.asarray(deviation, dtype)
    return _advantage(jnp.asarray(largest_gradient, dtype) / noise, k) / noise


def mh_signsgd_rate(steps: Number, *, gap: Number, smoothness: Number, advantage: Number) -> Number:
    r"""Bound :math:`\min_k E\|g_k\|_2^2` for a vote with learning rate :math:`1 / \sqrt K` and batches of any size.

    .. math::
      \frac{1}{c \sqrt K} \Big(f_0 - f_* + \frac{\|L\|_1}{2}\Big)

    The squared norm falls as :math:`1 / \sqrt K` and, with c, as :math:`1 / \sqrt M`.

    Args:
      steps: K.
      gap: :math:`f_0 - f_*`.
      smoothness: :math:`\|L\|_1`.
      advantage: c, such that :math:`1 - 2 P_i \ge c |g_i|` on the path: see `vote_advantage`.

    References:
      Theorem 1 of Yang et al., Adaptive Multi-Hierarchical signSGD, 2020; Corollary 2 is the same with the samples of a
      batch for workers. It writes L for the smoothness, which in :math:`\frac{L}{2} \|\operatorname{sign}\|^2` has to be
      the sum over coordinates: :math:`\|L\|_1`, or d times a constant for all of them.
    """
    return (gap + smoothness / 2) / (advantage * _root(steps))


def greedy_learning_rate(gradient: ArrayLike, sign_error: ArrayLike, *, smoothness: ArrayLike) -> jax.Array:
    r"""The learning rate that promises most for the next step.

    .. math::
      \eta^* = \frac{1}{\|L\|_1} \sum_i |g_i| (1 - 2 P[\operatorname{sign}(\tilde g_i) \ne \operatorname{sign}(g_i)])

    Any rate in :math:`(0, 2 \eta^*)` makes progress in expectation. `signopt.adaptive_majority_vote` estimates it.

    Args:
      gradient: g, along the last axis.
      sign_error: For each entry the probability of stepping with the wrong sign.
      smoothness: :math:`\|L\|_1`.

    References:
      Proposition 3 and equation (1) of Yang et al., Adaptive Multi-Hierarchical signSGD, 2020.
    """
    dtype = _dtype(gradient, sign_error, smoothness)
    size, wrong = _broadcast(jnp.abs(jnp.asarray(gradient, dtype)), jnp.asarray(sign_error, dtype))
    return jnp.sum(size * (1 - 2 * wrong), axis=-1) / jnp.asarray(smoothness, dtype)


# ---- how the vote's probabilities are computed -----------------------------------------------------------------------
#
# With M = 2k + 1 workers and a = 1 - 2q, the probability P of a wrong vote is known through an integral,
#
#   1 - 2P = c int_0^a (1 - u^2)^k du,    P = c/2 int_a^1 (1 - u^2)^k du,    c = (2k + 1) C(2k, k) / 4^k.
#
# All terms of the sums below are positive, so nothing cancels: the first form is accurate where votes are nearly guesses,
# the second where they are nearly sure. The integrand falls from its largest value at the lower end; what lies below
# e^-40 of that is left out, and 32 Gaussian nodes are exact to the last bit on the rest. With one worker more, an even
# number, a tie is wrong too: P grows by half of its probability, C(2k+2, k+1) (q (1 - q))^(k+1) / 2.


def _integral_mean(exponent, fall):
    """The mean of (1 - fall(s))^exponent over s in [0, 1]; `fall` gets the nodes along a new last axis."""
    integrand = jnp.exp(exponent * jnp.log1p(-fall(lambda x: x[..., None] * _spread(_NODES + 0.5, x))))
    return jnp.sum(integrand * _spread(_WEIGHTS, integrand[..., 0]), axis=-1)


def _spread(numbers, like):
    """Numbers along a new last axis of an array."""
    return jnp.broadcast_to(jnp.asarray(numbers, like.dtype), (*like.shape, len(numbers)))


def _most_are_wrong(q, k):
    """P[Bin(2k + 1, q) > k] for q in [0, 1/2]."""
    if k == 0:
        return q
    none = q < jnp.finfo(q.dtype).tiny
    q = jnp.where(none, 0.25, q)
    lead, room = 1 - 2 * q, 4 * q * (1 - q)
    width = 2 * q
    if k > _DEPTH:
        deep = _DEPTH / k * room
        width = jnp.minimum(width, deep / (lead + jnp.sqrt(lead**2 + deep)))

    def fall(at):
        u = at(width)
        return u * (2 * lead[..., None] + u) / room[..., None]

    found = (2 * k + 1) * _central(k) / 2 * width * _room_to_the(q, k) * _integral_mean(k, fall)
    return jnp.where(none, 0, found)


def _advantage(ratio, k):
    """(1 - 2P) / S for M = 2k + 1 workers at a signal-to-noise ratio S under normal noise; at 0 its limit."""
    tiny = ratio < 1e-3
    series = math.sqrt(2 / math.pi) * (1 - jnp.minimum(ratio, 1) ** 2 / 6)
    by_ratio = jnp.where(tiny, series, jax.scipy.special.erf(ratio / math.sqrt(2)) / jnp.where(tiny, 1, ratio))
    lead = jax.scipy.special.erf(ratio / math.sqrt(2))  # 1 - 2q, without a cancellation
    share = jnp.ones_like(lead)
    if k > _DEPTH:
        deep = math.sqrt(_DEPTH / k)
        share = deep / jnp.maximum(lead, deep)
    return (2 * k + 1) * _central(k) * by_ratio * share * _integral_mean(k, lambda at: at(lead * share) ** 2)


def _room_to_the(q, power):
    """(4 q (1 - q))^power, also where the base is within rounding of 1."""
    none = q < jnp.finfo(q.dtype).tiny
    q = jnp.where(none, 0.25, q)
    log = jnp.where(q < 0.25, jnp.log(4 * q) + jnp.log1p(-q), jnp.log1p(-((1 - 2 * q) ** 2)))
    return jnp.where(none, 0, jnp.exp(power * log))


def _central(n):
    """C(2n, n) / 4^n."""
    if n <= 500:
        return math.comb(2 * n, n) / 4**n
    series = 1 - 1 / (8 * n) + 1 / (128 * n**2) + 5 / (1024 * n**3) - 21 / (32768 * n**4)
    return series / math.sqrt(math.pi * n)


def _root(x: Any) -> Any:
    """The square root of a number as a number, of an array as an array."""
    return math.sqrt(x) if isinstance(x, int | float) else jnp.sqrt(_float.widen(x))


def _dtype(*xs):
    """The widest dtype of the arrays among `xs`, or float32; numbers take part in arithmetic of any width."""
    return _float.wide_dtype(*(x for x in xs if not isinstance(x, int | float)))


def _broadcast(*arrays):
    shape = jnp.broadcast_shapes(*(x.shape for x in arrays))
    return [jnp.broadcast_to(x, shape) for x in arrays]
