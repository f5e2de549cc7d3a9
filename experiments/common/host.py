"""What runs on each host of `slow_network`, `hidden`, `bits` and `advised`, timed, with the bytes of its network card.

    python -m experiments.common.host COORDINATOR HOSTS INDEX

Reads orders from stdin, a JSON object a line with a name of `ORDERS` and its arguments, the same on every host,
and answers each with a JSON line on stdout.
"""

from collections.abc import Callable
import dataclasses
import functools
import json
import math
import os
import sys
import time
from typing import Any, cast
import zlib

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.common import advice
from experiments.common import compressed
from experiments.common import data
from experiments.common import models
from experiments.common import namespaces
from experiments.common import optimizers
from experiments.common import swaps
from experiments.common import text as texts
from experiments.common import ways
import signopt
from signopt import _bits
from signopt import _flat
from signopt import border
from signopt import vote
from signopt import wire
from signopt._tools import exchanges
from signopt._tools import links

AXIS = optimizers.AXIS
PAUSE = 0.01  # seconds between two exchanges
STEP = 1e-3  # by which a vote moves the values of the next one


def _mean(dtype):
    def border(values, state):
        return jax.tree.map(lambda x: lax.pmean(x.astype(dtype), AXIS).astype(x.dtype), values), state

    return border


def _int8_signs(values, state):
    sums = jax.tree.map(lambda x: lax.psum(jnp.sign(x).astype(jnp.int8), AXIS), values)
    return jax.tree.map(lambda s, x: jnp.sign(s).astype(x.dtype), sums, values), state


def _gathered_signs(values, state):
    """Everybody's packed ballots to everybody, as most others do; counted as fast as `majority_vote` does."""
    context = border.context_of(AXIS, state.count)
    everybody = lax.all_gather(vote.cast(values, "one_bit", context), AXIS)
    decided = vote.decision(_bits.count(everybody), "one_bit", len(everybody), jnp.int32(1), state.count)
    return _flat.unpack(decided, values), border.BorderState(state.count + 1)


# From this worker's values and the state of a vote to what all workers agree on, and the next state.
BORDERS: dict[str, Callable[..., tuple[Any, Any]]] = {
    "float32 mean": _mean(jnp.float32),
    "bfloat16 mean": _mean(jnp.bfloat16),
    "int8 sum of signs": _int8_signs,
    "bits gathered by all": _gathered_signs,
} | {wire: signopt.majority_vote(AXIS, wire=cast(vote.Wire, wire)).update for wire in ("psum", "two_bit", "one_bit")}
# The packed votes once more, with what two or four hosts have for their two collectives.
BORDERS |= {f"{wire}, swapped": swaps.instead(BORDERS[wire]) for wire in ("two_bit", "one_bit")}


# What a one-bit vote of few hosts is made of, from a row for each host, and what JAX has for the same.
COLLECTIVES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "all_to_all": lambda rows: lax.all_to_all(rows, AXIS, split_axis=0, concat_axis=0, tiled=True),
    "all_to_all, swapped": lambda rows: swaps.all_to_all(rows, (AXIS,)),
    "all_gather": lambda rows: lax.all_gather(rows[0], AXIS),
    "all_gather, swapped": lambda rows: swaps.all_gather(rows[0], (AXIS,)),
}


def mesh() -> jax.sharding.Mesh:
    """One worker on each host."""
    return jax.make_mesh((jax.device_count(),), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,))


def meet() -> None:
    """Wait until every host is here: what was sent before has arrived."""
    jax.block_until_ready(_meet()(_on_hosts(np.zeros((1, 1), np.float32))))


@functools.cache
def _meet():
    return jax.jit(jax.shard_map(lambda x: lax.psum(x, AXIS), mesh=mesh(), in_specs=jax.P(AXIS), out_specs=jax.P()))


def _on_hosts(tree):
    """Arrays of which every host has its own row."""
    own = jax.sharding.NamedSharding(mesh(), jax.P(AXIS))
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(own, x), tree)


def _placed(state):
    """A state that every host has whole, on the mesh: of what belongs to a worker, on each host its own."""
    return signopt.workers.place(state, mesh(), signopt.workers.partition_specs(state, AXIS))


@functools.cache
def _program(name, parameters, leaves):
    """A compiled vote, its first arguments, and a checksum of what it decides of them."""

    def body(values, state):
        decided, state = BORDERS[name](values, state)
        return jax.tree.map(lambda x, d: x - STEP * d, values, decided), state

    mapped = jax.shard_map(
        body,
        mesh=mesh(),
        in_specs=(jax.P(AXIS), jax.P()),
        out_specs=(jax.P(AXIS), jax.P()),
        check_vma=False,  # types would not let a plain all_gather end in shared state
    )
    compiled = jax.jit(mapped, donate_argnums=(0,))
    rng = np.random.default_rng(jax.process_index())
    sizes = [len(part) for part in np.array_split(np.empty(parameters, np.bool_), leaves)]
    first = [rng.standard_normal((1, size), np.float32) for size in sizes]
    values, state = compiled(_on_hosts(first), _placed(signopt.majority_vote(AXIS).init(first)))
    after = [np.asarray(x.addressable_data(0)) for x in values]
    decided = [np.rint((x - y) / STEP).astype(np.int8) for x, y in zip(first, after, strict=True)]
    return compiled, [values, state], zlib.crc32(b"".join(x.tobytes() for x in decided))


def votes(program: str, parameters: int, leaves: int, count: int) -> dict[str, Any]:
    """Hold votes back to back, each on values that the one before has moved.

    Args:
      program: The name of one of `BORDERS`.
      parameters: What a vote is about.
      leaves: How many arrays they are in.
      count: How many votes; 0 only compiles.

    Returns:
      The seconds and traffic of one on this host, and a checksum of what the very first decided.
    """
    compiled, carried, decided = _program(program, parameters, leaves)
    meet()
    before, begin = namespaces.counted(), time.perf_counter()
    for _ in range(count):
        carried[:] = compiled(*carried)
    jax.block_until_ready(carried)
    seconds = time.perf_counter() - begin
    meet()
    return {"seconds": seconds / max(count, 1), "decided": decided} | _traffic(before, max(count, 1))


@functools.cache
def _agreement(name, parameters):
    """A compiled exchange, its first arguments, and the bits that its collectives send."""
    border = compressed.way(name, AXIS, jax.device_count()).border

    def body(values, state):
        decided, state = border.update(values[0], state)
        return (values[0] - STEP * cast(jax.Array, decided))[None], state

    first = np.random.default_rng(jax.process_index()).standard_normal((1, parameters), np.float32)
    state = jax.jit(border.init)(first[0])
    specs = signopt.workers.partition_specs(state, AXIS)
    mapped = jax.shard_map(
        body, mesh=mesh(), in_specs=(jax.P(AXIS), specs), out_specs=(jax.P(AXIS), specs), check_vma=False
    )
    carried = [_on_hosts(first), _placed(state)]
    compiled = jax.jit(mapped, donate_argnums=(0, 1)).lower(*carried).compile()
    return compiled, carried, compressed.bits_in(cast(str, compiled.as_text()), jax.device_count())


def agree(program: str, parameters: int, count: int) -> dict[str, Any]:
    """Agree back to back, each time on values that the time before has moved.

    Args:
      program: One of `compressed.NAMES`.
      parameters: In one array.
      count: How many times.

    Returns:
      The seconds and traffic of one on this host, and the bits that the compiled program sends.
    """
    compiled, carried, bits = _agreement(program, parameters)
    carried[:] = compiled(*carried)
    jax.block_until_ready(carried)
    meet()
    before, begin = namespaces.counted(), time.perf_counter()
    for _ in range(count):
        carried[:] = compiled(*carried)
    jax.block_until_ready(carried)
    seconds = time.perf_counter() - begin
    meet()
    return {"seconds": seconds / count, "program_bits": bits} | _traffic(before, count)


def _traffic(before, count):
    """What this host's card has sent and received since then, for each of `count` times."""
    now = namespaces.counted()
    return {name: (getattr(now, name) - getattr(before, name)) / count for name in now._fields}


def late(collective: str, size: int, delay: float, at: float) -> dict[str, Any]:
    """Time one collective that host 0 joins late.

    Args:
      collective: The name of one of `COLLECTIVES`.
      size: The bytes that all hosts' shares have together.
      delay: Seconds by which host 0 is later than the others.
      at: When the others start, by `time.monotonic`, which is the same for all processes of a machine.

    Returns:
      The seconds between host 0's start, by the clock that all hosts share, and the end on this host.
    """
    compiled, values = _collective(collective, size)
    mine = at + (delay if jax.process_index() == 0 else 0.0)
    time.sleep(max(0.0, mine - time.monotonic() - 2e-3))
    while time.monotonic() < mine:
        pass
    jax.block_until_ready(compiled(values))
    return {"seconds": time.monotonic() - at - delay}


@functools.cache
def _collective(name, size):
    body = COLLECTIVES[name]
    mapped = jax.shard_map(
        lambda x: body(x[0])[None], mesh=mesh(), in_specs=jax.P(AXIS), out_specs=jax.P(AXIS), check_vma=False
    )
    hosts = jax.device_count()
    compiled, values = jax.jit(mapped), _on_hosts(np.zeros((1, hosts, size // hosts), np.uint8))
    jax.block_until_ready(compiled(values))
    return compiled, values


@functools.cache
def _training(optimizer, wire, learning_rate, width, validation):
    """The data, a network, its optimizer, a step on all hosts, and the accuracy that all agree on."""
    dataset = data.hold_out(data.load("digits")) if validation else data.load("digits")
    net = models.network(functools.partial(models.WideMLP, width=width), dataset.train_images.shape[1:])
    made = optimizers.RECIPES[optimizer].make(learning_rate, wire, jax.device_count())

    loss = functools.partial(models.loss, net)
    value_and_grad = signopt.workers.value_and_grad(loss, axis_name=AXIS)

    def step(state, batch):
        params, opt_state = state
        value, gradients = value_and_grad(params, *batch)
        updates, opt_state = made.update(gradients, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value

    run = signopt.workers.on_mesh(step, mesh(), axis_name=AXIS, donate=True)

    def share_of_accuracy(params, images, labels):
        return lax.pmean(models.accuracy(net, params, images, labels), AXIS)

    in_specs = (jax.P(), jax.P(AXIS), jax.P(AXIS))
    # Each host looks at its share of the test images.
    accuracy = jax.jit(
        jax.shard_map(share_of_accuracy, mesh=mesh(), in_specs=in_specs, out_specs=jax.P(), check_vma=False)
    )
    return dataset, net, made, run, accuracy


def train(
    optimizer: str,
    wire: str,
    learning_rate: float,
    width: int,
    batch_size: int,
    seed: int,
    target: float,
    evaluate_every: int,
    steps: int,
    validation: bool,
) -> dict[str, Any]:
    """Train a network until it has a test accuracy.

    Args:
      optimizer: The name of one of `optimizers.RECIPES`.
      wire: How votes travel.
      learning_rate: The same at every step.
      width: Of the network's hidden layers.
      batch_size: Examples per host and step.
      seed: Of the parameters and batches.
      target: The accuracy on test images at which to stop.
      evaluate_every: Steps between two looks at them.
      steps: At which to give up.
      validation: Test on the last fifth of the training images instead, to tune.

    Returns:
      Steps, seconds with all but compilation, the accuracy, and the traffic of a step on this host.
    """
    dataset, net, made, run, accuracy = _training(optimizer, wire, learning_rate, width, validation)
    hosts, me = jax.device_count(), jax.process_index()
    order = data.batches(seed, len(dataset.train_labels), hosts * batch_size, steps).reshape(steps, hosts, batch_size)
    each = len(dataset.test_labels) // hosts
    own = slice(me * each, (me + 1) * each)
    test = _on_hosts((dataset.test_images[own], dataset.test_labels[own]))

    def start():
        params = jax.jit(net.init)(jax.random.key(seed))
        return _placed((params, made.init(params)))

    def batch(i):
        chosen = order[i, me]
        return _on_hosts((dataset.train_images[chosen], dataset.train_labels[chosen]))

    state, _ = run(start(), batch(0))  # compiles
    jax.block_until_ready(accuracy(state[0], *test))
    state, done, reached = start(), 0, 0.0
    meet()
    before, begin = namespaces.counted(), time.perf_counter()
    while done < steps and reached < target:
        state, _ = run(state, batch(done))
        done += 1
        if done % evaluate_every == 0:
            reached = float(accuracy(state[0], *test))
    jax.block_until_ready(state)
    seconds = time.perf_counter() - begin
    meet()
    size = sum(x.size for x in jax.tree.leaves(state[0]))
    return {"steps": done, "seconds": seconds, "accuracy": reached, "parameters": size} | _traffic(before, done)


def link() -> dict[str, Any]:
    """What joins the hosts, as two numbers for each collective, and how fast one of them packs."""
    count, (small, large) = jax.device_count(), (2**12, 2**21)
    own = jax.make_mesh((count,), (links.AXIS,), axis_types=(jax.sharding.AxisType.Auto,))
    sums = [(wire.Message("psum", size),) for size in (small, large)]
    deals = [(wire.Message("all_to_all", size), wire.Message("all_gather", size // count)) for size in (small, large)]
    seconds = links.measured(own, [*sums, *deals], lambda: time.sleep(PAUSE))
    rounds = math.ceil(math.log2(count))

    def fitted(ends, messages):
        begin, end = ends
        speed = 16 * (count - 1) / count * (large - small) / max(end - begin, 1e-9)
        return exchanges.Cluster(count, speed, begin / messages, 0.0)._asdict()

    return {
        "sums": fitted(seconds[:2], 2 * rounds),
        "deals": fitted(seconds[2:], 1 + rounds),
        "rates": dataclasses.asdict(_rates()),
    }


def _rates():
    """The model's rates, as many times slower as a one-bit vote is here while all hosts hold one, each for itself."""
    size, model = 2**20, exchanges.Rates()
    tx = signopt.majority_vote(AXIS, wire="one_bit")

    def step(state, batch):
        params, opt_state = state
        updates, opt_state = tx.update(batch[0], opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    run = jax.jit(signopt.workers.simulate(step, 1, axis_name=AXIS), donate_argnums=0)
    held = [(jnp.zeros(size), tx.init(jnp.zeros(size)))]

    def once():
        held[0], _ = run(held[0], jnp.ones((1, size)))
        return held[0]

    slower = links.seconds_of(once) / exchanges.work_seconds(size, 1, "one_bit", model)
    # What a reduction adds is in the bandwidth of sums.
    return dataclasses.replace(model.times(slower), add=0.0)


@functools.cache
def _steps(way, width, layers, tokens):
    """A function of nothing that makes a step of a transformer, compiled, and the number of parameters."""
    shape = texts.Shape(layers=layers, width=width, context=tokens, workers=jax.device_count(), batch_size=1)
    params = texts.init(jax.random.key(0), shape)
    rng = np.random.default_rng(jax.process_index())
    windows = _on_hosts(rng.integers(0, texts.BYTES, (1, tokens + 1), np.uint8))
    size = sum(x.size for x in jax.tree.leaves(params))
    one = _stepping(way, shape.workers, params, windows)
    jax.block_until_ready(one())
    return one, size


def _stepping(way, workers, params, windows):
    """A step of some way, which keeps its state."""
    made = optax.with_extra_args_support(ways.optimizer(ways.modelled(way), AXIS, workers))
    value_and_grad = signopt.workers.value_and_grad(texts.loss, axis_name=AXIS)

    def step(state, windows):
        params, opt_state = state
        place = params if way in ways.PLAIN else signopt.local_params(opt_state, params)
        value, gradients = value_and_grad(place, windows)
        updates, opt_state = made.update(gradients, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value

    hidden = ways.overlaps(way)
    run = signopt.workers.on_mesh(step, mesh(), axis_name=AXIS, donate=not hidden, check_vma=False, hidden=hidden)
    held = [_placed((params, made.init(params)))]

    def one():
        held[0], _ = run(held[0], windows)
        return held[0]

    return one


def steps(way: str, width: int, layers: int, tokens: int, count: int) -> dict[str, Any]:
    """Make steps of a byte transformer back to back.

    Args:
      way: Whether workers exchange, what, how often and when; a name of `ways.optimizer`.
      width: Of the transformer.
      layers: Its blocks.
      tokens: Bytes that a host learns from in a step.
      count: How many steps; 0 only compiles.

    Returns:
      The seconds and traffic of one on this host, and the number of parameters.
    """
    meet()  # so that none waits for others that still compile, when it first connects
    one, size = _steps(way, width, layers, tokens)
    meet()
    before, begin = namespaces.counted(), time.perf_counter()
    last = None
    for _ in range(count):
        last = one()
    jax.block_until_ready(last)
    seconds = time.perf_counter() - begin
    meet()
    return {"seconds": seconds / max(count, 1), "parameters": size} | _traffic(before, max(count, 1))


ORDERS = {
    "votes": votes,
    "agree": agree,
    "late": late,
    "train": train,
    "link": link,
    "steps": steps,
    "advise": advice.advise,
    "choice": advice.choice,
}


def main(coordinator: str, hosts: int, index: int) -> None:
    """Join the other hosts and do what stdin says."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print there
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(coordinator, hosts, index)
    for line in sys.stdin:
        order = json.loads(line)
        print(json.dumps(ORDERS[order.pop("do")](**order)), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
