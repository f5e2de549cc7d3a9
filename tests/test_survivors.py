"""Processes are really killed, one after another, and the others vote on."""

import json
import sys
import time

import jax
import numpy as np
import pytest

import one_survivor
import signopt
from signopt import workers
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
