"""A vote that finds its own learning rate: MH-signSGD on the papers' parabola and on two networks.

* `toy`: figure 1 of Yang et al. (2020). A parabola with all its noise on one coordinate.
* `estimators`: what `signopt.mh_signsgd` may choose, on a small network.
* `network`: figure 2 of the paper. A convolutional network against the best of a sweep of learning rates. It takes long,
  so it has to be asked for.

    python -m experiments adaptive
    python -m experiments adaptive --parts toy --seeds 40 --betas 0.9,0.98
    python -m experiments adaptive --parts network --dataset mnist --data_file mnist.npz

Time and numbers to expect are in experiments/README.md.
"""

from experiments.papers.adaptive import estimators
from experiments.papers.adaptive import network
from experiments.papers.adaptive import toy

PARTS = {"toy": toy, "estimators": estimators, "network": network}
DEFAULT = ("toy", "estimators")
