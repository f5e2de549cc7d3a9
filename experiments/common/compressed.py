"""Every way to agree that the library has, by name, and what it sends: by its formula, and in a compiled program."""

import math
import re
from typing import Any, NamedTuple

import jax
import optax

import signopt
from signopt import codecs

BASELINE = "float32 mean"
# Codecs that both directions travel in, and whether what they lose is remembered.
CODECS: dict[str, tuple[codecs.Codec, bool]] = {
    "identity": (codecs.identity(), False),
    "bfloat16": (codecs.low_precision("bfloat16"), True),
    "float16": (codecs.low_precision("float16"), True),
    "float8_e4m3fn": (codecs.low_precision("float8_e4m3fn"), True),
    "float8_e5m2": (codecs.low_precision("float8_e5m2"), True),
    "int8": (codecs.low_precision("int8"), True),
    "int4": (codecs.low_precision("int4"), True),
    "qsgd, 7 levels": (codecs.qsgd(7), False),
    "qsgd, 1 level": (codecs.qsgd(1), False),
    "terngrad": (codecs.terngrad(), False),
    "ternary": (codecs.ternary(), True),
    "scaled_sign, a block of 256": (codecs.scaled_sign(block=256), True),
    "scaled_sign": (codecs.scaled_sign(), True),
    "stochastic_sign": (codecs.stochastic_sign(), False),
    "sign": (codecs.sign(), False),
    "top_k, 1 %": (codecs.top_k(0.01), True),
    "top_k, 1 % of blocks of 4096": (codecs.top_k(0.01, block=4096), True),
    "random_k, 1 %": (codecs.random_k(0.01), True),
}
VOTES = {"vote, two_bit": 2, "vote, one_bit": 1}  # bits of a ballot
NAMES = (BASELINE, *VOTES, *CODECS)


class Way(NamedTuple):
    """A way to agree.

    Attributes:
      border: The transformation.
      bits: What each worker sends about so many parameters, from the formula of what travels.
    """

    border: optax.GradientTransformationExtraArgs
    bits: Any


def way(name: str, axis_name: str, workers: int) -> Way:
    """One of `NAMES` over an axis of so many workers.

    Examples:
      >>> way("scaled_sign", "worker", 4).bits(4000) == 2 * 3 * (1000 + 32)  # up and down, to 3 others, a row of 1000 signs
      True
    """
    others = workers - 1
    if name == BASELINE:  # a ring adds up rows of all parameters, then hands them on
        return Way(signopt.mean(axis_name), lambda parameters: 2 * others / workers * 32 * parameters)
    if name in VOTES:
        wire: Any = name.partition(", ")[2]
        ballot = VOTES[name]
        return Way(
            signopt.majority_vote(axis_name, wire=wire),
            lambda parameters: 2 * others * ballot * 8 * math.ceil(math.ceil(parameters / 8) / workers),
        )
    codec, remembers = CODECS[name]
    border = signopt.mean(
        axis_name,
        uplink=codec,
        downlink=codec,
        memory="both" if remembers else None,
        num_workers=workers,
        key=jax.random.key(0) if codec.random else None,
    )
    return Way(border, lambda parameters: 2 * others * codec.bits((-(-parameters // workers),)))


_COLLECTIVE = re.compile(r"= (.*?) (all-to-all|all-gather|all-reduce|reduce-scatter|collective-permute)(?:-start)?\(")
_ARRAY = re.compile(r"\b[a-z]+(\d+)\w*\[([\d,]*)\]")


def bits_in(program: str, workers: int) -> float:
    """What each worker sends in the collectives of a compiled program, in bits.

    Args:
      program: Its text. All collectives are over all workers.
      workers: Their number.

    Examples:
      >>> line = "%a = u8[4,100]{1,0} all-to-all(%x), channel_id=1"
      >>> bits_in(line, 4)
      2400.0
    """
    total = 0.0
    for shapes, operation in _COLLECTIVE.findall(program):
        if operation not in ("all-to-all", "all-gather", "all-reduce"):
            raise ValueError(f"`bits_in(program=...)` has to have the library's collectives only, got {operation}.")
        size = sum(
            int(width) * math.prod(int(n) for n in shape.split(",") if n) for width, shape in _ARRAY.findall(shapes)
        )
        total += size * (workers - 1) / workers * (2 if operation == "all-reduce" else 1)
    return total
