"""Running a step: batches are dealt out, and what is wrong is refused with a sentence that helps."""

import re

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

import signopt
from signopt import workers

M = 4


@pytest.fixture(params=("simulate", "on_mesh"))
def runner(request, devices):
    """`run(step)` under both runners, and its name for the messages."""
    mesh = jax.make_mesh((M,), ("w",), axis_types=(AxisType.Auto,), devices=devices[:M])

    def build(step, **kwargs):
        if request.param == "simulate":
            return workers.simulate(step, M, axis_name="w")
        return workers.on_mesh(step, mesh, axis_name="w", **kwargs)

    build.name = request.param
    return build


def echo(state, batch):
    return state, batch


# ---- batches and metrics -----------------------------------------------------------------------------------


def test_split_batch_deals_consecutive_rows():
    batch = {"x": np.arange(12).reshape(6, 2), "y": np.arange(6)}
    split = workers.split_batch(batch, 3)
    np.testing.assert_array_equal(split["y"], [[0, 1], [2, 3], [4, 5]])
    np.testing.assert_array_equal(split["x"], batch["x"].reshape(3, 2, 2))


def test_metrics_come_back_stacked_in_worker_order(runner):
    _, metrics = runner(echo)(jnp.zeros(1), {"x": np.arange(3 * M, dtype=np.int32), "e": np.zeros((M, 0))})
    np.testing.assert_array_equal(metrics["x"], np.arange(3 * M).reshape(M, 3))
    assert metrics["e"].shape == (M, 1, 0)


def test_a_metric_may_be_shared_or_a_python_number(runner):
    step = lambda state, batch: (state, (lax.psum(batch.sum(), "w"), 1.5))
    _, (total, constant) = runner(step)(jnp.zeros(1), np.arange(float(M)))
    np.testing.assert_array_equal(total, np.full(M, 6.0))
    np.testing.assert_array_equal(constant, np.full(M, 1.5))


def test_statistics_that_are_averaged_are_shared(runner):
    step = lambda state, batch: (lax.pmean(batch.mean(), "w"), None)
    state, metrics = runner(step)(jnp.float32(0.0), np.arange(2.0 * M, dtype=np.float32))
    assert state == 3.5
    assert metrics is None


def test_random_keys_can_be_shared_state(runner):
    def step(state, batch):
        key, _ = state
        key, own = jax.random.split(key)
        return (key, state[1]), jax.random.uniform(jax.random.fold_in(own, lax.axis_index("w")))

    (key, _), draws = runner(step)((jax.random.key(0), jnp.zeros(2)), np.zeros(M))
    assert key.shape == ()
    assert len(set(np.asarray(draws).tolist())) == M


def test_an_inner_axis_may_average_while_an_outer_one_votes(devices):
    """Two groups of two: `state_axis_name` says that state belongs to a group, not to a device."""
    tx = optax.chain(signopt.mean("inner"), signopt.signum(1.0, 0.5, axis_name="outer", num_workers=2))
    rows = np.array([[3.0, -1.0], [-1.0, -1.0], [-1.0, 5.0], [-1.0, 1.0]], np.float32)

    def step(state, batch):
        w, opt_state = state
        gradient = workers.value_and_grad(lambda w, b: (w * b[0]).sum(), axis_name=("outer", "inner"))(w, batch)[1]
        updates, opt_state = tx.update(gradient, opt_state, w)
        return (w + updates, opt_state), None

    mesh = jax.make_mesh((2, 2), ("outer", "inner"), axis_types=(AxisType.Auto,) * 2, devices=devices[:4])
    names = {"axis_name": ("outer", "inner"), "state_axis_name": "outer"}
    runs = (workers.simulate(step, (2, 2), **names), workers.on_mesh(step, mesh, **names))
    for run in runs:
        (w, opt_state), _ = run((jnp.zeros(2), tx.init(jnp.zeros(2))), rows)
        # Group means (1, -1) and (-1, 3): a tie in both coordinates, which is 0 on two bits.
        np.testing.assert_array_equal(w, [0.0, 0.0])
        np.testing.assert_array_equal(optax.tree.get(opt_state, "ema"), [[0.5, -0.5], [-0.5, 1.5]])


def test_inner_axes_stay_automatic(devices):
    """FSDP inside, votes between: parameters and momenta keep their shards of the inner axis."""
    mesh = jax.make_mesh((2, 4), ("w", "shard"), axis_types=(AxisType.Auto,) * 2, devices=devices)
    tx = signopt.signum(1.0, 0.5, axis_name="w", num_workers=2)
    state = (jnp.zeros((8, 3)), tx.init(jnp.zeros((8, 3))))

    def place(x):
        spec = {(8, 3): P("shard"), (2, 8, 3): P("w", "shard"), (2,): P("w")}.get(x.shape, P())
        return jax.device_put(x, jax.NamedSharding(mesh, spec))

    def step(state, batch):
        w, opt_state = state
        gradient = workers.value_and_grad(lambda w, b: (w * b[0]).sum(), axis_name="w")(w, batch)[1]
        updates, opt_state = tx.update(gradient, opt_state, w)
        return (w + updates, opt_state), None

    rows = np.random.default_rng(0).choice([-1.0, 0.0, 1.0], (2, 8, 3)).astype(np.float32)
    (w, opt_state), _ = workers.on_mesh(step, mesh, axis_name="w")(jax.tree.map(place, state), rows)
    np.testing.assert_array_equal(w, -np.sign(rows.sum(0)))
    np.testing.assert_array_equal(optax.tree.get(opt_state, "ema"), rows / 2)
    (alone, _), _ = workers.simulate(step, 2, axis_name="w")(state, rows)
    np.testing.assert_array_equal(w, alone)


def test_value_and_grad_takes_argnums_keywords_and_aux():
    fun = lambda a, b, *, scale: (scale * (a["x"] * b).sum(), a["x"])
    both = workers.value_and_grad(fun, (0, 1), axis_name="w", has_aux=True)
    rows = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    run = lambda b: both({"x": jnp.ones(2)}, b, scale=2.0)
    (value, aux), (da, db) = jax.vmap(run, axis_name="w")(rows)
    np.testing.assert_array_equal(value, [6.0, 14.0])
    np.testing.assert_array_equal(aux, np.ones((2, 2)))
    np.testing.assert_array_equal(da["x"], 2 * rows)
    np.testing.assert_array_equal(db, np.full((2, 2), 2.0))


# ---- bad input -----------------------------------------------------------------------------------------------


def optimize(tx, own_gradient=True):
    """A step whose gradient is the worker's row, or the sum of all rows."""

    def step(state, batch):
        w, opt_state = state
        loss = lambda w: (w * batch[0]).sum()
        grad = workers.value_and_grad(loss, axis_name="w") if own_gradient else jax.value_and_grad(loss)
        value, gradient = grad(w)
        updates, opt_state = tx.update(gradient, opt_state, w)
        return (w + updates, opt_state), value

    return step


ROWS = np.ones((M, 3), np.float32)


def test_a_batch_that_cannot_be_shared_equally_is_refused(runner):
    sentence = (
        f"`{runner.name}(...)` has to be given batches whose leading axis 4 workers can share equally, got shape (6, 2) "
        "at `batch['x']`. Drop or pad the last examples, or put what is no data into the state."
    )
    with pytest.raises(ValueError, match=re.escape(sentence)):
        runner(echo)(jnp.zeros(1), {"x": np.zeros((6, 2))})
    with pytest.raises(ValueError, match=r"got shape \(\) at `batch\['x'\]`"):
        runner(echo)(jnp.zeros(1), {"x": np.float32(1.0)})


def test_split_batch_refuses_what_it_cannot_split():
    with pytest.raises(ValueError, match=r"`split_batch\(...\)` .* 4 workers .* got shape \(6,\) at `batch`\."):
        workers.split_batch(np.zeros(6), 4)


def test_state_of_another_number_of_workers_is_refused(runner):
    tx = signopt.signum(0.1, axis_name="w", num_workers=3)
    sentence = (
        rf"^`{runner.name}\(...\)` has to be given the state of all 4 workers, got shape \(3.*\) at `state.*`\. Make it "
        r"with `num_workers=4`, or carry it over with `signopt\.workers\.resize\(state, 4\)`\."
    )
    with pytest.raises(ValueError, match=sentence):
        runner(optimize(tx))((jnp.zeros(3), tx.init(jnp.zeros(3))), ROWS)


def test_num_workers_that_differs_from_the_axis_is_refused():
    tx = signopt.signum(0.1, axis_name="w", num_workers=3)
    state = signopt.signum(0.1, axis_name="w", num_workers=M).init(jnp.zeros(3))
    run = workers.simulate(optimize(tx), M, axis_name="w")
    sentence = (
        "`per_worker(num_workers=...)` has to be the size of axis 'w', which is 4, got 3. To go on with a state of "
        "another number of workers, use `signopt.workers.resize(state, num_workers)`."
    )
    with pytest.raises(ValueError, match=re.escape(sentence)):
        run((jnp.zeros(3), state), ROWS)


def test_per_worker_state_without_its_axis_is_refused():
    tx = signopt.signum(0.1, axis_name="w", num_workers=M)
    state = tx.init(jnp.zeros(3))
    update = lambda g: tx.update(g, state, jnp.zeros(3))[0]
    sentence = (
        "`per_worker(...).update(state=...)` has to be given the state of one worker, got those of 4 at once. Run the "
        "step with `signopt.workers.simulate` or `on_mesh`, or split the state along the worker axis: "
        "`in_specs=signopt.workers.partition_specs(state, axis_name)` under `jax.shard_map`, `in_axes=0` under "
        "`jax.vmap` and `jax.pmap`."
    )
    with pytest.raises(ValueError, match=re.escape(sentence)):
        jax.vmap(update, axis_name="w")(ROWS)


def test_shared_state_that_differs_between_workers_is_refused(runner):
    step = lambda state, batch: ({"same": state["same"], "statistics": batch.mean()}, None)
    sentence = (
        f"`{runner.name}(step)` has to return shared state that is the same on every worker, got a different one on each "
        "at `state['statistics']`. Vote or average before what changes it (`axis_name=...` in a ready optimizer, "
        "`jax.lax.pmean` of statistics), or keep it per worker (`num_workers=...` in a ready optimizer, "
        "`signopt.workers.per_worker` in a chain of your own)."
    )
    with pytest.raises(ValueError, match=re.escape(sentence)):
        runner(step)({"same": jnp.zeros(2), "statistics": jnp.float32(0.0)}, np.ones(M, np.float32))


def test_momentum_that_is_not_marked_per_worker_is_refused(runner):
    """The third trap: without `num_workers` the momenta differ between workers but claim to be shared."""
    tx = signopt.signum(0.1, axis_name="w")
    # On a mesh types show it before the step returns.
    sentence = "has to (return shared state that is the same on every worker|be given state of each worker's own)"
    with pytest.raises(ValueError, match=sentence):
        runner(optimize(tx))((jnp.zeros(3), tx.init(jnp.zeros(3))), ROWS)


def test_a_step_that_returns_other_state_is_refused(runner):
    step = lambda state, batch: ({**state, "more": state["w"]}, None)
    with pytest.raises(ValueError, match=rf"`{runner.name}\(step\)` has to return a state of the structure"):
        runner(step)({"w": jnp.zeros(2)}, ROWS)


@pytest.mark.parametrize("state", ({"w": jnp.zeros(2)}, (jnp.zeros(2), jnp.zeros(3)), jnp.zeros(2)))
def test_a_step_that_returns_only_its_state_is_refused(state, runner):
    sentence = (
        f"`{runner.name}(step)` has to return `(state, metrics)`, got its state alone. Return `(state, None)` where there is "
        "nothing to report."
    )
    with pytest.raises(ValueError, match=re.escape(sentence)):
        runner(lambda state, batch: state)(state, ROWS)


def test_a_step_that_returns_no_pair_is_refused(runner):
    with pytest.raises(ValueError, match=r"has to return `\(state, metrics\)`, got 'dict'\. Return"):
        runner(lambda state, batch: {"w": state})(jnp.zeros(2), ROWS)


def test_a_vote_over_a_reduced_gradient_is_refused_with_the_cure(devices):
    mesh = jax.make_mesh((M,), ("w",), axis_types=(AxisType.Auto,), devices=devices[:M])
    tx = signopt.signsgd(0.1, axis_name="w")
    run = workers.on_mesh(optimize(tx, own_gradient=False), mesh, axis_name="w")
    sentence = (
        "`majority_vote` has to be given each worker's own gradient, got one that is the same on every worker of axis 'w' "
        "at `updates`: it was reduced before. Under `shard_map`, `jax.grad` of replicated parameters adds up the workers' "
        "gradients; take it with `signopt.workers.value_and_grad(loss, axis_name='w')`, and leave out any `lax.pmean` or "
        "`lax.psum` of the gradients."
    )
    with pytest.raises(ValueError, match=re.escape(sentence)):
        run((jnp.zeros(3), tx.init(jnp.zeros(3))), ROWS)


def test_a_gradient_that_was_averaged_before_the_vote_is_refused(devices):
    """Flax's ImageNet example calls `lax.pmean` before the optimizer: left in, every vote is unanimous."""
    mesh = jax.make_mesh((M,), ("w",), axis_types=(AxisType.Auto,), devices=devices[:M])
    for tx in (signopt.signsgd(0.1, axis_name="w"), signopt.signum(0.1, axis_name="w", num_workers=M)):

        def step(state, batch, tx=tx):
            w, opt_state = state
            gradient = lax.pmean(batch[0], "w")
            updates, opt_state = tx.update(gradient, opt_state, w)
            return (w + updates, opt_state), None

        with pytest.raises(ValueError, match=r"leave out any `lax\.pmean`"):
            workers.on_mesh(step, mesh, axis_name="w")((jnp.zeros(3), tx.init(jnp.zeros(3))), ROWS)


def test_a_mean_over_a_gradient_that_was_already_summed_is_refused(devices):
    mesh = jax.make_mesh((M,), ("w",), axis_types=(AxisType.Auto,), devices=devices[:M])
    tx = optax.chain(signopt.mean("w"), optax.sgd(0.1))
    run = workers.on_mesh(optimize(tx, own_gradient=False), mesh, axis_name="w")
    with pytest.raises(ValueError, match=r"`mean` has to be given each worker's own gradient"):
        run((jnp.zeros(3), tx.init(jnp.zeros(3))), ROWS)


def test_an_unbound_axis_is_refused_by_everything_that_needs_one():
    unbound = (
        r"has to be called where axis 'w' is bound, got an unbound name; bound here: none\. Run the step with "
        r"`signopt\.workers\.simulate` or `on_mesh`, .* in plain `jax\.jit` .* `signopt\.workers\.in_jit\(tx, mesh, axis_name='w'"
    )
    w = jnp.zeros(3)
    transforms = (signopt.majority_vote("w"), signopt.mean("w"), signopt.signum(0.1, axis_name=("w", "v")))
    for tx in transforms:
        with pytest.raises(ValueError, match=unbound):
            tx.update(w, tx.init(w), w)
    with pytest.raises(ValueError, match="`value_and_grad` " + unbound):
        workers.value_and_grad(jnp.sum, axis_name="w")(w)


def test_an_unbound_axis_is_told_which_are_bound():
    run = jax.vmap(
        lambda x: signopt.majority_vote("w").update(x, signopt.majority_vote("w").init(None)), axis_name="batch"
    )
    with pytest.raises(ValueError, match=r"got an unbound name; bound here: 'batch'\. Run"):
        run(ROWS)


def test_a_mesh_without_the_axis_is_refused(devices):
    mesh = jax.make_mesh((M,), ("w",), axis_types=(AxisType.Auto,), devices=devices[:M])
    with pytest.raises(ValueError, match=r"`on_mesh\(axis_name=...\)` .*\('w',\).*'v'"):
        workers.on_mesh(echo, mesh, axis_name="v")
    with pytest.raises(ValueError, match=r"`on_mesh\(state_axis_name=...\)` .*\('w',\).*'v'"):
        workers.on_mesh(echo, mesh, axis_name="w", state_axis_name="v")


@pytest.mark.parametrize(("num_workers", "axis_name"), [(0, "w"), (4, ("a", "b")), ((2, 2), "w"), (1.5, "w")])
def test_simulate_needs_a_size_for_every_name(num_workers, axis_name):
    with pytest.raises(ValueError, match=r"`simulate\(num_workers=...\)` has to be a positive integer for each name"):
        workers.simulate(echo, num_workers, axis_name=axis_name)


@pytest.mark.parametrize("make", (signopt.signsgd, signopt.signum, signopt.lion))
def test_ready_optimizers_refuse_bad_arguments_when_they_are_made(make):
    with pytest.raises(ValueError, match=rf"`{make.__name__}\(num_workers=...\)` .*num_workers=4 and axis_name=None"):
        make(0.1, num_workers=4)
    with pytest.raises(ValueError, match=r"wire=.*'one_bit', 'two_bit', 'psum', got 'bits'"):
        make(0.1, axis_name="w", wire="bits")


def test_a_mesh_that_is_none_is_refused():
    with pytest.raises(TypeError, match=r"`on_mesh\(mesh=...\)` has to be a mesh, got 'w'"):
        workers.on_mesh(lambda state, batch: (state, None), "w", axis_name="w")


def test_bytes_sent_names_the_axis_that_was_not_given():
    tx = signopt.signum(0.1, axis_name="data", num_workers=4)
    with pytest.raises(ValueError, match="axis 'data' is bound") as caught:
        signopt.wire.bytes_sent({"w": jax.ShapeDtypeStruct((4,), "float32")}, 4, tx)
    cure = "`bytes_sent(axis_name=...)` has to be the axis of what is given to it, got 'worker'."
    assert cure in caught.value.__notes__


def test_bytes_sent_refuses_an_unknown_wire_and_nobody():
    with pytest.raises(
        ValueError, match=r"`bytes_sent\(border=...\)` .*'one_bit', 'two_bit', 'psum', 'mean', got 'bits'"
    ):
        signopt.wire.bytes_sent(jnp.zeros(3), M, "bits")
    with pytest.raises(ValueError, match=r"`bytes_sent\(num_workers=...\)` has to be at least 1, got 0\."):
        signopt.wire.bytes_sent(jnp.zeros(3), 0, "one_bit")


def test_place_says_that_state_is_of_another_number_of_workers(devices):
    mesh = jax.make_mesh((8,), ("w",), axis_types=(jax.sharding.AxisType.Auto,), devices=devices)
    state = {"opt": signopt.signum(0.1, axis_name="w", num_workers=4).init(jnp.zeros(3)), "step": 0}
    cure = r"`place\(\.\.\.\)` has to be given the state of all 8 workers, got shape \(4,.*resize\(state, 8\)"
    for specs in (
        workers.partition_specs(state, "w"),
        {"opt": workers.partition_specs(state["opt"], "w"), "step": jax.P()},
    ):
        with pytest.raises(ValueError, match=cure):
            workers.place(state, mesh, specs)
    with pytest.raises(ValueError, match="divi"):  # JAX's own, where nothing is wrong with the workers
        workers.place(np.ones(3), mesh, jax.P("w"))
