"""`python -m experiments report`: tables of the page from the records that are kept."""

import json
import types

import pytest
import rich.table

from experiments import __main__ as command
from experiments.common import parts
from experiments.common import records
from experiments.common import report
import figures


def test_the_page_has_the_tables_of_the_kept_records_and_at_most_250_lines():
    shown = set()
    for path in report.pages():
        page = path.read_text(encoding="utf-8")
        assert report.written(page, command.load) == page, f"Run `python -m experiments report`: {path}."
        shown |= set(report._TABLE.findall(page))
    assert len(report.README.read_text(encoding="utf-8").splitlines()) <= 250
    kept = {path.name for path in report.MEASURED.iterdir()}
    assert kept <= shown  # every record that is kept is shown


def test_a_number_that_somebody_wrote_by_hand_is_replaced():
    page = report.README.read_text(encoding="utf-8")
    (accuracy,) = [line for line in page.splitlines() if line.startswith("| signum | one_bit |")]
    wrong = page.replace(accuracy, accuracy.replace("0.99", "0.98"))
    assert wrong != page == report.written(wrong, command.load)


def test_the_page_tells_how_to_run_every_experiment():
    page = report.README.read_text(encoding="utf-8")
    assert all(f"python -m experiments {name}" in page and f"### `{name}`" in page for name in command.experiments())


def test_kept_records_name_no_folder_of_the_machine_they_were_made_on():
    for path in report.MEASURED.glob("*/*"):
        assert '"/' not in path.read_text(encoding="utf-8"), path
        assert path.stat().st_size < 150_000, path


@pytest.mark.parametrize("name", sorted(path.name for path in report.MEASURED.iterdir()))
def test_kept_records_are_enough_for_the_figures(name, tmp_path):
    found = records.read(report.MEASURED / name / records.FILE)
    figures.drawn(command.load(found[0]["experiment"]), found, tmp_path)


VERSIONS = {"signopt": "0.1.0", "jax": "0.10.2"}


@pytest.fixture
def somewhere(tmp_path, monkeypatch):
    """A page and kept records elsewhere."""
    monkeypatch.setattr(report, "MEASURED", tmp_path / "measured")
    monkeypatch.setattr(report, "README", tmp_path / "README.md")
    monkeypatch.setattr(report, "FOLDER", tmp_path / "experiments")  # beside which there are no docs
    (tmp_path / "measured").mkdir()
    return tmp_path


def write(folder, config, found, versions=VERSIONS):
    header = {"experiment": "one", "config": config, "versions": versions, "device": "cpu", "cores": 2, "seeds": [0, 1]}
    records.write(str(folder), header, found)


def load_one(name):
    """An experiment with a table of its records."""

    def table(found):
        drawn = rich.table.Table("seed", "loss\nat the end")
        for record in found[1:]:
            drawn.add_row(str(record["seed"]), f"{record['loss']:.2f}")
        return drawn

    return types.SimpleNamespace(table=table, kept=lambda found: [found[0], *(r for r in found[1:] if r["seed"] < 2)])


def test_what_is_kept_is_short_and_then_stands_on_the_page(somewhere, capsys):
    found = [
        {"seed": seed, "loss": 1.23456789 + seed, "curve": list(range(200)), "pair": [1.0, 2]} for seed in range(3)
    ]
    write(somewhere / "results" / "mine", {"output": str(somewhere), "steps": 3}, found)
    report.README.write_text("# A page\n\n<!-- report: mine -->\nold\n<!-- end -->\n")
    report.main(["--keep", str(somewhere / "results" / "mine")], load_one, print)
    header, *kept = records.read(somewhere / "measured" / "mine" / records.FILE)
    assert header["config"] == {"output": "results/mine", "steps": 3}
    assert kept == [{"seed": 0, "loss": 1.23457, "pair": [1.0, 2]}, {"seed": 1, "loss": 2.23457, "pair": [1.0, 2]}]
    table = "| seed | loss at the end |\n|---|---|\n| 0 | 1.23 |\n| 1 | 2.23 |"
    about = "mine, signopt 0.1.0, jax 0.10.2, cpu, 2 cores, 2 seeds"
    assert report.README.read_text() == f"# A page\n\n<!-- report: {about} -->\n{table}\n<!-- end -->\n"
    report.README.write_text("# Another\n")
    report.main([], load_one, print)
    assert "no place for mine: put `<!-- report: mine -->`" in capsys.readouterr().out
    shown = []
    report.main(["mine"], load_one, shown.append)
    assert [table.row_count for table in shown] == [2]
    with pytest.raises(SystemExit, match=r"no records of 'yours' are kept; there are: mine"):
        report.main(["yours"], load_one, print)


def test_parts_join_those_that_the_same_versions_have_kept(somewhere):
    both = parts.Together({"a": load_one(""), "b": load_one("")}, ("a", "b"), "")
    for name, seed, versions in (("a", 0, VERSIONS), ("b", 1, VERSIONS)):
        config = {"parts": {name: {"output": "x"}}, "output": "x"}
        write(somewhere / "mine", config, [{"part": name, "seed": seed, "loss": 1.0}], versions)
        report.keep(somewhere / "mine", lambda name: both)
    found = records.read(somewhere / "measured" / "mine" / records.FILE)
    assert [record["part"] for record in found[1:]] == ["a", "b"]
    (rows,) = report.summaries(both, found)  # with one header, they are one table
    assert rows == [["seed", "loss at the end"], ["0", "1.00"], ["1", "1.00"]]
    # Of another version they would be of nobody knows which.
    write(somewhere / "mine", {"parts": {"a": {}}}, [{"part": "a", "seed": 0, "loss": 3.0}], VERSIONS | {"jax": "0.12"})
    report.keep(somewhere / "mine", lambda name: both)
    assert json.dumps(records.read(somewhere / "measured" / "mine" / records.FILE)).count('"part"') == 1
