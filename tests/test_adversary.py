"""Bad workers send what they are said to send, and a vote survives what it should."""

import dataclasses
import io
import json
import math
import re
import statistics

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
import numpy as np
import optax
import pytest
import rich.console

from experiments.papers.adversaries import liars as adversaries
import figures
import reference
import signopt
from signopt import adversary
from signopt import theory
from signopt import workers

M = 5
WIRES = ("one_bit", "two_bit", "psum")


def sent(kind, num_adversaries, rows, count=0, axis_name="w"):
    """What every worker sends when each has a row of its own."""
    tx = adversary.corrupt(kind, num_adversaries, axis_name)
    update = lambda row, state: tx.update(row, state)
    state = adversary.CorruptState(jnp.int32(count))
    rows, new_state = jax.vmap(update, (0, None), (0, None), axis_name=axis_name)(rows, state)
    assert new_state.count == count + 1
    return rows


def draw(rng, shape=(M, 40)):
    return {"a": rng.normal(size=shape).astype(np.float32), "b": rng.choice([-2.0, 0.0, 3.0], shape).astype(np.float32)}


KINDS = {
    "inverted": adversary.inverted(),
    "scaled": adversary.scaled(-1000.0),
    "silent": adversary.silent(),
    "random": adversary.random(jax.random.key(0)),
    "colluding": adversary.colluding(),
}


@pytest.mark.parametrize("kind", KINDS)
def test_honest_workers_keep_their_bits_and_bad_ones_come_first(kind, rng):
    rows = draw(rng)
    rows["a"][:, 3] = np.nan
    found = sent(KINDS[kind], 2, rows)
    for name in rows:
        np.testing.assert_array_equal(found[name][2:], rows[name][2:])
        assert (np.asarray(found[name][:2]) != rows[name][:2]).any(axis=1).all()
    nobody = sent(KINDS[kind], 0, rows)
    for name in rows:
        np.testing.assert_array_equal(nobody[name], rows[name])


def test_what_each_kind_sends(rng):
    rows = draw(rng)
    everybody = lambda kind: sent(KINDS[kind], M, rows)
    for name, x in rows.items():
        np.testing.assert_array_equal(everybody("inverted")[name], -x)
        np.testing.assert_array_equal(everybody("scaled")[name], np.float32(-1000) * x)
        np.testing.assert_array_equal(everybody("silent")[name], np.zeros_like(x))
        np.testing.assert_array_equal(np.abs(everybody("random")[name]), np.abs(x))
        against = -np.sign(np.sign(x).sum(0))
        np.testing.assert_array_equal(everybody("colluding")[name], np.broadcast_to(against, x.shape))


def test_coins_are_fair_and_differ_between_workers_leaves_and_steps():
    ones = {"a": np.ones((2, 10_000), np.float32), "b": np.ones((2, 10_000), np.float32)}
    coins = [sent(KINDS["random"], 2, ones, count=k) for k in (0, 1)]
    streams = [np.asarray(coin[name][m]) for coin in coins for name in ones for m in range(2)]
    for i, one in enumerate(streams):
        assert abs(one.mean()) < 5 / math.sqrt(10_000)
        for other in streams[:i]:
            assert abs((one * other).mean()) < 5 / math.sqrt(10_000)
    again = sent(KINDS["random"], 2, ones)
    np.testing.assert_array_equal(again["a"], coins[0]["a"])


def test_the_number_of_adversaries_may_be_traced(rng):
    rows = draw(rng)
    counts = jnp.arange(M + 1)
    found = jax.vmap(lambda k: sent(adversary.inverted(), k, rows)["a"])(counts)
    for k in range(M + 1):
        np.testing.assert_array_equal(found[k], sent(adversary.inverted(), k, rows)["a"])


def run(kind, num_adversaries, rows, wire, runner=workers.simulate):
    """The vote over one row per worker."""
    tx = optax.chain(adversary.corrupt(kind, num_adversaries, "w"), signopt.majority_vote("w", wire=wire))

    def step(state, batch):
        decisions, opt_state = tx.update(batch[0], state[1])
        return (decisions, opt_state), None

    start = (jnp.zeros(rows.shape[1:]), tx.init(jnp.zeros(rows.shape[1:])))
    return np.asarray(runner(step, len(rows), axis_name="w")(start, rows)[0][0])


@pytest.mark.parametrize("wire", WIRES)
def test_a_vote_reads_a_scaled_worker_as_an_inverted_one(wire, rng):
    rows = rng.normal(size=(M, 40)).astype(np.float32)
    np.testing.assert_array_equal(run(KINDS["scaled"], 2, rows, wire), run(KINDS["inverted"], 2, rows, wire))
    ballots = np.sign(rows) * np.where(np.arange(M) < 2, -1, 1)[:, None]
    np.testing.assert_array_equal(run(KINDS["inverted"], 2, rows, wire), reference.vote_on(wire, ballots, 0))


@pytest.mark.parametrize("wire", WIRES)
def test_a_minority_cannot_turn_a_unanimous_vote_and_a_majority_can(wire):
    rows = np.broadcast_to(np.where(np.arange(24) % 3, 1.0, -1.0), (M, 24)).astype(np.float32)
    for kind in ("inverted", "scaled", "colluding"):
        np.testing.assert_array_equal(run(KINDS[kind], 2, rows, wire), rows[0])
        np.testing.assert_array_equal(run(KINDS[kind], 3, rows, wire), -rows[0])
    for kind in ("silent", "random"):
        np.testing.assert_array_equal(run(KINDS[kind], 2, rows, wire), rows[0])
    # Silence is never opposition: two bits keep the decision as long as one worker speaks.
    if wire != "one_bit":
        np.testing.assert_array_equal(run(KINDS["silent"], M - 1, rows, wire), rows[0])


def test_those_who_collude_do_more_harm_than_those_who_only_lie(rng):
    """Against a noisy truth: each of 9 workers is right with probability 0.7, two of them are bad."""
    truth = np.ones(4000)
    rows = np.where(rng.random((9, 4000)) < 0.7, truth, -truth).astype(np.float32)
    wrong = {kind: (run(KINDS[kind], 2, rows, "psum") < 0).mean() for kind in ("silent", "inverted", "colluding")}
    # Exactly: inverted votes are right with probability 0.3, so the number of right votes is a sum of two binomials.
    pmf = lambda n, p: np.array([math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)])
    expected = np.convolve(pmf(7, 0.7), pmf(2, 0.3))[:5].sum()
    assert abs(wrong["inverted"] - expected) < 5 * math.sqrt(expected / 4000)
    assert wrong["silent"] + 0.03 < wrong["inverted"] < wrong["colluding"] - 0.03


@pytest.mark.parametrize("kind", KINDS)
def test_every_runner_gives_the_same_votes(kind, rng, devices):
    mesh = jax.make_mesh((M,), ("w",), axis_types=(AxisType.Auto,), devices=devices[:M])
    on_mesh = lambda step, _, axis_name: workers.on_mesh(step, mesh, axis_name=axis_name)
    rows = rng.normal(size=(M, 17)).astype(np.float32)
    for wire in WIRES:
        found = run(KINDS[kind], 2, rows, wire, on_mesh)
        np.testing.assert_array_equal(found, run(KINDS[kind], 2, rows, wire))


def test_training_with_inverted_votes_meets_theorem_2():
    """Its setting: a quadratic, its learning rate, K samples per step and worker, normal noise; from both sides."""
    num_workers, dimension, steps = 9, 20, 64
    smoothness, noise, gap = float(dimension), 2.0 * dimension, 0.5 * dimension
    rate = math.sqrt(gap / (smoothness * steps))

    def norms(num_adversaries, key):
        tx = optax.chain(
            adversary.corrupt(adversary.inverted(), num_adversaries, "w"), signopt.signsgd(rate, axis_name="w")
        )

        def step(state, batch):
            x, opt_state = state
            gradient = x + batch[0] * 2.0 / math.sqrt(steps)
            updates, opt_state = tx.update(gradient, opt_state, x)
            return (x + updates, opt_state), jnp.abs(x).sum()

        x = jnp.ones(dimension)
        samples = jax.random.normal(key, (steps, num_workers, dimension))
        return jax.lax.scan(workers.simulate(step, num_workers, axis_name="w"), (x, tx.init(x)), samples)[1].mean()

    keys = jax.random.split(jax.random.key(0), 20)
    sweep = jax.jit(jax.vmap(jax.vmap(norms, (None, 0)), (0, None)))
    found = np.asarray(sweep(jnp.arange(5), keys))
    means, errors = found.mean(1), found.std(1, ddof=1) / math.sqrt(20)
    for bad in range(5):
        bound = theory.adversarial_vote_rate(
            steps, gap=gap, smoothness=smoothness, noise=noise, num_workers=num_workers, adversaries=bad / num_workers
        )
        assert 0.1 * bound < means[bad] - 5 * errors[bad]  # so the bound says something
        assert means[bad] + 5 * errors[bad] < bound
    assert means[4] > means[0] + 5 * (errors[0] + errors[4])  # adversaries do harm


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match=re.escape("`corrupt(num_adversaries=...)` has to be at least 0, got -1.")):
        adversary.corrupt(adversary.silent(), -1, "w")
    sentence = "`corrupt(num_adversaries=...)` has to be at most the size of axis 'w', which is 5, got 6."
    with pytest.raises(ValueError, match=re.escape(sentence)):
        sent(adversary.silent(), 6, np.ones((M, 2), np.float32))
    tx = adversary.corrupt(adversary.silent(), 1, "w")
    with pytest.raises(ValueError, match=r"`corrupt` has to be called where axis 'w' is bound"):
        tx.update(jnp.ones(2), tx.init(None))
    with pytest.raises(TypeError, match=r"`corrupt` has to be given floating-point leaves, got int32"):
        sent(adversary.silent(), 1, np.ones((M, 2), np.int32))


# ---- the experiment --------------------------------------------------------------------------------------------------


def experiment(**settings):
    config = dataclasses.replace(adversaries.Config(more=1, bound=False), **settings)
    return json.loads(json.dumps([{"config": dataclasses.asdict(config)}, *adversaries.run(config)]))


def test_signum_survives_four_sign_flippers_of_nine():
    records = experiment(methods=("signum + vote",), kinds=("inverted",), adversaries=(3, 4, 5))
    found = adversaries.accuracies(records, "signum + vote", "inverted")
    assert statistics.mean(found[3]) >= 0.92
    assert statistics.mean(found[4]) >= 0.86
    assert statistics.mean(found[5]) < 0.5  # a majority of liars wins


def test_one_scaled_worker_ruins_a_mean_and_not_a_vote():
    settings = {"methods": ("signum + vote", "mean"), "kinds": ("scaled",), "seeds": 2, "steps": 200}
    records = experiment(adversaries=(0, 1), **settings)
    vote, mean = (adversaries.accuracies(records, method, "scaled") for method in ("signum + vote", "mean"))
    assert min(vote[0] + vote[1] + mean[0]) > 0.9
    assert max(mean[1]) < 0.3
    loss = {r["adversaries"]: r["train_loss"] for r in records[1:] if r["method"] == "mean"}
    assert loss[1] is None or loss[1] > 1e3 * loss[0]


def test_the_figure_is_drawn_from_records(tmp_path):
    config = adversaries.Config(kinds=("inverted",), methods=("signum + vote", "mean"), adversaries=(0, 4), seeds=2)
    size = {"steps": 600, "batch_size": 8}
    rest = [
        {
            "method": method,
            "kind": "inverted",
            "adversaries": k,
            "seed": seed,
            "test_accuracy": accuracy + seed / 10,
            **more,
        }
        for method, k, accuracy, more in (
            ("signum + vote", 0, 0.8, size),
            ("signum + vote", 4, 0.7, size),
            ("mean", 0, 0.6, size),
            ("mean", 4, 0.1, size),
            ("signum + vote", 0, 0.85, size | {"steps": 2400}),
            ("signum + vote", 4, 0.75, size | {"steps": 2400}),
        )
        for seed in range(2)
    ]
    rest += [{"method": "theorem 2", "adversaries": k, "norm": 1.0 + k, "error": 0.1, "bound": 9.0 + k} for k in (0, 4)]
    records = json.loads(json.dumps([{"config": dataclasses.asdict(config)}, *rest]))
    figures.drawn(adversaries, records, tmp_path)
    console = rich.console.Console(width=200, record=True, file=io.StringIO())
    console.print(adversaries.table(records))
    text = console.export_text()
    for cell in ("0.850", "0.750", "0.150", "signum + vote, 2400 steps x 8", "0.900", "5.00", "13.00"):
        assert cell in text
