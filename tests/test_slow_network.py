"""Hosts in network namespaces: what they send as the kernel counts it, what they decide, and what is left behind."""

import dataclasses
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import pytest

from experiments import __main__ as command
from experiments.common import asking
from experiments.common import host
from experiments.common import namespaces
from experiments.common import records
from experiments.speed import cost
from experiments.speed import slow_network
import figures
from signopt._tools import exchanges
import slow_links

ROOT = pathlib.Path(command.__file__).parents[1]


REASON = slow_links.reason_not_to()
on_links = pytest.mark.skipif(bool(REASON), reason=REASON or "links can be made")


def left_over():
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    own = f"{namespaces.PREFIX}-{os.getpid()}-"
    return [line for line in listed.splitlines() if line.startswith(own)] + list(
        namespaces.HOSTS_FOLDER.glob(f"{own}*")
    )


# ---- where it cannot run --------------------------------------------------------------------------------------------


def test_without_its_tools_the_command_says_which_and_where_they_come_from(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        SystemExit,
        match=r"makes its links with `ip` and `tc`, which PATH does not have: install iproute2 .*apt install",
    ):
        command.main(["slow_network", "--output", str(tmp_path / "out")])


def test_on_another_system_the_command_says_that_it_needs_linux(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(namespaces.NetworkError, match=r"needs the network namespaces of Linux, and this is darwin\."):
        namespaces.require()


def test_a_tool_that_is_refused_says_who_may(tmp_path, monkeypatch):
    for tool in ("ip", "tc"):
        fake = tmp_path / tool
        fake.write_text('#!/bin/sh\n[ "$2" = list ] && exit 0\necho "Operation not permitted" >&2\nexit 1\n')
        fake.chmod(0o755)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(
        namespaces.NetworkError,
        match=r"not permitted to make its links here: `ip netns add .*` says 'Operation not permitted'\. Run it as root",
    ):
        namespaces.require()


@pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0 or not (shutil.which("setpriv") and shutil.which("ip")),
    reason="not root, who could become somebody else",
)
def test_without_root_the_command_says_so(tmp_path):
    done = subprocess.run(
        ["setpriv", "--bounding-set=-sys_admin,-net_admin", "--inh-caps=-sys_admin,-net_admin", sys.executable, "-c",
         "from experiments.common import namespaces; namespaces.require()"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "NetworkError: `slow_network` is not permitted to make its links here" in done.stderr
    assert "Run it as root (`sudo`), in a container with `--privileged`" in done.stderr


# ---- links ----------------------------------------------------------------------------------------------------------


def test_what_the_kernel_counted_is_found_by_the_name_of_the_card():
    text = "Inter-| Receive\n face |bytes\n    lo:  5 1 0 0 0 0 0 0 5 1 0 0 0 0 0 0\n  eth0: 300 3 0 0 0 0 0 0 70 2 0 0 0 0 0 0\n"
    assert namespaces.counted(text) == (70, 300, 2, 3)
    assert namespaces.counted(text, device="lo") == (5, 5, 1, 1)
    with pytest.raises(namespaces.NetworkError, match=r"has to name a network card of this host, got 'eth1'"):
        namespaces.counted(text, device="eth1")


@on_links
@pytest.mark.parametrize("error", (KeyboardInterrupt, ValueError))
def test_namespaces_are_removed_whatever_happens(error):
    def interrupted():
        with namespaces.network(2) as found:
            namespaces.shape(found, 1e8)
            assert len(left_over()) == 3 + 2  # a switch, and a file of names for each host
            raise error

    with pytest.raises(error):
        interrupted()
    assert left_over() == []


@on_links
def test_a_terminated_run_removes_its_namespaces_and_the_next_one_those_of_a_killed(tmp_path):
    program = "from experiments.common import namespaces; import time\nwith namespaces.network(2): print('made', flush=True); time.sleep(60)"

    def names_after(number):
        process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None and process.stdout.readline() == "made\n"
        process.send_signal(number)
        process.wait(timeout=60)
        process.stdout.close()
        listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
        return [line for line in listed.splitlines() if line.startswith(f"{namespaces.PREFIX}-{process.pid}-")], process

    assert names_after(signal.SIGTERM)[0] == []
    names, process = names_after(signal.SIGKILL)
    assert len(names) == 3
    namespaces.require()
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    assert f"-{process.pid}-" not in listed


@on_links
def test_a_token_bucket_lets_through_what_it_should_and_no_more_than_a_burst_at_once():
    with namespaces.network(2) as found:
        namespaces.shape(found, 1e8)
        for name, device in ((found.namespaces[0], namespaces.DEVICE), (found.switch, "port1")):
            shown = subprocess.run(
                ["tc", "-n", name, "qdisc", "show", "dev", device], capture_output=True, text=True, check=True
            ).stdout
            assert "tbf" in shown and "rate 100Mbit" in shown and "burst 32Kb" in shown
        assert namespaces.BURST_BYTES <= 32 * 1024
        assert namespaces.dropped(found) == 0
        namespaces.shape(found, None)
        shown = subprocess.run(
            ["tc", "-n", found.switch, "qdisc", "show", "dev", "port1"], capture_output=True, text=True, check=True
        ).stdout
        assert "tbf" not in shown


# ---- votes and training ---------------------------------------------------------------------------------------------

PARAMETERS = 400_000
TINY = slow_network.Config(
    hosts=(2,), megabits=(1000.0, 0.0), parameters=PARAMETERS, leaves=3, rounds=2, seconds=0.01, width=16, batch_size=8,
    target=0.5, evaluate_every=5, steps=100, sgd_rate=0.1, signum_rate=0.005,
)  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The records of a tiny run."""
    if REASON:
        pytest.skip(REASON)
    config = dataclasses.replace(TINY, output=str(tmp_path_factory.mktemp("slow_network")))
    header = records.header("slow_network", config)
    return records.read(records.write(config.output, header, slow_network.run(config)))


def of_kind(found, kind):
    return [r for r in found[1:] if r["kind"] == kind]


def test_every_program_takes_its_turn_at_every_rate_and_nothing_is_left_behind(found):
    votes = of_kind(found, "vote")
    turns = [(r["megabits"], r["round"], r["program"]) for r in votes]
    assert len(set(turns)) == len(turns) == 2 * 2 * len(cost.WIRE_OF_PROGRAM)
    first = [next(t[2] for t in turns if t[:2] == (1000.0, turn)) for turn in range(2)]
    assert first[0] != first[1]
    assert all(r["seconds"] > 0 and r["count"] >= 2 and r["dropped"] == 0 for r in votes)
    assert left_over() == []


@pytest.mark.parametrize("program", cost.WIRE_OF_PROGRAM)
def test_the_network_card_sends_and_receives_what_the_formula_says(found, program):
    own = [r for r in of_kind(found, "vote") if r["program"] == program]
    # Between processes on CPUs, gloo sends bfloat16 as float32.
    widened = 2 if program == "bfloat16 mean" else 1
    for r in own:
        formula = widened * 8 * r["formula_bytes"] / PARAMETERS
        for direction in ("sent", "received"):
            # Two meetings of all hosts and what collectives say to each other are on top of it.
            assert formula <= slow_network.payload_bits(r, direction) <= 1.05 * formula + 8 * 3000 / PARAMETERS


def test_every_host_decides_the_same_and_every_way_to_count_does(found):
    votes = [r for r in of_kind(found, "vote") if r["program"] not in ("float32 mean", "bfloat16 mean")]
    assert all(r["same_everywhere"] for r in votes)
    decided = {program: {r["decided"] for r in votes if r["program"] == program} for program in cost.WIRE_OF_PROGRAM}
    assert len(decided["one_bit"]) == len(decided["two_bit"]) == 1
    assert decided["one_bit"] == decided["bits gathered by all"]
    assert decided["two_bit"] == decided["psum"] == decided["int8 sum of signs"]
    assert decided["one_bit, swapped"] == decided["one_bit"] and decided["two_bit, swapped"] == decided["two_bit"]
    assert decided["one_bit"] != decided["two_bit"]  # among two, half of all votes are ties


def test_training_stops_at_its_target_with_as_many_steps_on_any_network(found):
    trainings = of_kind(found, "training")
    assert [(r["optimizer"], r["wire"]) for r in trainings] == 2 * list(slow_network.RUNS)
    assert all(r["accuracy"] >= TINY.target and 0 < r["steps"] < TINY.steps and r["seconds"] > 0 for r in trainings)
    one, other = trainings[:3], trainings[3:]
    assert [(r["steps"], r["accuracy"]) for r in one] == [(r["steps"], r["accuracy"]) for r in other]
    sent = {r["wire"]: slow_network.payload_bits(r) for r in other}
    assert sent["mean"] > 8 * sent["two_bit"] > 8 * sent["one_bit"]


def test_a_late_host_is_timed_from_its_own_start(found):
    late = of_kind(found, "late")
    assert {(r["collective"], r["delay"]) for r in late} == {
        (name, delay) for name in host.COLLECTIVES for delay in (0.0, 0.01)
    }
    assert all(len(r["seconds"]) == 2 and min(r["seconds"]) > 0 for r in late)


def test_table_figure_and_cost_model_need_nothing_but_records(found, tmp_path):
    assert [drawn.row_count for drawn in slow_network.table(found).renderables] == [18, 8, 6]
    (figure,) = figures.drawn(slow_network, found, tmp_path)
    assert [axes.get_title() for axes in figure.axes] == ["votes", "training"]
    checked = list(cost.check(cost.medians(found), exchanges.Rates()))
    assert [r["program"] for r in checked] == list(cost.WIRE_OF_PROGRAM)


@on_links
def test_a_host_that_ends_is_an_error_with_what_it_said():
    with (
        namespaces.network(1) as network,
        asking.running(network) as ask,
        pytest.raises(RuntimeError, match=r"(?s)Host 0 of 1 has ended, and said:.*KeyError: 'nothing'"),
    ):
        ask("nothing")
    assert left_over() == []


# ---- what is made of records ----------------------------------------------------------------------------------------


def vote(program, turn, seconds, **more):
    shared = {"kind": "vote", "hosts": 2, "megabits": 100.0, "program": program, "round": turn, "seconds": seconds}
    return shared | {"parameters": 800} | more


def test_ratios_are_of_the_same_turn_and_the_same_link():
    found = [{}, vote("float32 mean", 0, 3.0), vote("one_bit", 0, 0.5), vote("one_bit", 1, 1.0)]
    found += [vote("float32 mean", 1, 8.0), vote("float32 mean", 0, 99.0) | {"megabits": 0.0}]
    assert slow_network.ratios(found, 2, 100.0, "one_bit") == [6.0, 8.0]


def test_headers_of_packets_are_no_payload():
    counted = {"bytes_sent": 166, "packets_sent": 1, "bytes_received": 232, "packets_received": 2}
    r = vote("one_bit", 0, 1.0, **counted)
    assert slow_network.payload_bits(r) == slow_network.payload_bits(r, "received") == 1.0
