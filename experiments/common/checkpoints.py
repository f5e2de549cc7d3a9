"""Checkpoints: training states on the disk, whole or not at all.

A folder holds a manifest that says whose it is, and below it a folder for each run with its newest states, written by
Orbax, which renames a state into place once it is complete. A state's leaves are kept in their order with their names,
shapes, dtypes and checksums, so that what does not fit or is damaged is found before anything is trained on it.
"""

from collections.abc import Mapping
import json
import pathlib
from typing import Any, NamedTuple
import zlib

import jax
import numpy as np
import orbax.checkpoint as ocp

MANIFEST = "signopt.json"
KEPT = 2


class CheckpointError(OSError):
    """A folder or a checkpoint that one cannot go on from."""


class Restored(NamedTuple):
    """What a checkpoint holds.

    Attributes:
      step: How many steps were done.
      leaves: The leaves of the state, in order.
      about: What was written down beside it.
    """

    step: int
    leaves: list[np.ndarray]
    about: dict[str, Any]


def claim(folder: str, manifest: Mapping[str, Any], *, resume: bool) -> None:
    """Make a folder for checkpoints, or make sure that it is the same run's.

    Args:
      folder: Where checkpoints go.
      manifest: What has to be the same when a run goes on; JSON.
      resume: Whether to go on from what is there. An empty folder is a run that has not begun.

    Raises:
      CheckpointError: If the folder holds something else. Nothing is changed then.
    """
    path = pathlib.Path(folder)
    manifest = json.loads(json.dumps(manifest))
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        if not (path / MANIFEST).is_file():
            raise CheckpointError(
                f"`--checkpoint {folder}` has to be empty or to hold checkpoints, got other files there."
            )
        if not resume:
            raise CheckpointError(
                f"`--checkpoint {folder}` holds the checkpoints of a run: go on with `--resume`, or name another folder."
            )
        try:
            found = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        except ValueError as error:
            raise CheckpointError(f"`--checkpoint {folder}` has an unreadable {MANIFEST}: {error}.") from error
        differ = sorted(key for key in {*found, *manifest} if found.get(key) != manifest.get(key))
        if differ:
            raise CheckpointError(
                f"`--checkpoint {folder}` holds the checkpoints of another run: "
                + ", ".join(f"{key} was {found.get(key)!r} and is {manifest.get(key)!r}" for key in differ)
                + ". Run with the same flags, or name another folder."
            )
        return
    path.mkdir(parents=True, exist_ok=True)
    unfinished = path / f"{MANIFEST}.unfinished"
    unfinished.write_text(json.dumps(manifest), encoding="utf-8")
    unfinished.replace(path / MANIFEST)


def save(folder: pathlib.Path, step: int, state: Any, about: Mapping[str, Any]) -> None:
    """Write a state; the newest two are kept.

    Args:
      folder: The run's own.
      step: How many steps were done.
      state: Any tree of arrays.
      about: What else to keep; JSON.
    """
    leaves = {f"{i:05}": np.asarray(x) for i, x in enumerate(jax.tree.leaves(jax.device_get(state)))}
    described = [
        {**_described(path, x), "crc32": zlib.crc32(np.ascontiguousarray(x).tobytes())}
        for (path, _), x in zip(jax.tree.leaves_with_path(state), leaves.values(), strict=True)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    with _manager(folder) as manager:
        stored = {name: x for name, x in leaves.items() if x.size}  # Orbax refuses empty arrays
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(stored), about=ocp.args.JsonSave({"leaves": described, "about": dict(about)})
        )
        manager.save(step, args=items, force=True)


def restore(folder: pathlib.Path) -> Restored | None:
    """Read the newest state of a run; None if there is none yet.

    Raises:
      CheckpointError: If it is damaged.
    """
    if not folder.is_dir():
        return None
    with _manager(folder) as manager:
        step = manager.latest_step()
        if step is None:
            return None
        try:
            found = manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore()))["about"]
            like = {f"{i:05}": np.empty(d["shape"], d["dtype"]) for i, d in enumerate(found["leaves"])}
            stored = {name: x for name, x in like.items() if x.size}
            read = manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(stored)))["state"]
            leaves = [np.asarray(read.get(name, empty)) for name, empty in like.items()]
            bad = [
                d["name"] for d, x in zip(found["leaves"], leaves, strict=True) if zlib.crc32(x.tobytes()) != d["crc32"]
            ]
        except Exception as error:  # whatever Orbax, TensorStore or JSON say about a missing or broken file
            reason = str(error).partition("\n")[0][:200]
            raise CheckpointError(_torn(folder, step, f"{type(error).__name__}: {reason}")) from error
    if bad:
        raise CheckpointError(_torn(folder, step, f"checksums of {', '.join(bad[:3])} do not match"))
    return Restored(step, leaves, {**found["about"], "leaves": found["leaves"]})


def unflatten(restored: Restored, like: Any, folder: pathlib.Path) -> Any:
    """The state of a checkpoint, in the structure of `like`.

    Args:
      restored: What `restore` returned.
      like: A tree of arrays or `jax.ShapeDtypeStruct`.
      folder: To name in the error.

    Raises:
      CheckpointError: If its leaves have other names, shapes or dtypes.
    """
    wanted = [_described(path, x) for path, x in jax.tree.leaves_with_path(like)]
    found = [{key: d[key] for key in ("name", "shape", "dtype")} for d in restored.about["leaves"]]
    if found != wanted:
        one, other = next((f, w) for f, w in zip([*found, None], [*wanted, None], strict=False) if f != w)
        raise CheckpointError(
            f"The checkpoint of step {restored.step} in {folder} holds another state: {one}, where this program has {other}."
        )
    return jax.tree.unflatten(jax.tree.structure(like), restored.leaves)


def _manager(folder):
    options = ocp.CheckpointManagerOptions(max_to_keep=KEPT, enable_async_checkpointing=False, create=False)
    if jax.process_count() > 1:  # Orbax would wait for all to save their shards; here one process has all of it
        me = jax.process_index()
        options.multiprocessing_options = ocp.options.MultiprocessingOptions(
            primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"process-{me}"
        )
    return ocp.CheckpointManager(folder.absolute(), options=options)


def _described(path, x):
    return {"name": jax.tree_util.keystr(path), "shape": list(x.shape), "dtype": np.dtype(x.dtype).name}


def _torn(folder, step, reason):
    return (
        f"The checkpoint of step {step} in {folder} is damaged ({reason}). Nothing was changed. Move {folder / str(step)} "
        "away to go on from the one before."
    )
