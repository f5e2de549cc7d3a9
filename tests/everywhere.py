"""One function of each worker in every runner: what it returns has to be the same."""

import jax
import jax.numpy as jnp
import numpy as np

AXIS = "worker"


def runs(function, shared, own, devices):
    """`function(shared, own)` on four workers: vmapped, on a mesh with checks and without, under pmap, and one by one.

    Args:
      function: From a tree that is the same on all workers and this worker's tree to a tree of results. It may use `AXIS`.
      shared: The former.
      own: The latter, with a leading axis of four workers.
      devices: At least four.

    Returns:
      For each runner the results of all workers along a leading axis.
    """
    mesh = jax.make_mesh((4,), (AXIS,), (jax.sharding.AxisType.Auto,), devices=devices[:4])

    def on_mesh(check_vma):
        def body(shared, own):
            return jax.tree.map(lambda x: jnp.asarray(x)[None], function(shared, jax.tree.map(lambda x: x[0], own)))

        specs = {"in_specs": (jax.P(), jax.P(AXIS)), "out_specs": jax.P(AXIS)}
        return jax.jit(jax.shard_map(body, mesh=mesh, check_vma=check_vma, **specs))

    runners = {
        "vmap": jax.jit(jax.vmap(function, (None, 0), axis_name=AXIS)),
        "mesh": on_mesh(True),
        "mesh without checks": on_mesh(False),
        "pmap": jax.pmap(function, in_axes=(None, 0), axis_name=AXIS, devices=devices[:4]),
    }
    return {name: jax.device_get(run(shared, own)) for name, run in runners.items()}


def assert_alike(found, rtol=1e-5, atol=1e-6):
    """All runners agree, up to another order of sums, and every value is a number."""
    first = found.pop("vmap")
    for name, other in found.items():
        for (path, a), b in zip(jax.tree.leaves_with_path(first), jax.tree.leaves(other), strict=True):
            where = f"{name}: {jax.tree_util.keystr(path)}"
            assert not np.any(np.isnan(a)), where
            np.testing.assert_allclose(b, a, rtol=rtol, atol=atol, err_msg=where)
