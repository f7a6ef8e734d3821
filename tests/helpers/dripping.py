"""A server that drips: it sends the rest of an answer a few bytes at a time, so that it is never silent for long."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from ml.data.sources import speed_limit

BYTES, PAUSE = 5, 0.01


def drip(write: Callable[[bytes], object], data: bytes, seconds: float = 10) -> None:
    """Sends ``data`` at 500 bytes a second until the client hangs up, or for so long."""
    pause = threading.Event()
    for start in range(0, min(len(data), int(seconds / PAUSE) * BYTES), BYTES):
        pause.wait(PAUSE)
        try:
            write(data[start : start + BYTES])
        except OSError:
            return


@contextmanager
def lowered_limit(seconds: float = 0.3) -> Iterator[None]:
    """Has a server that sends less than 1,000 bytes a second given up after so many seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed_limit, "SECONDS", seconds)
        yield
