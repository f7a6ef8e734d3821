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
import secrets
import socket
import subprocess
import sys
import time
from base64 import urlsafe_b64encode
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import requests
from filelock import FileLock, Timeout
from pydantic import BaseModel, ValidationError

from ml.core.airflow_api import AirflowApi
from ml.core.errors import BreakhisError, ConfigError, StackError, TryAgain
from ml.core.progress import say
from ml.core.settings import PROJECT, SECRETS, Settings
from ml.core.yaml_files import read_mapping
from ml.data.sources import load_source, source_files
from ml.data.training_sets import load_training_set, training_set_files
from ml.local.mlflow_users import PROMOTER, TRAINER, model_names, server_config, set_up
from ml.promotion.reviews import PROMOTE, ROLLBACK, WITHDRAW

Json = dict[str, Any]

DAGS = PROJECT / "dags"
PLUGINS = PROJECT / "plugins"
HOST = "127.0.0.1"
SERVICE_USER = "breakhis-service"
ROLES = {"admin": "admin", "engineer": "user", "reviewer": "user", "viewer": "viewer", SERVICE_USER: "viewer"}
"""Users and their roles in Airflow's SimpleAuthManager. The service account only reads runs and answered reviews.

The people are users of MLflow too, where all but the administrator read."""

_SECONDS_TO_START = 300.0
_TRIES_FOR_A_PORT = 20
_SECONDS_TO_PARSE = 120.0
_SECONDS_TO_STOP = 15.0
_COMPONENTS = ("metadatabase", "scheduler", "dag_processor", "triggerer")


class Process(BaseModel):
    """A process by its pid and its birth, which tells it from a later process that got the same pid."""

    pid: int
    birth: str

    @classmethod
    def of(cls, pid: int) -> "Process":
        """The process that has this pid now.

        Raises:
            psutil.NoSuchProcess: none has.
        """
        return cls(pid=pid, birth=_birth(pid))

    def alive(self) -> bool:
        """Whether this very process still runs (a zombie does not)."""
        try:
            return _birth(self.pid) == self.birth and psutil.Process(self.pid).status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False


class Service(BaseModel):
    """One server: its first process, where it answers and where it writes."""

    process: Process
    url: str
    log: Path


class State(BaseModel):
    """What was started (stack.json)."""

    started: datetime
    services: dict[str, Service]
    family: list[Process] = []
    """The servers' child processes once all was healthy: found even if the first process is gone."""
    settings: dict[str, str]
    """The BREAKHIS_* environment that tasks get."""


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
        self.passwords_file = self.home / "passwords.json"
        self.settings = settings.model_copy(update={"training_sets": self._all_sets(settings)})

    # --- what users ask for -------------------------------------------------------------------------------------

    def up(self, extra_set: Path | None = None) -> State:
        """Start what does not run, and return once all is healthy; ``extra_set`` is a training-set YAML to add.

        Healthy: MLflow answers; Airflow's database, scheduler, DAG processor and triggerer do; the pools are set. What
        became of the DAG files says :meth:`check_dags`. If anything fails, what was started is stopped.
        """
        with self._alone():
            added = extra_set is not None and self._remember(extra_set)
            state = self.state()
            if state and all(service.process.alive() for service in state.services.values()):
                if not added:
                    self._say_differences(state)
                    self._wait_until_healthy(state)
                    return state
                say(f"restarting Airflow and MLflow, since {extra_set} is new to them")
            self._stop()  # remains of a stack that lost a server
            with free_ports(8080, 5000, 0, 0) as ports:
                state = self._start(ports)
                try:
                    self._wait_until_healthy(state, {"mlflow": self._set_up_mlflow})
                    self._set_pools()
                except BaseException:
                    self._stop()
                    raise
            leaders = {service.process.pid for service in state.services.values()}
            state.family = [Process.of(p.pid) for p in _family(state) if p.pid not in leaders and p.is_running()]
            self._write_state(state)
            return state

    def check_dags(self, state: State) -> list[str]:
        """Wait until this start's DAGs are parsed; returns what is wrong with them, one text a problem; [] is well."""
        expected, problems = expected_dags(self.settings)
        api = self.api("admin")
        deadline = time.monotonic() + _SECONDS_TO_PARSE
        broken_since = None
        while True:
            fresh = {d["dag_id"]: d for d in api.dags() if _since(d.get("last_parsed_time"), state.started)}
            errors = [e for e in api.import_errors() if _since(e.get("timestamp"), state.started)]
            missing = sorted(expected - fresh.keys())
            if not missing and not errors:
                # A YAML file that cannot be used has a DAG all the same, which says why.
                refused = [d["description"] for d in fresh.values() if "invalid" in _tags(d)]
                return list(dict.fromkeys([*problems, *refused]))
            now = time.monotonic()
            broken_since = broken_since or (now if errors else None)
            # A file with an error may have been half written; one second look, then it is reported.
            if now > deadline or (broken_since and now > broken_since + 10):
                problems += [f"{e['filename']} does not import: {e['stack_trace'].strip()}" for e in errors]
                if missing:
                    problems.append(f"these DAGs are missing: {', '.join(missing)}")
                return problems
            time.sleep(1)

    def down(self) -> bool:
        """Stop the stack's processes; returns whether there were any."""
        with self._alone():
            return self._stop()

    def status(self) -> Json:
        """What runs: ``running``, ``healthy``, ``home``, ``services`` with url, pid, log and state each, ``users``."""
        state = self.state()
        services: Json = {}
        for name, service in state.services.items() if state else ():
            running = service.process.alive()
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

    def state(self) -> State | None:
        """What was started, or None. It may have died since."""
        try:
            return State.model_validate_json(self._state_file.read_text())
        except FileNotFoundError:
            return None
        except ValidationError:
            raise StackError(
                f"{self._state_file} is damaged; stop Airflow and MLflow by hand if they run, then remove it"
            ) from None

    def users(self) -> dict[str, str]:
        """People and Airflow's service account, with their roles there. Those in BREAKHIS_REVIEWERS are users, too."""
        return {**ROLES, **{name: ROLES.get(name, "user") for name in self.settings.reviewers}}

    def passwords(self) -> dict[str, str]:
        """The users' passwords; made at random the first time, then kept."""
        return _kept_secrets(self.passwords_file, dict.fromkeys(self.users(), _password))

    def api(self, user: str) -> AirflowApi:
        """Airflow as ``user``."""
        state = self.state()
        if state is None:
            raise StackError("the local stack is not running; start it with 'breakhis up'")
        return AirflowApi(state.services["airflow"].url, user, self.passwords()[user])

    # --- starting -----------------------------------------------------------------------------------------------

    def _start(self, ports: list[int]) -> State:
        self.home.mkdir(parents=True, exist_ok=True)
        airflow_url, mlflow_url = (f"http://{HOST}:{port}" for port in ports[:2])
        environment = self._environment(airflow_url, mlflow_url, ports[2:])
        mlflow_environment = self._mlflow_environment(environment)
        given = {key: value for key, value in environment.items() if key.startswith("BREAKHIS_")}
        state = State(started=datetime.now(UTC), services={}, settings=given)
        commands = {
            "mlflow": (mlflow_url, self._mlflow_command(ports[1]), mlflow_environment),
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

    def _mlflow_command(self, port: int) -> list[str]:
        artifacts = self.home / "mlartifacts"
        artifacts.mkdir(exist_ok=True)
        return [
            *(sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(port), "--workers", "1"),
            *("--app-name", "basic-auth"),
            *("--backend-store-uri", f"sqlite:///{self.home / 'mlflow.db'}"),
            *("--no-serve-artifacts", "--default-artifact-root", artifacts.as_uri()),
        ]

    def _keys(self) -> dict[str, str]:
        names = ("jwt", "api", "audit", "mlflow", TRAINER, PROMOTER)
        makers = {"fernet": lambda: urlsafe_b64encode(os.urandom(32)).decode(), **dict.fromkeys(names, _token)}
        return _kept_secrets(self.home / SECRETS, makers)

    def _mlflow_environment(self, airflows: dict[str, str]) -> dict[str, str]:
        """What MLflow finds in its environment: of Airflow's, what is not Airflow's own."""
        users = self.home / "mlflow_users.db"
        # Anew at each start: whoever has deleted passwords.json has an administrator with a new password.
        users.unlink(missing_ok=True)
        config = self.home / "mlflow_users.ini"
        config.write_text(server_config(f"sqlite:///{users}"))
        return {
            **{name: value for name, value in airflows.items() if not name.startswith("AIRFLOW")},
            "MLFLOW_AUTH_CONFIG_PATH": str(config),
            "MLFLOW_AUTH_ADMIN_PASSWORD": self.passwords()["admin"],
            "MLFLOW_FLASK_SERVER_SECRET_KEY": self._keys()["mlflow"],
        }

    def _set_up_mlflow(self, url: str) -> None:
        people = {name: word for name, word in self.passwords().items() if name != SERVICE_USER}
        services = {name: self._keys()[name] for name in (TRAINER, PROMOTER)}
        set_up(url, people | services, model_names(self.settings))

    def _environment(self, airflow_url: str, mlflow_url: str, log_ports: list[int]) -> dict[str, str]:
        """What Airflow, and through it the stages, find in their environment."""
        keys, passwords = self._keys(), self.passwords()
        airflow_home = self.home / "airflow"
        airflow_home.mkdir(exist_ok=True)
        service = {
            "conn_type": "http",
            "host": airflow_url,
            "login": SERVICE_USER,
            "password": passwords[SERVICE_USER],
        }
        # What another Airflow on this machine was told, and who somebody else is, is not for this one.
        others = ("AIRFLOW", "BREAKHIS_AIRFLOW_", "MLFLOW_TRACKING_", "MLFLOW_AUTH_")
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(others)}
        no_proxy = ",".join(filter(None, (os.environ.get("NO_PROXY") or os.environ.get("no_proxy"), HOST, "localhost")))
        return {
            **inherited,
            **self._breakhis_environment(mlflow_url),
            "PATH": os.pathsep.join((str(Path(sys.prefix) / "bin"), os.environ.get("PATH", os.defpath))),
            "NO_PROXY": no_proxy,
            "no_proxy": no_proxy,
            "PYTHONUNBUFFERED": "1",
            "NO_COLOR": "1",
            "DO_NOT_TRACK": "true",
            "GX_ANALYTICS_ENABLED": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "TF_CPP_MIN_LOG_LEVEL": os.environ.get("TF_CPP_MIN_LOG_LEVEL", "2"),
            "MLFLOW_TRACKING_URI": mlflow_url,
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "AIRFLOW_HOME": str(airflow_home),
            "AIRFLOW_CONN_BREAKHIS_AIRFLOW": json.dumps(service),
            **{
                f"AIRFLOW_CONN_{connection}": json.dumps({"conn_type": "http", "login": user, "password": keys[user]})
                for connection, user in (("BREAKHIS_MLFLOW", TRAINER), ("BREAKHIS_MLFLOW_PROMOTER", PROMOTER))
            },
            "AIRFLOW_CONN_BREAKHIS_AUDIT": json.dumps({"conn_type": "generic", "password": keys["audit"]}),
            "AIRFLOW__CORE__DAGS_FOLDER": str(DAGS),
            "AIRFLOW__CORE__PLUGINS_FOLDER": str(PLUGINS),
            "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
            "AIRFLOW__CORE__EXECUTOR": "LocalExecutor",
            "AIRFLOW__CORE__PARALLELISM": "4",
            "AIRFLOW__CORE__FERNET_KEY": keys["fernet"],
            "AIRFLOW__CORE__HOSTNAME_CALLABLE": "socket.gethostname",  # the default asks DNS, slow where there is none
            "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"{airflow_url}/execution/",
            "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_USERS": ",".join(f"{n}:{role}" for n, role in self.users().items()),
            "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE": str(self.passwords_file),
            "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{airflow_home / 'airflow.db'}",
            "AIRFLOW__API__HOST": HOST,
            "AIRFLOW__API__PORT": airflow_url.rpartition(":")[2],
            "AIRFLOW__API__BASE_URL": airflow_url,
            "AIRFLOW__API__SECRET_KEY": keys["api"],
            "AIRFLOW__API_AUTH__JWT_SECRET": keys["jwt"],
            "AIRFLOW__LOGGING__COLORED_CONSOLE_LOG": "False",
            "AIRFLOW__LOGGING__WORKER_LOG_SERVER_PORT": str(log_ports[0]),
            "AIRFLOW__LOGGING__TRIGGER_LOG_SERVER_PORT": str(log_ports[1]),
            # The default of 5 s is how long a task waits that could start, and how long an answer to a review that came
            # early is lost on a task that is still being parked.
            "AIRFLOW__SCHEDULER__SCHEDULER_HEARTBEAT_SEC": "1",
            "AIRFLOW__USAGE_DATA_COLLECTION__ENABLED": "False",
        }

    def _breakhis_environment(self, mlflow_url: str) -> dict[str, str]:
        settings = self.settings
        values = {key: value for key, value in os.environ.items() if key.startswith("BREAKHIS_")}
        values = {key: value for key, value in values.items() if not key.startswith("BREAKHIS_AIRFLOW_")}
        values |= {
            "BREAKHIS_HOME": str(settings.home),
            "BREAKHIS_STORE": settings.store,
            "BREAKHIS_CONF": str(settings.conf),
            "BREAKHIS_TRAINING_SETS": os.pathsep.join(str(path) for path in settings.training_sets),
            "BREAKHIS_WEIGHTS": _absolute_weights(settings.weights),
            "BREAKHIS_MLFLOW_URI": mlflow_url,
            "BREAKHIS_MLFLOW_UI": mlflow_url,
            "BREAKHIS_CONNECTIONS": ",".join(dict.fromkeys([*settings.connections, "breakhis_mlflow"])),
        }
        if settings.gpus is not None:
            values["BREAKHIS_GPUS"] = str(settings.gpus)
        return values

    def _wait_until_healthy(self, state: State, then: Mapping[str, Callable[[str], None]] | None = None) -> None:
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
                if not service.process.alive() or _lost_child(service.process, zombies):
                    raise StackError(f"{name} ended while it was starting.\n{_tail(service.log)}")
                if time.monotonic() - begin > _SECONDS_TO_START:
                    raise StackError(
                        f"{name} is not healthy after {_SECONDS_TO_START:.0f} s: {trouble}.\n{_tail(service.log)}"
                    )
            if waiting:
                time.sleep(0.5)

    def _set_pools(self) -> None:
        api = self.api("admin")
        slots = gpu_slots(self.settings)
        deadline = time.monotonic() + _SECONDS_TO_START
        while True:
            try:
                api.set_pool("gpu", slots, "Trainings at a time: one per GPU; two on a machine without")
                api.set_pool("promotion", 1, "Promotions change the registry one after the other")
                return
            except TryAgain:  # just started and on SQLite, a busy Airflow can find its database locked
                if time.monotonic() > deadline:
                    raise
                time.sleep(1)

    def _new_log(self, name: str) -> Path:
        log = self.home / "logs" / f"{name}.log"
        log.parent.mkdir(exist_ok=True)
        if log.exists():
            log.replace(log.with_name(f"{name}.previous.log"))
        return log

    def _say_differences(self, state: State) -> None:
        wanted = self._breakhis_environment(state.services["mlflow"].url)
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
        processes = _family(state)
        ran = bool(processes)
        for send in (psutil.Process.terminate, psutil.Process.kill):
            for process in processes:
                try:
                    send(process)
                except psutil.NoSuchProcess:
                    pass
                except psutil.AccessDenied:
                    raise StackError(f"process {process.pid} belongs to another user; stop it as that user") from None
            processes = _outliving(processes, _SECONDS_TO_STOP)
            # Whoever was started while we were stopping goes with the second signal.
            known = {process.pid for process in processes}
            processes += [process for process in _family(state) if process.pid not in known]
            if not processes:
                break
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

    def _write_state(self, state: State) -> None:
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


def expected_dags(settings: Settings) -> tuple[set[str], list[str]]:
    """The ids of the DAGs that the YAML files ask for, and what is wrong with those files."""
    ids = {PROMOTE, ROLLBACK, WITHDRAW, "audit", "remind"}
    problems = []

    def collect(files: Callable[[], Iterable[Path]], name_of: Callable[[Path], str]) -> None:
        try:
            for path in files():
                try:
                    ids.add(name_of(path))
                except BreakhisError as error:
                    problems.append(str(error))
        except ConfigError as error:
            problems.append(str(error))

    collect(lambda: source_files(settings), lambda path: f"ingest_{load_source(path, settings.conf).name}")
    collect(
        lambda: training_set_files(settings), lambda path: f"retrain_{load_training_set(str(path), settings.conf).name}"
    )
    try:
        if read_mapping(settings.conf / "notifications.yaml", optional=True).get("on_failure"):
            ids.add("try_notifications")
    except ConfigError as error:
        problems.append(str(error))
    return ids, list(dict.fromkeys(problems))


def gpu_count() -> int:
    """NVIDIA GPUs that nvidia-smi lists; 0 without it."""
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return 0
    return sum(line.startswith("GPU ") for line in listing.splitlines())


def gpu_slots(settings: Settings) -> int:
    """Trainings that may run at a time: the setting, or one per GPU; two on a machine without."""
    return (gpu_count() if settings.gpus is None else settings.gpus) or 2


@contextmanager
def free_ports(*preferred: int) -> Iterator[list[int]]:
    """A port on 127.0.0.1 nobody listens on for each preference; 0, or one that is taken: any. All are different.

    Within the block no other stack on this machine is given them. Servers take half a minute until they listen, and of
    two that were told the same port, the one would otherwise take the other's server for its own.
    """
    with ExitStack() as reservations:
        ports = []
        for port in preferred:
            ports.append(_reserve(port, reservations) or _reserve(0, reservations) or _no_port())
        yield ports


def _reserve(wanted: int, reservations: ExitStack) -> int | None:
    """Reserve a port (0: any) by a name that the kernel gives to one process, and takes back when that ends."""
    for _ in range(_TRIES_FOR_A_PORT):
        found = _bind(wanted)
        if found is None:
            return None
        with found:
            port = int(found.getsockname()[1])
            name = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                name.bind(f"\0breakhis-port-{port}")  # abstract: a name without a file, for every user of the machine
            except OSError:
                name.close()
            else:
                reservations.enter_context(name)
                return port
        if wanted:
            return None
    return None


def _bind(port: int) -> socket.socket | None:
    s = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    # As servers do: connections of the last run that linger in TIME_WAIT do not count as taken.
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        s.bind((HOST, port))
        s.listen(1)  # Linux lets two sockets with SO_REUSEADDR bind, but only one listen
    except OSError:
        s.close()
        return None
    return s


def _no_port() -> int:
    raise StackError(f"no port on {HOST} can be listened on")


def _birth(pid: int) -> str:
    """Boot and the clock tick within it when a process began: unlike a time of day, no change of the clock moves it."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        raise psutil.NoSuchProcess(pid) from None
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}:{stat.rpartition(')')[2].split()[19]}"


def _family(state: State) -> list[psutil.Process]:
    """Every living process of the stack: those recorded, their descendants, and whoever shares a session with one.

    A server is started in a session of its own, and a session's number cannot be used again while one of its members
    lives; so whoever is in the session of a recorded process was started by it.
    """
    recorded = [service.process for service in state.services.values()] + state.family
    found: dict[int, psutil.Process] = {}
    sessions = set()
    for process in recorded:
        try:
            if not process.alive():
                continue
            root = psutil.Process(process.pid)
            sessions.add(os.getsid(process.pid))
            found |= {p.pid: p for p in (root, *root.children(recursive=True))}
        except (psutil.NoSuchProcess, ProcessLookupError):
            continue
    sessions.discard(os.getsid(0))
    for other in psutil.process_iter():
        try:
            if os.getsid(other.pid) in sessions:
                found.setdefault(other.pid, other)
        except (ProcessLookupError, PermissionError):
            continue
    return [p for p in found.values() if p.pid != os.getpid() and _runs(p)]


def _outliving(processes: list[psutil.Process], seconds: float) -> list[psutil.Process]:
    """Those that still run after so many seconds. A zombie does not: whether its parent looks is not our matter."""
    deadline = time.monotonic() + seconds
    while True:
        processes = [process for process in processes if _runs(process)]
        if not processes or time.monotonic() > deadline:
            return processes
        time.sleep(0.1)


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _lost_child(process: Process, zombies: dict[int, float]) -> bool:
    """Whether a component of ``airflow standalone`` has ended: it does not mind, and leaves a zombie that stays.

    ``zombies`` remembers from call to call since when each zombie has been one, since passing ones are harmless.
    """
    now = time.monotonic()
    try:
        for child in psutil.Process(process.pid).children():
            if child.status() == psutil.STATUS_ZOMBIE and now - zombies.setdefault(child.pid, now) > 5:
                return True
    except psutil.NoSuchProcess:
        pass
    return False


def _airflow_trouble(url: str) -> str:
    try:
        health = AirflowApi(url, "", "", timeout=10).health()
    except BreakhisError as error:
        return str(error)
    sick = [name for name in _COMPONENTS if (health.get(name) or {}).get("status") != "healthy"]
    return f"not healthy: {', '.join(sick)}" if sick else ""


def _mlflow_trouble(url: str) -> str:
    try:
        with requests.Session() as session:
            session.trust_env = False  # no proxy between us and ourselves
            answer = session.get(f"{url}/health", timeout=10)
    except requests.RequestException as error:
        return f"{url} does not answer: {type(error).__name__}"
    return "" if answer.status_code == 200 else f"{url}/health answered {answer.status_code}"


_TROUBLE: dict[str, Callable[[str], str]] = {"mlflow": _mlflow_trouble, "airflow": _airflow_trouble}


def _tail(log: Path, lines: int = 15) -> str:
    last = log.read_text(errors="replace").splitlines()[-lines:] if log.exists() else []
    return "\n".join([f"The end of {log}:", *(f"  {line}" for line in last)])


def _tags(dag: Json) -> set[str]:
    return {tag["name"] for tag in dag["tags"]}


def _since(stamp: str | None, start: datetime) -> bool:
    return bool(stamp) and datetime.fromisoformat(str(stamp)) >= start


def _absolute_weights(weights: str) -> str:
    """Servers have another working folder, so a relative path is made absolute."""
    if weights in {"imagenet", "random"} or "://" in weights:
        return weights
    return str(Path(weights).expanduser().resolve())


def _kept_secrets(path: Path, makers: dict[str, Callable[[], str]]) -> dict[str, str]:
    """The secrets in a file only its owner can read; those that are missing are made and kept."""
    try:
        kept = json.loads(path.read_text())
    except FileNotFoundError:
        kept = {}
    except ValueError:
        raise StackError(f"{path} is damaged; remove it, and new passwords will be made") from None
    missing = {name: make() for name, make in makers.items() if name not in kept}
    if missing:
        kept |= missing
        scratch = path.with_suffix(".new")
        scratch.unlink(missing_ok=True)
        with os.fdopen(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            json.dump(kept, file, indent=1)
        scratch.replace(path)
    return {name: str(value) for name, value in kept.items()}


def _password() -> str:
    alphabet = "abcdefghkmnpqrstuvwxyzABCDEFGHKMNPQRSTUVWXYZ23456789"  # nothing that looks like something else
    return "".join(secrets.choice(alphabet) for _ in range(16))


def _token() -> str:
    return secrets.token_urlsafe(48)
