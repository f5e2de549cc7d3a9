"""Models: small Flax nnx networks, split into parameters and a function of them."""

from collections.abc import Callable
from typing import Any, NamedTuple

from flax import nnx
import jax
from jax import lax
import jax.numpy as jnp
import optax

NUM_CLASSES = 10


class Network(NamedTuple):
    """A model without its parameters.

    Attributes:
      init: From a random key to parameters.
      apply: From parameters and images to logits.
    """

    init: Callable[[jax.Array], Any]
    apply: Callable[[Any, jax.Array], jax.Array]


class MLP(nnx.Module):
    """One hidden layer of 64 units: 64-64-10 on the digits."""

    def __init__(self, image_shape: tuple[int, int, int], *, rngs: nnx.Rngs):
        height, width, channels = image_shape
        self.hidden = nnx.Linear(height * width * channels, 64, rngs=rngs)
        self.logits = nnx.Linear(64, NUM_CLASSES, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits of a batch of images."""
        return self.logits(nnx.relu(self.hidden(images.reshape(images.shape[0], -1))))


class WideMLP(nnx.Module):
    """Two hidden layers, of 1024 units: 64-1024-1024-10, 1,126,410 parameters, on the digits."""

    def __init__(self, image_shape: tuple[int, int, int], *, width: int = 1024, rngs: nnx.Rngs):
        height, width_of_image, channels = image_shape
        self.first = nnx.Linear(height * width_of_image * channels, width, rngs=rngs)
        self.second = nnx.Linear(width, width, rngs=rngs)
        self.logits = nnx.Linear(width, NUM_CLASSES, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits of a batch of images."""
        x = nnx.relu(self.first(images.reshape(images.shape[0], -1)))
        return self.logits(nnx.relu(self.second(x)))


class CNN(nnx.Module):
    """Two 5x5 convolutions with 2x2 max pooling, one dense layer of 512 units."""

    def __init__(self, image_shape: tuple[int, int, int], *, rngs: nnx.Rngs):
        height, width, channels = image_shape
        self.first = nnx.Conv(channels, 32, (5, 5), rngs=rngs)
        self.second = nnx.Conv(32, 64, (5, 5), rngs=rngs)
        self.hidden = nnx.Linear((height // 4) * (width // 4) * 64, 512, rngs=rngs)
        self.logits = nnx.Linear(512, NUM_CLASSES, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits of a batch of images."""
        x = images
        for convolution in (self.first, self.second):
            x = nnx.max_pool(nnx.relu(convolution(x)), (2, 2), strides=(2, 2))
        return self.logits(nnx.relu(self.hidden(x.reshape(x.shape[0], -1))))


def network(model: Callable[..., nnx.Module], image_shape: tuple[int, ...]) -> Network:
    """Split a model into parameters and a function, as `jax.grad`, `jax.vmap` and optax want it.

    Args:
      model: `MLP` or `CNN`.
      image_shape: Height, width and channels.
    """
    graph, _ = nnx.split(nnx.eval_shape(lambda: model(image_shape, rngs=nnx.Rngs(0))))

    def init(key):
        return nnx.split(model(image_shape, rngs=nnx.Rngs(key)))[1]

    def apply(params, images):
        return nnx.merge(graph, params)(images)

    return Network(init, apply)


def loss(net: Network, params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean cross-entropy of a batch, which every experiment on images minimizes."""
    return optax.softmax_cross_entropy_with_integer_labels(net.apply(params, images), labels).mean()


def accuracy(net: Network, params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
    """The fraction of images that the network labels correctly."""
    logits = lax.map(lambda image: net.apply(params, image[None])[0], images, batch_size=512)
    return jnp.mean(logits.argmax(-1) == labels)
