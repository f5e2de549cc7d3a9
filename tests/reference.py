"""What the library computes, in a few lines of NumPy each: slow, obvious, and independent of it.

Ballots are arrays of shape `(workers, *leaf)` with entries in {-1, 0, +1}. Trees are left to the tests.
"""

import math

import numpy as np


def sign(x):
    """-1, 0 or +1 in float64: subnormals vote; 0, -0, NaN and the infinities do not."""
    x = np.asarray(x).astype(np.float64)
    return np.sign(np.where(np.isfinite(x), x, 0.0))


def least_votes(num_workers, quorum):
    """The margin below which nothing is decided."""
    return max(1, math.ceil(quorum * num_workers - 1e-6 * num_workers))


def attend(ballots, present):
    """The ballots when worker m is here only where `present[m]`: absent workers cast zeros."""
    present = np.ones(len(ballots)) if present is None else np.asarray(present, np.float64)
    return ballots * present.reshape(-1, *[1] * (ballots.ndim - 1))


def vote(ballots, quorum=0.0, present=None):
    """The majority, as `wire="psum"` and `wire="two_bit"` define it; ties and short votes are 0."""
    total = attend(ballots, present).sum(0)
    return np.where(np.abs(total) >= least_votes(len(ballots), quorum), np.sign(total), 0.0)


def alternating(step, position):
    """The sign that settles a tie, and that worker 0 sends for a zero."""
    return (-1.0) ** ((step + position) % 2)


def filler(step, position, worker):
    """What `worker` sends for a zero when there is no third symbol."""
    crossed = np.bitwise_count((step // 2 + position) & worker)
    return (-1.0) ** ((step + position + crossed) % 2)


def bloc_filler(step, position, worker):
    """What every other 1-bit system sends for a zero. A negative control, not a definition."""
    return np.ones(position.shape)


def one_bit_vote(ballots, step, quorum=0.0, present=None, filler=filler):
    """The majority when zeros and ties have to be settled, as `wire="one_bit"` defines it."""
    position = np.arange(ballots[0].size).reshape(ballots[0].shape)
    fillers = np.stack([filler(step, position, m) for m in range(len(ballots))])
    cast = attend(ballots, present)
    total = np.where(cast == 0, fillers, cast).sum(0)
    decided = np.abs(total) >= least_votes(len(ballots), quorum)
    return np.where(decided, np.sign(total), alternating(step, position))


def vote_on(wire, ballots, step, quorum=0.0, present=None):
    """The definition that goes with a wire."""
    if wire == "one_bit":
        return one_bit_vote(ballots, step, quorum, present)
    return vote(ballots, quorum, present)


def signsgd(gradients):
    """Ballots `(steps, ...)` of signSGD."""
    return sign(gradients)


def signum(gradients, beta, warmup_steps=0, nesterov=False):
    """Ballots and momenta `(steps, ...)` of Signum; an entry that is not finite counts as 0."""
    momentum, ballots, momenta = np.zeros_like(gradients[0]), [], []
    for step, g in enumerate(np.where(np.isfinite(gradients), gradients, 0)):
        momentum = beta * momentum + (1 - beta) * g
        ahead = beta * momentum + (1 - beta) * g if nesterov else momentum
        ballots.append(sign(g if step < warmup_steps else ahead))
        momenta.append(momentum)
    return np.stack(ballots), np.stack(momenta)


def lion(gradients, b1, b2):
    """Ballots and momenta `(steps, ...)` of Lion; an entry that is not finite counts as 0."""
    momentum, ballots, momenta = np.zeros_like(gradients[0]), [], []
    for g in np.where(np.isfinite(gradients), gradients, 0):
        ballots.append(sign(b1 * momentum + (1 - b1) * g))
        momentum = b2 * momentum + (1 - b2) * g
        momenta.append(momentum)
    return np.stack(ballots), np.stack(momenta)


def warmup_steps(beta):
    """Theorem 3's C(beta), by trying one after another."""
    c = 1
    while not ((c / 2) * beta**c <= 1 / ((1 - beta**2) * (c + 1)) and beta ** (c + 1) <= 0.5):
        c += 1
    return c


def alias(gradient, x, steps, first_step):
    """Where ALIAS, option I, ends without noise."""
    last, step, smoothness, progress, gap = x, first_step, 0.0, 0.0, first_step * np.abs(gradient(x)).sum()
    for _ in range(steps):
        last, x = x, x - step * np.sign(gradient(x))
        smoothness += np.abs(gradient(x) - gradient(last)).sum() / np.abs(x - last).max()
        progress += step * (gradient(x) * np.sign(gradient(last))).sum()
        gap = max(gap, progress)
        step = np.sqrt(gap / smoothness)
    return x
