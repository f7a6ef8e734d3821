"""A training run becomes a candidate version, against a real MLflow registry on SQLite."""

import json
import math
import tempfile
from pathlib import Path

import mlflow
import pandas as pd
import pytest

from ml.core.errors import DataError, Refused, RegistryError
from ml.data.splits import split_dataset
from ml.promotion.registration import register_run
from tests.helpers import made_up
from tests.helpers.decisions import read_aliases


def test_registering_a_run_twice_is_one_version(world):
    run = world.log_run()
    first = register_run(run, world.store, world.settings)
    assert register_run(run, world.store, world.settings) == first
    assert first["model"] == "made-binary"
    assert first["version"] == 1
    assert read_aliases(world) == {"candidate": 1}
    evidence = world.store.meta(first["evidence"])
    assert evidence["metrics"]["roc_auc"] == 0.9
    assert any(name.endswith("MLmodel") for name in evidence["model_files"])


def test_runs_that_cannot_be_registered(world):
    with pytest.raises(RegistryError, match="no run 'f00'"):
        register_run("f00", world.store, world.settings)
    with mlflow.start_run() as foreign:
        pass
    with pytest.raises(RegistryError, match="not a training run of breakhis"):
        register_run(foreign.info.run_id, world.store, world.settings)
    stranger = world.log_run(**{"breakhis.set": "stranger"})
    with pytest.raises(DataError, match="no training set declares the model 'stranger-binary'"):
        register_run(stranger, world.store, world.settings)


def test_a_run_that_says_it_is_of_another_set_makes_no_version(world):
    (world.conf / "training_sets" / "real.yaml").write_text(
        "name: real\nsources: [made]\nledger: made\npolicy: lenient\npreset: demo\n"
    )
    with pytest.raises(Refused, match="is tagged with the training set real, but it was trained on dataset-"):
        register_run(world.log_run(**{"breakhis.set": "real"}), world.store, world.settings)
    assert world.client.search_registered_models() == []


def test_a_registered_model_that_somebody_made_before_is_refused(world):
    """Reserved by the service account it is empty; one with a version or an alias is somebody's work."""
    world.client.create_registered_model("made-binary")
    stranger = world.log_run()
    made = world.client.create_model_version("made-binary", f"runs:/{stranger}/model", stranger)
    world.client.set_registered_model_alias("made-binary", "champion", made.version)
    ours = world.log_run(auc=0.95)
    with pytest.raises(Refused, match=r"has a version 1 that breakhis did not register: .*deletes or renames"):
        register_run(ours, world.store, world.settings)
    with pytest.raises(Refused, match="an alias champion on version 1, but the audit log has no decision about it"):
        register_run(stranger, world.store, world.settings)
    world.client.delete_registered_model_alias("made-binary", "champion")
    assert register_run(stranger, world.store, world.settings)["version"] == 1  # an interrupted registration
    assert register_run(ours, world.store, world.settings)["version"] == 2


def test_a_refused_run_leaves_no_version_that_others_are_refused_for(world):
    forged = world.log_run(auc=0.9, **{"breakhis.ledger": "another"})
    with pytest.raises(Refused, match="tagged with the ledger another"):
        world.register(forged)
    assert world.client.search_model_versions("name='made-binary'") == []
    experiment = world.client.get_run(forged).info.experiment_id
    assert len(world.client.search_logged_models([experiment])) == 1  # the run keeps its model
    assert world.register(world.log_run(auc=0.95))["version"] == 2  # MLflow gives no number twice


def test_an_empty_registered_model_is_used(world):
    world.client.create_registered_model("made-binary")
    assert register_run(world.log_run(), world.store, world.settings)["version"] == 1


def log_changed_artifact(world, run, name, change):
    """Log an artifact of a run anew, changed."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(
            mlflow.artifacts.download_artifacts(run_id=run, artifact_path=f"evaluation/{name}", dst_path=scratch)
        )
        change(file)
        world.client.log_artifact(run, str(file), "evaluation")


def edit_metrics(**changes):
    def change(file):
        content = json.loads(file.read_text())
        for key, value in changes.items():
            content[key] = content[key] | value if isinstance(value, dict) else value
        file.write_text(json.dumps(content))

    return "metrics.json", change


def edit_predictions(change):
    def changed(file):
        change(pd.read_parquet(file)).to_parquet(file, index=False)

    return "test_predictions.parquet", changed


NICER = {"roc_auc": 0.99}


@pytest.mark.parametrize(
    ("edit", "logs", "message"),
    [
        (edit_metrics(metrics=NICER), NICER, "metrics.roc_auc is 0.99, computed again 0.7"),
        (
            edit_metrics(per_class={"malignant": {"recall": 1.0}}),
            {},
            "metrics.json does not follow from test_predictions.parquet: per_class",
        ),
        (edit_metrics(slices={"source": {"made": {"metrics": {"accuracy": 1.0}}}}), {}, "slices.source.made"),
        (edit_metrics(intervals={"roc_auc": [0.9, 1.0]}), {}, "intervals.roc_auc"),
        (edit_metrics(metrics={"accuracy": math.nan}), {}, "not a finite number"),
        (edit_metrics(intervals={"roc_auc": [math.inf, 1.0]}), {}, "not a finite number"),
        (
            edit_metrics(metrics={"bundle-0123456789ab": 1.0}),
            {"bundle-0123456789ab": 1.0},
            "unknown metrics: ",
        ),
        (edit_metrics(absent_classes=["**all is well**"]), {}, "unknown absent_classes: "),
        (edit_predictions(lambda table: table.iloc[1:]), {}, "1 images are missing, and 0 rows are of other images"),
        (
            edit_predictions(lambda table: pd.concat([table, table.iloc[:1]])),
            {},
            "0 images are missing, and 1 rows are of other images",
        ),
        (
            edit_predictions(lambda table: table.assign(label="benign", subtype="A")),
            {},
            "another subtype than the dataset",
        ),
        (edit_predictions(lambda table: table.assign(p_malignant=2.0)), {}, "numbers that are no probabilities"),
        (
            edit_predictions(lambda table: table.assign(called="benign")),
            {},
            "do not follow from the probabilities",
        ),
    ],
)
def test_what_a_run_says_of_itself_is_computed_again(world, edit, logs, message):
    run = world.log_run(auc=0.7)
    log_changed_artifact(world, run, *edit)
    for name, value in logs.items():
        world.client.log_metric(run, f"test_{name}", value)
    with pytest.raises(Refused, match=message):
        register_run(run, world.store, world.settings)
    assert "candidate" not in read_aliases(world)


@pytest.mark.parametrize(
    ("tag", "value", "message"),
    [
        ("ledger", "another", "is tagged with the ledger another, but its split is of made"),
        ("weights_kind", "file", "are file weights; in the store they are imagenet"),
        ("dag_runs", "{", "does not name runs"),
    ],
)
def test_tags_that_are_not_true(world, tag, value, message):
    with pytest.raises(Refused, match=message):
        register_run(world.log_run(**{f"breakhis.{tag}": value}), world.store, world.settings)


def test_what_was_made_of_another_split_is_refused(world):
    other = made_up.create_dataset(
        world.store, made_up.manifest_rows(made_up.every_class(images=3)), ledger="another", seed=1
    )
    split = split_dataset(other, world.store)["split"]
    run = world.log_run()
    held_out = {"breakhis.split": split, "breakhis.ledger": "another"}
    sides = world.store.meta(split)["sides"]
    assert sides != world.store.meta(world.data["made"][1])["sides"]
    for name, tag in held_out.items():
        world.client.set_tag(run, name, tag)
    with pytest.raises(Refused, match=f"does not hold exactly the images of the test side of {split}"):
        register_run(run, world.store, world.settings)
