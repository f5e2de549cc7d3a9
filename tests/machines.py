"""Compile votes for a machine that is not here and print what is in the programs, as JSON: `python tests/machines.py v5e:2x4`.

Names are topologies of TPUs, or `h100` for eight GPUs. No accelerator is needed, only the plugin that compiles for it. A
second argument names the layout of packed bits, if it shall not be the machine's own.
"""

import functools
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
from jax import lax
from jax.experimental import topologies
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax

import signopt
from signopt import _bits
from signopt import _compat
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


def compiled(function, mesh, specs, *args, options=None):
    """A program for the devices of a mesh; `args` are trees of shapes."""
    on_mesh = lambda spec, x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    def place(spec, tree):
        return jax.tree.map(functools.partial(on_mesh, spec), tree)

    is_spec = lambda x: isinstance(x, P)
    placed = [jax.tree.map(place, spec, tree, is_leaf=is_spec) for spec, tree in zip(specs, args, strict=True)]
    program = jax.jit(function, donate_argnums=0).lower(*placed).compile(compiler_options=options)
    text = program.as_text()
    return {
        "collectives": collectives(text),
        "temporaries": program.memory_analysis().temp_size_in_bytes,
        "cycles": sum(map(int, re.findall(r'"?estimated_cycles"?:"?(\d+)', text))),
        "under": products_under(text),
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


def products_under(text):
    """For each asynchronous collective, how many matrix products the schedule has between its start and its done."""
    bodies = dict(re.findall(r"^(?:ENTRY )?%?([\w.\-]+) \(.*?\{$(.*?)^\}", text, re.DOTALL | re.MULTILINE))
    is_product = lambda code: re.search(r" (dot|convolution)\(|__cublas", code) is not None
    products = {name for name, body in bodies.items() if is_product(body)}
    running, found = {}, {}
    for line in text[text.index("\nENTRY") :].splitlines():
        hit = re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = .*? ([a-z\-]+)\(([^)]*)\)", line)
        if not hit:
            continue
        name, kind, operands = hit.groups()
        called = re.findall(r"calls=%?([\w.\-]+)", line)
        what = " ".join([line, *(bodies.get(c, "") for c in called)])
        collective = re.search(r"(all-to-all|all-gather)(-start)?\(", what)
        kind = kind if kind != "fusion" else re.sub(r"[.\d]+$", "", name)  # a TPU has async-collective-start and -done
        if kind.endswith("-start") and collective:
            running[name] = collective[1]
            found[collective[1]] = 0
        elif kind.endswith("-done"):
            for start in re.findall(r"%?([\w.\-]+)", operands):
                running.pop(start, None)
        elif is_product(line) or products & set(called):
            for of in running.values():
                found[of] += 1
    return found


def layers(mesh, border, *, width, examples, options=None):
    """A step of four layers: gradients, momentum, the border, and the update of the parameters."""
    params = [jax.ShapeDtypeStruct((width, width), jnp.float32)] * 4
    tx = optax.chain(signopt.workers.per_worker(optax.trace(0.9), WORKERS), border, optax.scale_by_learning_rate(0.01))

    def loss(params, x):
        for w in params:
            x = jnp.tanh(x @ w)
        return jnp.mean(x**2)

    def step(state, x):
        params, opt_state = state
        _, grads = signopt.workers.value_and_grad(loss, axis_name=AXIS)(params, x)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    state = (params, jax.eval_shape(tx.init, params))
    specs = signopt.workers.partition_specs(state, AXIS)
    x = jax.ShapeDtypeStruct((WORKERS * examples, width), jnp.float32)
    mapped = jax.shard_map(step, mesh=mesh, in_specs=(specs, P(AXIS)), out_specs=specs)
    found = compiled(mapped, mesh, (specs, P(AXIS)), state, x, options=options)
    return found | {"parameter_bytes": 4 * 4 * width**2}


def in_stages(mesh, stages, *, width, examples, options):
    """The same step with a late vote on one bit by hand: of one stage, or of two, so that a decision waits for a step, too."""
    params = [jax.ShapeDtypeStruct((width, width), jnp.float32)] * 4
    words = _flat.size(params) // 8

    def loss(params, x):
        for w in params:
            x = jnp.tanh(x @ w)
        return jnp.mean(x**2)

    def step(state, x):
        params, momenta, ballots, decision = state
        dealt = lax.all_to_all(ballots.reshape(WORKERS, -1), AXIS, 0, 0, tiled=True)
        decided = decision[0] if stages == 2 else _bits.at_least(_bits.count(dealt), WORKERS // 2)
        everybody = lax.all_gather(decided, AXIS, tiled=True, to="invarying")
        _, grads = signopt.workers.value_and_grad(loss, axis_name=AXIS)(params, x)
        momenta = [0.9 * m + g[None] for m, g in zip(momenta, grads, strict=True)]
        cast = _flat.pack([m[0] for m in momenta], sign.is_positive)
        dealt, everybody, cast = _compat.after_all((dealt, everybody, cast))
        decision = _bits.at_least(_bits.count(dealt), WORKERS // 2)[None] if stages == 2 else decision
        params = [p - 0.01 * v for p, v in zip(params, _flat.unpack(everybody, params), strict=True)]
        return params, momenta, cast[None], decision

    own = [jax.ShapeDtypeStruct((WORKERS, *p.shape), p.dtype) for p in params]
    held = [jax.ShapeDtypeStruct((WORKERS, size), jnp.uint8) for size in (words, words // WORKERS)]
    specs = (P(), P(AXIS), P(AXIS), P(AXIS))
    mapped = jax.shard_map(step, mesh=mesh, in_specs=(specs, P(AXIS)), out_specs=specs)
    x = jax.ShapeDtypeStruct((WORKERS * examples, width), jnp.float32)
    return compiled(mapped, mesh, (specs, P(AXIS)), (params, own, *held), x, options=options)


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


def hidden(mesh, on_tpu):
    """Votes that come at once and late; on a TPU late ones also with the option that makes an all-to-all asynchronous."""
    late = functools.partial(signopt.majority_vote, AXIS, delay=1, num_workers=WORKERS)
    small = functools.partial(layers, mesh, width=128, examples=256)
    option = {"xla_tpu_enable_async_all_to_all": "true"} if on_tpu else None
    stages = {f"{n} stages": in_stages(mesh, n, width=128, examples=256, options=option) for n in (1, 2)}
    return {"at once": small(signopt.majority_vote(AXIS)), "late": small(late(), options=option)} | stages


def main(machine, layout=None):
    devices = devices_of(machine)
    on_tpu = machine != "h100"
    with _bits.as_on(layout or ("tpu" if on_tpu else "gpu")):
        one = Mesh(np.array(devices[:1]), ("device",))
        mesh = Mesh(np.array(devices[:WORKERS]), (AXIS,))
        print(
            json.dumps(
                {
                    "alone": {str(planes): alone(one, planes) for planes in (1, 2)},
                    "vote": {wire: vote(mesh, wire) for wire in ("one_bit", "two_bit")},
                    "hidden": {} if layout else hidden(mesh, on_tpu),
                }
            )
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
