"""Feeds made inputs to the product, each kind in a process of its own, and counts how they end.

An input may be accepted, or refused with one of our errors. Everything else is a fault: another exception, a time of
more than :data:`MAX_SECONDS`, a process that ends, or a message that grows with its input. The input with number n of a
kind is the same for the same seed, so a fault is seen again by its number.
"""

import multiprocessing
import random
import resource
import signal
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from ml.core.errors import BreakhisError

MAX_SECONDS = 5
MAX_MESSAGE = 2_000
"""Characters of an error's message. A message names several things at most, each cut."""

_SHOWN_FAULTS = 10


class _Hang(BaseException):
    """Raised in an input that takes too long; no ``except Exception`` of the product catches it."""


@dataclass(frozen=True)
class Kind:
    """One kind of input."""

    name: str
    prepare: Callable[[Path], Any]
    """Makes what all inputs of the kind start from, in an empty folder."""
    use: Callable[[Any, random.Random], None]
    """Makes one input with the random generator, and gives it to the product."""


@dataclass
class Tally:
    """How the inputs of one kind ended."""

    kind: str
    accepted: int = 0
    refused: int = 0
    peak_mb: int = 0
    faults: dict[str, list[int]] = field(default_factory=dict)
    """What happened -> numbers of the inputs."""

    @property
    def inputs(self) -> int:
        """Returns how many inputs were tried."""
        return self.accepted + self.refused + sum(map(len, self.faults.values()))


def run_kind(kind: Kind, inputs: int, seed: int) -> Tally:
    """Tries inputs 0 to ``inputs`` - 1 of a kind. Where a process ends, another goes on after its input."""
    tally, start = Tally(kind.name), 0
    context = multiprocessing.get_context("fork")
    while start < inputs:
        reader, writer = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(kind, start, inputs, seed, writer))
        process.start()
        writer.close()
        last = start - 1
        try:
            while True:
                # A hang in C code is not interrupted by the alarm, so the process is ended from here.
                if not reader.poll(MAX_SECONDS * 6):
                    process.kill()
                    break
                last, outcome, peak_mb = reader.recv()
                tally.peak_mb = max(tally.peak_mb, peak_mb)
                if outcome == "accepted":
                    tally.accepted += 1
                elif outcome == "refused":
                    tally.refused += 1
                else:
                    tally.faults.setdefault(outcome, []).append(last)
        except EOFError:
            pass
        process.join()
        if last < inputs - 1:
            tally.faults.setdefault(f"the process ended with {process.exitcode}", []).append(last + 1)
        start = last + 2
    return tally


def show_faults(tally: Tally) -> None:
    """Prints the faults of a kind, the most frequent first."""
    for outcome, numbers in sorted(tally.faults.items(), key=lambda item: -len(item[1]))[:_SHOWN_FAULTS]:
        print(f"\n{tally.kind}: {len(numbers)} x, such as input {numbers[0]}:\n{outcome}")


def make_generator(kind: str, number: int, seed: int) -> random.Random:
    """Returns the random generator of one input."""
    return random.Random(f"{seed}/{kind}/{number}")


def _work(kind: Kind, start: int, inputs: int, seed: int, writer: Connection) -> None:
    signal.signal(signal.SIGALRM, _raise_hang)
    with tempfile.TemporaryDirectory(prefix="breakhis-fuzz-") as folder:
        prepared = kind.prepare(Path(folder))
        for number in range(start, inputs):
            outcome = _try_input(kind, prepared, make_generator(kind.name, number, seed))
            writer.send((number, outcome, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024))


def _try_input(kind: Kind, prepared: Any, rng: random.Random) -> str:
    signal.setitimer(signal.ITIMER_REAL, MAX_SECONDS)
    try:
        kind.use(prepared, rng)
    except BreakhisError as error:
        length = len(str(error))
        return "refused" if length <= MAX_MESSAGE else f"a long message from {_find_place(error)}"
    except _Hang as hang:
        return f"more than {MAX_SECONDS} s in {_find_place(hang)}"
    except Exception as error:
        return f"{type(error).__name__} in {_find_place(error)}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return "accepted"


def _find_place(error: BaseException) -> str:
    """Returns the innermost lines of the product that an exception passed through."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/site-packages/" not in frame.filename]
    return " < ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in reversed(frames[-4:]))


def _raise_hang(*_: object) -> None:
    raise _Hang
