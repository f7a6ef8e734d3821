"""Checks the address of MLflow, which itself takes any text for one and tells a wrong one late or as something else."""

import re
from pathlib import Path
from urllib.parse import urlsplit

from ml.core.errors import ConfigError
from ml.core.messages import cut_text, hide_access, quote_value

_SERVERS = frozenset({"http", "https"})
_DATABASES = frozenset({"postgresql", "mysql", "mssql"})


def check_address(address: str) -> Path | None:
    """Checks that an address can be that of an MLflow server or of its database.

    Args:
        address: the setting ``mlflow_uri``.

    Returns:
        The file of a SQLite database, which need not exist; None for any other address.

    Raises:
        ConfigError: it cannot; the message names the setting and says what is right.
    """
    scheme, _, rest = address.partition(":")
    engine = scheme.partition("+")[0]
    if scheme in _SERVERS:
        _check_server(address)
    elif engine == "sqlite":
        return _find_file(address, rest)
    elif engine in _DATABASES:
        _check_driver(address)
    elif engine == "file" or "/" in scheme or not rest:
        raise _refuse(address, "it is no server and no database (MLflow 3 keeps nothing in folders)")
    else:
        raise _refuse(address, f"MLflow cannot be asked by {quote_value(scheme, 40)}")
    return None


def _check_server(address: str) -> None:
    if re.search(r"[\s\x00-\x1f\x7f]", address):
        raise _refuse(address, "an address has no blanks")
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        # Of a port that is none, the error quotes what may be a part of a password.
        raise _refuse(address, "it has no valid port" if "ort " in str(error) else cut_text(error)) from None
    if not address.partition(":")[2].startswith("//") or not host:
        raise _refuse(address, "it names no host")
    if port == 0:
        raise _refuse(address, "it has no valid port")


def _find_file(address: str, rest: str) -> Path:
    name = rest.removeprefix("///").partition("?")[0]
    if not rest.startswith("///") or name in {"", ":memory:"}:
        raise _refuse(address, "it names no file")
    file = Path(name)
    if file.exists() and not file.is_file():
        raise _refuse(address, f"{name} is {'a folder' if file.is_dir() else 'no ordinary file'}")
    return file


def _check_driver(address: str) -> None:
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        url = make_url(address)
    except (ArgumentError, ValueError):
        raise _refuse(address, "no host, port and database can be read from it") from None
    try:
        url.get_dialect().import_dbapi()
    except (ArgumentError, ImportError) as error:
        raise _refuse(address, f"the driver of this database is not installed ({cut_text(error)})") from None


def _refuse(address: str, fault: str) -> ConfigError:
    # A password may hold what ends an address, so all until the last @ is hidden.
    shown = hide_access(re.sub(r"//.*@", "//…@", address, flags=re.DOTALL))
    return ConfigError(
        f"BREAKHIS_MLFLOW_URI (or MLFLOW_TRACKING_URI) is {quote_value(shown)}: {fault}; say http://HOST:PORT of an "
        "MLflow server, or sqlite:////PATH/mlflow.db"
    )
