"""Register, gate and promote against a real MLflow registry on SQLite; Airflow's record is given by the tests."""

import json
import shutil
from types import SimpleNamespace

import mlflow
import pytest

from ml import promotion, registry
from ml.airflow_api import AirflowApi
from ml.errors import ConfigError, DataError, Refused, RegistryError
from ml.promotion import promote_version
from ml.registry import champion_of, judge, read_content, register_run
from ml.settings import Settings
from ml.splits import split_dataset
from ml.store import Store
from ml.tracking import connect
from tests import made_up


class Echo(mlflow.pyfunc.PythonModel):
    def predict(self, context, model_input: list[str], params=None):
        return model_input


@pytest.fixture
def world(tmp_path, fresh_database):
    """A store, MLflow on SQLite, a training set ``made`` with a policy, and a way to make finished runs."""
    conf = tmp_path / "conf"
    for folder in ("sources", "training_sets", "policies"):
        (conf / folder).mkdir(parents=True)
    (conf / "training_sets" / "made.yaml").write_text(
        "name: made\nsources: [made]\nledger: made\npolicy: lenient\npreset: demo\n"
    )
    policy = conf / "policies" / "lenient.yaml"
    policy.write_text("name: lenient\nbinary: {roc_auc: 0.8, macro_f1: 0.5}\n")
    store = Store((tmp_path / "store").as_uri())
    shutil.copy(fresh_database, tmp_path / "mlflow.db")
    settings = Settings(
        home=tmp_path / "home",
        store=store.root,
        conf=conf,
        mlflow_uri=f"sqlite:///{tmp_path / 'mlflow.db'}",
        airflow_url="http://localhost:1",
        airflow_user="service",
    )
    dataset = made_up.dataset(store, made_up.rows(made_up.every_class()))
    split = split_dataset(dataset, store)["split"]
    client = connect(settings)
    experiment = client.create_experiment("made", artifact_location=(tmp_path / "artifacts").as_uri())

    def run(auc: float = 0.9, **tags: str) -> str:
        metrics = {"roc_auc": auc, "macro_f1": 0.7}
        per_class = {c: {"recall": 0.7, "precision": 0.7, "f1": 0.7, "support": 5.0} for c in ("benign", "malignant")}
        evaluation = {"metrics": metrics, "per_class": per_class, "absent_classes": []}
        connect(settings)
        with mlflow.start_run(experiment_id=experiment) as active:
            mlflow.set_tags(
                {
                    "breakhis.set": "made",
                    "breakhis.task": "binary",
                    "breakhis.dataset": dataset,
                    "breakhis.split": split,
                    "breakhis.ledger": "made",
                    "breakhis.preset": "demo",
                    "breakhis.seed": "0",
                    "breakhis.weights": "weights-0",
                    "breakhis.weights_kind": "imagenet",
                }
                | tags
            )
            mlflow.log_dict(evaluation, "evaluation/metrics.json")
            for name in ("report.html", "model_card.md"):
                mlflow.log_text("made up", f"evaluation/{name}")
            mlflow.log_metrics({f"test_{name}": value for name, value in metrics.items()})
            mlflow.pyfunc.log_model(name="model", python_model=Echo(), pip_requirements=[])
        return str(active.info.run_id)

    return SimpleNamespace(store=store, settings=settings, run=run, policy=policy, client=client, conf=conf)


@pytest.fixture
def airflow(monkeypatch):
    """Airflow's record, to be changed by the tests."""
    record = SimpleNamespace(run={}, detail={})
    monkeypatch.setattr(AirflowApi, "dag_run", lambda self, dag, run: record.run)
    monkeypatch.setattr(AirflowApi, "hitl_detail", lambda self, dag, run, task: record.detail)

    def answered(registered, option="Approve", user="reviewer", reason="looks right", started_by="engineer"):
        record.run = {
            "conf": {key: registered[key] for key in ("model", "version", "evidence")},
            "triggering_user_name": started_by,
        }
        record.detail = {
            "response_received": True,
            "responded_by_user": {"id": user, "name": user},
            "chosen_options": [option],
            "params_input": {"reason": reason},
            "body": f"… Evidence `{registered['evidence']}` …",
            "responded_at": "2026-01-01T00:00:00Z",
        }
        return record

    return answered


def promote(world, registered, run="made-binary-v1"):
    return promote_version(registered["model"], str(registered["version"]), run, world.store, world.settings)


def aliases(world):
    found = world.client.get_registered_model("made-binary").aliases
    return {alias: int(version) for alias, version in found.items()}


def test_registering_a_run_twice_is_one_version(world):
    run = world.run()
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
    stranger = world.run(**{"breakhis.set": "stranger"})
    with pytest.raises(DataError, match="no training set declares the model 'stranger-binary'"):
        register_run(stranger, world.store, world.settings)


def test_gate_passes_and_records_its_verdict(world):
    registered = register_run(world.run(), world.store, world.settings)
    verdict = judge("made-binary", "1", world.store, world.settings)
    assert verdict["passed"]
    assert verdict["evidence"] == registered["evidence"]
    bundle = world.store.meta(verdict["bundle"])
    assert bundle["passed"]
    assert bundle["evidence"] == read_content(registered["evidence"], world.store)
    assert verdict["bundle"] in verdict["review"]
    tags = world.client.get_model_version("made-binary", "1").tags
    assert tags["breakhis.bundle"] == verdict["bundle"]
    assert world.client.get_model_version("made-binary", "1").description == "made up"  # the model card
    tags = world.client.get_model_version("made-binary", "1").tags
    assert tags["breakhis.gates"] == "passed"
    assert json.dumps(verdict)


def test_a_model_of_a_split_by_slide_is_a_protocol_run(world):
    frame = made_up.rows(made_up.every_class())
    by_slide = made_up.dataset(world.store, frame, ledger="slides", method="sgkf", group="slide")
    split = split_dataset(by_slide, world.store)["split"]
    registered = register_run(world.run(**{"breakhis.split": split}), world.store, world.settings)
    evidence = world.store.meta(registered["evidence"])
    assert (evidence["split_method"], evidence["split_group"]) == ("sgkf", "slide")
    verdict = judge("made-binary", "1", world.store, world.settings)
    assert not verdict["passed"]
    assert "only a split by case can lead to promotion" in verdict["summary"]


def test_evidence_of_a_split_of_old_comes_out_as_it_was_recorded(world):
    """A split from before there was a choice of method and group tells none, and was by case."""
    sides = {side: {"images": 3, "cases": 1} for side in ("train", "validation", "test")}
    old = world.store.create("split", ["old"], {"ledger": "made", "method": "allocator", "sides": {}, **sides})
    registered = register_run(world.run(**{"breakhis.split": old}), world.store, world.settings)
    assert not {"split_method", "split_group"} & world.store.meta(registered["evidence"]).keys()
    assert judge("made-binary", "1", world.store, world.settings)["passed"]


def test_gate_blocks_below_the_floor_without_a_policy_and_with_an_empty_one(world):
    register_run(world.run(auc=0.7), world.store, world.settings)
    assert "0.1000 short of 0.8" in judge("made-binary", "1", world.store, world.settings)["summary"]
    world.policy.write_text("")
    assert not judge("made-binary", "1", world.store, world.settings)["passed"]
    world.policy.unlink()
    assert "no usable policy" in judge("made-binary", "1", world.store, world.settings)["summary"]


def test_another_policy_is_only_shown(world):
    register_run(world.run(auc=0.7), world.store, world.settings)
    other = world.conf / "other.yaml"
    other.write_text("name: other\nbinary: {roc_auc: 0, macro_f1: 0}\n")
    verdict = judge("made-binary", "1", world.store, world.settings, policy=str(other))
    assert verdict["passed"]
    assert not world.store.exists(verdict["bundle"])
    assert "breakhis.gates" not in world.client.get_model_version("made-binary", "1").tags


def test_unknown_versions(world):
    with pytest.raises(RegistryError, match="no version 7 of a registered model 'made-binary'"):
        judge("made-binary", "7", world.store, world.settings)


def test_changed_model_files_and_metrics_are_noticed(world):
    run = world.run()
    register_run(run, world.store, world.settings)
    version = world.client.get_model_version("made-binary", "1")
    folder = mlflow.artifacts.download_artifacts(artifact_uri=f"models:/made-binary/{version.version}")
    victim = next(p for p in __import__("pathlib").Path(folder).rglob("*.pkl"))
    good = victim.read_bytes()
    victim.write_bytes(good + b"\0")
    with pytest.raises(Refused, match=r"changed after evidence-[0-9a-f]{12} was recorded: model_files"):
        judge("made-binary", "1", world.store, world.settings)
    victim.write_bytes(good)
    assert judge("made-binary", "1", world.store, world.settings)["passed"]
    world.client.log_metric(run, "test_roc_auc", 0.99)
    with pytest.raises(Refused, match="one of them was changed"):
        judge("made-binary", "1", world.store, world.settings)


def test_an_approval_makes_a_champion_once(world, airflow):
    first = register_run(world.run(), world.store, world.settings)
    airflow(first)
    done = promote(world, first)
    assert (done["decision"], done["reviewer"], done["reason"], done["previous"]) == (
        "approved",
        "reviewer",
        "looks right",
        None,
    )
    assert aliases(world) == {"champion": 1}
    assert promote(world, first) == done
    assert champion_of("made-binary", world.store, world.settings)["version"] == 1

    second = register_run(world.run(auc=0.95), world.store, world.settings)
    airflow(second)
    assert promote(world, second, "made-binary-v2")["previous"] == 1
    assert aliases(world) == {"champion": 2, "previous": 1}

    airflow(first)
    promote(world, first)  # the old promotion, run again
    assert aliases(world) == {"champion": 2, "previous": 1}


def test_a_rejection_changes_no_champion(world, airflow):
    registered = register_run(world.run(), world.store, world.settings)
    airflow(registered, option="Reject", reason="too few cases")
    done = promote(world, registered)
    assert (done["decision"], done["reason"]) == ("rejected", "too few cases")
    assert aliases(world) == {}
    assert len(world.store.keys("audit/made-binary")) == 1


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
    registered = register_run(world.run(), world.store, world.settings)
    airflow(registered, **answer)
    with pytest.raises(Refused, match=message):
        promote(world, registered)
    assert aliases(world) == {"candidate": 1}
    assert world.store.keys("audit/made-binary") == []


def test_no_answer_another_version_and_another_evidence(world, airflow):
    registered = register_run(world.run(), world.store, world.settings)
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
    with pytest.raises(Refused, match="was not about"):
        promote(world, registered)
    record = airflow(registered)
    record.run["conf"]["evidence"] = "evidence-forged"
    record.detail["body"] = "evidence-forged"
    with pytest.raises(Refused, match="its evidence is"):
        promote(world, registered)
    assert aliases(world) == {"candidate": 1}


def test_approved_but_the_gates_do_not_pass(world, airflow):
    registered = register_run(world.run(auc=0.5), world.store, world.settings)
    airflow(registered)
    with pytest.raises(Refused, match="but gates come first"):
        promote(world, registered)
    assert aliases(world) == {"candidate": 1}


def test_killed_between_audit_and_aliases_the_retry_finishes(world, airflow, monkeypatch):
    registered = register_run(world.run(), world.store, world.settings)
    airflow(registered)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(promotion, "crown", killed)
    with pytest.raises(KeyboardInterrupt):
        promote(world, registered)
    assert aliases(world) == {"candidate": 1}
    monkeypatch.setattr(promotion, "crown", registry.crown)
    assert promote(world, registered)["decision"] == "approved"
    assert aliases(world) == {"champion": 1}


def test_killed_in_between_and_overtaken_by_a_newer_champion(world, airflow, monkeypatch):
    first = register_run(world.run(), world.store, world.settings)
    airflow(first)
    with monkeypatch.context() as patch:
        patch.setattr(promotion, "crown", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            promote(world, first)
    second = register_run(world.run(auc=0.95), world.store, world.settings)
    airflow(second)
    promote(world, second, "made-binary-v2")
    airflow(first)
    with pytest.raises(Refused, match="version 2 was promoted"):
        promote(world, first)
    assert aliases(world) == {"champion": 2}


def test_a_review_that_was_cleared_and_answered_anew_is_another_decision(world, airflow):
    registered = register_run(world.run(), world.store, world.settings)
    airflow(registered, option="Reject", reason="not yet")
    promote(world, registered)
    record = airflow(registered)
    record.detail["responded_at"] = "2026-01-02T00:00:00Z"
    assert promote(world, registered)["decision"] == "approved"
    assert aliases(world) == {"champion": 1}
    assert len(world.store.keys("audit/made-binary")) == 2


def test_without_a_service_account(world, airflow):
    registered = register_run(world.run(), world.store, world.settings)
    settings = world.settings.model_copy(update={"airflow_user": ""})
    with pytest.raises(ConfigError, match="BREAKHIS_AIRFLOW_URL"):
        promote_version("made-binary", "1", "r", world.store, settings)
    assert registered["version"] == 1
