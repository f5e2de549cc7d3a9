"""The experiment on learning rates: its search, its records, and its trainings."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console

from experiments.common import records
from experiments.common import report
from experiments.training import rates
import figures

BEST = {"sgd": 0.4, "adamw": 2e-2, "signum": 3e-3, "lion": 5e-3, "signsgd": 2e-2, "sign_muon": 1e-3}


@pytest.fixture
def found(tmp_path, monkeypatch):
    """Records where every training is a parabola of the logarithm of its learning rate, and long runs want half of it."""

    def trainer(problem, method, config):
        def train(rate, parts):
            badness = 0.1 + 0.01 * np.log2(rate * parts**0.5 / BEST[method]) ** 2
            return {"loss": [badness] * problem.seeds, "error": [badness] * problem.seeds}

        return train

    monkeypatch.setattr(rates, "trainer", trainer)
    config = rates.Config(output=str(tmp_path))
    return records.read(records.write(config.output, records.header("rates", config), rates.run(config)))


def test_the_best_of_every_method_has_a_worse_one_on_each_side_and_shares_of_adamw_s_are_tried(found):
    assert rates.cells(found) == [(name, steps) for name in rates.STARTS for steps in (256, 1024)]
    for problem, steps in rates.cells(found):
        adamw = rates.best(rates.scores(found, problem, "adamw", steps))
        for method in rates.METHODS:
            tried = rates.scores(found, problem, method, steps)
            if method == "sign_muon" and problem != "transformer":
                assert not tried
                continue
            assert {rates.best(tried) / 2, rates.best(tried) * 2} <= set(tried)
            assert abs(np.log2(rates.best(tried) * (steps / 256) ** 0.5 / BEST[method])) <= 0.51
            assert method == "sgd" or {share * adamw for share in rates.SHARES} <= set(tried)


def test_ratios_are_those_of_the_best_rates(found):
    assert all(3 / 20 / 2 < ratio < 2 * 3 / 20 for ratio in rates.ratios(found, "signum", "adamw"))
    assert len(rates.ratios(found, "lion", "sgd")) == 6 and len(rates.ratios(found, "sign_muon", "adamw")) == 2
    best, spread, shares = rates.summary(found)
    assert [len(x) for x in (best, spread, shares)] == [7, 5, 7]
    assert (
        best[1][:2] == ["mlp", "256"] and best[1][3].startswith("0.016: 0.89") and best[5][3].startswith("0.016: 0.1")
    )
    assert all(cell.count(",") == 1 for row in shares[1:] for cell in row[3:])


def test_it_is_drawn(found, tmp_path):
    with rich.console.Console(width=300).capture():
        rich.console.Console(width=300).print(rates.table(found))
    figures.drawn(rates, found, tmp_path)


def test_a_training_that_diverges_is_no_best(found):
    (last,) = found[-1:]
    worse = [*found[:-1], last | {"loss": [float("nan")], "error": [float("nan")]}]
    scores = rates.scores(worse, last["problem"], last["method"], last["steps"])
    assert scores[last["learning_rate"]] == np.inf and np.isfinite(scores[rates.best(scores)])


def test_among_as_many_wrong_answers_the_loss_decides():
    tried = [{}] + [
        {
            "problem": "mlp",
            "method": "sgd",
            "steps": 1,
            "by": "error",
            "learning_rate": rate,
            "error": [error],
            "loss": [loss],
        }
        for rate, error, loss in ((1.0, 0.1, 3.0), (2.0, 0.1, 2.0), (4.0, 0.1, 2.5), (8.0, 0.1 + 1 / 287, 0.1))
    ]
    assert rates.best(rates.scores(tried, "mlp", "sgd", 1)) == 2.0


def test_the_kept_records_are_what_docs_from_adamw_says_of_them():
    kept = records.read(report.MEASURED / "rates" / "records.jsonl")
    lost, better = {"error": {}, "loss": {}}, []
    for problem, steps in rates.cells(kept):
        for method in rates.METHODS:
            tried = rates.scores(kept, problem, method, steps)
            assert not tried or {rates.best(tried) / 2, rates.best(tried) * 2} <= set(tried)
        adamw, signum = (rates.scores(kept, problem, method, steps) for method in ("adamw", "signum"))
        by = "loss" if problem == "transformer" else "error"
        for share in rates.SHARES:
            rate = share * rates.best(adamw)
            lost[by].setdefault(share, []).append(signum[rate] - min(signum.values()))
            better += [adamw[rate] - signum[rate]] if share <= 1 / 8 else []
    worst = {by: [round(max(found[share]), 3) for share in (1 / 8, 1 / 4, 1 / 16, 1)] for by, found in lost.items()}
    assert worst == {"error": [0.004, 0.01, 0.022, 0.496], "loss": [0.021, 0.06, 0.093, 0.308]}
    assert (len(better), sum(x > 0 for x in better)) == (12, 11) and min(better) > -0.001
    ratios = rates.ratios(kept, "signum", "adamw")
    assert (min(ratios), max(ratios)) == (1 / 32, 1 / 4)


def test_a_long_run_is_short_ones_one_after_another():
    parabola = rates.Problem(
        init=lambda key: (jax.random.normal(key, (3,)), jnp.zeros(())),
        loss=lambda params, steps, batch: (jnp.mean((params - batch) ** 2), steps + 1),
        draw=lambda key, size: jax.random.normal(key, (size, 3)),
        score=lambda params, steps: (jnp.mean(params**2), steps),
        by="loss",
        seeds=2,
    )
    config = rates.Config(workers=2, batch_size=4)
    short, long = (rates.trainer(parabola, "signum", dataclasses.replace(config, steps=steps)) for steps in (10, 20))
    np.testing.assert_allclose(short(0.1, 2)["loss"], long(0.1, 1)["loss"], rtol=1e-5)
    assert short(0.1, 2)["error"] == [20, 20]  # statistics go on, too
    assert len(short(0.0, 1)["loss"]) == 2 and np.all(np.less(short(0.1, 2)["loss"], short(0.0, 1)["loss"]))


def test_the_convolutional_network_keeps_statistics_and_scores_by_them():
    problem = rates.PROBLEMS["cnn"]()

    @jax.jit
    def step(key):
        params, stats = problem.init(key)
        _, new = problem.loss(params, stats, problem.draw(key, 8))
        return stats, new, problem.score(params, stats)[0], problem.score(params, new)[0]

    stats, new, before, after = step(jax.random.key(0))
    changed = jax.tree.map(lambda x, y: bool(jnp.any(x != y)), stats, new)
    assert all(jax.tree.leaves(changed)) and len(jax.tree.leaves(changed)) == 4
    assert before != after
