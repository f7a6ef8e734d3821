"""Access to MLflow: the client for the configured address, artifacts and experiments."""

import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ml.core.settings import Settings

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient


def connect(settings: Settings) -> "MlflowClient":
    """Points MLflow at the configured server or database and returns a client."""
    # A run logs many small files, and each would show a progress bar. And MLflow must not take a model's requirements
    # from the uv project that the process happens to be started in: this package states them.
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_UV_AUTO_DETECT", "false")
    import mlflow

    for name in ("alembic", "mlflow.store.db.utils", "mlflow.tracking.fluent", "mlflow.utils.environment"):
        logging.getLogger(name).setLevel(logging.ERROR)
    mlflow.set_tracking_uri(settings.mlflow_uri)
    mlflow.set_registry_uri(settings.mlflow_uri)
    return mlflow.tracking.MlflowClient(settings.mlflow_uri, settings.mlflow_uri)


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
    """
    client = connect(settings)
    import mlflow
    from mlflow.exceptions import MlflowException

    if not settings.mlflow_uri.startswith("http") and client.get_experiment_by_name(name) is None:
        with suppress(MlflowException):  # another process has created it in between
            client.create_experiment(name, artifact_location=(settings.home / "mlartifacts").as_uri())
    experiment_id = str(mlflow.set_experiment(name).experiment_id)
    # By id once more: where another process creates it in between, MLflow returns it without making it the active one.
    mlflow.set_experiment(experiment_id=experiment_id)
    return experiment_id
