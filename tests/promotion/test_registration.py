"""A training run becomes a candidate version, against a real MLflow registry on SQLite."""

import json
import math
import tempfile
from pathlib import Path

import mlflow
import pandas as pd
import pytest
from pydantic import SecretStr

from ml.core.errors import DataError, Refused, RegistryError
from ml.data.splits import split_dataset
from ml.promotion.alias_history import REGISTERED
from ml.promotion.evidence import collect_evidence
from ml.promotion.judging import judge_version
from ml.promotion.registration import register_run
from tests.helpers import made_up
from tests.helpers.decisions import is_consistent, open_log, promote, read_aliases
from tests.helpers.registry_world import NOT_RESCORED


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
    assert world.register(world.log_run(auc=0.95))["version"] == 1  # nothing was recorded of the model yet


@pytest.mark.parametrize("tags", [{}, {"breakhis.audit": "9999:abc"}, {"breakhis.audit": "abc:def"}])
def test_an_empty_registered_model_is_made_anew_once(world, tags):
    """MLflow gives whoever makes a model all rights to it, which end with the model."""
    world.client.create_registered_model("made-binary", tags, description="somebody's")
    made = register_run(world.log_run(), world.store, world.settings)
    assert made["version"] == 1
    assert world.client.get_registered_model("made-binary").description != "somebody's"
    assert is_consistent(world)
    world.client.delete_model_version("made-binary", "1")
    assert register_run(world.log_run(auc=0.95), world.store, world.settings)["version"] == 2


def test_a_tag_that_is_no_anchor_is_refused(world):
    register_run(world.log_run(), world.store, world.settings)
    world.client.set_registered_model_tag("made-binary", "breakhis.audit", "abc:def")
    with pytest.raises(Refused, match=r"tag breakhis\.audit that breakhis did not write: 'abc:def'"):
        register_run(world.log_run(auc=0.95), world.store, world.settings)


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


def make_by_hand(world, **claimed):
    """Make a version of a run in MLflow, and evidence for it in the store, as somebody may who has both their keys."""
    run = world.log_run()
    world.client.create_registered_model("made-binary")
    version = world.client.create_model_version("made-binary", f"runs:/{run}/model", run)
    content = collect_evidence(version, world.store, world.settings, recompute=True) | claimed
    evidence = world.store.create("evidence", content, content)
    world.client.set_model_version_tag("made-binary", version.version, "breakhis.evidence", evidence)
    return run, {"model": "made-binary", "version": int(version.version), "evidence": evidence}


OTHERS = {"users": {"second": "retrain_made/r1"}, "unknown": ""}
TRUE = {"users": {"engineer": "retrain_made/r1"}, "unknown": ""}


def test_each_registration_is_recorded_once(world):
    run = world.log_run()
    for _ in range(2):
        registered = register_run(run, world.store, world.settings)
    [record] = [r for r in open_log(world).read_model_records("made-binary") if r["event"] == REGISTERED]
    assert {key: record[key] for key in registered} == registered
    assert record["run"] == run
    assert is_consistent(world)


@pytest.mark.parametrize("claimed", [{}, {"starters": TRUE, "rescored": NOT_RESCORED}])
def test_a_version_that_somebody_made_and_tagged_is_neither_asked_about_nor_promoted(world, airflow, claimed):
    run, made = make_by_hand(world, **claimed)
    airflow.answer_promotion(made)
    asking = world.settings.model_copy(update={"dag": "promote", "dag_run": "asked-1"})
    message = f"made-binary version 1: the audit log has no record that .*, by breakhis register {run}, "
    with pytest.raises(Refused, match=message):
        judge_version("made-binary", "1", world.store, asking, evidence=made["evidence"])
    with pytest.raises(Refused, match=message):
        promote(world, made)
    assert read_aliases(world) == {}


@pytest.mark.parametrize("claimed", [{}, {"starters": TRUE, "rescored": NOT_RESCORED}])
def test_it_is_taken_over_where_all_is_as_it_says(world, airflow, claimed, capsys):
    """As a version that an earlier release registered, which kept no record of that."""
    run, made = make_by_hand(world, **claimed)
    assert register_run(run, world.store, world.settings) == made
    assert "warning: made-binary version 1 was registered by an earlier release or by" in capsys.readouterr().err
    airflow.answer_promotion(made)
    assert promote(world, made)["decision"] == "approved"


@pytest.mark.parametrize("lacks", ["model_files", "artifacts", "sources", "validated", "per_class"])
def test_evidence_that_leaves_a_field_out_is_not_taken_over(world, lacks):
    run, made = make_by_hand(world)
    content = {key: value for key, value in world.store.meta(made["evidence"]).items() if key not in ("id", lacks)}
    evidence = world.store.create("evidence", content, content)
    world.client.set_model_version_tag("made-binary", made["version"], "breakhis.evidence", evidence)
    with pytest.raises(Refused, match=f"does not say {lacks}; breakhis did not make it"):
        register_run(run, world.store, world.settings)


@pytest.mark.parametrize("claimed", [{"starters": OTHERS}, {"starters": TRUE, "rescored": {"images": 9}}])
def test_what_it_says_of_its_registration_is_found_out_anew(world, claimed):
    run, _ = make_by_hand(world, **claimed)
    with pytest.raises(Refused, match=r"nothing says that breakhis made its evidence, and there (starters|rescored)"):
        register_run(run, world.store, world.settings)
    assert read_aliases(world) == {}


def test_what_was_registered_without_the_key_cannot_be_approved(world, airflow):
    run = world.log_run()
    without = world.settings.model_copy(update={"audit_key": SecretStr("")})
    registered = register_run(run, world.store, without)
    airflow.answer_promotion(registered)
    with pytest.raises(Refused, match="has no record that breakhis registered it"):
        promote(world, registered)
    assert register_run(run, world.store, world.settings) == registered
    with pytest.raises(Refused, match="nobody is entitled to approve it: it was registered without"):
        promote(world, registered)
