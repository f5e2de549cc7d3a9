"""Seconds on one machine: a vote and its stages, what looking costs, a step where nothing is sent, a proximal step.

* `vote`: a vote between devices of one process, against a float32 mean, and each stage of it.
* `looking`: margins, moments of gradients, comparing replicas.
* `steps`: local steps against optax's, compiling a voted step, `import signopt`. It takes long, so it has to be asked for.
* `prox`: proximal steps against `optax.signum`, and total variation by length.

Programs take turns in one process, and what counts is the median of the ratios of rounds: on a shared machine single times
jump by half. No figure of a paper.

    python -m experiments wire
    python -m experiments wire --parts steps

Time and numbers to expect are in experiments/README.md.
"""

from experiments.speed.wire import looking
from experiments.speed.wire import prox
from experiments.speed.wire import steps
from experiments.speed.wire import vote

PARTS = {"vote": vote, "looking": looking, "steps": steps, "prox": prox}
DEFAULT = ("vote", "looking", "prox")
