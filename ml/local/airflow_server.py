"""The local Airflow server: its environment, its health, its pools and the DAGs that it has to find."""

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from ml.core.airflow_api import AirflowApi
from ml.core.errors import BreakhisError, ConfigError, TryAgain
from ml.core.settings import PROJECT, Settings
from ml.core.yaml_files import read_mapping
from ml.data.sources import load_source, source_files
from ml.data.training_sets import load_training_set, training_set_files
from ml.local.accounts import PASSWORDS_FILE, SERVICE_USER, list_users, read_keys, read_passwords
from ml.local.gpus import count_gpu_slots
from ml.local.mlflow_users import PROMOTER, TRAINER
from ml.local.ports import HOST
from ml.promotion.reviews import PROMOTE, ROLLBACK, WITHDRAW

Json = dict[str, Any]

DAGS = PROJECT / "dags"
PLUGINS = PROJECT / "plugins"

POOLS = {
    "gpu": "Trainings at a time: one per GPU; two on a machine without",
    "promotion": "Promotions change the registry one after the other",
}
"""The pools that tasks name, with their descriptions. A task whose pool is missing is scheduled and never starts."""

_SECONDS_TO_SET_POOLS = 300.0
_SECONDS_TO_PARSE = 120.0
_COMPONENTS = ("metadatabase", "scheduler", "dag_processor", "triggerer")


def make_airflow_environment(
    settings: Settings, airflow_url: str, mlflow_url: str, log_ports: Sequence[int]
) -> dict[str, str]:
    """Returns the environment of Airflow and, through it, of the stages.

    Args:
        settings: of the stack.
        airflow_url: where Airflow will answer.
        mlflow_url: where MLflow will answer.
        log_ports: the ports of Airflow's two log servers, the worker's and the triggerer's.
    """
    # Settings of another Airflow on this machine, and credentials of somebody else, are not for this one.
    foreign = ("AIRFLOW", "BREAKHIS_AIRFLOW_", "MLFLOW_TRACKING_", "MLFLOW_AUTH_")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    no_proxy = ",".join(filter(None, (os.environ.get("NO_PROXY") or os.environ.get("no_proxy"), HOST, "localhost")))
    return {
        **inherited,
        **make_breakhis_environment(settings, mlflow_url),
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
        **_make_airflow_settings(settings, airflow_url, log_ports),
    }


def make_breakhis_environment(settings: Settings, mlflow_url: str) -> dict[str, str]:
    """Returns the BREAKHIS_* variables that tasks get: the caller's, and all that tells them of this stack."""
    values = {name: value for name, value in os.environ.items() if name.startswith("BREAKHIS_")}
    values = {name: value for name, value in values.items() if not name.startswith("BREAKHIS_AIRFLOW_")}
    values |= {
        "BREAKHIS_HOME": str(settings.home),
        "BREAKHIS_STORE": settings.store,
        "BREAKHIS_CONF": str(settings.conf),
        "BREAKHIS_TRAINING_SETS": os.pathsep.join(str(path) for path in settings.training_sets),
        "BREAKHIS_WEIGHTS": _make_path_absolute(settings.weights),
        "BREAKHIS_MLFLOW_URI": mlflow_url,
        "BREAKHIS_MLFLOW_UI": mlflow_url,
        "BREAKHIS_CONNECTIONS": ",".join(dict.fromkeys([*settings.connections, "breakhis_mlflow"])),
    }
    if settings.gpus is not None:
        values["BREAKHIS_GPUS"] = str(settings.gpus)
    return values


def _make_airflow_settings(settings: Settings, airflow_url: str, log_ports: Sequence[int]) -> dict[str, str]:
    """Returns Airflow's own settings, and its connections with the passwords that stages are given."""
    keys, passwords = read_keys(settings), read_passwords(settings)
    airflow_home = settings.home / "airflow"
    airflow_home.mkdir(exist_ok=True)
    service = {
        "conn_type": "http",
        "host": airflow_url,
        "login": SERVICE_USER,
        "password": passwords[SERVICE_USER],
    }
    return {
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
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_USERS": ",".join(f"{n}:{role}" for n, role in list_users(settings).items()),
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE": str(settings.home / PASSWORDS_FILE),
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{airflow_home / 'airflow.db'}",
        "AIRFLOW__API__HOST": HOST,
        "AIRFLOW__API__PORT": airflow_url.rpartition(":")[2],
        "AIRFLOW__API__BASE_URL": airflow_url,
        "AIRFLOW__API__SECRET_KEY": keys["api"],
        "AIRFLOW__API_AUTH__JWT_SECRET": keys["jwt"],
        "AIRFLOW__LOGGING__COLORED_CONSOLE_LOG": "False",
        "AIRFLOW__LOGGING__WORKER_LOG_SERVER_PORT": str(log_ports[0]),
        "AIRFLOW__LOGGING__TRIGGER_LOG_SERVER_PORT": str(log_ports[1]),
        # The default is 5 s. For so long a task waits that could start, and an answer to a review is lost that comes
        # while Airflow is still putting the review's task to wait.
        "AIRFLOW__SCHEDULER__SCHEDULER_HEARTBEAT_SEC": "1",
        "AIRFLOW__USAGE_DATA_COLLECTION__ENABLED": "False",
    }


def set_pools(settings: Settings, api: AirflowApi) -> None:
    """Sets the sizes of Airflow's pools ``gpu`` and ``promotion``; ``api`` has to be its administrator's.

    Raises:
        TryAgain: Airflow has been too busy for five minutes.
    """
    slots = {"gpu": count_gpu_slots(settings), "promotion": 1}
    deadline = time.monotonic() + _SECONDS_TO_SET_POOLS
    while True:
        try:
            for name, description in POOLS.items():
                api.set_pool(name, slots[name], description)
            return
        except TryAgain:  # on SQLite, an Airflow that has just started can find its database locked
            if time.monotonic() > deadline:
                raise
            time.sleep(1)


def find_pool_trouble(api: AirflowApi) -> str:
    """Returns which pools are missing or have no slot, and what to do; an empty text if tasks can start in all.

    Raises what :class:`AirflowApi` does.
    """
    slots = {pool["name"]: pool["slots"] for pool in api.pools()}
    unusable = [name for name in POOLS if not slots.get(name)]
    if not unusable:
        return ""
    found = ", ".join(f"{name} ({'no slot' if name in slots else 'missing'})" for name in unusable)
    return (
        f"pools in which no task can start: {found}; tasks that name them wait for ever. Make them in Airflow under "
        "Admin > Pools, with a slot or more (promotion: one); for a local stack: breakhis down, then breakhis up"
    )


def check_dags(settings: Settings, api: AirflowApi, started: datetime) -> list[str]:
    """Waits until Airflow has parsed its DAG files, and returns what is wrong with them.

    Args:
        settings: of the stack; the YAML files that they name tell which DAGs there have to be.
        api: Airflow's, as its administrator.
        started: when the servers were started. What Airflow parsed before that does not count.

    Returns:
        One text a problem: a DAG file that does not import, a DAG that is missing, or a YAML file that cannot be used.
    """
    expected, problems = find_expected_dags(settings)
    deadline = time.monotonic() + _SECONDS_TO_PARSE
    broken_since = None
    while True:
        parsed = {dag["dag_id"]: dag for dag in api.dags() if _is_since(dag.get("last_parsed_time"), started)}
        errors = [error for error in api.import_errors() if _is_since(error.get("timestamp"), started)]
        missing = sorted(expected - parsed.keys())
        if not missing and not errors:
            # A YAML file that cannot be used has a DAG all the same, whose description says why.
            invalid = [dag["description"] for dag in parsed.values() if "invalid" in _read_tags(dag)]
            return list(dict.fromkeys([*problems, *invalid]))
        now = time.monotonic()
        broken_since = broken_since or (now if errors else None)
        # A file with an error may have been half written. It is reported if the error stays for ten seconds.
        if now > deadline or (broken_since and now > broken_since + 10):
            problems += [f"{error['filename']} does not import: {error['stack_trace'].strip()}" for error in errors]
            if missing:
                problems.append(f"these DAGs are missing: {', '.join(missing)}")
            return problems
        time.sleep(1)


def find_expected_dags(settings: Settings) -> tuple[set[str], list[str]]:
    """Returns the ids of the DAGs that the YAML files declare, and what is wrong with these files, a text a problem."""
    ids = {PROMOTE, ROLLBACK, WITHDRAW, "audit", "remind"}
    problems = []

    def collect(list_files: Callable[[], Iterable[Path]], read_dag_id: Callable[[Path], str]) -> None:
        try:
            for path in list_files():
                try:
                    ids.add(read_dag_id(path))
                except BreakhisError as error:
                    problems.append(str(error))
        except ConfigError as error:
            problems.append(str(error))

    collect(lambda: source_files(settings), lambda path: f"ingest_{load_source(path, settings.conf).name}")
    collect(
        lambda: training_set_files(settings), lambda path: f"retrain_{load_training_set(str(path), settings.conf).name}"
    )
    try:
        if read_mapping(settings.conf / "notifications.yaml", optional=True).texts().get("on_failure"):
            ids.add("try_notifications")
    except ConfigError as error:
        problems.append(str(error))
    return ids, list(dict.fromkeys(problems))


def find_airflow_trouble(url: str) -> str:
    """Returns what is wrong with Airflow's components at this address; an empty text if all are healthy."""
    try:
        health = AirflowApi(url, "", "", timeout=10).health()
    except BreakhisError as error:
        return str(error)
    unhealthy = [name for name in _COMPONENTS if (health.get(name) or {}).get("status") != "healthy"]
    return f"not healthy: {', '.join(unhealthy)}" if unhealthy else ""


def _read_tags(dag: Json) -> set[str]:
    return {tag["name"] for tag in dag["tags"]}


def _is_since(timestamp: str | None, start: datetime) -> bool:
    return bool(timestamp) and datetime.fromisoformat(str(timestamp)) >= start


def _make_path_absolute(weights: str) -> str:
    """Returns the value of BREAKHIS_WEIGHTS with a path made absolute, since servers have another working folder."""
    if weights in {"imagenet", "random"} or "://" in weights:
        return weights
    return str(Path(weights).expanduser().resolve())
