"""Progress bars on stderr, for whatever takes longer than five seconds; only the first process draws."""

from collections.abc import Callable, Iterable, Iterator
import contextlib
from typing import TypeVar

import rich.console
import rich.progress

from experiments.common import processes

T = TypeVar("T")


def track(items: Iterable[T], about: str) -> Iterator[T]:
    """Go through items behind a bar that shows how many are done.

    Args:
      items: As many as are known beforehand.
      about: What is being done.
    """
    with _bar() as bar:
        yield from bar.track(list(items), description=about)


@contextlib.contextmanager
def telling(about: str) -> Iterator[Callable[[str], None]]:
    """Show a function's own words behind a spinner.

    Args:
      about: What is being done.

    Yields:
      A function that takes what is being done now.
    """
    columns = (rich.progress.SpinnerColumn(), "{task.description}", rich.progress.TimeElapsedColumn())
    with _bar(*columns) as bar:
        task = bar.add_task(about)
        yield lambda text: bar.update(task, description=f"{about}: {text}" if text else about)


def _bar(*columns):
    return rich.progress.Progress(
        *columns or (*rich.progress.Progress.get_default_columns(), rich.progress.TimeElapsedColumn()),
        console=rich.console.Console(stderr=True),
        transient=True,
        disable=not processes.is_first(),
    )
