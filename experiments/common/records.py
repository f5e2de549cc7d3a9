"""Records: what an experiment found, as JSON lines below a header that says how."""

from collections.abc import Iterable
import dataclasses
import importlib.metadata
import itertools
import json
import os
import pathlib
import platform
from typing import Any

import jax

import signopt

Record = dict[str, Any]

FILE = "records.jsonl"
PACKAGES = ("jax", "jaxlib", "optax", "flax", "numpy")


def header(experiment: str, config: Any) -> Record:
    """What one needs to know to run it again: the configuration, versions, device, cores and seeds."""
    device = jax.devices()[0]
    return {
        "experiment": experiment,
        "config": dataclasses.asdict(config),
        "versions": {"python": platform.python_version(), "signopt": signopt.__version__}
        | {package: importlib.metadata.version(package) for package in PACKAGES},
        "device": device.device_kind,
        "platform": device.platform,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "cores": os.cpu_count(),
        "seeds": list(range(config.seeds)),
    }


def write(folder: str, first: Record, rest: Iterable[Record]) -> pathlib.Path:
    """Write records as they come, so that an interrupted run leaves what it had found.

    Args:
      folder: Where; made if it is not there. Records of an earlier run are replaced.
      first: The header.
      rest: The records.

    Returns:
      The file.
    """
    path = pathlib.Path(folder) / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for record in itertools.chain([first], rest):
            file.write(json.dumps(record) + "\n")
            file.flush()
    return path


def read(path: str | os.PathLike) -> list[Record]:
    """The records of a file, the header first."""
    return [json.loads(line) for line in pathlib.Path(path).read_text(encoding="utf-8").splitlines()]
