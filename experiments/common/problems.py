"""Problems whose minimum is known: a loss, a penalty, and where their sum is smallest."""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import sklearn.datasets
import sklearn.linear_model
import sklearn.preprocessing

from signopt import prox as proxes


@dataclasses.dataclass(frozen=True)
class Problem:
    """Minimize loss plus penalty.

    Attributes:
      loss: From parameters to the smooth part, in the dtype of the parameters.
      prox: The penalty.
      start: Where to begin; float32.
      minimizer: Where loss plus penalty is smallest, found by scikit-learn; float64.
      curvature: An upper bound on the eigenvalues of the Hessian of the loss.
      start_rate: A learning rate for signs to begin with: a hundredth of the way, and a few times more.
    """

    loss: Callable[[Any], jax.Array]
    prox: proxes.Prox
    start: Any
    minimizer: Any
    curvature: float
    start_rate: float

    def objective(self, params: Any) -> float:
        """Loss plus penalty, in float64."""
        with jax.enable_x64(True):
            wide = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.float64), params)
            return float(self.loss(wide) + self.prox.value(wide))

    @property
    def minimum(self) -> float:
        """The objective at the minimizer."""
        return self.objective(self.minimizer)

    def gap(self, params: Any) -> float:
        """How far the objective lies above its minimum."""
        return self.objective(params) - self.minimum

    def gradient(self, params: Any) -> Any:
        """The gradient of the loss."""
        return jax.grad(self.loss)(params)

    def polish(self, params: Any) -> Any:
        """The parameters after one last proximal step, in float64."""
        with jax.enable_x64(True):
            wide = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.float64), params)
            return proxes.polish(wide, self.prox, 1 / self.curvature, gradient=self.gradient(wide))

    def penalized(self, params: Any) -> np.ndarray:
        """The entries that the penalty acts on, as a vector."""
        return np.asarray(params["kernel"] if isinstance(params, dict) else params).ravel()

    def nonzero(self, params: Any) -> int:
        """How many of those are not zero."""
        return int(np.count_nonzero(self.penalized(params)))

    def support_errors(self, params: Any) -> int:
        """In how many entries the zeros are not those of the minimizer."""
        return int(np.sum((self.penalized(params) != 0) != (self.penalized(self.minimizer) != 0)))


def lasso(seed: int = 0) -> Problem:
    """Least squares with an l1 penalty of 0.05: 200 x 100 entries from N(0, 1/200), 8 spikes of +-3, noise of 0.05."""
    rng = np.random.default_rng(seed)
    matrix = rng.normal(size=(200, 100)) / np.sqrt(200)
    spikes = np.zeros(100)
    spikes[rng.choice(100, 8, replace=False)] = rng.choice([-3.0, 3.0], 8)
    target = matrix @ spikes + 0.05 * rng.normal(size=200)
    strength = 0.05
    solver = sklearn.linear_model.Lasso(strength / 200, fit_intercept=False, tol=1e-14, max_iter=100_000)

    def loss(x):
        return jnp.sum((jnp.asarray(matrix, x.dtype) @ x - jnp.asarray(target, x.dtype)) ** 2) / 2

    return Problem(
        loss=loss,
        prox=proxes.l1(strength),
        start=jnp.zeros(100),
        minimizer=solver.fit(matrix, target).coef_,
        curvature=float(np.linalg.norm(matrix, 2) ** 2),
        start_rate=0.05,
    )


def logistic(name: str, strength: float) -> Problem:
    """Logistic regression with an l1 penalty on the weights, not on the bias, on a data set of scikit-learn.

    Args:
      name: "breast_cancer" (standardized) or "digits" (pixels / 16).
      strength: Of the penalty, beside a mean over examples.
    """
    images, labels = getattr(sklearn.datasets, f"load_{name}")(return_X_y=True)
    inputs = images / 16 if name == "digits" else sklearn.preprocessing.StandardScaler().fit_transform(images)
    two = len(np.unique(labels)) == 2
    solver = sklearn.linear_model.LogisticRegression(
        C=1 / (strength * len(labels)), l1_ratio=1.0, solver="saga", tol=1e-8, max_iter=20_000, random_state=0
    ).fit(inputs, labels)

    def loss(params):
        logits = jnp.asarray(inputs, params["kernel"].dtype) @ params["kernel"] + params["bias"]
        if two:
            return jnp.mean(optax.sigmoid_binary_cross_entropy(logits[:, 0], labels))
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

    minimizer = {"kernel": solver.coef_.T, "bias": solver.intercept_}
    return Problem(
        loss=loss,
        prox=proxes.masked(proxes.l1(strength), {"kernel": True, "bias": False}),
        start=jax.tree.map(lambda x: jnp.zeros(x.shape), minimizer),
        minimizer=minimizer,
        curvature=float((0.25 if two else 0.5) * np.linalg.norm(inputs, 2) ** 2 / len(labels)),
        start_rate=0.02,
    )
