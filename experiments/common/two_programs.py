"""A late vote beside the gradient on CPUs: two programs, dispatched by two threads.

XLA on CPUs runs what one program does in turn. Two programs run side by side, but not with their collectives over the same
devices in the same order: those get each other's messages. So the vote is on a mesh of the same devices in reverse order,
which has connections of its own, and arrays pass from one mesh to the other without a copy.

The steps are those of `signopt.local_steps(every=1, delay=1)`.
"""

from collections.abc import Callable
import concurrent.futures
from typing import Any

import jax
import jax.numpy as jnp
import optax

import signopt


class Steps:
    """A training of one worker in each process, whose votes travel while it computes.

    Attributes:
      params: The anchor.
      offset: How far this worker is from it, with an axis of workers.
    """

    def __init__(
        self,
        loss: Callable[[Any, Any], jax.Array],
        inner: optax.GradientTransformation,
        outer: optax.GradientTransformation,
        params: Any,
        mesh: jax.sharding.Mesh,
    ):
        """Compile nothing yet.

        Args:
          loss: From parameters and this worker's batch to a scalar.
          inner: What a worker steps with.
          outer: The border and what is right of it, over the axis of the mesh; it keeps nothing of a worker's own.
          params: Where to begin.
          mesh: One axis, one device in each process.
        """
        (axis,) = mesh.axis_names
        self._here, self._there = mesh, jax.sharding.Mesh(mesh.devices[::-1], (axis,), axis_types=mesh.axis_types)
        self._own, self._shared = jax.P(axis), jax.P()
        self._threads = concurrent.futures.ThreadPoolExecutor(1)

        def compute(params, offset, state, batch):
            here = jax.tree.map(lambda p, o: p + o[0], params, offset)
            gradient = jax.grad(loss)(here, batch)
            step, state = inner.update(gradient, jax.tree.map(lambda x: x[0], state), here)
            return jax.tree.map(lambda x: x[None], (step, state))

        def exchange(offset, state, params):
            return outer.update(jax.tree.map(lambda o: -o[0], offset), state, params)

        self._compute = self._over(self._here, compute, (self._shared, self._own, self._own, self._own), self._own)
        self._exchange = self._over(self._there, exchange, (self._own, self._shared, self._shared), self._shared)
        self._apply = jax.jit(optax.apply_updates)
        count = mesh.size

        def for_each(x):
            x = jnp.asarray(x)
            sharding = jax.sharding.NamedSharding(mesh, self._own)
            return jax.make_array_from_callback((count, *x.shape), sharding, lambda index: jax.device_get(x)[None])

        # Whatever is the same on all workers lies on each of the two meshes.
        self.params = signopt.workers.place(params, self._here, jax.tree.map(lambda x: self._shared, params))
        self.offset = jax.tree.map(lambda x: for_each(jnp.zeros_like(x)), params)
        self._inner_state = jax.tree.map(for_each, inner.init(params))
        self._outer_state = jax.tree.map(
            lambda x: signopt.workers.place(x, self._there, self._shared), outer.init(params)
        )

    def _over(self, mesh, body, in_specs, out_specs):
        return jax.jit(jax.shard_map(body, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False))

    def _moved(self, tree, mesh, spec):
        """The same memory on the other mesh."""
        sharding = jax.sharding.NamedSharding(mesh, spec)
        return jax.tree.map(
            lambda x: jax.make_array_from_single_device_arrays(x.shape, sharding, [x.addressable_data(0)]), tree
        )

    def step(self, batch: Any) -> None:
        """Make a step of one's own while the last one travels, then take what was decided of that."""
        sent = self._moved(self.offset, self._there, self._own)
        anchor = self._moved(self.params, self._there, self._shared)
        voted = self._threads.submit(lambda: jax.block_until_ready(self._exchange(sent, self._outer_state, anchor)))
        computed = jax.block_until_ready(self._compute(self.params, self.offset, self._inner_state, batch))
        decided, self._outer_state = voted.result()
        self.offset, self._inner_state = computed
        self.params = self._apply(self.params, self._moved(decided, self._here, self._shared))
