"""`python -m signopt`: the real command, and what it says about a loss that does not fit."""

import json
import os
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import pytest

from experiments.common import losses
import signopt
from signopt import __main__ as command
from signopt._tools import problem as problems

ROOT = pathlib.Path(signopt.__file__).parents[1]
THEIRS = '''
"""A user's own loss."""

import jax
import jax.numpy as jnp


def problem():
    batches = jax.random.normal(jax.random.key(0), (3, 5, 4))
    return {"w": jnp.ones(4)}, lambda params, batch: jnp.mean((batch @ params["w"]) ** 2), batches


not_a_function = 3
'''
# What `pip install signopt` does not install.
ABSENT = ("flax", "matplotlib", "rich", "sklearn", "orbax", "experiments", "chex", "pytest")
WITHOUT = f"import sys; sys.modules.update(dict.fromkeys({ABSENT!r}))\n"


@pytest.fixture
def folder(tmp_path):
    """A folder with nothing but a package of the user's, whose Python lacks what signopt does not need."""
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "__init__.py").write_text("")
    (tmp_path / "theirs" / "losses.py").write_text(THEIRS)
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(WITHOUT)
    return tmp_path


def run(folder, *words):
    environment = {key: value for key, value in os.environ.items() if key not in ("XLA_FLAGS", "NPROC")}
    environment |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{folder / 'site'}{os.pathsep}{ROOT}"}
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "signopt", *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_headroom_times_a_users_loss_from_an_empty_folder(folder):
    done = run(folder, "headroom", "--loss", "theirs.losses:problem", "--workers", "2", "--rounds", "2", "--steps", "1")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("A step on 4 parameters, 2 workers on cpu; medians:\n")
    assert "vote, one_bit" in done.stdout and "The cost model, for 16 hosts" in done.stdout


def test_geometry_measures_a_users_loss_from_an_empty_folder(folder):
    words = ["--loss", "theirs.losses:problem", "--steps", "2", "--measure_every", "1", "--json"]
    done = run(folder, "geometry", *words)
    assert (done.returncode, done.stderr) == (0, "")
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [r["step"] for r in found] == [0, 1, 2]
    assert all(0 < r["gradient_density"] <= 1 for r in found)


def test_what_is_absent_is_really_absent(folder):
    """The control of the two tests above."""
    (folder / "theirs" / "losses.py").write_text("import flax\n")
    done = run(folder, "geometry", "--loss", "theirs.losses:problem")
    assert done.returncode == 1
    assert "import of flax halted" in done.stderr


def test_info_tells_versions_devices_and_flags(capsys):
    command.main(["info"])
    lines = capsys.readouterr().out.splitlines()
    assert f"signopt: {signopt.__version__}" in lines
    assert "devices:" in lines and "  7: cpu" in lines
    assert "  NPROC 16" in lines
    assert not any("None" in line for line in lines)  # what is not installed is left out


@pytest.mark.parametrize(
    ("name", "error"),
    [
        (
            "theirs.nowhere:problem",
            "has to be package.module:function, for something that Python can import: No module",
        ),
        ("theirs.losses:nothing", "has to be package.module:function, .* has no attribute 'nothing'"),
        ("theirs.losses:not_a_function", "has to be package.module:function, .* is a int"),
        ("theirs", "has to be package.module:function"),
    ],
)
def test_a_path_that_leads_nowhere_is_an_error_that_says_how_to_write_one(name, error, folder, monkeypatch):
    monkeypatch.syspath_prepend(folder)
    with pytest.raises(SystemExit, match=rf"error: `--loss {name}` {error}"):
        command.main(["geometry", "--loss", name])
    for module in [module for module in sys.modules if module.partition(".")[0] == "theirs"]:
        del sys.modules[module]


def test_a_function_that_returns_something_else_is_told_what_it_has_to_return():
    params, loss = {"w": jnp.ones(2)}, lambda params, batch: jnp.sum(params["w"] * batch)
    with pytest.raises(
        problems.UsageError, match=r"`--loss x` has to return \(params, loss, batches\): not enough values"
    ):
        problems.of((params, loss), "--loss x")
    with pytest.raises(problems.UsageError, match=r"one leading axis of mini-batches, got \[\(3,\), \(4,\)\]"):
        problems.of((params, loss, [jnp.ones((3, 2)), jnp.ones((4, 2))]))
    with pytest.raises(problems.UsageError, match=r"returns one scalar, got ShapeDtypeStruct\(shape=\(2,\)"):
        problems.of((params, lambda params, batch: params["w"] * batch, jnp.ones((3, 2))))


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["headroom", "--loss", "x", "--workers", "1"], "--workers: has to be at least 2, got 1."),
        (["geometry", "--loss", "x", "--steps", "many"], "--steps: invalid int value: 'many'"),
        (["headroom"], "the following arguments are required: --loss"),
        (["trian"], "invalid choice: 'trian' (choose from"),
    ],
)
def test_a_command_line_that_does_not_fit_is_an_error(words, error, capsys):
    with pytest.raises(SystemExit):
        command.main(words)
    assert error in capsys.readouterr().err


def test_too_few_devices_are_an_error_that_says_what_to_do(devices):
    with pytest.raises(problems.UsageError, match=r"`--workers 99` needs as many devices, found 8: take fewer"):
        problems.devices(99)


@pytest.mark.parametrize("name", ("mlp", "wide", "cnn"))
def test_the_projects_own_losses_have_the_shape_that_is_asked_of_a_users(name):
    found = problems.of(getattr(losses, name)())
    assert found.count == 44
    assert found.size == {"mlp": 4_810, "wide": 1_126_410}.get(name, found.size)
