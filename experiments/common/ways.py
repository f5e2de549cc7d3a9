"""Ways to exchange, by name: what travels, and `every`, `fragments` and `delay` of `signopt.local_steps`."""

import optax

import signopt

ALONE = "alone"
TWO_PROGRAMS = ", two programs"  # `on_mesh(hidden=True)`
NAMES = (
    "float32/1/1/0",
    "one_bit/1/1/0",
    "one_bit/1/1/1",
    "one_bit/1/1/1" + TWO_PROGRAMS,
    "sized/16/1/0",
    "sized/16/16/1",
)
# What takes its gradient at the parameters themselves.
PLAIN = (ALONE, "float32/1/1/0", "one_bit/1/1/0")
_RATE = 1e-4  # which no time depends on


def optimizer(way: str, axis_name: str, workers: int) -> optax.GradientTransformation:
    """Signum with votes, late or rare ones too, or SGD with a mean; `ALONE`, Signum whose workers never exchange.

    Args:
      way: "alone", or wire/every/fragments/delay, with the wire "float32" or "one_bit" or, for rounds, "sized".
      axis_name: The workers.
      workers: Their number.
    """
    if way == ALONE:
        return signopt.signum(_RATE)
    if way == "one_bit/1/1/0":
        return signopt.signum(_RATE, axis_name=axis_name, num_workers=workers, wire="one_bit")
    if way == "float32/1/1/0":
        return optax.chain(signopt.mean(axis_name), optax.sgd(_RATE, momentum=0.9))
    wire, every, fragments, delay = way.split("/")
    borders = {
        "float32": lambda: signopt.mean(axis_name),
        "one_bit": lambda: signopt.majority_vote(axis_name, wire="one_bit"),
        "sized": lambda: signopt.majority_vote(axis_name, wire="one_bit", block=256),
    }
    outer = optax.scale_by_learning_rate(_RATE) if wire == "one_bit" else optax.sgd(0.7, 0.5, nesterov=True)
    return signopt.local_steps(
        signopt.signum(_RATE),
        optax.chain(borders[wire](), outer),
        every=int(every),
        fragments=int(fragments),
        delay=int(delay),
        num_workers=workers,
    )


def modelled(way: str) -> str:
    """The way as the cost model knows it."""
    return way.removesuffix(TWO_PROGRAMS)


def overlaps(way: str) -> bool:
    """Whether an exchange runs beside computation on CPUs: not within one program."""
    return way.endswith(TWO_PROGRAMS)
