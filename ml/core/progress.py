"""Progress of long work: a bar on a terminal, else a line every few seconds, which Airflow's log shows, too."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ml.core.messages import show_controls

T = TypeVar("T")

console = Console(stderr=True)
"""Messages for people go to stderr; stdout carries results."""

_SECONDS_BETWEEN_LINES = 5.0


def say(message: str) -> None:
    """Prints one line to stderr, for the user or the log."""
    print(show_controls(message), file=sys.stderr, flush=True)


def warn(message: str) -> None:
    """Prints one line that begins with ``warning:`` to stderr, which Airflow's log shows as a warning."""
    say(f"warning: {message}")


def track(items: Iterable[T], *, total: int | None, what: str) -> Iterator[T]:
    """Yields ``items`` and shows how many of ``total`` (None: unknown) are done; ``what`` is the description shown."""
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            yield from bar.track(items, total=total, description=what)
        return
    start = last = time.monotonic()
    done = 0
    for item in items:
        yield item
        done += 1
        now = time.monotonic()
        if now - last >= _SECONDS_BETWEEN_LINES:
            say(f"{what}: {done}{'' if total is None else f' of {total}'} ({done / (now - start):.2g}/s)")
            last = now
    if done:
        say(f"{what}: {done} in {time.monotonic() - start:.1f} s")
