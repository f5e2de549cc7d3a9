"""What `python -m signopt advise` expects of a choice: the ends of our own measurements, in a file of the library.

`python -m experiments report` writes it from the records that are kept.
"""

import json
import pathlib
import statistics
from typing import Any

from experiments.common import records as recorded

NAMES = ("heterogeneous", "language", "local_steps")
FILE = pathlib.Path("signopt") / "_tools" / "basis.json"
_LABELS = {0.0: "sorted", float("inf"): "alike"}


def found(measured: pathlib.Path) -> dict[str, Any]:
    """Test accuracies on the digits by method and labels, and losses of the byte transformer by method or run."""
    of = {name: recorded.read(measured / name / recorded.FILE)[1:] for name in NAMES}
    accuracies: dict[str, dict[str, list[float]]] = {}
    for r in of["heterogeneous"]:
        if r["alpha"] in _LABELS:
            accuracies.setdefault(r["method"], {}).setdefault(_LABELS[r["alpha"]], []).append(r["test_accuracy"])
    losses: dict[str, dict[str, list[float]]] = {"language": {}, "local_steps": {}}
    for name, key in (("language", "method"), ("local_steps", "run")):
        for r in of[name]:
            if r["kind"] == "run":
                losses[name].setdefault(r[key], []).append(r["held_out"][-1])
    return {
        "heterogeneous": {method: _means(by_labels) for method, by_labels in accuracies.items()},
        **{name: _means(by_method) for name, by_method in losses.items()},
    }


def _means(lists):
    return {name: round(statistics.mean(values), 3) for name, values in lists.items()}


def text(measured: pathlib.Path) -> str:
    """The file."""
    return json.dumps(found(measured), indent=2) + "\n"


def write(measured: pathlib.Path, root: pathlib.Path) -> list[pathlib.Path]:
    """Write it, if all records are kept.

    Returns:
      The file, if it was written.
    """
    if not all((measured / name / recorded.FILE).exists() for name in NAMES):
        return []
    (root / FILE).write_text(text(measured), encoding="utf-8")
    return [root / FILE]
