"""The language experiment: its text, its model, its rule for learning rates, and its figures."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers
import pytest

from experiments.common import records
from experiments.common import text
from experiments.training import language
from experiments.training import methods
import signopt

SMALL = text.Shape(layers=1, width=16, context=8, workers=2, batch_size=2, steps=16, evaluations=2, windows=16)


def test_the_standard_librarys_text_is_three_parts_that_share_no_file():
    parts = text.load()
    assert len(parts.train) > 5 * len(parts.tune) > 10**6 and len(parts.validate) > 10**5
    for one, other in ((parts.train, parts.tune), (parts.train, parts.validate), (parts.tune, parts.validate)):
        assert one[:2000].tobytes() not in other.tobytes()
    assert re.fullmatch("[0-9a-f]{8}", parts.crc())


def test_a_text_of_ones_own_is_cut_at_its_end(tmp_path):
    file = tmp_path / "own.txt"
    file.write_bytes(bytes(range(200)))
    parts = text.load(str(file))
    assert [part.tolist() for part in parts] == [list(range(180)), list(range(180, 190)), list(range(190, 200))]


def test_a_byte_does_not_see_what_comes_after_it(rng):
    params = jax.jit(lambda key: text.init(key, SMALL))(jax.random.key(0))
    read = rng.integers(0, 256, (1, 8)).astype(np.uint8)
    scores = jax.jit(text.logits)
    one, other = scores(params, read), scores(params, np.where(np.arange(8) < 5, read, 255 - read).astype(np.uint8))
    np.testing.assert_array_equal(one[:, :5], other[:, :5])
    assert (one[:, 5:] != other[:, 5:]).all(-1).all()


def test_matrices_of_blocks_are_orthogonalized_and_embeddings_are_not():
    dims = text.matrices(jax.eval_shape(lambda key: text.init(key, SMALL), jax.random.key(0)))
    assert dims["embed"] is dims["head"] is dims["position"] is dims["blocks"]["norm"] is None
    assert dims["blocks"]["up"] == dims["blocks"]["attention"] == MuonDimensionNumbers(-2, -1)


def test_training_lowers_the_loss_and_a_seed_repeats():
    make = lambda schedule: signopt.signum(schedule, axis_name=text.AXIS, num_workers=2)
    train = text.trainer(make, SMALL)
    curve, again, other = train(0.01, 0), train(0.01, 0), train(0.01, 1)
    assert curve.train.shape == (16,) and curve.held_out.shape == (2,)
    assert curve.held_out[-1] < curve.train[0] - 0.5
    np.testing.assert_array_equal(curve.train, again.train)
    assert curve.train[0] != other.train[0]
    fixed = signopt.signum(text.cosine(0.01, 16), axis_name=text.AXIS, num_workers=2)
    np.testing.assert_allclose(text.train(fixed, SMALL).held_out, curve.held_out, rtol=1e-5)


@pytest.mark.slow
def test_gradients_are_taken_where_one_says():
    tx = optax.chain(signopt.mean(text.AXIS), optax.sgd(0.0))
    here = text.train(tx, SMALL)
    there = text.train(tx, SMALL, gradient_at=lambda opt_state, params: jax.tree.map(jnp.zeros_like, params))
    assert there.train[0] == pytest.approx(np.log(256), rel=1e-5) != here.train[0]


@pytest.mark.slow
def test_workers_that_are_not_alike_draw_from_pieces_of_their_own(tmp_path):
    """The first half of this text is one byte over and over, the second half another."""
    file = tmp_path / "halves.txt"
    file.write_bytes(b"a" * 4500 + b"b" * 5500)  # of which the first nine tenths are trained on
    own = optax.chain(signopt.mean(text.AXIS), optax.sgd(0.0))
    apart = text.train(own, SMALL._replace(file=str(file), alike=False, steps=2))
    np.testing.assert_allclose(*apart.train, rtol=1e-5)  # a half each, in every step


def test_tuning_ends_with_a_worse_rate_on_each_side():
    tried = dict(language.tuned(lambda rate: abs(np.log2(rate / 0.03)), 1.0))
    best = min(tried, key=tried.get)
    assert {best / 2, best * 2} <= set(tried)
    assert all(tried[rate] > tried[best] for rate in (best / 2, best * 2))
    diverging = dict(language.tuned(lambda rate: np.nan if rate > 1 else 1 - rate, 1.0))
    assert min(diverging, key=diverging.get) == 1.0


def test_every_method_is_tuned_and_trained_and_drawn(tmp_path, monkeypatch):
    """With trainings that are only a parabola of the logarithm of the learning rate: the best one is 3e-3 for all."""

    def trainer(make, shape, *, split="validate"):
        params = jax.eval_shape(lambda key: text.init(key, shape), jax.random.key(0))
        jax.eval_shape(make(text.cosine(0.1, 16)).init, params)

        def train(peak, seed):
            loss = 1.5 + 0.01 * seed + np.log2(max(peak, 1e-9) / 3e-3) ** 2 + (split == "tune")
            return text.Curve(np.full(shape.steps, loss), np.full(shape.evaluations, loss))

        return train

    monkeypatch.setattr(text, "trainer", trainer)
    config = language.Config(seeds=2, tune=True, layers=1, width=16, output=str(tmp_path))
    path = records.write(config.output, records.header("language", config), language.run(config))
    found = records.read(path)
    runs = {r["method"]: r for r in found[1:] if r["kind"] == "run"}
    assert list(runs) == list(methods.FIRST) and len(found) > 2 + 2 * len(runs)
    assert runs["mh_signsgd"]["learning_rate"] is None
    assert all(2e-3 < r["learning_rate"] < 5e-3 for name, r in runs.items() if name != "mh_signsgd")
    # A mean sends 32 bits for each bit of a vote, but for the bytes that small leaves do not fill.
    assert 31 < runs["sgd"]["bytes_per_step"] / runs["sign_muon"]["bytes_per_step"] <= 32
    (row,) = [row for row in language.summary(found) if row[0] == "muon"]
    assert row[2].endswith("± 0.007") and float(row[3]) == 48
    assert len(language.table(found).rows) == len(methods.FIRST)
    assert all(figure.exists() for figure in language.plot(found, str(tmp_path)))


@pytest.fixture(scope="module")
def gradients():
    """Of three steps, for each of two workers."""
    params = text.init(jax.random.key(0), SMALL)
    keys = jax.random.split(jax.random.key(1), 3)
    return params, [optax.tree.random_like(k, jax.tree.map(lambda p: jnp.stack([p, p]), params)) for k in keys]


def stepped(name, gradients):
    """The last updates, and the state."""
    params, steps = gradients
    tx = methods.METHODS[name].make(lambda count: 1.0, language.Config(workers=2, wire="two_bit"))
    tx = optax.with_extra_args_support(tx)
    update = signopt.workers.simulate(
        lambda state, g: tx.update(jax.tree.map(lambda x: x[0], g), state, params)[::-1], 2, axis_name=text.AXIS
    )
    state = tx.init(params)
    for gradient in steps:
        state, updates = jax.jit(update)(state, gradient)
    return jax.tree.map(lambda x: x[0], updates), state


def test_variants_are_built_from_links_that_make_sign_muon(gradients, monkeypatch):
    plain = methods.Method(methods._sign_muon_with(), 1.0)
    monkeypatch.setitem(methods.METHODS, "plain", plain)
    one, other = (stepped(name, gradients)[0] for name in ("sign_muon", "plain"))
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.slow
def test_variants_vote_nearly_as_sign_muon_does(gradients):
    one, _ = stepped("sign_muon", gradients)
    for name in methods.VARIANTS:
        found, _ = stepped(name, gradients)
        x, y = (np.concatenate([np.sign(v).ravel() for v in jax.tree.leaves(tree)]) for tree in (one, found))
        both = (x != 0) & (y != 0)
        agree = np.mean(x[both] == y[both])
        assert agree > 0.7, (name, agree)
        if not name.endswith("_groups"):
            assert not np.array_equal(one["blocks"]["up"], found["blocks"]["up"]), name


def test_embeddings_of_a_group_move_further(gradients):
    plain, groups = (stepped(name, gradients)[0] for name in ("sign_muon", "sign_muon_groups"))
    np.testing.assert_array_equal(groups["embed"], methods.EMBEDDINGS * plain["embed"])
    np.testing.assert_array_equal(groups["head"], plain["head"])


def test_adamw_of_two_means_is_adamw_if_both_are_exact(gradients, monkeypatch):
    exact = functools.partial(methods._adamw_of_two_means, first="exact", second="exact")
    monkeypatch.setitem(methods.METHODS, "exact", methods.Method(exact, 1.0))
    one, other, first = (stepped(name, gradients)[0] for name in ("adamw", "exact", "adamw_signs_first"))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), one, other)
    assert not np.allclose(one["head"], first["head"], atol=0.1)


def test_bytes_of_onebit_adam_are_floats_until_it_settles_and_signs_from_then_on(gradients):
    params, _ = gradients
    config, method = language.Config(workers=2, steps=100), methods.METHODS["onebit_adam"]
    size = sum(x.size for x in jax.tree.leaves(params))
    state = method.make(lambda count: 1.0, config).init(params)
    sent = {
        step: language.bytes_per_step(method, config, params, optax.tree.set(state, settled_at=step))
        for step in (0, 25)
    }
    assert sent[0] == 4 * size  # 2 (M - 1)/M of four bytes
    assert sent[25] == pytest.approx(size * (0.25 * 4 + 0.75 * (1 + 32 / 256) / 8), rel=0.02)


def test_time_is_computing_and_the_exchange_of_the_cost_model():
    config = dataclasses.asdict(language.Config(step_ms=10.0, latency_us=0.0, workers=2))
    slow, fast = (language.seconds_per_step(config, 10**6, name, 0.1) for name in ("muon", "sign_muon"))
    assert slow == pytest.approx(0.01 + 0.32, rel=0.02)
    assert fast == pytest.approx(0.01 + 0.01, rel=0.05)
    assert language.seconds_per_step(config | {"workers": 1}, 10**6, "muon", 0.1) == 0.01
