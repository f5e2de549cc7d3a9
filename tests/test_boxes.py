"""Names on Flax's boxes: per-worker state has the worker axis in front, and Flax lays it out by that."""

import json
import os
import pathlib
import subprocess
import sys

import chex
from flax import linen as nn
from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

import signopt
from signopt import _boxes
from signopt.workers import partition_specs
from signopt.workers import per_worker

M = 4


def train(*args):
    """What flax_on_a_mesh.py prints, and its stderr. A program out of a cache is not laid out again, and says nothing."""
    environment = {key: value for key, value in os.environ.items() if "COMPILATION_CACHE" not in key}
    result = subprocess.run(
        [sys.executable, str(pathlib.Path(__file__).with_name("flax_on_a_mesh.py")), *args],
        env=environment | {"PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()], result.stderr


@pytest.mark.slow
def test_each_device_holds_its_share_of_one_worker_s_momentum_and_nothing_is_rematerialized():
    records, stderr = train()
    assert {(r["model"], r["mesh"]) for r in records} == {
        (model, mesh) for model in ("linen", "nnx.Optimizer", "nnx") for mesh in ("fsdp", "tensor")
    }
    unnamed = 32 * 4 * M  # the second bias, which the tensor rules leave on all devices of a worker
    for r in records:
        whole = r["mesh"] == "tensor" and r["model"] == "linen"
        assert r["on_a_device"] == (r["bytes"] - unnamed * whole) // 8 + whole * unnamed // M, r
    assert "rematerialization" not in stderr


@pytest.mark.slow
def test_names_without_the_worker_axis_would_be_seen():
    """Negative control: the names of the parameters, which is what boxes say if nobody adds an axis to them."""
    (record,), stderr = train("shifted")
    assert record["on_a_device"] > record["bytes"] // 8
    assert "rematerialization" in stderr


def variable(sharding, **metadata):
    """An nnx parameter with names, where there is no mesh yet."""
    return nnx.Param(jnp.ones((2, 3)), out_sharding=sharding, eager_sharding=False, **metadata)


def mesh():
    return jax.make_mesh((1, 1), ("data", "x"), axis_types=(jax.sharding.AxisType.Auto,) * 2, devices=jax.devices()[:1])


BOXES = {
    "Partitioned": lambda: nn.Partitioned(jnp.ones((2, 3)), ("x", None)),
    "LogicallyPartitioned": lambda: nn.LogicallyPartitioned(jnp.ones((2, 3)), ("x", None)),
    "tuple": lambda: variable(("x", None)),
    "spec": lambda: variable(P("x", None)),
    "NamedSharding": lambda: variable(NamedSharding(mesh(), P("x", None))),
}


def spec_of(box):
    return nnx.get_partition_spec(box).get_value() if isinstance(box, nnx.Variable) else nn.get_partition_spec(box)


@pytest.mark.parametrize("kind", BOXES)
@pytest.mark.parametrize("axis_name", ("data", ("a", "b"), None))
def test_the_axis_comes_first_and_leaves_without_a_trace(kind, axis_name):
    box = BOXES[kind]()
    if kind == "NamedSharding" and axis_name == ("a", "b"):
        pytest.skip("JAX has no sharding over axes that its mesh has not.")
    added = _boxes.add_axis({"w": box}, axis_name)["w"]
    if kind == "NamedSharding":
        assert added.get_metadata("out_sharding").spec == P(axis_name, "x", None)
    else:
        assert spec_of(added) == P(axis_name, "x", None)
    removed = _boxes.remove_axis({"w": added}, axis_name, "per_worker")["w"]
    assert type(removed) is type(box)
    assert jax.tree.structure(removed) == jax.tree.structure(box)
    assert jax.tree.structure(added) != jax.tree.structure(box)


def test_the_names_that_an_optimizer_of_nnx_is_to_use_get_the_axis_too():
    box = variable(("x", None), optimizer_sharding=(None, "y"))
    added = _boxes.add_axis(box, "data").get_metadata()
    assert added["out_sharding"] == ("data", "x", None)
    assert added["optimizer_sharding"] == ("data", None, "y")


@pytest.mark.parametrize(
    "box", (nnx.Param(jnp.ones(2)), nnx.Param(jnp.ones(2), out_sharding=())), ids=("none", "empty")
)
def test_variables_without_names_and_plain_leaves_stay_as_they_are(box):
    tree = {"box": box, "array": jnp.ones(2), "none": None, "float": 1.0}
    for changed in (_boxes.add_axis(tree, "data"), _boxes.remove_axis(tree, "data", "per_worker")):
        assert jax.tree.structure(changed) == jax.tree.structure(tree)


@pytest.mark.parametrize("kind", ("Partitioned", "tuple"))
def test_state_whose_boxes_were_changed_is_refused(kind):
    tx = per_worker(optax.trace(0.9), M, axis_name="w")
    params = {"w": BOXES[kind]()}
    state = tx.init(params)._replace(per_worker=optax.trace(0.9).init(params))
    with pytest.raises(
        ValueError,
        match=r"`per_worker\(\.\.\.\)\.update\(state=\.\.\.\)` .* 'w' as the name .*'x', None.*state\.trace\['w'\]",
    ):
        jax.vmap(lambda worker: tx.update(params, state._replace(worker=worker))[0], axis_name="w")(state.worker)


@pytest.mark.parametrize("kind", ("Partitioned", "LogicallyPartitioned", "tuple"))
def test_boxes_change_names_and_no_numbers(kind):
    """Steps over boxed gradients, against the same over plain arrays; the wrapped transformation sees its own names."""
    seen = []

    def spy(updates, state, params=None):
        del params
        seen.append(jax.tree.structure(updates) == jax.tree.structure(state))
        return jax.tree.map(lambda g, s: g + s, updates, state), jax.tree.map(lambda g, s: g - s, updates, state)

    inner = optax.chain(signopt.scale_by_signum(0.5), optax.GradientTransformation(optax.tree.zeros_like, spy))
    tx = per_worker(inner, M, axis_name="w")
    gradients = jnp.asarray(np.random.default_rng(0).normal(size=(3, M, 2, 3)), jnp.float32)
    box = BOXES[kind]()
    like = lambda x: jax.tree.map(lambda _: x, box)

    def run(wrap):
        state = tx.init({"w": wrap(jnp.ones((2, 3)))})
        for g in gradients:
            updates, new = jax.vmap(lambda g, s: tx.update({"w": wrap(g)}, s), axis_name="w")(g, state)
            assert jax.tree.structure(new) == jax.tree.structure(state)
            state = new
        return updates, state

    boxed, plain = run(like), run(lambda x: x)
    assert all(seen)
    chex.assert_trees_all_equal(jax.tree.leaves(boxed), jax.tree.leaves(plain))


def test_partition_specs_and_both_of_flax_s_name_the_workers_axis():
    tx = signopt.signum(0.1, axis_name="data", num_workers=M)
    state = tx.init({"w": BOXES["LogicallyPartitioned"](), "v": BOXES["tuple"]()})
    ema = lambda tree: tree[0].per_worker.inner_state.ema
    assert ema(partition_specs(state, "data"))["w"].value == P("data")
    linen = nn.get_partition_spec({"w": ema(state)["w"]})["w"]
    assert linen == P("data", "x", None)
    assert nn.logical_to_mesh(linen, (("x", "fsdp"), ("data", "data"))) == P("data", "fsdp", None)
    assert nnx.get_partition_spec(ema(state)["v"]).get_value() == P("data", "x", None)


@pytest.mark.parametrize("kind", ("LogicallyPartitioned", "tuple"))
def test_local_steps_tell_boxes_the_axis_too(kind):
    outer = optax.chain(signopt.mean("data"), optax.sgd(1.0))
    tx = signopt.local_steps(optax.sgd(0.5, momentum=0.9), outer, every=2, num_workers=M, axis_name="data")
    params = {"w": BOXES[kind]()}
    state = tx.init(params)
    steps = state.own.per_worker
    for box in (steps.offset["w"], optax.tree.get(steps.inner_state, "trace")["w"]):
        assert spec_of(box) == P("data", "x", None)
    step = lambda own: tx.update(params, state._replace(own=own), params)[1].own
    assert jax.tree.structure(jax.vmap(step, axis_name="data")(state.own)) == jax.tree.structure(state.own)


def test_local_steps_check_the_size_of_the_axis():
    outer = optax.chain(signopt.mean("w"), optax.sgd(1.0))
    tx = signopt.local_steps(optax.sgd(0.5), outer, every=2, num_workers=M, axis_name="w")
    own = jax.tree.map(lambda x: x[:2], tx.init(jnp.zeros(3)).own)
    with pytest.raises(ValueError, match=r"has to be the size of axis 'w', which is 2, got 4"):
        jax.vmap(
            lambda own: tx.update(jnp.zeros(3), tx.init(jnp.zeros(3))._replace(own=own), jnp.zeros(3)), axis_name="w"
        )(own)
