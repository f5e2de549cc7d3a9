"""`python -m signopt geometry`: what is measured along the path of a loss."""

import json

import jax.numpy as jnp
import pytest

from experiments.papers import geometry as experiment
import figures
from signopt._tools import geometry
from signopt._tools import problem as problems


def parabola():
    """Four parameters, the first of which carries all the noise."""
    batches = jnp.arange(-3.0, 4.0)[:, None]  # seven mini-batches of one example; their mean is 0

    def loss(params, batch):
        return jnp.sum(jnp.array([8.0, 2.0, 2.0, 2.0]) * params["w"] ** 2) / 2 + params["w"][0] * batch.mean()

    return {"w": jnp.ones(4)}, loss, batches


SETTINGS = {"steps": 4, "measure_every": 2, "learning_rate": 0.01, "probes": 1}


def test_a_loss_is_measured_along_the_path_of_sgd():
    found = list(geometry.along_the_path(problems.of(parabola()), **SETTINGS, watched=2))
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
    lines = geometry.report(found).splitlines()
    assert lines[1].split() == ["0", "7", "0.645", "0.250", "0.645", "1.25", "0.39", "100.0%", "II"]
    assert lines[-1].startswith("At step 2, the look in the middle: where training begins")
    assert "not typical. Regime II: signs suit this" in lines[-1]
    # The experiment shows the same.
    records = json.loads(json.dumps([{"config": {"threshold": 3.0, "model": "mlp"}}, *found]))
    assert experiment.table(records).row_count == 3
    densities, noise = figures.drawn(experiment, records, "")
    assert densities.axes[0].lines[0].get_ydata()[0] == first["gradient_density"]
    assert len(noise.axes) == 4  # two parameters at the first look and at the last


def test_a_loss_without_curvature_is_an_error():
    params, _, batches = parabola()
    flat = problems.of((params, lambda params, batch: jnp.sum(params["w"]) * batch.mean(), batches))
    with pytest.raises(problems.UsageError, match=r"has to have second derivatives, got a curvature that is zero"):
        list(geometry.along_the_path(flat, **SETTINGS))
