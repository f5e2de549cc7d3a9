"""The timing experiments: what is run and recorded, not how long it took."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.common import records
from experiments.speed.wire import steps as step_time
from experiments.speed.wire import vote as wire
import figures
from signopt import _flat
from signopt._tools import timing

TINY = wire.Config(parameters=1600, workers=4, leaves=(1, 5), voters=(4, 32), rounds=3)


def recorded(experiment, name, config):
    path = records.write(config.output, records.header(name, config), experiment.run(config))
    header, *found = records.read(path)
    drawn = experiment.table([header, *found])
    figures.drawn(experiment, [header, *found], config.output)
    return header, found, drawn


def test_programs_take_turns_and_who_goes_first_changes():
    calls = []
    programs = {name: lambda name=name: calls.append(name) for name in "abc"}
    seconds = timing.take_turns(programs, rounds=2)
    assert "".join(calls) == "abc" + "abc" + "cba"  # the first three compile
    assert {name: len(times) for name, times in seconds.items()} == {"a": 2, "b": 2, "c": 2}


def test_ratios_are_those_of_the_same_round():
    assert timing.ratios([2.0, 3.0], [1.0, 2.0]) == [2.0, 1.5]
    assert timing.quartiles([4.0]) == (4.0, 4.0, 4.0)
    assert timing.quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 3.0, 4.0)


@pytest.mark.slow
def test_wire_records_every_program_and_every_stage(tmp_path, devices):
    header, found, drawn = recorded(wire, "wire", dataclasses.replace(TINY, output=str(tmp_path)))
    programs = {(r["program"], r["leaves"], r["wire"]) for r in found if r["kind"] == "program"}
    wires = ("mean", "int8", "one_bit", "two_bit")
    expected = {("decisions", n, name) for n in (1, 5) for name in (*wires, "read", "copy")}
    assert programs == expected | {("apply", n, name) for n in (1, 5) for name in (*wires, "none")}
    stages = {(r["stage"], r["planes"], r["workers"]): r["bytes"] for r in found if r["kind"] == "stage"}
    assert stages["copy", 0, 1] == 2 * 4 * 1600
    assert stages["pack", 2, 1] == 4 * 1600 + 2 * 200
    assert stages["count", 1, 4] == 200 + 50  # 50 words of four voters, and the decisions
    assert stages["unpack", 1, 1] == 2 * 4 * 1600 + 200
    assert set(stages) >= {("count", planes, voters) for planes in (1, 2) for voters in (4, 32)}
    assert all(len(r["seconds"]) == 3 for r in found)
    assert drawn.row_count == len(found) and header["cores"] >= 1


def test_the_programs_that_are_compared_agree(devices):
    """One vote on three wires, unpacked: the signs of the same sums."""
    found = {name: program() for name, program in wire.decisions(TINY, 5).items()}
    like = found["mean"]
    for name in ("one_bit", "two_bit"):
        votes = _flat.unpack(found[name].reshape(-1), like)
        decided = jax.tree.map(lambda s: s != 0, found["int8"])
        jax.tree.map(lambda v, s, d: np.testing.assert_array_equal(v[d], np.sign(s[d])), votes, found["int8"], decided)
    after = {name: program()[0] for name, program in wire.applied(TINY, 5).items()}
    signs = jax.tree.map(lambda s: -wire.RATE * jnp.sign(s), found["int8"])
    jax.tree.map(np.testing.assert_array_equal, after["int8"], signs)
    jax.tree.map(np.testing.assert_array_equal, after["two_bit"], signs)
    jax.tree.map(lambda p, g: np.testing.assert_array_equal(p, -wire.RATE * g), after["mean"], like)


def test_a_share_of_a_copy_is_one_of_bandwidths():
    copy, stage = {"bytes": 100, "seconds": [1.0]}, {"bytes": 50, "seconds": [0.25]}
    assert wire.share_of_copy(stage, copy) == [2.0]


@pytest.mark.slow
def test_step_time_records_every_pair(tmp_path, devices):
    config = step_time.Config(
        parameters=60, leaves=(3,), voted_parameters=60, voted_leaves=4, voted_sizes=("different",), workers=2, rounds=2, compilations=1, imports=1,
        output=str(tmp_path),
    )  # fmt: skip
    _, found, drawn = recorded(step_time, "step_time", config)
    assert [r["kind"] for r in found] == ["step"] * 3 + ["compile"] * 3 + ["import"]
    assert all(len(r["plain"]) == len(r["ours"]) == {"step": 2}.get(r["kind"], 1) for r in found)
    assert drawn.row_count == len(found)


@pytest.mark.parametrize("name", step_time.LOCAL)
def test_a_local_step_needs_no_more_memory_than_optax(name):
    plain, ours = (step_time.local_step(make(), 100_000, 10) for make in step_time.LOCAL[name])
    # Keeping NaN out of a momentum takes one more copy of it while a step runs: each entry may have to stay as it was.
    kept = {"signum": 400_000}.get(name, 0)
    assert step_time.temporary_bytes(ours) <= step_time.temporary_bytes(plain) + kept
    jax.tree.map(np.testing.assert_array_equal, ours.program()[0], plain.program()[0])


def test_an_extra_buffer_would_be_seen():
    """Negative control of the test above: a step that needs all updates at once."""
    plain = optax.sign_sgd(0.1)

    def update_fn(updates, state, params=None):
        updates, state = plain.update(updates, state, params)
        total = optax.tree.norm(updates)
        return jax.tree.map(lambda x: jnp.sort(x) * total, updates), state

    greedy = step_time.local_step(optax.GradientTransformation(plain.init, update_fn), 100_000, 10)
    assert step_time.temporary_bytes(greedy) > step_time.temporary_bytes(step_time.local_step(plain, 100_000, 10))
