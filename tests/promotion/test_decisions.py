"""Promotions against a real MLflow registry on SQLite; the tests give Airflow's record."""

from pathlib import Path

import mlflow
import pytest
from pydantic import SecretStr

from ml.core.errors import ConfigError, Refused
from ml.promotion.champion import read_champion
from ml.promotion.decisions import promote_version
from ml.promotion.registration import register_run
from ml.registry.registered_model import RegisteredModel
from tests.helpers import made_up
from tests.helpers.decisions import is_consistent, list_decisions, promote, read_aliases


def test_an_approval_makes_a_champion_once(world, airflow):
    first = register_run(world.log_run(), world.store, world.settings)
    airflow.answer_promotion(first)
    done = promote(world, first)
    assert (done["decision"], done["reviewers"], done["reason"], done["previous"]) == (
        "approved",
        ["reviewer"],
        "looks right",
        None,
    )
    assert read_aliases(world) == {"champion": 1}
    assert promote(world, first) == done
    assert read_champion(RegisteredModel("made-binary", world.settings), world.store).evidence["version"] == 1

    second = register_run(world.log_run(auc=0.95), world.store, world.settings)
    airflow.answer_promotion(second)
    assert promote(world, second, "made-binary-v2")["previous"] == 1
    assert read_aliases(world) == {"champion": 2, "previous": 1}
    assert is_consistent(world)


def test_two_models_share_a_log(world, airflow):
    (world.conf / "training_sets" / "other.yaml").write_text(
        "name: other\nsources: [made]\nledger: made\npolicy: lenient\npreset: demo\n"
    )
    dataset = made_up.create_dataset(world.store, made_up.manifest_rows(made_up.every_class()), set_name="other")
    tags = {"breakhis.set": "other", "breakhis.dataset": dataset}
    world.data["other"] = (dataset, world.data["made"][1])
    world.record_starter()
    for made in ({}, tags, {}, tags):
        registered = register_run(world.log_run(**made), world.store, world.settings)
        airflow.answer_promotion(registered)
        promote(world, registered, f"{registered['model']}-v{registered['version']}")
    for model in ("made-binary", "other-binary"):
        found = world.client.get_registered_model(model).aliases
        assert {alias: int(version) for alias, version in found.items()} == {"champion": 2, "previous": 1}
    assert is_consistent(world)


def test_an_old_approval_carried_out_again_changes_nothing(world, airflow):
    first = register_run(world.log_run(), world.store, world.settings)
    old = airflow.answer_promotion(first)
    old = (old.run, dict(old.details))
    promote(world, first)
    second = register_run(world.log_run(auc=0.95), world.store, world.settings)
    airflow.answer_promotion(second)
    promote(world, second, "made-binary-v2")
    record = airflow.answer_promotion(second)
    record.run, record.details = old
    assert promote(world, first)["decision"] == "approved"  # as it was
    assert read_aliases(world) == {"champion": 2, "previous": 1}
    assert len(list_decisions(world)) == 2
    with pytest.raises(Refused, match=r"not what there is now|has become champion"):
        promote(world, first, "another-run-with-the-same-answer")
    assert read_aliases(world) == {"champion": 2, "previous": 1}


def test_a_rejection_changes_no_champion(world, airflow):
    registered = register_run(world.log_run(), world.store, world.settings)
    airflow.answer_promotion(registered, option="Reject", reason="too few cases")
    done = promote(world, registered)
    assert (done["decision"], done["reason"]) == ("rejected", "too few cases")
    assert read_aliases(world) == {}
    assert list_decisions(world) == [("rejected", 1, "reviewer")]


def test_a_reviewer_is_known_by_login_name_and_not_by_number(world, airflow):
    registered = register_run(world.log_run(), world.store, world.settings)
    airflow.answer_promotion(registered).detail["responded_by_user"] = {"id": "reviewer", "name": "7"}
    with pytest.raises(Refused, match="7 answered, but is not one of the reviewers"):
        promote(world, registered)
    airflow.answer_promotion(registered)
    assert promote(world, registered)["reviewers"] == ["reviewer"]


def test_what_nobody_answers_in_time_is_rejected(world, airflow):
    registered = register_run(world.log_run(), world.store, world.settings)
    airflow.answer_promotion(registered, option="Reject", user=None, reason=None)
    assert promote(world, registered)["reviewers"] == ["(nobody, by the deadline)"]
    assert read_aliases(world) == {}
    airflow.answer_promotion(registered, option="Approve", user=None)
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
    airflow.answer_promotion(registered, **answer)
    with pytest.raises(Refused, match=message):
        promote(world, registered)
    assert read_aliases(world) == {"candidate": 1}
    assert list_decisions(world) == []


def test_no_answer_another_version_and_another_evidence(world, airflow):
    registered = register_run(world.log_run(), world.store, world.settings)
    record = airflow.answer_promotion(registered)
    record.detail["response_received"] = False
    with pytest.raises(Refused, match="nobody answered"):
        promote(world, registered)
    record = airflow.answer_promotion(registered)
    record.run["conf"]["version"] = 9
    with pytest.raises(Refused, match="not made-binary version 1"):
        promote(world, registered)
    record = airflow.answer_promotion(registered)
    record.detail["body"] = "about something else"
    with pytest.raises(Refused, match="what the reviewer read is not what there is now"):
        promote(world, registered)
    record = airflow.answer_promotion(registered)
    record.detail["body"] = record.detail["body"].replace("0.9000", "0.9900")  # a nicer figure, the same bundle
    with pytest.raises(Refused, match="what the reviewer read is not what there is now"):
        promote(world, registered)
    record = airflow.answer_promotion(registered)
    record.run["conf"]["evidence"] = "evidence-forged"
    with pytest.raises(Refused, match="its evidence is"):
        promote(world, registered)
    assert read_aliases(world) == {"candidate": 1}
    assert list_decisions(world) == []


def test_approved_but_the_gates_do_not_pass(world, airflow):
    registered = register_run(world.log_run(auc=0.5), world.store, world.settings)
    airflow.answer_promotion(registered)
    with pytest.raises(Refused, match="but gates come first"):
        promote(world, registered)
    assert read_aliases(world) == {"candidate": 1}


def test_a_policy_changed_after_the_review(world, airflow):
    registered = register_run(world.log_run(auc=0.7), world.store, world.settings)
    airflow.answer_promotion(registered)
    world.policy.write_text("name: lenient\nbinary: {roc_auc: 0.5, macro_f1: 0.5}\n")
    with pytest.raises(
        Refused, match="the policy lenient was changed after it was reviewed; start a new run of the DAG promote"
    ):
        promote(world, registered)
    assert read_aliases(world) == {"candidate": 1}


def test_a_champion_that_came_after_the_review(world, airflow):
    first, second = (register_run(world.log_run(auc=auc), world.store, world.settings) for auc in (0.9, 0.95))
    record = airflow.answer_promotion(second)
    reviewed = (record.run, dict(record.details))
    airflow.answer_promotion(first)
    promote(world, first)
    record.run, record.details = reviewed
    with pytest.raises(Refused, match="version 1 has become champion; start a new run of the DAG promote"):
        promote(world, second, "made-binary-v2")
    airflow.answer_promotion(second)  # judged and reviewed anew
    promote(world, second, "made-binary-v2")
    assert read_aliases(world) == {"champion": 2, "previous": 1}


def test_model_files_swapped_after_the_approval(world, airflow):
    registered = register_run(world.log_run(), world.store, world.settings)
    airflow.answer_promotion(registered)
    folder = mlflow.artifacts.download_artifacts(artifact_uri="models:/made-binary/1")
    victim = next(Path(folder).rglob("*.pkl"))
    victim.write_bytes(victim.read_bytes() + b"\0")
    with pytest.raises(Refused, match="model_files"):
        promote(world, registered)
    assert read_aliases(world) == {"candidate": 1}


def test_evidence_forged_in_the_store(world, airflow):
    registered = register_run(world.log_run(auc=0.6), world.store, world.settings)
    airflow.answer_promotion(registered)
    file = world.store.local(f"{world.store.object_key(registered['evidence'])}/object.json")
    file.write_text(file.read_text().replace("0.6", "0.9"))
    with pytest.raises(Refused, match="was changed: it is not what was recorded under that id"):
        promote(world, registered)


def test_several_have_to_approve(world, airflow):
    world.policy.write_text("name: lenient\nbinary: {roc_auc: 0.8, macro_f1: 0.5}\napprovals: 2\n")
    settings = world.settings.model_copy(update={"reviewers": ("reviewer", "second")})
    world.settings = settings
    registered = register_run(world.log_run(), world.store, world.settings)
    airflow.answer_promotion(registered, {})
    with pytest.raises(Refused, match="asks for 2 reviewers to approve, and 1 did"):
        promote(world, registered)
    airflow.answer_promotion(registered, {}, {})
    with pytest.raises(Refused, match="reviewer approved twice"):
        promote(world, registered)
    airflow.answer_promotion(registered, {}, {"user": "second", "option": "Reject", "reason": "not yet"})
    assert promote(world, registered)["decision"] == "rejected"
    registered = register_run(world.log_run(), world.store, world.settings)
    airflow.answer_promotion(registered, {}, {"user": "second", "reason": "agreed"})
    done = promote(world, registered, "another")
    assert (done["decision"], done["reviewers"]) == ("approved", ["reviewer", "second"])
    assert read_aliases(world) == {"champion": 2}


def test_what_nobody_answered_in_time_may_be_asked_in_another_run(world, airflow):
    registered = register_run(world.log_run(), world.store, world.settings)
    airflow.answer_promotion(registered, option="Reject", user=None, reason=None)
    promote(world, registered)
    airflow.answer_promotion(registered, at="2026-01-02T00:00:00Z")  # the review was cleared, and asked again
    with pytest.raises(Refused, match=r"was ended by .nobody, by the deadline.*; start a new run of the DAG promote"):
        promote(world, registered)
    assert promote(world, registered, "by hand")["decision"] == "approved"
    assert list_decisions(world) == [("rejected", 1, "(nobody, by the deadline)"), ("approved", 1, "reviewer")]


@pytest.mark.parametrize(
    ("changes", "name"),
    [({"airflow_user": ""}, "BREAKHIS_AIRFLOW_URL"), ({"audit_key": SecretStr("")}, "BREAKHIS_AUDIT_KEY")],
)
def test_without_a_service_account_or_a_key(world, airflow, changes, name):
    register_run(world.log_run(), world.store, world.settings)
    with pytest.raises(ConfigError, match=name):
        promote_version("made-binary", "1", "r", world.store, world.settings.model_copy(update=changes))
