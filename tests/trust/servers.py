"""Servers that the attempts start for themselves."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import requests

from ml.local.ports import free_ports


@contextmanager
def mlflow_server(folder: Path, *options: str, environment: Mapping[str, str] | None = None) -> Iterator[str]:
    """An MLflow server on SQLite; yields its address."""
    own = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with free_ports(0) as (port,), (folder / "mlflow.log").open("wb") as log:
        address = f"http://127.0.0.1:{port}"
        command = [
            *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "2"),
            *("--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}", "--no-serve-artifacts"),
            *("--default-artifact-root", (folder / "mlartifacts").as_uri(), *options),
        ]
        server = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=own | dict(environment or {}), start_new_session=True
        )
        try:
            _wait_until_healthy(address, server, folder)
            yield address
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(timeout=30)


def _wait_until_healthy(address: str, server: subprocess.Popen[bytes], folder: Path) -> None:
    for _ in range(240):
        with suppress(requests.RequestException):
            if requests.get(f"{address}/health", timeout=5).ok:
                return
        if server.poll() is not None:
            break
        time.sleep(0.5)
    raise RuntimeError(f"MLflow did not start: {(folder / 'mlflow.log').read_text()[-3000:]}")
