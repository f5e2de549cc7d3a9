"""SignProx: one bit per parameter, and zeros, low rank or constant pieces in the result.

* `known`: convex problems whose minimum is known, against proximal SGD.
* `arrays`: penalties on whole arrays: matrix completion and denoising.
* `network`: a network that needs half of the pixels, a third of its hidden units, or one bit for each weight.

    python -m experiments signprox
    python -m experiments signprox --parts network --validation

Time and numbers to expect are in experiments/README.md.
"""

from experiments.training.signprox import arrays
from experiments.training.signprox import known
from experiments.training.signprox import network

PARTS = {"known": known, "arrays": arrays, "network": network}
