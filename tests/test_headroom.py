"""Headroom: what is timed, and what is said about it."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import __main__ as command
from experiments.common import records
from experiments.speed import headroom
import signopt

TINY = headroom.Config(workers=2, steps=2, rounds=2, batch_size=4, model="mlp")


def problem():
    """A user's own, as `--loss` finds it."""
    batches = jax.random.normal(jax.random.key(0), (3, 5, 4))
    return {"w": jnp.ones(4)}, lambda params, batch: jnp.mean(batch @ params["w"]), batches


def found(seconds, below=2.5e9):
    """Records of a run whose programs took so long."""
    header = {"config": {"workers": 8, "hosts": 16}, "device": "cpu", "cores": 2}
    programs = [
        {"kind": "program", "program": name, "parameters": 10, "seconds": [s, s]} for name, s in seconds.items()
    ]
    model = {
        "kind": "model",
        "wire": "one_bit",
        "compute_seconds": 0.05,
        "below": {"1.0": None, "1.1": below, "2.0": 0.0},
    }
    return json.loads(json.dumps([header, *programs, model]))


SECONDS = {
    "mean, float32": 1.0,
    "vote, two_bit": 0.8,
    "vote, one_bit": 0.5,
    "mean, left out": 0.4,
    "vote, left out": 0.45,
}


def test_a_users_own_step_is_timed_in_every_program(tmp_path, devices):
    flags = ["--loss", "tests.test_headroom:problem", "--workers", "2", "--rounds", "2", "--steps", "1"]
    command.main(["headroom", *flags, "--output", str(tmp_path)])
    header, *rest = records.read(tmp_path / records.FILE)
    programs = [r for r in rest if r["kind"] == "program"]
    assert [r["program"] for r in programs] == list(SECONDS)
    assert all(len(r["seconds"]) == 2 and min(r["seconds"]) > 0 and r["parameters"] == 4 for r in programs)
    assert [r["wire"] for r in rest if r["kind"] == "model"] == ["two_bit", "one_bit"]
    assert (tmp_path / "headroom.png").exists()
    assert len(headroom.words([header, *rest])) == 4


def test_left_out_means_that_nothing_is_exchanged_and_nothing_else_changes(devices):
    params, loss, batches = problem()
    made = headroom.programs(TINY, params, loss, batches)
    ends = {name: program()[0][0]["w"] for name, program in made.items()}
    replicas = {name: np.stack([shard.data for shard in w.addressable_shards]) for name, w in ends.items()}
    for name, of_workers in replicas.items():
        assert of_workers.shape == (2, 4)
        # Workers whose collective is left out follow their own gradients; the others stay together.
        assert (of_workers[0] == of_workers[1]).all() == ("left out" not in name), name
    # The mean of two steps of plain SGD, with the collective done by hand.
    gradient = jax.grad(loss)
    own = [jax.tree.map(jnp.copy, params) for _ in range(2)]
    momentum = [jax.tree.map(jnp.zeros_like, params) for _ in range(2)]
    for _ in range(TINY.steps):
        for i in range(2):
            momentum[i] = jax.tree.map(lambda m, g: 0.9 * m + g, momentum[i], gradient(own[i], batches[i]))
            own[i] = jax.tree.map(lambda p, m: p - 1e-3 * m, own[i], momentum[i])
    np.testing.assert_allclose(replicas["mean, left out"], np.stack([p["w"] for p in own]), rtol=1e-5)


def test_no_collective_is_compiled_where_it_is_left_out(devices):
    params, loss, batches = problem()
    seen = {}
    original = signopt.workers.on_mesh

    def watching(step, mesh, **kwargs):
        run = original(step, mesh, **kwargs)

        def counted(state, batch):
            text = str(jax.make_jaxpr(run)(state, batch))
            seen[len(seen)] = [name for name in ("psum", "all_to_all", "all_gather") if name in text]
            return run(state, batch)

        return counted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(headroom.signopt.workers, "on_mesh", watching)
        for program in headroom.programs(headroom.Config(workers=2, steps=1), params, loss, batches).values():
            program()
    mean, two_bit, one_bit, mean_left_out, vote_left_out = (seen[i] for i in range(5))
    assert mean == ["psum"]
    assert two_bit == one_bit == ["all_to_all", "all_gather"]
    assert mean_left_out == vote_left_out == []


def test_words_say_what_share_is_communication_and_what_is_possible():
    said = headroom.words(found(SECONDS))
    assert said[0] == (
        "Communication takes 60% of your step here, so nothing that compresses makes it more than 2.50 times as fast."
    )
    assert said[1] == "A vote makes it 1.25 (two bits) or 2.00 (one bit) times as fast."
    assert said[2].startswith("The cost model, for 16 hosts with a link each and 50 ms of computation: one_bit makes")
    assert said[2].endswith("1.1 times as fast below 2.5 Gbit/s, and twice below no bandwidth.")


def test_words_say_when_there_is_nothing_to_gain():
    slower = SECONDS | {"mean, left out": 1.1, "vote, one_bit": 1.5, "vote, two_bit": 1.4}
    said = headroom.words(found(slower, below=None))
    assert said[0] == "Communication takes no measurable share of your step here: there is nothing to gain."
    assert said[1].endswith("on this network, keep the mean.")
    assert "at any bandwidth" in said[2]


def test_a_loss_that_cannot_be_imported_is_an_error_that_names_the_flag(tmp_path):
    with pytest.raises(ValueError, match=r"`--loss nowhere:problem` has to be package.module:function"):
        list(headroom.run(headroom.Config(loss="nowhere:problem", output=str(tmp_path))))
