"""List the experiments, or run one: `python -m experiments [NAME [--flag value ...]]`."""

import ast
from collections.abc import Sequence
import dataclasses
import importlib
import itertools
import pathlib
import sys
from typing import NamedTuple

from rich.console import Console
from rich.console import RenderableType

from experiments.common import devices
from experiments.common import flags
from experiments.common import processes
from experiments.common import records

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
    """Every experiment by its name: a module, or a folder whose `__init__.py` is one."""
    found = {}
    for path in sorted(FOLDER.glob("*/**/*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        defined = {node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
        if {"Config", "run"} <= defined:
            *folders, name = path.relative_to(FOLDER).with_suffix("").parts
            parts = folders if name == "__init__" else (*folders, name)
            found[parts[-1]] = Experiment(".".join(parts), (ast.get_docstring(tree) or "").partition("\n")[0])
    return found


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
        print("usage: python -m experiments NAME [--flag value ...]   (NAME --help lists its flags)\n")
        for room, members in itertools.groupby(found, key=lambda name: found[name].module.partition(".")[0]):
            print(f"{room}:")
            print("\n".join(f"  {name:{width}}  {found[name].about}" for name in members))
        return
    name, *rest = arguments
    if name not in found:
        sys.exit(f"error: there is no experiment {name!r}; there are: {', '.join(found)}")
    experiment = importlib.import_module(f"experiments.{found[name].module}")
    config = flags.parse(experiment.Config, rest, program=f"python -m experiments {name}", about=experiment.__doc__)
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
