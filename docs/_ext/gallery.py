"""The gallery: every figure that is kept, with what it shows and the command that measures it again.

`make figures` draws them from the records in experiments/measured/. The words come from the docstring of the experiment.
"""

import ast
import inspect
import json
import pathlib
import re

from sphinx.application import Sphinx

from reference import write_if_new

ROOT = pathlib.Path(__file__).parents[2]
FIGURES = pathlib.Path("_static", "figures")
TOP = """\
# Gallery

What the experiments found, each figure with the command that measures it again. The figures are drawn from the records
in `experiments/measured/` by `make figures`; commands, times and all numbers are in
[experiments](../project/experiments.md).
"""


def docstring(name: str) -> str:
    """Of an experiment, without importing it."""
    for pattern in (f"**/{name}.py", f"**/{name}/__init__.py"):
        for path in sorted((ROOT / "experiments").glob(pattern)):
            text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
            if text:
                return inspect.cleandoc(text)
    return name


def measured_on(name: str) -> str:
    """Where and with what the records of a figure were measured."""
    path = ROOT / "experiments" / "measured" / name / "records.jsonl"
    if not path.exists():
        return ""
    header = json.loads(path.read_text(encoding="utf-8").partition("\n")[0])
    versions = header["versions"]
    return (
        f"{header['cores']} cores, {header['device']}, jax {versions['jax']}, optax {versions['optax']}, "
        f"Python {versions['python']}"
    )


def section(folder: pathlib.Path) -> str:
    name = folder.name
    title, _, rest = docstring(name).partition("\n")
    paragraph = rest.strip().partition("\n\n")[0]
    command = re.search(r"^\s*(python -m experiments .*|make train.*)$", rest, re.MULTILINE)
    command = command[1].partition("  #")[0].strip() if command else f"python -m experiments {name}"
    parts = [f"## `{name}`", f"{title}", "" if paragraph.startswith("python") else paragraph]
    for light in sorted(folder.glob("*-light.svg")):
        for theme in ("light", "dark"):
            file = f"../{FIGURES}/{name}/{light.name.replace('-light', f'-{theme}')}"
            words = title.rstrip(".").replace("`", "")
            parts.append(f"```{{image}} {file}\n:alt: {words}\n:class: only-{theme} figure\n```")
    parts.append(f"```console\n$ {command}\n```")
    if measured_on(name):
        parts.append(f"Measured on: {measured_on(name)}.")
    return "\n\n".join(part for part in parts if part)


def write(app: Sphinx) -> None:
    folders = sorted(path for path in (pathlib.Path(app.srcdir) / FIGURES).glob("*") if path.is_dir())
    text = "\n\n".join([TOP, *(section(folder) for folder in folders)]) + "\n"
    write_if_new(pathlib.Path(app.srcdir) / "gallery" / "index.md", text)


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("builder-inited", write)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
