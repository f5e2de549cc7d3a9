"""What a bug report needs: versions, devices, and flags of the environment.

python -m signopt info
"""

import argparse
from collections.abc import Iterator
import importlib.metadata
import os
import platform
from typing import Any

import jax

import signopt

PACKAGES = ("jax", "jaxlib", "optax", "jaxtyping", "numpy", "flax", "orbax-checkpoint", "libtpu", "jax-cuda12-plugin")
VARIABLES = ("JAX_", "XLA_", "NPROC", "PJRT_", "CUDA_VISIBLE_DEVICES", "TPU_")
NOT_DEFAULT = ("jax_enable_x64", "jax_numpy_dtype_promotion", "jax_numpy_rank_promotion", "jax_debug_nans")


def arguments(parser: argparse.ArgumentParser) -> None:
    """It has none."""


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Look.

    Yields:
      One record.
    """
    del options
    yield {
        "signopt": signopt.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cores": os.cpu_count(),
        "packages": {name: _version(name) for name in PACKAGES},
        "backend": jax.default_backend(),
        "devices": [f"{device.id}: {device.device_kind}" for device in jax.devices()],
        "processes": jax.process_count(),
        "config": {name: getattr(jax.config, name) for name in NOT_DEFAULT},
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith(VARIABLES)},
    }


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def report(records: list[dict[str, Any]]) -> str:
    """The record, a line for each thing; packages that are not there are left out."""
    (found,) = records
    lines = []
    for name, value in found.items():
        if isinstance(value, dict):
            lines += [f"{name}:", *(f"  {key} {one}" for key, one in value.items() if one is not None)]
        elif isinstance(value, list):
            lines += [f"{name}:", *(f"  {one}" for one in value)]
        else:
            lines.append(f"{name}: {value}")
    return "\n".join(lines)
