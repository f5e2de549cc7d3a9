"""Problems of the papers around signSGD: each with its optimum, the noise of its gradients, and what its paper claims.

A problem is drawn from a key: a truth, the data made from it, and where to start. Its loss is of one worker's mini-batch,
which is drawn from another key. Its error is the distance from the optimum, relative to the truth's size.
"""

from collections.abc import Callable, Mapping
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

Instance = Any


class Problem(NamedTuple):
    """What an optimizer is run on.

    Attributes:
      draw: From a key to an instance: a dictionary of arrays, with "start" in it, a dictionary of parameters.
      batch: From a key to what chooses one worker's mini-batch: indices, or fresh numbers.
      loss: `(params, instance, batch)` to the loss of the mini-batch.
      error: `(params, instance)` to the relative distance from the optimum.
      target: The error at which the optimum counts as reached.
      paper: Where it is from.
      claim: What the paper says about it.
    """

    draw: Callable[[jax.Array], Instance]
    batch: Callable[[jax.Array], Any]
    loss: Callable[[Any, Instance, Any], jax.Array]
    error: Callable[[Any, Instance], jax.Array]
    target: float
    paper: str
    claim: str


def _normal(*shape):
    return lambda key: jax.random.normal(key, shape)


def _choice(shape, below):
    return lambda key: jax.random.randint(key, shape, 0, below)


# ---- a deep linear chain in one dimension ----------------------------------------------------------------------------


def chain(depth: int, examples: int = 8) -> Problem:
    """A product of so many numbers, each normal at the start, that shall be one.

    The noise comes from the inputs alone: that of a factor is as small as its gradient.
    """

    def draw(key):
        return {"start": {"w": jax.random.normal(key, (depth,))}}

    def loss(params, instance, x):
        del instance
        return jnp.mean((x * jnp.prod(params["w"]) - x) ** 2) / 2

    def error(params, instance):
        del instance
        return jnp.abs(jnp.prod(params["w"]) - 1)

    claim = "steps of gradient descent grow exponentially with the depth"
    return Problem(draw, _normal(examples), loss, error, 0.05, "Shamir, 2019 (arXiv:1809.08587)", claim)


# ---- matrices of low rank --------------------------------------------------------------------------------------------

SCALED_SGD = "Zhang, Chiu and Zhang, 2022 (arXiv:2208.11246)"
OVERVIEW = "Chi, Lu and Chen, 2019 (arXiv:1809.09573)"


def low_rank(key: jax.Array, size: int, rank: int, condition: float) -> jax.Array:
    """A square matrix of the rank, with singular values from `size` down to `size / condition`."""
    left, right = (jnp.linalg.qr(jax.random.normal(k, (size, rank)))[0] for k in jax.random.split(key))
    return (left * (size * jnp.geomspace(1.0, 1 / condition, rank))) @ right.T


def factors(key: jax.Array, size: int, rank: int, scale: float = 0.5) -> dict[str, jax.Array]:
    """Two factors of normal entries to start from."""
    u, v = scale * jax.random.normal(key, (2, size, rank))
    return {"u": u, "v": v}


def _product(params):
    return params["u"] @ params["v"].T


def _relative(found, truth):
    return jnp.linalg.norm(found - truth) / jnp.linalg.norm(truth)


def _draw_matrix(key, size, rank, condition):
    truth, start = jax.random.split(key)
    return {"truth": low_rank(truth, size, rank, condition), "start": factors(start, size, rank)}


def _matrix_error(params, instance):
    return _relative(_product(params), instance["truth"])


def completion(condition: float, size: int = 20, rank: int = 2, seen: int = 64) -> Problem:
    """A matrix from its entries: squared error on so many drawn entries for each worker and step.

    The target is a tenth of the smallest singular value, so that no direction may be left out.
    """

    def loss(params, instance, chosen):
        i, j = chosen
        found = jnp.sum(params["u"][i] * params["v"][j], -1)
        return jnp.mean((found - instance["truth"][i, j]) ** 2) / 2

    draw = functools.partial(_draw_matrix, size=size, rank=rank, condition=condition)
    claim = "steps of SGD grow with the condition number, those of ScaledSGD do not"
    return Problem(draw, _choice((2, seen), size), loss, _matrix_error, 0.1 / condition, SCALED_SGD, claim)


def one_bit_completion(condition: float = 4.0, size: int = 20, rank: int = 2, seen: int = 64) -> Problem:
    """The same from bits that are one with the entry's logistic probability, by cross-entropy with that probability."""

    def loss(params, instance, chosen):
        i, j = chosen
        found = jnp.sum(params["u"][i] * params["v"][j], -1)
        return jnp.mean(optax.sigmoid_binary_cross_entropy(found, jax.nn.sigmoid(instance["truth"][i, j])))

    draw = functools.partial(_draw_matrix, size=size, rank=rank, condition=condition)
    claim = "as for squared errors (measured there, not proved)"
    return Problem(draw, _choice((2, seen), size), loss, _matrix_error, 0.1, SCALED_SGD, claim)


def pairwise_completion(condition: float = 4.0, size: int = 20, rank: int = 2, seen: int = 64) -> Problem:
    """The same from comparisons of two entries of a row (Bayesian personalised ranking): found up to a constant a row."""

    def loss(params, instance, chosen):
        i, j, k = chosen
        found = jnp.sum(params["u"][i] * (params["v"][j] - params["v"][k]), -1)
        wanted = jax.nn.sigmoid(instance["truth"][i, j] - instance["truth"][i, k])
        return jnp.mean(optax.sigmoid_binary_cross_entropy(found, wanted))

    def error(params, instance):
        centred = (x - x.mean(1, keepdims=True) for x in (_product(params), instance["truth"]))
        return _relative(*centred)

    draw = functools.partial(_draw_matrix, size=size, rank=rank, condition=condition)
    claim = "as for squared errors (measured there, not proved)"
    return Problem(draw, _choice((3, seen), size), loss, error, 0.1, SCALED_SGD, claim)


def sensing(size: int = 12, rank: int = 2, seen: int = 32) -> Problem:
    """A matrix from 10 (2 n r) inner products with normal matrices, started from the mean of these times the products."""
    count = 10 * 2 * size * rank

    def draw(key):
        truth, sensors = jax.random.split(key)
        matrix = low_rank(truth, size, rank, 2.0)
        sensors = jax.random.normal(sensors, (count, size, size))
        seen = jnp.einsum("kij,ij->k", sensors, matrix)
        u, s, v = jnp.linalg.svd(jnp.einsum("k,kij->ij", seen, sensors) / count)
        root = jnp.sqrt(s[:rank])
        start = {"u": u[:, :rank] * root, "v": v[:rank].T * root}
        return {"truth": matrix, "sensors": sensors, "seen": seen, "start": start}

    def loss(params, instance, chosen):
        found = jnp.einsum("kij,ij->k", instance["sensors"][chosen], _product(params))
        return jnp.mean((found - instance["seen"][chosen]) ** 2) / 2

    claim = "gradient descent from a spectral start converges linearly to the truth"
    return Problem(draw, _choice((seen,), count), loss, _matrix_error, 0.02, OVERVIEW, claim)


def phase_retrieval(size: int = 32, seen: int = 32) -> Problem:
    """A vector from 10 n squared inner products, up to its sign, from a random start."""
    count = 10 * size

    def draw(key):
        truth, sensors, start = jax.random.split(key, 3)
        x = jax.random.normal(truth, (size,))
        sensors = jax.random.normal(sensors, (count, size))
        return {"truth": x, "sensors": sensors, "start": {"x": jax.random.normal(start, (size,))}}

    def loss(params, instance, chosen):
        a = instance["sensors"][chosen]
        return jnp.mean(((a @ params["x"]) ** 2 - (a @ instance["truth"]) ** 2) ** 2) / 4

    def error(params, instance):
        x, truth = params["x"], instance["truth"]
        return jnp.minimum(_relative(x, truth), _relative(-x, truth))

    claim = "gradient descent from a random start converges, without any special initialisation"
    return Problem(draw, _choice((seen,), count), loss, error, 0.02, OVERVIEW, claim)


# ---- blind demixing: complex numbers as pairs ------------------------------------------------------------------------


def complex_of(pairs: jax.Array) -> jax.Array:
    """`(..., 2)` real numbers as `(...)` complex ones."""
    return pairs[..., 0] + 1j * pairs[..., 1]


def pairs_of(numbers: jax.Array) -> jax.Array:
    """`(...)` complex numbers as `(..., 2)` real ones."""
    return jnp.stack([numbers.real, numbers.imag], -1)


def demixing(users: int = 2, size: int = 6, count: int = 240, seen: int = 32) -> Problem:
    """Channels h and signals x of several users from sums of b* h x* a over them, from a spectral start."""

    def normal(key, shape):
        return complex_of(jax.random.normal(key, (*shape, 2))) / jnp.sqrt(2)

    def measured(h, x, b, a):
        return jnp.einsum("mk,uk,ul,mul->m", b.conj(), h, x.conj(), a)

    def draw(key):
        keys = jax.random.split(key, 4)
        h, x = normal(keys[0], (users, size)), normal(keys[1], (users, size))
        b, a = normal(keys[2], (count, size)), normal(keys[3], (count, users, size))
        y = measured(h, x, b, a)
        u, s, v = jnp.linalg.svd(jnp.einsum("m,mk,mul->ukl", y, b, a.conj()) / count)
        root = jnp.sqrt(s[:, :1])
        start = {"h": pairs_of(u[:, :, 0] * root), "x": pairs_of(v[:, 0].conj() * root)}
        data = {name: pairs_of(value) for name, value in {"a": a, "b": b, "y": y, "h": h, "x": x}.items()}
        return data | {"start": start}

    def loss(params, instance, chosen):
        b, a, y = (complex_of(instance[name][chosen]) for name in "bay")
        missed = measured(complex_of(params["h"]), complex_of(params["x"]), b, a) - y
        return jnp.mean(missed.real**2 + missed.imag**2)

    def error(params, instance):
        found, truth = (complex_of(p["h"])[:, :, None] * complex_of(p["x"]).conj()[:, None] for p in (params, instance))
        return jnp.sqrt(jnp.sum(jnp.abs(found - truth) ** 2) / jnp.sum(jnp.abs(truth) ** 2))

    claim = "Wirtinger flow from a spectral start converges linearly, without regularisation"
    return Problem(draw, _choice((seen,), count), loss, error, 0.02, "Dong and Shi, 2018 (arXiv:1809.06796)", claim)


# ---- networks and regression -----------------------------------------------------------------------------------------


def relu(units: int = 8, teachers: int = 3, size: int = 5, count: int = 64, seen: int = 16) -> Problem:
    """A network of two layers that shall be a smaller one, started where three of its units are zero on three examples.

    There the loss has no derivative. JAX's gradient of a ReLU at zero is zero.
    """

    def draw(key):
        keys = jax.random.split(key, 5)
        inputs = jax.random.normal(keys[0], (count, size))
        teacher, sign = jax.random.normal(keys[1], (teachers, size)), jax.random.rademacher(keys[2], (teachers,))
        inner, outer = jax.random.normal(keys[3], (units, size)), jax.random.normal(keys[4], (units,))
        basis, _ = jnp.linalg.qr(inputs[:3].T)
        inner = inner.at[:3].add(-inner[:3] @ basis @ basis.T)  # orthogonal to the first three examples
        start = {"inner": inner / jnp.sqrt(size), "outer": outer / jnp.sqrt(units)}
        return {"inputs": inputs, "outputs": jax.nn.relu(inputs @ teacher.T) @ sign, "start": start}

    def missed(params, inputs, outputs):
        return jax.nn.relu(inputs @ params["inner"].T) @ params["outer"] - outputs

    def loss(params, instance, chosen):
        return jnp.mean(missed(params, instance["inputs"][chosen], instance["outputs"][chosen]) ** 2) / 2

    def error(params, instance):
        wrong = missed(params, instance["inputs"], instance["outputs"])
        return jnp.linalg.norm(wrong) / jnp.linalg.norm(instance["outputs"])

    claim = "a point where the loss has no derivative can be told to be a local minimum or to have a descent direction"
    return Problem(
        draw, _choice((seen,), count), loss, error, 0.1, "Yun, Sra and Jadbabaie, 2019 (arXiv:1809.10858)", claim
    )


def regression(kind: str, size: int = 50, seen: int = 8) -> Problem:
    """A line from data whose noise is of Student's t with two degrees of freedom: it has a mean, and no variance.

    Args:
      kind: "squared" errors, whose gradient has that noise, or "huber", whose gradient is bounded.
      size: Coefficients.
      seen: Examples for each worker and step.
    """

    def draw(key):
        return {"truth": jax.random.normal(key, (size,)), "start": {"w": jnp.zeros(size)}}

    def batch(key):
        inputs, normal, square = jax.random.split(key, 3)
        noise = jax.random.normal(normal, (seen,)) / jnp.sqrt(jax.random.exponential(square, (seen,)))
        return jax.random.normal(inputs, (seen, size)), noise

    def loss(params, instance, batch):
        x, noise = batch
        missed = x @ (params["w"] - instance["truth"]) - noise
        return jnp.mean({"squared": optax.squared_error, "huber": optax.huber_loss}[kind](missed))

    def error(params, instance):
        return _relative(params["w"], instance["truth"])

    claim = "signs need no bound on the noise's variance; SGD on squared errors does"
    return Problem(draw, batch, loss, error, 0.1, "heavy tails: Bernstein et al., 2019 (arXiv:1810.05291)", claim)


PROBLEMS: Mapping[str, Problem] = {
    "chain4": chain(4),
    "chain12": chain(12),
    "completion1": completion(1.0),
    "completion30": completion(30.0),
    "one_bit": one_bit_completion(),
    "pairwise": pairwise_completion(),
    "sensing": sensing(),
    "phase": phase_retrieval(),
    "demixing": demixing(),
    "relu": relu(),
    "squared_tails": regression("squared"),
    "huber_tails": regression("huber"),
}
