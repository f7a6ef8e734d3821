"""The audit of the log, the aliases and the champions' files, against a real MLflow registry on SQLite."""

from datetime import timedelta

import pytest

from ml.core.errors import Refused
from ml.promotion import auditing
from ml.promotion.judging import judge_version
from ml.promotion.registration import register_run
from ml.registry.registered_model import RegisteredModel
from tests.helpers.decisions import Killed, model_folder, promote


def find_faults(world):
    return auditing.audit_registry(world.store, world.settings)["faults"]


@pytest.mark.parametrize(
    ("tamper", "message"),
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
def test_a_champion_that_was_tampered_with_is_none_to_be_compared_with(two_champions, tamper, message):
    world = two_champions
    register_run(world.log_run(auc=0.97), world.store, world.settings)
    assert find_faults(world) == []
    tamper(world)
    with pytest.raises(Refused, match=message):
        judge_version("made-binary", "3", world.store, world.settings)
    assert any(message in fault for fault in find_faults(world))


def test_the_daily_check_looks_at_the_champion_before_too(two_champions):
    world = two_champions
    world.client.delete_registered_model_alias("made-binary", "previous")
    assert (
        "the alias previous is on version none, but by the audit log it belongs to version 1" in find_faults(world)[0]
    )
    world.client.set_registered_model_alias("made-binary", "previous", "1")
    next(model_folder(1).rglob("*.pkl")).write_bytes(b"")
    assert "version 1: changed after" in find_faults(world)[0]


def test_a_champion_without_a_record_is_told(world):
    register_run(world.log_run(), world.store, world.settings)
    register_run(world.log_run(auc=0.95), world.store, world.settings)
    world.client.set_registered_model_alias("made-binary", "champion", "1")
    faults = find_faults(world)
    assert "the alias champion is on version 1, but by the audit log it belongs to version none" in faults[0]
    with pytest.raises(Refused, match="alias champion on version 1, but the audit log has no decision about it"):
        register_run(world.log_run(auc=0.96), world.store, world.settings)
    with pytest.raises(Refused, match="take the alias champion away in MLflow"):
        judge_version("made-binary", "2", world.store, world.settings)


def test_a_wiped_log_is_told_while_there_is_a_champion(two_champions):
    world = two_champions
    for name in world.store.keys("audit/log"):
        world.store.remove(f"audit/log/{name}")
    world.client.delete_registered_model_tag("made-binary", "breakhis.audit")
    assert (
        "the alias champion is on version 2, but by the audit log it belongs to version none" in find_faults(world)[0]
    )


def test_the_last_record_cut_off_is_told(two_champions):
    world = two_champions
    world.store.remove(f"audit/log/{world.store.keys('audit/log')[-1]}")
    assert "the log's end was cut off" in find_faults(world)[0]


def test_what_was_not_carried_out_for_long_is_told(world, airflow, monkeypatch):
    registered = register_run(world.log_run(), world.store, world.settings)
    airflow.answer_promotion(registered)

    def killed(*_, **__):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(RegisteredModel, "move_aliases", killed)
        with pytest.raises(Killed):
            promote(world, registered)
    assert find_faults(world) == []  # it may be at it
    monkeypatch.setattr(auditing, "_MAX_PENDING", timedelta(0))
    assert "record 3 (approved, version 1) has not been carried out since" in find_faults(world)[0]
