"""Compile votes for a machine that is not here and print what is in the programs, as JSON: `python tests/machines.py v5e:2x4`.

Names are topologies of TPUs, or `h100` for eight GPUs. No accelerator is needed, only the plugin that compiles for it. A
second argument names the layout of packed bits, if it shall not be the machine's own.
"""

import json
import os
import pathlib
import re
import sys

if __name__ == "__main__":  # before JAX is imported, and never in a process that only collects tests
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ["TPU_ACCELERATOR_TYPE"] = "v5litepod-8"
    os.environ["TPU_WORKER_HOSTNAMES"] = "localhost"
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    # A plugin for TPUs does not know the flags of GPUs.
    of_gpus = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
    os.environ["XLA_FLAGS"] = of_gpus if "h100" in sys.argv else ""

import jax
from jax.experimental import topologies
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

import signopt
from signopt import _bits
from signopt import _flat
from signopt import sign

AXIS = "worker"
WORKERS = 8
PARAMETERS = 2**16
LEAVES = {
    "large": ((PARAMETERS,), jnp.float32),
    "ragged": ((PARAMETERS + 77,), jnp.float32),
    "half": ((64, 128), jnp.bfloat16),
    "small": ((3, 333), jnp.float32),
    "scalar": ((), jnp.float32),
}


def devices_of(machine):
    if machine != "h100":
        return topologies.get_topology_desc(platform="tpu", topology_name=machine).devices
    config = (pathlib.Path(__file__).parent / "data" / "h100.txtpb").read_text()
    return topologies.get_topology_desc(
        platform="cuda", topology_name="", target_config=config, topology="1x1x8"
    ).devices


def compiled(function, mesh, specs, *args):
    """A program for the devices of a mesh; `args` are trees of shapes."""
    on_mesh = lambda spec: lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))
    placed = [jax.tree.map(on_mesh(spec), tree) for spec, tree in zip(specs, args, strict=True)]
    program = jax.jit(function, donate_argnums=0).lower(*placed).compile()
    text = program.as_text()
    return {
        "collectives": collectives(text),
        "temporaries": program.memory_analysis().temp_size_in_bytes,
        "cycles": sum(map(int, re.findall(r'"?estimated_cycles"?:"?(\d+)', text))),
        "kernels": len(re.findall(r"= .* fusion\(", text[text.index("ENTRY") :])),
    }


def collectives(text):
    """Kind, dtype and entries of what each collective returns; an asynchronous one returns what it is given, too."""
    found = []
    for line in text.splitlines():
        hit = re.search(r" (all-to-all|all-gather|all-reduce|collective-permute|reduce-scatter)(-start)?\(", line)
        if hit:
            shapes = re.findall(r"([a-z]+\d+)\[([\d,]*)\]", line[: hit.start()])
            found.append([hit[1], *([t, int(np.prod([int(d) for d in s.split(",") if d]))] for t, s in shapes)])
    return found


def vote(mesh, wire, **kwargs):
    """A vote of eight workers on several leaves, and the update of the parameters."""
    params = {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in LEAVES.items()}
    grads = {name: jax.ShapeDtypeStruct((WORKERS, *shape), dtype) for name, (shape, dtype) in LEAVES.items()}
    tx = signopt.majority_vote(AXIS, wire=wire, **kwargs)

    def step(params, grads):
        votes, _ = tx.update(jax.tree.map(lambda g: g[0], grads), tx.init(params))
        return jax.tree.map(lambda p, v: p - jnp.asarray(0.01, p.dtype) * v, params, votes)

    mapped = jax.shard_map(step, mesh=mesh, in_specs=(P(), P(AXIS)), out_specs=P())
    found = compiled(mapped, mesh, (P(), P(AXIS)), params, grads)
    size = sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in params.values())
    return found | {"parameter_bytes": size}


def alone(mesh, planes):
    """Packing one vector, and updating one by packed signs, without anything around."""
    tests = (sign.is_positive, sign.is_negative)[:planes]
    numbers = jax.ShapeDtypeStruct((PARAMETERS,), jnp.float32)
    words = jax.ShapeDtypeStruct((PARAMETERS // 8,), f"uint{8 * planes}")
    pack = compiled(lambda x: _flat.pack(x, *tests), mesh, (P(),), numbers)
    update = compiled(lambda p, w: p - 0.01 * _flat.unpack(w, p), mesh, (P(), P()), numbers, words)
    return {"pack": pack, "unpack": update}


def main(machine, layout=None):
    devices = devices_of(machine)
    with _bits.as_on(layout or ("gpu" if machine == "h100" else "tpu")):
        one = Mesh(np.array(devices[:1]), ("device",))
        mesh = Mesh(np.array(devices[:WORKERS]), (AXIS,))
        print(
            json.dumps(
                {
                    "alone": {str(planes): alone(one, planes) for planes in (1, 2)},
                    "vote": {wire: vote(mesh, wire) for wire in ("one_bit", "two_bit")},
                }
            )
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
