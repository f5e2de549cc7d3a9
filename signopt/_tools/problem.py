"""The user's problem: parameters, a loss and mini-batches, from the name of a function."""

import argparse
from collections.abc import Callable
import importlib
import os
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class UsageError(ValueError):
    """A command line that does not fit together; `python -m signopt` prints it without a traceback."""


class Problem(NamedTuple):
    """What a loss is measured on.

    Attributes:
      params: Where it begins.
      loss: From parameters and a mini-batch to a scalar.
      batches: Mini-batches along the leading axis of every leaf.
    """

    params: Any
    loss: Callable[[Any, Any], jax.Array]
    batches: Any

    @property
    def size(self) -> int:
        """How many parameters there are."""
        return sum(jnp.size(x) for x in jax.tree.leaves(self.params))

    @property
    def count(self) -> int:
        """How many mini-batches there are."""
        return len(jax.tree.leaves(self.batches)[0])


def argument(parser: argparse.ArgumentParser) -> None:
    """Add `--loss`."""
    about = "package.module:function, which returns (params, loss, batches)"
    parser.add_argument("--loss", required=True, metavar="NAME", help=about)


def number(kind: type, least: float) -> Callable[[str], Any]:
    """What reads a number of at least `least` from a command line."""

    def read(text):
        value = kind(text)
        if not value >= least:
            raise argparse.ArgumentTypeError(f"has to be at least {least}, got {text}.")
        return value

    read.__name__ = kind.__name__  # argparse names it where the text is no number
    return read


def load(name: str) -> Problem:
    """Call the function that `--loss` names, and look at what it returns.

    Args:
      name: "package.module:function". Python looks for the package where it looks for others, and in the current folder.

    Raises:
      UsageError: If there is no such function, or it returns something else.
    """
    module, _, function = name.partition(":")
    try:
        # A module that cannot import what it needs is the user's to see whole.
        found = getattr(importlib.import_module(module), function)
        if not callable(found):
            raise AttributeError(f"{name} is a {type(found).__name__}")
    except (AttributeError, ValueError, ImportError) as error:
        if isinstance(error, ImportError) and not (error.name and (module + ".").startswith(error.name + ".")):
            raise
        raise UsageError(
            f"`--loss {name}` has to be package.module:function, for something that Python can import: {error}."
        ) from error
    return of(found(), f"--loss {name}")


def of(returned: Any, call: str = "of") -> Problem:
    """Look at what a function has returned.

    Args:
      returned: `(params, loss, batches)`, it is hoped.
      call: What an error names.

    Raises:
      UsageError: If it is something else.
    """
    try:
        params, loss, batches = returned
        params, batches = jax.tree.map(jnp.asarray, (params, batches))
        sizes = {jnp.shape(x)[:1] for x in jax.tree.leaves(batches)}
        one = jax.tree.map(lambda x: x[0], batches)
    except (TypeError, ValueError, IndexError) as error:
        raise UsageError(f"`{call}` has to return (params, loss, batches): {error}.") from error
    if len(sizes) != 1:
        raise UsageError(
            f"`{call}` has to return batches whose leaves have one leading axis of mini-batches, got {sorted(sizes)}."
        )
    shape = jax.eval_shape(loss, params, one)
    if getattr(shape, "shape", None) != ():
        raise UsageError(f"`{call}` has to return a loss that returns one scalar, got {shape}.")
    return Problem(params, loss, batches)


def devices(count: int) -> list:
    """So many devices: accelerators where there are enough, else a CPU that stands in for them.

    JAX reads the environment when it first looks for devices, so nothing may have used one before.

    Raises:
      UsageError: If there are fewer.
    """
    flag = "--xla_force_host_platform_device_count"
    if flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}={count}".strip()
    os.environ.setdefault("NPROC", str(max(16, 2 * count)))  # with fewer threads jax 0.10 can deadlock
    for found in (jax.devices(), jax.devices("cpu")):
        if len(found) >= count:
            return found[:count]
    raise UsageError(
        f"`--workers {count}` needs as many devices, found {len(found)}: take fewer workers, or set "
        f"XLA_FLAGS={flag}={count} in the environment."
    )


def table(columns: list[str], rows: list[list[str]]) -> str:
    """Plain text in columns, the first to the left, the others to the right.

    Examples:
      >>> print(table(["program", "ms"], [["mean", "1.50"], ["vote", "12.00"]]))
      program     ms
      mean      1.50
      vote     12.00
    """
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in (columns, *rows)
    ]
    return "\n".join(line.rstrip() for line in lines)


def progress(text: str) -> None:
    """Say on stderr what is being done, on one line that the next call replaces; nothing where nobody looks."""
    if sys.stderr.isatty():
        print(f"\r{text}\x1b[K", end="" if text else "\r", file=sys.stderr, flush=True)
