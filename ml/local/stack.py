"""Starts Airflow and MLflow on this machine, on SQLite, checks that they work, and stops them and nothing else.

Everything they write lies in the home folder (setting BREAKHIS_HOME):

    airflow/            AIRFLOW_HOME, with airflow.db and the logs of tasks
    mlflow.db           MLflow's runs and registry; mlartifacts/ holds the files
    mlflow_users.db     MLflow's users, made anew at each start; mlflow_users.ini says where they are
    logs/               what the servers print; the previous start's logs are kept beside
    passwords.json      users and passwords of Airflow and MLflow, readable by the owner only (0600)
    secrets.json        keys that the servers sign and encrypt with, and the stages' passwords in MLflow (0600)
    training_sets.json  training sets outside the conf folder that the stack was once asked to run
    stack.json          what runs now: processes, ports, addresses

Both servers listen on 127.0.0.1. MLflow's clients write artifacts straight to disk and its registry is a file, so runs
and models can be read with ``sqlite:///<home>/mlflow.db`` when nothing runs. Whoever may write these files needs no
password: access rights on this machine are only as good as those of the operating system's users.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic import BaseModel, ValidationError

from ml.core.airflow_api import AirflowApi
from ml.core.disks import write_in_one_step
from ml.core.errors import BreakhisError, StackError, TryAgain
from ml.core.names import resolve_links
from ml.core.progress import say
from ml.core.settings import Settings
from ml.local.accounts import PASSWORDS_FILE, list_users, read_passwords
from ml.local.airflow_server import (
    check_dags,
    find_airflow_trouble,
    find_pool_trouble,
    make_airflow_environment,
    make_breakhis_environment,
    set_pools,
)
from ml.local.hints import find_hints
from ml.local.mlflow_server import find_mlflow_trouble, make_mlflow_command, make_mlflow_environment, set_up_mlflow
from ml.local.ports import HOST, free_ports
from ml.local.processes import Process, find_family, has_lost_child, stop_family

Json = dict[str, Any]

_SECONDS_TO_START = 300.0
_HEALTH_CHECKS: dict[str, Callable[[str], str]] = {"mlflow": find_mlflow_trouble, "airflow": find_airflow_trouble}


class Service(BaseModel):
    """One server: its first process, its address and its log file."""

    process: Process
    url: str
    log: Path


class StackState(BaseModel):
    """The servers that were started, as stack.json holds them."""

    started: datetime
    services: dict[str, Service]
    family: list[Process] = []
    """The servers' child processes once all were healthy, by which they are found even if the first process is gone."""
    settings: dict[str, str]
    """The BREAKHIS_* variables that tasks get."""

    def list_processes(self) -> list[Process]:
        """Returns the recorded processes: the servers' first ones and their children."""
        return [*(service.process for service in self.services.values()), *self.family]


class Stack:
    """The local stack in the folder ``settings.home``.

    Its methods raise :class:`StackError` where a server does not start or a file in the home folder is damaged, and
    :class:`TryAgain` where another command is starting or stopping this stack.
    """

    def __init__(self, settings: Settings) -> None:
        self.home = settings.home
        self._state_file = self.home / "stack.json"
        self._sets_file = self.home / "training_sets.json"
        self.passwords_file = self.home / PASSWORDS_FILE
        self.settings = settings.model_copy(update={"training_sets": self._find_training_sets(settings)})

    # --- commands of users --------------------------------------------------------------------------------------

    def up(self, extra_set: Path | None = None) -> StackState:
        """Starts the servers that do not run, and returns once both are healthy.

        They are healthy when MLflow answers, Airflow's database, scheduler, DAG processor and triggerer do, and the
        pools are set. The DAG files are a matter of :meth:`check_dags`. If anything fails, the servers are stopped.

        Args:
            extra_set: the YAML file of a training set to add.

        Returns:
            The servers that run.
        """
        with self._lock():
            is_added = extra_set is not None and self._remember_training_set(extra_set)
            state = self.state()
            if state and all(service.process.is_alive() for service in state.services.values()):
                if not is_added:
                    self._say_changed_settings(state)
                    self._wait_until_healthy(state)
                    return state
                say(f"restarting Airflow and MLflow, since {extra_set} is new to them")
            self._stop()  # a server of an earlier start may be left
            with free_ports(8080, 5000, 0, 0) as ports:
                state = self._start(ports)
                try:
                    self._wait_until_healthy(state, {"mlflow": lambda url: set_up_mlflow(self.settings, url)})
                    set_pools(self.settings, self.api("admin"))
                except BaseException:
                    self._stop()
                    raise
            leaders = {service.process.pid for service in state.services.values()}
            state.family = [
                Process.of(p.pid)
                for p in find_family(state.list_processes())
                if p.pid not in leaders and p.is_running()
            ]
            self._write_state(state)
            return state

    def check_dags(self, state: StackState) -> list[str]:
        """Waits until Airflow has parsed its DAG files since this start; returns their problems, one text each."""
        return check_dags(self.settings, self.api("admin"), state.started)

    def down(self) -> bool:
        """Stops the stack's processes; returns whether there were any."""
        with self._lock():
            return self._stop()

    def status(self) -> Json:
        """Returns which servers run and whether they are healthy, with their addresses, the users and the folders.

        It is the JSON of ``breakhis status``. ``services`` has, by name: ``url``, ``pid``, ``log``, ``running``,
        ``healthy`` and ``trouble``. ``pools`` says which pools Airflow lacks; an empty text if none is known to be.
        ``hints`` says what a run that ended well does not show; see :func:`find_hints`.
        """
        state = self.state()
        services: Json = {}
        pools = ""
        hints: list[str] = []
        for name, service in state.services.items() if state else ():
            running = service.process.is_alive()
            trouble = _HEALTH_CHECKS[name](service.url) if running else "not running"
            if name == "airflow" and not trouble:
                try:
                    trouble = pools = find_pool_trouble(self.api("admin"))
                    hints = find_hints(self.api("admin"))
                except BreakhisError as error:
                    trouble = str(error)
            services[name] = {
                "url": service.url,
                "pid": service.process.pid,
                "log": str(service.log),
                "running": running,
                "healthy": not trouble,
                "trouble": trouble,
            }
        return {
            "running": bool(services) and all(s["running"] for s in services.values()),
            "healthy": bool(services) and all(s["healthy"] for s in services.values()),
            "home": str(self.home),
            "store": self.settings.store,
            "training_sets": [str(path) for path in self.settings.training_sets],
            "services": services,
            "pools": pools,
            "hints": hints,
            "users": self.users(),
            "passwords": str(self.passwords_file),
        }

    # --- access for other modules -------------------------------------------------------------------------------

    def state(self) -> StackState | None:
        """Returns the servers that were started, which may have ended since; None if none were."""
        try:
            return StackState.model_validate_json(self._state_file.read_text())
        except FileNotFoundError:
            return None
        except ValidationError:
            raise StackError(
                f"{self._state_file} is damaged; stop Airflow and MLflow by hand if they run, then remove it"
            ) from None

    def users(self) -> dict[str, str]:
        """Returns the users of Airflow with their roles; see :func:`list_users`."""
        return list_users(self.settings)

    def passwords(self) -> dict[str, str]:
        """Returns the users' passwords; see :func:`read_passwords`."""
        return read_passwords(self.settings)

    def api(self, user: str) -> AirflowApi:
        """Returns a client of Airflow's REST API that is logged in as ``user``.

        Raises:
            StackError: nothing was started.
        """
        state = self.state()
        if state is None:
            raise StackError("the local stack is not running; start it with 'breakhis up'")
        return AirflowApi(state.services["airflow"].url, user, self.passwords()[user])

    # --- starting -----------------------------------------------------------------------------------------------

    def _start(self, ports: list[int]) -> StackState:
        self.home.mkdir(parents=True, exist_ok=True)
        airflow_url, mlflow_url = (f"http://{HOST}:{port}" for port in ports[:2])
        environment = make_airflow_environment(self.settings, airflow_url, mlflow_url, ports[2:])
        mlflow_environment = make_mlflow_environment(self.settings, environment)
        task_settings = {name: value for name, value in environment.items() if name.startswith("BREAKHIS_")}
        state = StackState(started=datetime.now(UTC), services={}, settings=task_settings)
        commands = {
            "mlflow": (mlflow_url, make_mlflow_command(self.settings, ports[1]), mlflow_environment),
            "airflow": (airflow_url, [sys.executable, "-m", "airflow", "standalone"], environment),
        }
        for name, (url, command, server_environment) in commands.items():
            log = self._rotate_log(name)
            with log.open("wb") as output:
                child = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    cwd=self.home,
                    env=server_environment,
                    start_new_session=True,  # Ctrl-C in the terminal does not reach it
                )
            state.services[name] = Service(process=Process.of(child.pid), url=url, log=log)
            self._write_state(state)  # at once: whatever happens next, 'down' finds it
        return state

    def _wait_until_healthy(self, state: StackState, then: Mapping[str, Callable[[str], None]] | None = None) -> None:
        """Waits until all servers are healthy.

        Args:
            state: the servers.
            then: what is done with a server, given its address, as soon as it is healthy.

        Raises:
            StackError: a server ended, or is not healthy after five minutes.
        """
        begin = time.monotonic()
        waiting = dict(state.services)
        zombies: dict[int, float] = {}
        while waiting:
            for name, service in list(waiting.items()):
                trouble = _HEALTH_CHECKS[name](service.url)
                if not trouble:
                    say(f"{name} is healthy at {service.url} ({time.monotonic() - begin:.0f} s)")
                    del waiting[name]
                    if then and name in then:
                        then[name](service.url)
                    continue
                if not service.process.is_alive() or has_lost_child(service.process, zombies):
                    raise StackError(f"{name} ended while it was starting.\n{_read_log_end(service.log)}")
                if time.monotonic() - begin > _SECONDS_TO_START:
                    waited = f"{name} is not healthy after {_SECONDS_TO_START:.0f} s: {trouble}."
                    raise StackError(f"{waited}\n{_read_log_end(service.log)}")
            if waiting:
                time.sleep(0.5)

    def _rotate_log(self, name: str) -> Path:
        log = self.home / "logs" / f"{name}.log"
        log.parent.mkdir(exist_ok=True)
        if log.exists():
            log.replace(log.with_name(f"{name}.previous.log"))
        return log

    def _say_changed_settings(self, state: StackState) -> None:
        """Names the settings that the running servers have otherwise than this command would start them with."""
        environment = make_breakhis_environment(self.settings, state.services["mlflow"].url)
        for name in sorted(environment.keys() | state.settings.keys()):
            running, wanted = state.settings.get(name), environment.get(name)
            # A shell that does not set a variable asks for no other value.
            if wanted is not None and running != wanted:
                advice = "to change that: breakhis down, then breakhis up"
                say(f"running with {name}={running or ''}, not {wanted}; {advice}")

    # --- stopping -----------------------------------------------------------------------------------------------

    def _stop(self) -> bool:
        state = self.state()
        if state is None:
            return False
        ran = stop_family(state.list_processes())
        self._state_file.unlink(missing_ok=True)
        return ran

    # --- files in the home folder -------------------------------------------------------------------------------

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """Keeps other commands from starting or stopping this stack within the block."""
        self.home.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.home / "stack.lock", timeout=1):
                yield
        except Timeout:
            raise TryAgain(f"another command is starting or stopping the stack in {self.home}; try again") from None

    def _write_state(self, state: StackState) -> None:
        scratch = self._state_file.with_suffix(".new")
        scratch.write_text(state.model_dump_json(indent=1))
        scratch.replace(self._state_file)

    def _find_training_sets(self, settings: Settings) -> tuple[Path, ...]:
        """Returns the YAML files in BREAKHIS_TRAINING_SETS, and those that the stack was once asked to run."""
        given = [resolve_links(path.expanduser()) for path in settings.training_sets]
        remembered = []
        for path in self._read_remembered_sets():
            if path.exists():
                remembered.append(path)
            else:
                say(f"{path} is gone; its training set is left out (listed in {self._sets_file})")
        return tuple(dict.fromkeys([*given, *remembered]))

    def _read_remembered_sets(self) -> list[Path]:
        try:
            return [Path(line) for line in json.loads(self._sets_file.read_text())]
        except FileNotFoundError:
            return []
        except (ValueError, TypeError):
            raise StackError(f"{self._sets_file} is damaged; remove it") from None

    def _remember_training_set(self, path: Path) -> bool:
        """Keeps a training set outside the conf folder for this and later starts.

        Returns:
            Whether the servers that run, if any, were started without it.
        """
        path = resolve_links(path)
        if path.parent == self.settings.conf / "training_sets":
            return False
        remembered = self._read_remembered_sets()
        if path not in remembered:
            listed = json.dumps([str(file) for file in [*remembered, path]], indent=1)
            write_in_one_step(self._sets_file, listed.encode())
        if path in self.settings.training_sets:
            state = self.state()
            running_sets = state.settings.get("BREAKHIS_TRAINING_SETS", "") if state else ""
            return str(path) not in running_sets.split(os.pathsep)
        self.settings = self.settings.model_copy(update={"training_sets": (*self.settings.training_sets, path)})
        return True


def _read_log_end(log: Path, lines: int = 15) -> str:
    last = log.read_text(errors="replace").splitlines()[-lines:] if log.exists() else []
    return "\n".join([f"The end of {log}:", *(f"  {line}" for line in last)])
