"""docs/add-a-data-source.md, followed literally in a fresh checkout: its commands, its clicks over Airflow's API."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from ml.core.settings import PROJECT, Settings
from ml.core.store import Store
from ml.local.stack import Stack

pytestmark = [pytest.mark.guide, pytest.mark.timeout(900)]

GUIDE = PROJECT / "docs" / "add-a-data-source.md"
OURS = "ingest_our-biopsies"
SHIPPED = ("ml", "plugins", "dags")
MAKE = '#!/bin/sh\n# "make up" without the set-up: the environment is that of the tests\nexec .venv/bin/breakhis "$@"\n'


def chapters() -> dict[str, str]:
    """The shell commands of each chapter, as one script, by the chapter's heading."""
    parts = re.split(r"^## \d+\. (.+)$", GUIDE.read_text(), flags=re.MULTILINE)[1:]
    return {
        title: "".join(re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL))
        for title, text in zip(parts[::2], parts[1::2], strict=True)
    }


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """A checkout, and a way to follow a chapter in it; whatever was started is stopped."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in SHIPPED:
        shutil.copytree(PROJECT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / ".venv").symlink_to(sys.prefix)
    tools = tmp_path_factory.mktemp("tools")
    (tools / "make").write_text(MAKE)
    (tools / "make").chmod(0o755)
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("AIRFLOW", "BREAKHIS_", "MLFLOW_"))}
    paths = {
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
        # The environment's own installation of the package is of the checkout that is tested from.
        "PYTHONPATH": os.pathsep.join((str(folder), str(folder / "plugins"))),
    }

    def shell(script: str) -> str:
        done = subprocess.run(
            ["bash", "-ec", script],
            cwd=folder,
            env=inherited | paths,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{script}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
        return done.stdout

    settings = Settings(home=folder / ".breakhis", conf=folder / "dags")
    made = SimpleNamespace(folder=folder, shell=shell, stack=Stack(settings), store=Store(settings.store))
    try:
        yield made
    finally:
        shell(".venv/bin/breakhis down")


def ingest(clone: SimpleNamespace, dag: str) -> tuple[str, dict[str, Any]]:
    """Press Trigger and wait; returns the run's state, and what each task returned."""
    api = clone.stack.api("engineer")
    deadline = time.monotonic() + 240
    while "ingest" not in {tag["name"] for one in api.dags() if one["dag_id"] == dag for tag in one["tags"]}:
        assert time.monotonic() < deadline, f"{dag} never came, or is invalid"
        time.sleep(1)
    run = api.trigger(dag)["dag_run_id"]
    while (state := api.dag_run(dag, run)["state"]) not in {"success", "failed"}:
        assert time.monotonic() < deadline, f"{dag} is {state}"
        time.sleep(1)
    done = [task["task_id"] for task in api.task_instances(dag, run) if task["state"] in {"success", "failed"}]
    return state, {task: api.xcom(dag, run, task) for task in done}


def test_the_guide_leads_to_a_green_run(clone):
    told = chapters()

    def follow(title: str) -> str:
        return clone.shell(told.pop(title))

    assert '"engineer"' in follow("Start Airflow")
    follow("Have some pictures")
    assert "our-biopsies" in follow("Write the source's YAML file")

    follow("See it run")
    state, first = ingest(clone, OURS)
    assert state == "success"
    assert first["publish"]["images"] == 158
    assert first["publish"]["quarantined"] == {"slide_with_two_subtypes": 6}
    assert first["publish"]["changed"]
    assert not ingest(clone, OURS)[1]["publish"]["changed"]

    follow("Break a few files")
    state, second = ingest(clone, OURS)
    assert state == "success"
    assert second["publish"]["quarantined"] == {"name": 1, "slide_with_two_subtypes": 6, "truncated": 1}
    assert second["publish"]["diff"] == {"added": 0, "removed": 1, "relabelled": 0}

    breaking, mending = told.pop("Break the delivery").splitlines()
    clone.shell(breaking)
    state, third = ingest(clone, OURS)
    assert state == "failed"
    assert [check["name"] for check in third["validate"]["failed"]] == ["images_lost"]
    assert "publish" not in third
    current, _ = clone.store.read("refs/sources/our-biopsies.json")
    assert current["version"] == second["publish"]["version"]
    listed = clone.store.file(second["manifest"]["manifest"], "quarantine.parquet")
    assert "slide 7.png" in set(pd.read_parquet(listed)["path"])
    clone.shell(mending)
    assert ingest(clone, OURS)[0] == "success"

    assert "@daily" in follow("Let it run by itself")
    assert "dataset-" in follow("Train on it")
    follow("Pictures with names of their own")
    state, clinic = ingest(clone, "ingest_north-clinic")
    assert state == "success"
    assert clinic["publish"]["images"] > 150

    assert clone.stack.api("engineer").import_errors() == []
    follow("Tidy up")
    assert not clone.stack.status()["services"]
    assert not any(told.values())  # every command was followed
