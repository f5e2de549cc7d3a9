"""The API reference, written from the package itself: a page for each public module, an entry for each public name.

What is public follows from the package: `__all__` where a module has it, else what a type checker takes for exported,
that is what the module defines without an underscore and what it imports as `name as name`. A new name appears in the
reference without an edit here.
"""

import ast
import importlib
import inspect
import pathlib
import re
import textwrap
import types
from typing import NamedTuple

from sphinx.application import Sphinx

PACKAGE = "signopt"
FOLDER = "api"


class Entry(NamedTuple):
    """A public name.

    Attributes:
      path: Where users find it, such as `signopt.prox.l1`.
      home: The module that defines it, such as `signopt.prox.entrywise`.
      value: The class or function.
    """

    path: str
    home: str
    value: object


def exported(module: types.ModuleType) -> list[str]:
    """The public names of a module, in the order of its source."""
    if hasattr(module, "__all__"):
        return list(module.__all__)
    names = []
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            names += [alias.asname for alias in node.names if alias.asname and alias.asname == alias.name]
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.append(node.name)
    return [name for name in names if not name.startswith("_")]


def modules(name: str = PACKAGE) -> list[str]:
    """The public modules: the package, and the modules that it exports."""
    module = importlib.import_module(name)
    inner = [
        value.__name__ for value in (getattr(module, each) for each in exported(module)) if inspect.ismodule(value)
    ]
    return [name, *(found for each in inner for found in modules(each))]


def entries(name: str) -> list[Entry]:
    """The public classes and functions of a module."""
    module = importlib.import_module(name)
    values = [(each, getattr(module, each)) for each in exported(module)]
    return [
        Entry(f"{name}.{each}", value.__module__, value)
        for each, value in values
        if inspect.isclass(value) or inspect.isroutine(value)
    ]


def public_paths() -> dict[str, str]:
    """Where users find what is defined elsewhere: `signopt.vote.majority_vote` is `signopt.majority_vote`."""
    found = [entry for name in modules() for entry in entries(name)]
    return {f"{entry.home}.{entry.path.rpartition('.')[2]}": entry.path for entry in found}


# ---- pages -----------------------------------------------------------------------------------------------------------


def about(name: str) -> tuple[str, str]:
    """A title and a text from a module's docstring: its first line up to the colon, and the rest."""
    first, _, rest = inspect.cleandoc(importlib.import_module(name).__doc__ or name).partition("\n")
    title, colon, remark = first.partition(": ")
    if not colon:
        return title.strip().rstrip("."), rest.strip()
    return title, f"{remark[:1].upper()}{remark[1:]}\n{rest}".strip()


def heading(text: str, line: str) -> str:
    return f"{text}\n{line * len(text)}\n"


def directive(entry: Entry) -> str:
    """An entry; of a class its methods too, but not the fields of a NamedTuple, which its docstring describes."""
    short = entry.path.rpartition(".")[2]
    if not inspect.isclass(entry.value):
        return f".. autofunction:: {short}\n"
    members = "" if issubclass(entry.value, tuple | Exception) else "\n   :members:"
    return f".. autoclass:: {short}{members}\n"


def page(name: str) -> str:
    """The page of a module: what it is for, a table of its names, and their docstrings by the file they come from."""
    found = entries(name)
    parts = [heading(f"``{name}``", "="), f".. module:: {name}\n", f".. currentmodule:: {name}\n"]
    parts.append(inspect.cleandoc(importlib.import_module(name).__doc__ or "") + "\n")
    names = "\n".join(f"   {entry.path.rpartition('.')[2]}" for entry in found)
    parts.append(f".. autosummary::\n   :nosignatures:\n\n{names}\n")
    for home in dict.fromkeys([name, *(entry.home for entry in found)]):
        if home != name:
            title, text = about(home)
            parts += [heading(title, "-"), f"{text}\n"]
        parts += [directive(entry) for entry in found if entry.home == home]
    return "\n".join(parts)


def index() -> str:
    lines = []
    for name in modules():
        first = inspect.cleandoc(importlib.import_module(name).__doc__ or "").partition("\n")[0]
        lines.append(f"| [`{name}`]({name}.rst) | {first} |")
    toc = "\n".join(modules())
    return textwrap.dedent("""\
        # Reference

        Every public name, from its docstring. Transformations are optax's types, so they go wherever an
        `optax.GradientTransformation` goes.

        | module | what it is for |
        |---|---|
        {table}

        ```{{toctree}}
        :hidden:

        {toc}
        ```
        """).format(table="\n".join(lines), toc=toc)


def write_if_new(path: pathlib.Path, text: str) -> None:
    """Leave a page that has not changed alone, so that it is not built again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def write(app: Sphinx) -> None:
    folder = pathlib.Path(app.srcdir) / FOLDER
    pages = {f"{name}.rst": page(name) for name in modules()} | {"index.md": index()}
    for name, text in pages.items():
        write_if_new(folder / name, text)
    for old in folder.glob("*"):
        if old.name not in pages:
            old.unlink()


def leave_arguments_alone(app, what, name, value, options, lines: list[str]) -> None:
    """In a docstring `prox` is the argument of that name, where there is one, and not the module."""
    del app, what, name, options
    try:
        own = set(inspect.signature(value).parameters)
    except (TypeError, ValueError):
        return
    for number, line in enumerate(lines):
        lines[number] = re.sub(
            r"(?<![`:\w])`(\w+)`(?![`_])", lambda found: f"``{found[1]}``" if found[1] in own else found[0], line
        )


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("builder-inited", write)
    app.connect("autodoc-process-docstring", leave_arguments_alone)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
