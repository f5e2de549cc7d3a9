"""One step as two programs at once: what exchanges, and what computes meanwhile.

XLA on CPUs runs what one program does in turn, so a late decision (`delay=1`) hides nothing there. Two programs that two
threads start do run side by side. A step is cut by what its values depend on::

   exchange   collectives that need nothing of the batch, what they are made of, and what is made of them alone
   compute    what needs nothing of these collectives: the gradient, and what the next step exchanges
   finish     what needs both; for most steps nothing

The exchange runs on a mesh of the same devices in reverse order, because collectives of two programs get mixed up on one
(`_reversed`). XLA runs programs over several devices of one process in turn, so a process needs one device for this to hide
anything.
"""

from collections.abc import Callable, Mapping, Sequence
import concurrent.futures
import functools
from typing import Any, NamedTuple

import jax
from jax.extend.core import Jaxpr
from jax.extend.core import Literal
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec

from signopt import _compat
from signopt.workers import _reversed
from signopt.workers import _shared

_CALLS = ("jit", "pjit", "closed_call", "core_call")
_BARRIERS = ("after_all", "optimization_barrier")


class Place(NamedTuple):
    """How a value of a step is an array on a mesh.

    Attributes:
      value: A variable or a literal of the step.
      spec: How the array is split.
      stacked: Whether it has one more axis in front, of workers.
    """

    value: Any
    spec: PartitionSpec
    stacked: bool = False


class Program(NamedTuple):
    """A part of a step, compiled for a mesh.

    Attributes:
      mesh: Where it runs.
      reads: What it is given, by name.
      writes: What it returns, by name.
      call: From arrays to arrays.
    """

    mesh: Mesh
    reads: Mapping[Any, Place]
    writes: Mapping[Any, Place]
    call: Callable

    def run(self, arrays: Mapping[Any, jax.Array]) -> dict[Any, jax.Array]:
        """What it writes, when it is there."""
        given = [_reversed.moved(arrays[name], self.mesh, place.spec) for name, place in self.reads.items()]
        return dict(zip(self.writes, jax.block_until_ready(self.call(*given)), strict=True))


def check(mesh: Mesh, names: tuple, donate: bool) -> None:
    """Raise a `ValueError` if a step cannot be two programs on a mesh."""
    rule = "`on_mesh(hidden=...)` has to be False"
    if set(names) != set(mesh.axis_names):
        raise ValueError(
            f"{rule} on a mesh with axes beside those of the workers, got True for axis_name={names!r} of {mesh.axis_names}."
        )
    devices = list(mesh.devices.flat)
    if any(device.platform != "cpu" for device in devices):
        raise ValueError(
            f"{rule} on {devices[0].platform!r} devices, got True. It is for CPUs. Elsewhere one program can hide what "
            "travels late (docs/gpu_and_tpu.md)."
        )
    processes = {device.process_index for device in devices}
    if 1 < len(processes) < len(devices):
        raise ValueError(
            f"{rule} on several devices of each of several processes, got True for {len(devices)} devices of "
            f"{len(processes)} processes. XLA runs programs over several devices of a process in turn, and processes that "
            "begin with different ones wait for each other. Give each process one device."
        )
    if donate:
        raise ValueError(f"{rule} with donate=True, got True: both programs read the old state.")


def hide(all_workers: Callable, mesh: Mesh) -> Callable:
    """Run a step of all workers as two programs at once.

    Args:
      all_workers: `(state, batch) -> (state, metrics)`: one `jax.shard_map` over all axes of the mesh, of a `flat` step.
      mesh: Of CPUs.

    Returns:
      The same function, of arrays on the mesh. It returns when both programs are done, so nothing of theirs is in flight
      when the caller starts another.
    """
    thread = concurrent.futures.ThreadPoolExecutor(1, "exchange")
    known = {}

    def run(state, batch):
        leaves, treedef = jax.tree.flatten((state, batch))
        key = treedef, tuple(map(jax.typeof, leaves))
        if key not in known:
            known[key] = _compiled(all_workers, mesh, state, batch)
        programs, places, results, of_results = known[key]
        arrays = {place.value: _on(x, mesh, place.spec) for place, x in zip(places, leaves, strict=True)}
        decided = thread.submit(programs["exchange"].run, arrays)
        try:
            computed = programs["compute"].run(arrays)
        finally:
            concurrent.futures.wait([decided])
        arrays |= computed | decided.result()
        if "finish" in programs:
            arrays |= programs["finish"].run(arrays)
        found = [_reversed.moved(arrays[i], mesh, place.spec) for i, place in enumerate(results)]
        return jax.tree.unflatten(of_results, found)

    return run


def flat(step: Callable) -> Callable:
    """The same step without calls and barriers in its program, so that it can be cut anywhere."""

    @functools.wraps(step)
    def wrapped(*args):
        closed, shape = jax.make_jaxpr(step, return_shape=True)(*args)
        found = _inlined(closed.jaxpr, closed.consts, jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shape), found)

    return wrapped


def _inlined(jaxpr, consts, args):
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
    for eqn in jaxpr.eqns:
        given = [_shared.read(values, v) for v in eqn.invars]
        if eqn.primitive.name in _BARRIERS:
            found = given
        elif eqn.primitive.name in _CALLS:
            found = _inlined(*_shared.opened(eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))), given)
        else:
            found = _shared.bind(eqn, given)
        values |= zip(eqn.outvars, found, strict=True)
    return [_shared.read(values, v) for v in jaxpr.outvars]


def _compiled(all_workers, mesh, state, batch):
    """The programs by name, the places of their arguments and of the results, and the tree of these."""
    closed, shape = jax.make_jaxpr(all_workers, return_shape=True)(state, batch)
    (mapped,) = closed.jaxpr.eqns
    inner, check_vma = mapped.params["jaxpr"], mapped.params["check_vma"]
    # What the step closes over is among the arguments of the `shard_map`, too.
    closed_over = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    consts, place_of = {}, {}
    for v, x, spec in zip(inner.invars, mapped.invars, mapped.params["in_specs"], strict=True):
        if isinstance(x, Literal) or x in closed_over:
            consts[v] = _shared.read(closed_over, x)
        else:
            place_of[x] = Place(v, spec)
    places = [place_of[x] for x in closed.jaxpr.invars]
    results = [Place(v, spec) for v, spec in zip(inner.outvars, mapped.params["out_specs"], strict=True)]

    leaves = jax.tree.leaves((state, batch))
    of_batch = {place.value for place in places[len(jax.tree.leaves(state)) :]}
    known = {place.value: (place, jax.typeof(x)) for place, x in zip(places, leaves, strict=True)}
    programs = {}
    for name, (eqns, writes) in _cut(inner, of_batch, results, mesh, check_vma).items():
        on, bind = (_reversed.of(mesh), _reversed.bind) if name == "exchange" else (mesh, _shared.bind)
        reads = {v: known[v][0] for v in _needed(eqns, writes) if v not in consts}
        body = functools.partial(_evaluate, eqns, bind, consts, list(reads.values()), list(writes.values()))
        in_specs, out_specs = ([place.spec for place in some.values()] for some in (reads, writes))
        run = jax.jit(jax.shard_map(body, mesh=on, in_specs=(*in_specs,), out_specs=out_specs, check_vma=check_vma))
        lowered = run.lower(*(_like(known[v][1], NamedSharding(on, place.spec)) for v, place in reads.items()))
        known |= {v: (place, like) for (v, place), like in zip(writes.items(), lowered.out_info, strict=True)}
        programs[name] = Program(on, reads, writes, lowered.compile())
    return programs, places, results, jax.tree.structure(shape)


def _evaluate(eqns, bind, consts, reads, writes, *args):
    """The equations of a program, for one worker."""
    values = {place.value: x[0] if place.stacked else x for place, x in zip(reads, args, strict=True)} | consts
    for eqn in eqns:
        values |= zip(eqn.outvars, bind(eqn, [_shared.read(values, v) for v in eqn.invars]), strict=True)
    found = [jnp.asarray(_shared.read(values, place.value)) for place in writes]
    return [x[None] if place.stacked else x for place, x in zip(writes, found, strict=True)]


def _cut(jaxpr: Jaxpr, of_batch: set, results: Sequence[Place], mesh: Mesh, check_vma: bool) -> dict[str, tuple]:
    """The equations and the writes of each program, by its name. A result is written under its number."""
    late, of_batch, parts = set(), set(of_batch), []  # `late`: what is made of something that travelled
    for eqn in jaxpr.eqns:
        inputs = {v for v in eqn.invars if not isinstance(v, Literal)}
        needs_batch = bool(inputs & of_batch)
        is_late = bool(inputs & late) or (_reversed.communicates(eqn) and not needs_batch)
        of_batch |= set(eqn.outvars) if needs_batch else set()
        late |= set(eqn.outvars) if is_late else set()
        parts.append((is_late, needs_batch))
    if not any(is_late for is_late, _ in parts):
        raise ValueError(
            "`on_mesh(hidden=...)` has to be False for a step whose exchange needs its batch, got True: nothing can travel "
            "meanwhile. Exchange one step late: `signopt.local_steps(..., every=1, delay=1)`, or `delay=1` of a border."
        )

    def home(v):
        if isinstance(v, Literal) or v not in late:
            return "compute"
        return "finish" if v in of_batch else "exchange"

    writes = {"exchange": {}, "compute": {}, "finish": {}}
    for i, place in enumerate(results):
        writes[home(place.value)][i] = place

    def equations(name, may, has_to):
        """Those that the writes of a program need, and those of its own that do something else, such as printing."""
        wanted, found = {place.value for place in writes[name].values() if not isinstance(place.value, Literal)}, []
        for eqn, part in zip(reversed(jaxpr.eqns), reversed(parts), strict=True):
            if may(*part) and (wanted & set(eqn.outvars) or (has_to(*part) and _compat.acts(eqn))):
                found.append(eqn)
                wanted |= {v for v in eqn.invars if not isinstance(v, Literal)}
        return found[::-1]

    found = {"finish": equations("finish", lambda late, batch: late and batch, lambda late, batch: late and batch)}
    for v in _needed(found["finish"], writes["finish"]):
        if v not in jaxpr.invars:
            differs = not check_vma or bool(_compat.varying_type(v.aval))
            writes[home(v)][v] = Place(v, PartitionSpec(mesh.axis_names) if differs else PartitionSpec(), differs)
    found["exchange"] = equations("exchange", lambda late, batch: not batch, lambda late, batch: late and not batch)
    found["compute"] = equations("compute", lambda late, batch: not late, lambda late, batch: not late)
    order = ("exchange", "compute", "finish")  # each knows how those before it write
    return {name: (found[name], writes[name]) for name in order if name != "finish" or found[name] or writes[name]}


def _needed(eqns, writes):
    """What equations and results need, and no equation makes; in order."""
    made = {v for eqn in eqns for v in eqn.outvars}
    needed = [*(v for eqn in eqns for v in eqn.invars), *(place.value for place in writes.values())]
    return list(dict.fromkeys(v for v in needed if not isinstance(v, Literal) and v not in made))


def _like(x, sharding):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding, weak_type=getattr(x, "weak_type", False))


def _on(x, mesh, spec):
    """A value on the mesh as a program reads it."""
    wanted = NamedSharding(mesh, spec)
    return x if x.sharding.is_equivalent_to(wanted, x.ndim) else jax.device_put(x, wanted)
