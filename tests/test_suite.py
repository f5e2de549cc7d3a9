"""The suite of problems and the claims of the papers: what they measure is what they say."""

from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.common import records
from experiments.common import report
from experiments.papers import apart
from experiments.papers import kinks
from experiments.papers import neighbours
from experiments.papers import problems
from experiments.papers import suite
import figures
import signopt


def kept(name):
    return records.read(report.MEASURED / name / records.FILE)


@pytest.mark.parametrize(
    "name",
    (
        "chain4",
        "pairwise",
        pytest.param("sensing", marks=pytest.mark.slow),
        pytest.param("demixing", marks=pytest.mark.slow),
    ),
)
def test_a_problem_is_at_its_optimum_where_its_truth_is(name):
    problem = problems.PROBLEMS[name]
    instance = problem.draw(jax.random.key(0))
    if "truth" in instance:
        u, s, v = jnp.linalg.svd(instance["truth"])
        truth = {"u": u[:, :2] * s[:2], "v": v[:2].T}
    else:
        truth = {"w": jnp.ones(4)} if name == "chain4" else {"h": instance["h"], "x": instance["x"]}
    assert problem.error(truth, instance) < 1e-5
    assert problem.error(instance["start"], instance) > problem.target
    gradient = jax.grad(problem.loss)(truth, instance, problem.batch(jax.random.key(1)))
    assert optax.tree.norm(gradient) < 1e-3


def test_reached_is_the_step_from_which_on_a_run_stays():
    errors = np.array(
        [[0.5, 0.05, 0.2, 0.05, 0.01], [0.5, 0.4, 0.3, 0.2, 0.11], [0.5, np.nan, 0.0, 0.0, 0.0], [0.0] * 5]
    )
    assert suite.reached(errors, 0.1).tolist() == [4, np.inf, 3, 1]


def test_the_suite_runs_and_its_table_and_figure_need_nothing_but_records(tmp_path):
    config = suite.Config(
        problems=("chain4",), optimizers=("sgd", "signsgd"), steps=200, workers=2, output=str(tmp_path)
    )
    found = records.read(records.write(config.output, records.header("suite", config), suite.run(config)))
    own = suite.by_problem(found)["chain4"]
    assert own["sgd"]["steps"] < 200 and own["signsgd"]["steps"] < 200
    assert not own["sgd"]["edge"] and own["signsgd"]["bits"] < own["sgd"]["bits"]
    assert suite.predictions(found)["chain4"][0]["regime"] == "II"
    suite.table(found)
    figures.drawn(suite, found, tmp_path)


def test_no_learning_rate_of_the_kept_run_is_at_the_edge_of_its_grid():
    at_the_edge = [(r["problem"], r["optimizer"]) for r in kept("suite")[1:] if r.get("edge")]
    assert at_the_edge == []


def test_kept_figures_are_as_they_should_be(tmp_path):
    for name, experiment in (("suite", suite), ("neighbours", neighbours)):
        figures.drawn(experiment, kept(name), tmp_path)
        assert all(len({len(row) for row in rows}) == 1 for rows in experiment.summary(kept(name)))


# ---- noise on linear models ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("power", "biased"), [(2, False), (4, True)])
def test_noise_between_averages_moves_a_linear_model_nowhere_in_expectation(power, biased):
    """Gradients of a square are linear, so the noise's mean passes through; those of a fourth power are not."""

    def run(key, noise):
        outer = optax.chain(signopt.mean("w"), optax.sgd(1.0))
        tx = signopt.local_steps(optax.sgd(0.05), outer, every=5, num_workers=4)

        def step(state, batch):
            w, opt_state = state
            here = signopt.local_params(opt_state, w)
            gradient = jax.grad(lambda w: (w - 1) ** power / power)(here) + noise * batch[0]
            updates, opt_state = tx.update(gradient, opt_state, w)
            return (w + updates, opt_state), None

        together = signopt.workers.simulate(step, 4, axis_name="w")
        (w, _), _ = lax.scan(together, (jnp.float32(3.0), tx.init(jnp.float32(3.0))), jax.random.normal(key, (20, 4)))
        return w

    runs = jax.jit(jax.vmap(run, (0, None)))(jax.random.split(jax.random.key(0), 4000), jnp.array(3.0))
    silent = run(jax.random.key(0), jnp.array(0.0))
    error = np.std(runs) / np.sqrt(len(runs))
    assert (abs(float(runs.mean() - silent)) > 6 * error) == biased
    assert biased or abs(float(runs.mean() - silent)) < 4 * error


# ---- the leader ------------------------------------------------------------------------------------------------------


def test_the_leader_is_the_worker_with_the_lowest_loss():
    tx, own = apart.leader(), {"a": jnp.arange(12.0).reshape(4, 3), "b": jnp.arange(4.0)}

    def update(own, value):
        return tx.update(own, tx.init(own), value=value)[0]

    found: Any = jax.vmap(update, out_axes=None, axis_name=apart.AXIS)(own, jnp.array([2.0, 0.5, 1.0, 3.0]))
    assert found["a"].tolist() == [3.0, 4.0, 5.0] and found["b"] == 1.0


# ---- kinks -----------------------------------------------------------------------------------------------------------


def test_a_way_down_is_found_at_a_kink_where_the_gradient_is_zero():
    """All weights of a unit are zero, so its gradient is; a step towards the examples that it should fit goes down."""
    inputs, outputs = np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([1.0, -1.0])
    params = {"inner": np.zeros((1, 2)), "outer": np.array([1.0])}
    slope, direction = kinks.steepest(params, inputs, outputs)
    assert slope == pytest.approx(-0.5) and direction["inner"][0, 0] == 1.0 and direction["inner"][0, 1] <= 0.0
    assert kinks.verdict(params, inputs, outputs) == "descent direction"


def test_a_local_minimum_at_a_kink_is_known_for_one():
    """One unit with a positive weight can only add where too much is there already."""
    inputs, outputs = np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([-1.0, -1.0])
    params = {"inner": np.zeros((1, 2)), "outer": np.array([1.0])}
    assert kinks.steepest(params, inputs, outputs)[0] == 0.0
    assert kinks.verdict(params, inputs, outputs) == "stationary"
    assert kinks.verdict({"inner": np.ones((1, 2)), "outer": np.array([1.0])}, inputs, outputs) == "descent direction"
