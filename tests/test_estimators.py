"""What `mh_signsgd` may choose: what is compared, and how it is shown."""

import numpy as np
import pytest

from experiments.papers.adaptive import estimators
from experiments.papers.adaptive import toy
import figures


def record(method, what, setting, seed, accuracy):
    return {
        "method": method,
        "what": what,
        "setting": setting,
        "seed": seed,
        "test_accuracy": accuracy,
        "train_loss": 0.1,
        "learning_rate": 1e-3,
    }


def test_every_estimator_is_compared_with_both_smoothnesses_and_with_tuned_votes():
    methods = estimators.methods(estimators.Config(betas=(0.9, 0.95), learning_rates=(0.1,)))
    adaptive = {f"{e}, {s}" for e in ("margin", "exact", "leave_one_out") for s in ("dimension", "curvature")}
    assert set(methods) == adaptive | {"signSGD", "Signum"}
    assert methods["margin, dimension"][1:] == ("beta", (0.9, 0.95))
    assert methods["margin, curvature"][1:] == ("beta", (0.95,))
    assert methods["Signum"][1:] == ("learning rate", (0.1,))


def test_of_fixed_learning_rates_the_table_shows_the_best_alone(tmp_path):
    header = {"config": {"workers": 4, "steps": 10, "seeds": 2}}
    found = [record("margin, dimension", "beta", beta, seed, 0.9) for beta in (0.9, 0.95) for seed in (0, 1)]
    found += [record("Signum", "learning rate", rate, seed, 0.8 + rate) for rate in (0.01, 0.1) for seed in (0, 1)]
    table = estimators.table([header, *found])
    assert table.row_count == 3
    assert list(table.columns[1].cells) == ["beta 0.9", "beta 0.95", "learning rate 0.1"]
    (figure,) = figures.drawn(estimators, [header, *found], tmp_path)
    by_beta, by_rate = figure.axes
    np.testing.assert_allclose(by_beta.lines[0].get_xydata(), [[0.9, 0.9], [0.95, 0.9]])
    np.testing.assert_allclose(by_rate.lines[0].get_xydata(), [[0.01, 0.81], [0.1, 0.9]])
    # The page has a column for each beta.
    header["config"]["betas"] = [0.9, 0.95]
    assert estimators.summary([header, *found])[1:] == [
        ["margin, dimension", "0.9000", "0.9000"],
        ["Signum, the best rate of 2: 0.1", "0.9000", ""],
    ]


def test_a_ratio_of_means_has_its_jackknife_error():
    fixed, adaptive = [3.0, 5.0, 4.0], [1.0, 2.0, 1.0]
    left_out = np.array([9 / 3, 7 / 2, 8 / 3])
    error = np.sqrt(2 / 3 * np.sum((left_out - left_out.mean()) ** 2))
    assert toy.ratio(fixed, adaptive) == pytest.approx((12 / 4, error))
    assert toy.ratio([6.0], [2.0]) == (3.0, 0.0)
