"""Ready optimizers: each body is one `optax.chain`, with a border in it where there are several workers."""

from typing import Any

import jax
import optax

from signopt import _axis
from signopt import _check
from signopt._links import left
from signopt._links import own
from signopt._links import right
from signopt._links import warning
from signopt.momentum import average_of
from signopt.momentum import count_notfinite
from signopt.momentum import keep_finite
from signopt.momentum import signs_of
from signopt.prox.penalty import Operator
from signopt.prox.penalty import Prox
from signopt.prox.penalty import as_prox
from signopt.prox.step import scale_by_prox_gradient
from signopt.step_size import Estimator
from signopt.step_size import Smoothness
from signopt.step_size import at_found_rate
from signopt.vote import Wire


def signsgd(
    learning_rate: optax.ScalarOrSchedule,
    *,
    axis_name: _axis.AxisName = None,
    num_workers: int | None = None,
    wire: Wire = "two_bit",
    delay: int = False,
    report: bool = False,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""signSGD, by majority vote if there are several workers.

    .. math::
      x_{t+1} = x_t - \alpha_t \Big(\operatorname{sign}\sum_m \operatorname{sign}(g_{m,t}) + \lambda x_t\Big)

    Args:
      learning_rate: :math:`\alpha`, a number or a schedule: how far each parameter moves in a step.
      axis_name: The workers, as in `majority_vote`. None is one worker, and then this is `optax.sign_sgd` with weight
        decay, where NaN and inf do not move a parameter.
      num_workers: Size of the axis. If given, each worker counts the steps in which its gradient was not finite.
      wire: What travels, as in `majority_vote`.
      delay: 1 to step by the vote of the step before, as in `majority_vote`.
      report: Whether the state keeps `VoteStatistics` of the last vote, as in `majority_vote`.
      weight_decay: :math:`\lambda`, decoupled: it acts after the vote.
      mask: Which leaves decay, as in `optax.add_decayed_weights`.

    Returns:
      An optimizer. `update` takes `present=` where it votes.

    Raises:
      ValueError: If `wire` is unknown, `num_workers` is given without an axis or is not its size.

    Examples:
      >>> import jax.numpy as jnp, signopt
      >>> tx = signopt.signsgd(0.5)
      >>> tx.update(jnp.array([3.0, -0.1, 0.0]), tx.init(jnp.zeros(3)))[0]
      Array([-0.5,  0.5, -0. ], dtype=float32)

    References:
      Algorithms 1 and 3 of Bernstein et al., `signSGD <https://arxiv.org/abs/1802.04434>`_, 2018.
    """
    nothing = optax.identity()
    counted = nothing if num_workers is None else left("signsgd", nothing, axis_name, num_workers)
    return optax.chain(
        *(() if axis_name is None else (counted,)),
        *right(
            "signsgd",
            learning_rate,
            axis_name,
            weight_decay,
            mask,
            wire=wire,
            delay=delay,
            report=report,
            num_workers=num_workers,
        ),
    )


def signum(
    learning_rate: optax.ScalarOrSchedule,
    beta: float | jax.Array = 0.9,
    accumulator_dtype: Any = None,
    *,
    nesterov: bool = False,
    axis_name: _axis.AxisName = None,
    num_workers: int | None = None,
    wire: Wire = "two_bit",
    delay: int = False,
    report: bool = False,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Signum: the sign of the momentum, by majority vote if there are several workers.

    .. math::
      m_{m,t+1} = \beta m_{m,t} + (1 - \beta) g_{m,t}, \qquad
      x_{t+1} = x_t - \alpha_t \Big(\operatorname{sign}\sum_m \operatorname{sign}(m_{m,t+1}) + \lambda x_t\Big)

    Args:
      learning_rate: :math:`\alpha`, a number or a schedule: how far each parameter moves in a step.
      beta: :math:`\beta` in [0, 1), the decay rate of the momentum.
      accumulator_dtype: Dtype of the momentum; that of the parameters if None.
      nesterov: Use the sign of :math:`\beta m_{m,t+1} + (1 - \beta) g_{m,t}`, as in `scale_by_signum`.
      axis_name: The workers, as in `majority_vote`. None is one worker, and then this is `optax.signum` with weight decay,
        and with momentum that NaN and inf do not reach.
      num_workers: Size of the axis. If given, the momentum is kept in a `PerWorkerState`, as `simulate`, `on_mesh`,
        checkpoints and `shard_map` want it; a `jax.pmap` over replicated state needs none.
      wire: What travels, as in `majority_vote`.
      delay: 1 to step by the vote of the step before, as in `majority_vote`.
      report: Whether the state keeps `VoteStatistics` of the last vote, as in `majority_vote`.
      weight_decay: :math:`\lambda`, decoupled: it acts after the vote.
      mask: Which leaves decay, as in `optax.add_decayed_weights`.

    Returns:
      An optimizer. `update` takes `present=` where it votes.

    Raises:
      ValueError: If `beta` is outside [0, 1), `wire` is unknown, `num_workers` is given without an axis or is not its size.

    Examples:
      >>> import jax.numpy as jnp, signopt
      >>> tx = signopt.signum(0.5)
      >>> state = tx.init(jnp.zeros(2))
      >>> _, state = tx.update(jnp.array([3.0, -1.0]), state)
      >>> tx.update(jnp.array([-1.0, 2.0]), state)[0]  # momentum (0.17, 0.11)
      Array([-0.5, -0.5], dtype=float32)

    References:
      Algorithms 2 and 3 of Bernstein et al., `signSGD <https://arxiv.org/abs/1802.04434>`_, 2018.
    """
    _check.decay(beta, "signum", "beta")
    momentum = average_of(beta, nesterov=nesterov, accumulator_dtype=accumulator_dtype)
    return optax.chain(
        left("signum", momentum if axis_name is None else signs_of(momentum), axis_name, num_workers),
        *right(
            "signum",
            learning_rate,
            axis_name,
            weight_decay,
            mask,
            wire=wire,
            delay=delay,
            report=report,
            num_workers=num_workers,
        ),
    )


def lion(
    learning_rate: optax.ScalarOrSchedule,
    b1: float | jax.Array = 0.9,
    b2: float | jax.Array = 0.99,
    mu_dtype: Any = None,
    weight_decay: optax.ScalarOrSchedule = 1e-3,
    mask: Any = None,
    *,
    axis_name: _axis.AxisName = None,
    num_workers: int | None = None,
    wire: Wire = "two_bit",
    delay: int = False,
    report: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Lion, as Distributed Lion by majority vote if there are several workers.

    .. math::
      c_{m,t} = \beta_1 m_{m,t} + (1 - \beta_1) g_{m,t}, \qquad m_{m,t+1} = \beta_2 m_{m,t} + (1 - \beta_2) g_{m,t},
      \qquad x_{t+1} = x_t - \alpha_t \Big(\operatorname{sign}\sum_m \operatorname{sign}(c_{m,t}) + \lambda x_t\Big)

    With weight decay it minimises the loss over :math:`\|x\|_\infty \le 1 / \lambda`.

    Args:
      learning_rate: :math:`\alpha`, a number or a schedule: how far each parameter moves in a step.
      b1: :math:`\beta_1`, how much momentum there is in a vote.
      b2: :math:`\beta_2`, the decay rate of the momentum.
      mu_dtype: Dtype of the momentum; that of the parameters if None.
      weight_decay: :math:`\lambda`, decoupled: it acts after the vote.
      mask: Which leaves decay, as in `optax.add_decayed_weights`.
      axis_name: The workers, as in `majority_vote`. None is one worker, and then this is `optax.lion`, with
        momentum that NaN and inf do not reach.
      num_workers: Size of the axis, as in `signum`.
      wire: What travels, as in `majority_vote`.
      delay: 1 to step by the vote of the step before, as in `majority_vote`.
      report: Whether the state keeps `VoteStatistics` of the last vote, as in `majority_vote`.

    Returns:
      An optimizer. `update` takes `present=` where it votes.

    Raises:
      ValueError: If `wire` is unknown, `num_workers` is given without an axis or is not its size.

    Examples:
      >>> import jax.numpy as jnp, signopt
      >>> tx = signopt.lion(0.5, weight_decay=0.1)
      >>> params = jnp.array([10.0, 0.0])
      >>> tx.update(jnp.array([3.0, -1.0]), tx.init(params), params)[0]
      Array([-1. ,  0.5], dtype=float32)

    References:
      Chen et al., `Symbolic Discovery of Optimization Algorithms <https://arxiv.org/abs/2302.06675>`_, 2023; Liu et
      al., `Communication Efficient Distributed Training with Distributed Lion <https://arxiv.org/abs/2404.00438>`_, 2024,
      Algorithm 1 with the majority vote.
    """
    for name, beta in (("b1", b1), ("b2", b2)):
        _check.share(beta, "lion", name)
    return optax.chain(
        left("lion", optax.scale_by_lion(b1, b2, mu_dtype), axis_name, num_workers),
        *right(
            "lion",
            learning_rate,
            axis_name,
            weight_decay,
            mask,
            wire=wire,
            delay=delay,
            report=report,
            num_workers=num_workers,
        ),
    )


def signprox(
    learning_rate: optax.ScalarOrSchedule,
    *,
    prox: Prox | Operator,
    step_size: optax.ScalarOrSchedule | None = None,
    beta: float | jax.Array | None = None,
    axis_name: _axis.AxisName = None,
    num_workers: int | None = None,
    wire: Wire = "two_bit",
    delay: int = False,
    report: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""SignProx: minimize loss plus penalty by signs, by majority vote if there are several workers.

    .. math::
      x_{t+1} = x_t - \delta_t \operatorname{sign} \sum_m \operatorname{sign}\big(
        x_t - \operatorname{prox}_{\tau r}(x_t - \tau g_{m,t})\big)

    The iterates hover within :math:`\delta_t` of the zeros of a penalty: let the learning rate decay and end with
    `signopt.prox.polish`, which makes the zeros exact.

    Args:
      learning_rate: :math:`\delta`, a number or a schedule: how far each parameter moves in a step.
      prox: The penalty :math:`r`, from `signopt.prox`. Under `optax.inject_hyperparams`, name it in `static_args`; to
        inject its strength, inject a function that makes both, as in the last example.
      step_size: :math:`\tau`, a number or a schedule. None means the learning rate where the penalty is a sum of convex
        functions of single entries, since :math:`\tau` then changes no sign. Elsewhere it means :math:`\tau_t = \sum_{s \le t} \delta_s /
        \sum_{s \le t} \operatorname{rms}(g_{m,s})`, with which plain steps :math:`\tau g` would have led as far as the
        sign steps have. It has the unit of a step size, so that neither scaling loss and penalty nor rescaling the
        parameters changes the run, as in signSGD; and it falls slower than the learning rate, as it has to: the mapping
        is (up to a matrix near one) the gradient of an envelope whose curvature is :math:`1 / \tau`, and steps much
        longer than :math:`\tau` times the slope stall on it. If the curvature L of the loss is known, 1 / L is better.
      beta: Decay rate of a momentum ahead of the mapping, with bias correction, since the penalty does not scale with
        it. None is no momentum, as published.
      axis_name: The workers, as in `majority_vote`. None is one worker and no communication.
      num_workers: Size of the axis. If given, what lies left of the vote is kept in a `PerWorkerState`.
      wire: What travels, as in `majority_vote`.
      delay: 1 to step by the vote of the step before, as in `majority_vote`.
      report: Whether the state keeps `VoteStatistics` of the last vote, as in `majority_vote`.

    Returns:
      An optimizer that needs `params` in `update`. `update` takes `present=` where it votes.

    Raises:
      ValueError: If `wire` is unknown, `num_workers` is given without an axis or is not its size, or `step_size` is not
        positive; in `update`, if `params` is missing.
      TypeError: If `prox` is no function.

    Examples:
      >>> import jax.numpy as jnp, optax, signopt
      >>> tx = signopt.signprox(0.25, prox=signopt.prox.l1(0.5))
      >>> params, grads = jnp.array([2.0, 0.0, 0.0]), jnp.array([0.25, 0.25, -1.0])
      >>> tx.update(grads, tx.init(params), params)[0].tolist()
      [-0.25, -0.0, 0.25]
      >>> make = lambda learning_rate, strength: signopt.signprox(learning_rate, prox=signopt.prox.l1(strength))
      >>> tx = optax.inject_hyperparams(make)(learning_rate=0.25, strength=optax.linear_schedule(0.0, 0.5, 100))
      >>> float(tx.init(params).hyperparams["strength"])
      0.0

    References:
      Xu and Kamilov, *SignProx: One-bit proximal algorithm for nonconvex stochastic optimization*, ICASSP 2019. The
      vote, the momentum and `step_size=None` are ours.
    """
    _check.learning_rate(learning_rate, "signprox")
    prox = as_prox(prox, "signprox")
    free = step_size is None and not prox.separable
    mapping = scale_by_prox_gradient(
        prox,
        None if free else learning_rate if step_size is None else step_size,
        reach=learning_rate if free else None,
        axis_name=axis_name,
    )
    if beta is not None:
        _check.decay(beta, "signprox", "beta")
        momentum = optax.ema(beta, debias=True)
        mapping = optax.chain((keep_finite if axis_name is None else count_notfinite)(momentum, "signprox"), mapping)
    return optax.chain(
        own("signprox", mapping, axis_name, num_workers),
        *right(
            "signprox",
            learning_rate,
            axis_name,
            None,
            None,
            wire=wire,
            delay=delay,
            report=report,
            num_workers=num_workers,
        ),
    )


def mh_signsgd(
    *,
    axis_name: _axis.AxisName,
    num_workers: int | None = None,
    beta: float | jax.Array = 0.95,
    smoothness: Smoothness = None,
    estimator: Estimator = "margin",
    wire: Wire = "two_bit",
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any = None,
    accumulator_dtype: Any = None,
    report: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Adaptive MH-signSGD: a vote over momenta that finds its own learning rate. There is none to tune.

    .. math::
      m_{m,t+1} = \beta m_{m,t} + (1 - \beta) g_{m,t}, \qquad
      x_{t+1} = x_t - \eta_t \Big(\operatorname{sign}\sum_m \operatorname{sign}(m_{m,t+1}) + \lambda x_t\Big)

    with :math:`\eta_t` as in `adaptive_majority_vote`, from the momenta after bias correction. It falls by itself as the
    gradient does. The defaults are measured (`python -m experiments adaptive`). Vote with mini-batches,
    not single examples, where gradients are skewed, as in classification.

    Args:
      axis_name: The workers, at least two unless the estimator is "exact".
      num_workers: Size of the axis, as in `signum`.
      beta: :math:`\beta` in [0, 1), the decay rate of the momentum; 0 votes with gradients, as the paper does. From 0.9 to
        0.98 it matters little: on the paper's toy with 8 voters the loss ends at 0.053, 0.048 and 0.046 for 0.9, 0.95 and
        0.98 (0.153 at a fixed rate, 0.158 with the paper's estimator), with standard errors of a tenth.
      smoothness: :math:`\|L\|_1`, as in `adaptive_majority_vote`.
      estimator: How the learning rate is found, as in `adaptive_majority_vote`.
      wire: What travels, as in `majority_vote`.
      weight_decay: :math:`\lambda`, decoupled: it acts after the vote, and shrinks with the learning rate.
      mask: Which leaves decay, as in `optax.add_decayed_weights`.
      accumulator_dtype: Dtype of the momentum; that of the parameters if None.
      report: Whether the state keeps `VoteStatistics` of the last vote, as in `majority_vote`.

    Returns:
      An optimizer. `update` takes `present=`, and with `smoothness=signopt.measured_smoothness(key)` needs `value_fn=`. The learning rate of the
      last step is `optax.tree.get(state, "learning_rate")`.

    Raises:
      ValueError: If `beta` is outside [0, 1), or as `adaptive_majority_vote` does.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, signopt
      >>> tx = signopt.mh_signsgd(axis_name="worker", num_workers=2)
      >>> def step(carry, noise):
      ...     params, state = carry
      ...     updates, state = tx.update(params + noise[0], state, params)
      ...     return (optax.apply_updates(params, updates), state), optax.tree.get(state, "learning_rate")
      >>> run = signopt.workers.simulate(step, 2, axis_name="worker")
      >>> params = jnp.array([3.0, -1.0])
      >>> (params, _), rates = run((params, tx.init(params)), jnp.zeros((2, 2)))
      >>> jnp.round(params, 4).tolist(), jnp.round(rates, 4).tolist()  # (3 + 1) / 2
      ([1.0, 1.0], [2.0, 2.0])

    References:
      Algorithm 1 of Yang et al., Adaptive Multi-Hierarchical signSGD, 2020, which has no momentum; its choice is
      `beta=0.0, estimator="exact", wire="psum"`.
    """
    _check.decay(beta, "mh_signsgd", "beta")
    _check.learning_rate(weight_decay, "mh_signsgd", "weight_decay")
    decay = None if _check.is_zero(weight_decay) else optax.add_decayed_weights(weight_decay, mask)
    vote_at_a_rate = at_found_rate("mh_signsgd", axis_name, smoothness, estimator, wire, decay, report)
    return optax.chain(
        left("mh_signsgd", optax.ema(beta, accumulator_dtype=accumulator_dtype), axis_name, num_workers),
        vote_at_a_rate,
        warning(optax.scale(-1.0), "mh_signsgd"),
    )
