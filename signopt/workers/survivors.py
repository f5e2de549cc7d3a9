"""A run that goes on without the processes that die.

JAX can tell which processes are alive, and that all of them agree on whether a step was done (`live_devices`). What is left
to do for a vote: a mesh of the survivors, the same parameters there, and each survivor's own momentum and residual.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import multihost_utils
from jax.sharding import AxisType
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

from signopt.workers import _layout
from signopt.workers.run import Step
from signopt.workers.run import on_mesh
from signopt.workers.state import is_served
from signopt.workers.state import owners
from signopt.workers.state import partition_specs


def elastic(make_step: Callable[[int], Step], *, axis_name: str) -> Step:
    """Run a step with one worker on each device of all processes, and go on without those that die.

    It is `on_mesh`, with a mesh of whoever is alive. A step in which a process dies counts for nobody: the survivors agree
    on that, go back to the state before it, and repeat it without the dead. Each keeps its own momentum and residual; those
    of a lost worker are lost.

    Before anything of JAX is used::

      jax.config.update("jax_enable_recoverability", True)
      jax.distributed.initialize(..., heartbeat_timeout_seconds=10)

    Args:
      make_step: `num_workers -> step`, where a step is `(state, batch) -> (state, metrics)` for one worker, as for
        `on_mesh`. It is called for all workers, and again for as many as survive.
      axis_name: The axis of the workers.

    Returns:
      A function from the state and the whole batch to the new state and the metrics of all workers. The state in the
      beginning is that of all devices; what is returned has as many workers as are alive. Every process has to pass the
      same batch, in NumPy's arrays; the last examples that the survivors cannot share equally are left out. Nothing is
      donated.

    Raises:
      ValueError: If JAX was not told to go on without a process; when called, if servers remember: their rows die with
        them.
    """
    if not jax.config.jax_enable_recoverability:  # pyright: ignore[reportAttributeAccessIssue]
        raise ValueError(
            "`elastic(...)` has to be called where JAX goes on without a process that dies, got "
            'jax_enable_recoverability=False. Call `jax.config.update("jax_enable_recoverability", True)` before '
            "`jax.distributed.initialize(...)`."
        )
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    mesh = run = None

    def elastic_step(state, batch):
        nonlocal devices, mesh, run
        _refuse_servers(state)
        while True:
            if mesh is None:
                mesh = Mesh(np.array(devices), (axis_name,), axis_types=(AxisType.Auto,))
                run = on_mesh(make_step(len(devices)), mesh, axis_name=axis_name)
                state = _carry(state, mesh, axis_name)
            assert run is not None
            try:
                with multihost_utils.live_devices(devices):
                    found = run(state, _shared_equally(batch, len(devices)))
                    jax.block_until_ready(found)
                return found
            except multihost_utils.ProcessFailureError as error:
                devices = [device for device in devices if device not in error.failed_devices]
                mesh = None

    return elastic_step


def _carry(state: Any, mesh: Mesh, axis_name: str) -> Any:
    """A state on the devices of a mesh, which keep what they have of a larger one."""
    specs = partition_specs(state, axis_name)
    here = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]

    def leaf(x, spec, owner):
        if not isinstance(x, jax.Array) or (x.is_fully_addressable and not isinstance(x.sharding, NamedSharding)):
            return _layout.place(x, mesh, spec)
        parts = {shard.device: shard.data for shard in x.addressable_shards}
        shape = x.shape if owner == "shared" else (mesh.size, *x.shape[1:])
        return jax.make_array_from_single_device_arrays(shape, NamedSharding(mesh, spec), [parts[d] for d in here])

    carried = jax.tree.map(leaf, state, specs, owners(state))
    number = _layout.place(np.arange(mesh.size, dtype=np.int32), mesh, PartitionSpec(axis_name))
    return jax.tree.map(lambda x, owner: number if owner == "worker" else x, carried, owners(state))


def _shared_equally(batch: Any, num_workers: int) -> Any:
    return jax.tree.map(lambda x: x[: len(x) // num_workers * num_workers], batch)


def _refuse_servers(state: Any) -> None:
    for path, _ in jax.tree.leaves_with_path(state):
        if is_served(path):
            raise ValueError(
                "`elastic(...)` has to be given state that dies with nobody else's, got what servers remember at "
                f'`state{jax.tree_util.keystr(path)}`. Let workers alone remember (`memory="workers"`, no `server=`), or go '
                "on from a checkpoint with `signopt.workers.resize`."
            )
