"""Many processes as one: how they find each other, and who does what only one of them may do.

Every process runs the whole program on the same numbers. Records, plots, checkpoints and the progress bar are the first one's.
"""

from collections.abc import Callable
import os
from typing import Any, TypeVar

import jax
from jax.experimental import multihost_utils
import numpy as np

T = TypeVar("T")

TEXT = 2000  # bytes of an error that travel

# A process that has not been heard of for so long is dead, and the others end with an error. JAX's default is 100.
SILENCE_SECONDS = 30


class ProcessError(OSError):
    """Processes that cannot find each other, or do not fit together."""


def join() -> None:
    """Meet the other processes, before JAX looks for devices for the first time.

    `jax.distributed.initialize` asks SLURM, Open MPI, Kubernetes or a TPU pod for the coordinator's address, the number of
    processes and this one's. Elsewhere the environment says so: JAX_COORDINATOR_ADDRESS, which JAX reads itself,
    JAX_NUM_PROCESSES and JAX_PROCESS_ID.

    Raises:
      ProcessError: If neither does, or the others do not come.
    """
    os.environ.setdefault("NPROC", "16")  # jax 0.10 can deadlock with fewer threads than twice the devices
    try:
        jax.distributed.initialize(
            num_processes=_number("JAX_NUM_PROCESSES"),
            process_id=_number("JAX_PROCESS_ID"),
            heartbeat_timeout_seconds=SILENCE_SECONDS,
        )
    except (ValueError, RuntimeError) as error:
        raise ProcessError(
            f"`--distributed` cannot join other processes: {error} Start it with `srun`, `mpirun` or an indexed Kubernetes "
            "Job, or set JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES and JAX_PROCESS_ID for each process."
        ) from error


def workers(asked: int) -> int:
    """How many workers there are: as many as devices, unless fewer were asked for.

    Args:
      asked: From the command line; 0 for all devices.

    Raises:
      ProcessError: If processes cannot share them equally, or have too few devices.
    """
    processes, found = jax.process_count(), jax.device_count()
    if not asked:
        return found
    if asked % processes or asked > found:
        raise ProcessError(
            f"`--workers {asked}` has to be a multiple of the {processes} processes and at most their {found} devices. "
            f"Leave it out for `--workers {found}`, start other processes, or on CPUs give each of them more devices: "
            "XLA_FLAGS=--xla_force_host_platform_device_count=2 in the environment."
        )
    return asked


def is_first() -> bool:
    """Whether this is the process that writes and prints; with one process it is."""
    return jax.process_index() == 0


def on_host(tree: Any) -> Any:
    """All of every array, on every process, which all have to call it."""
    return jax.device_get(jax.tree.map(_whole, tree))


def joined(tree: Any) -> Any:
    """The shares of all processes, one behind the other along the leading axis, on every process."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def together(action: Callable[[], T], *, only_first: bool = False) -> T:
    """Do something on every process; if it fails on one, it fails on all.

    Args:
      action: What to do.
      only_first: Whether the others just wait for the first.

    Returns:
      What `action` returned here.

    Raises:
      ProcessError: On every process, with the number and the error of the first that failed. One process alone raises
        its own `OSError`.
    """
    result: Any = None
    error = None
    try:
        if is_first() or not only_first:
            result = action()
    except OSError as raised:
        error = raised
    if jax.process_count() == 1:
        if error is not None:
            raise error
        return result
    said = joined(np.frombuffer(str(error or "").encode()[:TEXT].ljust(TEXT), np.uint8)[None])
    failures = [(process, row.tobytes().decode(errors="ignore").strip()) for process, row in enumerate(said)]
    failures = [failure for failure in failures if failure[1]]
    if failures:
        raise ProcessError(f"process {failures[0][0]}: {failures[0][1]}") from error
    return result


def same(numbers: list[int]) -> bool:
    """Whether all processes have the same numbers, as many of them."""
    rows = joined(np.array([numbers], np.int32))
    return bool((rows == rows[0]).all())


def _whole(x):
    if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
        return x
    return multihost_utils.process_allgather(x, tiled=True)


def _number(variable):
    text = os.environ.get(variable, "")
    if text and not text.isdigit():
        raise ValueError(f"{variable} has to be a number, got {text!r}.")
    return int(text) if text else None
