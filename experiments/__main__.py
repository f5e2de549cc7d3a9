"""List the experiments, or run one: `python -m experiments [NAME [--flag value ...]]`."""

import ast
from collections.abc import Sequence
import dataclasses
import importlib
import itertools
import pathlib
import sys
from typing import Any, NamedTuple

from rich.console import Console
from rich.console import RenderableType

from experiments.common import devices
from experiments.common import flags
from experiments.common import parts
from experiments.common import processes
from experiments.common import records
from experiments.common import report

FOLDER = pathlib.Path(__file__).parent


class Experiment(NamedTuple):
    """What is known of an experiment without importing it.

    Attributes:
      module: Its name from the folder of experiments on, with dots.
      about: The first line of its docstring.
    """

    module: str
    about: str


def experiments() -> dict[str, Experiment]:
    """Every experiment by its name: a module with a `Config` and `run`, or a folder whose `__init__.py` has `PARTS`."""
    found = {}
    for path in sorted([*FOLDER.glob("*/*.py"), *FOLDER.glob("*/*/__init__.py")]):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if {"Config", "run"} <= _defined(tree) or "PARTS" in _defined(tree):
            module = path.parent if path.name == "__init__.py" else path.with_suffix("")
            dotted = ".".join(module.relative_to(FOLDER).parts)
            found[module.name] = Experiment(dotted, (ast.get_docstring(tree) or "").partition("\n")[0])
    return found


def _defined(tree):
    """The names of a module's own classes, functions and constants."""
    names = {node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    return names | {
        name.id
        for node in tree.body
        if isinstance(node, ast.Assign)
        for name in node.targets
        if isinstance(name, ast.Name)
    }


def load(name: str) -> Any:
    """An experiment, or its parts together, with `run`, `table` and `plot`."""
    module = importlib.import_module(f"experiments.{experiments()[name].module}")
    if hasattr(module, "PARTS"):
        return parts.Together(module.PARTS, getattr(module, "DEFAULT", tuple(module.PARTS)), module.__doc__ or "")
    return module


def show(table: RenderableType) -> None:
    """Print a table as wide as it has to be, also where that is wider than the terminal: no number is cut off."""
    console = Console()
    console.width = max(console.width, console.measure(table, options=console.options.update(max_width=1000)).maximum)
    console.print(table)


def main(arguments: Sequence[str]) -> None:
    """Run the experiment that the first argument names, with the flags that follow; without any, list them."""
    found = experiments()
    if not arguments or arguments[0] in ("-h", "--help"):
        width = max(map(len, found))
        print(
            "usage: python -m experiments NAME [--flag value ...]   (NAME --help lists its flags)\n"
            "       python -m experiments report [NAME | --keep results/NAME]   (tables of what is kept)\n"
        )
        for room, members in itertools.groupby(found, key=lambda name: found[name].module.partition(".")[0]):
            print(f"{room}:")
            print("\n".join(f"  {name:{width}}  {found[name].about}" for name in members))
        return
    name, *rest = arguments
    if name == "report":
        report.main(rest, load, show)
        return
    if name not in found:
        sys.exit(f"error: there is no experiment {name!r}; there are: {', '.join(found)}")
    experiment, program = load(name), f"python -m experiments {name}"
    if isinstance(experiment, parts.Together):
        config = experiment.parse(rest, program=program, output=f"results/{name}")
    else:
        config = flags.parse(experiment.Config, rest, program=program, about=experiment.__doc__)
    try:
        if getattr(config, "distributed", False):
            processes.join()
            config = dataclasses.replace(config, workers=processes.workers(config.workers))
        else:
            devices.prepare(config.workers)
        found = experiment.run(config)
        if not processes.is_first():
            for _ in found:  # it works, and leaves the telling to the first
                pass
            return
        path = records.write(config.output, records.header(name, config), found)
    except OSError as error:  # no such data, nothing to go on from, or no other processes
        sys.exit(f"error: {error}")
    done = records.read(path)
    figures = experiment.plot(done, config.output)
    show(experiment.table(done))
    print("\n".join(["written:", *(f"  {file}" for file in (path, *figures))]))


if __name__ == "__main__":
    main(sys.argv[1:])
