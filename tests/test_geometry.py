"""`python -m experiments geometry` on a loss of one's own."""

import sys

import jax
import jax.numpy as jnp
import pytest

from experiments.papers import geometry

PROBLEM = '''
"""A parabola of four parameters, the first of which carries all the noise."""

import jax.numpy as jnp


def problem():
    batches = jnp.arange(-3.0, 4.0)[:, None]  # seven mini-batches of one example; their mean is 0

    def loss(params, batch):
        return jnp.sum(jnp.array([8.0, 2.0, 2.0, 2.0]) * params["w"] ** 2) / 2 + params["w"][0] * batch.mean()

    return {"w": jnp.ones(4)}, loss, batches


def without_curvature():
    params, _, batches = problem()
    return params, lambda params, batch: jnp.sum(params["w"]) * batch.mean(), batches


not_a_function = 3
'''


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of the user's on Python's path."""
    (tmp_path / "their_package").mkdir()
    (tmp_path / "their_package" / "__init__.py").write_text("")
    (tmp_path / "their_package" / "their_module.py").write_text(PROBLEM)
    monkeypatch.syspath_prepend(tmp_path)
    yield "their_package.their_module"
    for name in [name for name in sys.modules if name.startswith("their_package")]:
        del sys.modules[name]


def run(loss):
    config = geometry.Config(loss=loss, steps=4, measure_every=2, learning_rate=0.01, probes=1, watched=2)
    return list(geometry.run(config))


def test_a_users_loss_is_found_by_its_import_path_and_measured(package, tmp_path):
    found = run(f"{package}:problem")
    assert [r["step"] for r in found] == [0, 2, 4]
    first = found[0]
    # By hand: g = L = (8, 2, 2, 2), and only the first coordinate is noisy.
    assert first["loss"] == pytest.approx(7.0)
    assert first["gradient_density"] == pytest.approx(14**2 / (4 * 76), rel=1e-5)
    assert first["curvature_density"] == pytest.approx(14**2 / (4 * 76), rel=1e-5)
    assert first["noise_density"] == pytest.approx(1 / 4, rel=1e-5)
    assert first["above_critical_line"] == 1  # 8 / 2.16, and three without noise
    assert first["regime"] == "II" and first["words"].startswith("Regime II: signs suit this")
    assert [len(noise) for noise in first["noise"]] == [7, 7]
    assert found[-1]["loss"] < first["loss"]  # it was trained in between
    header = {"config": {"threshold": 3.0}}
    assert geometry.table([header, *found]).row_count == 3
    assert [path.exists() for path in geometry.plot([header, *found], str(tmp_path))] == [True]


@pytest.mark.parametrize(
    "name", ("their_package.nowhere:problem", "their_package.their_module:nothing", "their_package")
)
def test_a_path_that_leads_nowhere_is_an_error_that_says_how_to_write_one(package, name):
    with pytest.raises(ValueError, match=rf"`--loss {name}` has to be package\.module:function, for something that"):
        run(name)


def test_a_loss_without_curvature_is_an_error(package):
    with pytest.raises(ValueError, match=r"`--loss` has to have second derivatives, got a curvature that is zero"):
        run(f"{package}:without_curvature")


def test_our_own_problem_has_the_shape_that_is_asked_of_the_users():
    params, loss, batches = geometry.problem(geometry.Config())
    batch = jax.tree.map(lambda x: jnp.asarray(x[0]), batches)
    assert loss(params, batch).shape == ()
    assert len({len(x) for x in jax.tree.leaves(batches)}) == 1
