"""Processes are really killed, one after another, and the others vote on."""

import functools
import json
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.common import data
from experiments.common import models
import one_survivor
import signopt
from signopt import workers
from signopt.workers.state import owners
from test_processes import TESTS
from test_processes import environment
from test_processes import free_port
from test_processes import output
from test_processes import started

PATIENCE = 300  # seconds


def saved(folder, step, i, process):
    """What process i wrote down after a step; waits for it."""
    file, end = folder / f"{step} of {i}.npz", time.monotonic() + PATIENCE
    while not file.exists():
        assert time.monotonic() < end and process.poll() in (None, 0), output(folder, i)
        time.sleep(0.1)
    with np.load(file) as found:
        return dict(found)


def run(folder, count, steps, kills):
    """Start processes and kill each of `kills` after its step; what the others found after each mark.

    Returns:
      A dictionary from the step of a kill, and the last, to what the survivors found there, by process.
    """
    marks, alive, found = [*kills, steps], set(range(count)), {}
    address = f"localhost:{free_port()}"
    commands = [
        [sys.executable, str(TESTS / "one_survivor.py"), json.dumps(about), str(folder), str(steps), json.dumps(marks)]
        for about in ({"coordinator_address": address, "num_processes": count, "process_id": i} for i in range(count))
    ]
    variables = environment(1)
    variables["XLA_FLAGS"] += " --xla_cpu_collective_timeout_seconds=60"
    with started(folder, commands, [variables] * count) as processes:
        for step in marks:
            found[step] = {i: saved(folder, step, i, processes[i]) for i in alive}
            if step in kills:
                processes[kills[step]].kill()
                alive.remove(kills[step])
        for i in alive:
            assert processes[i].wait(PATIENCE) == 0, output(folder, i)
    return found


def assert_survivors_agree(found, count):
    """At every mark: one number of workers, the same parameters, and momenta of their own."""
    for lost, (_, states) in enumerate(found.items()):
        states = list(states.values())
        assert {int(state["workers"]) for state in states} == {count - lost}
        for state in states[1:]:
            np.testing.assert_array_equal(state["params"], states[0]["params"])
            assert not np.array_equal(state["momentum"], states[0]["momentum"])


def test_survivors_vote_on_when_a_process_is_killed(tmp_path):
    found = run(tmp_path, 3, 40, {20: 1})
    assert_survivors_agree(found, 3)
    assert not np.array_equal(found[20][0]["params"], found[40][0]["params"])


@pytest.mark.slow
def test_processes_die_until_one_is_left(tmp_path):
    """They train as well as those that nobody disturbs: of 4,000 examples at most a twentieth is lost."""
    found = run(tmp_path, 4, 1000, {100: 3, 200: 1, 300: 2})
    assert_survivors_agree(found, 4)
    undisturbed, state = workers.simulate(one_survivor.make_step(4), 4, axis_name="worker"), one_survivor.init(4)
    for k in range(1000):
        state, _ = undisturbed(state, one_survivor.batch(k))
    expected, reached = one_survivor.accuracy(state[0]), one_survivor.accuracy(found[1000][0]["params"])
    print(f"accuracy {reached}, undisturbed {expected}")
    assert reached > max(expected - 0.05, 0.85)


# ---- what a lost worker remembered -----------------------------------------------------------------------------------


def residuals(num_workers):
    """Signum's momentum in scaled signs, with what they leave out kept by each worker."""
    border = signopt.mean("w", uplink=signopt.codecs.scaled_sign(block=256), memory="workers", num_workers=num_workers)
    momentum = workers.per_worker(optax.ema(0.9, debias=False), num_workers)
    return optax.chain(momentum, border, optax.sgd(0.3))


def momenta(num_workers):
    return signopt.signum(8e-3, 0.9, axis_name="w", num_workers=num_workers)


def without(lost, state, num_workers):
    """What `elastic` goes on from: the survivors' own."""
    rows = jnp.array([i for i in range(num_workers) if i != lost])
    leaf = {"shared": lambda x: x, "per_worker": lambda x: x[rows], "worker": lambda x: x[:-1]}
    return jax.tree.map(lambda x, owner: leaf[owner](x), state, owners(state))


def with_the_mean(lost, state, num_workers):
    """What nobody can: they know what the lost one had."""
    return workers.resize(state, num_workers - 1)


@functools.cache
def on_sorted_digits(make, num_workers):
    """The images, those of each of eight shards, the network, the optimizer, and a step of all workers."""
    digits = data.load("digits")
    net = models.network(models.MLP, digits.train_images.shape[1:])
    tx = make(num_workers)

    def step(state, batch):
        params, opt_state = state
        loss = functools.partial(models.loss, net)
        value, grads = workers.value_and_grad(loss, axis_name="w")(params, *batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value

    shards = np.array_split(np.argsort(digits.train_labels, kind="stable"), 8)
    return digits, shards, net, tx, workers.simulate(step, num_workers, axis_name="w")


def disturbed(make, lose, seed, kills=(300, 400, 500), looks=(310, 350, 600)):
    """Test accuracies at some steps of a training on eight workers, of whom three die. No example is lost."""
    count, rng, found = 8, np.random.default_rng(seed), []
    digits, shards, net, tx, run = on_sorted_digits(make, count)
    params = net.init(jax.random.key(seed))
    state = params, tx.init(params)
    for k in range(looks[-1]):
        if k in kills:
            state, count = lose(count // 2, state, count), count - 1
            *_, run = on_sorted_digits(make, count)
        chosen = np.concatenate([rng.choice(shard, 8) for shard in shards])[: 64 // count * count]
        state, _ = run(state, (digits.train_images[chosen], digits.train_labels[chosen]))
        if k + 1 in looks:
            test = map(jnp.asarray, (digits.test_images, digits.test_labels))
            found.append(float(models.accuracy(net, state[0], *test)))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("make", (momenta, residuals))
def test_what_a_lost_worker_remembered_is_not_missed(make):
    """Those who keep its mean, as `resize` does, label no more images right afterwards: less than one of 360."""
    lost, kept = (np.array([disturbed(make, lose, seed) for seed in range(5)]) for lose in (without, with_the_mean))
    gain = kept - lost
    error = gain.std(0, ddof=1) / np.sqrt(len(gain))
    print(f"{make.__name__}: lost {lost.mean(0)}, kept {kept.mean(0)}, gain {gain.mean(0)} +- {error}")
    assert (gain.mean(0) < np.maximum(5 * error, 1 / 360)).all()
    assert lost[:, -1].mean() > 0.7  # they do train


def test_without_recoverability_it_says_so():
    with pytest.raises(
        ValueError, match=r"`elastic\(...\)` has to be called where JAX goes on .*jax_enable_recoverability=False"
    ):
        workers.elastic(one_survivor.make_step, axis_name="worker")


@pytest.fixture
def recoverable():
    jax.config.update("jax_enable_recoverability", True)
    yield
    jax.config.update("jax_enable_recoverability", False)


def test_what_servers_remember_is_refused(recoverable):
    run = workers.elastic(one_survivor.make_step, axis_name="worker")
    state = signopt.ef_signsgd(0.1, axis_name="worker", num_workers=8).init(np.zeros(4, np.float32))
    with pytest.raises(
        ValueError, match=r"`elastic\(...\)` has to be given state that dies with nobody else's, got what servers"
    ):
        run(state, one_survivor.batch(0))
