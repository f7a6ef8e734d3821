"""Runs stages as processes beside the Airflow worker: the place ``process``, which needs no Docker."""

import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from codecs import getincrementaldecoder
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from airflow.sdk.exceptions import AirflowFailException

from breakhis_airflow.operators import Job, JobEnd, StageOperator
from ml.core.settings import read_settings


class ProcessStageOperator(StageOperator):
    """Runs a stage as a process beside the Airflow worker, on whose machine the command ``breakhis`` has to be.

    The process leads a group of its own, which ends with the task: when the task is stopped from the UI, when it runs
    into ``execution_timeout``, and when the worker dies.
    """

    _process: subprocess.Popen[bytes] | None = None

    def run_stage(self, job: Job, output: Callable[[str], None]) -> JobEnd:
        """Runs a job as a process; see the base class."""
        status = self.run_command(job.command(read_settings().store), job.environment, output)
        return JobEnd(status, job.key, _explain_signal(status))

    def run_command(self, command: list[str], environment: dict[str, str], output: Callable[[str], None]) -> int:
        """Runs ``command`` to its end in exactly this environment; ``output`` is called with each line that it prints.

        Returns:
            The exit status; for a command that was killed, the signal's number with a minus sign.
        """
        with subprocess.Popen(
            [_find_executable(command[0]), *command[1:]],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # Between fork and exec, threads make most calls unsafe. This is one system call, looked up beforehand.
            preexec_fn=_end_with_parent,  # noqa: PLW1509
        ) as process:
            self._process = process
            try:
                for line in _read_lines(process):
                    output(line)
                return process.wait()
            finally:
                _end_group(process)
                self._process = None

    def on_kill(self) -> None:
        """Ends the process and everything it started. Airflow calls this when the task is stopped."""
        if self._process:
            self.log.warning("Stopping breakhis %s", self.stage)
            _end_group(self._process)


def _explain_signal(status: int) -> str:
    if status >= 0:
        return ""
    hint = ", most often for want of memory" if -status == signal.SIGKILL else ""
    return f"was killed by {signal.Signals(-status).name}{hint}"


# --- processes ------------------------------------------------------------------------------------------------------

_SECONDS_TO_END = 3.0
"""Between SIGTERM and SIGKILL. Airflow itself kills the task five seconds after it asked it to end."""

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


def _end_with_parent() -> None:
    """Has the kernel end this process when the worker's ends, so that a retry does not run beside an orphan."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _find_executable(name: str) -> str:
    """Returns the path of a command on PATH or beside the Python that runs Airflow.

    Raises:
        AirflowFailException: there is no such command.
    """
    path = os.pathsep.join([os.environ.get("PATH", ""), str(Path(sys.executable).parent)])
    executable = shutil.which(name, path=path)
    if not executable:
        raise AirflowFailException(f"the command {name!r} is not on this worker's PATH ({path})")
    return executable


def _read_lines(process: subprocess.Popen[bytes]) -> Iterator[str]:
    """Yields the output line by line, until the process has ended and all it had written is read.

    It does not wait for the pipe to close: children of a process that was killed can live on and hold the pipe open.
    """
    assert process.stdout
    pipe = process.stdout.fileno()
    decode = getincrementaldecoder("utf-8")("replace").decode
    rest = ""
    while True:
        ended = process.poll() is not None
        if ended:
            _signal_group(process, signal.SIGKILL)
        readable, _, _ = select.select([pipe], [], [], 0.0 if ended else 1.0)
        if not readable and not ended:
            continue
        chunk = os.read(pipe, 1 << 16) if readable else b""
        *lines, rest = (rest + decode(chunk, final=not chunk)).split("\n")
        for line in lines:
            yield line.rstrip("\r")
        if not chunk:
            break
    if rest:
        yield rest


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Ends the process and its children: by SIGTERM, and after three seconds by SIGKILL."""
    deadline = time.monotonic() + _SECONDS_TO_END
    alive = _signal_group(process, signal.SIGTERM)
    while alive and time.monotonic() < deadline:
        time.sleep(0.05)
        process.poll()  # a leader that has ended keeps its group in being until it is waited for
        alive = _signal_group(process, 0)
    if alive:
        _signal_group(process, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=1)


def _signal_group(process: subprocess.Popen[bytes], number: int) -> bool:
    """Sends a signal to the process's group; returns whether the group still exists."""
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return False
    return True
