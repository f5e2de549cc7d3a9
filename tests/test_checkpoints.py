"""Training that is killed goes on as if it had not been, and nothing of another run is ever overwritten."""

import dataclasses
import os
import pathlib
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from experiments import __main__ as command
from experiments.common import checkpoints
from experiments.common import records
from experiments.common.checkpoints import CheckpointError
from experiments.training import train
import signopt

ROOT = pathlib.Path(command.__file__).parents[1]
RUN = "signum-one_bit"
SMALL = {"optimizer": ("signum",), "runner": "simulate", "seeds": 2, "steps": 30, "evaluate_every": 10}


def config(tmp_path, **settings):
    shared = {"checkpoint": str(tmp_path / "checkpoint"), "output": str(tmp_path / "out")}
    return dataclasses.replace(train.Config(), **(SMALL | shared | settings))


def untimed(found):
    return [{key: value for key, value in record.items() if key != "seconds"} for record in found]


def newest(tmp_path):
    return checkpoints.restore(tmp_path / "checkpoint" / RUN)


def stop_after(tmp_path, step, **settings):
    """Train up to the checkpoint at `step`, and no further."""
    for record in train.run(config(tmp_path, **settings)):
        if record["step"] == step:
            return


@pytest.fixture(scope="module")
def never_killed(tmp_path_factory):
    """A folder with the checkpoints of a run that went to its end."""
    folder = tmp_path_factory.mktemp("never_killed")
    list(train.run(config(folder)))
    return folder


@pytest.fixture(scope="module")
def stopped_once(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopped")
    stop_after(folder, 20)
    return folder


@pytest.fixture
def stopped(stopped_once, tmp_path):
    """A folder of one's own with the checkpoints of a run that stopped at step 20."""
    shutil.copytree(stopped_once, tmp_path, dirs_exist_ok=True)
    return tmp_path


def files(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_run_killed_in_mid_step_ends_bit_identical_to_one_that_never_was(tmp_path):
    """A real process on 8 host devices, a real SIGKILL."""
    settings = {"runner": "mesh", "seeds": 1, "steps": 400}
    flags = re.sub(r"--\S+device_count=\d+", "", os.environ["XLA_FLAGS"])  # the others decide about last bits
    environment = {key: value for key, value in os.environ.items() if key != "NPROC"} | {"XLA_FLAGS": flags}
    line = "--optimizer signum --runner mesh --seeds 1 --steps 400 --evaluate_every 10"
    folders = ["--checkpoint", str(tmp_path / "checkpoint"), "--output", str(tmp_path / "out")]
    process = subprocess.Popen(
        [sys.executable, "-m", "experiments", "train", *line.split(), *folders],
        cwd=ROOT,
        env=environment | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    begin = time.monotonic()
    while not (tmp_path / "checkpoint" / RUN / "30").exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() - begin < 300
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert 30 <= newest(tmp_path).step < 400  # it was killed in mid-run

    resumed = list(train.run(config(tmp_path, resume=True, **settings)))
    (tmp_path / "other").mkdir()
    never_killed = list(train.run(config(tmp_path / "other", **settings)))
    assert untimed(resumed) == untimed(never_killed)
    one, other = newest(tmp_path), newest(tmp_path / "other")
    assert one.step == other.step == 400
    assert [d["name"] for d in one.about["leaves"]] == [d["name"] for d in other.about["leaves"]]
    for a, b in zip(one.leaves, other.leaves, strict=True):
        np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8))
    momenta = [x for d, x in zip(one.about["leaves"], one.leaves, strict=True) if "ema" in d["name"]]
    assert momenta and all(x.shape[1] == 8 for x in momenta)
    assert any((x[:, 0] != x[:, 1]).any() for x in momenta)  # per worker, and kept so


def test_forgetting_the_momenta_of_all_but_worker_0_would_be_seen(stopped, never_killed, monkeypatch):
    """Negative control: what a checkpoint that keeps worker 0 only would do."""
    as_it_was = checkpoints.unflatten

    def forget(restored, like, folder):
        named = zip(restored.about["leaves"], restored.leaves, strict=True)
        kept = [np.broadcast_to(x[:, :1], x.shape) if "ema" in d["name"] else x for d, x in named]
        return as_it_was(restored._replace(leaves=kept), like, folder)

    states = {}
    for name, restore in {"whole": as_it_was, "worker 0": forget}.items():
        monkeypatch.setattr(checkpoints, "unflatten", restore)
        shutil.copytree(stopped / "checkpoint", stopped / name)
        list(train.run(config(stopped, checkpoint=str(stopped / name), resume=True)))
        states[name] = checkpoints.restore(stopped / name / RUN).leaves
    whole = checkpoints.restore(never_killed / "checkpoint" / RUN).leaves
    same = {name: all((a == b).all() for a, b in zip(x, whole, strict=True)) for name, x in states.items()}
    assert same == {"whole": True, "worker 0": False}


@pytest.mark.parametrize("workers", (6, 12))
def test_a_run_goes_on_with_another_number_of_workers(workers, tmp_path):
    settings = {"steps": 300, "evaluate_every": 100, "seeds": 3}
    stop_after(tmp_path, 100, **settings)
    before = newest(tmp_path)
    last = [*train.run(config(tmp_path, resume=True, workers=workers, **settings))][-3:]
    after = newest(tmp_path)
    shape = {d["name"]: tuple(d["shape"]) for d in after.about["leaves"]}
    assert {s[1] for name, s in shape.items() if "per_worker" in name} == {workers}
    assert {s[1] for name, s in ((d["name"], d["shape"]) for d in before.about["leaves"]) if "per_worker" in name} == {
        8
    }
    straight = [*train.run(config(tmp_path / "other", **settings))][-3:]
    accuracy = lambda ends: statistics.mean(record["test_accuracy"] for record in ends)
    # A difference of three seeds' means, each of deviation about 0.005: five standard errors.
    assert abs(accuracy(last) - accuracy(straight)) < 5 * 0.005 * (2 / 3) ** 0.5


def test_resizing_keeps_the_mean_momentum(stopped):
    saved = newest(stopped)
    momenta = [x for d, x in zip(saved.about["leaves"], saved.leaves, strict=True) if "ema" in d["name"]]
    state = signopt.workers.PerWorkerState([jnp.asarray(x[0]) for x in momenta], jnp.arange(8))
    for workers in (6, 12):
        resized = signopt.workers.resize(state, workers)
        for old, new in zip(state.per_worker, resized.per_worker, strict=True):
            assert new.shape == (workers, *old.shape[1:])
            scale = float(jnp.abs(old).mean())
            np.testing.assert_allclose(new.mean(0), old.mean(0), rtol=0, atol=16 * 2**-24 * max(scale, 1e-30) * 8)


def test_any_tree_comes_back_as_it_was(tmp_path):
    state = {
        "f": np.array([1.5, np.nan, -0.0], np.float32),
        "b": np.array([1.0, 2.0], ml_dtypes.bfloat16),
        "i": np.int32(7) * np.ones([], np.int32),
        "e": np.zeros((0, 3), np.float32),
    }
    checkpoints.save(tmp_path / "run", 3, state, {"more": [1, "x"]})
    found = checkpoints.restore(tmp_path / "run")
    assert found.step == 3
    assert found.about["more"] == [1, "x"]
    for name, x in checkpoints.unflatten(found, state, tmp_path).items():
        assert x.dtype == state[name].dtype and x.shape == state[name].shape
        assert x.tobytes() == state[name].tobytes()
    with pytest.raises(CheckpointError, match=r"step 3 .* holds another state: .*'dtype': 'float32'.*'float64'"):
        checkpoints.unflatten(found, state | {"f": np.zeros(3)}, tmp_path)


def test_only_the_newest_checkpoints_are_kept_and_unfinished_ones_are_ignored(never_killed, stopped):
    kept = lambda folder: sorted(int(path.name) for path in (folder / "checkpoint" / RUN).iterdir())
    assert (kept(never_killed), kept(stopped)) == ([20, 30], [10, 20])
    (stopped / "checkpoint" / RUN / "30.orbax-checkpoint-tmp").mkdir()  # what a kill in the middle of writing leaves
    assert newest(stopped).step == 20
    assert checkpoints.restore(stopped / "nothing") is None


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax's threads, on a missing file
@pytest.mark.parametrize("damage", ("truncate", "flip", "remove", "empty"))
def test_a_torn_checkpoint_is_an_error_and_nothing_is_overwritten(damage, stopped):
    (stopped / "out").mkdir()
    (stopped / "out" / records.FILE).write_text("precious")
    step = stopped / "checkpoint" / RUN / "20"
    largest = max((path for path in step.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    if damage == "truncate":
        largest.write_bytes(content[: len(content) // 2])
    elif damage == "flip":
        content[len(content) // 2] ^= 1
        largest.write_bytes(content)
    elif damage == "remove":
        largest.unlink()
    else:
        for path in step.rglob("*"):
            if path.is_file():
                path.write_bytes(b"")
    before = files(stopped)
    flags = [
        "--optimizer",
        "signum",
        "--runner",
        "simulate",
        "--seeds",
        "2",
        "--steps",
        "30",
        "--evaluate-every",
        "10",
        "--resume",
        "--checkpoint",
    ]
    with pytest.raises(SystemExit, match=rf"error: The checkpoint of step 20 in .*{RUN} is damaged .*Nothing was"):
        command.main(["train", *flags, str(stopped / "checkpoint"), "--output", str(stopped / "out")])
    assert files(stopped) == before
    if damage != "remove":  # the way out that the message names
        shutil.move(step, stopped / "away")
        assert newest(stopped).step == 10


def test_a_foreign_folder_is_refused_and_nothing_is_overwritten(tmp_path):
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "thesis.tex").write_text("precious")
    before = files(tmp_path)
    for resume in (False, True):
        with pytest.raises(CheckpointError, match=r"has to be empty or to hold checkpoints, got other files there\."):
            train.run(config(tmp_path, resume=resume))
    assert files(tmp_path) == before


def test_another_run_s_folder_is_refused_and_nothing_is_overwritten(stopped):
    before = files(stopped)
    with pytest.raises(
        CheckpointError, match=r"holds the checkpoints of a run: go on with `--resume`, or name another"
    ):
        train.run(config(stopped))
    with pytest.raises(CheckpointError, match=re.escape("batch_size was 8 and is 4, steps was 30 and is 60.")):
        train.run(config(stopped, resume=True, steps=60, batch_size=4))
    assert files(stopped) == before
    (stopped / "checkpoint" / checkpoints.MANIFEST).write_text("{")
    with pytest.raises(CheckpointError, match=r"has an unreadable signopt\.json"):
        train.run(config(stopped, resume=True))


def test_flags_that_do_not_go_together_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"`--resume` has to come with `--checkpoint`"):
        train.run(config(tmp_path, checkpoint="", resume=True))
    with pytest.raises(
        CheckpointError, match=r"`--checkpoint` has to come with `--runner mesh` or `simulate`, got pmap"
    ):
        train.run(config(tmp_path, runner="pmap"))
    assert not (tmp_path / "checkpoint").exists()


def test_resuming_where_nothing_was_saved_starts_at_the_beginning(tmp_path):
    assert next(iter(train.run(config(tmp_path, resume=True, steps=1))))["step"] == 1
