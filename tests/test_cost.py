"""The cost model: its arithmetic, where wires stop winning, and how far it is from what was measured."""

import dataclasses
import math
import statistics

import jax
import pytest

from experiments import __main__ as command
from experiments.common import records
from experiments.speed import cost
import figures
import signopt
from signopt._tools import exchanges

FREE = exchanges.Rates(0, 0, 0, 0)
RATES = exchanges.Rates()


@pytest.mark.parametrize("workers", (2, 3, 8, 200, 100_000))
@pytest.mark.parametrize("leaves", (1, 7))
def test_bytes_are_those_of_the_library(workers, leaves):
    sizes = [143] * 6 + [142] if leaves == 7 else [1000]
    tree = [jax.ShapeDtypeStruct((size,), "float32") for size in sizes]
    parameters = sum(sizes)
    for wire, name in (("float32", "mean"), ("int8", "psum"), ("one_bit", "one_bit"), ("two_bit", "two_bit")):
        found = exchanges.bytes_sent(parameters, workers, wire, leaves=leaves)
        assert found == signopt.wire.bytes_sent(tree, workers, name)
    whole = sum(-(-size // 8) for size in sizes)
    assert exchanges.bytes_sent(parameters, workers, "all_gather", leaves=leaves) == (workers - 1) * whole


def test_between_two_hosts_a_gather_sends_what_a_vote_sends_and_more_between_more():
    for workers in (2, 4, 64):
        gathered, voted = (exchanges.bytes_sent(2**20, workers, wire) for wire in ("all_gather", "one_bit"))
        assert gathered / voted == workers / 2


@pytest.mark.parametrize("wire", exchanges.WIRES)
@pytest.mark.parametrize("workers", (2, 8, 1024))
def test_without_work_and_latency_time_is_bytes_over_bandwidth(wire, workers):
    cluster = exchanges.Cluster(workers, 1e8, 0.0, 0.0)
    expected = 8 * exchanges.bytes_sent(10**6, workers, wire) / 1e8
    assert exchanges.exchange_seconds(10**6, wire, cluster, FREE) == pytest.approx(expected, rel=1e-12)
    assert exchanges.exchange_seconds(10**6, wire, cluster, RATES) > expected
    late = exchanges.Cluster(workers, 1e8, 1e-3, 0.0)
    assert exchanges.exchange_seconds(10**6, wire, late, FREE) >= expected + 1e-3 * math.log2(workers) * (1 - 1e-9)


@pytest.mark.parametrize("wire", exchanges.CODED)
def test_the_codecs_send_what_the_library_sends_and_less_than_a_mean(wire):
    tree = [jax.ShapeDtypeStruct((1000,), "float32")]
    found = exchanges.bytes_sent(1000, 4, wire)
    assert found == signopt.wire.bytes_sent(tree, 4, exchanges.CODED[wire](4))
    assert found < exchanges.bytes_sent(1000, 4, "float32")
    work = exchanges.work_seconds(1000, 4, wire, dataclasses.replace(FREE, **{wire: 1.0}))
    assert work == 1000.0


def test_rare_exchanges_cost_their_share_and_late_ones_only_what_computation_does_not_hide():
    cluster, compute = exchanges.Cluster(2, 1e8, 0.0, 0.0), 0.3
    nothing = dict.fromkeys((field.name for field in dataclasses.fields(exchanges.Rates)), 0.0)
    rates = exchanges.Rates(**nothing | {"pack": 1e-8, "offset": 2e-8})

    def seconds(wire, **schedule):
        return exchanges.step_seconds(10**6, wire, cluster, rates, compute_seconds=compute, **schedule)

    floats, bits = 0.32, 0.01
    assert seconds("float32") == pytest.approx(compute + floats)
    assert seconds("float32", every=16) == pytest.approx(compute + floats / 16 + 0.02)
    # Parts send as much as the whole, and a part of everything in each step.
    assert seconds("float32", every=16, fragments=16) == pytest.approx(seconds("float32", every=16))
    # What is hidden is travel, never work.
    assert seconds("one_bit", delay=1) == pytest.approx(compute + 0.01 + 0.02)
    assert seconds("float32", delay=1) == pytest.approx(floats + 0.02)
    assert seconds("float32", every=8, fragments=8, delay=1) == pytest.approx(compute + 0.02)
    # Inside a `lax.cond`, and on CPUs, nothing is.
    assert seconds("float32", every=8, delay=1) == pytest.approx(compute + floats / 8 + 0.02)
    assert seconds("one_bit", delay=1, overlaps=False) == pytest.approx(compute + bits + 0.01 + 0.02)


def test_a_way_that_there_is_not_is_an_error_that_shows_some():
    with pytest.raises(
        SystemExit, match=r"--ways has to be of names such as sized/16/1/0, sized/16/16/1, got bit/1/1/0"
    ):
        cost.named("bit/1/1/0")
    assert cost.bits("one_bit/16/1/0", 2**20, 2) == pytest.approx(1 / 16)


def test_a_vote_is_never_more_than_thirty_two_times_as_fast():
    for workers in (2, 4, 8, 64):
        for bandwidth in (1e6, 1e8, 1e10):
            cluster = exchanges.Cluster(workers, bandwidth, 0.0, 0.0)
            floats, bits = (exchanges.exchange_seconds(2**24, wire, cluster, FREE) for wire in ("float32", "one_bit"))
            assert floats / bits == pytest.approx(32)
            floats, bits = (exchanges.exchange_seconds(2**24, wire, cluster, RATES) for wire in ("float32", "one_bit"))
            assert floats / bits < 32


@pytest.mark.parametrize("wire", ("two_bit", "one_bit"))
@pytest.mark.parametrize("workers", (2, 8, 4096))
@pytest.mark.parametrize("speed_up", (1.0, 1.5))
def test_a_wire_pays_below_its_break_even_and_not_above(wire, workers, speed_up):
    cluster, compute, slow = exchanges.Cluster(workers, math.nan), 0.05, dataclasses.replace(RATES, unpack=2e-9)
    settings = {"speed_up": speed_up, "compute_seconds": compute}
    below = exchanges.break_even(10**8, wire, cluster, slow, **settings)
    assert 0 < below < math.inf

    def gain(bandwidth):
        at = cluster._replace(bits_per_second=bandwidth)
        floats, bits = (
            exchanges.step_seconds(10**8, name, at, slow, compute_seconds=compute) for name in ("float32", wire)
        )
        return floats / bits

    assert gain(below) == pytest.approx(speed_up)
    assert gain(0.9 * below) > speed_up > gain(1.1 * below)


def test_a_gather_among_many_and_a_small_model_among_very_many_gain_nothing():
    many, very_many = exchanges.Cluster(128, math.nan), exchanges.Cluster(100_000, math.nan)
    assert exchanges.break_even(10**8, "all_gather", many, RATES) == 0
    assert exchanges.break_even(10**8, "one_bit", many, RATES) > 1e9
    # A chunk is a whole byte, whatever is in it.
    assert exchanges.bytes_sent(1000, 100_000, "one_bit") == 2 * 99_999
    assert exchanges.break_even(1000, "one_bit", very_many, RATES) == 0


def test_two_levels_send_a_share_over_each_hosts_link():
    inner, outer = exchanges.Cluster(8, 1e12, 0.0, 0.0), exchanges.Cluster(4, 1e8, 0.0, 0.0)
    inside = exchanges.exchange_seconds(2**20, "float32", inner, FREE)
    for wire in exchanges.WIRES:
        found = exchanges.two_level_seconds(2**20, wire, inner, outer, FREE, compute_seconds=0.5)
        assert found == pytest.approx(0.5 + inside + exchanges.exchange_seconds(2**20, wire, outer, FREE), rel=1e-6)
    alone = inner._replace(workers=1)
    found = exchanges.two_level_seconds(2**20, "one_bit", alone, outer, RATES)
    assert found == exchanges.exchange_seconds(2**20, "one_bit", outer, RATES)


def test_rates_come_from_records_where_there_are_any():
    def stage(name, planes, workers, seconds):
        shared = {"kind": "stage", "stage": name, "planes": planes, "workers": workers, "parameters": 10**6}
        return shared | {"seconds": seconds}

    found = [stage("pack", 1, 1, [3e-4, 1e-4, 2e-4]), stage("pack", 2, 1, [4e-4]), stage("count", 2, 8, [1e-4])]
    found += [stage("count", 1, 1024, [1.0]), {"kind": "program", "seconds": [1.0]}]
    rates = cost.rates_of([{}, *found])
    assert (rates.pack, rates.count) == pytest.approx((3e-10, 5e-11))  # of a ballot, and of one bit in it
    assert (rates.unpack, rates.add) == (RATES.unpack, RATES.add)


def measured():
    """What a `slow_network` would record whose votes take exactly as long as the model says."""
    found = []
    for hosts in (2, 4):
        for program, wire in cost.WIRE_OF_PROGRAM.items():
            cluster = exchanges.Cluster(hosts, 1e8 * cost.PAYLOAD_SHARE)
            name = "float32" if wire == "bfloat16" else wire
            seconds = exchanges.exchange_seconds(10**6, name, cluster, FREE)
            shared = {"kind": "vote", "hosts": hosts, "program": program, "parameters": 10**6, "round": 0, "decided": 1}
            found += [shared | {"megabits": 100.0, "seconds": seconds}, shared | {"megabits": 0.0, "seconds": 9.0}]
    return [{}, *found]


def test_the_check_finds_no_error_where_there_is_none_and_the_error_where_there_is():
    found = list(cost.check(measured(), FREE))
    assert len(found) == 2 * len(cost.WIRE_OF_PROGRAM)  # and none for links without a limit
    assert cost.errors([{}, *found]) == pytest.approx([0] * len(found))
    wrong = [r | {"seconds": 2 * r["seconds"]} for r in measured()[1:]]
    assert cost.errors([{}, *cost.check([{}, *wrong], FREE)]) == pytest.approx([-0.5] * len(found))


def test_the_records_that_are_kept_say_as_much_as_all_of_them(tmp_path):
    whole = measured()
    more = [whole[0], *whole[1:], *(r | {"round": 1} for r in whole[1:] if r["kind"] == "vote")]
    assert list(cost.check(cost.medians(more), RATES)) == list(cost.check(more, RATES))


def test_the_model_is_near_what_was_measured_and_the_kept_records_say_how():
    header, *kept = records.read(cost.KEPT)
    assert header["experiment"] == "slow_network" and {"jax", "signopt"} <= set(header["versions"])
    found = [header, *cost.check([header, *kept], RATES)]
    assert statistics.median(map(abs, cost.errors(found))) < 0.3
    # A model that forgets what the link takes is far off: this limit can be missed.
    free = [r | {"predicted": 0.1 * r["predicted"]} if r.get("kind") == "check" else r for r in found]
    assert statistics.median(map(abs, cost.errors(free))) > 0.8


@pytest.mark.slow
def test_the_command_prints_intervals_and_draws_the_figure(tmp_path, capsys):
    flags = ["--parameters", "1000000", "--sizes", "2,64", "--output", str(tmp_path)]
    command.main(["cost", *flags])
    header, *found = records.read(tmp_path / records.FILE)
    assert {r["kind"] for r in found} == {"rates", "check", "wire", "way", "two levels"}
    by_wire = {(r["workers"], r["wire"]): r for r in found if r["kind"] == "wire"}
    # Two hosts send as much either way, and a gather is one message less.
    assert by_wire[2, "all_gather"]["fastest_from"] == by_wire[64, "one_bit"]["fastest_from"] == pytest.approx(1e6)
    assert by_wire[64, "all_gather"]["pays_below"] == 0
    assert all(len(r["seconds"]) == len(cost.BANDWIDTHS) for r in by_wire.values())
    (figure,) = figures.drawn(cost, [header, *found], tmp_path)
    assert [axes.get_title() for axes in figure.axes if axes.axison] == [
        "2 workers",
        "64 workers",
        "64 workers: wire/every/fragments/delay",
        "8 hosts of 8 devices",
        "check",
    ]
    assert cost.table([header, *found]).renderables
    assert "fastest of all" in capsys.readouterr().out
