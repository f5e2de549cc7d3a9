"""Sparsified SGD with memory: the rate of SGD with a 61st of what it sends, and none without memory."""

import numpy as np
import pytest

from experiments.papers import memory
import figures

METHODS = ("SGD", "top-1, memory", "random-1, memory", "top-1, no memory")


@pytest.fixture(scope="module")
def found():
    config = memory.Config(methods=METHODS, steps=4000, seeds=1)
    return [{"config": {"workers": 1, "seeds": 1}}, *memory.run(config)]


def test_memory_keeps_the_pace_of_sgd_and_without_it_one_entry_in_61_is_not_enough(found):
    last = {name: gap[-1] for name, (_, gap) in memory.gaps(found).items()}
    assert all(last[name] < 1.5 * last["SGD"] for name in ("top-1, memory", "random-1, memory"))
    assert last["top-1, no memory"] > 20 * last["SGD"]


def test_the_table_has_every_method_that_ran_and_the_figure_is_in_style(found, tmp_path):
    assert [row[0] for row in memory.summary(found)[1:]] == list(METHODS)
    figures.drawn(memory, found, tmp_path)


def test_several_workers_average_the_noise_away():
    last = {}
    for workers in (1, 8):
        config = memory.Config(methods=("top-1, memory",), steps=4000, workers=workers, seeds=2)
        ((_, gap),) = memory.gaps([{}, *memory.run(config)]).values()
        last[workers] = gap[-1]
    assert 3 < last[1] / last[8] < 20


def test_the_minimum_is_one():
    of = memory.problem(0.1)
    rng = np.random.default_rng(0)
    assert np.all(memory.losses(of, rng.normal(size=(20, of.inputs.shape[1]))) > of.minimum)
    assert 0 < of.minimum < np.log(2)
