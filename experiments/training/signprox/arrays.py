"""Low rank and constant pieces: SignProx with penalties on whole arrays.

Completion of a 40 x 40 matrix of rank 3, of which half is seen, for condition numbers of the truth of 1 and 100, with the
nuclear norm; and denoising of a piecewise constant signal with the total variation. Figure: the objective's gap to its
minimum against steps, for SignProx with its default step size, with 1 / L (L the curvature), with a step size that falls
with the learning rate (which stalls), and for the proximal gradient method; the recovered singular values; the signal.
Table: where each ends, the rank or the number of pieces found, and the error.
"""

from collections.abc import Iterator
import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.table

from experiments.common import plots
from experiments.common import progress
from experiments.common.flags import flag
from experiments.common.records import Record
import signopt
from signopt import prox as proxes

METHODS = ("signprox", "signprox, 1 / L", "signprox, falling", "proximal gradient")


@dataclasses.dataclass(frozen=True)
class Config:
    """The flags."""

    size: int = flag(40, "rows and columns of the matrix", at_least=4)
    rank: int = flag(3, "rank of the truth", at_least=1)
    condition: tuple[float, ...] = flag((1.0, 100.0), "condition numbers of the truth", at_least=1)
    seen: float = flag(0.5, "share of the entries that is seen", at_least=0)
    strength: float = flag(0.1, "strength of the nuclear norm; the largest singular value is `size`", at_least=0)
    points: int = flag(1000, "points of the signal", at_least=10)
    pieces: int = flag(8, "constant pieces of the signal", at_least=1)
    deviation: float = flag(0.3, "noise of the signal, whose levels have a deviation of 1", at_least=0)
    variation: float = flag(3.0, "strength of the total variation", at_least=0)
    learning_rate: float = flag(0.1, "first learning rate, falling by 10,000", at_least=0)
    steps: int = flag(2000, "steps", at_least=1)
    looks: int = flag(50, "looks at the objective on the way", at_least=1)
    workers: int = flag(1, "one: this is about penalties, not about votes", at_least=1)
    seeds: int = flag(3, "number of runs: seeds 0, 1, 2, ...", at_least=1)
    output: str = flag("results/low_rank", "folder for records and plots")


def run(config: Config) -> Iterator[Record]:
    """Minimize each problem with each method, in float64.

    Yields:
      A record for each problem, method, seed and look; the last look also has what was found.
    """
    with jax.enable_x64(True):
        for seed in progress.track(range(config.seeds), "seeds"):
            rng = np.random.default_rng(seed)
            for condition in config.condition:
                yield from _complete(config, rng, condition, seed)
            yield from _denoise(config, rng, seed)


def _complete(config, rng, condition, seed):
    n = config.size
    left, right = (np.linalg.qr(rng.normal(size=(n, config.rank)))[0] for _ in range(2))
    truth = left * np.geomspace(n, n / condition, config.rank) @ right.T
    seen = jnp.asarray(rng.random((n, n)) < config.seen)

    def loss(x):
        return jnp.sum(jnp.where(seen, x - truth, 0) ** 2) / 2

    def describe(x):
        values = np.linalg.svd(x, compute_uv=False)
        unseen = np.asarray(~seen)
        error = np.linalg.norm((x - truth)[unseen]) / np.linalg.norm(truth[unseen])
        return {
            "rank": int(np.sum(values > 1e-6)),
            "unseen_error": float(error),
            "singular_values": values[:10].tolist(),
        }

    start = jnp.zeros((n, n))
    found = _minimize(config, loss, proxes.nuclear_norm(config.strength), start, describe)
    yield from ({"problem": f"completion, condition {condition:g}", "seed": seed} | record for record in found)


def _denoise(config, rng, seed):
    clean = np.repeat(rng.normal(size=config.pieces), -(-config.points // config.pieces))[: config.points]
    noisy = clean + config.deviation * rng.normal(size=config.points)

    def describe(x):
        rms = lambda e: float(np.sqrt(np.mean(e**2)))  # noqa: E731
        signal = {"clean": clean, "noisy": noisy, "found": np.asarray(x)}
        return {
            "pieces": int(np.sum(np.abs(np.diff(x)) > 1e-6)) + 1,
            "error": rms(x - clean),
            "error_of_noisy": rms(noisy - clean),
        } | ({name: values.tolist() for name, values in signal.items()} if seed == 0 else {})

    loss = lambda x: jnp.sum((x - noisy) ** 2) / 2  # noqa: E731
    found = _minimize(config, loss, proxes.total_variation(config.variation), jnp.zeros(config.points), describe)
    yield from ({"problem": "denoising", "seed": seed} | record for record in found)


def _minimize(config, loss, prox, start, describe):
    """Both losses have curvature 1, so the proximal gradient method with step size 1 also gives the minimum."""
    rate = optax.exponential_decay(config.learning_rate, config.steps, 1e-4)
    exact = optax.chain(optax.sgd(1.0), signopt.prox_step(prox, 1.0))
    optimizers = {
        "signprox": signopt.signprox(rate, prox=prox),
        "signprox, 1 / L": signopt.signprox(rate, prox=prox, step_size=1.0),
        "signprox, falling": signopt.signprox(rate, prox=prox, step_size=lambda count: 0.1 * rate(count)),
        "proximal gradient": exact,
    }
    objective = jax.jit(lambda x: loss(x) + prox.value(x))
    gradient = jax.grad(loss)
    minimum = float(objective(_steps(exact, gradient, 3 * config.steps)((start, exact.init(start)))[0]))
    every = -(-config.steps // config.looks)
    for method in METHODS:
        tx = optimizers[method]
        advance, state = _steps(tx, gradient, every), (start, tx.init(start))
        for done in range(every, every * config.looks + 1, every):
            state = advance(state)
            record = {"method": method, "step": done, "gap": float(objective(state[0])) - minimum, "minimum": minimum}
            if done == every * config.looks:
                polished = proxes.polish(state[0], prox, 1.0, gradient=gradient(state[0]))
                record |= {"gap_after_polish": float(objective(polished)) - minimum} | describe(np.asarray(polished))
            yield record


def _steps(tx, gradient, number):
    """So many steps as one compiled function of parameters and optimizer state."""

    def step(state, _):
        params, opt_state = state
        updates, opt_state = tx.update(gradient(params), opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    return jax.jit(lambda state: jax.lax.scan(step, state, length=number)[0])


def ends(records: list[Record]) -> list[Record]:
    """The last look of each run."""
    last = max(record["step"] for record in records[1:])
    return [record for record in records[1:] if record["step"] == last]


def kept(records: list[Record]) -> list[Record]:
    """All looks of seed 0, and the last of the others; the signal is too long."""
    last = {id(record) for record in ends(records)}
    return [records[0], *(r for r in records[1:] if r["seed"] == 0 or id(r) in last)]


def table(records: list[Record]) -> rich.table.Table:
    """Where each method ends: the median over seeds."""
    drawn = rich.table.Table(title=f"after {ends(records)[0]['step']} steps and a polish, median over seeds")
    for column in ("problem", "method", "gap / minimum", "rank or pieces", "relative error"):
        drawn.add_column(column, justify="left" if column in ("problem", "method") else "right")
    for problem in dict.fromkeys(record["problem"] for record in records[1:]):
        for method in METHODS:
            mine = [r for r in ends(records) if r["problem"] == problem and r["method"] == method]
            median = lambda values: float(np.median(list(values)))  # noqa: E731
            error = [r.get("unseen_error") or r["error"] / r["error_of_noisy"] for r in mine]
            drawn.add_row(
                problem,
                method,
                f"{median(r['gap_after_polish'] / r['minimum'] for r in mine):.1e}",
                f"{median(r.get('rank') or r['pieces'] for r in mine):g}",
                f"{median(error):.4f}",
            )
    drawn.caption = "error: on unseen entries, relative; of the signal, relative to that of the data"
    return drawn


def summary(records: list[Record]) -> list[list[str]]:
    """Where SignProx ends, as the median over seeds."""
    rows = [["problem", "measured", "to expect"]]
    for problem in dict.fromkeys(record["problem"] for record in records[1:]):
        for method in ("signprox", "signprox, falling"):
            mine = [r for r in ends(records) if r["problem"] == problem and r["method"] == method]
            gap = float(np.median([r["gap_after_polish"] / r["minimum"] for r in mine]))
            found, name = ("rank", "unseen_error") if "rank" in mine[0] else ("pieces", "error")
            size, error = (float(np.median([r[field] for r in mine])) for field in (found, name))
            expected = "the minimum" if method == "signprox" else "stalls above it"
            rows.append(
                [f"{problem}: {method}", f"gap / minimum {gap:.0e}, {found} {size:g}, error {error:.3f}", expected]
            )
    return rows


def plot(records: list[Record], folder: str) -> list[pathlib.Path]:
    """Draw the gap against steps, the singular values and the signal, for seed 0.

    Returns:
      The figures' files.
    """
    mine = [record for record in records[1:] if record["seed"] == 0]
    problems = list(dict.fromkeys(record["problem"] for record in mine))
    figure, panels = plots.panels(2 * len(problems), title="one worker, seed 0")
    for column, problem in enumerate(problems):
        above, below = panels[2 * column : 2 * column + 2]
        for method in METHODS:
            looks = [record for record in mine if record["problem"] == problem and record["method"] == method]
            above.plot([r["step"] for r in looks], [max(r["gap"] / r["minimum"], 1e-12) for r in looks], label=method)
            if "singular_values" in looks[-1]:
                values = np.maximum(looks[-1]["singular_values"], 1e-9)
                below.plot(range(1, len(values) + 1), values, marker=".", label=method)
        above.set(title=problem, xlabel="steps", ylabel="gap over minimum", yscale="log")
        if problem == "denoising":
            found = next(r for r in ends(mine[:1] + mine) if r["problem"] == problem and r["method"] == "signprox")
            if "found" not in found:  # the signal was not kept
                below.set_axis_off()
                continue
            for name, width in (("noisy", 0.3), ("clean", 2.0), ("found", 1.0)):
                below.plot(found[name], "-", linewidth=width, label=name)
            below.set(xlabel="point", ylabel="signal")
        else:
            below.set(xlabel="number of the singular value", ylabel="singular value", yscale="log")
        below.legend(fontsize=7)
    panels[0].legend(fontsize=7)
    return plots.save(figure, folder, "arrays")
