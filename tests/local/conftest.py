"""Settings of a local stack in a folder of its own, and processes that are gone after the test."""

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from ml.core.settings import Settings


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    for name in [name for name in os.environ if name.startswith(("BREAKHIS_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    conf = tmp_path / "conf"
    for folder in ("sources", "training_sets", "policies"):
        (conf / folder).mkdir(parents=True)
    return Settings(home=tmp_path / "home", conf=conf)


@pytest.fixture
def children() -> Iterator[list[subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for child in started:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
