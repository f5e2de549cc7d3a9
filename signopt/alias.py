"""Ready optimizers: each body is one `optax.chain`, with a border in it where there are several workers."""

from typing import Any

import jax
import optax

from signopt import axis
from signopt import state
from signopt.momentum import finite_only
from signopt.momentum import scale_by_signum
from signopt.vote import majority_vote
from signopt.wire import Wire


def signsgd(
    learning_rate: optax.ScalarOrSchedule,
    *,
    axis_name: axis.AxisName = None,
    num_workers: int | None = None,
    wire: Wire = "two_bit",
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""signSGD, by majority vote if there are several workers.

    .. math::
      x_{t+1} = x_t - \alpha_t \Big(\operatorname{sign}\sum_m \operatorname{sign}(g_{m,t}) + \lambda x_t\Big)

    Args:
      learning_rate: :math:`\alpha`, a number or a schedule: how far each parameter moves in a step.
      axis_name: The workers, as in `majority_vote`. None is one worker, and then this is `optax.sign_sgd` with weight
        decay.
      num_workers: Size of the axis. If given, each worker counts the steps in which its gradient was not finite.
      wire: What travels, as in `majority_vote`.
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
    if axis_name is None:
        _require_axis(num_workers, "signsgd")
        return optax.chain(
            _decayed(optax.scale_by_sign(), weight_decay, mask),
            optax.scale_by_learning_rate(learning_rate),
        )
    counter = finite_only(optax.identity(), caller="signsgd")
    return optax.chain(
        optax.identity() if num_workers is None else _on_each_worker(counter, axis_name, num_workers),
        majority_vote(axis_name, wire=wire),
        _decayed(optax.identity(), weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def signum(
    learning_rate: optax.ScalarOrSchedule,
    beta: float | jax.Array = 0.9,
    accumulator_dtype: Any = None,
    *,
    axis_name: axis.AxisName = None,
    num_workers: int | None = None,
    wire: Wire = "two_bit",
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
      axis_name: The workers, as in `majority_vote`. None is one worker, and then this is `optax.signum` with weight decay.
      num_workers: Size of the axis. If given, the momentum is kept in a `PerWorkerState`, as `simulate`, `on_mesh`,
        checkpoints and `shard_map` want it; a `jax.pmap` over replicated state needs none.
      wire: What travels, as in `majority_vote`.
      weight_decay: :math:`\lambda`, decoupled: it acts after the vote.
      mask: Which leaves decay, as in `optax.add_decayed_weights`.

    Returns:
      An optimizer. `update` takes `present=` where it votes.

    Raises:
      ValueError: If `wire` is unknown, `num_workers` is given without an axis or is not its size.

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
    if axis_name is None:
        _require_axis(num_workers, "signum")
        return optax.chain(
            optax.ema(beta, debias=False, accumulator_dtype=accumulator_dtype),
            _decayed(optax.scale_by_sign(), weight_decay, mask),
            optax.scale_by_learning_rate(learning_rate),
        )
    momentum = scale_by_signum(beta, accumulator_dtype=accumulator_dtype)
    return optax.chain(
        _on_each_worker(momentum, axis_name, num_workers),
        majority_vote(axis_name, wire=wire),
        _decayed(optax.identity(), weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def lion(
    learning_rate: optax.ScalarOrSchedule,
    b1: float | jax.Array = 0.9,
    b2: float | jax.Array = 0.99,
    mu_dtype: Any = None,
    weight_decay: optax.ScalarOrSchedule = 1e-3,
    mask: Any = None,
    *,
    axis_name: axis.AxisName = None,
    num_workers: int | None = None,
    wire: Wire = "two_bit",
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
      axis_name: The workers, as in `majority_vote`. None is one worker, and then this is `optax.lion`.
      num_workers: Size of the axis, as in `signum`.
      wire: What travels, as in `majority_vote`.

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
    if axis_name is None:
        _require_axis(num_workers, "lion")
        return optax.lion(learning_rate, b1, b2, mu_dtype, weight_decay, mask)
    momentum = finite_only(optax.scale_by_lion(b1, b2, mu_dtype), caller="lion")
    return optax.chain(
        _on_each_worker(momentum, axis_name, num_workers),
        majority_vote(axis_name, wire=wire),
        _decayed(optax.identity(), weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def _on_each_worker(tx, axis_name, num_workers):
    """What lies left of the vote: on every worker, with a state of its own if their number is known."""
    if num_workers is None:
        return tx
    return state.per_worker(tx, num_workers, axis_name=axis_name)


def _require_axis(num_workers, caller):
    if num_workers is not None:
        raise ValueError(
            f"`{caller}(num_workers=...)` has to come with an axis to vote over, got num_workers={num_workers} and "
            "axis_name=None. Pass `axis_name=...`, or leave out `num_workers` for one worker."
        )


def _decayed(tx, weight_decay, mask):
    """`tx`, which keeps no state, and `optax.add_decayed_weights` as one link.

    So the state is that of optax's own sign optimizers whatever the weight decay, and only a Python 0 needs no params.
    """
    decay = optax.add_decayed_weights(weight_decay, mask)
    is_off = isinstance(weight_decay, int | float) and weight_decay == 0

    def update_fn(updates, state, params=None):
        updates, _ = tx.update(updates, optax.EmptyState(), params)
        return (updates, state) if is_off else decay.update(updates, state, params)

    return optax.GradientTransformation(decay.init, update_fn)
