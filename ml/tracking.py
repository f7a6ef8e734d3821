"""The way to MLflow: one place that says where it is and turns its errors into ours."""

from typing import TYPE_CHECKING

from ml.settings import Settings

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient


def connect(settings: Settings) -> "MlflowClient":
    """Point MLflow at the configured server or database and return a client."""
    import logging

    import mlflow

    # Schema migrations of a fresh SQLite file are told at INFO, a hundred lines of them.
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
    mlflow.set_tracking_uri(settings.mlflow_uri)
    mlflow.set_registry_uri(settings.mlflow_uri)
    return mlflow.tracking.MlflowClient(settings.mlflow_uri, settings.mlflow_uri)
