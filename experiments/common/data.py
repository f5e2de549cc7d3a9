"""Data: handwritten digits that need no network, MNIST and CIFAR-10 from a file or from OpenML."""

from typing import NamedTuple

import numpy as np
import sklearn.datasets

NAMES = ("digits", "mnist", "cifar10")


class Dataset(NamedTuple):
    """Images with values in [0, 1] and their labels.

    Attributes:
      train_images: float32, shape (examples, height, width, channels).
      train_labels: int32, shape (examples,).
      test_images: Likewise.
      test_labels: Likewise.
    """

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def load(name: str, file: str = "") -> Dataset:
    """Load a data set.

    The digits are scikit-learn's 1797 images of 8x8 pixels, pixels / 16, in the order of
    `np.random.default_rng(0).permutation(1797)`: the first 1437 for training, the last 360 for testing.

    Args:
      name: "digits", "mnist" or "cifar10".
      file: For the latter two an `.npz` with arrays `x_train`, `y_train`, `x_test` and `y_test`, pixels from 0 to 255.
        If empty, scikit-learn downloads the data from OpenML, or takes what it has downloaded before.

    Returns:
      The data.

    Raises:
      FileNotFoundError: If there is no such file, or none is named and OpenML cannot be reached.
    """
    if name == "digits":
        images, labels = sklearn.datasets.load_digits(return_X_y=True)
        order = np.random.default_rng(0).permutation(len(labels))
        return _dataset(images[order].reshape(-1, 8, 8, 1) / 16, labels[order], train=1437)
    if name not in NAMES:
        raise ValueError(f"`load(name=...)` has to be one of {', '.join(map(repr, NAMES))}, got {name!r}.")
    return _from_file(name, file) if file else _from_openml(name)


def hold_out(dataset: Dataset) -> Dataset:
    """Test on the last fifth of the training images, to tune without a look at the test images."""
    images, labels = dataset.train_images, dataset.train_labels
    kept = len(labels) - len(labels) // 5
    return Dataset(images[:kept], labels[:kept], images[kept:], labels[kept:])


def batches(seed: int, num_examples: int, batch_size: int, steps: int) -> np.ndarray:
    """Which examples are in each batch: one random order after the other.

    Returns:
      Indices; shape (steps, batch_size).
    """
    rng = np.random.default_rng(seed)
    epochs = -(-steps * batch_size // num_examples)
    order = np.concatenate([rng.permutation(num_examples) for _ in range(epochs)])
    return order[: steps * batch_size].reshape(steps, batch_size)


def sorted_batches(seed: int, labels: np.ndarray, num_workers: int, batch_size: int, steps: int) -> np.ndarray:
    """The same where every worker has a shard of its own, and the shards are sorted by label.

    Returns:
      Indices; shape (steps, num_workers * batch_size), worker after worker.
    """
    shards = np.array_split(np.argsort(labels, kind="stable"), num_workers)
    return np.concatenate([shard[batches(seed, len(shard), batch_size, steps)] for shard in shards], axis=1)


def _from_file(name, file):
    shape = (28, 28, 1) if name == "mnist" else (32, 32, 3)
    try:
        with np.load(file) as arrays:
            x_train, y_train, x_test, y_test = (arrays[key] for key in ("x_train", "y_train", "x_test", "y_test"))
    except KeyError as error:
        raise ValueError(f"`--data_file {file}` has to hold x_train, y_train, x_test and y_test: {error}.") from None
    images = np.concatenate([x_train, x_test]).reshape(-1, *shape) / np.float32(255)
    return _dataset(images, np.concatenate([y_train.ravel(), y_test.ravel()]), train=len(y_train))


def _from_openml(name):
    title, train = ("mnist_784", 60_000) if name == "mnist" else ("CIFAR_10", 50_000)
    try:
        pixels, labels = sklearn.datasets.fetch_openml(
            title, version=1, return_X_y=True, as_frame=False, parser="liac-arff"
        )
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"`--dataset {name}` is not on this machine, and OpenML cannot be reached ({error}). Name a file with "
            f"`--data_file {name}.npz`, written once where there is a network by "
            f"`np.savez('{name}.npz', x_train=..., y_train=..., x_test=..., y_test=...)` (pixels from 0 to 255; Keras "
            "keeps its MNIST in this form), or copy scikit-learn's data folder (`sklearn.datasets.get_data_home()`) "
            f"from a machine on which `sklearn.datasets.fetch_openml('{title}', version=1)` has run."
        ) from error
    # OpenML keeps an image's colours one after the other.
    channels, height, width = (1, 28, 28) if name == "mnist" else (3, 32, 32)
    images = pixels.reshape(-1, channels, height, width).transpose(0, 2, 3, 1) / np.float32(255)
    return _dataset(images, labels.astype(int), train=train)


def _dataset(images, labels, train):
    images, labels = images.astype(np.float32), labels.astype(np.int32)
    return Dataset(images[:train], labels[:train], images[train:], labels[train:])
