"""Programs for TPUs and GPUs, compiled where there are none: what travels, what is stored, what packing costs.

`make test-compile` makes the environments. Elsewhere these tests are skipped.
"""

import functools
import json
import os
import pathlib
import subprocess

import pytest

HERE = pathlib.Path(__file__).parent
TPUS = ("v5e:2x4", "v6e:2x4", "v5p:2x2x2")
MACHINES = (*TPUS, "h100")
VARIABLES = {machine: "SIGNOPT_TPU_PYTHON" if machine in TPUS else "SIGNOPT_GPU_PYTHON" for machine in MACHINES}


@functools.cache
def programs(machine, layout=None):
    """What `tests/machines.py` finds, run by an interpreter that can compile for the machine."""
    variable = VARIABLES[machine]
    python = os.environ.get(variable)
    if not python:
        pytest.skip(f"{variable} names no interpreter that compiles for {machine}: `make test-compile` makes one")
    command = [python, str(HERE / "machines.py"), machine, *([layout] if layout else [])]
    environment = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE.parent), environment.get("PYTHONPATH")]))
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("wire", ("one_bit", "two_bit"))
@pytest.mark.parametrize("machine", MACHINES)
def test_a_vote_is_one_exchange_of_words_each_way(machine, wire):
    """Of as many bytes as the words of all leaves and what fills them up; nothing is widened on the way."""
    found = programs(machine)["vote"][wire]
    by_kind = sorted(found["collectives"])
    assert [kind for kind, *_ in by_kind] == ["all-gather", "all-to-all"]
    planes, tile = 1 + (wire == "two_bit"), 1024 if machine in TPUS else 8
    sizes = (2**16, 2**16 + 77, 64 * 128, 999, 1)
    words = sum(-(-size // tile) * tile for size in sizes) // 8
    row = tile // 8 * 8  # words of a tile, times workers
    whole = -(-words // row) * row
    for _, *arrays in by_kind:
        assert {dtype for dtype, _ in arrays} <= {f"u{8 * planes}"}
        assert whole in (sum(entries for _, entries in arrays), max(entries for _, entries in arrays))


@pytest.mark.parametrize("machine", ("v5e:2x4", "h100"))
def test_a_late_vote_travels_under_matrix_products(machine):
    """Both ways, of a step with eleven of them. One that counts at once has nothing to travel under."""
    found = programs(machine)["hidden"]
    assert all(products == 0 for products in found["at once"]["under"].values())
    assert set(found["late"]["under"]) == {"all-to-all", "all-gather"}
    assert all(products > 0 for products in found["late"]["under"].values())


@pytest.mark.parametrize("machine", TPUS[1:])
def test_on_other_tpus_the_option_makes_the_all_to_all_asynchronous(machine):
    assert "all-to-all" in programs(machine)["hidden"]["late"]["under"]


def test_a_second_stage_of_delay_hides_the_all_gather_on_a_v5e_only():
    """It travels under as many matrix products as the all-to-all; on a v6e and a v5p neither travels under any."""
    found = {machine: programs(machine)["hidden"] for machine in TPUS}
    assert "all-gather" not in found["v5e:2x4"]["1 stages"]["under"]
    assert found["v5e:2x4"]["2 stages"]["under"] == {"all-to-all": 10, "all-gather": 10}
    assert not any(sum(found[machine]["2 stages"]["under"].values()) for machine in TPUS[1:])


@pytest.mark.parametrize("planes", ("1", "2"))
@pytest.mark.parametrize("machine", MACHINES)
def test_packing_needs_no_memory_of_its_own(machine, planes):
    found = programs(machine)["alone"][planes]
    assert found["pack"]["temporaries"] == found["unpack"]["temporaries"] == 0


@pytest.mark.parametrize("planes", ("1", "2"))
def test_tiles_cost_a_tpu_less_than_rows_of_eight(planes):
    """A negative control: the layout of other platforms, compiled for this one."""
    tiles, rows = (programs("v5e:2x4", layout)["alone"][planes] for layout in (None, "cpu"))
    assert 4 * tiles["pack"]["cycles"] < rows["pack"]["cycles"]
    assert tiles["unpack"]["cycles"] < rows["unpack"]["cycles"]


@pytest.mark.parametrize("wire", ("one_bit", "two_bit"))
def test_a_vote_in_tiles_costs_a_tpu_less_than_one_in_rows_of_eight(wire):
    tiles, rows = (programs("v5e:2x4", layout)["vote"][wire] for layout in (None, "cpu"))
    assert tiles["cycles"] < 0.8 * rows["cycles"]
