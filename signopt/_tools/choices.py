"""What `advise` chooses among: what travels, how often and when, the lines that do it, and what it cost where we measured it."""

import json
import pathlib
import string
from typing import Any, NamedTuple

import optax

BASIS = pathlib.Path(__file__).parent / "basis.json"
AXIS = "worker"
NOTHING = "do not compress"
# What `signopt.local_steps` asks of a loop.
WHERE = "# take gradients at: signopt.local_params(opt_state, params)"


class Choice(NamedTuple):
    """A way to agree.

    Attributes:
      name: For the table.
      every: Steps from one exchange of an entry to its next.
      fragments: Parts that are exchanged in turn.
      delay: Whether a decision counts one step later.
      digits: The method of the experiment `heterogeneous` that is closest; empty if there is none.
      text: The method of `language` or the run of `local_steps` that is closest; empty if there is none.
      code: The optimizer; ${workers} stands for a number.
      then: What computes and sends the same as `code` does in the long run, if that begins with something else.
    """

    name: str
    every: int
    fragments: int
    delay: int
    digits: str
    text: str
    code: str
    then: str = ""

    @property
    def is_local(self) -> bool:
        """Whether workers go on from places of their own."""
        return bool(self.every > 1 or self.delay)

    @property
    def exchanges_per_step(self) -> float:
        """On average over a round."""
        return self.fragments / self.every


_VOTED = """optimizer = signopt.$name(learning_rate, axis_name="worker", num_workers=$workers$more)"""
_MEAN = """${before}optimizer = optax.chain(
    signopt.mean("worker", $how, num_workers=$workers),
    optax.sgd(learning_rate, momentum=0.9),
)"""
_LOCAL = """border = $border
optimizer = signopt.local_steps(
    $inner,
    optax.chain(border, $outer),
    every=$every, fragments=$fragments, delay=$delay, num_workers=$workers,
)
""" + WHERE  # fmt: skip
_TERNARY = """momentum = optax.chain(optax.ema(0.9, debias=False), signopt.scale_by_sign(threshold=2.0))
optimizer = optax.chain(
    signopt.workers.per_worker(momentum, $workers),
    signopt.majority_vote("worker"),
    optax.scale_by_learning_rate(learning_rate),
)"""


def _filled(template, **known):
    return string.Template(template).safe_substitute(known)


def _rounds(border, every, fragments, delay):
    vote = 'signopt.majority_vote("worker", wire="one_bit", block=256)'
    return _filled(
        _LOCAL,
        inner="optax.contrib.muon(learning_rate)",
        border=vote if border == "sized" else 'signopt.mean("worker")',
        outer="optax.sgd(0.7, momentum=0.5, nesterov=True)",
        every=every,
        fragments=fragments,
        delay=delay,
    )


_SCALED, _BOTH_WAYS = "scaled = signopt.codecs.scaled_sign(block=256)\n", "uplink=scaled, downlink=scaled"
_ONE_BIT = ', wire="one_bit"'
CHOICES = (
    Choice(
        NOTHING, 1, 1, 0, "Adam, float32 mean", "",
        'optimizer = optax.chain(signopt.mean("worker"), optax.adamw(learning_rate))',
    ),
    Choice(
        f"{NOTHING}, Muon", 1, 1, 0, "", "muon",
        'optimizer = optax.chain(signopt.mean("worker"), optax.contrib.muon(learning_rate))',
    ),
    Choice(
        "signum, one-bit vote", 1, 1, 0, "Signum, one-bit vote", "",
        _filled(_VOTED, name="signum", more=_ONE_BIT),
    ),
    Choice(
        "sign_muon, one-bit vote", 1, 1, 0, "Signum, one-bit vote", "sign_muon",
        _filled(_VOTED, name="sign_muon", more=_ONE_BIT),
    ),
    Choice("ternary vote", 1, 1, 0, "ternary vote", "", _TERNARY),
    Choice("ef_signum", 1, 1, 0, "EF-Signum", "", _filled(_VOTED, name="ef_signum", more="")),
    Choice(
        "SGD, scaled signs", 1, 1, 0, "SGD, scaled signs both ways", "",
        _filled(_MEAN, before=_SCALED, how=_BOTH_WAYS),
    ),
    Choice(
        "SGD, top 1 %", 1, 1, 0, "SGD, top 1 % with memory", "",
        _filled(_MEAN, before="", how="uplink=signopt.codecs.top_k(0.01)"),
    ),
    Choice(
        "1-bit Adam, after its warm-up", 1, 1, 0, "1-bit Adam", "",
        _filled(_VOTED, name="onebit_adam", more=""),
        _filled(_MEAN, before=_SCALED, how=_BOTH_WAYS).replace("sgd(learning_rate, momentum=0.9)", "adamw(learning_rate)"),
    ),
    Choice(
        "sign_muon, late vote", 1, 1, 1, "Signum, one-bit vote", "sign_muon/sign/1/1/1",
        _filled(
            _LOCAL, inner="signopt.sign_muon(learning_rate)", every=1, fragments=1, delay=1,
            border='signopt.majority_vote("worker", wire="one_bit")',
            outer="optax.scale_by_learning_rate(learning_rate)",
        ),
    ),
    Choice("Muon, mean", 16, 1, 0, "", "muon/mean/16/1/0", _rounds("mean", 16, 1, 0)),
    Choice("Muon, vote x size", 4, 1, 0, "", "muon/vote/4/1/0", _rounds("sized", 4, 1, 0)),
    Choice("Muon, vote x size", 16, 1, 0, "", "muon/vote/16/1/0", _rounds("sized", 16, 1, 0)),
    Choice("Muon, vote x size", 16, 16, 1, "", "muon/vote/16/16/1", _rounds("sized", 16, 16, 1)),
)  # fmt: skip


def code(choice: Choice, workers: int) -> str:
    """Lines to paste: a program that defines `optimizer`."""
    return _program(choice.code, workers)


def _program(code, workers):
    body = string.Template(code).substitute(workers=workers)
    return f"import optax\nimport signopt\n\nlearning_rate = 1e-3  # yours\n{body}"


def settled(choice: Choice, workers: int) -> optax.GradientTransformation:
    """What those lines define, or what computes and sends the same in the long run."""
    found: dict[str, Any] = {}
    exec(_program(choice.then or choice.code, workers), found)
    return found["optimizer"]


class Cost(NamedTuple):
    """What a choice costs in what is learned.

    Attributes:
      percent: By how many percent it ended behind the best mean in float32; 0 if not behind; None if nobody has measured it.
      basis: Where, and the two ends.
    """

    percent: float | None
    basis: str


def cost(choice: Choice, *, alike: bool) -> Cost:
    """What is expected, from what was measured on the digits and on text.

    Args:
      choice: Which.
      alike: Whether the workers' data are. If not, what was measured on digits sorted by their labels counts, and a choice
        measured on text alone is one that nobody has measured.
    """
    measured = _basis()
    digits = measured["heterogeneous"]
    labels = "alike" if alike else "sorted"
    if choice.text and alike:
        best = measured["language"].get("muon")
        end = measured["local_steps"].get(choice.text, measured["language"].get(choice.text))
        if end and best:
            return Cost(_behind(end / best - 1), f"text, loss {end:.3f} against {best:.3f}")
    if choice.digits in digits:
        best = max(digits[name][labels] for name in ("Adam, float32 mean", "SGD, float32 mean") if name in digits)
        end = digits[choice.digits][labels]
        kind = "" if alike else ", sorted labels"
        return Cost(_behind(1 - end / best), f"digits{kind}, accuracy {end:.3f} against {best:.3f}")
    return Cost(None, "not measured" if alike else "not measured with data that differ")


def _behind(share: float) -> float:
    return round(100 * max(0.0, share), 1)


def _basis() -> dict[str, Any]:
    return json.loads(BASIS.read_text(encoding="utf-8"))
