"""A store, and a stand-in for the command ``breakhis`` that runs a script of the test's."""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ml.core.store import Store

FAKE = """#!{python}
import json, os, signal, subprocess, sys, time
arguments = sys.argv[1:]
def write(result):
    path = arguments[arguments.index("--result") + 1].removeprefix("file://")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w") as file:
        json.dump(result, file)
def say(line):
    print(line, file=sys.stderr, flush=True)
{script}
"""


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """An empty store, which the settings name."""
    monkeypatch.setenv("BREAKHIS_STORE", (tmp_path / "store").as_uri())
    return Store((tmp_path / "store").as_uri())


@pytest.fixture
def breakhis(tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch):
    """Installs a Python script as ``breakhis``. The script can use write(result), say(line) and arguments."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def install(script: str) -> None:
        command = folder / "breakhis"
        command.write_text(FAKE.format(python=sys.executable, script=script))
        command.chmod(0o755)

    return install


class Task(SimpleNamespace):
    """What an operator uses of a task instance, and what it pushed."""

    def xcom_push(self, key: str, value: Any) -> None:
        self.pushed[key] = json.loads(json.dumps(value))


@pytest.fixture
def context():
    """The context of a task run; ``context["ti"].pushed`` has its XComs. Call it for another try."""

    def make(number: int = 1) -> dict[str, Any]:
        names = {"dag_id": "a_dag", "run_id": "manual__2026-11-22T21:00:00+00:00", "task_id": "a_task"}
        ti = Task(**names, try_number=1, id=f"id-{number}", pushed={})
        events: dict[Any, Any] = {}
        return {"ti": ti, "outlet_events": events}

    return make
