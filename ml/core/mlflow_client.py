"""Access to MLflow: the client for the configured address, artifacts and experiments."""

import logging
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ml.core.disks import explain_os_error
from ml.core.errors import BreakhisError, ConfigError, CredentialsError, TryAgain
from ml.core.messages import cut_text, hide_access
from ml.core.mlflow_address import check_address
from ml.core.mlflow_files import ARTIFACTS, DAMAGE, check_database, check_files, database_uri, explain_damage
from ml.core.settings import Settings

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

_CLIENT_SETTINGS = {
    # A run logs many small files, and each would show a progress bar.
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # MLflow must not take a model's requirements from the uv project that the process happens to be started in: this
    # package states them.
    "MLFLOW_UV_AUTO_DETECT": "false",
    # By default it retries in silence for four minutes, and for 16 a server that accepts and says nothing. These are
    # three tries within some 15 s, which a restart of the server takes, and 3 minutes of such silence. A longer outage
    # is told, and Airflow retries the task.
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "60",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "7",  # urllib3 waits 0 s before the first and 7 * 2 s before the second
}


_SQLITE = "sqlite:///"

_DATABASE_FAULTS = (
    "database or disk is full",
    "attempt to write a readonly database",
    "unable to open database file",
    "disk I/O error",
)


def connect(settings: Settings) -> "MlflowClient":
    """Points MLflow at the configured server or database and returns a client.

    Raises:
        ConfigError: the address is none of a server or a database; the home folder was moved, so its database names
            files that are no longer there; or a database on this machine is damaged.
    """
    database = check_address(settings.mlflow_uri)
    if settings.mlflow_uri == database_uri(settings.home):
        check_files(settings.home)
    if database:
        check_database(database)
    for name, value in _CLIENT_SETTINGS.items():
        os.environ.setdefault(name, value)
    import mlflow

    for name in ("alembic", "mlflow.store.db.utils", "mlflow.tracking.fluent", "mlflow.utils.environment"):
        logging.getLogger(name).setLevel(logging.ERROR)
    mlflow.set_tracking_uri(settings.mlflow_uri)
    mlflow.set_registry_uri(settings.mlflow_uri)
    return mlflow.tracking.MlflowClient(settings.mlflow_uri, settings.mlflow_uri)


def explain_absence(error: Exception, missing: BreakhisError) -> BreakhisError:
    """Returns our error where MLflow was asked for one run or version and has not given it.

    Args:
        error: what MLflow's client raised.
        missing: says that there is none. Only MLflow itself says so; all else is no answer to the question.
    """
    if getattr(error, "error_code", "") in _MISSING:
        return missing
    return find_outage(error) or _refuse_answer(error)


def require_answer(value: object) -> None:
    """Checks that an answer has a value: MLflow's client reads an empty answer as one in which all are empty.

    Raises:
        ConfigError: it has none, so something else than MLflow has answered.
    """
    if not value:
        raise _refuse_answer("an empty answer, or one about nothing that was asked")


def find_outage(error: Exception) -> BreakhisError | None:
    """Returns our error where MLflow could not be asked at all, so that an outage is not told as something missing.

    Args:
        error: what MLflow's client raised.

    Returns:
        TryAgain where the server or its database is down or busy, CredentialsError where it refuses the login,
        ConfigError where the address is another server's, its database is damaged, or a disk of this machine cannot
        be written; None where MLflow has answered, for instance that there is no such run.
    """
    if disk := explain_os_error(error):
        return disk
    server, code, text = _name_server(), getattr(error, "error_code", ""), hide_access(error)
    if code in {"UNAUTHENTICATED", "PERMISSION_DENIED", "CUSTOMER_UNAUTHORIZED"}:
        return CredentialsError(f"{server} refuses the login ({code}); check MLFLOW_TRACKING_USERNAME and its password")
    if database := _explain_database(text, server):
        return database
    if text.startswith("API request to http") and not any(fault in text for fault in _BAD_REDIRECTS):
        # MLflow's client makes one kind of error of a closed port, a time-out and an answer of 5xx after its retries.
        cause = cut_text(text.rpartition("Caused by ")[2].strip("()"))
        return TryAgain(f"{server} cannot be reached or answers errors: {cause}; is it running?")
    return _explain_status(error, server) or _explain_other_server(error)


_MISSING = frozenset({"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"})
"""Codes by which MLflow says that it has no such run, model, version or alias."""

_BAD_REDIRECTS = ("failed with exception Exceeded", "No connection adapters", "failed with exception Failed to parse")
"""What ``requests`` says of redirections that lead in circles, or to what is no web address."""

_STATUS = re.compile(r"API request to endpoint \S+ failed with error code (\d+) != ")
"""How MLflow's client tells the status of an answer that is no JSON object."""


def _name_server() -> str:
    """Returns what to call MLflow in messages. The address may have a password in it."""
    import mlflow

    return f"MLflow at {hide_access(mlflow.get_tracking_uri())}"


def _refuse_answer(answer: object) -> ConfigError:
    return ConfigError(
        f"{_name_server()} does not answer as MLflow does ({cut_text(hide_access(answer))}); correct "
        "BREAKHIS_MLFLOW_URI, or see to what stands before that server"
    )


def _explain_status(error: Exception, server: str) -> BreakhisError | None:
    """Returns our error for the status or code that a server answered with; None where it is MLflow's own answer."""
    from mlflow.exceptions import RestException
    from mlflow.protos.databricks_pb2 import ErrorCode

    code, text = getattr(error, "error_code", ""), hide_access(error)
    if told := _STATUS.match(text):
        status = int(told[1])
    elif isinstance(error, RestException):
        # A gateway that wants a login answers in JSON of its own, to which MLflow's client gives the code of a fault.
        status = error.get_http_status_code() if code in ErrorCode.keys() else 500  # noqa: SIM118 (no mapping)
    else:
        status = 503 if code in {"TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED"} else 0
    if status in {408, 429} or status >= 500:
        return TryAgain(f"{server} answers with an error: {cut_text(text)}; see what stands before it, or to its log")
    if status == 407:
        return CredentialsError(f"a proxy before {server} wants a login ({status}); see HTTPS_PROXY and HTTP_PROXY")
    return None


def _explain_other_server(error: Exception) -> BreakhisError | None:
    """Returns our error where something answers that is no MLflow; None where MLflow answers."""
    kind, code, text = type(error).__name__, getattr(error, "error_code", ""), str(error)
    is_strange = "not in a valid JSON format" in text or any(fault in text for fault in _BAD_REDIRECTS)
    if (
        is_strange
        or _STATUS.match(text)
        or code == "ENDPOINT_NOT_FOUND"
        or kind in {"ParseError", "InvalidUrlException"}
    ):
        return _refuse_answer(error)
    return None


def _explain_database(text: str, server: str) -> BreakhisError | None:
    """Returns our error where a message has a fault that SQLite finds with its file."""
    if fault := next((fault for fault in DAMAGE if fault in text), None):
        return ConfigError(explain_damage(server.removeprefix(f"MLflow at {_SQLITE}"), fault))
    if fault := next((fault for fault in _DATABASE_FAULTS if fault in text), None):
        return ConfigError(f"{server}: {fault}; see to the disk that it is on, and to who may write there")
    if "database is locked" in text:
        return TryAgain(f"{server}: the database is locked, since another process writes to it; try again")
    return None


def fetch_artifacts(uri: str, folder: Path | None) -> Path:
    """Downloads artifacts by their MLflow URI into ``folder`` and returns their path in it.

    Without a folder, artifacts on a local disk are used where they are, and MLflow downloads others to a temporary
    folder that nobody removes.

    Raises:
        MlflowException, OSError: the artifacts cannot be downloaded.
    """
    import mlflow

    return Path(mlflow.artifacts.download_artifacts(uri, dst_path=str(folder) if folder else None))


def use_experiment(name: str, settings: Settings) -> str:
    """Makes an experiment the active one, creating it if need be, and returns its id.

    Without a server MLflow would put the artifacts of a new experiment below the working directory of this process, so
    an experiment created here keeps them beside the database.

    Raises:
        ConfigError: the experiment was deleted.
    """
    client = connect(settings)
    import mlflow
    from mlflow.exceptions import MlflowException

    known = client.get_experiment_by_name(name)
    require_answer(known is None or known.name)
    if known and known.lifecycle_stage == "deleted":
        raise ConfigError(
            f"the experiment {name} was deleted in {_name_server()}, and its name stays taken; "
            f"restore it with: mlflow experiments restore --experiment-id {known.experiment_id}"
        )
    if known is None and not settings.mlflow_uri.startswith("http"):
        with suppress(MlflowException):  # another process has created it in between
            client.create_experiment(name, artifact_location=(settings.home / ARTIFACTS).as_uri())
    experiment_id = str(mlflow.set_experiment(name).experiment_id)
    # By id once more: where another process creates it in between, MLflow returns it without making it the active one.
    mlflow.set_experiment(experiment_id=experiment_id)
    return experiment_id
