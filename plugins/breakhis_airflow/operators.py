"""A stage of the ``breakhis`` command as an Airflow task: *what* runs, and apart from that *where* it runs.

``StageOperator`` builds the command, the environment and the secrets, and makes of the outcome what Airflow needs. Each
place it can run at is a short subclass that starts a command and passes its output on. DAG files call :func:`stage`,
which takes the class of the configured place.
"""

import ctypes
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from abc import abstractmethod
from codecs import getincrementaldecoder
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from airflow.sdk import BaseHook, BaseOperator, Context
from airflow.sdk.exceptions import AirflowException, AirflowFailException, AirflowNotFoundException
from airflow.sdk.log import mask_secret

from breakhis_airflow.environment import stage_environment
from breakhis_airflow.links import LINKS
from ml.errors import EXIT_BAD_INPUT, EXIT_REFUSED
from ml.settings import settings

DEFAULT_ARGS: dict[str, Any] = {
    "owner": "breakhis",
    "retries": 2,
    "retry_delay": timedelta(minutes=1),
    "retry_exponential_backoff": 2.0,
    "max_retry_delay": timedelta(minutes=15),
}
"""For every DAG. Retries are for lost networks and lost machines: what cannot get better by itself is never retried."""

_EXIT_USAGE = 2
_NO_RETRY = frozenset({_EXIT_USAGE, EXIT_BAD_INPUT, EXIT_REFUSED})


class StageOperator(BaseOperator):
    """Run one stage and return its JSON result, which becomes the task's XCom and the extra of its outlets' events.

    A stage that says no (bad input, failed validation, blocked gates) fails the task without a retry, with the stage's
    own words; if it wrote a result all the same, that is the XCom. Everything else that goes wrong may be retried.

    :param stage: The stage: a command of ``breakhis``, such as ``fetch``.
    :param arguments: What follows it on the command line. (templated)
    :param connections: Airflow connections that this stage is given, as ``{connection id: PREFIX}``; it finds them in
        PREFIX_URL, PREFIX_USER and PREFIX_PASSWORD. They are fetched when the task runs, and no other stage sees them.
    """

    template_fields: Sequence[str] = ("arguments",)
    ui_color = "#dbe7f5"

    stage_result: dict[str, Any] | None = None
    """What the stage answered, once it has run here; the links on the task are made of it."""

    def __init__(
        self,
        *,
        stage: str,
        arguments: Sequence[str] = (),
        connections: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not re.fullmatch(r"[a-z][a-z-]*", stage):
            raise ValueError(f"stage must be a command of breakhis such as 'fetch', not {stage!r}")
        if isinstance(arguments, str) or not all(isinstance(argument, str) for argument in arguments):
            raise ValueError(f"arguments of stage {stage} must be a list of strings, not {arguments!r}")
        for prefix in (connections or {}).values():
            if not re.fullmatch(r"[A-Z][A-Z0-9_]*", prefix):
                raise ValueError(f"a connection is passed under a prefix such as BREAKHIS_AIRFLOW, not {prefix!r}")
        self.stage = stage
        self.arguments = list(arguments)
        self.connections = dict(connections or {})
        self.operator_extra_links = LINKS.get(stage, ())

    def value(self, key: str) -> str:
        """A template of one value of this task's result, for the arguments of later tasks."""
        return f"{{{{ ti.xcom_pull(task_ids={self.task_id!r})[{key!r}] }}}}"

    def execute(self, context: Context) -> dict[str, Any]:
        """Run the stage; returns its result.

        Raises:
            AirflowFailException: the stage refused, or was called wrongly; trying again cannot help.
            AirflowException: it was killed, crashed, or asks to be tried again.
        """
        from ml.store import Store

        ti = context["ti"]
        store = Store(settings().store)
        # With the instance's own id: run ids come back (an old store under a new Airflow database), results must not.
        key = f"jobs/{ti.dag_id}/{ti.run_id}/{ti.task_id}/{ti.try_number}-{ti.id}.json"
        command = ["breakhis", self.stage, *self.arguments, "--json", "--result", store.uri(key)]
        self.log.info("Running: %s", " ".join(command))
        connections = self._fetch_connections()
        output = _Output(self.log, hidden=[value for name, value in connections.items() if name.endswith("_PASSWORD")])
        status = self.run_command(command, {**stage_environment(os.environ), **connections}, output)
        self.stage_result, _ = store.read(key)
        for link in self.operator_extra_links:
            if address := link.get_link(self, ti_key=ti):
                self.log.info("%s: %s", link.name, address)

        if status == 0 and self.stage_result is not None:
            for asset in self.outlets:
                context["outlet_events"][asset].extra = self.stage_result
            return self.stage_result
        if self.stage_result is not None:
            ti.xcom_push(key="return_value", value=self.stage_result)
        problem = f"breakhis {self.stage}{': ' + output.error if output.error else _how_it_ended(status)}"
        raise AirflowFailException(problem) if status in _NO_RETRY else AirflowException(problem)

    @abstractmethod
    def run_command(self, command: list[str], environment: dict[str, str], output: Callable[[str], None]) -> int:
        """Run ``command`` to its end with exactly this environment; ``output`` is called with each line it prints.

        Returns:
            The exit status; of a command that was killed, the signal's number with a minus sign.
        """

    def _fetch_connections(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for connection_id, prefix in self.connections.items():
            try:
                connection = BaseHook.get_connection(connection_id)
            except AirflowNotFoundException:
                raise AirflowFailException(
                    f"stage {self.stage} needs the Airflow connection {connection_id!r} and there is none: an "
                    "administrator adds it under Admin > Connections (type http, host, port, login and password)"
                ) from None
            if connection.password:
                mask_secret(connection.password)
            found[f"{prefix}_URL"] = _address(connection)
            found[f"{prefix}_USER"] = connection.login or ""
            found[f"{prefix}_PASSWORD"] = connection.password or ""
        return found


class ProcessStageOperator(StageOperator):
    """Run a stage as a process beside the Airflow worker. Needs nothing but ``breakhis`` on the worker's machine.

    The process leads a group of its own, and what belongs to it ends with the task: when the task is stopped from the
    UI, when it runs into ``execution_timeout``, and when the worker dies.
    """

    _process: subprocess.Popen[bytes] | None = None

    def run_command(self, command: list[str], environment: dict[str, str], output: Callable[[str], None]) -> int:
        """Run ``command`` here; see the base class."""
        with subprocess.Popen(
            [_executable(command[0]), *command[1:]],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # Between fork and exec, where threads make most things unsafe: one system call, looked up beforehand.
            preexec_fn=_end_with_parent,  # noqa: PLW1509
        ) as process:
            self._process = process
            try:
                for line in _lines(process):
                    output(line)
                return process.wait()
            finally:
                _end_group(process)
                self._process = None

    def on_kill(self) -> None:
        """End the process and everything it started. Airflow calls this when the task is stopped."""
        if self._process:
            self.log.warning("Stopping breakhis %s", self.stage)
            _end_group(self._process)


PLACES: dict[str, type[StageOperator]] = {"process": ProcessStageOperator}
"""The operator of each place that the setting BREAKHIS_PLACE can name."""


def stage(name: str, *arguments: str, **kwargs: Any) -> StageOperator:
    """A task that runs the stage ``name`` at the configured place; its task id is the stage's name unless given."""
    return PLACES[settings().place](stage=name, arguments=arguments, **{"task_id": name, **kwargs})


# --- what a stage says ------------------------------------------------------------------------------------------------


class _Output:
    """Passes a stage's lines on to the task's log, and keeps its last error.

    Secrets are struck out here. Airflow masks them in the task's log, but not where the supervisor repeats that log on
    the scheduler's or worker's own output.
    """

    def __init__(self, log: Any, hidden: Sequence[str]) -> None:
        self.error = ""
        self._log = log
        self._hidden = [secret for secret in hidden if secret]

    def __call__(self, line: str) -> None:
        for secret in self._hidden:
            line = line.replace(secret, "***")
        self._log.info("%s", line)
        if line.lower().startswith("error: "):  # the stages' own errors, and click's about how they are called
            self.error = line[len("error: ") :]


def _how_it_ended(status: int) -> str:
    if status == 0:
        return " ended well but wrote no result"
    if status > 0:
        return f" ended with status {status}; its last lines above say why"
    hint = ", most often for want of memory" if -status == signal.SIGKILL else ""
    return f" was killed by {signal.Signals(-status).name}{hint}"


# --- connections ----------------------------------------------------------------------------------------------------


def _address(connection: Any) -> str:
    """The URL in an HTTP connection, written in any of the ways that Airflow's HTTP hook reads."""
    host = connection.host or "localhost"
    if "://" not in host:
        scheme = connection.schema or (connection.conn_type if connection.conn_type == "https" else "http")
        host = f"{scheme}://{host}"
    return f"{host}:{connection.port}" if connection.port else host


# --- processes ------------------------------------------------------------------------------------------------------

_SECONDS_TO_END = 3.0
"""Between asking and killing. Airflow itself kills the task five seconds after asking it."""

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


def _end_with_parent() -> None:
    """Have the kernel end this process when the worker's dies, so that a retry does not run beside an orphan."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _executable(name: str) -> str:
    """Where the command lies: on PATH, or beside the Python that runs Airflow."""
    path = os.pathsep.join([os.environ.get("PATH", ""), str(Path(sys.executable).parent)])
    found = shutil.which(name, path=path)
    if not found:
        raise AirflowFailException(f"the command {name!r} is not on this worker's PATH ({path})")
    return found


def _lines(process: subprocess.Popen[bytes]) -> Iterator[str]:
    """The output line by line, until the process has ended and what it had written is read.

    Not until its pipe closes: when a process is killed, children of it can live on and hold the pipe open.
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
    """End the process and its children: ask them, wait a little, kill them."""
    deadline = time.monotonic() + _SECONDS_TO_END
    alive = _signal_group(process, signal.SIGTERM)
    while alive and time.monotonic() < deadline:
        time.sleep(0.05)
        process.poll()  # a leader that nobody has waited for keeps its group in being
        alive = _signal_group(process, 0)
    if alive:
        _signal_group(process, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=1)


def _signal_group(process: subprocess.Popen[bytes], number: int) -> bool:
    """Send a signal to the process's group; whether there still is one."""
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return False
    return True
