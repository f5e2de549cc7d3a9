"""Faults, late ballots, shared noise, and the grid of learning rates and weight decays: the experiments' claims."""

import dataclasses
import io
import json
import math
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rich.console

from experiments.common import runners
from experiments.common import trials
from experiments.papers.adversaries import faults
from experiments.papers.adversaries import late
from experiments.training import sweep
import figures
import signopt
from signopt import adversary
from signopt import workers


def run(experiment, **settings):
    config = dataclasses.replace(experiment.Config(), **settings)
    return json.loads(json.dumps([{"config": dataclasses.asdict(config)}, *experiment.run(config)]))


def drawn(experiment, records, folder):
    """The table's text, after the figures were drawn from the same records."""
    figures.drawn(experiment, records, folder)
    console = rich.console.Console(width=160, record=True, file=io.StringIO())
    console.print(experiment.table(records))
    return console.export_text()


# ---- faults ----------------------------------------------------------------------------------------------------------


def test_a_worker_that_is_not_finite_on_a_tenth_of_its_steps_costs_a_vote_nothing(tmp_path):
    records = run(faults, borders=("one_bit", "mean"), seeds=2, steps=200)
    clean, faulty = (faults.accuracies(records, "one_bit", f) for f in (False, True))
    assert abs(statistics.mean(clean) - statistics.mean(faulty)) <= 0.02  # two seeds; ten of them are slow, below
    assert min(clean + faulty) > 0.95
    assert max(faults.accuracies(records, "mean", True)) < 0.3  # the control: faults do happen
    assert min(faults.accuracies(records, "mean", False)) > 0.95
    for record in records[1:]:
        if record["border"] == "one_bit":
            expected = 20 if record["faults"] else 0
            assert abs(record["counted"][0] - expected) <= 5 * math.sqrt(200 * 0.1 * 0.9) * record["faults"]
            assert record["counted"][1:] == [0] * 7
            assert record["is_finite"]
    text = drawn(faults, records, tmp_path)
    assert f"{statistics.mean(faulty):.4f}" in text


@pytest.mark.slow
def test_it_does_so_for_a_thousand_steps_on_every_wire():
    records = run(faults, borders=("one_bit", "two_bit", "psum"))
    for border in ("one_bit", "two_bit", "psum"):
        clean, faulty = (faults.accuracies(records, border, f) for f in (False, True))
        assert statistics.mean(clean) - statistics.mean(faulty) <= 0.006


def test_faults_come_at_their_rate_in_all_entries_or_a_few():
    spoil = faults.not_finite(jax.random.key(0), 0.1)

    def bad(count):
        send = lambda x: spoil(x, adversary.Situation("w", count))
        return jax.vmap(lambda x: ~jnp.isfinite(send(x)), axis_name="w", axis_size=1)(jnp.ones((1, 200)))[0]

    share = np.asarray(jax.jit(jax.vmap(bad))(jnp.arange(2000))).mean(1)
    happened = share > 0
    assert abs(happened.mean() - 0.1) < 5 * math.sqrt(0.1 * 0.9 / 2000)
    everywhere = share == 1
    assert abs(everywhere.sum() / happened.sum() - 0.5) < 5 * math.sqrt(0.25 / happened.sum())
    assert abs(share[happened & ~everywhere].mean() - 0.1) < 0.02


# ---- late ballots and noise ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("delay", (0, 1, 3))
def test_delayed_sends_the_signs_of_so_many_steps_ago(delay, rng):
    rows = rng.choice([-2.0, 0.0, 3.0], (6, 5)).astype(np.float32)
    tx = late.delayed(delay)
    state, sent = tx.init(jnp.zeros(5)), []
    for row in rows:
        updates, state = tx.update(jnp.asarray(row), state)
        sent.append(updates)
    np.testing.assert_array_equal(sent, np.concatenate([np.zeros((delay, 5)), np.sign(rows)])[:6])


@pytest.mark.slow
def test_late_ballots_cost_more_the_later_they_are():
    records = run(late, delays=(0, 2, 32), noise=(0.0, 1.0), seeds=3, steps=200)
    for method in late.METHODS:
        losses = dict(late.curve(records, "quadratic", "delay", method))
        assert min(losses[32]) > max(losses[0])
        accuracy = {k: statistics.mean(v) for k, v in late.curve(records, "digits", "delay", method)}
        assert accuracy[32] < accuracy[2] - 0.03
        assert accuracy[0] - 0.05 < accuracy[2]
    noise = {k: statistics.mean(v) for k, v in late.curve(records, "digits", "noise", "signum + vote")}
    assert abs(noise[1.0] - noise[0.0]) < 0.02


def test_the_figure_of_late_ballots_is_drawn_from_records(tmp_path):
    rest = [
        {
            "problem": problem,
            "varied": varied,
            "method": method,
            "delay": k,
            "noise": k,
            "seed": seed,
            result: 0.5 + k + seed,
        }
        for problem, varied, result in (
            ("quadratic", "delay", "loss"),
            ("digits", "delay", "test_accuracy"),
            ("digits", "noise", "test_accuracy"),
        )
        for method in late.METHODS
        for k in (0, 4)
        for seed in range(2)
    ]
    records = [{"config": dataclasses.asdict(late.Config())}, *rest]
    assert late.curve(records, "digits", "noise", "vote") == [(0, [0.5, 1.5]), (4, [4.5, 5.5])]
    assert "0: 1.000, 4: 5.000" in drawn(late, records, tmp_path)


def test_shared_noise_is_the_same_on_every_worker_and_of_the_size_that_was_asked_for():
    tx = optax.chain(signopt.majority_vote("w"), optax.add_noise(2.0**2, 0.0, jax.random.key(0)))

    def step(state, batch):
        updates, opt_state = tx.update(batch[0], state[1])
        return (state[0], opt_state), updates

    run = workers.simulate(step, 3, axis_name="w")
    state = (jnp.zeros(()), tx.init(jnp.zeros(5000)))
    state, first = run(state, np.ones((3, 5000), np.float32))  # simulate refuses shared state that would differ
    _, second = run(state, np.ones((3, 5000), np.float32))
    np.testing.assert_array_equal(first, np.broadcast_to(first[0], first.shape))
    noise = np.stack([first[0], second[0]]) - 1
    assert abs(noise.std() - 2) < 5 * 2 / math.sqrt(2 * noise.size)
    assert abs(np.corrcoef(noise)[0, 1]) < 5 / math.sqrt(5000)


# ---- the sweep -------------------------------------------------------------------------------------------------------


def test_a_trial_is_what_training_alone_gives():
    """Traced hyper-parameters and a vmap over trials change nothing but the last bits of matrix products."""
    config = sweep.Config()
    settings = (np.array([0.008, 0.002], np.float32), np.array([0.1, 0.0], np.float32))
    shared = {"workers": 2, "steps": 30, "batch_size": 4}
    make = lambda setting: sweep._optimizer(dataclasses.replace(config, workers=2, steps=30), "signum", *setting)
    together = trials.train(make, settings, np.array([0, 1]), **shared)
    for i in (1,):
        alone = trials.train(make, tuple(x[i : i + 1] for x in settings), np.array([i]), **shared)
        np.testing.assert_allclose(alone.train_loss, together.train_loss[i : i + 1], rtol=0.02)
        np.testing.assert_allclose(alone.test_accuracy, together.test_accuracy[i : i + 1], atol=0.02)
    assert abs(together.train_loss[0] - together.train_loss[1]) > 0.05  # settings do differ


def test_the_map_of_signum_is_flat_in_weight_decay_and_that_of_sgd_is_not(tmp_path):
    records = run(
        sweep, methods=("signum", "sgd"), learning_rates=(4e-3, 1.6e-2), weight_decays=(0.0, 1.0), seeds=1, steps=150
    )
    signum, sgd = (sweep.heat(records, method)[2] for method in ("signum", "sgd"))
    assert abs(signum[:, 1] - signum[:, 0]).max() < 0.02
    assert (sgd[:, 0] - sgd[:, 1]).min() > 0.1
    assert f"{signum.max():.4f}" in drawn(sweep, records, tmp_path)


def test_similarity_finds_the_factor_between_learning_rates(rng):
    rates, decays = [2.0**k for k in range(9)], [0.0, 0.1]
    map_ = 0.9 + 0.1 * rng.random((12, 2))
    accuracy = {"signum": map_[2:11], "adamw": map_[:9], "sgd": 0.9 + 0.1 * rng.random((9, 2))}
    rest = [
        {"method": m, "learning_rate": r, "weight_decay": w, "seed": 0, "test_accuracy": float(a[i, j])}
        for m, a in accuracy.items()
        for i, r in enumerate(rates)
        for j, w in enumerate(decays)
    ]
    alike, factor = sweep.similarity([{}, *rest], "signum", "adamw")
    assert alike == pytest.approx(1)
    assert factor == 4
    assert sweep.similarity([{}, *rest], "signum", "signum") == (pytest.approx(1), 1)
    assert sweep.similarity([{}, *rest], "signum", "sgd")[0] < 0.9


def test_a_mask_lets_only_matrices_decay_and_schedules_end_where_they_say():
    config = dataclasses.replace(sweep.Config(), mask=True, steps=10, workers=1)
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    for schedule, last in (("cosine", 0.0), ("linear", 0.0), ("constant", 0.5)):
        for method in sweep.METHODS:
            tx = sweep._optimizer(dataclasses.replace(config, schedule=schedule), method, 0.5, 0.1)

            def step(state, batch, tx=tx):
                still = jax.tree.map(lambda p: p * batch.sum(), params)
                updates, opt_state = tx.update(still, state, params)
                return opt_state, updates

            state = tx.init(params)
            together = jax.jit(workers.simulate(step, 1, axis_name=runners.AXIS))
            for k in range(11):
                state, updates = together(state, np.zeros(1, np.float32))
                rate = 0.5 if k == 0 else last if k == 10 else None
                if rate is not None:
                    np.testing.assert_allclose(updates["kernel"], -0.1 * rate, atol=1e-7)
                np.testing.assert_array_equal(updates["bias"], 0)
