"""Optimizers: what the experiments compare, each with the learning rate that suits it."""

from collections.abc import Callable
from typing import NamedTuple

import optax

from experiments.common import runners
import signopt

AXIS = runners.AXIS


class Recipe(NamedTuple):
    """An optimizer to be made.

    Attributes:
      make: From a learning rate (or schedule), a wire and `num_workers` to the optimizer.
      learning_rate: The peak of a cosine schedule on the digits, tuned as `experiments/README.md` says.
      votes: Whether it votes over a wire that one can choose; if not, it averages gradients in float32.
    """

    make: Callable[[optax.ScalarOrSchedule, str, int | None], optax.GradientTransformation]
    learning_rate: float
    votes: bool


def _sgd(learning_rate, wire, num_workers):
    del wire, num_workers
    return optax.chain(signopt.mean(AXIS), optax.sgd(learning_rate, momentum=0.9))


def _adam(learning_rate, wire, num_workers):
    del wire, num_workers
    return optax.chain(signopt.mean(AXIS), optax.adam(learning_rate))


def _signsgd(learning_rate, wire, num_workers):
    return signopt.signsgd(learning_rate, axis_name=AXIS, num_workers=num_workers, wire=wire)


def _signum(learning_rate, wire, num_workers):
    return signopt.signum(learning_rate, axis_name=AXIS, num_workers=num_workers, wire=wire)


def _lion(learning_rate, wire, num_workers):
    return signopt.lion(learning_rate, weight_decay=0.0, axis_name=AXIS, num_workers=num_workers, wire=wire)


def _sign_muon(learning_rate, wire, num_workers):
    return signopt.sign_muon(learning_rate, axis_name=AXIS, num_workers=num_workers, wire=wire)


def _ef_signsgd(learning_rate, wire, num_workers):
    del wire
    return signopt.ef_signsgd(learning_rate, axis_name=AXIS, num_workers=num_workers)


def _ef_signum(learning_rate, wire, num_workers):
    del wire
    return signopt.ef_signum(learning_rate, axis_name=AXIS, num_workers=num_workers)


def _onebit_adam(learning_rate, wire, num_workers):
    del wire
    return signopt.onebit_adam(
        learning_rate, b2=0.98, look_every=40, settled=0.0, axis_name=AXIS, num_workers=num_workers
    )


RECIPES = {
    "sgd": Recipe(_sgd, 0.4, votes=False),
    "adam": Recipe(_adam, 6.4e-2, votes=False),
    "signsgd": Recipe(_signsgd, 8e-3, votes=True),
    "signum": Recipe(_signum, 8e-3, votes=True),
    "lion": Recipe(_lion, 1.6e-2, votes=True),
    "sign_muon": Recipe(_sign_muon, 8e-3, votes=True),
    "ef_signsgd": Recipe(_ef_signsgd, 0.8, votes=False),
    "ef_signum": Recipe(_ef_signum, 8e-3, votes=False),
    "onebit_adam": Recipe(_onebit_adam, 1.6e-2, votes=False),
}
