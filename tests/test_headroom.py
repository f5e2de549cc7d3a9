"""`python -m signopt headroom`: what is timed, and what is said about it."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import signopt
from signopt._tools import headroom
from signopt._tools import problem as problems


@pytest.fixture
def problem():
    """A user's own."""
    batches = jax.random.normal(jax.random.key(0), (3, 5, 4))
    return problems.of(({"w": jnp.ones(4)}, lambda params, batch: jnp.mean(batch @ params["w"]), batches))


def found(seconds, below=2.5e9):
    """Records of a run whose programs took so long."""
    shared = {"kind": "program", "parameters": 1234, "workers": 8, "device": "cpu"}
    programs = [shared | {"program": name, "seconds": [s, s]} for name, s in seconds.items()]
    below = {"1.0": None, "1.1": below, "2.0": 0.0}
    model = {"kind": "model", "wire": "one_bit", "hosts": 16, "compute_seconds": 0.05, "below": below}
    return json.loads(json.dumps([*programs, model]))


SECONDS = {
    "mean, float32": 1.0,
    "vote, two_bit": 0.8,
    "vote, one_bit": 0.5,
    "mean, left out": 0.4,
    "vote, left out": 0.45,
}


def test_left_out_means_that_nothing_is_exchanged_and_nothing_else_changes(problem, devices):
    steps = 2
    made = headroom.programs(problem, devices[:2], steps)
    assert list(made) == list(SECONDS)
    ends = {name: program()[0][0]["w"] for name, program in made.items()}
    replicas = {name: np.stack([shard.data for shard in w.addressable_shards]) for name, w in ends.items()}
    for name, of_workers in replicas.items():
        assert of_workers.shape == (2, 4)
        # Workers whose collective is left out follow their own gradients; the others stay together.
        assert (of_workers[0] == of_workers[1]).all() == ("left out" not in name), name
    # Two steps of plain SGD of each worker's own.
    gradient = jax.grad(problem.loss)
    own = [problem.params for _ in range(2)]
    momentum = [jax.tree.map(jnp.zeros_like, problem.params) for _ in range(2)]
    for _ in range(steps):
        for i in range(2):
            momentum[i] = jax.tree.map(lambda m, g: 0.9 * m + g, momentum[i], gradient(own[i], problem.batches[i]))
            own[i] = jax.tree.map(lambda p, m: p - 1e-3 * m, own[i], momentum[i])
    np.testing.assert_allclose(replicas["mean, left out"], np.stack([p["w"] for p in own]), rtol=1e-5)


def test_no_collective_is_traced_where_it_is_left_out(problem, devices, monkeypatch):
    seen = []
    original = signopt.workers.on_mesh

    def watching(step, mesh, **kwargs):
        run = original(step, mesh, **kwargs)

        def looked_at(state, batch):
            text = str(jax.make_jaxpr(run)(state, batch))
            seen.append([name for name in ("psum", "all_to_all", "all_gather") if name in text])
            return state, None

        return looked_at

    monkeypatch.setattr(headroom.workers, "on_mesh", watching)
    for program in headroom.programs(problem, devices[:2], 1).values():
        program()
    voted = ["all_to_all", "all_gather"]
    assert seen == [["psum"], voted, voted, [], []]


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


def test_the_report_has_a_line_for_each_program():
    title, _, header, *rows, _, _, _, _ = headroom.report(found(SECONDS)).splitlines()
    assert title == "A step on 1,234 parameters, 8 workers on cpu; medians:"
    assert header.split("  ")[0] == "gradients meet by"
    assert rows[2].split() == ["vote,", "one_bit", "500.00", "2.00", "2.00", "to", "2.00"]
    assert len(rows) == 5
