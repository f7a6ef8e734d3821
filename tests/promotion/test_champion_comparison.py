"""The champion beside a candidate, on predictions in a real MLflow on SQLite."""

import hashlib
import os
import shutil
import sys

import cloudpickle
import mlflow
import numpy as np
import pandas as pd
import pytest

from ml.core.errors import Refused, TryAgain
from ml.core.mlflow_client import connect
from ml.core.settings import Settings
from ml.core.store import Store
from ml.core.taxonomy import SUBTYPES
from ml.evaluation import comparison_simulation
from ml.promotion.champion_comparison import OUT_OF_FOLD, TEST, compare_with_champion
from ml.promotion.policies import NonInferiorityRule
from ml.registry.sandbox import find_isolation
from tests.helpers.made_up import evidence, png

LOOSE = NonInferiorityRule(least_power=0)


class Halves(mlflow.pyfunc.PythonModel):
    """Says 0.5 of every image."""

    def predict(self, context, model_input: pd.DataFrame, params=None) -> pd.DataFrame:
        n = len(model_input)
        assert all(isinstance(one, bytes) for one in model_input.iloc[:, 0])
        assert not [name for name in os.environ if name.startswith(("BREAKHIS_", "AWS_", "MLFLOW_TRACKING_P"))]
        return pd.DataFrame({"label": ["benign"] * n, "p_benign": [0.5] * n, "p_malignant": [0.5] * n})


@pytest.fixture
def world(tmp_path, fresh_database, monkeypatch):
    monkeypatch.setattr(comparison_simulation, "_SIMULATED", 100)
    monkeypatch.setattr(comparison_simulation, "_DRAWS_SIMULATED", 30)
    shutil.copy(fresh_database, tmp_path / "mlflow.db")
    store = Store((tmp_path / "store").as_uri())
    client = connect(Settings(home=tmp_path, store=store.root, mlflow_uri=f"sqlite:///{tmp_path / 'mlflow.db'}"))
    experiment = client.create_experiment("made", artifact_location=(tmp_path / "artifacts").as_uri())
    return store, experiment


def predictions(cases, seed, task="binary"):
    """Two images a case."""
    rng = np.random.default_rng(seed)
    subtype = np.array(["A", "DC"])[np.array(cases) % 2]
    rows = pd.DataFrame(
        {
            "pixel_sha256": [f"pixels{case}-{k}" for case in cases for k in (0, 1)],
            "patient": [f"p{case}" for case in cases for _ in (0, 1)],
            "subtype": np.repeat(subtype, 2),
            "label": np.repeat(np.where(subtype == "A", "benign", "malignant"), 2),
        }
    )
    if task == "subtype":
        p = rng.dirichlet(np.ones(8), len(rows))
        rows[[f"p_{name}" for name in SUBTYPES]] = p
        rows["called"] = np.array(SUBTYPES)[p.argmax(1)]
    else:
        rows["p_malignant"] = rng.random(len(rows))
        rows["called"] = np.where(rows["p_malignant"] > 0.5, "malignant", "benign")
    return rows


def version(world, number, tmp_path, ledger="made", task="binary", model=None, **tables):
    artifacts = {}
    with mlflow.start_run(experiment_id=world[1]) as run:
        for name, table in tables.items():
            file = tmp_path / f"{name}_predictions.parquet"
            table.to_parquet(file, index=False)
            mlflow.log_artifact(str(file), "evaluation")
            artifacts[f"evaluation/{file.name}"] = hashlib.sha256(file.read_bytes()).hexdigest()
        if model:
            mlflow.pyfunc.log_model(
                name="model", python_model=model, pip_requirements=[], registered_model_name=f"made-{task}"
            )
    return evidence(task, version=number, ledger=ledger, run_id=run.info.run_id, artifacts=artifacts)


@pytest.mark.parametrize("task", ["binary", "subtype"])
def test_on_the_images_in_common(world, tmp_path, task):
    old = {"out_of_fold": predictions(range(20), 1, task), "test": predictions(range(30, 40), 2, task)}
    new = {"out_of_fold": predictions(range(4, 24), 3, task), "test": predictions(range(30, 40), 4, task)}
    champion = version(world, 1, tmp_path, task=task, **old)
    result = compare_with_champion(version(world, 2, tmp_path, task=task, **new), champion, LOOSE, world[0], world[0])
    assert result["comparable"]
    assert [(one["where"], one["cases"], one["images"]) for one in result["pairs"]] == [
        (OUT_OF_FOLD, 16, 32),
        (OUT_OF_FOLD, 16, 32),
        (TEST, 10, 20),
        (TEST, 10, 20),
    ]
    area = result["pairs"][0]
    assert area["candidate"] - area["champion"] == pytest.approx(area["difference"])
    assert area["low"] < area["difference"]


def test_the_order_of_rows_does_not_matter(world, tmp_path):
    tables = {"out_of_fold": predictions(range(20), 1), "test": predictions(range(30, 40), 2)}
    shuffled = {name: table.sample(frac=1, random_state=0) for name, table in tables.items()}
    result = compare_with_champion(
        version(world, 2, tmp_path, **tables), version(world, 1, tmp_path, **shuffled), LOOSE, world[0], world[0]
    )
    assert all(one["difference"] == 0 and one["error"] == 0 for one in result["pairs"])
    assert "isolation" not in result  # no logged code had to run


def test_the_champion_classifies_test_images_it_has_not_seen(world, tmp_path, monkeypatch):
    """In a process that knows no secret."""
    for name in (
        "BREAKHIS_AUDIT_KEY",
        "BREAKHIS_AIRFLOW_PASSWORD",
        "MLFLOW_TRACKING_PASSWORD",
        "AWS_SECRET_ACCESS_KEY",
    ):
        monkeypatch.setenv(name, "secret")
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the other process has no tests
    store = world[0]
    old = {"out_of_fold": predictions(range(20), 1), "test": predictions(range(30, 40), 2)}
    new = {"out_of_fold": predictions(range(20), 3), "test": predictions(range(30, 44), 4)}
    champion = version(world, 1, tmp_path, model=Halves(), **old)
    rows = new["test"][["pixel_sha256"]].assign(sha256=[store.put_blob(png(k)) for k in range(len(new["test"]))])
    dataset = store.create("dataset", ["grown"], {}, lambda folder: rows.to_parquet(folder / "dataset.parquet"))
    candidate = version(world, 2, tmp_path, **new) | {"dataset": dataset}
    result = compare_with_champion(candidate, champion, LOOSE, store, store)
    assert result["isolation"] == find_isolation()
    on_test = result["pairs"][2]
    assert (on_test["where"], on_test["cases"], on_test["images"]) == (TEST, 14, 28)
    both = pd.concat([old["test"], new["test"].iloc[20:].assign(p_malignant=0.5)])
    from sklearn.metrics import roc_auc_score

    assert on_test["champion"] == pytest.approx(roc_auc_score(both["label"] == "malignant", both["p_malignant"]))


def test_across_ledgers_there_is_no_comparison(world, tmp_path):
    candidate, champion = evidence(version=2, ledger="new"), evidence(version=1, ledger="old")
    result = compare_with_champion(candidate, champion, LOOSE, world[0], world[0])
    assert not result["comparable"]
    assert (
        "under the split ledger old by case, this version under new by case; only the limits apply" in result["reason"]
    )


def test_without_out_of_fold_predictions_it_is_not_estimable(world, tmp_path):
    test = predictions(range(30, 40), 2)
    champion = version(world, 1, tmp_path, validation=test, test=test)
    candidate = version(world, 2, tmp_path, out_of_fold=predictions(range(20), 1), test=test)
    pairs = compare_with_champion(candidate, champion, LOOSE, world[0], world[0])["pairs"]
    assert [one["estimable"] for one in pairs] == [False, False, True, True]
    assert pairs[0]["reason"] == "version 1 has no such predictions"


def test_predictions_that_were_changed_or_cannot_be_read(world, tmp_path):
    test = predictions(range(30, 40), 2)
    champion, candidate = (version(world, k, tmp_path, test=test) for k in (1, 2))
    (file,) = (tmp_path / "artifacts" / champion["run_id"]).rglob("test_predictions.parquet")
    predictions(range(30, 40), 9).to_parquet(file)
    with pytest.raises(Refused, match=r"made-binary version 1: evaluation/test_predictions\.parquet .* was changed"):
        compare_with_champion(candidate, champion, LOOSE, world[0], world[0])
    file.unlink()
    with pytest.raises(TryAgain, match=r"version 1: evaluation/test_predictions\.parquet of its run cannot be read"):
        compare_with_champion(candidate, champion, LOOSE, world[0], world[0])
