"""Signs for matrices: workers vote with the signs of their orthogonalized momentum.

The polar factor of a matrix, U V' of its singular value decomposition U S V', is the sign of its singular values: all
directions of a gradient count alike, however weak. Muon steps by it, and averages gradients in floats to get there. Here
each worker takes it of a momentum of its own, and only signs travel.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers
from optax.contrib import scale_by_muon

from signopt import _axis
from signopt import _check
from signopt import _float
from signopt import sign
from signopt._links import left
from signopt._links import right
from signopt.vote import Wire

NS_COEFFS = (3.4445, -4.7750, 2.0315)


def sign_muon(
    learning_rate: optax.ScalarOrSchedule,
    beta: float | jax.Array = 0.95,
    *,
    axis_name: _axis.AxisName = None,
    num_workers: int | None = None,
    wire: Wire = "two_bit",
    delay: int = False,
    report: bool = False,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any = None,
    nesterov: bool = True,
    ns_coeffs: tuple = NS_COEFFS,
    ns_steps: int = 5,
    muon_weight_dimension_numbers: Any = None,
    accumulator_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""SignMuon: a vote of orthogonalized momenta for matrices, and of momenta for everything else.

    .. math::
      m_{m,t+1} &= \beta m_{m,t} + (1 - \beta) g_{m,t}, \qquad n_{m,t} = \beta m_{m,t+1} + (1 - \beta) g_{m,t} \\
      v_{m,t} &= \operatorname{polar}(n_{m,t}) \text{ for matrices}, \quad n_{m,t} \text{ for the rest} \\
      x_{t+1} &= x_t - \alpha_t \Big(\operatorname{sign}\sum_m \operatorname{sign}(v_{m,t}) + \lambda x_t\Big)

    It is `signum` with Newton-Schulz steps before the vote: the same state, one vote, two collectives. Every entry of every
    leaf moves by the learning rate, so that one rate serves matrices and the rest: their updates have the same root mean
    square, as `consistent_rms` of `optax.contrib.muon` makes them.

    A matrix of zeros votes for nothing, and so do rows and columns of zeros, such as an embedding's of words that a worker
    did not see. The vote does not depend on the scale of the gradient.

    Where an inner axis of a mesh shards the parameters and is left to the compiler (FSDP), the polar factor is that of the
    whole matrix, which the compiler gathers over that axis. Inside a `jax.shard_map` over that axis it is that of the shard.

    Args:
      learning_rate: :math:`\alpha`, a number or a schedule: how far each parameter moves in a step.
      beta: :math:`\beta` in [0, 1), the decay rate of the momentum.
      axis_name: The workers, as in `majority_vote`. None is one worker and no communication.
      num_workers: Size of the axis, as in `signum`.
      wire: What travels, as in `majority_vote`.
      delay: 1 to step by the vote of the step before, as in `majority_vote`.
      report: Whether the state keeps `VoteStatistics` of the last vote, as in `majority_vote`.
      weight_decay: :math:`\lambda`, decoupled: it acts after the vote.
      mask: Which leaves decay, as in `optax.add_decayed_weights`.
      nesterov: Vote with :math:`n` as above; if not, with :math:`m`.
      ns_coeffs: Coefficients of the Newton-Schulz steps, three or three for each step, as in `optax.contrib.muon`.
      ns_steps: Their number. Under `optax.inject_hyperparams`, name it in `static_args`.
      muon_weight_dimension_numbers: Which leaves are matrices, and along which axes, as in `optax.contrib.muon`: a tree of
        `optax.contrib.MuonDimensionNumbers` and None, a prefix of the parameters', or a function from parameters to one. If
        None, every leaf with two axes is a matrix, embeddings too, and stacks of matrices and convolutions are not.
      accumulator_dtype: Dtype of the momentum; that of the parameters if None.

    Returns:
      An optimizer. `update` takes `present=` where it votes.

    Raises:
      ValueError: If `beta` is outside [0, 1), `ns_steps` or the shape of `ns_coeffs` is wrong, `wire` is unknown,
        `num_workers` is given without an axis or is not its size.
      TypeError: If `ns_steps` is no Python integer; in `update`, if a leaf is not of a floating-point dtype.

    Examples:
      The polar factor of [[4, 3], [0, 1]] is [[5, 3], [-3, 5]] / sqrt(34): the columns become orthogonal.

      >>> import jax.numpy as jnp, signopt
      >>> tx = signopt.sign_muon(0.5)
      >>> params = {"matrix": jnp.zeros((2, 2)), "vector": jnp.zeros(2)}
      >>> grads = {"matrix": jnp.array([[4.0, 3.0], [0.0, 1.0]]), "vector": jnp.array([3.0, -0.1])}
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> updates["matrix"].tolist(), updates["vector"].tolist()
      ([[-0.5, -0.5], [0.5, -0.5]], [-0.5, 0.5])

    References:
      `SignMuon <https://arxiv.org/abs/2605.16311>`_, 2026, and Jordan et al., `Muon <https://kellerjordan.github.io/posts/muon/>`_,
      2024. Packed wires, zeros, and the rest of the parameters in the same vote are ours.
    """
    caller = "sign_muon"
    _check.decay(beta, caller, "beta")
    _check_newton_schulz(ns_coeffs, ns_steps, caller)
    ema = optax.ema(beta, debias=False, accumulator_dtype=accumulator_dtype)

    def update_fn(updates, state, params=None):
        sign.require_floating(updates, caller)
        average, new_state = ema.update(updates, state, params)
        if nesterov:
            wide = jax.tree.map(_float.widen, average)
            average = optax.tree.update_moment(jax.tree.map(_float.widen, updates), wide, beta, 1)
        voted = jax.tree.map(
            lambda dims, m: m if dims is None else orthogonalized(m, dims, ns_coeffs, ns_steps),
            dimension_numbers(updates, muon_weight_dimension_numbers),
            average,
            is_leaf=_is_known,
        )
        return jax.tree.map(_itself_or_sign, updates, voted), new_state

    momentum = optax.GradientTransformation(ema.init, update_fn)
    return optax.chain(
        left(caller, momentum, axis_name, num_workers),
        *right(
            caller,
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


def dimension_numbers(tree: Any, muon_weight_dimension_numbers: Any) -> Any:
    """Which leaves are matrices, by the rule of `optax.contrib.muon`: None for one that is not, else its axes."""
    given = muon_weight_dimension_numbers
    if given is None:
        return jax.tree.map(lambda x: MuonDimensionNumbers() if jnp.ndim(x) == 2 else None, tree)
    prefix = given(tree) if callable(given) else given
    return jax.tree.map(lambda dims, part: jax.tree.map(lambda x: dims, part), prefix, tree, is_leaf=_is_known)


def orthogonalized(x: jax.Array, dims: MuonDimensionNumbers, ns_coeffs: tuple, ns_steps: int) -> jax.Array:
    """The polar factor of each matrix in `x` by optax's Newton-Schulz steps, in at least float32.

    Each matrix is divided by its largest entry first, so that its norm neither overflows nor vanishes.
    """
    if x.size == 0:
        return x
    x = _float.widen(x)
    axes = tuple(axis for group in dims for axis in ((group,) if isinstance(group, int) else group))
    x = x / _float.unit_of(jnp.max(jnp.abs(x), axis=axes, keepdims=True))
    # Without momentum of its own it is Newton-Schulz and nothing else, and its state is nothing to keep.
    newton_schulz = scale_by_muon(ns_coeffs, ns_steps, beta=0, nesterov=False, weight_dimension_numbers=dims)
    found, _ = newton_schulz.update(x, newton_schulz.init(x))
    return jnp.asarray(found)


def _itself_or_sign(gradient, voted):
    """`voted` for one who takes signs anyway, in the dtype of the gradient, where it might round to zero."""
    dtype = jnp.result_type(gradient)
    return voted if voted.dtype == dtype else sign.sign(voted).astype(dtype)


def _is_known(dims):
    return dims is None or isinstance(dims, MuonDimensionNumbers)


def _check_newton_schulz(ns_coeffs, ns_steps, caller):
    _check.count(ns_steps, caller, "ns_steps")
    shape = np.shape(ns_coeffs)
    if shape != (3,) and not (len(shape) == 2 and shape[1] == 3 and shape[0] <= ns_steps):
        raise ValueError(
            f"`{caller}(ns_coeffs=...)` has to be three numbers, or three for each of at most ns_steps={ns_steps} steps, "
            f"got shape {shape}."
        )
