"""What a stage finds of an Airflow connection in its environment."""

from typing import Any, NamedTuple

from airflow.sdk import BaseHook
from airflow.sdk.exceptions import AirflowFailException, AirflowNotFoundException

from ml.data.sources.spec import S3_KEY_VARIABLES

STORE, MLFLOW, AIRFLOW = "breakhis_store", "breakhis_mlflow", "breakhis_airflow"
PROMOTER, AUDIT = "breakhis_mlflow_promoter", "breakhis_audit"


class Given(NamedTuple):
    """A connection as a stage gets it."""

    environment: dict[str, str]
    secrets: list[str]
    """The values that must not show anywhere."""


def read_connection(connection_id: str, stage: str) -> Given:
    """Fetch a connection for a stage. Any that is not ours by name is a source's, and means what its type says.

    Raises:
        AirflowFailException: there is no such connection, or stages have no use for one of that name.
    """
    meaning = _MEANING.get(connection_id) or (_of_source if stage == "fetch" else None)
    if not meaning:
        raise AirflowFailException(
            f"stage {stage}: no stage uses a connection {connection_id!r} (BREAKHIS_CONNECTIONS); there are: "
            + ", ".join(_MEANING)
        )
    try:
        connection = BaseHook.get_connection(connection_id)
    except AirflowNotFoundException:
        raise AirflowFailException(
            f"stage {stage} needs the Airflow connection {connection_id!r} and there is none: an administrator adds it "
            f"under Admin > Connections ({_HOW.get(connection_id, _HOW_SOURCE)})"
        ) from None
    values = {name: value for name, value in meaning(connection).items() if value is not None}
    return Given(values, [connection.password] if connection.password else [])


def _store(connection: Any) -> dict[str, str | None]:
    extra = connection.extra_dejson
    return {
        "AWS_ACCESS_KEY_ID": connection.login or None,
        "AWS_SECRET_ACCESS_KEY": connection.password or None,
        "AWS_ENDPOINT_URL": extra.get("endpoint_url"),
        "AWS_DEFAULT_REGION": extra.get("region_name"),
    }


def _mlflow(connection: Any) -> dict[str, str | None]:
    """Of the trainer or, of a stage that decides, the promoter: what is fetched last holds."""
    return {
        "MLFLOW_TRACKING_USERNAME": connection.login or None,
        "MLFLOW_TRACKING_PASSWORD": connection.password or None,
    }


def _airflow(connection: Any) -> dict[str, str | None]:
    return {
        "BREAKHIS_AIRFLOW_URL": _address(connection),
        "BREAKHIS_AIRFLOW_USER": connection.login or "",
        "BREAKHIS_AIRFLOW_PASSWORD": connection.password or "",
    }


def _audit(connection: Any) -> dict[str, str | None]:
    return {"BREAKHIS_AUDIT_KEY": connection.password or ""}


def _of_source(connection: Any) -> dict[str, str | None]:
    if connection.conn_type == "aws":
        return dict(zip(S3_KEY_VARIABLES, (connection.login or None, connection.password or None), strict=True))
    if connection.login:
        return {"KAGGLE_USERNAME": connection.login, "KAGGLE_KEY": connection.password or None}
    return {"KAGGLE_API_TOKEN": connection.password or None}


def _address(connection: Any) -> str:
    """The URL in an HTTP connection, written in any of the ways that Airflow's HTTP hook reads."""
    host = connection.host or "localhost"
    if "://" not in host:
        scheme = connection.schema or (connection.conn_type if connection.conn_type == "https" else "http")
        host = f"{scheme}://{host}"
    return f"{host}:{connection.port}" if connection.port else host


_MEANING = {STORE: _store, MLFLOW: _mlflow, PROMOTER: _mlflow, AIRFLOW: _airflow, AUDIT: _audit}
_HOW = {
    STORE: "type aws, login and password being the key and its secret, endpoint_url in the extra",
    MLFLOW: "type http, login and password of the user that trainings log as",
    PROMOTER: "type http, login and password of the one user that may change MLflow's registry",
    AIRFLOW: "type http, host, port, login and password",
    AUDIT: "type generic, the password being the key of the audit log",
}
_HOW_SOURCE = (
    "for S3: type aws, login and password being the key and its secret; for Kaggle: type generic, the password being "
    "an API token, or login and password a user's name and key"
)
