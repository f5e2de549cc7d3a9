r"""The papers' bounds, as functions.

=============================================  ======================================================================
Bernstein et al. 2018, `signSGD`_
=============================================  ======================================================================
section 3, Theorem 1                           `sign_error_markov`, `signsgd_rate`, `signsgd_rate_l2`, `sgd_rate`
section 4, Theorem 2                           `sign_error_cantelli`, `sign_error_gauss`, `vote_error`,
                                               `vote_error_bound`, `majority_vote_rate`
section 5, Theorem 3                           `warmup_steps`, `signum_rate`
Lemmas 1, 3, 4, 5                              `approximate_sign_rate`, `weighted_noise`, `momentum_error`,
                                               `gradient_change`
Table 1                                        `bits_per_iteration`
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
Proposition 3                                  `greedy_learning_rate`, `decrease`
Theorem 4                                      `greedy_rate`
=============================================  ======================================================================

Throughout, the *gap* is :math:`f_0 - f_*`; the *smoothness* is :math:`\|L\|_1`, the sum over coordinates of constants
with :math:`|f(y) - f(x) - g(x)^T (y - x)| \le \frac12 \sum_i L_i (y_i - x_i)^2`; the *noise* is :math:`\|\sigma\|_1`, the
sum of the standard deviations of one sample's gradient; and the *signal-to-noise ratio* of a coordinate is :math:`S =
|g_i| / \sigma_i`. Gradients are unbiased and steps independent given the parameters. What a bound assumes beyond that it
says; how tight it is, `tests/test_theory.py` measures.

.. _signSGD: https://arxiv.org/abs/1802.04434
.. _fault tolerance: https://arxiv.org/abs/1810.05291
"""

from collections.abc import Iterable
import itertools
import math

import jax
import jax.numpy as jnp
import jax.scipy.special
from jaxtyping import ArrayLike

# Above it the noise of a unimodal, symmetric gradient hardly ever hides its sign: Gauss's bound changes its form here.
CRITICAL_SIGNAL_TO_NOISE = 2 / math.sqrt(3)


# ---- the sign of one worker ------------------------------------------------------------------------------------------


def sign_error_markov(signal_to_noise: ArrayLike) -> jax.Array:
    r"""Bound the probability of a wrong sign for any noise of finite variance: :math:`q \le 1 / S`.

    Loose: at :math:`S = 2` it allows 0.5 where `sign_error_cantelli`, under the same assumption, allows 0.2.

    References:
      The proof of Theorem 1 of `signSGD`_.
    """
    return jnp.minimum(1.0, 1 / jnp.asarray(signal_to_noise))


def sign_error_cantelli(signal_to_noise: ArrayLike) -> jax.Array:
    r"""Bound the probability of a wrong sign for any noise of finite variance: :math:`q \le 1 / (1 + S^2)`.

    Attained by noise of two values, one of them just past zero: no better bound exists without another assumption. It
    is below one half, so that more workers help, only for :math:`S > 1`.

    References:
      The proof of Theorem 2(a) of `signSGD`_.
    """
    return 1 / (1 + jnp.asarray(signal_to_noise) ** 2)


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
    s = jnp.asarray(signal_to_noise)
    far = 2 / (9 * jnp.maximum(s, CRITICAL_SIGNAL_TO_NOISE) ** 2)
    return jnp.where(s > CRITICAL_SIGNAL_TO_NOISE, far, 0.5 - s / (2 * math.sqrt(3)))


def sign_error_normal(signal_to_noise: ArrayLike) -> jax.Array:
    r"""The probability of a wrong sign under normal noise: :math:`q = \Phi(-S)`, exactly."""
    return jax.scipy.special.ndtr(-jnp.asarray(signal_to_noise))


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
    if num_workers < 1:
        raise ValueError(f"`vote_error(num_workers=...)` has to be at least 1, got {num_workers}.")
    most = num_workers // 2
    return jax.scipy.special.betainc(num_workers - most, most + 1.0, jnp.asarray(sign_error))


def vote_error_bound(signal_to_noise: ArrayLike, num_workers: int) -> jax.Array:
    r"""Bound the probability that a vote is not right, for unimodal, symmetric noise: :math:`1 / (\sqrt M S)`.

    References:
      Equation (§) of Theorem 2(b) of `signSGD`_.
    """
    return jnp.minimum(1.0, 1 / (math.sqrt(num_workers) * jnp.asarray(signal_to_noise)))


# ---- rates with growing batches --------------------------------------------------------------------------------------


def signsgd_rate(steps: int, *, gap: float, smoothness: float, noise: float) -> float:
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
    return (math.sqrt(smoothness) * (gap + 0.5) + 2 * noise) / math.sqrt(steps)


def majority_vote_rate(steps: int, *, gap: float, smoothness: float, noise: float, num_workers: int) -> float:
    r"""Bound :math:`E[\min_k \|g_k\|_1]` for a vote of M workers with unimodal, symmetric noise.

    `signsgd_rate` with :math:`\|\sigma\|_1 / \sqrt M` for :math:`\|\sigma\|_1`: what averaging would do.

    References:
      Theorem 2(b) of `signSGD`_.
    """
    return signsgd_rate(steps, gap=gap, smoothness=smoothness, noise=noise / math.sqrt(num_workers))


def signsgd_rate_l2(
    calls: float, *, gap: float, smoothness: float, variance: float, curvature_ratio: float, noise_ratio: float
) -> float:
    r"""Bound :math:`E[\min_k \|g_k\|_2]^2` for signSGD in the quantities of SGD, to compare with `sgd_rate`.

    .. math::
      \frac{2}{\sqrt N} \Big[R_1 L \Big(f_0 - f_* + \frac12\Big)^2 + 4 R_2 \sigma^2\Big]

    Args:
      calls: N, the samples seen in all.
      gap: :math:`f_0 - f_*`.
      smoothness: :math:`L = \|L\|_\infty`, not the sum.
      variance: :math:`\sigma^2 = \|\sigma\|_2^2`.
      curvature_ratio: :math:`R_1 = \sqrt{\phi(L)} / \phi(g)`, with the smallest density of the gradient on the path.
      noise_ratio: :math:`R_2 = \phi(\sigma) / \phi(g)`.

    References:
      Section 3 of `signSGD`_, which prints :math:`2 R_2 \sigma^2`: squaring :math:`2 \|\sigma\|_1` gives 4.
    """
    return 2 / math.sqrt(calls) * (curvature_ratio * smoothness * (gap + 0.5) ** 2 + 4 * noise_ratio * variance)


def sgd_rate(calls: float, *, gap: float, smoothness: float, variance: float) -> float:
    r"""Bound :math:`E[\min_k \|g_k\|_2^2]` for SGD: :math:`[L (f_0 - f_*) + \sigma^2] / \sqrt N`.

    The order of the usual bound; with a learning rate of :math:`1 / (L \sqrt N)` and one sample a step it holds with twice
    the first term.

    References:
      Section 3 of `signSGD`_, for comparison.
    """
    return (smoothness * gap + variance) / math.sqrt(calls)


def adversarial_vote_rate(
    steps: int, *, gap: float, smoothness: float, noise: float, num_workers: int, adversaries: float
) -> float:
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
    if not 0 <= adversaries < 0.5:
        raise ValueError(f"`adversarial_vote_rate(adversaries=...)` has to be in [0, 1/2), got {adversaries}.")
    seen = noise / ((1 - 2 * adversaries) * math.sqrt(num_workers))
    return 2 / math.sqrt(steps) * (seen + math.sqrt(smoothness * gap))


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
    size, sigma = jnp.abs(gradient), jnp.asarray(deviation)
    above = size > CRITICAL_SIGNAL_TO_NOISE * sigma
    return jnp.sum(jnp.where(above, size, size**2 / jnp.where(above, 1, sigma)), axis=-1, where=size > 0)


def small_batch_rate(steps: int, *, gap: float, smoothness: float) -> float:
    r"""Bound the mean of the `mixed_norm` of the gradient over K steps of signSGD with one sample each.

    .. math::
      \frac1K \sum_{k < K} E\Big[\sum_{S_i > 2/\sqrt 3} |g_{k,i}| + \sum_{S_i \le 2/\sqrt 3} \frac{g_{k,i}^2}{\sigma_i}
      \Big] \le 3 \sqrt{\frac{\|L\|_1 (f_0 - f_*)}{K}}

    at a learning rate of :math:`\sqrt{(f_0 - f_*) / (\|L\|_1 K)}`, for unimodal, symmetric noise. The tightest of these
    rates, and the one to plot.

    References:
      Theorem 1 of the follow-up on `fault tolerance`_.
    """
    return 3 * math.sqrt(smoothness * gap / steps)


# ---- approximate signs, and Signum -----------------------------------------------------------------------------------


def approximate_sign_rate(
    learning_rates: Iterable[float], sign_errors: Iterable[float], *, gap: float, smoothness: float
) -> float:
    r"""Bound :math:`\min_k E\|g_k\|_1` for steps along the signs of anything that resembles the gradient.

    .. math::
      \frac{f_C - f_* + 2 \sum_k \delta_k \xi_k + \frac12 \sum_k \delta_k^2 \|L\|_1}{(K - C) \min_k \delta_k}

    Args:
      learning_rates: :math:`\delta_k`, one for each of the K - C steps.
      sign_errors: :math:`\xi_k`, bounds on :math:`E \sum_i |g_{k,i}| P[\operatorname{sign}(v_{k,i}) \ne
        \operatorname{sign}(g_{k,i})]`. By Lemma 2 :math:`E\|v_k - g_k\|_1` is one.
      gap: :math:`f_C - f_*`.
      smoothness: :math:`\|L\|_1`.

    References:
      Lemmas 1 and 2 of `signSGD`_. The bound is on the mean over steps, weighted with the learning rates, too.
    """
    pairs = [(float(delta), float(xi)) for delta, xi in zip(learning_rates, sign_errors, strict=True)]
    total = gap + sum(2 * delta * xi + delta**2 * smoothness / 2 for delta, xi in pairs)
    return total / (len(pairs) * min(delta for delta, _ in pairs))


def weighted_noise(weights: ArrayLike, deviation: ArrayLike) -> jax.Array:
    r"""Bound the standard deviation of a weighted sum of gradient noise: :math:`\sqrt{\sum_l \alpha_l^2}\, \sigma`.

    Noise at parameters that depend on earlier noise is no independent noise, but it is uncorrelated. With equality if
    every step's noise has that very deviation.

    References:
      Lemma 3 of `signSGD`_, its square root.
    """
    return jnp.sqrt(jnp.sum(jnp.asarray(weights) ** 2)) * jnp.asarray(deviation)


def gradient_change(distance: float, *, smoothness: float) -> float:
    r"""Bound the change of the gradient in a step along signs: :math:`\|g(x + \epsilon s) - g(x)\|_1 \le 2 \epsilon \|L\|_1`.

    The factor of 2 is slack: :math:`D^{-1/2} H D^{-1/2}` with D = diag(L) has no eigenvalue beyond 1 in magnitude, so half
    of the bound holds always, and a diagonal Hessian attains it.

    Args:
      distance: :math:`\epsilon \ge 0`, how far each parameter moves.
      smoothness: :math:`\|L\|_1`.

    References:
      Lemma 5 of `signSGD`_.
    """
    return 2 * distance * smoothness


def momentum_error(step: int, beta: float, *, learning_rate: float, smoothness: float, noise: float) -> float:
    r"""Bound how far Signum's momentum is from the gradient: :math:`E\|\hat m_k - g_k\|_1`.

    .. math::
      \xi_k = \frac{2}{\sqrt{k + 1}} \Big(4 \|L\|_1 \delta \frac{\beta}{1 - \beta}
      + \sqrt 3 \|\sigma\|_1 \sqrt{1 - \beta}\Big), \qquad k \ge C(\beta),

    for learning rates :math:`\delta / \sqrt{k + 1}`, batches of k + 1 samples and a momentum with bias correction.

    Args:
      step: k, counted from 0; no smaller than `warmup_steps(beta)`.
      beta: :math:`\beta`, the decay rate of the momentum.
      learning_rate: :math:`\delta`.
      smoothness: :math:`\|L\|_1`.
      noise: :math:`\|\sigma\|_1` of one sample.

    Raises:
      ValueError: If the momentum has not warmed up at `step`.

    References:
      Lemma 4 of `signSGD`_. It prints :math:`\|E[\hat m_k - g_k]\|_1`, but proves and uses the expectation of the norm.
    """
    if step < warmup_steps(beta):
        raise ValueError(
            f"`momentum_error(step, beta)` has to be given a step from warmup_steps(beta) = {warmup_steps(beta)} on, got "
            f"{step}."
        )
    bias = 4 * smoothness * learning_rate * beta / (1 - beta)
    return 2 / math.sqrt(step + 1) * (bias + math.sqrt(3) * noise * math.sqrt(1 - beta))


def signum_rate(steps: int, beta: float, *, gap: float, learning_rate: float, smoothness: float, noise: float) -> float:
    r"""Bound :math:`\min_{C \le k < K} E\|g_k\|_1` for Signum after its warm-up.

    `approximate_sign_rate` with `momentum_error` for its error: Theorem 3 with every constant, where the paper has an
    order, :math:`\frac{1}{\sqrt K}[\frac{f_C - f_*}{\delta} + (1 + \log K) (\frac{\delta \|L\|_1}{1 - \beta} + \|\sigma\|_1
    \sqrt{1 - \beta})]`.

    Args:
      steps: K, those of the warm-up included.
      beta: :math:`\beta`, the decay rate of the momentum.
      gap: :math:`f_C - f_*`, after the warm-up.
      learning_rate: :math:`\delta`; step k moves by :math:`\delta / \sqrt{k + 1}`, on k + 1 samples.
      smoothness: :math:`\|L\|_1`.
      noise: :math:`\|\sigma\|_1` of one sample.

    Raises:
      ValueError: If `steps` does not exceed the warm-up.

    References:
      Theorem 3 of `signSGD`_.
    """
    warmup = warmup_steps(beta)
    if steps <= warmup:
        raise ValueError(f"`signum_rate(steps, beta)` has to exceed warmup_steps(beta) = {warmup}, got {steps} steps.")
    after = range(warmup, steps)
    at_one = momentum_error(warmup, beta, learning_rate=learning_rate, smoothness=smoothness, noise=noise)
    errors = [at_one * math.sqrt((warmup + 1) / (k + 1)) for k in after]
    rates = [learning_rate / math.sqrt(k + 1) for k in after]
    return approximate_sign_rate(rates, errors, gap=gap, smoothness=smoothness)


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
    if not 0 <= beta < 1:
        raise ValueError(f"`warmup_steps(beta)` has to be in [0, 1), got {beta}.")
    return next(
        c for c in itertools.count(1) if c / 2 * beta**c <= 1 / ((1 - beta**2) * (c + 1)) and beta ** (c + 1) <= 0.5
    )


# ---- adaptive MH-signSGD ---------------------------------------------------------------------------------------------


def vote_advantage(num_workers: int, *, deviation: float, largest_gradient: float) -> float:
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
    if num_workers < 1 or num_workers % 2 == 0:
        raise ValueError(f"`vote_advantage(num_workers)` has to be odd, got {num_workers}.")
    wrong = vote_error(sign_error_normal(largest_gradient / deviation), num_workers)
    return float((1 - 2 * wrong) / largest_gradient)


def mh_signsgd_rate(steps: int, *, gap: float, smoothness: float, advantage: float) -> float:
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
    return (gap + smoothness / 2) / (advantage * math.sqrt(steps))


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
    return jnp.sum(jnp.abs(gradient) * (1 - 2 * jnp.asarray(sign_error)), axis=-1) / smoothness


def decrease(
    learning_rate: ArrayLike, gradient: ArrayLike, sign_error: ArrayLike, *, smoothness: ArrayLike
) -> jax.Array:
    r"""Bound how much a step lowers the loss, from below: :math:`\|L\|_1 (\eta \eta^* - \eta^2 / 2)`.

    With equality on a quadratic whose Hessian is the diagonal L.

    Args:
      learning_rate: :math:`\eta`.
      gradient: g, along the last axis.
      sign_error: For each entry the probability of stepping with the wrong sign.
      smoothness: :math:`\|L\|_1`.

    References:
      Equation (2) of Yang et al., Adaptive Multi-Hierarchical signSGD, 2020.
    """
    greedy, rate = greedy_learning_rate(gradient, sign_error, smoothness=smoothness), jnp.asarray(learning_rate)
    return jnp.asarray(smoothness) * (rate * greedy - rate**2 / 2)


def greedy_rate(steps: int, *, gap: float, smoothness: float, advantage: float) -> float:
    r"""Bound :math:`\min_k \|g_k\|_2^2` for a vote with the `greedy_learning_rate`.

    .. math::
      \frac{1}{c \sqrt K} \sqrt{2 \|L\|_1 (f_0 - f_*)}

    Args:
      steps: K.
      gap: :math:`f_0 - f_*`.
      smoothness: :math:`\|L\|_1`.
      advantage: c, such that :math:`1 - 2 P_i \ge c |g_i|` on the path: see `vote_advantage`.

    References:
      Theorem 4 of Yang et al., Adaptive Multi-Hierarchical signSGD, 2020. What telescopes is the square root of
      :math:`\min_k E\|g_k\|_2^4`, which is no smaller than :math:`\min_k E\|g_k\|_2^2`.
    """
    return math.sqrt(2 * smoothness * gap / steps) / advantage


# ---- traffic ---------------------------------------------------------------------------------------------------------


def bits_per_iteration(num_parameters: int, num_workers: int) -> dict[str, float]:
    r"""The bits that one step moves between M workers and one server, both directions together.

    Examples:
      >>> from signopt import theory
      >>> {name: round(bits, 1) for name, bits in theory.bits_per_iteration(1, 15).items()}
      {'SGD': 960, 'QSGD': 104.3, 'TernGrad': 104.3, 'majority vote': 30}

    References:
      Table 1 of `signSGD`_; its logarithm is to base 2. What this library's sharded server moves is
      `signopt.wire.bytes_sent`.
    """
    pairs = num_parameters * num_workers
    ternary = (2 + math.log2(2 * num_workers + 1)) * pairs
    return {"SGD": 64 * pairs, "QSGD": ternary, "TernGrad": ternary, "majority vote": 2 * pairs}
