"""List the experiments, or run one: `python -m experiments [NAME [--flag value ...]]`."""

import ast
from collections.abc import Sequence
import dataclasses
import importlib
import pathlib
import sys

from rich.console import Console
from rich.console import RenderableType

from experiments import devices
from experiments import flags
from experiments import processes
from experiments import records

FOLDER = pathlib.Path(__file__).parent


def experiments() -> dict[str, str]:
    """The name of each experiment and the first line of its docstring, without importing it."""
    found = {}
    for path in sorted(FOLDER.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        defined = {node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
        if {"Config", "run"} <= defined:
            found[path.stem] = (ast.get_docstring(tree) or "").partition("\n")[0]
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
        print("\n".join(f"  {name:{width}}  {line}" for name, line in found.items()))
        return
    name, *rest = arguments
    if name not in found:
        sys.exit(f"error: there is no experiment {name!r}; there are: {', '.join(found)}")
    experiment = importlib.import_module(f"experiments.{name}")
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
