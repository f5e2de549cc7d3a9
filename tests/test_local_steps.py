"""The experiment on local steps: its names, what it counts, its records and its figure."""

import dataclasses
import re

import jax
import pytest
import rich.console

from experiments.common import records
from experiments.common import text
from experiments.training import local_steps
import figures

SMALL = {"layers": 1, "width": 16, "context": 8, "workers": 2, "batch_size": 2, "steps": 16, "evaluations": 2}


def test_a_name_that_stands_for_nothing_is_refused():
    for name in ("muon/vote/16/1", "muon/vote/16/1/late", "muon/votes/16/1/0", "sgd/vote/16/1/0"):
        with pytest.raises(SystemExit, match=re.escape(f"got {name}")):
            local_steps.named(name)
    assert [local_steps.named(name).every > 0 for name in local_steps.RUNS]


def test_bits_are_those_of_a_step_on_average():
    """A vote is 1.5 bits for four workers, and its sizes 1.5 x 32 / 256; small leaves fill up whole bytes and blocks."""
    config = local_steps.Config()
    params = jax.eval_shape(lambda key: text.init(key, config.shape()), jax.random.key(0))
    bits = {name: local_steps.bits(local_steps.named(name), config, params) for name in local_steps.RUNS}
    assert bits["muon/mean/16/1/0"] == 48 / 16
    assert bits["sign_muon/sign/1/1/1"] == pytest.approx(1.5, rel=0.002)
    assert bits["muon/vote/16/1/0"] == pytest.approx(1.5 * (1 + 1 / 8) / 16, rel=0.02)
    assert bits["muon/vote/16/1/0"] < bits["muon/vote/16/16/1"] < 1.2 * bits["muon/vote/16/1/0"]


@pytest.mark.slow
def test_it_runs_and_draws(tmp_path):
    runs = ("sign_muon/sign/1/1/1", "adamw/mean/4/1/0")
    config = dataclasses.replace(local_steps.Config(runs=runs, seeds=2, output=str(tmp_path)), **SMALL)
    path = records.write(config.output, records.header("local_steps", config), local_steps.run(config))
    found = records.read(path)
    trained = [r for r in found[1:] if r["kind"] == "run"]
    assert [(r["run"], r["seed"]) for r in trained] == [(name, seed) for name in runs for seed in (0, 1)]
    assert all(r["held_out"][-1] < r["held_out"][0] for r in trained)
    assert [row[:5] for row in local_steps.summary(found)[1:]] == [name.split("/") for name in runs]
    with rich.console.Console(width=200).capture() as shown:
        rich.console.Console(width=200).print(local_steps.table(found))
    assert shown is not None
    figures.drawn(local_steps, found, tmp_path)
