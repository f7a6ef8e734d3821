"""The way to MLflow: one place that says where it is and turns its errors into ours."""

import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ml.core.settings import Settings

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient


def connect(settings: Settings) -> "MlflowClient":
    """Point MLflow at the configured server or database and return a client."""
    # Our runs log many small files, each with a bar of its own; and the model's requirements are ours to say, not those
    # of whatever uv project the process happens to be started in.
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_UV_AUTO_DETECT", "false")
    import mlflow

    for name in ("alembic", "mlflow.store.db.utils", "mlflow.tracking.fluent", "mlflow.utils.environment"):
        logging.getLogger(name).setLevel(logging.ERROR)
    mlflow.set_tracking_uri(settings.mlflow_uri)
    mlflow.set_registry_uri(settings.mlflow_uri)
    return mlflow.tracking.MlflowClient(settings.mlflow_uri, settings.mlflow_uri)


def fetch_artifacts(uri: str, folder: Path | None) -> Path:
    """Artifacts, by a URI of MLflow's, put into a folder of the caller's; where in it they lie.

    Without a folder MLflow puts them where nobody removes them, unless they lie on a disk: then that is where.

    Raises:
        MlflowException, OSError: they cannot be had.
    """
    import mlflow

    return Path(mlflow.artifacts.download_artifacts(uri, dst_path=str(folder) if folder else None))


def use_experiment(name: str, settings: Settings) -> str:
    """Make an experiment the one that runs are started in, and return its id.

    Without a server in between MLflow would put the artifacts of a new one below the folder that this process happens
    to be started in; they belong beside the database.
    """
    client = connect(settings)
    import mlflow
    from mlflow.exceptions import MlflowException

    if not settings.mlflow_uri.startswith("http") and client.get_experiment_by_name(name) is None:
        with suppress(MlflowException):  # another process has made it in between
            client.create_experiment(name, artifact_location=(settings.home / "mlartifacts").as_uri())
    return str(mlflow.set_experiment(name).experiment_id)
