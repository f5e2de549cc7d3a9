"""Real processes, joined by `jax.distributed`: they train as one does, and say so when they cannot."""

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.common import checkpoints
from experiments.common import processes as joining
from experiments.common import records
from experiments.training import train
import one_process
from signopt import workers
from signopt.workers import check as processes

TESTS = pathlib.Path(__file__).parent
ROOT = TESTS.parent
PATIENCE = 600  # seconds, for a machine with far more to do
HEARTBEAT = 10


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def environment(devices, **variables):
    """This process's, with so many host devices and nothing of a cluster that it may run on itself."""
    of_clusters = ("JAX_COORDINATOR", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "SLURM_", "OMPI_", "KUBERNETES_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(of_clusters)}
    flags = re.sub(
        r"(device_count)=\d+", rf"\1={devices}", os.environ["XLA_FLAGS"]
    )  # the others decide about last bits
    path = os.pathsep.join(map(str, (ROOT, TESTS)))
    return kept | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "NPROC": "16", "PYTHONPATH": path} | variables


@contextlib.contextmanager
def started(folder, commands, environments):
    """Processes whose output goes to files of a folder; none of them outlives the block."""
    with contextlib.ExitStack() as files:
        found = []
        for i, (command, variables) in enumerate(zip(commands, environments, strict=True)):
            output = files.enter_context((folder / f"output {i}").open("w"))
            found.append(
                subprocess.Popen(command, cwd=ROOT, env=variables, stdout=output, stderr=subprocess.STDOUT, text=True)
            )
        try:
            yield found
        finally:
            for process in found:
                process.kill()
                process.wait()


def output(folder, i):
    return (folder / f"output {i}").read_text(errors="replace")


def one_of(count, job, folder, *rest):
    """The command of each process that does a job of `one_process`."""
    address = f"localhost:{free_port()}"
    for i in range(count):
        about = {"coordinator_address": address, "num_processes": count, "process_id": i}
        about["heartbeat_timeout_seconds"] = HEARTBEAT if job == "train_for_ever" else 100
        yield [sys.executable, "-c", one_process.START, json.dumps(about), job, str(folder), *rest]


def finish(folder, commands, environments):
    with started(folder, commands, environments) as found:
        for i, process in enumerate(found):
            assert process.wait(PATIENCE) == 0, output(folder, i)


# ---- one result ------------------------------------------------------------------------------------------------------

ON_TWO = ("on_mesh", "on_mesh, unchecked", "pmap")
ON_FOUR = ("on_mesh, two axes", "pmap")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two processes with four devices each found."""
    folder = tmp_path_factory.mktemp("two")
    finish(folder, [*one_of(2, "everything", folder, *ON_TWO)], [environment(4)] * 2)
    return folder


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    folder = tmp_path_factory.mktemp("four")
    finish(folder, [*one_of(4, "runners", folder, *ON_FOUR)], [environment(2)] * 4)
    return folder


@pytest.fixture(scope="module")
def one():
    """The bytes of every leaf where this process trained alone on eight devices, and where batches were dealt otherwise."""
    state, run = one_process.on_mesh()
    return one_process.as_bytes(one_process.train(state, run)), one_process.as_bytes(one_process.train(state, run, 2))


def trained(folder, name, process):
    with np.load(folder / f"{name} {process}.npz") as leaves:
        return [leaves[key] for key in leaves.files]


def same(one, other):
    return [a.tobytes() == b.tobytes() for a, b in zip(one, other, strict=True)]


@pytest.mark.parametrize("name", ON_TWO)
def test_two_processes_of_four_devices_give_the_bits_of_one_of_eight(name, two, one):
    for process in range(2):
        assert all(same(trained(two, name, process), one[0]))


@pytest.mark.parametrize("name", ON_FOUR)
def test_four_processes_of_two_devices_give_the_bits_of_one_of_eight(name, four, one):
    for process in range(4):
        assert all(same(trained(four, name, process), one[0]))


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.slow
def test_processes_that_swap_large_messages_decide_what_one_does(count, devices, tmp_path):
    finish(tmp_path, [*one_of(count, "large_votes", tmp_path)], [environment(1)] * count)
    alone = one_process.large(devices[:count])
    for process in range(count):
        assert all(same(trained(tmp_path, "large", process), alone))
    assert {-1, 1} <= set(alone[0].view(np.int8)[:100].tolist())


def test_a_process_that_got_another_s_batches_would_be_seen(two, one):
    """Negative control of the two tests above: the votes would be the same, but not whose momentum is whose."""
    assert not all(same(trained(two, "on_mesh", 0), one[1]))


# ---- what differs is said before the first step ----------------------------------------------------------------------

ALIKE = r"`on_mesh\(\.\.\.\)` has to be given the same on every process, with the same versions, got "
SAID = {
    "a dtype": r"`state\[0\]\['w'\]` float32\[3\] on process 0 and bfloat16\[3\] on process 1",
    "a shape": r"`state\[0\]\['w'\]` float32\[3\] on process 0 and float32\[4\] on process 1",
    "a leaf": r"`state\[0\]\['b'\]` missing on process 0 and float32\[3\] on process 1",
    "values": r"the values of `state\[0\]\['w'\]` \w{8} on process 0 and \w{8} on process 1\. Start all",
    "weakly typed values": r"the values of `state\[0\]\['w'\]` \w{8} on process 0 and \w{8} on process 1",
    "the batch": r"`batch\['label'\]` int32\[8\] on process 0 and int32\[16\] on process 1",
    "a version": r"optax [\d.]+ on process 0 and 0\.0\.1 on process 1\. Start all processes from the same code",
    "the learning rate": r"the compiled step \(its code, wire and constants\) \w{16} on process 0 and \w{16} on process 1",
    "the wire": r"the compiled step \(its code, wire and constants\) \w{16} on process 0 and \w{16} on process 1",
}


def said(folder, case):
    found = [json.loads((folder / f"said {process}.json").read_text())[case] for process in range(2)]
    assert found[0] == found[1]  # every process says it
    return found[0]


@pytest.mark.parametrize("case", SAID)
def test_on_mesh_names_what_another_process_was_given_on_every_process(case, two):
    assert pytest.raises(ValueError, match=ALIKE + SAID[case]).matches(ValueError(said(two, case)))


@pytest.mark.parametrize(
    "case",
    (
        "nothing",
        "three steps",
        "trees alike",
        "replicas alike",
        "placed replicas alike",
        "own mesh",
        "local batches",
        "still alive",
    ),
)
def test_nothing_is_said_where_nothing_differs(case, two):
    assert said(two, case) is None


def test_processes_that_are_not_compared_train_on_apart(two):
    """Negative control: two learning rates, and only the replicas show it."""
    assert "got others at `state[0]['w']` on cpu:" in said(two, "not compared")


def test_assert_alike_compares_the_trees_of_a_loop_of_one_s_own(two):
    assert "`assert_alike(...)` has to be given the same" in said(two, "trees")
    assert "`state['w']` float32[3] on process 0 and float32[4] on process 1" in said(two, "trees")


def test_replicas_on_the_devices_of_two_processes_are_compared(two):
    assert "got others at `state['w']` on cpu:2049 than on 7 of 8 devices" in said(two, "replicas")
    assert "got others at `state[0]['w']` on cpu:2049 than on 7 of 8 devices" in said(two, "placed replicas")


# ---- in one process --------------------------------------------------------------------------------------------------


def test_one_process_has_nobody_to_compare_with():
    assert workers.assert_alike(state={"w": jnp.zeros(3)}) is True


def test_what_is_written_down_names_versions_and_leaves():
    about = processes.describe(state={"w": jnp.zeros((3, 4), jnp.bfloat16)}, batch=[np.zeros(2, np.int8)])
    assert about["jax"] == jax.__version__
    assert about["`state['w']`"] == "bfloat16[3,4]"
    assert about["`batch[0]`"] == "int8[2]"
    one, other = (processes.values(state={"w": jnp.array([1.0, x])}) for x in (2.0, np.nextafter(2, 3, dtype="f")))
    assert [*one] == ["the values of `state['w']`"]
    assert one != other


def test_where_callbacks_lie_makes_no_other_program():
    def lowered(callback):
        step = lambda x: jax.pure_callback(callback, jax.ShapeDtypeStruct((), jnp.float32), x) * 2
        return jax.jit(step).lower(jnp.float32(1)).as_text()

    one, other = lowered(lambda x: x), lowered(lambda x: x)
    assert processes.digest(one) == processes.digest(other)
    assert processes.digest(one) != processes.digest(one.replace("2.0", "3.0"))


# ---- a process that dies ---------------------------------------------------------------------------------------------

REASONS = (
    "Connection closed by peer",
    "Connection reset by peer",
    "heartbeat",
    "JAX distributed service detected fatal errors",
)


@pytest.mark.parametrize(
    ("victim", "how"),
    [
        (1, signal.SIGKILL),
        pytest.param(0, signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param(1, signal.SIGSTOP, marks=pytest.mark.slow),
    ],
    ids=("a process is killed", "the coordinator is killed", "a process stands still"),
)
def test_the_others_end_with_an_error_in_time(victim, how, tmp_path):
    """In less than JAX's own 100 seconds, so that it is the setting which counts."""
    with started(tmp_path, [*one_of(3, "train_for_ever", tmp_path)], [environment(1)] * 3) as found:
        begin = time.monotonic()
        while not all((tmp_path / f"trains {i}").exists() for i in range(3)):
            assert all(process.poll() is None for process in found), [output(tmp_path, i) for i in range(3)]
            assert time.monotonic() - begin < PATIENCE
            time.sleep(0.05)
        found[victim].send_signal(how)
        begin = time.monotonic()
        for i, process in enumerate(found):
            if i != victim:
                assert process.wait(90 - (time.monotonic() - begin)) != 0
                assert any(reason in output(tmp_path, i) for reason in REASONS)


# ---- python -m experiments train --distributed -----------------------------------------------------------------------

COMMAND = [sys.executable, "-m", "experiments", "train", "--distributed", "--optimizer", "signum", "--seeds", "1"]
SMALL = train.Config(optimizer=("signum",), seeds=1, steps=20, evaluate_every=10, workers=4)
STEPS = ["--steps", "20", "--evaluate-every", "10"]


def untimed(found):
    return [{key: value for key, value in record.items() if key != "seconds"} for record in found]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A run of four workers in this process: its records, a copy of its first checkpoint, and its last."""
    folder = tmp_path_factory.mktemp("alone")
    found = []
    for record in train.run(dataclasses.replace(SMALL, checkpoint=str(folder / "last"))):
        if not found:
            shutil.copytree(folder / "last", folder / "first")
        found.append(record)
    return found, folder


def test_processes_go_on_from_a_checkpoint_of_one_and_end_with_its_bits(alone, tmp_path):
    """Plain processes: the environment names the coordinator. Two with two devices each are four workers."""
    expected, folder = alone
    shutil.copytree(folder / "first", tmp_path / "checkpoint")
    flags = [*STEPS, "--checkpoint", str(tmp_path / "checkpoint"), "--resume", "--output", str(tmp_path)]
    address = {"JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}", "JAX_NUM_PROCESSES": "2"}
    finish(tmp_path, [COMMAND + flags] * 2, [environment(2, **address, JAX_PROCESS_ID=str(i)) for i in range(2)])
    header, *found = records.read(tmp_path / records.FILE)
    assert (header["config"]["workers"], header["processes"]) == (4, 2)
    assert untimed(found) == untimed(expected)
    one, other = (checkpoints.restore(path / "signum-one_bit") for path in (tmp_path / "checkpoint", folder / "last"))
    assert one is not None and other is not None and one.step == other.step == 20
    assert all(same(one.leaves, other.leaves))
    assert (tmp_path / "accuracy.png").stat().st_size > 10_000
    assert ["test accuracy" in output(tmp_path, i) for i in range(2)] == [True, False]  # one table
    assert ["steps" in output(tmp_path, i) for i in range(2)] == [True, False]  # one progress bar


def test_slurm_s_variables_are_enough(alone, tmp_path):
    """As `srun` sets them; here under `jax.pmap`."""
    shared = {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_NODES": "1"}
    shared |= {"JAX_COORDINATOR_PORT": str(free_port())}
    each = [shared | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)} for i in range(2)]
    flags = [*STEPS, "--runner", "pmap", "--output", str(tmp_path)]
    finish(tmp_path, [COMMAND + flags] * 2, [environment(2, **own) for own in each])
    assert untimed(records.read(tmp_path / records.FILE)[1:]) == untimed(alone[0])


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="`mpirun` is not installed (Debian: openmpi-bin)")
def test_open_mpi_is_enough(alone, tmp_path):
    launcher = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "2"]
    finish(tmp_path, [launcher + COMMAND + STEPS + ["--output", str(tmp_path)]], [environment(2)])
    header, *found = records.read(tmp_path / records.FILE)
    assert (header["config"]["workers"], header["processes"]) == (4, 2)
    assert untimed(found) == untimed(alone[0])


def test_a_process_that_finds_no_others_says_what_to_do(tmp_path):
    done = subprocess.run(COMMAND, cwd=ROOT, env=environment(1), capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 1
    assert "error: `--distributed` cannot join other processes: coordinator_address should be defined." in done.stderr
    assert "set JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES and JAX_PROCESS_ID" in done.stderr


def test_workers_that_do_not_fit_the_processes_are_refused(monkeypatch):
    assert joining.workers(0) == jax.device_count() == 8
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    assert joining.workers(4) == 4
    for asked in (6, 12):
        with pytest.raises(joining.ProcessError, match=rf"`--workers {asked}` has to be a multiple of the 4 processes"):
            joining.workers(asked)
    with pytest.raises(joining.ProcessError, match=r"`--runner mesh` or `pmap`, got simulate"):
        train.run(train.Config(distributed=True, runner="simulate"))
