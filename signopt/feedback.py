r"""Ready optimizers that send few bits and remember what they have not sent.

For workers whose data differ, where votes fail, and for an optimizer that is to keep its curve: a `mean` in scaled signs, with
memory at the workers and at the servers.
"""

from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import optax

from signopt import _axis
from signopt import _check
from signopt import _float
from signopt import border as borders
from signopt import codecs
from signopt._links import tail
from signopt._links import warning
from signopt.means import mean
from signopt.means import plain
from signopt.momentum import scale_by_signum

_BLOCK = 256  # entries that share a scale
_FLOOR = 0.1  # of a leaf's root mean square: the least scale of an entry, once scales stand still


def ef_signsgd(
    learning_rate: optax.ScalarOrSchedule,
    *,
    axis_name: _axis.AxisName = None,
    num_workers: int | None = None,
    block: int | None = _BLOCK,
    weight_decay: float | jax.Array = 0.0,
    mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""SGD whose steps travel as scaled signs, with memory at the workers and at the servers.

    .. math::
      p_m = \alpha_t g_m + e_m, \qquad
      u = \mathcal{C}\Big(\bar e + \frac1M \sum_m \mathcal{C}(p_m)\Big), \qquad x_{t+1} = x_t - u - \alpha_t \lambda x_t

    The learning rate stands left of the border, so what is sent late was scaled when it was due.

    Args:
      learning_rate: :math:`\alpha`, a number or a schedule: that of SGD, not of a sign.
      axis_name: The workers, as in `mean`. None is one worker.
      num_workers: Size of the axis; needed with one.
      block: The number of entries that share a scale; None for a whole row, 1/M of the parameters.
      weight_decay: :math:`\lambda`, decoupled.
      mask: Which leaves decay, as in `optax.add_decayed_weights`.

    Returns:
      An optimizer. `update` takes `present=`.

    Raises:
      ValueError: If `learning_rate` is negative, or as `mean` does.

    Examples:
      >>> import jax.numpy as jnp, signopt
      >>> tx = signopt.ef_signsgd(1.0)
      >>> updates, state = tx.update(jnp.array([3.0, 1.0]), tx.init(jnp.zeros(2)))
      >>> updates.tolist()  # 2 signs of size (3 + 1) / 2; the rest, (-1, 1), waits
      [-2.0, -2.0]

    References:
      Algorithm 1 of Karimireddy et al., `Error Feedback Fixes SignSGD <https://arxiv.org/abs/1901.09847>`_, 2019; on both
      sides, Algorithm 2 of Zheng et al., `dist-EF-SGD <https://arxiv.org/abs/1905.10936>`_, 2019.
    """
    _check.learning_rate(learning_rate, "ef_signsgd")
    codec = codecs.scaled_sign(block=block)
    return optax.chain(
        optax.scale_by_learning_rate(learning_rate),
        mean(axis_name, uplink=codec, downlink=codec, num_workers=num_workers),
        _decay_at(learning_rate, weight_decay, mask, "ef_signsgd"),
    )


def ef_signum(
    learning_rate: optax.ScalarOrSchedule,
    beta: float | jax.Array = 0.9,
    *,
    axis_name: _axis.AxisName = None,
    num_workers: int | None = None,
    block: int | None = _BLOCK,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Signum at the servers: gradients go up as scaled signs with memory, the signs of their momentum come down.

    .. math::
      q = \frac1M \sum_m \mathcal{C}(g_m + e_m), \qquad \mu \leftarrow \beta \mu + (1 - \beta) q, \qquad
      x_{t+1} = x_t - \alpha_t (\operatorname{sign}(\mu) + \lambda x_t)

    The momentum is that of the mean gradient, so workers may have different data. It takes 1/M of Signum's memory.

    Args:
      learning_rate: :math:`\alpha`, a number or a schedule: how far each parameter moves in a step.
      beta: :math:`\beta` in [0, 1).
      axis_name: The workers, as in `mean`. None is one worker.
      num_workers: Size of the axis; needed with one.
      block: The number of entries that share a scale; None for a whole row, 1/M of the parameters.
      weight_decay: :math:`\lambda`, decoupled.
      mask: Which leaves decay, as in `optax.add_decayed_weights`.

    Returns:
      An optimizer. `update` takes `present=`.

    Raises:
      ValueError: If `learning_rate` is negative, `beta` is outside [0, 1), or as `mean` does.

    Examples:
      >>> import jax.numpy as jnp, signopt
      >>> tx = signopt.ef_signum(0.5)
      >>> updates, state = tx.update(jnp.array([3.0, -1.0]), tx.init(jnp.zeros(2)))
      >>> updates.tolist()
      [-0.5, 0.5]

    References:
      Algorithm 2 of Bernstein et al., `signSGD <https://arxiv.org/abs/1802.04434>`_, 2018, at the servers of Zheng et al.,
      `dist-EF-SGD <https://arxiv.org/abs/1905.10936>`_, 2019.
    """
    _check.decay(beta, "ef_signum", "beta")
    border = mean(
        axis_name,
        uplink=codecs.scaled_sign(block=block),
        server=scale_by_signum(beta),
        downlink=codecs.sign(),
        num_workers=num_workers,
    )
    return optax.chain(border, *tail("ef_signum", learning_rate, weight_decay, mask))


class ScaleByOnebitAdamState(NamedTuple):
    """What 1-bit Adam keeps.

    Attributes:
      count: int32 scalar: the steps so far. Shared.
      mu: The momentum, float32. Shared.
      nu: The second moment, float32. Shared.
      settled_at: int32 scalar: the step in which the second moment settled, and from which on bits travel; 0 before. Shared.
      last_norm: float32 scalar: the size of the second moment when it was last looked at. Shared.
      border: The state of the compressed mean.
    """

    count: jax.Array
    mu: Any
    nu: Any
    settled_at: jax.Array
    last_norm: jax.Array
    border: borders.BorderState


def onebit_adam(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    *,
    axis_name: _axis.AxisName = None,
    num_workers: int | None = None,
    settled: float = 0.96,
    look_every: int | None = None,
    block: int | None = _BLOCK,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam on a float32 mean until its second moment settles, then on momenta in two-sided scaled signs.

    .. math::
      u \leftarrow \mathcal{D}\Big(\bar e + \frac1M \sum_m \mathcal{C}\Big(\beta_1 u + (1 - \beta_1) \frac{g_m}{s} +
      e_m\Big)\Big), \qquad x_{t+1} = x_t - \alpha_t \Big(\frac{u}{1 - \beta_1^t} + \lambda x_t\Big)

    with :math:`s = \sqrt{\hat \nu} + \epsilon` as it was when it settled, and no entry of it below a tenth of its leaf's root mean
    square. It counts as settled when the sum of :math:`\hat \nu` and that of `look_every` steps before are at least as close as
    `settled`, the smaller over the larger. All workers see the same :math:`\nu`, so all switch in the same step.

    What travels is the momentum *divided by s*, whose entries are of about one size. Signs of the momentum itself would give an
    entry without a gradient the size of its neighbours, which Adam then divides by nearly nothing: on digits, whose corners are
    always dark, accuracy falls from .987 to .376 that way (`python -m experiments heterogeneous`).

    Args:
      learning_rate: :math:`\alpha`, a number or a schedule: that of Adam.
      b1: :math:`\beta_1` in [0, 1).
      b2: :math:`\beta_2` in [0, 1).
      eps: :math:`\epsilon`, added to the root.
      axis_name: The workers, as in `mean`. None is one worker.
      num_workers: Size of the axis; needed with one.
      settled: In [0, 1]. 0 switches at the first look.
      look_every: The steps between two looks; None for :math:`1 / (1 - \beta_2)`, the memory of :math:`\nu`.
      block: The number of entries that share a scale; None for a whole row, 1/M of the parameters.
      weight_decay: :math:`\lambda`, decoupled.
      mask: Which leaves decay, as in `optax.add_decayed_weights`.

    Returns:
      An optimizer. `update` takes `present=`. The step in which it switched is `optax.tree.get(state, "settled_at")`.

    Raises:
      ValueError: If an argument is outside its range, or as `mean` does.

    Examples:
      >>> import jax.numpy as jnp, signopt
      >>> tx = signopt.onebit_adam(0.1)
      >>> updates, state = tx.update(jnp.array([3.0, -1.0]), tx.init(jnp.zeros(2)))
      >>> [round(float(x), 4) for x in updates]
      [-0.1, 0.1]

    References:
      Algorithm 1 of Tang et al., `1-bit Adam <https://arxiv.org/abs/2102.02888>`_, 2021, and for the rule that ends the
      warm-up its section 7.1. It sends the momentum itself, and its warm-up is set by hand as a rule; here the rule decides,
      inside of jit. 0/1 Adam adds rounds that are left out: `local_steps` around an inner Adam.
    """
    adam = _scale_by_onebit_adam(b1, b2, eps, axis_name, num_workers, settled, look_every, block)
    return optax.chain(adam, *tail("onebit_adam", learning_rate, weight_decay, mask))


def _scale_by_onebit_adam(b1, b2, eps, axis_name, num_workers, settled, look_every, block):
    caller = "onebit_adam"
    _check.decay(b1, caller, "b1")
    _check.decay(b2, caller, "b2")
    _check.share(settled, caller, "settled")
    if look_every is None:
        look_every = max(1, round(1 / (1 - b2)))
    _check.count(look_every, caller, "look_every")
    codec = codecs.scaled_sign(block=block)
    compressed: Any = mean(axis_name, uplink=codec, downlink=codec, num_workers=num_workers)
    dense: Any = borders.exchange(axis_name, plain(), caller=caller)

    def _scales(nu, steps):
        """What momenta are divided by once the second moment stands still."""
        known = 1 - b2 ** jnp.maximum(steps, 1).astype(jnp.float32)

        def scale(v):
            root = jnp.sqrt(v / known)
            least = _FLOOR * _float.rms(root)
            return jnp.maximum(root, least) + eps

        return jax.tree.map(scale, nu)

    def init_fn(params):
        zeros = jax.tree.map(lambda x: jnp.zeros(_float.shape(x), jnp.float32), params)
        zero = jnp.zeros([], jnp.int32)
        return ScaleByOnebitAdamState(zero, zeros, zeros, zero, jnp.zeros([], jnp.float32), compressed.init(params))

    def update_fn(updates, state, params=None, *, present=None, **extra_args):
        del params, extra_args
        count = jnp.asarray(optax.safe_increment(state.count))
        grads = jax.tree.map(lambda g: borders.finite(jnp.asarray(g).astype(jnp.float32)), updates)

        def in_floats():
            mean_gradient, _ = dense.update(grads, borders.BorderState(state.count), present=present)
            mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, mean_gradient)
            nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g**2, state.nu, mean_gradient)
            return mu, nu, state.border

        def in_bits():
            scale = _scales(state.nu, state.settled_at)
            own = jax.tree.map(lambda m, g, s: (b1 * m + (1 - b1) * g) / s, state.mu, grads, scale)
            found, border = compressed.update(own, state.border, present=present)
            return jax.tree.map(jnp.multiply, found, scale), state.nu, border

        is_settled = state.settled_at > 0
        mu, nu, border = lax.cond(is_settled, in_bits, in_floats)
        steps = jnp.where(is_settled, state.settled_at, count)
        nu_hat = jax.tree.map(lambda v: v / (1 - b2 ** steps.astype(jnp.float32)), nu)
        mu_hat = jax.tree.map(lambda m: m / (1 - b1 ** count.astype(jnp.float32)), mu)
        roots = jax.tree.map(lambda v: jnp.sqrt(v) + eps, nu_hat)
        roots = jax.tree.map(lambda r, s: jnp.where(is_settled, s, r), roots, _scales(nu, steps))
        norm = sum((jnp.sum(v) for v in jax.tree.leaves(nu_hat)), jnp.float32(0))
        looks = (count % look_every == 0) & ~is_settled
        closeness = jnp.minimum(norm, state.last_norm) / jnp.maximum(jnp.maximum(norm, state.last_norm), 1e-38)
        # The first look has nothing to compare with, unless it need not.
        settles = looks & (closeness >= settled) & ((state.last_norm > 0) | (jnp.float32(settled) == 0))
        found = jax.tree.map(lambda m, r, g: (m / r).astype(jnp.result_type(g)), mu_hat, roots, updates)
        return found, ScaleByOnebitAdamState(
            count=count,
            mu=mu,
            nu=nu,
            settled_at=jnp.where(settles, count, state.settled_at),
            last_norm=jnp.where(looks, norm, state.last_norm),
            border=border,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _decay_at(learning_rate: Any, weight_decay: Any, mask: Any, caller: str) -> optax.GradientTransformation:
    """Weight decay where the learning rate has been applied already."""
    if _check.is_zero(weight_decay):
        return warning(optax.identity(), caller)
    if callable(learning_rate):
        schedule: Any = learning_rate
        shrink = optax.add_decayed_weights(lambda step: -schedule(step) * weight_decay, mask)
    else:
        shrink = optax.add_decayed_weights(-learning_rate * weight_decay, mask)
    return warning(shrink, caller)
