"""Access to MLflow: the client for the configured address, artifacts and experiments."""

import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ml.core.disks import explain_os_error
from ml.core.errors import BreakhisError, ConfigError, CredentialsError, TryAgain
from ml.core.messages import cut_text, hide_access
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
        ConfigError: the home folder was moved, so its database names files that are no longer there; or a database on
            this machine is damaged.
    """
    if settings.mlflow_uri == database_uri(settings.home):
        check_files(settings.home)
    if settings.mlflow_uri.startswith(_SQLITE):
        check_database(Path(settings.mlflow_uri.removeprefix(_SQLITE)))
    for name, value in _CLIENT_SETTINGS.items():
        os.environ.setdefault(name, value)
    import mlflow

    for name in ("alembic", "mlflow.store.db.utils", "mlflow.tracking.fluent", "mlflow.utils.environment"):
        logging.getLogger(name).setLevel(logging.ERROR)
    mlflow.set_tracking_uri(settings.mlflow_uri)
    mlflow.set_registry_uri(settings.mlflow_uri)
    return mlflow.tracking.MlflowClient(settings.mlflow_uri, settings.mlflow_uri)


def find_outage(error: Exception) -> BreakhisError | None:
    """Returns our error where MLflow could not be asked at all, so that an outage is not told as something missing.

    Args:
        error: what MLflow's client raised.

    Returns:
        TryAgain where the server is down or busy, CredentialsError where it refuses the login, ConfigError where the
        address is another server's, its database is damaged, or a disk of this machine cannot be written; None where
        MLflow has answered, for instance that there is no such run.
    """
    import mlflow

    if disk := explain_os_error(error):
        return disk
    # The address may have a password in it, and MLflow's client repeats the address.
    server = f"MLflow at {hide_access(mlflow.get_tracking_uri())}"
    code, text = getattr(error, "error_code", ""), hide_access(error)
    if code in {"UNAUTHENTICATED", "PERMISSION_DENIED"}:
        return CredentialsError(f"{server} refuses the login ({code}); check MLFLOW_TRACKING_USERNAME and its password")
    if database := _explain_database(text, mlflow.get_tracking_uri()):
        return database
    if code in {"TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED"} or text.startswith("API request to http"):
        # MLflow's client makes one kind of error of a closed port, a time-out and an answer of 5xx after its retries.
        cause = cut_text(text.rpartition("Caused by ")[2].strip("()"))
        return TryAgain(f"{server} cannot be reached or answers errors: {cause}; is it running?")
    return _explain_other_server(error, server)


def _explain_other_server(error: Exception, server: str) -> BreakhisError | None:
    """Returns our error where something answers that is no MLflow, or stands before it; None where MLflow answers."""
    from mlflow.protos.databricks_pb2 import ErrorCode

    kind, code, text = type(error).__name__, getattr(error, "error_code", ""), hide_access(error)
    if code == "ENDPOINT_NOT_FOUND" or "not in a valid JSON format" in text or kind == "ParseError":
        return ConfigError(f"{server}: that is no MLflow server; correct BREAKHIS_MLFLOW_URI")
    if kind == "UnsupportedModelRegistryStoreURIException":
        return ConfigError(f"{server}: MLflow knows no such address; say http://… in BREAKHIS_MLFLOW_URI")
    if kind == "RestException" and (code == "INTERNAL_ERROR" or code not in ErrorCode.keys()):  # noqa: SIM118 (no mapping)
        # A gateway that wants a login answers in JSON of its own, to which MLflow's client gives this code.
        return TryAgain(f"{server} answers with an error: {cut_text(text)}; see what stands before it, or to its log")
    return None


def _explain_database(text: str, uri: str) -> ConfigError | None:
    """Returns our error where a message has a fault that SQLite finds with its file."""
    if fault := next((fault for fault in DAMAGE if fault in text), None):
        return ConfigError(explain_damage(uri.removeprefix(_SQLITE), fault))
    if fault := next((fault for fault in _DATABASE_FAULTS if fault in text), None):
        return ConfigError(f"MLflow at {uri}: {fault}; see to the disk that it is on, and to who may write there")
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
    if known and known.lifecycle_stage == "deleted":
        raise ConfigError(
            f"the experiment {name} was deleted in MLflow at {mlflow.get_tracking_uri()}, and its name stays taken; "
            f"restore it with: mlflow experiments restore --experiment-id {known.experiment_id}"
        )
    if known is None and not settings.mlflow_uri.startswith("http"):
        with suppress(MlflowException):  # another process has created it in between
            client.create_experiment(name, artifact_location=(settings.home / ARTIFACTS).as_uri())
    experiment_id = str(mlflow.set_experiment(name).experiment_id)
    # By id once more: where another process creates it in between, MLflow returns it without making it the active one.
    mlflow.set_experiment(experiment_id=experiment_id)
    return experiment_id
