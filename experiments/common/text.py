"""Text: a byte transformer, and the Python standard library's own source files, which need no network."""

from collections.abc import Callable
import functools
import pathlib
import sysconfig
from typing import Any, NamedTuple
import zlib

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers

from experiments.common import runners
import signopt

AXIS = runners.AXIS
BYTES = 256
HEAD = 16  # of the width
WARM_UP = 40  # steps
# Every so many-th file of the standard library is for validation, and as many are for tuning.
ONE_IN = 20
LEFT_OUT = ("site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__")


class Text(NamedTuple):
    """Bytes, uint8, shape (length,).

    Attributes:
      train: To learn from.
      tune: Held out from it, to choose learning rates by.
      validate: To report.
    """

    train: np.ndarray
    tune: np.ndarray
    validate: np.ndarray

    def crc(self) -> str:
        """What tells one text from another: of two Python versions, say."""
        return f"{zlib.crc32(b''.join(part.tobytes() for part in self)):08x}"


@functools.cache
def load(file: str = "") -> Text:
    """Read a text.

    Args:
      file: The user's own: its last twentieth is for validation, the twentieth before it for tuning. If empty, the source
        files of the Python standard library that runs this, without its tests, in the order of their names: of each
        twenty the first is for validation, the eleventh for tuning.

    Returns:
      The text.

    Raises:
      FileNotFoundError: If there is no such file.
    """
    if file:
        whole = np.frombuffer(pathlib.Path(file).read_bytes(), np.uint8)
        cuts = len(whole) * (ONE_IN - 2) // ONE_IN, len(whole) * (ONE_IN - 1) // ONE_IN
        return Text(*np.split(whole, cuts))
    folder = pathlib.Path(sysconfig.get_path("stdlib"))
    files = sorted(path for path in folder.rglob("*.py") if not set(path.relative_to(folder).parts) & set(LEFT_OUT))
    train, tune, validate = [], [], []
    for i, path in enumerate(files):
        {0: validate, ONE_IN // 2: tune}.get(i % ONE_IN, train).append(path.read_bytes())
    return Text(*(np.frombuffer(b"".join(part), np.uint8) for part in (train, tune, validate)))


class Shape(NamedTuple):
    """A byte transformer and what it is trained on.

    Attributes:
      layers: Blocks of attention and a network of four times the width, each behind a norm.
      width: Of the stream; a head has 16 of it.
      context: Bytes that it sees.
      workers: Their number.
      batch_size: Sequences per worker and step.
      steps: Training steps.
      file: The text, as in `load`.
      alike: Whether workers draw from the whole text; if not, each from a piece of its own.
      evaluations: How many times the loss on held-out text is taken, at equal distances; the last is at the end.
      windows: Sequences of held-out text.
    """

    layers: int = 2
    width: int = 64
    context: int = 32
    workers: int = 4
    batch_size: int = 8
    steps: int = 512
    file: str = ""
    alike: bool = True
    evaluations: int = 8
    windows: int = 1024


def init(key: jax.Array, shape: Shape) -> Any:
    """The parameters; those of all blocks in one array for each kind, which takes less time to compile."""
    width, layers = shape.width, shape.layers
    keys = iter(jax.random.split(key, 6))

    def normal(*dims, scale=1.0):
        return scale * jax.random.normal(next(keys), dims)

    last = np.array([1.0, 1.0, 1.0, (2 * layers) ** -0.5])  # what is added to the stream starts smaller
    return {
        "embed": normal(BYTES, width, scale=0.02),
        "position": normal(shape.context, width, scale=0.02),
        "blocks": {
            "attention": normal(layers, 4, width, width, scale=width**-0.5 * last[:, None, None]),
            "up": normal(layers, width, 4 * width, scale=width**-0.5),
            "down": normal(layers, 4 * width, width, scale=(8 * width * layers) ** -0.5),
            "norm": jnp.ones((layers, 2, width)),
        },
        "norm": jnp.ones(width),
        "head": normal(width, BYTES, scale=width**-0.5),
    }


def matrices(params: Any) -> Any:
    """The `muon_weight_dimension_numbers` of these parameters: matrices of blocks, neither embeddings nor the head."""
    matrix = MuonDimensionNumbers(-2, -1)
    blocks = {"attention": matrix, "up": matrix, "down": matrix, "norm": None}
    return {name: blocks if name == "blocks" else None for name in params}


def are_matrices(params: Any) -> Any:
    """Whether each leaf is a stack of such matrices: the same tree of Booleans."""

    def named(path, x):
        del x
        return path[0].key == "blocks" and path[-1].key != "norm"

    return jax.tree_util.tree_map_with_path(named, params)


def loss(params: Any, windows: jax.Array) -> jax.Array:
    """The mean cross-entropy, in nats for each byte, of windows (..., context + 1) of bytes."""
    scores = logits(params, windows[..., :-1])
    return optax.softmax_cross_entropy_with_integer_labels(scores, windows[..., 1:].astype(jnp.int32)).mean()


def logits(params: Any, read: jax.Array) -> jax.Array:
    """Scores (..., context, 256) of what follows each of the bytes (..., context)."""
    read = read.astype(jnp.int32)
    x = params["embed"][read] + params["position"][: read.shape[-1]]

    def block(x, own):
        x = x + _attention(own["attention"], _normalized(x, own["norm"][0]))
        return x + jax.nn.gelu(_normalized(x, own["norm"][1]) @ own["up"]) @ own["down"], None

    x, _ = lax.scan(block, x, params["blocks"])
    return _normalized(x, params["norm"]) @ params["head"]


def _normalized(x, scale):
    return scale * x * lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)


def _attention(weights, x):
    heads = max(1, x.shape[-1] // HEAD)
    query, key, value = ((x @ w).reshape(*x.shape[:-1], heads, -1).swapaxes(-2, -3) for w in weights[:3])
    score = query @ key.swapaxes(-1, -2) * query.shape[-1] ** -0.5
    past = jnp.tril(jnp.ones(score.shape[-2:], bool))
    seen = jax.nn.softmax(jnp.where(past, score, -jnp.inf)) @ value
    return seen.swapaxes(-2, -3).reshape(x.shape) @ weights[3]


class Curve(NamedTuple):
    """What came of a training.

    Attributes:
      train: Loss of each step, the mean over workers, shape (steps,).
      held_out: Loss on held-out text at each evaluation, shape (evaluations,).
      opt_state: The optimizer's at the end.
    """

    train: np.ndarray
    held_out: np.ndarray
    opt_state: Any = None


def cosine(peak: Any, steps: int, warm_up: int = WARM_UP) -> optax.Schedule:
    """From 0 to the peak in `warm_up` steps, and by a cosine to zero in the rest."""
    shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, min(warm_up, steps // 2), steps)
    return lambda count: peak * shape(count)


def trainer(
    make: Callable[[optax.Schedule], optax.GradientTransformation],
    shape: Shape,
    *,
    split: str = "validate",
    gradient_at: Callable[[Any, Any], Any] = lambda opt_state, params: params,
) -> Callable[[float, int], Curve]:
    """Compile a training once, for every learning rate and seed.

    Args:
      make: From a schedule to an optimizer over `AXIS` for `shape.workers` workers.
      shape: What is trained on what.
      split: The held-out text: "tune" or "validate".
      gradient_at: From an optimizer's state and parameters to where a worker takes its gradient.

    Returns:
      A function from the peak of a cosine schedule and a seed, of parameters and batches, to a curve.
    """
    text = load(shape.file)
    held_out = _windows_at(getattr(text, split), np.linspace(0, 1, shape.windows), shape.context)
    length = len(text.train) - shape.context - 1

    def step_of(optimizer):
        def step(state, windows):
            params, opt_state = state
            value_and_grad = signopt.workers.value_and_grad(loss, axis_name=AXIS)
            value, gradient = value_and_grad(gradient_at(opt_state, params), windows)
            updates, opt_state = optimizer.update(gradient, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), value

        return signopt.workers.simulate(step, shape.workers, axis_name=AXIS)

    @jax.jit
    def train(peak, seed, bytes_, held_out):
        optimizer = optax.with_extra_args_support(make(cosine(peak, shape.steps)))
        together = step_of(optimizer)
        key, start = jax.random.split(jax.random.key(seed))
        params = init(start, shape)

        def draw(k):
            places = jax.random.uniform(jax.random.fold_in(key, k), (shape.workers, shape.batch_size))
            if not shape.alike:
                places = (jnp.arange(shape.workers)[:, None] + places) / shape.workers
            at = (places * length).astype(jnp.int32).reshape(-1, 1)
            return bytes_[at + jnp.arange(shape.context + 1)]

        def evaluate(state, steps):
            state, values = lax.scan(lambda state, k: together(state, draw(k)), state, steps)
            return state, (values.mean(1), lax.map(lambda w: loss(state[0], w), held_out).mean())

        steps = jnp.arange(shape.steps).reshape(shape.evaluations, -1)
        (_, opt_state), (values, held) = lax.scan(evaluate, (params, optimizer.init(params)), steps)
        return values.reshape(-1), held, opt_state

    bytes_, held_out = jnp.asarray(text.train), jnp.asarray(held_out.reshape(8, -1, shape.context + 1))

    def run(peak, seed):
        return Curve(*jax.device_get(train(np.float32(peak), seed, bytes_, held_out)))

    return run


def train(optimizer: optax.GradientTransformation, shape: Shape, *, seed: int = 0, **kwargs: Any) -> Curve:
    """Train once with an optimizer that has its learning rate; other arguments as in `trainer`."""
    return trainer(lambda schedule: optimizer, shape, **kwargs)(0.0, seed)


def _windows_at(bytes_, places, context):
    """Windows (len(places), context + 1) that begin at so many shares of a text."""
    starts = (places * (len(bytes_) - context - 1)).astype(np.int64)
    return bytes_[starts[:, None] + np.arange(context + 1)]
