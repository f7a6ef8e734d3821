"""A conf folder of the test's own, and the DAG files read with it."""

from pathlib import Path

import pytest
from airflow.dag_processing.dagbag import DagBag
from airflow.sdk import DAG

DAGS = Path(__file__).parents[2] / "dags"

SOURCE = "name: {name}\nkind: demo\ndescription: Drawn pictures.\nimages: 160\n"
SET = """
name: {name}
description: For tests.
sources: [demo]
ledger: demo
policy: demo
preset: demo
schedule: "@monthly"
seed: 7
"""


@pytest.fixture
def conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A conf folder with the source and the training set ``demo``."""
    folder = tmp_path / "conf"
    for name, text in (("sources", SOURCE), ("training_sets", SET)):
        (folder / name).mkdir(parents=True)
        (folder / name / "demo.yaml").write_text(text.format(name="demo"))
    monkeypatch.setenv("BREAKHIS_CONF", str(folder))
    monkeypatch.delenv("BREAKHIS_TRAINING_SETS", raising=False)
    return folder


@pytest.fixture
def read():
    """Read a DAG file as Airflow does; returns its DAGs by id."""

    def dags(name: str) -> dict[str, DAG]:
        bag = DagBag(str(DAGS / f"{name}.py"))
        assert bag.import_errors == {}
        return bag.dags

    return dags
