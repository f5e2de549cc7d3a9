"""Write the inventories: where the names of other projects that our docstrings and pages refer to are documented.

    python docs/inventories/write.py           # write them
    python docs/inventories/write.py --check   # say what is missing

The site is built without a network, so it cannot ask the other projects for theirs. A file here is an inventory in
Sphinx's first format, plain text: a name, its kind and its page. Every name is looked up in the installed package first, so
that a misspelt one is found.
"""

import importlib
import inspect
import pathlib
import re
import sys

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
SHORT = {"lax": "jax.lax", "jnp": "jax.numpy", "np": "numpy", "nnx": "flax.nnx"}
NAME = re.compile(r"(?<!`)`((?:jax|lax|jnp|np|numpy|optax|flax|nnx)(?:\.[A-Za-z_]\w*)+)(?:\([^`]*\))?`")

# Names that types and docstrings use in passing.
ALWAYS = {
    "jax": ["jax.Array", "jax.ShapeDtypeStruct", "jax.sharding.Mesh", "jax.sharding.PartitionSpec"],
    "optax": ["optax.GradientTransformation", "optax.GradientTransformationExtraArgs"],
    "numpy": ["numpy.ndarray"],
    "flax": [],
    "python": [],
}
PYTHON = {
    **dict.fromkeys(
        (
            "AssertionError",
            "NameError",
            "NotImplementedError",
            "RuntimeError",
            "TypeError",
            "ValueError",
            "UserWarning",
        ),
        "library/exceptions.html",
    ),
    "functools.partial": "library/functools.html",
    "typing.NamedTuple": "library/typing.html",
}
# Documented by no page of its own.
NOWHERE = {"optax.MaskedNode", "optax.tree.map", "jax.numpy", "jax.P"}


def page(name: str) -> str | None:
    """The page that documents a name, or None."""
    project, _, rest = name.partition(".")
    if name in NOWHERE:
        return None
    if project == "jax":
        return "jax.sharding.html" if name.startswith("jax.sharding.") else f"_autosummary/{name}.html"
    if name.startswith("optax.tree."):
        return f"api/generated/optax.tree_utils.tree_{name.rpartition('.')[2]}.html"
    if project == "optax":
        return f"api/generated/{name}.html"
    if project == "numpy":
        return f"reference/generated/{name}.html"
    if project == "flax":
        return FLAX.get(rest)
    return PYTHON.get(name)


FLAX = {
    "nnx.Optimizer": "api_reference/flax.nnx/training/optimizer.html",
    "nnx.jit": "api_reference/flax.nnx/transforms.html",
    "nnx.shard_map": "api_reference/flax.nnx/transforms.html",
    "nnx.State": "api_reference/flax.nnx/state.html",
    "nnx.Param": "api_reference/flax.nnx/variables.html",
}


def mentioned() -> set[str]:
    """The names of other projects in backticks, with their modules spelt out."""
    found = set()
    for path in (*ROOT.glob("signopt/**/*.py"), *ROOT.glob("docs/*.md"), *ROOT.glob("notebooks/*.ipynb")):
        for name in NAME.findall(path.read_text(encoding="utf-8")):
            first, _, rest = name.partition(".")
            found.add(f"{SHORT.get(first, first)}.{rest}")
    return found


def look_up(name: str) -> object:
    """The value of a name.

    Raises:
      AttributeError: If the installed package does not have it.
    """
    first, *rest = name.split(".")
    value = importlib.import_module(first)
    for number, part in enumerate(rest):
        if not hasattr(value, part):
            importlib.import_module(".".join([first, *rest[: number + 1]]))
        value = getattr(value, part)
    return value


def kind(name: str) -> str:
    value = look_up(name)
    return "class" if inspect.isclass(value) else "function" if callable(value) else "data"


def inventories() -> dict[str, str]:
    """The text of each inventory."""
    lines = {project: {} for project in ALWAYS}
    for name in mentioned() | {name for names in ALWAYS.values() for name in names}:
        project = name.partition(".")[0]
        if inspect.ismodule(look_up(name)) or page(name) is None:
            continue
        lines[project][name] = f"{name} {kind(name)} {page(name)}"
    lines["python"] = {
        name: f"{name} {'exception' if 'exceptions' in where else 'class'} {where}" for name, where in PYTHON.items()
    }
    head = "# Sphinx inventory version 1\n# Project: {}\n# Version: \n"
    return {
        f"{project}.inv": head.format(project) + "".join(f"{found[name]}\n" for name in sorted(found))
        for project, found in lines.items()
    }


def main(arguments: list[str]) -> None:
    stale = []
    for file, text in inventories().items():
        path = HERE / file
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(file)
            if "--check" not in arguments:
                path.write_text(text, encoding="utf-8")
    if stale and "--check" in arguments:
        sys.exit(f"error: not up to date: {', '.join(stale)}. Run: python docs/inventories/write.py")


if __name__ == "__main__":
    main(sys.argv[1:])
