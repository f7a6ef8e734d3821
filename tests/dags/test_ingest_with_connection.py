"""A Kaggle source whose credentials are an Airflow connection: its DAG, run by Airflow, with the real package."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ml.core.settings import PROJECT
from ml.core.store import Store
from tests.data.sources.kaggle_server import KEY, MIRROR, SITE, USER, mirror_zip, serve, some_names

pytestmark = pytest.mark.integration

SOURCE = f"name: mirror\nkind: kaggle\ndataset: {MIRROR}\nconnection: kaggle_lab\n"

# Runs the DAG through Airflow's own scheduling, supervisor and task API, then says what Airflow keeps of it.
RUN = """
import json, sys
from datetime import timedelta
from airflow.dag_processing.dagbag import DagBag
from airflow.models.renderedtifields import RenderedTaskInstanceFields
from airflow.models.taskinstance import TaskInstance
from airflow.models.xcom import XComModel
from airflow.settings import Session
from sqlalchemy import select

bag = DagBag(sys.argv[1])
assert not bag.import_errors, bag.import_errors
dag = bag.dags["ingest_mirror"]
for task in dag.tasks:
    task.retry_delay, task.retry_exponential_backoff = timedelta(0), 0
dag.test()
with Session() as session:
    tries = {ti.task_id: [ti.state, ti.try_number] for ti in session.scalars(select(TaskInstance))}
    xcoms = {f"{one.task_id} {one.key}": str(one.value) for one in session.scalars(select(XComModel))}
    rendered = [str(one.rendered_fields) for one in session.scalars(select(RenderedTaskInstanceFields))]
with open(sys.argv[2], "w") as file:
    json.dump({"tries": tries, "xcoms": xcoms, "rendered": rendered}, file)
"""

# Stands before the real command on PATH: notes what each stage is given, and points the package at the stand-in.
NOTING = """#!/bin/sh
env > {folder}/$1.env
export STANDIN_KAGGLE_URL={url} PYTHONPATH={path}
exec {python} -c 'from ml.cli import main; main()' "$@"
"""


@pytest.fixture
def airflow(tmp_path: Path) -> Iterator[SimpleNamespace]:
    """An Airflow with a database of its own, a source, and the server that stands for Kaggle."""
    home, given = tmp_path / "airflow", tmp_path / "given"
    for folder in (tmp_path / "conf" / "sources", tmp_path / "user", tmp_path / "bin", given):
        folder.mkdir(parents=True)
    (tmp_path / "conf" / "sources" / "mirror.yaml").write_text(SOURCE)
    unwanted = ("KAGGLE_", "BREAKHIS_", "AIRFLOW", "XDG_CONFIG")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(unwanted)} | {
        "AIRFLOW_HOME": str(home),
        "AIRFLOW__CORE__DAGS_FOLDER": str(PROJECT / "dags"),
        "AIRFLOW__CORE__PLUGINS_FOLDER": str(PROJECT / "plugins"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__USAGE_DATA_COLLECTION__ENABLED": "False",
        "BREAKHIS_HOME": str(tmp_path / "home"),
        "BREAKHIS_CONF": str(tmp_path / "conf"),
        "BREAKHIS_WORKERS": "1",
        "HOME": str(tmp_path / "user"),
        "NO_PROXY": "localhost,127.0.0.1",
        "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}",
    }

    def run(*command: str) -> str:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
        return done.stdout + done.stderr

    def run_dag() -> SimpleNamespace:
        log = run(sys.executable, "-c", RUN, str(PROJECT / "dags" / "ingest.py"), str(tmp_path / "kept.json"))
        files = {path.stem: path.read_text() for path in given.iterdir()}
        return SimpleNamespace(log=log, given=files, **json.loads((tmp_path / "kept.json").read_text()))

    def connect(*arguments: str) -> None:
        run(bin_airflow, "connections", "add", "kaggle_lab", "--conn-type", "generic", *arguments)

    bin_airflow = str(Path(sys.executable).with_name("airflow"))
    run(bin_airflow, "db", "migrate")
    with serve() as server:
        server.archives[MIRROR] = [mirror_zip(some_names())]
        path = os.pathsep.join([str(SITE), str(PROJECT), *filter(None, [os.environ.get("PYTHONPATH")])])
        noting = NOTING.format(folder=given, url=server.url, path=path, python=sys.executable)
        (tmp_path / "bin" / "breakhis").write_text(noting)
        (tmp_path / "bin" / "breakhis").chmod(0o755)
        store = Store((tmp_path / "home" / "store").as_uri())
        yield SimpleNamespace(
            run_dag=run_dag, connect=connect, server=server, store=store, kept=[home, tmp_path / "home"]
        )


def holding(secret: str, folders: list[Path]) -> list[Path]:
    """The files that a secret stands in, in Airflow's database and logs, in the store and in the cache."""
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return [path for path in files if secret.encode() in path.read_bytes()]


def test_only_the_task_fetch_is_given_the_credentials(airflow: Any) -> None:
    airflow.connect("--conn-login", USER, "--conn-password", KEY)
    airflow.server.refusals = [503, 429]  # either may get better, and does

    ran = airflow.run_dag()

    done_at_once = {task: ["success", 1] for task in ("manifest", "validate", "publish")}
    assert ran.tries == {"fetch": ["success", 3], **done_at_once}
    assert "Kaggle has a fault of its own (status 503); try again later" in ran.log
    assert "Kaggle has had too many requests; try again later" in ran.log
    published, _ = airflow.store.read("refs/sources/mirror.json")
    assert published["images"] == 80  # of 82 slide folders; one slide has two labels

    assert ran.given.keys() == ran.tries.keys()
    assert f"KAGGLE_KEY={KEY}" in ran.given["fetch"]
    for task in done_at_once:
        assert "KAGGLE" not in ran.given[task]
    assert "fetch return_value" in ran.xcoms
    assert ran.rendered
    for text in (ran.log, *ran.xcoms.values(), *ran.rendered):
        assert KEY not in text
        assert "X-Goog-Signature" not in text
    assert holding(KEY, airflow.kept) == []
    assert holding("X-Goog-Signature", airflow.kept) == []


def test_credentials_that_kaggle_refuses_fail_the_task_at_once(airflow: Any) -> None:
    airflow.connect("--conn-password", "KGAT_wrong-secret")  # without a login it is a token
    ran = airflow.run_dag()
    assert ran.tries["fetch"] == ["failed", 1]
    assert {state for state, _ in ran.tries.values()} == {"failed", "upstream_failed"}
    assert "breakhis fetch: Kaggle does not accept the credentials in KAGGLE_API_TOKEN" in ran.log
    assert ran.given.keys() == {"fetch"}
    assert "KAGGLE_API_TOKEN=KGAT_wrong-secret" in ran.given["fetch"]
    assert "wrong-secret" not in ran.log
    assert holding("wrong-secret", airflow.kept) == []
    assert airflow.store.keys("objects") == []
