"""Timing: programs take turns in one process, because on a shared machine only ratios within one run mean anything."""

from collections.abc import Callable, Mapping
import statistics
import time
from typing import Any, TypeVar

import jax

K = TypeVar("K")


def take_turns(
    programs: Mapping[K, Callable[[], Any]], rounds: int, progress: Callable[[str], None] = lambda text: None
) -> dict[K, list[float]]:
    """The seconds that each program takes in every round; its first call, with compilation, is not counted.

    The order is turned round from one round to the next, so that no program always comes after the same one.

    Args:
      programs: Functions of nothing that return arrays.
      rounds: How often each is timed.
      progress: Is told what comes next, and nothing at the end.
    """
    seconds = {name: [] for name in programs}
    for name, program in programs.items():
        progress(f"compiling {name}")
        jax.block_until_ready(program())
    for turn in range(rounds):
        progress(f"round {turn + 1} of {rounds}")
        for name in list(programs)[:: 1 if turn % 2 == 0 else -1]:
            begin = time.perf_counter()
            jax.block_until_ready(programs[name]())
            seconds[name].append(time.perf_counter() - begin)
    progress("")
    return seconds


def ratios(seconds: list[float], unit: list[float]) -> list[float]:
    """By how much one program takes longer than another, round by round."""
    return [one / other for one, other in zip(seconds, unit, strict=True)]


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """The lower quartile, the median and the upper quartile."""
    low, middle, high = statistics.quantiles(values, method="inclusive") if len(values) > 1 else values * 3
    return low, middle, high
