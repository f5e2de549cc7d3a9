"""The cost of looking: what is recorded, not how long it took."""

import dataclasses

import pytest

from experiments.common import records
from experiments.speed.wire import looking as vote_cost
import figures

TINY = vote_cost.Config(parameters=1000, workers=2, width=4, batches=2, batch_size=3, rounds=3)


@pytest.mark.parametrize("wire", ("one_bit", "two_bit"))
@pytest.mark.slow
def test_every_pair_is_timed_as_often_as_asked(wire, tmp_path, devices):
    config = dataclasses.replace(TINY, wire=wire, output=str(tmp_path))
    path = records.write(config.output, records.header("vote_cost", config), vote_cost.run(config))
    header, *found = records.read(path)
    assert header["config"]["wire"] == wire and header["cores"] >= 1 and "jax" in header["versions"]
    assert [r["kind"] for r in found] == ["vote", "Welford pass", "check"]
    assert [r["limit"] for r in found] == [1.30, 1.2, None]
    assert [r["parameters"] for r in found] == [1000 // 16 * 16, 64 * 4 + 3 * 4 * 4 + 4 * 10, 1000 // 16 * 16]
    assert all(len(r[name]) == 3 and min(r[name]) > 0 for r in found for name in ("plain", "more"))
    assert vote_cost.table([header, *found]).row_count == 3
    (figure,) = figures.drawn(vote_cost, [header, *found], config.output)
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["vote", "Welford pass", "check"]
