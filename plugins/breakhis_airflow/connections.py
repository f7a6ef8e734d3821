"""Turns Airflow connections into the environment variables that stages get."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from airflow.sdk import BaseHook
from airflow.sdk.exceptions import AirflowFailException, AirflowNotFoundException
from airflow.sdk.log import mask_secret

from ml.data.sources.spec import S3_KEY_VARIABLES

STORE, MLFLOW, AIRFLOW = "breakhis_store", "breakhis_mlflow", "breakhis_airflow"
PROMOTER, AUDIT = "breakhis_mlflow_promoter", "breakhis_audit"


class ConnectionValues(NamedTuple):
    """An Airflow connection as a stage gets it."""

    environment: dict[str, str]
    secrets: list[str]
    """Values that must not appear in a log."""


def read_connection(connection_id: str, stage: str) -> ConnectionValues:
    """Returns what a connection means to a stage. One without a name of ours is a source's, and is read by its type.

    Raises:
        AirflowFailException: there is no such connection, or the stage has no use for one of that name.
    """
    read_values = _READERS.get(connection_id) or (_read_source if stage == "fetch" else None)
    if not read_values:
        raise AirflowFailException(
            f"stage {stage}: no stage uses a connection {connection_id!r} (BREAKHIS_CONNECTIONS); there are: "
            + ", ".join(_READERS)
        )
    try:
        connection = BaseHook.get_connection(connection_id)
    except AirflowNotFoundException:
        raise AirflowFailException(
            f"stage {stage} needs the Airflow connection {connection_id!r} and there is none: an administrator adds it "
            f"under Admin > Connections ({_INSTRUCTIONS.get(connection_id, _SOURCE_INSTRUCTIONS)})"
        ) from None
    values = {name: value for name, value in read_values(connection).items() if value is not None}
    return ConnectionValues(values, [connection.password] if connection.password else [])


def read_connections(connection_ids: Iterable[str], stage: str) -> ConnectionValues:
    """Returns what several connections mean to a stage, of which a later one overrides an earlier; masks their secrets.

    Raises:
        AirflowFailException: as :func:`read_connection`.
    """
    environment: dict[str, str] = {}
    secrets: list[str] = []
    for connection_id in dict.fromkeys(connection_ids):
        values = read_connection(connection_id, stage)
        for secret in values.secrets:
            mask_secret(secret)
        secrets += values.secrets
        environment |= values.environment
    return ConnectionValues(environment, secrets)


def _read_store(connection: Any) -> dict[str, str | None]:
    extra = connection.extra_dejson
    return {
        "AWS_ACCESS_KEY_ID": connection.login or None,
        "AWS_SECRET_ACCESS_KEY": connection.password or None,
        "AWS_ENDPOINT_URL": extra.get("endpoint_url"),
        "AWS_DEFAULT_REGION": extra.get("region_name"),
    }


def _read_mlflow(connection: Any) -> dict[str, str | None]:
    """Reads the trainer's credentials or, for a stage that decides, the promoter's: the last one fetched counts."""
    return {
        "MLFLOW_TRACKING_USERNAME": connection.login or None,
        "MLFLOW_TRACKING_PASSWORD": connection.password or None,
    }


def _read_airflow(connection: Any) -> dict[str, str | None]:
    return {
        "BREAKHIS_AIRFLOW_URL": _format_url(connection),
        "BREAKHIS_AIRFLOW_USER": connection.login or "",
        "BREAKHIS_AIRFLOW_PASSWORD": connection.password or "",
    }


def _read_audit(connection: Any) -> dict[str, str | None]:
    return {"BREAKHIS_AUDIT_KEY": connection.password or ""}


def _read_source(connection: Any) -> dict[str, str | None]:
    if connection.conn_type == "aws":
        return dict(zip(S3_KEY_VARIABLES, (connection.login or None, connection.password or None), strict=True))
    if connection.login:
        return {"KAGGLE_USERNAME": connection.login, "KAGGLE_KEY": connection.password or None}
    return {"KAGGLE_API_TOKEN": connection.password or None}


def _format_url(connection: Any) -> str:
    """Returns the URL of an HTTP connection, written in any of the ways that Airflow's HTTP hook reads."""
    host = connection.host or "localhost"
    if "://" not in host:
        scheme = connection.schema or (connection.conn_type if connection.conn_type == "https" else "http")
        host = f"{scheme}://{host}"
    return f"{host}:{connection.port}" if connection.port else host


_READERS = {
    STORE: _read_store,
    MLFLOW: _read_mlflow,
    PROMOTER: _read_mlflow,
    AIRFLOW: _read_airflow,
    AUDIT: _read_audit,
}
_INSTRUCTIONS = {
    STORE: "type aws, login and password being the key and its secret, endpoint_url in the extra",
    MLFLOW: "type http, login and password of the user that trainings log as",
    PROMOTER: "type http, login and password of the one user that may change MLflow's registry",
    AIRFLOW: "type http, host, port, login and password",
    AUDIT: "type generic, the password being the key of the audit log",
}
_SOURCE_INSTRUCTIONS = (
    "for S3: type aws, login and password being the key and its secret; for Kaggle: type generic, the password being "
    "an API token, or login and password a user's name and key"
)
