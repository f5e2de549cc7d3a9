"""Modules of nnx: each worker's own gradient, its own dropout, and statistics that all share."""

import re

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

import signopt
from signopt import workers

M = 4


class Net(nnx.Module):
    def __init__(self, rate=0.5):
        self.norm = nnx.BatchNorm(3, momentum=0.9, rngs=nnx.Rngs(0))
        self.dropout = nnx.Dropout(rate)
        self.logits = nnx.Linear(3, 2, rngs=nnx.Rngs(1))

    def __call__(self, x, rngs):
        return self.logits(self.dropout(self.norm(x), rngs=rngs))


def loss_fn(model, rngs, batch):
    logits = model(batch["x"], rngs)
    return jnp.mean((logits - batch["y"]) ** 2), {"logits": logits, "size": jnp.abs(logits).max()}


@pytest.fixture
def batch(rng):
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    return {"x": draw(8, 3), "y": draw(8, 2)}


def one_by_one(batch, num_workers=M):
    """The definition: nnx's own gradient, of each worker with its own key."""
    found = []
    for worker in range(num_workers):
        own = jax.tree.map(lambda x, i=worker: workers.split_batch(x, num_workers)[i], batch)
        model = Net()
        rngs = nnx.Rngs(jax.random.fold_in(jax.random.key(5), worker))
        (loss, aux), gradient = nnx.value_and_grad(loss_fn, has_aux=True)(model, rngs, own)
        found.append((loss, aux, gradient, nnx.state(model, nnx.BatchStat)))
    return found


def in_jit(batch):
    model, rngs = Net(), nnx.Rngs(jax.random.key(5))
    grad_fn = workers.nnx_value_and_grad(loss_fn, axis_name="w", num_workers=M, has_aux=True)
    (loss, aux), gradient = nnx.jit(grad_fn)(model, rngs, batch)
    return loss, aux["logits"], gradient, model, rngs


def in_shard_map(batch):
    model, rngs = Net(), nnx.Rngs(jax.random.key(5))
    mesh = jax.make_mesh((M,), ("w",), axis_types=(AxisType.Auto,), devices=jax.devices()[:M])

    @nnx.jit
    @nnx.shard_map(mesh=mesh, in_specs=(P(), P(), P("w")), out_specs=(P(), P("w"), P("w")))
    def step(model, rngs, batch):
        grad_fn = workers.nnx_value_and_grad(loss_fn, axis_name="w", has_aux=True)
        (loss, aux), gradient = grad_fn(model, rngs, batch)
        return jax.lax.pmean(loss, "w"), aux["logits"], jax.tree.map(lambda x: x[None], gradient)

    return *step(model, rngs, batch), model, rngs


def in_pmap(batch):
    graph, state = nnx.split((Net(), nnx.Rngs(jax.random.key(5))))

    def step(batch):
        model, rngs = nnx.merge(graph, state, copy=True)
        (loss, aux), gradient = workers.nnx_value_and_grad(loss_fn, axis_name="w", has_aux=True)(model, rngs, batch)
        return loss, aux["logits"], gradient, nnx.state((model, rngs))

    mapped = jax.pmap(step, axis_name="w", devices=jax.devices()[:M])
    loss, logits, gradient, states = mapped(workers.split_batch(batch, M))
    model, rngs = nnx.merge(graph, jax.tree.map(lambda x: x[0], states))
    return loss.mean(), logits.reshape(-1, 2), gradient, model, rngs


@pytest.mark.parametrize("run", (in_jit, in_shard_map, in_pmap))
def test_each_worker_has_its_own_gradient_and_keys_and_all_share_the_mean_of_statistics(run, batch, devices):
    wanted = one_by_one(batch)
    loss, logits, gradient, model, rngs = run(batch)
    close = lambda found, like: np.testing.assert_allclose(found, like, rtol=1e-5, atol=1e-6)
    close(loss, np.mean([x[0] for x in wanted]))
    close(logits, np.concatenate([x[1]["logits"] for x in wanted]))
    for worker, (_, _, own, _) in enumerate(wanted):
        jax.tree.map(lambda g, like, i=worker: close(g[i], like), nnx.to_pure_dict(gradient), nnx.to_pure_dict(own))
    for name in ("mean", "var"):
        close(getattr(model.norm, name)[...], np.mean([x[3]["norm"][name][...] for x in wanted], axis=0))
    assert rngs.default.count[...] == 1
    assert (jax.random.key_data(rngs.default.key[...]) == jax.random.key_data(jax.random.key(5))).all()


@pytest.mark.parametrize("axis_type", (AxisType.Auto, AxisType.Explicit))
def test_scalars_are_means_and_an_optimizer_takes_the_gradient(axis_type, batch, devices):
    mesh = jax.make_mesh((M,), ("w",), axis_types=(axis_type,), devices=devices[:M])
    model, rngs = Net(), nnx.Rngs(jax.random.key(5))
    before = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    tx = workers.in_jit(signopt.signsgd(0.1, axis_name="w"), mesh, axis_name="w")
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, rngs, batch):
        grad_fn = workers.nnx_value_and_grad(loss_fn, axis_name="w", num_workers=M, has_aux=True)
        (_, aux), gradient = grad_fn(model, rngs, batch)
        optimizer.update(model, gradient)
        return aux["size"]

    with jax.set_mesh(mesh):
        size = step(model, optimizer, rngs, workers.place(batch, mesh, P("w")))
    wanted = one_by_one(batch)
    np.testing.assert_allclose(size, np.mean([x[1]["size"] for x in wanted]), rtol=1e-5)
    votes = jax.tree.map(lambda *g: -0.1 * np.sign(np.sign(g).sum(0)), *(nnx.to_pure_dict(x[2]) for x in wanted))
    moved = jax.tree.map(lambda new, old: new - old, nnx.to_pure_dict(nnx.state(model, nnx.Param)), before)
    jax.tree.map(lambda x, like: np.testing.assert_allclose(x, like, atol=1e-6), moved, votes)


def test_statistics_that_nobody_changes_stay_as_they_are_to_the_bit(rng):
    model = nnx.BatchNorm(50, use_running_average=True, rngs=nnx.Rngs(0))
    model.mean[...] = jnp.asarray(rng.normal(size=50), jnp.float32)
    before = np.asarray(model.mean[...])
    assert any(np.float32(3 * x) / np.float32(3) != x for x in before)  # a mean over three workers would change some
    grad_fn = workers.nnx_value_and_grad(lambda model, x: model(x).sum(), axis_name="w", num_workers=3)
    grad_fn(model, jnp.ones((6, 50)))
    np.testing.assert_array_equal(model.mean[...], before)


def test_only_what_is_wanted_is_differentiated():
    model = nnx.LoRA(3, 2, 2, base_module=nnx.Linear(3, 2, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1))
    loss = lambda model, x: jnp.sum(model(x) ** 2)
    grad_fn = workers.nnx_value_and_grad(loss, axis_name="w", num_workers=2, wrt=nnx.LoRAParam)
    _, gradient = grad_fn(model, jnp.ones((4, 3)))
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.LoRAParam)
    assert jax.tree.map(jnp.shape, nnx.to_pure_dict(gradient)) == jax.tree.map(
        lambda x: (2, *x.shape), nnx.to_pure_dict(nnx.state(model, nnx.LoRAParam))
    )
    optimizer.update(model, jax.tree.map(lambda g: g.mean(0), gradient))


def test_every_key_of_an_array_of_keys_is_folded():
    def loss(rngs, x):
        drawn = jax.vmap(jax.random.normal)(rngs.default.key[...])
        return jnp.sum(x), drawn

    rngs = nnx.Rngs(0).split(3)
    grad_fn = workers.nnx_value_and_grad(loss, axis_name="w", num_workers=2, has_aux=True)
    (_, drawn), _ = grad_fn(rngs, jnp.ones(4))
    assert len(set(np.asarray(drawn).tolist())) == 2 * 3


class Counter(nnx.Module):
    def __init__(self):
        self.seen = nnx.BatchStat(jnp.zeros([], jnp.int32))

    def __call__(self, x):
        self.seen[...] += jnp.sum(x > 0)
        return jnp.sum(x)


def test_what_cannot_be_shared_is_an_error(batch, devices):
    grad_fn = workers.nnx_value_and_grad(lambda model, x: model(x), axis_name="w", num_workers=M)
    differs = re.escape("has to leave what modules keep beside parameters the same on every worker, got numbers")
    with pytest.raises(ValueError, match=differs):
        grad_fn(Counter(), batch["x"])
    mesh = jax.make_mesh((M,), ("w",), axis_types=(AxisType.Auto,), devices=devices[:M])
    inside = workers.nnx_value_and_grad(lambda model, x: model(x), axis_name="w")
    with pytest.raises(ValueError, match=differs):
        nnx.shard_map(lambda *args: inside(*args)[0][None], mesh=mesh, in_specs=(P(), P("w")), out_specs=P("w"))(
            Counter(), batch["x"]
        )
    with pytest.raises(ValueError, match=r"`nnx_value_and_grad\(\.\.\.\)` .* whose leading axis 4 workers can share"):
        grad_fn(Counter(), batch["x"][:6])
    with pytest.raises(ValueError, match=r"`nnx_value_and_grad` has to be called where axis 'w' is bound"):
        inside(Counter(), batch["x"])
    with pytest.raises(TypeError, match=r"has to be given a module of nnx as its first argument, got dict"):
        grad_fn(batch, Counter())
    with pytest.raises(ValueError, match=r"`nnx_value_and_grad\(num_workers=\.\.\.\)` has to be"):
        workers.nnx_value_and_grad(loss_fn, axis_name="w", num_workers=0)
