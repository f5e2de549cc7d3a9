"""A penalty that is a mean of many, of which a step looks at a few."""

from collections.abc import Callable, Sequence

import jax
from jax import lax
import jax.numpy as jnp

from signopt import _axis
from signopt import _check
from signopt import _float
from signopt.prox.penalty import Prox
from signopt.prox.penalty import as_prox


def sampled(
    penalties: Sequence[Prox] | Callable[[jax.Array], Prox],
    *,
    num_samples: int,
    key: jax.Array,
    num_penalties: int | None = None,
) -> Prox:
    r"""The mean of many penalties, :math:`r = \tfrac1B \sum_b r_b`, of which each step draws a few.

    .. math::
      P(x) = \frac{1}{|S|} \sum_{b \in S} \operatorname{prox}_{\tau r_b}(x - \tau g), \qquad S \subset \{1 \dots B\}

    `scale_by_prox_gradient`, `signprox` and `prox_step` draw anew in every step; workers draw for themselves. Called by
    itself it is the mean of all operators. That is not the operator of the mean, but has the same fixed points as
    :math:`\tau \to 0`.

    Args:
      penalties: The :math:`r_b`: a sequence, or a function of a traced index, which compiles once however many there are.
      num_samples: :math:`|S|`, in 1 ... B, drawn without replacement.
      key: A random key. The same key gives the same run.
      num_penalties: B, if `penalties` is a function.

    Returns:
      A penalty whose `draw(*numbers)` is the mean of the operators drawn by the key folded with `numbers`.

    Raises:
      ValueError: If `num_samples` is outside 1 ... B, or `num_penalties` is missing or does not fit.
      TypeError: If a number is no Python integer.

    Examples:
      >>> import jax, jax.numpy as jnp, signopt
      >>> strengths = jnp.array([1.0, 2.0, 6.0])
      >>> prox = signopt.prox.sampled(
      ...     lambda b: signopt.prox.l1(strengths[b]), num_penalties=3, num_samples=1, key=jax.random.key(0)
      ... )
      >>> float(prox.value(jnp.array([1.0, -1.0]))), prox(jnp.array([10.0]), 1.0).tolist()
      (6.0, [7.0])

    References:
      Xu and Kamilov, *SignProx: One-bit proximal algorithm for nonconvex stochastic optimization*, ICASSP 2019.
    """
    if callable(penalties):
        penalty, count = penalties, num_penalties
        if count is None:
            raise ValueError(
                "`sampled(num_penalties=...)` has to be given when `penalties` is a function, got None. Say how many "
                "penalties there are."
            )
        _check.count(count, "sampled", "num_penalties")
    else:
        branches = [as_prox(prox, "sampled") for prox in penalties]
        penalty, count = _choose(branches), len(branches)
        if num_penalties not in (None, count):
            raise ValueError(
                f"`sampled(num_penalties=...)` has to be the number of penalties, {count}, got {num_penalties}. Leave it "
                "out."
            )
    _check.count(num_samples, "sampled", "num_samples", least=0)
    if not 1 <= num_samples <= count:
        raise ValueError(f"`sampled(num_samples=...)` has to be in 1 ... {count}, got {num_samples}.")

    def draw(*numbers):
        drawn = key
        for number in numbers:
            drawn = jax.random.fold_in(drawn, number)
        return _mean_of(penalty, jax.random.choice(drawn, count, (num_samples,), replace=False))

    every = lambda: _mean_of(penalty, jnp.arange(count))  # noqa: E731  made where it is used: it may be traced there
    return Prox(
        apply=lambda x, step_size: every().apply(x, step_size),
        penalty_value=lambda x: every().value(x),
        own_residual=lambda y, step_size: every().residual(y, step_size),
        separable=False,  # a mean of clipped slopes depends on the step size
        random=draw,
    )


def _mean_of(penalty, indices):
    """The mean of some operators. One after another, so that the memory is that of two and only these are computed."""

    def mean(what, like):
        part = lambda index: what(penalty(index))  # noqa: E731

        def add(total, index):
            return jax.tree.map(lambda t, x: t + x.astype(t.dtype), total, part(index)), None

        zeros = jax.tree.map(lambda x: jnp.zeros_like(x, _float.wide_dtype(x)), like)
        total, _ = lax.scan(add, _axis.to_varying(zeros, _axis.varying_of(part, indices[0])), indices)
        return jax.tree.map(lambda t, x: (t / indices.size).astype(jnp.result_type(x)), total, like)

    def value(x):
        like = jax.eval_shape(lambda index: penalty(index).value(x), indices[0])
        return mean(lambda prox: prox.value(x), jnp.zeros([], like.dtype))

    return Prox(
        apply=lambda x, step_size: mean(lambda prox: prox(x, step_size), x),
        penalty_value=value,
        own_residual=lambda y, step_size: mean(lambda prox: prox.residual(y, step_size), y),
    )


def _choose(branches):
    """The function of a traced index that stands for a sequence of penalties."""

    def pick(index, functions, *operands):
        axes = tuple({name for function in functions for name in _axis.varying_of(function, *operands)})
        alike = [lambda *args, function=function: _axis.to_varying(function(*args), axes) for function in functions]
        return lax.switch(index, alike, *operands)

    def penalty(index):
        return Prox(
            apply=lambda x, step_size: pick(index, [prox.__call__ for prox in branches], x, step_size),
            penalty_value=lambda x: pick(index, [prox.value for prox in branches], x),
            own_residual=lambda y, step_size: pick(index, [prox.residual for prox in branches], y, step_size),
        )

    return penalty
