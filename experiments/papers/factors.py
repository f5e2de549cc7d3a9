"""Products: a matrix as a product of two factors whose condition grows, and a number as one of more and more."""

from collections.abc import Callable, Iterator

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.common import runners
from experiments.common.records import Record
from experiments.papers import problems
import signopt

AXIS = runners.AXIS
CONDITIONS, DEPTHS = (1.0, 4.0, 16.0, 64.0), (2, 4, 8, 12, 16)


def scaled(damping: float = 1e-6) -> optax.GradientTransformation:
    """ScaledSGD: the gradient of each factor times the inverse of the other factor's Gram matrix."""

    def precondition(updates, params):
        def by(gradient, other):
            gram = other.T @ other
            return jnp.linalg.solve(gram + damping * jnp.eye(len(gram)), gradient.T).T

        return {"u": by(updates["u"], params["v"]), "v": by(updates["v"], params["u"])}

    return optax.stateless(precondition)


METHODS: dict[str, Callable] = {
    "sgd": lambda rate: optax.chain(signopt.mean(AXIS), optax.sgd(rate)),
    "scaled, mean": lambda rate: optax.chain(scaled(), signopt.mean(AXIS), optax.sgd(rate)),
    "signsgd": lambda rate: signopt.signsgd(rate, axis_name=AXIS, wire="psum"),
    "scaled, vote": lambda rate: optax.chain(scaled(), signopt.signsgd(rate, axis_name=AXIS, wire="psum")),
    "scaled, ef_signsgd": lambda rate: optax.chain(scaled(), signopt.ef_signsgd(rate, axis_name=AXIS, num_workers=4)),
}


def _steps(draw, problem_of, make, rates, settings, seeds, steps, decays):
    """Steps until the error stays at the target: shape (rates, settings, seeds); inf if it does not."""

    def one(rate, setting, seed):
        first, second = jax.random.split(jax.random.key(seed))
        problem, instance = problem_of(setting), draw(first, setting)
        tx = make(optax.exponential_decay(rate, steps // 10, 0.4) if decays else rate)

        def step(state, batch):
            params, opt_state = state
            own = jax.tree.map(lambda x: x[0], batch)
            gradients = jax.grad(lambda p: problem.loss(p, instance, own))(params)
            updates, opt_state = tx.update(gradients, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), None

        together = signopt.workers.simulate(step, 4, axis_name=AXIS)

        def body(state, number):
            keys = jax.random.split(jax.random.fold_in(second, number), 4)
            state, _ = together(state, jax.vmap(problem.batch)(keys))
            error = problem.error(state[0], instance)
            return state, jnp.isfinite(error) & (error <= problem.target)

        start = instance["start"]
        _, good = lax.scan(body, (start, tx.init(start)), jnp.arange(steps))
        last_bad = jnp.max(jnp.where(good, 0, jnp.arange(1, steps + 1)))
        return jnp.where(last_bad < steps, last_bad + 1, jnp.inf)

    over_seeds = jax.vmap(one, (None, None, 0))
    over_settings = jax.vmap(over_seeds, (None, 0, None))
    return np.asarray(jax.jit(jax.vmap(over_settings, (0, None, None)))(rates, settings, seeds))


def conditions(seeds: int, steps: int = 2000) -> Iterator[Record]:
    """Steps to a tenth of the smallest singular value, by condition number, from near the truth.

    Yields:
      A record for each method and condition.
    """

    def draw(key, condition):
        instance = problems.completion(condition).draw(key)
        u, s, v = jnp.linalg.svd(instance["truth"])
        count = instance["start"]["u"].shape[1]
        exact = {"u": u[:, :count] * jnp.sqrt(s[:count]), "v": v[:count].T * jnp.sqrt(s[:count])}
        drift = jnp.sqrt(s[count - 1] / len(s))
        instance["start"] = jax.tree.map(lambda x, z: x + drift * z, exact, instance["start"])
        return instance

    rates = jnp.float32(2.0) ** jnp.arange(-9, 9)
    for line, make in METHODS.items():
        decays = line in ("signsgd", "scaled, vote")
        found = _steps(
            draw, problems.completion, make, rates, jnp.float32(CONDITIONS), jnp.arange(seeds + 1), steps, decays
        )
        for i, condition in enumerate(CONDITIONS):
            best = int(np.argmin(found[:, i, 0]))  # the first seed chooses
            own = found[best, i, 1:]
            yield {"line": line, "x": condition, "values": _finite(own), "learning_rate": float(rates[best])}


def depths(seeds: int, steps: int = 4000) -> Iterator[Record]:
    """Steps to a product of one, by the number of factors; every start has the best of its own learning rates.

    Yields:
      A record for each method and depth.
    """
    longest = problems.chain(max(DEPTHS))

    def draw(key, depth):
        start = longest.draw(key)["start"]["w"]
        counts = jnp.arange(len(start)) < depth
        return {"counts": counts, "start": {"w": jnp.where(counts, start, 1.0)}}

    def chain_of(depth):
        del depth

        def loss(params, instance, batch):
            return longest.loss({"w": jnp.where(instance["counts"], params["w"], 1.0)}, instance, batch)

        return longest._replace(loss=loss)

    methods = {name: METHODS[name] for name in ("sgd", "signsgd")}
    methods["adam"] = lambda rate: optax.chain(signopt.mean(AXIS), optax.adam(rate))
    rates = jnp.float32(2.0) ** jnp.arange(-10, 8)
    for line, make in methods.items():
        found = _steps(draw, chain_of, make, rates, jnp.asarray(DEPTHS), jnp.arange(seeds), steps, line != "sgd")
        for i, depth in enumerate(DEPTHS):
            best = found[:, i].min(0)
            values = [float(min(x, steps)) for x in best]
            yield {"line": line, "x": depth, "values": values, "capped": int((best > steps).sum())}


def _finite(values):
    return [float(x) for x in values if np.isfinite(x)]
