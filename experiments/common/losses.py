"""Losses for `python -m signopt` and its tools, as a user's own functions: networks on the digits, and one on text.

python -m signopt headroom --loss experiments.common.losses:wide
"""

from collections.abc import Callable
import functools
from typing import Any

import jax
import numpy as np

from experiments.common import data
from experiments.common import models
from experiments.common import text as texts
import signopt

BATCH_SIZE = 32


def of(model: Callable, batch_size: int = BATCH_SIZE) -> tuple[Any, Callable, Any]:
    """Parameters, the loss, and mini-batches of digits."""
    dataset = data.load("digits")
    net = models.network(model, dataset.train_images.shape[1:])

    def loss(params, batch):
        return models.loss(net, params, *batch)

    count = len(dataset.train_labels) // batch_size
    kept = count * batch_size
    batches = signopt.workers.split_batch((dataset.train_images[:kept], dataset.train_labels[:kept]), count)
    return net.init(jax.random.key(0)), loss, batches


mlp = functools.partial(of, models.MLP)  # 64-64-10
wide = functools.partial(of, models.WideMLP)  # 64-1024-1024-10
cnn = functools.partial(of, models.CNN)
digits = functools.partial(of, functools.partial(models.WideMLP, width=384), 128)  # 64-384-384-10


def text() -> tuple[Any, Callable, Any]:
    """Parameters of a byte transformer of width 96, its loss, and mini-batches of 8 windows of 32 bytes."""
    shape = texts.Shape(width=96)
    train = texts.load().train
    places = np.random.default_rng(0).integers(len(train) - shape.context - 1, size=(128, shape.batch_size, 1))
    return texts.init(jax.random.key(0), shape), texts.loss, train[places + np.arange(shape.context + 1)]


OF = {"digits": digits, "text": text}
