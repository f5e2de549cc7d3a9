"""Methods: every optimizer that the experiment `language` can train a byte transformer with.

Those of `FIRST` are the ones to compare. `IN_FEW_BITS` send compressed means; `VARIANTS` are SignMuon with one thing
changed, to see whether it earns its place. Those whose names end in `_groups` move embeddings faster, as AdamW does here.
"""

from collections.abc import Callable
import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers

from experiments.common import text as texts
import signopt
from signopt import codecs

AXIS = texts.AXIS
BLOCK = 256  # entries that share a scale
# AdamW's rates of embeddings over those of the rest, and its norm of a clipped gradient: what its users do.
EMBEDDINGS, CLIP = 4.0, 1.0
MATRIX = MuonDimensionNumbers(-2, -1)


@dataclasses.dataclass(frozen=True)
class Method:
    """How to train.

    Attributes:
      make: From a schedule and the flags (`workers`, `wire`) to an optimizer over `AXIS`.
      learning_rate: The peak of a schedule that tuning starts from; None if it finds one itself.
      wire: What the cost model calls its exchange; None for a vote.
      settled: From the flags to what is exchanged from the step on that its state calls `settled_at`.
    """

    make: Callable[[optax.Schedule, Any], optax.GradientTransformation]
    learning_rate: float | None
    wire: str | None = None
    settled: Callable[[Any], optax.GradientTransformation] | None = None


def embeddings_faster() -> optax.GradientTransformation:
    """Steps of embeddings are `EMBEDDINGS` times as long as the rest's."""

    def names(params):
        return {name: "embeddings" if name in ("embed", "position") else "rest" for name in params}

    return optax.partition({"embeddings": optax.scale(EMBEDDINGS), "rest": optax.identity()}, names)


def _adamw(schedule, config):
    del config
    clip = optax.clip_by_global_norm(CLIP)
    return optax.chain(clip, optax.adamw(schedule, b2=0.95, weight_decay=0.0), embeddings_faster())


def _sgd(schedule, config):
    del config
    return optax.chain(optax.clip_by_global_norm(CLIP), optax.sgd(schedule, momentum=0.9))


def _muon(schedule, config):
    del config
    return optax.contrib.muon(schedule, adam_b2=0.95, muon_weight_dimension_numbers=texts.matrices)


def _behind_a_mean(make):
    return lambda schedule, config: optax.chain(signopt.mean(AXIS), make(schedule, config))


def _behind_signs(make, **kwargs):
    """With scaled signs of gradients, both ways or up only, in place of a mean."""

    def made(schedule, config):
        return optax.chain(_scaled_signs(config, **kwargs), make(schedule, config))

    return made


def _scaled_signs(config, *, both=True, block: int | None = BLOCK):
    signs = codecs.scaled_sign(block=block)
    down, memory = (signs, "both") if both else (None, "workers")
    return signopt.mean(AXIS, uplink=signs, downlink=down, memory=memory, num_workers=config.workers)


def _adamw_of_two_means(schedule, config, *, first, second):
    """AdamW whose moments are those of two means: of scaled signs, or exact. To learn which one scaled signs spoil."""
    adam, clip = optax.scale_by_adam(b2=0.95), optax.clip_by_global_norm(CLIP)
    means = {"signs": _scaled_signs(config), "exact": signopt.mean(AXIS)}

    def init_fn(params):
        return {name: tx.init(params) for name, tx in means.items()}, adam.init(params), adam.init(params)

    def update_fn(updates, state, params=None):
        borders, *adams = state
        found = {name: tx.update(updates, borders[name], params) for name, tx in means.items()}
        clipped = {name: clip.update(mean, optax.EmptyState())[0] for name, (mean, _) in found.items()}
        moments: list[Any] = [
            adam.update(clipped[name], old)[1] for name, old in zip((first, second), adams, strict=True)
        ]
        mu, nu = moments[0], moments[1]
        mu_hat = optax.tree.bias_correction(mu.mu, 0.9, mu.count)
        nu_hat = optax.tree.bias_correction(nu.nu, 0.95, nu.count)
        step = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + 1e-8), mu_hat, nu_hat)
        return step, ({name: border for name, (_, border) in found.items()}, mu, nu)

    both = optax.GradientTransformation(init_fn, update_fn)
    return optax.chain(both, optax.scale_by_learning_rate(schedule), embeddings_faster())


def _voting(config):
    return {"axis_name": AXIS, "num_workers": config.workers, "wire": config.wire}


def _ready(optimizer, **kwargs):
    """One of the library's, with its workers."""

    def made(schedule, config):
        return optimizer(schedule, axis_name=AXIS, num_workers=config.workers, **kwargs)

    return made


def _signum(schedule, config, beta=0.95):
    return signopt.signum(schedule, beta, **_voting(config))


def _groups(make):
    return lambda schedule, config: optax.chain(make(schedule, config), embeddings_faster())


def _sign_muon(schedule, config, dims=texts.matrices):
    return signopt.sign_muon(schedule, muon_weight_dimension_numbers=dims, **_voting(config))


def _momentum(config, *, every=1, b1=0.95, b2=0.95):
    """A worker's momentum, orthogonalized where it is a matrix's: what SignMuon takes signs of.

    In all but one of `every` steps nothing is orthogonalized. If b1 is not b2, the average is Lion's.
    """
    polar = _polar()

    def init_fn(params):
        return jnp.zeros([], jnp.int32), optax.tree.zeros_like(params), polar.init(params)

    def update_fn(updates, state, params=None):
        count, old, nothing = state
        kept = optax.tree.update_moment(updates, old, b2, 1)
        read = optax.tree.update_moment(updates, kept if b1 == b2 else old, b1, 1)
        found, _ = polar.update(read, nothing, params)
        found = jax.tree.map(lambda x, y: jnp.where(count % every == 0, x, y), found, read)
        return found, (count + 1, kept, nothing)

    own = optax.GradientTransformation(init_fn, update_fn)
    return signopt.workers.per_worker(own, config.workers, axis_name=AXIS)


def _polar(scale=lambda x: x):
    """The polar factor of each matrix of blocks, scaled, and other leaves as they are."""
    newton_schulz = optax.contrib.scale_by_muon(
        beta=0, nesterov=False, weight_dimension_numbers=lambda tree: jax.tree.map(lambda x: MATRIX, tree)
    )
    scaled = optax.stateless(lambda updates, params: jax.tree.map(scale, updates))
    return optax.partition({True: optax.chain(newton_schulz, scaled), False: optax.identity()}, texts.are_matrices)


def _of_size_one(x):
    """A polar factor whose entries have a root mean square of one."""
    return x * max(x.shape[-2:]) ** 0.5


def _dither(amount):
    """Uniform noise of a worker's own, in units of each leaf's root mean square."""

    def init_fn(params):
        del params
        return jax.random.key_data(jax.random.key(0))

    def update_fn(updates, state, params=None):
        del params
        key, following = jax.random.split(jax.random.wrap_key_data(state))
        noise = optax.tree.random_like(jax.random.fold_in(key, jax.lax.axis_index(AXIS)), updates, sampler=_uniform)
        noisy = jax.tree.map(lambda x, u: x + amount * jnp.sqrt(jnp.mean(x**2)) * u, updates, noise)
        return noisy, jax.random.key_data(following)

    return optax.GradientTransformation(init_fn, update_fn)


def _uniform(key, shape, dtype):
    return jax.random.uniform(key, shape, dtype, -1.0, 1.0)


def _vote(config):
    return signopt.majority_vote(AXIS, wire=config.wire)


def _two_bit_vote(config):
    del config
    return signopt.majority_vote(AXIS, wire="two_bit")


def _sign_muon_with(*, cast=None, border=_vote, after=None, **momentum):
    """SignMuon with another link left of the vote, another vote, or another link right of it."""

    def made(schedule, config):
        links = (_momentum(config, **momentum), cast, border(config), after, optax.scale_by_learning_rate(schedule))
        return optax.chain(*(link for link in links if link is not None))

    return made


def _weighted(codec):
    """A vote in which larger entries count for more, as far as a codec can say how large they are."""
    return lambda config: signopt.mean(AXIS, uplink=codec, memory=None, num_workers=config.workers)


def _shards(count):
    """SignMuon on matrices that are cut into so many columns' worth, each orthogonalized by itself."""

    def cut(tree):
        return jax.tree.map(
            lambda x, cuts: x.reshape(*x.shape[:-1], count, -1) if cuts else x, tree, texts.are_matrices(tree)
        )

    def dims(tree):
        return jax.tree.map(lambda cuts: MuonDimensionNumbers(-3, -1) if cuts else None, texts.are_matrices(tree))

    def made(schedule, config):
        whole = _sign_muon(schedule, config, dims)

        def update_fn(updates, state, params=None):
            found, state = whole.update(cut(updates), state, None if params is None else cut(params))
            return jax.tree.map(lambda x, like: x.reshape(like.shape), found, updates), state

        return optax.GradientTransformation(lambda params: whole.init(cut(params)), update_fn)

    return made


FIRST = {
    "sgd": Method(_behind_a_mean(_sgd), 0.5, "float32"),
    "adamw": Method(_behind_a_mean(_adamw), 8e-3, "float32"),
    "muon": Method(_behind_a_mean(_muon), 3.2e-2, "float32"),
    "signum": Method(_signum, 1e-3),
    "lion": Method(lambda schedule, config: signopt.lion(schedule, weight_decay=0.0, **_voting(config)), 2e-3),
    "mh_signsgd": Method(lambda schedule, config: signopt.mh_signsgd(**_voting(config)), None),
    "sign_muon": Method(_sign_muon, 4e-3),
}
IN_FEW_BITS = {
    "onebit_adam": Method(_groups(_ready(signopt.onebit_adam, b2=0.95)), 8e-3, "float32", settled=_scaled_signs),
    "ef_signum": Method(_ready(signopt.ef_signum, beta=0.95), 1e-3, "scaled_sign"),
    "ef_signsgd": Method(_ready(signopt.ef_signsgd), 0.2, "scaled_sign"),
    "sgd_signs": Method(_behind_signs(_sgd), 0.5, "scaled_sign"),
    "adamw_signs": Method(_behind_signs(_adamw), 4e-3, "scaled_sign"),
    "adamw_signs_up": Method(_behind_signs(_adamw, both=False), 4e-3, "float32"),
    "adamw_signs_first": Method(partial(_adamw_of_two_means, first="signs", second="exact"), 4e-3, "float32"),
    "adamw_signs_second": Method(partial(_adamw_of_two_means, first="exact", second="signs"), 4e-3, "float32"),
    "muon_signs": Method(_behind_signs(_muon), 1.6e-2, "scaled_sign"),
}
VARIANTS = {
    "signum_groups": Method(_groups(partial(_signum, beta=0.9)), 2e-3),
    "muon_groups": Method(_groups(_behind_a_mean(_muon)), 3.2e-2, "float32"),
    "sign_muon_groups": Method(_groups(_sign_muon), 4e-3),
    "ternary": Method(
        _sign_muon_with(cast=signopt.scale_by_sign(threshold=0.5), border=_two_bit_vote), 4e-3, "two_bit"
    ),
    "dither": Method(_sign_muon_with(cast=_dither(0.5)), 4e-3),
    "weighted_blocks": Method(
        _sign_muon_with(border=_weighted(codecs.scaled_sign(block=BLOCK)), after=signopt.scale_by_sign()), 4e-3
    ),
    "weighted_int4": Method(
        _sign_muon_with(border=_weighted(codecs.low_precision("int4")), after=signopt.scale_by_sign()), 4e-3
    ),
    "weighted_floats": Method(
        _sign_muon_with(border=lambda config: signopt.mean(AXIS), after=signopt.scale_by_sign()), 4e-3, "float32"
    ),
    "polar_after": Method(_sign_muon_with(after=_polar(_of_size_one)), 4e-3),
    "lion_polar": Method(_sign_muon_with(b1=0.9, b2=0.99), 4e-3),
    "lion_muon_2": Method(_sign_muon_with(b1=0.9, b2=0.99, every=2), 4e-3),
    "lion_muon_4": Method(_sign_muon_with(b1=0.9, b2=0.99, every=4), 2e-3),
    "shards_2": Method(_shards(2), 4e-3),
    "shards_4": Method(_shards(4), 4e-3),
}
METHODS = FIRST | IN_FEW_BITS | VARIANTS
