"""Workers that do harm: liars, gradients that are not finite, and ballots that come late.

* `liars`: some of nine workers send something else. Votes, means and robust means, and the bound of theorem 2 of
  `fault tolerance <https://arxiv.org/abs/1810.05291>`_.
* `faults`: a worker has NaN and inf in its gradients now and then.
* `late`: every ballot is some steps old; and noise that everybody shares.

    python -m experiments adversaries
    python -m experiments adversaries --parts faults,late --seeds 10

Time and numbers to expect are in experiments/README.md.
"""

from experiments.papers.adversaries import faults
from experiments.papers.adversaries import late
from experiments.papers.adversaries import liars

PARTS = {"liars": liars, "faults": faults, "late": late}
