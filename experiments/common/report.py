"""Keep records, and write the tables of `experiments/README.md` and `docs/` from those kept: no number is copied by hand.

    python -m experiments report                        # write the tables anew
    python -m experiments report train                  # print all that is kept of a run
    python -m experiments report --keep results/train   # keep a run as experiments/measured/train, then write the tables

A table stands between `<!-- report: NAME, ... -->` and `<!-- end -->`, where NAME is a folder of `experiments/measured`. An
experiment says what its table has in `summary(records)`, rows of text with the header first; without one it is the
experiment's own table. Of long lists and of what `kept(records)` leaves out nothing is kept.
"""

from collections.abc import Callable, Iterable, Sequence
import pathlib
import re
import sys
from typing import Any

import rich.console
import rich.table

from experiments.common import basis
from experiments.common import records as recorded
from experiments.common.records import Record

FOLDER = pathlib.Path(__file__).parents[1]
MEASURED, README = FOLDER / "measured", FOLDER / "README.md"
LONG = 150  # entries of a list that nobody keeps
_TABLE = re.compile(r"<!-- report: (\w+).*?-->\n.*?<!-- end -->", re.DOTALL)

Rows = list[list[str]]


def drawn(rows: Rows, title: str) -> rich.table.Table:
    """A table to print, of rows of text with the header first: its first column to the left, numbers to the right."""
    header, *body = rows
    table = rich.table.Table(title=title)
    for column in header:
        table.add_column(column, justify="left" if column == header[0] else "right")
    for row in body:
        table.add_row(*row)
    return table


def main(arguments: Sequence[str], load: Callable[[str], Any], show: Callable[[Any], None]) -> None:
    """Keep, print or write.

    Args:
      arguments: The words behind `report`.
      load: From the name of an experiment to it.
      show: Prints a table.
    """
    if arguments and arguments[0] == "--keep":
        for folder in arguments[1:]:
            print(f"kept: {keep(pathlib.Path(folder), load)}")
    elif arguments:
        for name in arguments:
            if not (MEASURED / name / recorded.FILE).exists():
                kept = ", ".join(sorted(path.name for path in MEASURED.iterdir()))
                sys.exit(f"error: no records of {name!r} are kept; there are: {kept}")
            found = recorded.read(MEASURED / name / recorded.FILE)
            show(load(found[0]["experiment"]).table(found))
        return
    text = ""
    for page in pages():
        own = page.read_text(encoding="utf-8")
        page.write_text(written(own, load), encoding="utf-8")
        print(f"written: {page}")
        text += own
    for path in basis.write(MEASURED, FOLDER.parent):
        print(f"written: {path}")
    for name in sorted({path.name for path in MEASURED.iterdir()} - set(_TABLE.findall(text))):
        print(f"no place for {name}: put `<!-- report: {name} -->` and `<!-- end -->` where its table shall stand")


def pages() -> list[pathlib.Path]:
    """`experiments/README.md`, and what else has a table between markers."""
    docs = sorted((FOLDER.parent / "docs").glob("*.md"))
    return [README, *(page for page in docs if _TABLE.search(page.read_text(encoding="utf-8")))]


def keep(folder: pathlib.Path, load: Callable[[str], Any]) -> pathlib.Path:
    """Copy the records of a run to `experiments/measured`, without what no table needs.

    Args:
      folder: That of the run; its name is the name of the copy. Parts of an experiment join those that were kept before by
        the same versions.
      load: From the name of an experiment to it.

    Returns:
      The file.
    """
    found = recorded.read(folder / recorded.FILE)
    first, *rest = getattr(load(found[0]["experiment"]), "kept", lambda records: records)(found)
    first, path = _without_folder(first, folder.name), MEASURED / folder.name / recorded.FILE
    if "parts" in first["config"] and path.exists():
        before, *others = recorded.read(path)
        if before["versions"] == first["versions"]:  # else nobody could tell which part is from which
            others = [record for record in others if record["part"] not in first["config"]["parts"]]
            both = before["config"]["parts"] | first["config"]["parts"]
            first, rest = first | {"config": first["config"] | {"parts": both}}, others + rest
    return recorded.write(str(MEASURED / folder.name), first, [_short(record) for record in rest])


def written(text: str, load: Callable[[str], Any]) -> str:
    """A page with all tables between its markers written anew.

    Args:
      text: The page.
      load: From the name of an experiment to it.
    """

    def table(match):
        name = match[1]
        if not (MEASURED / name / recorded.FILE).exists():
            return f"<!-- report: {name} -->\n*No records are kept yet.*\n<!-- end -->"
        found = recorded.read(MEASURED / name / recorded.FILE)
        header = found[0]
        versions = ", ".join(f"{package} {header['versions'][package]}" for package in ("signopt", "jax"))
        about = f"{versions}, {header['device']}, {header['cores']} cores, {len(header['seeds'])} seeds"
        tables = [markdown(rows) for rows in summaries(load(header["experiment"]), found)]
        return "\n".join([f"<!-- report: {name}, {about} -->", "\n\n".join(tables), "<!-- end -->"])

    return _TABLE.sub(table, text)


def summaries(experiment: Any, records: list[Record]) -> list[Rows]:
    """What the page shows of an experiment: its summaries, or its tables."""
    if hasattr(experiment, "summary"):
        found = experiment.summary(records)
        return found if isinstance(found[0][0], list) else [found]
    return [cells(table) for table in _tables(experiment.table(records))]


def cells(table: rich.table.Table) -> Rows:
    """The header and the rows of a table."""
    columns = [[str(column.header).replace("\n", " "), *map(str, column.cells)] for column in table.columns]
    return [list(row) for row in zip(*columns, strict=True)]


def merged(tables: Iterable[Rows]) -> list[Rows]:
    """Tables with the same header as one, in order."""
    found: dict[tuple[str, ...], Rows] = {}
    for header, *rows in tables:
        found.setdefault(tuple(header), [header]).extend(rows)
    return list(found.values())


def markdown(rows: Rows) -> str:
    """A table as Markdown.

    Examples:
      >>> print(markdown([["wire", "bits"], ["one_bit", "1.77"]]))
      | wire | bits |
      |---|---|
      | one_bit | 1.77 |
    """
    header, *rest = [f"| {' | '.join(cell.strip() for cell in row)} |" for row in rows]
    return "\n".join([header, "|" + "---|" * len(rows[0]), *rest])


def _tables(drawn):
    if isinstance(drawn, rich.console.Group):
        return [table for part in drawn.renderables for table in _tables(part)]
    return [drawn] if isinstance(drawn, rich.table.Table) else []


def _without_folder(value: Any, name: str) -> Any:
    """A header that does not say where on a machine the records were written."""
    if not isinstance(value, dict):
        return value
    return {k: f"results/{name}" if k == "output" else _without_folder(v, name) for k, v in value.items()}


def _short(value):
    """Six digits of every number, and no long list."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {k: _short(v) for k, v in value.items() if not (isinstance(v, list) and len(v) > LONG)}
    return list(map(_short, value)) if isinstance(value, list) else value
