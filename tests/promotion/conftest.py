"""A registry to decide in, and Airflow's record of the reviewers' answers."""

import shutil

import pytest

from ml.evaluation import comparison_simulation
from ml.promotion import evidence
from ml.promotion.decisions import promote_version
from ml.promotion.registration import register_run
from tests.helpers.decisions import AirflowRecord, read_aliases
from tests.helpers.registry_world import NOT_RESCORED, RegistryWorld


@pytest.fixture
def world(tmp_path, fresh_database, monkeypatch):
    """A store, MLflow on SQLite, a training set ``made`` with a policy, and a way to make finished runs."""
    monkeypatch.setattr(comparison_simulation, "_SIMULATED", 50)  # the simulation is tested elsewhere
    monkeypatch.setattr(comparison_simulation, "_DRAWS_SIMULATED", 20)
    monkeypatch.setattr(evidence, "rescore_predictions", lambda *_: NOT_RESCORED)  # tested in test_rescoring.py
    shutil.copy(fresh_database, tmp_path / "mlflow.db")
    return RegistryWorld.create(tmp_path, f"sqlite:///{tmp_path / 'mlflow.db'}")


@pytest.fixture
def airflow(world, monkeypatch):
    """Airflow's record, to be changed by the tests."""
    return AirflowRecord(world, monkeypatch)


@pytest.fixture
def two_champions(world, airflow):
    """The registry after version 1 and then version 2 became champion."""
    for number, auc in ((1, 0.9), (2, 0.95)):
        airflow.answer_promotion(register_run(world.log_run(auc=auc), world.store, world.settings))
        promote_version("made-binary", str(number), f"made-binary-v{number}", world.store, world.settings)
    assert read_aliases(world) == {"champion": 2, "previous": 1}
    return world
