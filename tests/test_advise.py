"""`python -m signopt advise`: what is measured, how it is ranked, and that the lines to paste run."""

import argparse
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.common import basis
from experiments.common import report as tables
import signopt
from signopt import __main__ as command
from signopt._tools import advise
from signopt._tools import choices
from signopt._tools import exchanges
from signopt._tools import gradients
from signopt._tools import links
from signopt._tools import problem as problems

ROOT = pathlib.Path(signopt.__file__).parents[1]


@pytest.fixture
def problem():
    """A user's own: a matrix and a vector."""
    batches = jax.random.normal(jax.random.key(0), (16, 5, 4))
    params = {"w": jnp.ones((4, 3)), "b": jnp.zeros(3)}
    return problems.of((params, lambda params, x: jnp.mean((x @ params["w"] + params["b"]) ** 2), batches))


# ---- the lines to paste ---------------------------------------------------------------------------------------------


def named(choice):
    return f"{choice.name}/{choice.every}/{choice.fragments}/{choice.delay}"


@pytest.mark.parametrize("choice", choices.CHOICES, ids=named)
def test_the_lines_to_paste_run_and_send_what_the_table_says(choice, problem):
    workers, code = 4, choices.code(choice, 4)
    assert all(len(line) <= 120 for line in code.splitlines())
    namespace = {}
    exec(compile(code, choice.name, "exec"), namespace)
    optimizer = optax.with_extra_args_support(namespace["optimizer"])
    is_local = choice.every > 1 or choice.delay
    assert (choices.WHERE in code) == bool(is_local)

    def step(state, batch):
        params, opt_state = state
        place = signopt.local_params(opt_state, params) if is_local else params
        value, grads = signopt.workers.value_and_grad(problem.loss, axis_name=choices.AXIS)(place, batch[0])
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value

    run = signopt.workers.simulate(step, workers, axis_name=choices.AXIS)
    state = (problem.params, optimizer.init(problem.params))
    after, values = jax.eval_shape(run, state, jax.tree.map(lambda x: x[:workers], problem.batches))
    assert values.shape == (workers,)
    assert jax.tree.map(jnp.shape, after[0]) == jax.tree.map(jnp.shape, problem.params)
    # On a tree where padding counts for little.
    params = {"w": jnp.zeros((4096, 16))}
    sent = 8 * signopt.wire.bytes_sent(params, workers, optimizer, axis_name=choices.AXIS) / 2**16
    sent *= choice.fragments / choice.every
    if choice.name.startswith("1-bit Adam"):  # a look at the variance is the most that a step sends
        return
    assert advise.bits(params, workers, choice) == pytest.approx(sent, rel=0.07)


@pytest.mark.slow
@pytest.mark.parametrize("choice", choices.CHOICES, ids=named)
def test_the_lines_to_paste_train(choice, problem):
    if choice.name.startswith("ternary"):
        pytest.skip("No entry of leaves this small and even is twice their root mean square, so nobody votes.")
    namespace = {}
    exec(choices.code(choice, 4).replace("1e-3", "3e-2"), namespace)
    optimizer = optax.with_extra_args_support(namespace["optimizer"])

    def step(state, batch):
        params, opt_state = state
        place = signopt.local_params(opt_state, params) if choice.every > 1 or choice.delay else params
        value, grads = signopt.workers.value_and_grad(problem.loss, axis_name=choices.AXIS)(place, batch[0])
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value

    run = jax.jit(signopt.workers.simulate(step, 4, axis_name=choices.AXIS))
    state = (problem.params, optimizer.init(problem.params))
    for i in range(48):
        at = 4 * (i % 4)
        state, values = run(state, problem.batches[at : at + 4])
        first = values if i == 0 else first
    assert float(values.mean()) < 0.7 * float(first.mean())


# ---- what is expected ------------------------------------------------------------------------------------------------


def test_expectations_are_those_of_the_kept_records():
    kept = (ROOT / basis.FILE).read_text(encoding="utf-8")
    assert kept == basis.text(tables.MEASURED), "Run `python -m experiments report`."


def test_a_choice_costs_what_it_cost_in_the_experiment_that_is_closest(monkeypatch):
    digits = {"alike": 0.98, "sorted": 0.90}
    found = {
        "heterogeneous": {"Adam, float32 mean": {"alike": 1.0, "sorted": 1.0}, "Signum, one-bit vote": digits},
        "language": {"muon": 2.0, "sign_muon": 2.1},
        "local_steps": {"muon/vote/16/1/0": 2.5},
    }
    monkeypatch.setattr(choices, "_basis", lambda: found)
    of = {(c.name, c.every, c.fragments): c for c in choices.CHOICES}
    vote, muon = of["signum, one-bit vote", 1, 1], of["sign_muon, one-bit vote", 1, 1]
    assert choices.cost(vote, alike=True) == (2.0, "digits, accuracy 0.980 against 1.000")
    assert choices.cost(vote, alike=False) == (10.0, "digits, sorted labels, accuracy 0.900 against 1.000")
    assert choices.cost(muon, alike=True) == (5.0, "text, loss 2.100 against 2.000")
    assert choices.cost(muon, alike=False).percent == 10.0  # of votes, where nobody measured this one
    rounds = of["Muon, vote x size", 16, 1]
    assert choices.cost(rounds, alike=True).percent == 25.0
    assert choices.cost(rounds, alike=False) == (None, "not measured with data that differ")
    assert choices.cost(of["Muon, vote x size", 4, 1], alike=True) == (None, "not measured")


def row(name, seconds, percent):
    return {"name": name, "seconds": seconds, "percent": percent}


def test_rows_that_cost_little_come_first_by_time_and_what_nobody_measured_last():
    rows = [row("a", 3.0, 0.0), row("b", 2.0, 1.0), row("c", 1.0, 9.0), row("d", 1.5, None)]
    assert [r["name"] for r in advise.ranked(rows, 2.0)] == ["b", "a", "c", "d"]
    assert [r["name"] for r in advise.ranked(rows, 0.5)] == ["a", "c", "d", "b"]


def test_not_to_compress_comes_first_unless_something_is_faster():
    vote, mean = row("vote", 1.0, 0.0), row(choices.NOTHING, 1.04, 0.0)
    assert advise.ranked([vote, mean], 2.0)[0]["name"] == mean["name"]
    assert advise.ranked([vote, mean | {"seconds": 1.06}], 2.0)[0]["name"] == vote["name"]


# ---- what is measured ------------------------------------------------------------------------------------------------


def test_links_are_fitted_to_what_a_small_and_a_large_message_take(devices, monkeypatch):
    monkeypatch.setattr(links, "SMALL", 2**10)
    mesh = jax.make_mesh((4,), (links.AXIS,), axis_types=(jax.sharding.AxisType.Auto,), devices=devices[:4])
    sizes = iter(2 * [2**10, 2**13, 2**16, 2**19])

    def taken(program):
        program()  # it runs
        return 3e-4 + 8 * (1.5 * next(sizes)) / 1e7  # 2 (M - 1)/M of the bytes at 10 Mbit/s

    monkeypatch.setattr(links, "median_seconds", taken)
    found = links.measured(mesh)
    assert [cluster.bits_per_second for cluster in found] == pytest.approx([1e7, 1e7])
    assert [cluster.latency_seconds for cluster in found] == pytest.approx([3e-4 / 4, 3e-4 / 3])  # messages in turn
    assert found.of("float32") is found.sums and found.of("one_bit") is found.of("sized") is found.deals
    cluster, nothing = found.sums, exchanges.Rates(0, 0, 0, 0)
    assert exchanges.exchange_seconds(2**14, "float32", cluster, nothing) == pytest.approx(3e-4 + 12 * 2**16 / 1e7)


def test_rates_are_ours_times_one_number():
    found, ours = links.rates(), exchanges.Rates()
    assert found.pack > 0 and found.add == 0
    assert found.top_k / found.pack == pytest.approx(ours.top_k / ours.pack)


def test_workers_whose_data_differ_are_told_from_those_whose_data_are_alike():
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(4, 6, 300))
    shift = rng.normal(size=(4, 1, 300))
    alike, differ = gradients.of(1.0 + noise), gradients.of(1.0 + noise + shift)
    assert alike.alike and alike.ratio == pytest.approx(1.0, abs=0.2)
    assert not differ.alike and differ.ratio == pytest.approx(7.0, abs=1.5)  # 6 mini-batches: 1 + 6
    assert differ.probability == pytest.approx(0.001)
    # A noise that all coordinates share is no sign of anything, which F's own table would take it for.
    shared = gradients.of(1.0 + rng.normal(size=(4, 6, 1)) + 1e-6 * noise)
    assert shared.probability is not None and shared.probability > 0.01


def test_single_mini_batches_say_nothing_about_data():
    found = gradients.of(np.random.default_rng(0).normal(size=(4, 1, 30)))
    assert found.alike and found.ratio is None and found.probability is None


def test_margins_are_those_of_the_signs_and_coins_have_the_binomials():
    assert gradients.of(np.ones((4, 2, 10))).margin == 1.0
    thrown = gradients.of(np.random.default_rng(0).normal(size=(8, 4, 20_000)))
    assert thrown.margin == pytest.approx(thrown.chance, abs=0.005)
    assert thrown.density == pytest.approx(2 / np.pi, abs=0.02)


def test_mini_batches_are_dealt_to_the_workers_in_turn():
    shift = jnp.array([5.0, -5.0])
    batches = jnp.tile(shift, 8)[:, None] + 0.1 * jax.random.normal(jax.random.key(0), (16, 1))
    found = problems.of((jnp.zeros(3), lambda w, x: jnp.sum(w * x), batches))
    assert not gradients.look(found, 2).alike
    assert gradients.look(found, 4).batches == 4
    assert gradients.look(found, 32).batches == 1  # fewer than workers


def test_the_command_ranks_choices_for_a_users_loss(monkeypatch, tmp_path, capsys):
    (tmp_path / "their_loss.py").write_text(
        "import jax\nimport jax.numpy as jnp\n\n\ndef problem():\n"
        "    batches = jax.random.normal(jax.random.key(0), (8, 5, 4))\n"
        "    return {'w': jnp.ones(4)}, lambda params, x: jnp.mean((x @ params['w']) ** 2), batches\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    words = ["advise", "--loss", "their_loss:problem", "--workers", "4", "--megabits", "1e-3", "--rounds", "1"]
    command.main([*words, "--json"])
    network, look, *rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert network["workers"] == 4 and network["sums"]["bits_per_second"] == 1e3 and not network["measured"]
    assert look["alike"] and len(rows) == len(choices.CHOICES)
    assert all(r["seconds"] >= r["compute_seconds"] > 0 for r in rows)
    # At a kbit/s what counts is bits; and every row costs what its basis says.
    cheap = [r["seconds"] for r in rows if r["percent"] is not None and r["percent"] <= 2]
    assert cheap == sorted(cheap) and not rows[0]["name"].startswith(choices.NOTHING)
    said = advise.report([network, look, *rows])
    assert "Network, as you say: 1 kbit/s, latency 50 us." in said
    assert "their data are alike." in said and f"    {rows[0]['code'].splitlines()[-1]}" in said
    assert choices.NOTHING in said


def test_many_processes_have_one_network(monkeypatch):
    options = argparse.Namespace(distributed=True, workers=3, megabits=None)
    with pytest.raises(problems.UsageError, match=r"`--workers 3` has to be the 8 devices of all processes"):
        advise._workers(options)
