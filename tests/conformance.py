"""Every ready optimizer, one row each. A new optimizer joins all of test_conformance.py by adding its row."""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

import jax
import optax

import signopt

AXIS = "workers"
WIRES = ("one_bit", "two_bit", "psum")


@dataclasses.dataclass(frozen=True)
class Row:
    """One ready optimizer as a user would call it.

    Attributes:
      name: What pytest calls it.
      factory: Makes the optimizer; its first argument is the learning rate, a number or a schedule.
      kwargs: The other arguments.
      learning_rate: A good constant rate for problems of size one.
      workers: How many simulated workers the axis has, or None for an optimizer without an axis.
      static_args: Arguments that `optax.inject_hyperparams` must leave alone.
    """

    name: str
    factory: Callable[..., optax.GradientTransformationExtraArgs]
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    learning_rate: float = 0.01
    workers: int | None = None
    static_args: tuple[str, ...] = ()

    def make(self, learning_rate=None, factory=None):
        """The optimizer, ready to use anywhere: an axis it needs comes with it."""
        rate = self.learning_rate if learning_rate is None else learning_rate
        transform = (factory or self.factory)(rate, **self.kwargs)
        return transform if self.workers is None else with_axis(transform, self.workers)

    def inject(self):
        """The same, with every argument that may be traced in the state."""
        return self.make(factory=optax.inject_hyperparams(self.factory, static_args=self.static_args))


def with_axis(transform, num_workers):
    """Run `transform` on `num_workers` simulated workers that all get the same updates."""

    def update(updates, state, params=None, **extra):
        is_border = lambda s: isinstance(s, signopt.workers.state.PerWorkerState)
        axes = jax.tree.map(lambda s: 0 if is_border(s) else None, state, is_leaf=is_border)
        one_worker = lambda state: transform.update(updates, state, params, **extra)
        workers = jax.vmap(one_worker, (axes,), (None, axes), axis_name=AXIS, axis_size=num_workers)
        return workers(state)

    return optax.GradientTransformationExtraArgs(transform.init, update)


def on_every_wire(name, factory, workers, static_args=("num_workers",), **kwargs):
    """One row per wire of an optimizer whose border is a vote."""
    return tuple(
        Row(
            name=f"{name}-{wire}",
            factory=factory,
            kwargs={"axis_name": AXIS, "wire": wire} | kwargs,
            workers=workers,
            static_args=static_args,
        )
        for wire in WIRES
    )


def _no_rate(learning_rate, axis_name, num_workers, smoothness):
    """`mh_signsgd` finds its learning rate itself."""
    del learning_rate
    return signopt.mh_signsgd(axis_name=axis_name, num_workers=num_workers, smoothness=smoothness)


def _local_steps(learning_rate, axis_name, num_workers):
    """A vote on what each worker's own step comes to."""
    outer = optax.chain(signopt.majority_vote(axis_name), optax.scale_by_learning_rate(learning_rate))
    return signopt.local_steps(optax.sgd(1.0), outer, every=1, num_workers=num_workers)


def _gossip(learning_rate, axis_name):
    """Signs, then a mean with the neighbours; each worker has parameters of its own."""
    return optax.chain(signopt.signsgd(learning_rate), signopt.gossip_mean(axis_name))


_MH = {"axis_name": AXIS, "num_workers": 3, "smoothness": 2000.0}  # the curvature of Rosenbrock's valley

ROWS = (
    Row("signsgd", signopt.signsgd),
    Row("signum", signopt.signum),
    Row("lion", signopt.lion, {"weight_decay": 1e-4}),
    Row("signum-decay", signopt.signum, {"weight_decay": 1e-4}),
    Row("signprox", signopt.signprox, {"prox": signopt.prox.l1(1e-6)}, static_args=("prox",)),
    Row("signprox-group", signopt.signprox, {"prox": signopt.prox.l2(1e-6), "beta": 0.9}, static_args=("prox",)),
    *on_every_wire("signsgd", signopt.signsgd, workers=1),
    *on_every_wire("signum", signopt.signum, workers=3, num_workers=3),
    *on_every_wire("lion", signopt.lion, workers=2, num_workers=2, weight_decay=1e-4),
    Row("local_steps", _local_steps, {"axis_name": AXIS, "num_workers": 3}, workers=3, static_args=("num_workers",)),
    Row("gossip_mean", _gossip, {"axis_name": AXIS}, workers=3),
    Row("mh_signsgd", _no_rate, _MH, workers=3, static_args=("num_workers",)),
    *on_every_wire(
        "signprox",
        signopt.signprox,
        workers=3,
        static_args=("num_workers", "prox"),
        num_workers=3,
        beta=0.9,
        prox=signopt.prox.l2(1e-6),
    ),
    Row("sign_muon", signopt.sign_muon, static_args=("ns_steps",)),
    Row(
        "sign_muon-one_bit",
        signopt.sign_muon,
        {"axis_name": AXIS, "num_workers": 3, "wire": "one_bit"},
        workers=3,
        static_args=("num_workers", "ns_steps"),
    ),
)
