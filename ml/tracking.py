"""The way to MLflow: one place that says where it is and turns its errors into ours."""

import logging
import os
from typing import TYPE_CHECKING

from ml.settings import Settings

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
