"""Models whose axes Flax names, trained on a mesh: what test_boxes.py runs in a process of its own, to read its stderr.

Prints a JSON line for each model and mesh: the bytes of all momenta, and those that one device holds of them.
"""

import json
import os
import sys

if __name__ == "__main__":  # before JAX is imported, and never in a process that only collects tests
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    os.environ["NPROC"] = "16"

from flax import linen as nn
from flax import nnx
from flax.training import train_state
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import optax

import signopt
from signopt import workers

M = 4
BATCH = jnp.linspace(-1, 1, 16 * 32).reshape(16, 32)


def make_mesh(inner):
    return jax.make_mesh((M, 2), ("data", inner), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def make_optimizer():
    return signopt.signum(0.1, axis_name="data", num_workers=M)


def held(momenta):
    """The bytes of some arrays, and those of them on one device."""
    leaves = jax.tree.leaves(momenta)
    return {
        "bytes": sum(x.nbytes for x in leaves),
        "on_a_device": sum(x.addressable_shards[0].data.nbytes for x in leaves),
    }


def of_workers(opt_state):
    return optax.tree.get(opt_state, "ema")


class Linen(nn.Module):
    """Two layers with logical names."""

    @nn.compact
    def __call__(self, x):
        kernel = nn.initializers.lecun_normal()
        for size, names in ((64, ("embed", "mlp")), (32, ("mlp", "embed"))):
            x = nn.Dense(
                size,
                kernel_init=nn.with_logical_partitioning(kernel, names),
                bias_init=nn.with_logical_partitioning(nn.initializers.zeros, names[1:]),
            )(nn.tanh(x))
        return x


def logical(inner, shifted):
    """As Flax's lm1b example lays out its state: `get_partition_spec`, then rules, then `out_shardings` of its init."""
    mesh = make_mesh(inner)
    rules = (
        ("data", "data"),
        ("embed", "fsdp" if inner == "fsdp" else None),
        ("mlp", "tensor" if inner == "tensor" else "fsdp"),
    )
    model = Linen()

    def init():
        params = model.init(jax.random.key(0), BATCH)["params"]
        return train_state.TrainState.create(apply_fn=model.apply, params=params, tx=make_optimizer())

    specs = nn.get_partition_spec(jax.eval_shape(init))
    if shifted:  # what stood there before: the names without the worker axis
        params = jax.tree.map(lambda s: s, specs.params)
        link = specs.opt_state[0]
        inner_state = link.per_worker.inner_state._replace(ema=params)
        link = link._replace(per_worker=link.per_worker._replace(inner_state=inner_state))
        specs = specs.replace(opt_state=(link, *specs.opt_state[1:]))
    shardings = nn.logical_to_mesh_sharding(specs, mesh, rules)
    state = jax.jit(init, out_shardings=shardings)()

    def loss(params, batch):
        return jnp.mean((model.apply({"params": params}, batch) - batch) ** 2)

    def boxed(state, batch):
        value, grads = workers.value_and_grad(loss, axis_name="data")(state.params, batch)
        return state.apply_gradients(grads=grads), value

    if not shifted:
        state, losses = workers.on_mesh(boxed, mesh, axis_name="data")(state, BATCH)
        assert losses.shape == (M,)
        assert nn.get_partition_spec(state) == specs  # the boxes came through
    state = nn.unbox(state)
    tx = workers.stacked(make_optimizer(), axis_name="data")

    def plain(state, batch):
        batches = workers.split_batch(batch, M)
        values, grads = jax.vmap(jax.value_and_grad(loss), (None, 0))(state.params, batches)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        return state.replace(params=optax.apply_updates(state.params, updates), opt_state=opt_state), values

    plain = jax.jit(plain, in_shardings=(shardings, NamedSharding(mesh, P("data"))), out_shardings=(shardings, None))
    state, _ = plain(jax.device_put(state, shardings), BATCH)
    print(json.dumps({"model": "linen", "mesh": inner} | held(of_workers(state.opt_state))), flush=True)


class Nnx(nnx.Module):
    """Two layers with names of a mesh."""

    def __init__(self, inner, rngs):
        init = nnx.initializers.lecun_normal()
        self.up = nnx.Linear(
            32,
            64,
            kernel_init=nnx.with_partitioning(init, (None, inner)),
            bias_init=nnx.with_partitioning(nnx.initializers.zeros_init(), (inner,)),
            rngs=rngs,
        )
        self.down = nnx.Linear(
            64, 32, kernel_init=nnx.with_partitioning(init, (inner, None)), use_bias=False, rngs=rngs
        )

    def __call__(self, x):
        return self.down(nnx.tanh(self.up(x)))


def named(inner):
    """As Flax's gemma example does: a `TrainState` of nnx variables, and an `nnx.Optimizer`."""
    mesh = make_mesh(inner)
    with jax.set_mesh(mesh):
        model = Nnx(inner, nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, make_optimizer(), wrt=nnx.Param)
        specs = nnx.get_partition_spec(nnx.state(optimizer))
        ema = specs["opt_state"][0]["per_worker"]["inner_state"]["ema"]
        assert ema["up"]["kernel"].get_value() == P("data", None, inner), ema
        assert ema["down"]["kernel"].get_value() == P("data", inner, None), ema
        momenta = nnx.state(optimizer)["opt_state"][0]["per_worker"]["inner_state"]["ema"]
        print(json.dumps({"model": "nnx.Optimizer", "mesh": inner} | held(momenta)), flush=True)

        graph, params = nnx.split(model, nnx.Param)
        tx = workers.stacked(make_optimizer(), axis_name="data")

        @jax.jit
        def init():
            state = train_state.TrainState.create(apply_fn=None, params=params, tx=tx)
            return jax.lax.with_sharding_constraint(state, nnx.get_partition_spec(state))

        def loss(params, batch):
            return jnp.mean((nnx.merge(graph, params)(batch) - batch) ** 2)

        @jax.jit
        def step(state, batch):
            batches = workers.split_batch(batch, M)
            values, grads = jax.vmap(jax.value_and_grad(loss), (None, 0))(state.params, batches)
            return state.apply_gradients(grads=grads), values

        state = init()
        specs = nnx.get_partition_spec(state)
        state, _ = step(state, jax.device_put(BATCH, NamedSharding(mesh, P("data"))))
        assert nnx.get_partition_spec(state) == specs
        print(json.dumps({"model": "nnx", "mesh": inner} | held(of_workers(state.opt_state))), flush=True)


if __name__ == "__main__":
    if sys.argv[1:] == ["shifted"]:
        logical("fsdp", shifted=True)
    else:
        for name in ("fsdp", "tensor"):
            logical(name, shifted=False)
            named(name)
