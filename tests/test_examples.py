"""Every script in examples/ runs: small here, and the two hosts as two processes."""

import json
import os
import pathlib
import runpy
import socket
import subprocess
import sys

import numpy as np
import pytest

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"


@pytest.fixture
def run(devices):
    """A script's `main`."""
    assert len(devices) == 8
    return lambda name, **settings: runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](**settings)


def test_every_example_is_short_and_tested_here():
    found = {path.stem for path in EXAMPLES.glob("*.py")}
    text = pathlib.Path(__file__).read_text(encoding="utf-8")
    assert found == {"fsdp_plain_jit", "imagenet_linen", "language_nnx", "local_steps_two_hosts", "log_votes"}
    assert all(text.count(f'"{name}"') >= 2 for name in found)
    assert all(len(path.read_text(encoding="utf-8").splitlines()) < 150 for path in EXAMPLES.glob("*.py"))


@pytest.mark.slow
def test_images_are_learned_and_a_training_that_was_stopped_goes_on(run, tmp_path):
    small = {"batch_size": 16, "size": 8, "channels": (8,), "folder": str(tmp_path)}
    first = run("imagenet_linen", steps=3, **small)
    more = run("imagenet_linen", steps=5, **small)
    assert len(first) == 3 and len(more) == 2 and np.isfinite(first + more).all()
    assert {"3", "5"} <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.slow
def test_a_language_model_has_metrics_and_a_margin(run):
    found = run("language_nnx", steps=2, batch_size=8, width=16, layers=1, context=8)
    assert set(found[-1]) == {"loss", "accuracy", "margin"}
    assert 5 < found[-1]["loss"] < 7 and 0 < found[-1]["margin"] < 1


def test_slices_vote_on_shards(run, capsys):
    losses = run("fsdp_plain_jit", steps=24, width=32, layers=1)
    assert np.mean(losses[-4:]) < 0.8 * losses[0]
    said = capsys.readouterr().out
    assert "share of the layers: (1, 8, 32)" in said and "momenta: (1, 1, 8, 32)" in said


def test_rounds_are_learned_from_on_one_host(run, capsys):
    losses = run("local_steps_two_hosts", steps=48, width=32)
    assert len(losses) == 3 and losses[-1] < 0.8 * losses[0]
    assert "bits per parameter and step" in capsys.readouterr().out


def test_what_is_logged_is_in_the_lines(run, tmp_path):
    last = run("log_votes", folder=str(tmp_path), steps=6)
    for name, found in last.items():
        *_, line = (tmp_path / name / "log.jsonl").read_text(encoding="utf-8").splitlines()
        assert json.loads(line) == {"step": 6} | found
        assert any(path.name.startswith("events") for path in (tmp_path / name).iterdir())
    assert last["vote"]["not_finite"] == 1 and 0 < last["vote"]["report/margin"] < 1
    assert last["mean"]["report/worker_residual"] > 0


@pytest.mark.slow
def test_the_two_hosts_are_two_processes():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(EXAMPLES / "local_steps_two_hosts.py"), "--coordinator", address, "--steps", "32"]
    processes = [
        subprocess.Popen([*command, "--index", str(i)], env=environment, stdout=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    said = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert "round 2: loss" in said[0] and "round" not in said[1]  # where Gloo may say who is connected
