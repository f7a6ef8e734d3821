import os

import pytest

from ml.core.errors import ConfigError
from ml.core.mlflow_address import check_address
from ml.core.mlflow_client import connect
from ml.core.settings import Settings


@pytest.mark.parametrize(
    ("address", "fault"),
    [
        ("http://a b", "no blanks"),
        (" http://a", "cannot be asked by"),
        ("http://a\n", "no blanks"),
        ("http://127.0.0.1:99999", "no valid port"),
        ("http://127.0.0.1:0", "no valid port"),
        ("http://a:b", "no valid port"),
        ("http://", "names no host"),
        ("http:", "names no host"),
        ("http:a", "names no host"),
        ("http://[::1", "Invalid IPv6"),
        ("HTTP://a", "cannot be asked by 'HTTP'"),
        ("databricks", "in folders"),
        ("databricks://profile", "cannot be asked by 'databricks'"),
        ("uc:x", "cannot be asked by 'uc'"),
        ("localhost:5000", "cannot be asked by 'localhost'"),
        ("ftp://host", "cannot be asked by 'ftp'"),
        ("file:///tmp/mlruns", "in folders"),
        ("/tmp/mlruns", "in folders"),
        ("mlruns", "in folders"),
        ("", "in folders"),
        ("sqlite:x", "names no file"),
        ("sqlite://", "names no file"),
        ("sqlite:///", "names no file"),
        ("sqlite:///:memory:", "names no file"),
        ("sqlite:////", "is a folder"),
        ("sqlite:////dev/null", "no ordinary file"),
        ("mysql://host/mlflow", "driver of this database is not installed"),
        ("postgresql+odd://host/mlflow", "driver of this database is not installed"),
        ("postgresql://host:port/mlflow", "no host, port and database"),
    ],
)
def test_a_wrong_address_is_told_before_mlflow_is_asked(address, fault):
    with pytest.raises(ConfigError, match=rf"BREAKHIS_MLFLOW_URI.*{fault}.*; say http://HOST:PORT"):
        check_address(address)


@pytest.mark.parametrize("address", ["http://me:s3cr/et@host:x", "http://me:s3 cret@host", "uc://me:s3#cret@host"])
def test_a_wrong_address_shows_no_password(address):
    with pytest.raises(ConfigError) as error:
        check_address(address)
    assert "s3" not in str(error.value)
    assert "cret" not in str(error.value)


@pytest.mark.parametrize(
    "address",
    ["http://localhost:5000", "https://me:planted@mlflow.example/path", "http://[::1]:5000/", "http://é.example"],
)
def test_addresses_of_servers(address):
    assert check_address(address) is None


def test_addresses_of_databases(tmp_path):
    file = tmp_path / "a folder" / "mlflow.db"
    for scheme in ("sqlite", "sqlite+pysqlite"):
        assert check_address(f"{scheme}:///{file}") == file


def test_connecting_checks_the_address(tmp_path):
    with pytest.raises(ConfigError, match="is a folder"):
        connect(Settings(home=tmp_path, mlflow_uri=f"sqlite:///{tmp_path}"))
    other = tmp_path / "text"
    other.write_text("no database\n" * 500)
    with pytest.raises(ConfigError, match="database is damaged"):
        connect(Settings(home=tmp_path, mlflow_uri=f"sqlite+pysqlite:///{other}"))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="no ordinary file"):
        connect(Settings(home=tmp_path, mlflow_uri=f"sqlite:///{tmp_path / 'pipe'}"))
