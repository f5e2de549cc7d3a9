"""Swaps: what they deal and gather is what JAX's own collectives do."""

import functools
import re

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.common import swaps
import signopt

SHAPES = [((2,), ("w",)), ((4,), ("w",)), ((2, 2), ("b", "a"))]


def everywhere(body, devices, shape, names, check_vma=True, out_specs=None):
    """`body` on every device of a mesh, on its own part of an array; its results in a row."""
    mesh = jax.make_mesh(shape, names, axis_types=(jax.sharding.AxisType.Auto,) * len(shape), devices=devices)
    own = jax.P(names)
    specs = own if out_specs is None else out_specs
    return jax.jit(jax.shard_map(body, mesh=mesh, in_specs=own, out_specs=specs, check_vma=check_vma))


def words(rng, dtype, *shape):
    return rng.integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize(("shape", "names"), SHAPES)
def test_swaps_deal_what_all_to_all_does(shape, names, dtype, check_vma, devices, rng):
    workers = int(np.prod(shape))
    axes = names[::-1]  # an order that is not the mesh's
    rows = words(rng, dtype, workers, workers, 3, 5)
    run = functools.partial(everywhere, devices=devices[:workers], shape=shape, names=names, check_vma=check_vma)
    found = run(lambda x: swaps.all_to_all(x[0], axes)[None])(rows)
    expected = run(lambda x: lax.all_to_all(x[0], axes, split_axis=0, concat_axis=0, tiled=True)[None])(rows)
    for mine, theirs in zip(np.asarray(found), np.asarray(expected), strict=True):
        assert sorted(row.tobytes() for row in mine) == sorted(row.tobytes() for row in theirs)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_a_swap_gathers_what_all_gather_does_and_types_know_that_it_is_the_same(dtype, check_vma, devices, rng):
    x = words(rng, dtype, 2 * 7)
    gather = lambda x: swaps.all_gather(x, ("w",))
    found = everywhere(gather, devices[:2], (2,), ("w",), check_vma, out_specs=jax.P())(x)
    assert found.dtype == dtype
    assert found.tolist() == x.tolist()


# ---- where they are taken --------------------------------------------------------------------------------------------


def collectives(num_workers, size, devices, *, swapped=True):
    """The kinds of collectives in the program of a one-bit vote, in order."""
    vote = signopt.majority_vote("w", wire="one_bit")
    vote_update = swaps.instead(vote.update) if swapped else vote.update
    update = lambda g: vote_update(g[0], vote.init(None))[0]
    mapped = everywhere(update, devices[:num_workers], (num_workers,), ("w",), out_specs=jax.P())
    text = mapped.lower(jax.ShapeDtypeStruct((num_workers, size), jnp.float32)).compile().as_text()
    return re.findall(r" (all-reduce|all-to-all|all-gather)\(", text)


LARGE = 8 * swaps.LARGE  # entries of a message


@pytest.mark.parametrize(
    ("num_workers", "expected"), [(2, ["all-reduce"] * 3), (4, ["all-reduce"] * 3 + ["all-gather"])]
)
def test_few_workers_swap_large_messages(num_workers, expected, devices):
    assert collectives(num_workers, num_workers * LARGE, devices) == expected


@pytest.mark.parametrize("case", ["nobody asked", "three workers", "eight workers", "small messages"])
def test_everybody_else_deals_at_once(case, devices):
    num_workers = {"three workers": 3, "eight workers": 8}.get(case, 4)
    size = num_workers * LARGE - (8 * num_workers if case == "small messages" else 0)
    assert collectives(num_workers, size, devices, swapped=case != "nobody asked") == ["all-to-all", "all-gather"]


def test_a_swapped_vote_decides_the_same(devices, rng):
    vote = signopt.majority_vote("w")
    for num_workers in (2, 4):
        g = jnp.asarray(rng.normal(size=(num_workers, num_workers * LARGE)).astype(np.float32))
        run = functools.partial(everywhere, devices=devices[:num_workers], shape=(num_workers,), names=("w",))
        found, expected = (
            run(lambda g, u=u: u(g[0], vote.init(None))[0], out_specs=jax.P())(g)
            for u in (swaps.instead(vote.update), vote.update)
        )
        assert np.array_equal(found, expected)
