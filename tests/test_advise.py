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
from signopt._tools import work

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
    is_local = choice.is_local
    assert (choices.WHERE in code) == is_local

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
    # What the table is made of is this program, or one that sends the same in the long run.
    params = {"w": jnp.zeros((4096, 16))}
    messages = signopt.wire.messages(params, workers, choices.settled(choice, workers), axis_name=choices.AXIS)
    sent = sum(message.sent(workers) for message in messages)
    whole = signopt.wire.bytes_sent(params, workers, optimizer, axis_name=choices.AXIS)
    assert sent < whole / 20 if choice.then else np.ceil(float(sent)) == whole


def test_1_bit_adam_is_timed_as_it_is_after_its_warm_up():
    (choice,) = (choice for choice in choices.CHOICES if choice.then)
    params = {"w": jnp.zeros((4096, 16))}
    codec = signopt.codecs.scaled_sign(block=256)
    border = signopt.mean(choices.AXIS, uplink=codec, downlink=codec, num_workers=4)
    assert signopt.wire.messages(params, 4, choices.settled(choice, 4)) == signopt.wire.messages(params, 4, border)


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
        place = signopt.local_params(opt_state, params) if choice.is_local else params
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


def mesh_of(devices):
    axes = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((len(devices),), (links.AXIS,), axis_types=axes, devices=devices)


def test_an_exchange_is_what_it_adds_to_gradients(devices, monkeypatch):
    taken, asked = {(): 2.0, ("psum",): 2.5, ("all_to_all", "all_gather"): 2.25}, []
    program = links._program

    def remembered(mesh, messages):
        asked.append(tuple(message.kind for message in messages))
        return program(mesh, messages)

    def timed(run):
        jax.block_until_ready(run())  # it runs
        return taken[asked[-1]]

    monkeypatch.setattr(links, "_program", remembered)
    monkeypatch.setattr(links, "seconds_of", timed)
    dense = (signopt.wire.Message("psum", 4000),)
    vote = (signopt.wire.Message("all_to_all", 1001), signopt.wire.Message("all_gather", 251))
    gradients = []
    found = links.measured(mesh_of(devices[:4]), [dense, vote, dense], lambda: gradients.append(1))
    assert found == pytest.approx([0.5, 0.25, 0.5])
    assert len(asked) == len(gradients) == 3  # what occurs twice is timed once


def test_the_program_of_an_exchange_sends_what_the_messages_say(devices):
    messages = (
        signopt.wire.Message("psum", 4000),
        signopt.wire.Message("all_to_all", 1024),
        signopt.wire.Message("all_gather", 256),
    )
    program = jax.make_jaxpr(links._program(mesh_of(devices[:4]), messages))().jaxpr
    found = signopt.wire._messages(program, 4)
    assert [(m.kind, m.bytes) for m in found] == [(m.kind, m.bytes) for m in messages]


def test_a_link_of_which_somebody_has_said_how_fast_it_is():
    cluster = exchanges.Cluster(4, 8e6, latency_seconds=1e-3, message_seconds=0.0)
    params = {"w": jax.ShapeDtypeStruct((80_000,), "float32")}
    for wire in ("mean", "one_bit"):
        border = signopt.mean("worker") if wire == "mean" else signopt.majority_vote("worker", wire="one_bit")
        messages = tuple(signopt.wire.messages(params, 4, border))
        name = {"mean": "float32"}.get(wire, wire)
        by_the_model = exchanges.exchange_seconds(80_000, name, cluster, exchanges.Rates(0, 0, 0, 0))
        assert links.given(cluster, messages) == pytest.approx(by_the_model, rel=1e-3)


def test_outliers_do_not_count():
    assert links.typical([1.0, 1.0, 1.0, 3.0, 3.0, 3.0, 99.0, 0.0]) == 2.0


def test_each_choice_is_timed_with_its_own_work(problem):
    slow = {"w": jnp.ones((600, 300)), "b": jnp.zeros(3)}
    batches = jnp.ones((4, 2, 600))
    own = problems.of((slow, lambda params, x: jnp.sum((x @ params["w"]) ** 2), batches))
    devices = jax.local_devices()[:2]
    found = work.seconds(own, devices, work.gradient(own, devices), 3)
    of = {named(choice): seconds for choice, seconds in zip(choices.CHOICES, found.updates, strict=True)}
    # Five rounds of matrix products in every step, with an exchange or without.
    assert min(of["sign_muon, one-bit vote/1/1/0"], of["Muon, mean/16/1/0"]) > 2 * of["signum, one-bit vote/1/1/0"]
    assert found.gradient > 0


def test_a_step_is_the_sum_of_its_parts_and_a_round_has_few_exchanges():
    of = {named(choice): choice for choice in choices.CHOICES}
    assert advise.step_seconds(of["signum, one-bit vote/1/1/0"], 1.0, 2.0, 4.0) == 7.0
    assert advise.step_seconds(of["Muon, vote x size/16/1/0"], 1.0, 2.0, 4.0) == 3.25
    assert advise.step_seconds(of["Muon, vote x size/16/16/1"], 1.0, 2.0, 4.0) == 7.0  # nothing overlaps on CPUs


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
    assert network["workers"] == 4 and network["bits_per_second"] == 1e3 and not network["measured"]
    assert look["alike"] and len(rows) == len(choices.CHOICES)
    assert all(r["seconds"] >= r["gradient_seconds"] + r["update_seconds"] > 0 for r in rows)
    # At a kbit/s what counts is bits; and every row costs what its basis says.
    cheap = [r["seconds"] for r in rows if r["percent"] is not None and r["percent"] <= 2]
    assert cheap == sorted(cheap) and not rows[0]["name"].startswith(choices.NOTHING)
    said = advise.report([network, look, *rows])
    assert "Network, as you say: 1 kbit/s, latency 50 us." in said
    assert "their data are alike." in said and f"    {rows[0]['code'].splitlines()[-1]}" in said
    assert choices.NOTHING in said
    third = advise.report([network | {"rank": 3}, look, *rows])
    assert f"    {rows[2]['code'].splitlines()[-1]}" in third and f"\n{rows[2]['name']}, " in third
    with pytest.raises(SystemExit, match=r"error: `--rank` has to be at most 14, got 15\."):
        command.main([*words, "--rank", "15"])


def test_many_processes_have_one_network(monkeypatch):
    options = argparse.Namespace(distributed=True, workers=3, megabits=None)
    with pytest.raises(problems.UsageError, match=r"`--workers 3` has to be the 8 devices of all processes"):
        advise._workers(options)
