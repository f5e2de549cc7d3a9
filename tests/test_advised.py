"""`advise` against the clock: what is made of records, and that its command runs between real hosts."""

import json
import os
import subprocess
import sys

import pytest

from experiments.common import losses
from experiments.common import namespaces
from experiments.common import pasted
from experiments.common import records
from experiments.speed import advised
import figures
from signopt._tools import choices
from signopt._tools import problem as problems
import slow_links

COUNT = len(choices.CHOICES)


def made_up(error=1.0, trained=True):
    """Records in which choice i is ranked by its seconds, which rise with i, and needs as many steps as all others."""
    where = {"hosts": 2, "megabits": 100.0, "loss": "digits"}
    found = [records.header("advised", advised.Config(hosts=(2,), megabits=(100.0,), losses=("digits",)))]
    if trained:
        found += [{"kind": "training", "index": i, "steps": 50.0, "loss": "digits", "hosts": 2} for i in range(COUNT)]
    for i in range(COUNT):
        seconds = 0.01 * (i + 1)
        found.append({"kind": "advice", "index": i, "rank": i + 1, "seconds": error * seconds} | where)
        found += [{"kind": "clock", "index": i, "round": turn, "seconds": seconds} | where for turn in range(3)]
    return found


def test_predictions_are_compared_with_the_median_of_the_clock():
    assert [case.error for case in advised.cases(made_up())] == pytest.approx([0.0] * COUNT)
    assert f"{COUNT} of {COUNT} within 15%" in advised.said(advised.cases(made_up(1.14)))
    assert f"0 of {COUNT} within 15%" in advised.said(advised.cases(made_up(1.16)))


def test_the_first_choice_is_good_if_none_reaches_the_target_much_sooner():
    assert "first choice within 10% on 1 of 1" in advised.said(advised.cases(made_up()))
    better = made_up()
    better[2]["steps"] = 22.0  # the second takes .44 s, the first .5 s
    assert "first choice within 10% on 0 of 1" in advised.said(advised.cases(better))
    never = made_up()
    never[1]["steps"] = None
    assert "first choice within 10% on 0 of 1" in advised.said(advised.cases(never))


def test_without_trainings_nothing_is_said_of_the_target():
    assert "first choice within" not in advised.said(advised.cases(made_up(trained=False)))


def test_tables_and_the_figure_need_nothing_but_records(tmp_path):
    assert advised.table(made_up()).row_count == COUNT
    assert advised.summary(made_up())[1][:3] == ["digits, 2, 100", f"{COUNT} of {COUNT}", "0%"]
    figures.drawn(advised, made_up(), tmp_path)


@pytest.mark.parametrize("name", losses.OF)
def test_the_losses_are_such_as_a_user_passes(name):
    assert problems.of(losses.OF[name]()).count >= 8


def test_a_choice_trains_at_any_rate_and_its_first_steps_that_reach_count():
    config = advised.Config(losses=("digits",), hosts=(2,), steps=40, rates=2)
    curves = advised._curves("digits", 2, choices.CHOICES[2], config)
    assert curves.shape == (2, 40)
    assert (curves[:, -1] < 0.7 * curves[:, advised.SMOOTH - 1]).any()
    assert advised._first(curves[0] <= curves[0].min()) <= 40


def test_1_bit_adam_sends_bits_soon():
    (choice,) = (choice for choice in choices.CHOICES if choice.then)
    optimizer = pasted.optimizer(choice, 1, 1e-3)
    assert "settled=0.0" not in choices.code(choice, 1) and optimizer.init is not None


@pytest.mark.slow
def test_the_command_runs_between_hosts_and_the_first_speaks_for_all():
    if reason := slow_links.reason_not_to():
        pytest.skip(reason)
    command = [sys.executable, "-m", "signopt", "advise", "--loss", "experiments.common.losses:mlp", "--distributed"]
    with namespaces.network(2) as network:
        namespaces.shape(network, 1e7)
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_PROCESSES": "2"}
        environment |= {"JAX_COORDINATOR_ADDRESS": f"{network.addresses[0]}:9999"}
        environment.pop("XLA_FLAGS", None)
        hosts = [
            subprocess.Popen(
                namespaces.inside(namespace, [*command, "--rounds", "1", "--json"]),
                env=environment | {"JAX_PROCESS_ID": str(i)},
                stdout=subprocess.PIPE,
                text=True,
            )
            for i, namespace in enumerate(network.namespaces)
        ]
        try:
            said = [host.communicate(timeout=900)[0] for host in hosts]
        finally:
            for host in hosts:
                host.kill()
                host.wait()
    assert [host.returncode for host in hosts] == [0, 0]
    found, _, *rows = map(json.loads, said[0].splitlines())
    assert said[1] == "" and found["measured"] and found["workers"] == 2 and len(rows) == COUNT
    # What 19 kB take at 10 Mbit/s, whatever else the machine does.
    dense = next(row for row in rows if row["name"] == choices.NOTHING)
    assert 0.01 < dense["exchange_seconds"] < 1.0
    assert found["bits_per_second"] < 3e7


@pytest.mark.slow
def test_hosts_ask_for_advice_and_follow_it(tmp_path):
    if reason := slow_links.reason_not_to():
        pytest.skip(reason)
    config = advised.Config(hosts=(2,), megabits=(100.0,), losses=("digits",), rounds=1, output=str(tmp_path))
    path = records.write(config.output, records.header("advised", config), advised.run(config))
    found = advised.cases(records.read(path))
    assert sorted(case.index for case in found) == list(range(COUNT))
    assert all(case.predicted > 0 and case.measured > 0 for case in found)
