"""Losses for `python -m signopt headroom` and `geometry`: networks on the digits, as a user's own function would name them.

python -m signopt headroom --loss experiments.common.losses:wide
"""

from collections.abc import Callable
import functools
from typing import Any

import jax

from experiments.common import data
from experiments.common import models
import signopt

BATCH_SIZE = 32


def of(model: Callable) -> tuple[Any, Callable, Any]:
    """Parameters, the loss, and mini-batches of 32 digits."""
    dataset = data.load("digits")
    net = models.network(model, dataset.train_images.shape[1:])

    def loss(params, batch):
        return models.loss(net, params, *batch)

    count = len(dataset.train_labels) // BATCH_SIZE
    kept = count * BATCH_SIZE
    batches = signopt.workers.split_batch((dataset.train_images[:kept], dataset.train_labels[:kept]), count)
    return net.init(jax.random.key(0)), loss, batches


mlp = functools.partial(of, models.MLP)  # 64-64-10
wide = functools.partial(of, models.WideMLP)  # 64-1024-1024-10
cnn = functools.partial(of, models.CNN)
