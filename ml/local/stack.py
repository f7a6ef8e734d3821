"""Airflow and MLflow on this machine, on SQLite: start them, see that they work, stop them and nothing else.

All they write lies in the home folder (setting BREAKHIS_HOME):

    airflow/            AIRFLOW_HOME, with airflow.db and the logs of tasks
    mlflow.db           MLflow's runs and registry; mlartifacts/ holds the files
    mlflow_users.db     MLflow's users, made anew at each start; mlflow_users.ini says where they are
    logs/               what the servers print; the previous start's logs are kept beside
    passwords.json      users and passwords of Airflow and MLflow, for the owner's eyes only (0600)
    secrets.json        keys that the servers sign and encrypt with, and what stages log in to MLflow with (0600)
    training_sets.json  training sets outside the conf folder that the stack was once asked to run
    stack.json          what runs now: processes, ports, addresses

Both servers listen on 127.0.0.1. MLflow's clients write artifacts straight to disk and its registry is a file, so runs
and models can be read with ``sqlite:///<home>/mlflow.db`` when nothing runs. Whoever may write these files needs no
password for them: on this machine alone, who may do what is as good as the operating system's users are.
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
from ml.core.errors import StackError, TryAgain
from ml.core.progress import say
from ml.core.settings import Settings
from ml.local.accounts import PASSWORDS_FILE, list_users, read_passwords
from ml.local.airflow_server import (
    check_dags,
    find_airflow_trouble,
    make_airflow_environment,
    make_breakhis_environment,
    set_pools,
)
from ml.local.mlflow_server import find_mlflow_trouble, make_mlflow_command, make_mlflow_environment, set_up_mlflow
from ml.local.ports import HOST, free_ports
from ml.local.processes import Process, find_family, has_lost_child, stop_family

Json = dict[str, Any]

_SECONDS_TO_START = 300.0
_TROUBLE: dict[str, Callable[[str], str]] = {"mlflow": find_mlflow_trouble, "airflow": find_airflow_trouble}


class Service(BaseModel):
    """One server: its first process, where it answers and where it writes."""

    process: Process
    url: str
    log: Path


class StackState(BaseModel):
    """What was started (stack.json)."""

    started: datetime
    services: dict[str, Service]
    family: list[Process] = []
    """The servers' child processes once all was healthy: found even if the first process is gone."""
    settings: dict[str, str]
    """The BREAKHIS_* environment that tasks get."""

    def recorded(self) -> list[Process]:
        """The processes that are known to have been started; what they started in turn is found by them."""
        return [*(service.process for service in self.services.values()), *self.family]


class Stack:
    """The local stack in ``settings.home``.

    Raises:
        StackError: a server did not start, or DAG files do not import.
        TryAgain: another command is starting or stopping this stack.
    """

    def __init__(self, settings: Settings) -> None:
        self.home = settings.home
        self._state_file = self.home / "stack.json"
        self._sets_file = self.home / "training_sets.json"
        self.passwords_file = self.home / PASSWORDS_FILE
        self.settings = settings.model_copy(update={"training_sets": self._all_sets(settings)})

    # --- what users ask for -------------------------------------------------------------------------------------

    def up(self, extra_set: Path | None = None) -> StackState:
        """Start what does not run, and return once all is healthy; ``extra_set`` is a training-set YAML to add.

        Healthy: MLflow answers; Airflow's database, scheduler, DAG processor and triggerer do; the pools are set. What
        became of the DAG files says :meth:`check_dags`. If anything fails, what was started is stopped.
        """
        with self._alone():
            added = extra_set is not None and self._remember(extra_set)
            state = self.state()
            if state and all(service.process.is_alive() for service in state.services.values()):
                if not added:
                    self._say_differences(state)
                    self._wait_until_healthy(state)
                    return state
                say(f"restarting Airflow and MLflow, since {extra_set} is new to them")
            self._stop()  # remains of a stack that lost a server
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
                Process.of(p.pid) for p in find_family(state.recorded()) if p.pid not in leaders and p.is_running()
            ]
            self._write_state(state)
            return state

    def check_dags(self, state: StackState) -> list[str]:
        """Wait until this start's DAGs are parsed; returns what is wrong with them, one text a problem; [] is well."""
        return check_dags(self.settings, self.api("admin"), state.started)

    def down(self) -> bool:
        """Stop the stack's processes; returns whether there were any."""
        with self._alone():
            return self._stop()

    def status(self) -> Json:
        """What runs: ``running``, ``healthy``, ``home``, ``services`` with url, pid, log and state each, ``users``."""
        state = self.state()
        services: Json = {}
        for name, service in state.services.items() if state else ():
            running = service.process.is_alive()
            trouble = _TROUBLE[name](service.url) if running else "not running"
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
            "users": self.users(),
            "passwords": str(self.passwords_file),
        }

    # --- for whoever drives it ----------------------------------------------------------------------------------

    def state(self) -> StackState | None:
        """What was started, or None. It may have died since."""
        try:
            return StackState.model_validate_json(self._state_file.read_text())
        except FileNotFoundError:
            return None
        except ValidationError:
            raise StackError(
                f"{self._state_file} is damaged; stop Airflow and MLflow by hand if they run, then remove it"
            ) from None

    def users(self) -> dict[str, str]:
        """People and Airflow's service account, with their roles there. Those in BREAKHIS_REVIEWERS are users, too."""
        return list_users(self.settings)

    def passwords(self) -> dict[str, str]:
        """The users' passwords; made at random the first time, then kept."""
        return read_passwords(self.settings)

    def api(self, user: str) -> AirflowApi:
        """Airflow as ``user``."""
        state = self.state()
        if state is None:
            raise StackError("the local stack is not running; start it with 'breakhis up'")
        return AirflowApi(state.services["airflow"].url, user, self.passwords()[user])

    # --- starting -----------------------------------------------------------------------------------------------

    def _start(self, ports: list[int]) -> StackState:
        self.home.mkdir(parents=True, exist_ok=True)
        airflow_url, mlflow_url = (f"http://{HOST}:{port}" for port in ports[:2])
        environment = make_airflow_environment(self.settings, airflow_url, mlflow_url, ports[2:])
        given = {key: value for key, value in environment.items() if key.startswith("BREAKHIS_")}
        state = StackState(started=datetime.now(UTC), services={}, settings=given)
        mlflow_own = make_mlflow_environment(self.settings, environment)
        commands = {
            "mlflow": (mlflow_url, make_mlflow_command(self.settings, ports[1]), mlflow_own),
            "airflow": (airflow_url, [sys.executable, "-m", "airflow", "standalone"], environment),
        }
        for name, (url, command, own) in commands.items():
            log = self._new_log(name)
            with log.open("wb") as output:
                child = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    cwd=self.home,
                    env=own,
                    start_new_session=True,  # Ctrl-C in the terminal is not meant for it
                )
            state.services[name] = Service(process=Process.of(child.pid), url=url, log=log)
            self._write_state(state)  # at once: whatever happens next, 'down' finds it
        return state

    def _wait_until_healthy(self, state: StackState, then: Mapping[str, Callable[[str], None]] | None = None) -> None:
        """Wait for all servers; ``then`` says what is done with one, by its address, as soon as it is healthy."""
        begin = time.monotonic()
        waiting = dict(state.services)
        zombies: dict[int, float] = {}
        while waiting:
            for name, service in list(waiting.items()):
                trouble = _TROUBLE[name](service.url)
                if not trouble:
                    say(f"{name} is healthy at {service.url} ({time.monotonic() - begin:.0f} s)")
                    del waiting[name]
                    if then and name in then:
                        then[name](service.url)
                    continue
                if not service.process.is_alive() or has_lost_child(service.process, zombies):
                    raise StackError(f"{name} ended while it was starting.\n{_tail(service.log)}")
                if time.monotonic() - begin > _SECONDS_TO_START:
                    raise StackError(
                        f"{name} is not healthy after {_SECONDS_TO_START:.0f} s: {trouble}.\n{_tail(service.log)}"
                    )
            if waiting:
                time.sleep(0.5)

    def _new_log(self, name: str) -> Path:
        log = self.home / "logs" / f"{name}.log"
        log.parent.mkdir(exist_ok=True)
        if log.exists():
            log.replace(log.with_name(f"{name}.previous.log"))
        return log

    def _say_differences(self, state: StackState) -> None:
        wanted = make_breakhis_environment(self.settings, state.services["mlflow"].url)
        for name in sorted(wanted.keys() | state.settings.keys()):
            was, now = state.settings.get(name), wanted.get(name)
            # A shell that says nothing about a setting does not ask for another value.
            if now is not None and was != now:
                say(f"running with {name}={was or ''}, not {now}; to change that: breakhis down, then breakhis up")

    # --- stopping -----------------------------------------------------------------------------------------------

    def _stop(self) -> bool:
        state = self.state()
        if state is None:
            return False
        ran = stop_family(state.recorded())
        self._state_file.unlink(missing_ok=True)
        return ran

    # --- files in the home folder -------------------------------------------------------------------------------

    @contextmanager
    def _alone(self) -> Iterator[None]:
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

    def _all_sets(self, settings: Settings) -> tuple[Path, ...]:
        given = [path.expanduser().resolve() for path in settings.training_sets]
        kept = []
        for path in self._remembered():
            if path.exists():
                kept.append(path)
            else:
                say(f"{path} is gone; its training set is left out (listed in {self._sets_file})")
        return tuple(dict.fromkeys([*given, *kept]))

    def _remembered(self) -> list[Path]:
        try:
            return [Path(line) for line in json.loads(self._sets_file.read_text())]
        except FileNotFoundError:
            return []
        except (ValueError, TypeError):
            raise StackError(f"{self._sets_file} is damaged; remove it") from None

    def _remember(self, path: Path) -> bool:
        """Keep a training set outside the conf folder for this and later starts; returns whether it is new."""
        path = path.resolve()
        if path.parent == self.settings.conf / "training_sets":
            return False
        kept = self._remembered()
        if path not in kept:
            self._sets_file.write_text(json.dumps([str(p) for p in [*kept, path]], indent=1))
        if path in self.settings.training_sets:
            state = self.state()
            running_with = state.settings.get("BREAKHIS_TRAINING_SETS", "") if state else ""
            return str(path) not in running_with.split(os.pathsep)
        self.settings = self.settings.model_copy(update={"training_sets": (*self.settings.training_sets, path)})
        return True


def _tail(log: Path, lines: int = 15) -> str:
    last = log.read_text(errors="replace").splitlines()[-lines:] if log.exists() else []
    return "\n".join([f"The end of {log}:", *(f"  {line}" for line in last)])
