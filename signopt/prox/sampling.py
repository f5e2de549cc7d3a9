"""A penalty that is a mean of many, of which a step looks at a few."""

from collections.abc import Callable, Sequence
import dataclasses
import operator
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from signopt.prox.penalty import Prox
from signopt.prox.penalty import Scalar
from signopt.prox.penalty import as_prox


@dataclasses.dataclass(frozen=True)
class SampledProx:
    r"""The mean of several penalties, :math:`r = \tfrac1B \sum_b r_b`; made by `sampled`.

    As a `Prox` it is the mean of all operators, which is not the operator of the mean but has the same fixed points as
    :math:`\tau \to 0`. `draw` gives the one that a step of the stochastic algorithm uses.

    Attributes:
      penalty: `penalty(index) -> Prox` for a traced index in 0 ... num_penalties - 1.
      num_penalties: B.
      num_samples: How many are drawn for a step, without replacement.
      key: Where the draws come from.
    """

    penalty: Callable[[jax.Array], Prox]
    num_penalties: int
    num_samples: int
    key: jax.Array

    own_residual = True
    separable = False  # a mean of clipped slopes depends on the step size

    def draw(self, *numbers: jax.Array | int) -> Prox:
        """The mean of a few operators, chosen by the key folded with `numbers` (a step, a worker)."""
        key = self.key
        for number in numbers:
            key = jax.random.fold_in(key, number)
        return self._mean_of(jax.random.choice(key, self.num_penalties, (self.num_samples,), replace=False))

    def __call__(self, x: Any, step_size: Scalar) -> Any:
        """The mean of all operators."""
        return self._all()(x, step_size)

    def value(self, x: Any) -> jax.Array:
        """The mean of all penalties."""
        return self._all().value(x)

    def residual(self, y: Any, step_size: Scalar) -> Any:
        """What the mean of all operators takes away."""
        return self._all().residual(y, step_size)

    def _all(self):
        return self._mean_of(jnp.arange(self.num_penalties))

    def _mean_of(self, indices):
        """One after another, so that the memory is that of a few and only what is drawn is computed."""

        def mean(what, like):
            def add(total, index):
                part = what(self.penalty(index))
                return jax.tree.map(lambda t, x: t + x.astype(t.dtype), total, part), None

            wide = lambda x: jnp.zeros(jnp.shape(x), jnp.promote_types(jnp.result_type(x), jnp.float32))  # noqa: E731
            total, _ = lax.scan(add, jax.tree.map(wide, like), indices)
            return jax.tree.map(lambda t, x: (t / indices.size).astype(jnp.result_type(x)), total, like)

        return Prox(
            apply=lambda x, step_size: mean(lambda prox: prox(x, step_size), x),
            penalty_value=lambda x: mean(lambda prox: prox.value(x), jnp.zeros([], jnp.float32)),
            own_residual=lambda y, step_size: mean(lambda prox: prox.residual(y, step_size), y),
        )


def sampled(
    penalties: Sequence[Prox] | Callable[[jax.Array], Prox],
    *,
    num_samples: int,
    key: jax.Array,
    num_penalties: int | None = None,
) -> SampledProx:
    r"""The mean of many penalties, of which each step draws a few.

    .. math::
      P(x) = \frac{1}{|S|} \sum_{b \in S} \operatorname{prox}_{\tau r_b}(x - \tau g), \qquad S \subset \{1 \dots B\}

    `scale_by_prox_gradient`, `signprox` and `prox_step` draw anew in every step; workers draw for themselves.

    Args:
      penalties: The :math:`r_b`: a sequence, or a function of a traced index, which compiles once however many there are.
      num_samples: :math:`|S|`, in 1 ... B, drawn without replacement.
      key: A random key. The same key gives the same run.
      num_penalties: B, if `penalties` is a function.

    Returns:
      A penalty for the places that take one.

    Raises:
      ValueError: If `num_samples` is outside 1 ... B, or `num_penalties` is missing or does not fit.

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
    else:
        branches = [as_prox(prox, "sampled") for prox in penalties]
        penalty, count = _choose(branches), len(branches)
        if num_penalties not in (None, count):
            raise ValueError(
                f"`sampled(num_penalties=...)` has to be the number of penalties, {count}, got {num_penalties}. Leave it "
                "out."
            )
    if not 1 <= num_samples <= count:
        raise ValueError(f"`sampled(num_samples=...)` has to be in 1 ... {count}, got {num_samples}.")
    return SampledProx(penalty, operator.index(count), operator.index(num_samples), key)


def _choose(branches):
    """The function of a traced index that stands for a sequence of penalties."""

    def penalty(index):
        pick = lambda functions, *operands: lax.switch(index, functions, *operands)  # noqa: E731
        return Prox(
            apply=lambda x, step_size: pick([prox.__call__ for prox in branches], x, step_size),
            penalty_value=lambda x: pick([prox.value for prox in branches], x),
            own_residual=lambda y, step_size: pick([prox.residual for prox in branches], y, step_size),
        )

    return penalty
