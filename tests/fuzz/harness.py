"""Feeds made inputs to the product, each kind in a process of its own, and counts how they end.

An input may be accepted, or refused with one of our errors whose message names what is at fault. Everything else is a
fault: another exception, a message that names nothing or grows with its input, a time of more than :data:`MAX_SECONDS`,
memory of more than :data:`MAX_MB`, or a process that ends. The input with number n of a kind is the same for the same
seed, so a fault is seen again by its number.
"""

import multiprocessing
import random
import re
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
MAX_MB = 1_500
"""Memory of a kind's process at its peak, in MB. The libraries that a kind imports take up to a third of it."""

MAX_MESSAGE = 2_000
"""Characters of an error's message. A message names several things at most, each cut."""

_SHOWN_FAULTS = 10
_SECONDS_TO_PREPARE = 180
_PREPARED, _ACCEPTED, _REFUSED = "prepared", "accepted", "refused"


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
    names: str = ""
    """Pattern of what a refusal names: the file, address, setting or key. Empty where the caller adds it."""
    refusals: tuple[type[Exception], ...] = ()
    """Errors of Airflow and of the command line that refuse an input as ours do."""


@dataclass
class Tally:
    """How the inputs of one kind ended."""

    kind: str
    accepted: int = 0
    refused: int = 0
    peak_mb: int = 0
    faults: dict[str, list[int]] = field(default_factory=dict)
    """What happened -> numbers of the inputs."""

    def add(self, number: int, outcome: str) -> None:
        """Counts how an input ended."""
        if outcome == _ACCEPTED:
            self.accepted += 1
        elif outcome == _REFUSED:
            self.refused += 1
        else:
            self.faults.setdefault(outcome, []).append(number)

    @property
    def inputs(self) -> int:
        """Returns how many inputs were tried."""
        return self.accepted + self.refused + sum(map(len, self.faults.values()))


def run_kind(kind: Kind, inputs: int, seed: int) -> Tally:
    """Tries inputs 0 to ``inputs`` - 1 of a kind. Where a process ends, another goes on after its input.

    Raises:
        RuntimeError: what the inputs start from could not be made.
    """
    tally, start = Tally(kind.name), 0
    context = multiprocessing.get_context("fork")
    while start < inputs:
        reader, writer = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(kind, start, inputs, seed, writer))
        process.start()
        writer.close()
        start, is_hung = _receive(reader, tally, start)
        if is_hung:
            process.kill()
        process.join()
        if start < inputs and process.exitcode:
            tally.add(start, f"the process ended with {process.exitcode}")
            start += 1
    return tally


def _receive(reader: Connection, tally: Tally, start: int) -> tuple[int, bool]:
    """Counts what a process sends until it ends; returns the number of the next input, and whether the process hangs.

    A hang in C code is not interrupted by the alarm in the process, so it is noticed here.
    """
    number = start
    try:
        if not reader.poll(_SECONDS_TO_PREPARE) or reader.recv() != _PREPARED:
            raise EOFError
    except EOFError:
        raise RuntimeError(f"{tally.kind}: what its inputs start from was not made") from None
    try:
        while reader.poll(MAX_SECONDS * 3):
            number, outcome, peak_mb = reader.recv()
            tally.peak_mb = max(tally.peak_mb, peak_mb)
            tally.add(number, outcome)
            number += 1
        return number, True
    except EOFError:
        return number, False


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
        writer.send(_PREPARED)
        for number in range(start, inputs):
            outcome = _try_input(kind, prepared, make_generator(kind.name, number, seed))
            peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
            if peak_mb > MAX_MB:
                outcome = f"more than {MAX_MB:,} MB of memory"
            writer.send((number, outcome, peak_mb))
            if peak_mb > MAX_MB:
                return  # the peak of a process does not fall again, so another one goes on


def _try_input(kind: Kind, prepared: Any, rng: random.Random) -> str:
    signal.setitimer(signal.ITIMER_REAL, MAX_SECONDS)
    try:
        kind.use(prepared, rng)
    except (BreakhisError, *kind.refusals) as error:
        fault = _find_message_fault(str(error), kind.names) if isinstance(error, BreakhisError) else ""
        return f"{fault} from {_find_place(error)}" if fault else _REFUSED
    except _Hang as hang:
        return f"more than {MAX_SECONDS} s in {_find_place(hang)}"
    except Exception as error:
        return f"{type(error).__name__} in {_find_place(error)}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return _ACCEPTED


def _find_message_fault(message: str, names: str) -> str:
    """Returns what is wrong with an error's message; empty if nothing is."""
    if len(message) > MAX_MESSAGE:
        return "a long message"
    if names and not re.search(names, message):
        return f"a message that names nothing ({message[:100]!r})"
    return ""


def _find_place(error: BaseException) -> str:
    """Returns the innermost lines of the product that an exception passed through."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/site-packages/" not in frame.filename]
    return " < ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in reversed(frames[-4:]))


def _raise_hang(*_: object) -> None:
    raise _Hang
