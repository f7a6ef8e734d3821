"""Register, gate and promote against a real MLflow registry on SQLite; Airflow's record is given by the tests."""

import json
import math
import shutil
import tempfile
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import mlflow
import pandas as pd
import pytest
from pydantic import SecretStr

from ml.core.airflow_api import AirflowApi
from ml.core.errors import AirflowError, ConfigError, DataError, Refused, RegistryError
from ml.core.store import digest
from ml.data.splits import split_dataset
from ml.evaluation import comparison_simulation
from ml.promotion import auditing, champion_comparison, decisions
from ml.promotion.alias_history import APPROVED, CARRIED_OUT
from ml.promotion.audit_log import AuditLog
from ml.promotion.champion import find_alias_fault, read_champion_evidence, reconcile_aliases
from ml.promotion.decisions import promote_version, propose_rollback, roll_back, withdraw_version
from ml.promotion.evidence import read_verified_object
from ml.promotion.judging import judge_version
from ml.promotion.registration import register_run
from ml.promotion.reviews import parse_bundle_id
from ml.registry.registered_model import Aliases, RegisteredModel, audit_anchors
from tests.helpers import made_up
from tests.helpers.registry_world import RegistryWorld
from tests.trust.servers import mlflow_server


@pytest.fixture
def world(tmp_path, fresh_database, monkeypatch):
    """A store, MLflow on SQLite, a training set ``made`` with a policy, and a way to make finished runs."""
    monkeypatch.setattr(comparison_simulation, "_SIMULATED", 50)  # the simulation is tested elsewhere
    monkeypatch.setattr(comparison_simulation, "_DRAWS_SIMULATED", 20)
    shutil.copy(fresh_database, tmp_path / "mlflow.db")
    return RegistryWorld.create(tmp_path, f"sqlite:///{tmp_path / 'mlflow.db'}")


@pytest.fixture
def airflow(world, monkeypatch):
    """Airflow's record, to be changed by the tests."""
    record = SimpleNamespace(run={}, details={})

    def detail(self, dag, run, task):
        if task not in record.details:
            raise AirflowError(f"no {task}", status=404)
        return record.details[task]

    monkeypatch.setattr(AirflowApi, "dag_run", lambda self, dag, run: record.run)
    monkeypatch.setattr(AirflowApi, "hitl_detail", detail)

    def answer(body, option="Approve", user="reviewer", reason="looks right", at="2026-01-01T00:00:00Z"):
        return {
            "response_received": True,
            "responded_by_user": {"id": "7", "name": user} if user else None,
            "chosen_options": [option],
            "params_input": {"reason": reason},
            "body": body,
            "responded_at": at,
        }

    def answered(registered, *answers, started_by="engineer", **only):
        model, version = registered["model"], str(registered["version"])
        record.run = {
            "conf": {key: registered[key] for key in ("model", "version", "evidence")},
            "triggering_user_name": started_by,
        }
        body = judge_version(model, version, world.store, world.settings)["review"]
        tasks = ("review", "review_2", "review_3")
        record.details = {task: answer(body, **one) for task, one in zip(tasks, answers or [only], strict=False)}
        record.detail = record.details["review"]
        return record

    def asked_back(version, reason="it fails on 400X", started_by="engineer", **only):
        conf = {"model": "made-binary", "version": str(version), "reason": reason}
        record.run = {"conf": conf, "triggering_user_name": started_by}
        try:
            body = propose_rollback("made-binary", str(version), reason, world.store, world.settings)["review"]
        except Refused:
            body = "forged"
        record.details = {"review": answer(body, **only)}
        return record

    answered.back, answered.record = asked_back, record
    return answered


def promote(world, registered, run="made-binary-v1"):
    return promote_version(registered["model"], str(registered["version"]), run, world.store, world.settings)


def roll(world, version, run="back-1"):
    return roll_back("made-binary", str(version), run, world.store, world.settings)


def log(world):
    return AuditLog(world.store, world.settings)


def decided(world):
    return [
        (r["event"], r["version"], r["by"])
        for r in log(world).read_model_records("made-binary")
        if r["event"] != CARRIED_OUT
    ]


def is_whole(world):
    faults = log(world).verify(audit_anchors(world.settings))
    return not faults and not find_alias_fault("made-binary", log(world), world.settings)


def aliases(world):
    found = world.client.get_registered_model("made-binary").aliases
    return {alias: int(version) for alias, version in found.items()}


def test_registering_a_run_twice_is_one_version(world):
    run = world.log_run()
    first = register_run(run, world.store, world.settings)
    assert register_run(run, world.store, world.settings) == first
    assert first["model"] == "made-binary"
    assert first["version"] == 1
    assert aliases(world) == {"candidate": 1}
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
    with pytest.raises(Refused, match="says that it is of the training set real, but it was trained on dataset-"):
        register_run(world.log_run(**{"breakhis.set": "real"}), world.store, world.settings)
    assert world.client.search_registered_models() == []


def logged(world, run, name, change):
    """Log an artifact of a run anew, changed."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(
            mlflow.artifacts.download_artifacts(run_id=run, artifact_path=f"evaluation/{name}", dst_path=scratch)
        )
        change(file)
        world.client.log_artifact(run, str(file), "evaluation")


def metrics(**changes):
    def change(file):
        told = json.loads(file.read_text())
        for key, value in changes.items():
            told[key] = told[key] | value if isinstance(value, dict) else value
        file.write_text(json.dumps(told))

    return "metrics.json", change


def predictions(change):
    def changed(file):
        change(pd.read_parquet(file)).to_parquet(file, index=False)

    return "test_predictions.parquet", changed


NICER = {"roc_auc": 0.99}


@pytest.mark.parametrize(
    ("harm", "logs", "told"),
    [
        (metrics(metrics=NICER), NICER, "metrics.roc_auc is 0.99, computed again 0.7"),
        (
            metrics(per_class={"malignant": {"recall": 1.0}}),
            {},
            "metrics.json is not what its predictions give: per_class",
        ),
        (metrics(slices={"source": {"made": {"metrics": {"accuracy": 1.0}}}}), {}, "slices.source.made"),
        (metrics(intervals={"roc_auc": [0.9, 1.0]}), {}, "intervals.roc_auc"),
        (metrics(metrics={"accuracy": math.nan}), {}, "what is no number"),
        (metrics(intervals={"roc_auc": [math.inf, 1.0]}), {}, "what is no number"),
        (metrics(metrics={"bundle-0123456789ab": 1.0}), {"bundle-0123456789ab": 1.0}, "metrics that nobody knows"),
        (metrics(absent_classes=["**all is well**"]), {}, "absent_classes that nobody knows"),
        (predictions(lambda table: table.iloc[1:]), {}, "1 images are missing and 0 are of others"),
        (predictions(lambda table: pd.concat([table, table.iloc[:1]])), {}, "0 images are missing and 1 are of others"),
        (predictions(lambda table: table.assign(label="benign", subtype="A")), {}, "another subtype than the dataset"),
        (predictions(lambda table: table.assign(p_malignant=2.0)), {}, "what are no probabilities"),
        (predictions(lambda table: table.assign(called="benign")), {}, "not those of its probabilities and rule"),
    ],
)
def test_what_a_run_says_of_itself_is_computed_again(world, harm, logs, told):
    run = world.log_run(auc=0.7)
    logged(world, run, *harm)
    for name, value in logs.items():
        world.client.log_metric(run, f"test_{name}", value)
    with pytest.raises(Refused, match=told):
        register_run(run, world.store, world.settings)
    assert "candidate" not in aliases(world)


@pytest.mark.parametrize(
    ("tag", "value", "told"),
    [
        ("ledger", "another", "says that it is of the ledger another, its split made"),
        ("weights_kind", "file", "are file weights; in the store they are imagenet"),
        ("dag_runs", "{", "does not name runs"),
    ],
)
def test_tags_that_are_not_true(world, tag, value, told):
    with pytest.raises(Refused, match=told):
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
    with pytest.raises(Refused, match=f"not of exactly the test side of {split}"):
        register_run(run, world.store, world.settings)


def test_evidence_and_bundle_say_what_they_are_made_of(world, airflow):
    registered = register_run(world.log_run(), world.store, world.settings)
    evidence = world.store.meta(registered["evidence"])
    assert {"preset_sha256", "code_sha256", "lock_sha256", "dag_runs"} <= evidence.keys()
    verdict = judge_version("made-binary", "1", world.store, world.settings)
    bundle = read_verified_object(verdict["bundle"], world.store)
    assert bundle["policy_content"]["binary"]["roc_auc"]["at_least"] == 0.8
    assert verdict["bundle_sha256"] == digest(bundle)
    assert verdict["bundle_sha256"] in verdict["review"]
    airflow(registered)
    promote(world, registered)
    assert log(world).read_model_records("made-binary")[0]["bundle_sha256"] == digest(bundle)


def test_gate_passes_and_records_its_verdict(world):
    registered = register_run(world.log_run(), world.store, world.settings)
    verdict = judge_version("made-binary", "1", world.store, world.settings)
    assert verdict["passed"]
    assert verdict["evidence"] == registered["evidence"]
    bundle = world.store.meta(verdict["bundle"])
    assert bundle["passed"]
    assert bundle["evidence"] == read_verified_object(registered["evidence"], world.store)
    assert verdict["bundle"] in verdict["review"]
    tags = world.client.get_model_version("made-binary", "1").tags
    assert tags["breakhis.bundle"] == verdict["bundle"]
    assert world.client.get_model_version("made-binary", "1").description == "made up"  # the model card
    tags = world.client.get_model_version("made-binary", "1").tags
    assert tags["breakhis.gates"] == "passed"
    assert json.dumps(verdict)


def test_a_model_of_a_split_by_slide_is_a_protocol_run(world):
    frame = made_up.manifest_rows(made_up.every_class())
    by_slide = made_up.create_dataset(world.store, frame, ledger="slides", method="sgkf", group="slide")
    split = split_dataset(by_slide, world.store)["split"]
    registered = register_run(world.log_run(**{"breakhis.split": split}), world.store, world.settings)
    evidence = world.store.meta(registered["evidence"])
    assert (evidence["split_method"], evidence["split_group"]) == ("sgkf", "slide")
    verdict = judge_version("made-binary", "1", world.store, world.settings)
    assert not verdict["passed"]
    assert "only a split by case can lead to promotion" in verdict["summary"]


def test_evidence_of_a_split_of_old_comes_out_as_it_was_recorded(world):
    """A split from before there was a choice of method and group tells none, and was by case."""
    sides = {side: {"images": 3, "cases": 1} for side in ("train", "validation", "test")}
    known = world.store.meta(world.data["made"][1])["sides"]
    old = world.store.create("split", ["old"], {"ledger": "made", "method": "allocator", "sides": known, **sides})
    registered = register_run(world.log_run(**{"breakhis.split": old}), world.store, world.settings)
    assert not {"split_method", "split_group"} & world.store.meta(registered["evidence"]).keys()
    assert judge_version("made-binary", "1", world.store, world.settings)["passed"]


def test_gate_blocks_below_the_floor_without_a_policy_and_with_an_empty_one(world):
    register_run(world.log_run(auc=0.7), world.store, world.settings)
    assert "0.1000 short of 0.8" in judge_version("made-binary", "1", world.store, world.settings)["summary"]
    world.policy.write_text("")
    assert not judge_version("made-binary", "1", world.store, world.settings)["passed"]
    world.policy.unlink()
    assert "no usable policy" in judge_version("made-binary", "1", world.store, world.settings)["summary"]


def test_another_policy_is_only_shown(world):
    register_run(world.log_run(auc=0.7), world.store, world.settings)
    other = world.conf / "other.yaml"
    other.write_text("name: other\nbinary: {roc_auc: 0, macro_f1: 0}\n")
    verdict = judge_version("made-binary", "1", world.store, world.settings, policy=str(other))
    assert verdict["passed"]
    assert not world.store.exists(verdict["bundle"])
    assert "breakhis.gates" not in world.client.get_model_version("made-binary", "1").tags


def test_unknown_versions(world):
    with pytest.raises(RegistryError, match="no version 7 of a registered model 'made-binary'"):
        judge_version("made-binary", "7", world.store, world.settings)


def test_changed_model_files_and_metrics_are_noticed(world):
    run = world.log_run()
    register_run(run, world.store, world.settings)
    version = world.client.get_model_version("made-binary", "1")
    folder = mlflow.artifacts.download_artifacts(artifact_uri=f"models:/made-binary/{version.version}")
    victim = next(p for p in __import__("pathlib").Path(folder).rglob("*.pkl"))
    good = victim.read_bytes()
    victim.write_bytes(good + b"\0")
    with pytest.raises(Refused, match=r"changed after evidence-[0-9a-f]{12} was recorded: model_files"):
        judge_version("made-binary", "1", world.store, world.settings)
    victim.write_bytes(good)
    assert judge_version("made-binary", "1", world.store, world.settings)["passed"]
    world.client.log_metric(run, "test_roc_auc", 0.99)
    with pytest.raises(Refused, match="one of them was changed"):
        judge_version("made-binary", "1", world.store, world.settings)


def test_an_approval_makes_a_champion_once(world, airflow):
    first = register_run(world.log_run(), world.store, world.settings)
    airflow(first)
    done = promote(world, first)
    assert (done["decision"], done["reviewers"], done["reason"], done["previous"]) == (
        "approved",
        ["reviewer"],
        "looks right",
        None,
    )
    assert aliases(world) == {"champion": 1}
    assert promote(world, first) == done
    assert read_champion_evidence("made-binary", world.store, world.settings)["version"] == 1

    second = register_run(world.log_run(auc=0.95), world.store, world.settings)
    airflow(second)
    assert promote(world, second, "made-binary-v2")["previous"] == 1
    assert aliases(world) == {"champion": 2, "previous": 1}
    assert is_whole(world)


def test_two_models_share_a_log(world, airflow):
    (world.conf / "training_sets" / "other.yaml").write_text(
        "name: other\nsources: [made]\nledger: made\npolicy: lenient\npreset: demo\n"
    )
    dataset = made_up.create_dataset(world.store, made_up.manifest_rows(made_up.every_class()), set_name="other")
    tags = {"breakhis.set": "other", "breakhis.dataset": dataset}
    for made in ({}, tags, {}, tags):
        registered = register_run(world.log_run(**made), world.store, world.settings)
        airflow(registered)
        model, version = registered["model"], str(registered["version"])
        body = judge_version(model, version, world.store, world.settings)["review"]
        airflow.record.details["review"]["body"] = body
        promote(world, registered, f"{model}-v{version}")
    for model in ("made-binary", "other-binary"):
        found = world.client.get_registered_model(model).aliases
        assert {alias: int(version) for alias, version in found.items()} == {"champion": 2, "previous": 1}
    assert is_whole(world)


def test_an_old_approval_carried_out_again_changes_nothing(world, airflow):
    first = register_run(world.log_run(), world.store, world.settings)
    old = airflow(first)
    old = (old.run, dict(old.details))
    promote(world, first)
    second = register_run(world.log_run(auc=0.95), world.store, world.settings)
    airflow(second)
    promote(world, second, "made-binary-v2")
    record = airflow(second)
    record.run, record.details = old
    assert promote(world, first)["decision"] == "approved"  # as it was
    assert aliases(world) == {"champion": 2, "previous": 1}
    assert len(decided(world)) == 2
    with pytest.raises(Refused, match=r"not what there is now|has become champion"):
        promote(world, first, "another-run-with-the-same-answer")
    assert aliases(world) == {"champion": 2, "previous": 1}


def test_a_rejection_changes_no_champion(world, airflow):
    registered = register_run(world.log_run(), world.store, world.settings)
    airflow(registered, option="Reject", reason="too few cases")
    done = promote(world, registered)
    assert (done["decision"], done["reason"]) == ("rejected", "too few cases")
    assert aliases(world) == {}
    assert decided(world) == [("rejected", 1, "reviewer")]


def test_a_reviewer_is_known_by_login_name_and_not_by_number(world, airflow):
    registered = register_run(world.log_run(), world.store, world.settings)
    airflow(registered).detail["responded_by_user"] = {"id": "reviewer", "name": "7"}
    with pytest.raises(Refused, match="7 answered, but is not one of the reviewers"):
        promote(world, registered)
    airflow(registered)
    assert promote(world, registered)["reviewers"] == ["reviewer"]


def test_what_nobody_answers_in_time_is_rejected(world, airflow):
    registered = register_run(world.log_run(), world.store, world.settings)
    airflow(registered, option="Reject", user=None, reason=None)
    assert promote(world, registered)["reviewers"] == ["(nobody, by the deadline)"]
    assert aliases(world) == {}
    airflow(registered, option="Approve", user=None)
    with pytest.raises(Refused, match="nobody answered"):
        promote(world, registered, "another")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"user": "engineer2"}, "not one of the reviewers"),
        ({"started_by": "reviewer"}, "started it"),
        ({"reason": "  "}, "gave no reason"),
        ({"option": "Perhaps"}, "decides nothing"),
    ],
)
def test_answers_that_decide_nothing(world, airflow, answer, message):
    registered = register_run(world.log_run(), world.store, world.settings)
    airflow(registered, **answer)
    with pytest.raises(Refused, match=message):
        promote(world, registered)
    assert aliases(world) == {"candidate": 1}
    assert decided(world) == []


ON_THE_WAY = {
    ("promote", "made-binary-v1"): {"triggering_user_name": "engineer"},
    ("retrain_made", "r1"): {"triggering_user_name": None, "run_type": "asset_triggered"},
    ("retrain_made", "r2"): {"triggering_user_name": None},
    ("ingest_made", "i1"): {"triggering_user_name": "reviewer"},
}


@pytest.mark.parametrize(
    ("tag", "origin", "changes", "told"),
    [
        ([["retrain_made", "r1"]], None, {}, "reviewer started run i1 of the DAG ingest_made"),
        ([], {"dag": "retrain_made", "run": "r1"}, {}, "reviewer started run i1 of the DAG ingest_made"),
        ([["retrain_made", "r2"]], None, {("retrain_made", "r2"): {"triggering_user_name": "reviewer"}}, "run r2 of"),
        ([["retrain_made", "gone"]], None, {}, "run gone of the DAG retrain_made, which Airflow has no more"),
        ([["retrain_made", "r2"]], None, {("ingest_made", None): {}}, None),
        ([["retrain_made", "r1"]], None, {("ingest_made", "i1"): {"triggering_user_name": "engineer"}}, None),
        ([["retrain_made", "r1"]], None, {"by hand": True}, "an asset event that no run made"),
    ],
)
def test_who_began_what_led_to_a_model_cannot_approve_it(world, airflow, monkeypatch, tag, origin, changes, told):
    registered = register_run(world.log_run(**{"breakhis.dag_runs": json.dumps(tag)}), world.store, world.settings)
    record = airflow(registered)
    runs = ON_THE_WAY | changes
    events = [{"source_dag_id": "ingest_made", "source_run_id": None if "by hand" in changes else "i1"}]

    def dag_run(self, dag, run):
        if dag == "promote":
            return record.run | {"conf": record.run["conf"] | ({"origin": origin} if origin else {})}
        if (dag, run) not in runs:
            raise AirflowError("no such run", status=404)
        return {"conf": {}} | runs[dag, run]

    monkeypatch.setattr(AirflowApi, "dag_run", dag_run)
    monkeypatch.setattr(AirflowApi, "upstream_events", lambda self, dag, run: events)
    if told is None:
        assert promote(world, registered)["decision"] == "approved"
        return
    with pytest.raises(Refused, match=told):
        promote(world, registered)
    assert aliases(world) == {"candidate": 1}


def test_no_answer_another_version_and_another_evidence(world, airflow):
    registered = register_run(world.log_run(), world.store, world.settings)
    record = airflow(registered)
    record.detail["response_received"] = False
    with pytest.raises(Refused, match="nobody answered"):
        promote(world, registered)
    record = airflow(registered)
    record.run["conf"]["version"] = 9
    with pytest.raises(Refused, match="not made-binary version 1"):
        promote(world, registered)
    record = airflow(registered)
    record.detail["body"] = "about something else"
    with pytest.raises(Refused, match="what the reviewer read is not what there is now"):
        promote(world, registered)
    record = airflow(registered)
    record.detail["body"] = record.detail["body"].replace("0.9000", "0.9900")  # a nicer figure, the same bundle
    with pytest.raises(Refused, match="what the reviewer read is not what there is now"):
        promote(world, registered)
    record = airflow(registered)
    record.run["conf"]["evidence"] = "evidence-forged"
    with pytest.raises(Refused, match="its evidence is"):
        promote(world, registered)
    assert aliases(world) == {"candidate": 1}
    assert decided(world) == []


def test_approved_but_the_gates_do_not_pass(world, airflow):
    registered = register_run(world.log_run(auc=0.5), world.store, world.settings)
    airflow(registered)
    with pytest.raises(Refused, match="but gates come first"):
        promote(world, registered)
    assert aliases(world) == {"candidate": 1}


def test_a_policy_changed_after_the_review(world, airflow):
    registered = register_run(world.log_run(auc=0.7), world.store, world.settings)
    airflow(registered)
    world.policy.write_text("name: lenient\nbinary: {roc_auc: 0.5, macro_f1: 0.5}\n")
    with pytest.raises(
        Refused, match="the policy lenient was changed after it was reviewed; start a new run of the DAG promote"
    ):
        promote(world, registered)
    assert aliases(world) == {"candidate": 1}


def test_a_champion_that_came_after_the_review(world, airflow):
    first, second = (register_run(world.log_run(auc=auc), world.store, world.settings) for auc in (0.9, 0.95))
    record = airflow(second)
    reviewed = (record.run, dict(record.details))
    airflow(first)
    promote(world, first)
    record.run, record.details = reviewed
    with pytest.raises(Refused, match="version 1 has become champion; start a new run of the DAG promote"):
        promote(world, second, "made-binary-v2")
    airflow(second)  # judged and reviewed anew
    promote(world, second, "made-binary-v2")
    assert aliases(world) == {"champion": 2, "previous": 1}


def test_model_files_swapped_after_the_approval(world, airflow):
    registered = register_run(world.log_run(), world.store, world.settings)
    airflow(registered)
    folder = mlflow.artifacts.download_artifacts(artifact_uri="models:/made-binary/1")
    victim = next(Path(folder).rglob("*.pkl"))
    victim.write_bytes(victim.read_bytes() + b"\0")
    with pytest.raises(Refused, match="model_files"):
        promote(world, registered)
    assert aliases(world) == {"candidate": 1}


def test_evidence_forged_in_the_store(world, airflow):
    registered = register_run(world.log_run(auc=0.6), world.store, world.settings)
    airflow(registered)
    file = world.store.local(f"{world.store.object_key(registered['evidence'])}/object.json")
    file.write_text(file.read_text().replace("0.6", "0.9"))
    with pytest.raises(Refused, match="was changed: it is not what was recorded under that id"):
        promote(world, registered)


def test_several_have_to_approve(world, airflow):
    world.policy.write_text("name: lenient\nbinary: {roc_auc: 0.8, macro_f1: 0.5}\napprovals: 2\n")
    settings = world.settings.model_copy(update={"reviewers": ("reviewer", "second")})
    world.settings = settings
    registered = register_run(world.log_run(), world.store, world.settings)
    airflow(registered, {})
    with pytest.raises(Refused, match="asks for 2 reviewers to approve, and 1 did"):
        promote(world, registered)
    airflow(registered, {}, {})
    with pytest.raises(Refused, match="reviewer approved twice"):
        promote(world, registered)
    airflow(registered, {}, {"user": "second", "option": "Reject", "reason": "not yet"})
    assert promote(world, registered)["decision"] == "rejected"
    airflow(registered, {}, {"user": "second", "reason": "agreed"})
    done = promote(world, registered, "another")
    assert (done["decision"], done["reviewers"]) == ("approved", ["reviewer", "second"])
    assert aliases(world) == {"champion": 1}


class Killed(BaseException):
    pass


@pytest.mark.parametrize("where", ["move_aliases", "set_audit_anchor", "CARRIED_OUT", "the last anchor"])
def test_killed_anywhere_the_next_one_finishes_it(world, airflow, monkeypatch, where):
    registered = register_run(world.log_run(), world.store, world.settings)
    airflow(registered)

    def killed(*_, **__):
        raise Killed

    with monkeypatch.context() as patch:
        if where == "CARRIED_OUT":
            append = AuditLog.append
            patch.setattr(
                AuditLog,
                "append",
                lambda self, event, *a, **k: (killed if event == CARRIED_OUT else append)(self, event, *a, **k),
            )
        elif where == "the last anchor":
            calls, set_audit_anchor = [], RegisteredModel.set_audit_anchor
            patch.setattr(
                RegisteredModel,
                "set_audit_anchor",
                lambda *a: killed() if calls else calls.append(set_audit_anchor(*a)),
            )
        else:
            patch.setattr(RegisteredModel, where, killed)
        with pytest.raises(Killed):
            promote(world, registered)
    second = register_run(world.log_run(auc=0.95), world.store, world.settings)
    assert decided(world) == [("approved", 1, "reviewer")]
    airflow.back(1, started_by="engineer")  # another decision about the model, which is refused
    with pytest.raises(Refused):
        roll(world, 7)
    record = airflow(registered) if where != "move_aliases" else None
    reconcile_aliases("made-binary", log(world), world.settings)
    assert aliases(world)["champion"] == 1
    assert is_whole(world)
    assert record is None or decided(world) == [("approved", 1, "reviewer")]
    airflow(second)
    promote(world, second, "made-binary-v2")
    assert aliases(world) == {"champion": 2, "previous": 1}
    assert is_whole(world)


def test_stopped_and_overtaken_it_puts_right_what_it_did_late(world, airflow, monkeypatch):
    """Between its reading and its setting of aliases, another process promotes a newer version."""
    first, second = (register_run(world.log_run(auc=auc), world.store, world.settings) for auc in (0.9, 0.95))
    airflow(first)
    late, move_aliases = [], RegisteredModel.move_aliases

    def overtaken(model, wanted, **decided):
        if not late:
            late.append(wanted)
            monkeypatch.setattr(decisions, "hold_lease", lambda *_: nullcontext())  # its lease has run out
            reconcile_aliases(model.name, log(world), world.settings)
            airflow(second)
            promote(world, second, "made-binary-v2")
        move_aliases(model, wanted, **decided)

    monkeypatch.setattr(RegisteredModel, "move_aliases", overtaken)
    promote(world, first)
    assert late[0].champion == 1
    assert aliases(world) == {"champion": 2, "previous": 1}
    assert is_whole(world)


def test_a_rejection_ends_its_run_and_another_run_is_another_decision(world, airflow):
    registered = register_run(world.log_run(), world.store, world.settings)
    airflow(registered, option="Reject", reason="not yet")
    promote(world, registered)
    airflow(registered, at="2026-01-02T00:00:00Z")  # the review was cleared, and asked again
    with pytest.raises(Refused, match="ended by reviewer, who rejected: not yet; start a new run of the DAG promote"):
        promote(world, registered)
    assert aliases(world) == {}
    assert promote(world, registered, "by hand")["decision"] == "approved"
    assert aliases(world) == {"champion": 1}
    assert decided(world) == [("rejected", 1, "reviewer"), ("approved", 1, "reviewer")]


@pytest.mark.parametrize(
    ("changes", "name"),
    [({"airflow_user": ""}, "BREAKHIS_AIRFLOW_URL"), ({"audit_key": SecretStr("")}, "BREAKHIS_AUDIT_KEY")],
)
def test_without_a_service_account_or_a_key(world, airflow, changes, name):
    register_run(world.log_run(), world.store, world.settings)
    with pytest.raises(ConfigError, match=name):
        promote_version("made-binary", "1", "r", world.store, world.settings.model_copy(update=changes))


@pytest.fixture
def two_champions(world, airflow):
    for number, auc in ((1, 0.9), (2, 0.95)):
        airflow(register_run(world.log_run(auc=auc), world.store, world.settings))
        promote_version("made-binary", str(number), f"made-binary-v{number}", world.store, world.settings)
    assert aliases(world) == {"champion": 2, "previous": 1}
    return world


def test_a_rollback_names_what_was_approved(two_champions):
    world = two_champions
    approved = {
        r["version"]: r["bundle"] for r in log(world).read_model_records("made-binary") if r["event"] == APPROVED
    }
    proposed = propose_rollback("made-binary", "1", "it fails on 400X", world.store, world.settings)
    assert proposed["bundle"] == approved[1]
    assert parse_bundle_id(proposed["review"]) == approved[1]
    assert f"/breakhis/reviews/{approved[2]}/" in proposed["review"]


def test_a_rollback_brings_a_former_champion_back(two_champions, airflow):
    world = two_champions
    airflow.back(1)
    done = roll(world, 1)
    assert (done["decision"], done["version"], done["previous"]) == ("rolled_back", 1, 2)
    assert aliases(world) == {"champion": 1, "previous": 2}
    assert roll(world, 1) == done
    assert decided(world)[-1] == ("rolled back", 1, "reviewer")
    assert is_whole(world)


@pytest.mark.parametrize(
    ("version", "only", "message"),
    [
        (3, {}, "version 3 never was champion; versions that were: 1"),
        (2, {}, "version 2 is the champion already"),
        (1, {"started_by": "reviewer"}, "started it"),
        (1, {"user": "stranger"}, "not one of the reviewers"),
    ],
)
def test_rollbacks_that_are_refused(two_champions, airflow, version, only, message):
    world = two_champions
    register_run(world.log_run(auc=0.85), world.store, world.settings)
    airflow.back(version, **only)
    with pytest.raises(Refused, match=message):
        roll(world, version)
    assert aliases(world) == {"champion": 2, "previous": 1, "candidate": 3}


def test_a_rollback_that_was_rejected_or_about_something_else(two_champions, airflow):
    world = two_champions
    airflow.back(1, option="Reject", reason="keep it")
    assert roll(world, 1)["decision"] == "rejected"
    airflow.back(1, at="2026-01-02T00:00:00Z")
    with pytest.raises(Refused, match="ended by reviewer, who rejected: looks right"):
        roll(world, 1)
    record = airflow.back(1)
    record.details["review"]["body"] = "another"
    with pytest.raises(Refused, match="what was confirmed is not what there is now"):
        roll(world, 1, "back-2")
    assert aliases(world) == {"champion": 2, "previous": 1}


def faults(world):
    return auditing.audit_registry(world.store, world.settings)["faults"]


def model_folder(version):
    return Path(mlflow.artifacts.download_artifacts(artifact_uri=f"models:/made-binary/{version}"))


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (lambda w: w.client.delete_model_version_tag("made-binary", "2", "breakhis.evidence"), "was removed"),
        (
            lambda w: w.client.set_model_version_tag("made-binary", "2", "breakhis.evidence", "evidence-0123456789ab"),
            "its evidence is evidence-0123456789ab, not evidence-",
        ),
        (lambda w: next(model_folder(2).rglob("*.pkl")).write_bytes(b""), "version 2: changed after"),
        (lambda w: w.client.delete_registered_model_alias("made-binary", "champion"), "is on version none"),
        (lambda w: w.client.set_registered_model_alias("made-binary", "champion", "1"), "belongs to version 2"),
    ],
)
def test_a_champion_that_was_tampered_with_is_none_to_be_compared_with(two_champions, harm, told):
    world = two_champions
    register_run(world.log_run(auc=0.97), world.store, world.settings)
    assert faults(world) == []
    harm(world)
    with pytest.raises(Refused, match=told):
        judge_version("made-binary", "3", world.store, world.settings)
    assert any(told in fault for fault in faults(world))


def test_the_daily_check_looks_at_the_champion_before_too(two_champions):
    world = two_champions
    world.client.delete_registered_model_alias("made-binary", "previous")
    assert "the alias previous is on version none, but by the audit log it belongs to version 1" in faults(world)[0]
    world.client.set_registered_model_alias("made-binary", "previous", "1")
    next(model_folder(1).rglob("*.pkl")).write_bytes(b"")
    assert "version 1: changed after" in faults(world)[0]


def test_a_champion_without_a_record_is_told(world):
    register_run(world.log_run(), world.store, world.settings)
    world.client.set_registered_model_alias("made-binary", "champion", "1")
    told = faults(world)
    assert "the alias champion is on version 1, but by the audit log it belongs to version none" in told[0]
    register_run(world.log_run(auc=0.95), world.store, world.settings)
    with pytest.raises(Refused, match="take the alias champion away in MLflow"):
        judge_version("made-binary", "2", world.store, world.settings)


def test_a_wiped_log_is_told_while_there_is_a_champion(two_champions):
    world = two_champions
    for name in world.store.keys("audit/log"):
        world.store.remove(f"audit/log/{name}")
    world.client.delete_registered_model_tag("made-binary", "breakhis.audit")
    assert "the alias champion is on version 2, but by the audit log it belongs to version none" in faults(world)[0]


def test_the_last_record_cut_off_is_told(two_champions):
    world = two_champions
    world.store.remove(f"audit/log/{world.store.keys('audit/log')[-1]}")
    assert "the log's end was cut off" in faults(world)[0]


def test_what_was_not_carried_out_for_long_is_told(world, airflow, monkeypatch):
    registered = register_run(world.log_run(), world.store, world.settings)
    airflow(registered)

    def killed(*_, **__):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(RegisteredModel, "move_aliases", killed)
        with pytest.raises(Killed):
            promote(world, registered)
    assert faults(world) == []  # it may be at it
    monkeypatch.setattr(auditing, "_MAX_PENDING", timedelta(0))
    assert "record 1 (approved, version 1) has not been carried out since" in faults(world)[0]


def test_a_rollback_is_to_what_was_champion_and_says_so(two_champions, airflow):
    world = two_champions
    evidence = world.client.get_model_version("made-binary", "1").tags["breakhis.evidence"]
    record = airflow.back(1)
    assert evidence in record.details["review"]["body"]
    assert roll(world, 1)["evidence"] == evidence
    next(model_folder(2).rglob("*.pkl")).write_bytes(b"")
    airflow.back(2)
    with pytest.raises(Refused, match="version 2: changed after"):
        roll(world, 2, "back-2")
    assert aliases(world) == {"champion": 1, "previous": 2}


def test_from_a_champion_that_was_tampered_with_there_is_a_way_back(two_champions, airflow):
    world = two_champions
    world.client.set_model_version_tag("made-binary", "2", "breakhis.evidence", "evidence-0123456789ab")
    airflow.back(1)
    assert roll(world, 1)["decision"] == "rolled_back"


def test_compiled_code_and_notes_hidden_among_model_files(world):
    register_run(world.log_run(), world.store, world.settings)
    folder = model_folder(1)
    (folder / "registered_model_meta").write_text("MLflow's own")
    assert judge_version("made-binary", "1", world.store, world.settings)["passed"]
    (folder / "code").mkdir()
    (folder / "code" / "registered_model_meta").write_text("hidden")
    with pytest.raises(Refused, match="model_files"):
        judge_version("made-binary", "1", world.store, world.settings)
    (folder / "code" / "registered_model_meta").unlink()
    cache = folder / "code" / "__pycache__"
    cache.mkdir()
    (cache / "serving.cpython-311.pyc").write_bytes(b"")  # as Python leaves it with whoever loads the model in place
    assert judge_version("made-binary", "1", world.store, world.settings)["passed"]
    assert not cache.exists()
    (folder / "code" / "serving.cpython-311.pyc").write_bytes(b"")
    with pytest.raises(Refused, match=r"compiled code lies among its files.*serving.cpython-311.pyc"):
        judge_version("made-binary", "1", world.store, world.settings)


def test_a_candidate_that_came_meanwhile_stays_one(world):
    for auc in (0.9, 0.95):
        register_run(world.log_run(auc=auc), world.store, world.settings)
    RegisteredModel("made-binary", world.settings).move_aliases(Aliases(1), decided=1)
    assert aliases(world) == {"champion": 1, "candidate": 2}
    RegisteredModel("made-binary", world.settings).move_aliases(Aliases(1), decided=2)
    assert aliases(world) == {"champion": 1}


def test_an_alias_moved_by_hand_is_noticed_and_put_right(two_champions, airflow):
    world = two_champions
    third = register_run(world.log_run(auc=0.97), world.store, world.settings)
    world.client.set_registered_model_alias("made-binary", "champion", "1")
    moved = find_alias_fault("made-binary", log(world), world.settings)
    assert "champion is on version 1, but by the audit log it belongs to version 2" in moved
    world.client.set_registered_model_alias("made-binary", "champion", "2")
    airflow(third)
    world.client.set_registered_model_alias("made-binary", "champion", "1")
    with pytest.raises(Refused, match="moved behind the log's back"):
        promote(world, third, "made-binary-v3")
    airflow.back(2)
    roll(world, 2)
    assert aliases(world)["champion"] == 2
    assert is_whole(world)


def test_a_withdrawn_candidate_can_be_approved_no_more(world, airflow):
    registered = register_run(world.log_run(), world.store, world.settings)
    record = airflow.back(1, reason="mislabelled slide")
    done = withdraw_version("made-binary", "1", "out-1", world.store, world.settings)
    assert (done["decision"], done["reason"]) == ("withdrawn", "mislabelled slide")
    assert aliases(world) == {}
    airflow(registered)
    with pytest.raises(Refused, match="was withdrawn by engineer: mislabelled slide"):
        promote(world, registered)
    record = airflow.back(1, reason="")
    with pytest.raises(Refused, match="with a reason"):
        withdraw_version("made-binary", "1", "out-2", world.store, world.settings)
    record = airflow.back(1, started_by=None)
    with pytest.raises(Refused, match="started by a person"):
        withdraw_version("made-binary", "1", "out-3", world.store, world.settings)
    assert record.run["conf"]["version"] == "1"


def test_what_is_no_version_cannot_be_withdrawn(world, airflow):
    register_run(world.log_run(), world.store, world.settings)
    airflow.back(7)
    with pytest.raises(RegistryError, match="no version 7"):
        withdraw_version("made-binary", "7", "out", world.store, world.settings)
    assert decided(world) == []


def test_the_champion_cannot_be_withdrawn(two_champions, airflow):
    airflow.back(2)
    with pytest.raises(Refused, match="is the champion"):
        withdraw_version("made-binary", "2", "out", two_champions.store, two_champions.settings)


def test_the_end_of_the_log_cut_off_stops_everything(two_champions, airflow):
    world = two_champions
    third = register_run(world.log_run(auc=0.97), world.store, world.settings)
    airflow(third)
    names = world.store.keys("audit/log")
    for name in names[2:]:
        world.store.remove(f"audit/log/{name}")
    with pytest.raises(Refused, match="the log's end was cut off; nothing is decided about made-binary"):
        promote(world, third, "made-binary-v3")
    assert not is_whole(world)


@pytest.mark.integration
def test_nothing_of_what_a_server_hands_out_is_left_behind(tmp_path, monkeypatch):
    """Neither of runs nor of models: the audit reads those of all champions every day."""
    for folder in ("mlflow", "world", "scratch"):
        (tmp_path / folder).mkdir()
    artifacts = ("--serve-artifacts", "--artifacts-destination", (tmp_path / "artifacts").as_uri())
    with mlflow_server(tmp_path / "mlflow", *artifacts, "--default-artifact-root", "mlflow-artifacts:/") as url:
        world = RegistryWorld.create(tmp_path / "world", url)
        run = world.log_run()
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
        registered = register_run(run, world.store, world.settings)
        judge_version("made-binary", "1", world.store, world.settings)
        recorded = read_verified_object(registered["evidence"], world.store)
        assert len(champion_comparison._read_predictions(recorded, "test")) > 0
        assert list((tmp_path / "scratch").iterdir()) == []
