"""Environment and fixtures of all tests.

The environment is set before Airflow is first imported, since Airflow then reads its settings and makes its folder.
"""

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

if TYPE_CHECKING:
    from ml.core.store import Store

_LONGEST_MODULES = {"test_run.py", "test_resuming.py"}

PROJECT = Path(__file__).parents[1]

_scratch = tempfile.mkdtemp(prefix="breakhis-tests-")
atexit.register(shutil.rmtree, _scratch, ignore_errors=True)
# MLflow never removes its downloads from the temporary folder, so they are put in this one, which is removed at exit.
# Pytest's own folders stay where a developer would look for them after a failure.
os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())
tempfile.tempdir = os.environ["TMPDIR"] = _scratch
os.environ |= {
    "AIRFLOW_HOME": f"{_scratch}/airflow",
    "AIRFLOW__CORE__DAGS_FOLDER": str(PROJECT / "dags"),
    "AIRFLOW__CORE__PLUGINS_FOLDER": str(PROJECT / "plugins"),
    "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
    "AIRFLOW__USAGE_DATA_COLLECTION__ENABLED": "False",
}

# How long an example takes says how busy the machine is.
hypothesis.settings.register_profile(
    "untimed", hypothesis.settings.default, deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("untimed")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselects tests that need more than a machine with Python unless their environment variable is set."""
    needs = {
        "real": "BREAKHIS_REAL_SAMPLE",
        "docker": "BREAKHIS_E2E",
        "e2e": "BREAKHIS_PRODUCT",
        "replica": "BREAKHIS_REPLICA",
        "guide": "BREAKHIS_GUIDE",
        "gpu": "BREAKHIS_GPU",
    }
    lacking = [marker for marker, variable in needs.items() if variable not in os.environ]
    deselected = [item for item in items if any(item.get_closest_marker(marker) for marker in lacking)]
    if deselected:
        config.hook.pytest_deselected(items=deselected)
        items[:] = [item for item in items if item not in deselected]
    # The longest tests run first, so that no process is still running one after the others have ended.
    items.sort(key=lambda item: item.path.name not in _LONGEST_MODULES)


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """Starts an S3 server in this process and yields its address."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(params=["file", "s3"])
def any_store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> "Store":
    """Returns an empty store; the test runs once on disk and once on S3."""
    from ml.core.hashes import digest
    from ml.core.store import Store

    if request.param == "file":
        return Store((tmp_path / "store").as_uri())
    import boto3

    endpoint = request.getfixturevalue("s3_endpoint")
    for variable, value in {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(variable, value)
    bucket = f"bucket-{digest(str(tmp_path))[:20]}"
    boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket=bucket)
    return Store(f"s3://{bucket}/store")


@pytest.fixture(scope="session")
def fresh_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a database file with MLflow's tables, for tests to copy: MLflow's migrations take seconds."""
    from ml.core.mlflow_client import connect
    from ml.core.settings import Settings

    file = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    connect(Settings(mlflow_uri=f"sqlite:///{file}")).search_experiments()
    return file
