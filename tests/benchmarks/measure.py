"""What every benchmark measures with."""

import json
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from ml.core.errors import EXIT_REFUSED

_SECONDS_BETWEEN_LOOKS = 0.1


class Figure(NamedTuple):
    """One line of the report. ``ratio`` is to what it is compared with; ``met`` is None without a goal."""

    what: str
    measured: str
    compared: str = ""
    ratio: float | None = None
    wanted: str = ""
    met: bool | None = None


class Run(NamedTuple):
    """A command that has ended well."""

    seconds: float
    memory: int
    """The most anonymous memory that it and its children held at once, in bytes."""
    result: dict[str, Any]
    """The JSON object it printed last."""


def breakhis(*arguments: str, environment: Mapping[str, str], may_say_no: bool = False) -> Run:
    """Run a stage by itself, start-up counted, and watch its memory; ``may_say_no``: a gate may block."""
    fine = (0, EXIT_REFUSED) if may_say_no else (0,)
    return watched(["-c", "from ml.cli import main; main()", *arguments, "--json"], environment, fine)


def watched(arguments: Sequence[str], environment: Mapping[str, str], fine: Collection[int] = (0,)) -> Run:
    """Run Python with these arguments, start-up counted, and watch its memory; it prints a JSON object last."""
    begin = time.perf_counter()
    command = [sys.executable, *arguments]
    with subprocess.Popen(command, env=dict(environment), stdout=subprocess.PIPE, cwd=Path.cwd()) as process:
        peak = 0
        family = psutil.Process(process.pid)
        while process.poll() is None:
            peak = max(peak, _anonymous(family))
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        seconds = time.perf_counter() - begin
        assert process.stdout
        said = process.stdout.read().decode()
    if process.returncode not in fine:
        raise SystemExit(f"python {' '.join(arguments)} ended with status {process.returncode}")
    return Run(seconds, peak, json.loads(said.splitlines()[-1]))


def _anonymous(process: psutil.Process) -> int:
    """Resident memory that no file or other process shares, of a process and its children."""
    total = 0
    with suppress(psutil.NoSuchProcess):
        for one in (process, *process.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                memory = one.memory_info()
                total += memory.rss - memory.shared
    return total
