"""Exchanges that are hidden: what is compared, and what is made of records."""

import dataclasses

import jax.numpy as jnp
import pytest

from experiments.common import records
from experiments.common import ways
from experiments.speed import cost
from experiments.speed import hidden
import figures
import signopt
from signopt._tools import exchanges
import slow_links

AXIS = "worker"


@pytest.mark.parametrize("way", (ways.ALONE, *ways.NAMES))
def test_every_way_sends_what_the_model_counts(way):
    params = {"w": jnp.zeros((512, 64))}
    optimizer = ways.optimizer(ways.modelled(way), AXIS, 4)
    sent = signopt.wire.bytes_sent(params, 4, optimizer) if way != ways.ALONE else 0
    if way == ways.ALONE:
        assert signopt.wire.bytes_sent(params, 4, optimizer) == 0
        return
    _, schedule = cost.named(ways.modelled(way))
    per_step = 8 * sent * schedule["fragments"] / schedule["every"] / 2**15
    assert cost.bits(ways.modelled(way), 2**15, 4) == pytest.approx(per_step, rel=0.02)


def made_up(error=1.0):
    """Records of a run whose steps take as long as the model says, times `error`."""
    config = hidden.Config(hosts=(2,), megabits=(100.0,), tokens=(32,))
    size, compute = 10**6, 0.02
    link = {"workers": 2, "bits_per_second": 9e7, "latency_seconds": 1e-4, "message_seconds": 0.0}
    rates = dataclasses.asdict(exchanges.Rates())
    where = {"hosts": 2, "megabits": 100.0, "tokens": 32}
    found = [records.header("hidden", config), {"kind": "link", "sums": link, "deals": link, "rates": rates} | where]
    for way in (ways.ALONE, *ways.NAMES):
        seconds = compute
        if way != ways.ALONE:
            wire, schedule = cost.named(ways.modelled(way))
            seconds = error * exchanges.step_seconds(
                size,
                wire,
                exchanges.Cluster(**link),
                exchanges.Rates(),
                compute_seconds=compute,
                overlaps=ways.overlaps(way),
                **schedule,
            )
        shared = {"kind": "step", "way": way, "parameters": size, "bytes_sent": 1.0} | where
        found += [shared | {"round": turn, "seconds": seconds} for turn in range(3)]
    return found


def test_the_model_has_no_error_where_there_is_none_and_the_error_where_there_is():
    assert [case.error for case in hidden.cases(made_up())] == pytest.approx([0.0] * len(ways.NAMES))
    assert [case.error for case in hidden.cases(made_up(2.0))] == pytest.approx([-0.5] * len(ways.NAMES))
    assert hidden.said(hidden.cases(made_up())).endswith(f"{len(ways.NAMES)} of {len(ways.NAMES)} within 15%")
    assert f"; 0 of {len(ways.NAMES)} within 15%" in hidden.said(hidden.cases(made_up(1.3)))


def test_a_late_vote_is_compared_with_the_longer_of_computation_and_traffic():
    of = {case.way: case for case in hidden.cases(made_up())}
    at_once, apart = of["one_bit/1/1/0"], of["one_bit/1/1/1" + ways.TWO_PROGRAMS]
    assert at_once.traffic == pytest.approx(1e6 / (1e8 * cost.PAYLOAD_SHARE))
    assert at_once.over_bound == pytest.approx(at_once.measured / 0.02)  # it computes for longer than it travels
    assert apart.over_bound < 1.1 < at_once.over_bound
    floats = of["float32/1/1/0"]
    assert floats.over_bound == pytest.approx(floats.measured / floats.traffic)


def test_tables_and_the_figure_need_nothing_but_records(tmp_path):
    found = made_up()
    assert hidden.table(found).row_count == len(ways.NAMES)
    assert [row[0] for row in hidden.summary(found)[2:]] == list(ways.NAMES)
    (figure,) = figures.drawn(hidden, found, tmp_path)
    assert [axes.get_title() for axes in figure.axes if axes.axison] == ["2 hosts, 100 Mbit/s, 32 tokens"]


@pytest.mark.slow
def test_hosts_step_in_every_way(tmp_path):
    if reason := slow_links.reason_not_to():
        pytest.skip(reason)
    config = hidden.Config(
        hosts=(2,), megabits=(1000.0,), tokens=(4,), width=16, layers=1, rounds=1, steps=16, output=str(tmp_path)
    )
    path = records.write(config.output, records.header("hidden", config), hidden.run(config))
    cases = hidden.cases(records.read(path))
    assert [case.way for case in cases] == list(ways.NAMES)
    assert all(case.measured > 0 and case.predicted > 0 for case in cases)
