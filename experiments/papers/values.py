"""Steps from function values alone: how many evaluations they need, as the dimension grows."""

from collections.abc import Iterator
import functools

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.common import runners
from experiments.common.records import Record
import signopt

AXIS = runners.AXIS
SPARSE, DIRECTIONS, SMOOTHING, TARGET = 4, 32, 1e-3, 0.1
DIMENSIONS = (16, 128, 1024)


def truncated(size: int) -> optax.GradientTransformation:
    """After a step keep so many of the largest parameters: the projection onto sparse vectors."""

    def keep(x):
        least = lax.top_k(jnp.abs(x), size)[0][-1]
        return jnp.where(jnp.abs(x) >= least, x, 0)

    return signopt.prox_step(signopt.prox.from_projection(keep), 1.0)


@functools.partial(jax.jit, static_argnames=("kind", "size", "steps"))
def distances(kind: str, size: int, rates: jax.Array, seeds: jax.Array, *, steps: int) -> jax.Array:
    """The loss after each step over the first: shape (rates, seeds, steps)."""
    truth = jnp.zeros(size).at[: size if kind == "all coordinates" else SPARSE].set(1.0)
    matter = jnp.where((jnp.arange(size) < SPARSE) | (kind != "few coordinates matter"), 1.0, 0.0)

    def loss(x):
        return jnp.sum(matter * (x - truth) ** 2) / 2

    def one(rate, seed):
        links = (truncated(2 * SPARSE),) if kind == "few are not zero, truncated" else ()
        signs = (signopt.scale_by_sign(),) if kind == "all coordinates, signs" else ()
        tx = optax.chain(*signs, optax.scale_by_learning_rate(rate), *links)
        start = jnp.zeros(size)

        def step(state, key):
            x, opt_state = state
            _, gradient = signopt.workers.zeroth_order_gradient(loss, SMOOTHING, DIRECTIONS, key)(x)
            updates, opt_state = tx.update(gradient, opt_state, x)
            x = optax.apply_updates(x, updates)
            return (x, opt_state), loss(x) / loss(start)

        return lax.scan(step, (start, tx.init(start)), jax.random.split(jax.random.key(seed), steps))[1]

    return jax.vmap(lambda rate: jax.vmap(lambda seed: one(rate, seed))(seeds))(rates)


def evaluations(seeds: int) -> Iterator[Record]:
    """Evaluations until a tenth of the loss is left, at the best of learning rates a factor of two apart.

    Yields:
      A record for each kind of problem and dimension.
    """
    kinds = ("all coordinates", "all coordinates, signs", "few coordinates matter", "few are not zero, truncated")
    for kind in kinds:
        for size in DIMENSIONS:
            middle = 0.1 if "signs" in kind else DIRECTIONS / (size + DIRECTIONS)
            if kind == "few coordinates matter":
                middle = 1.0
            rates = jnp.float32(middle) * 2.0 ** (jnp.arange(-6, 2) if "signs" in kind else jnp.arange(-4, 3))
            steps = 400 if "all" in kind else 100
            found = np.asarray(distances(kind, size, rates, jnp.arange(seeds + 1), steps=steps))
            took = np.where((found <= TARGET).any(-1), (found <= TARGET).argmax(-1) + 1, np.inf)
            best = int(np.argmin(took[:, 0]))  # the first seed chooses
            yield {
                "line": kind,
                "x": size,
                "values": [float(x) * (DIRECTIONS + 1) for x in took[best, 1:] if np.isfinite(x)],
                "learning_rate": float(rates[best]),
                "edge": best in (0, len(rates) - 1),
            }


def borders(seeds: int, workers: int = 8, size: int = 64, steps: int = 400) -> Iterator[Record]:
    """The loss that is left when slopes travel instead of gradients, for each border of the slopes.

    Yields:
      A record for each.
    """
    candidates = {
        "a float for each slope": (signopt.mean(AXIS), DIRECTIONS),
        "a bit for each slope": (signopt.majority_vote(AXIS, wire="one_bit"), DIRECTIONS),
        "a bit for the only slope": (signopt.majority_vote(AXIS, wire="one_bit"), 1),
        "votes on all coordinates": (None, DIRECTIONS),
    }
    for line, (border, count) in candidates.items():
        vote = signopt.signsgd if border is None else None

        def one(rate, seed, border=border, count=count, vote=vote):
            schedule = optax.linear_schedule(rate, 0.0, steps)
            tx = optax.sgd(schedule) if vote is None else vote(schedule, axis_name=AXIS, wire="one_bit")

            def step(state, noise):
                x, opt_state, key = state  # the key is the same on all workers

                def loss(x):
                    return jnp.mean((x - 1 - noise[0]) ** 2) / 2

                own = key if border is not None else jax.random.fold_in(key, lax.axis_index(AXIS))
                estimate = signopt.workers.zeroth_order_gradient(loss, SMOOTHING, count, own, border=border)
                _, gradient = estimate(x)
                updates, opt_state = tx.update(gradient, opt_state, x)
                return (optax.apply_updates(x, updates), opt_state, jax.random.fold_in(key, 0)), None

            together = signopt.workers.simulate(step, workers, axis_name=AXIS)

            def body(state, key):
                return together(state, 0.3 * jax.random.normal(key, (workers, size)))

            drawn, shared = jax.random.split(jax.random.key(seed))
            start = jnp.zeros(size), tx.init(jnp.zeros(size)), shared
            (x, _, _), _ = lax.scan(body, start, jax.random.split(drawn, steps))
            return jnp.mean((x - 1) ** 2)

        rates = jnp.float32(2.0) ** jnp.arange(-8, 8)
        found = np.asarray(jax.jit(jax.vmap(jax.vmap(one, (None, 0)), (0, None)))(rates, jnp.arange(seeds + 1)))
        best = int(np.nanargmin(np.where(np.isfinite(found[:, 0]), found[:, 0], np.inf)))
        sent = jnp.zeros(size if border is None else count)
        wire = "one_bit" if border is None else border
        bits = 8 * signopt.wire.bytes_sent(sent, workers, wire, axis_name=AXIS)
        yield {"line": line, "x": bits, "values": found[best, 1:].tolist(), "learning_rate": float(rates[best])}
