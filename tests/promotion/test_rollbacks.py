"""Rollbacks and withdrawals against a real MLflow registry on SQLite; the tests give Airflow's record."""

import pytest

from ml.core.errors import Refused, RegistryError
from ml.promotion.alias_history import APPROVED
from ml.promotion.champion import find_alias_fault
from ml.promotion.decisions import propose_rollback, withdraw_version
from ml.promotion.registration import register_run
from ml.promotion.reviews import parse_bundle_id
from ml.registry.registered_model import RegisteredModel
from tests.helpers.decisions import (
    is_consistent,
    list_decisions,
    model_folder,
    open_log,
    promote,
    read_aliases,
    roll_back_to,
)


def test_a_rollback_names_what_was_approved(two_champions):
    world = two_champions
    approved = {
        r["version"]: r["bundle"] for r in open_log(world).read_model_records("made-binary") if r["event"] == APPROVED
    }
    proposed = propose_rollback("made-binary", "1", "it fails on 400X", world.store, world.settings)
    assert proposed["bundle"] == approved[1]
    assert parse_bundle_id(proposed["review"]) == approved[1]
    assert f"/breakhis/reviews/{approved[2]}/" in proposed["review"]


def test_a_rollback_brings_a_former_champion_back(two_champions, airflow):
    world = two_champions
    airflow.answer_rollback(1)
    done = roll_back_to(world, 1)
    assert (done["decision"], done["version"], done["previous"]) == ("rolled_back", 1, 2)
    assert read_aliases(world) == {"champion": 1, "previous": 2}
    assert roll_back_to(world, 1) == done
    assert list_decisions(world)[-1] == ("rolled back", 1, "reviewer")
    assert is_consistent(world)


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
    airflow.answer_rollback(version, **only)
    with pytest.raises(Refused, match=message):
        roll_back_to(world, version)
    assert read_aliases(world) == {"champion": 2, "previous": 1, "candidate": 3}


def test_a_rollback_that_was_rejected_or_about_something_else(two_champions, airflow):
    world = two_champions
    airflow.answer_rollback(1, option="Reject", reason="keep it")
    assert roll_back_to(world, 1)["decision"] == "rejected"
    airflow.answer_rollback(1, at="2026-01-02T00:00:00Z")
    with pytest.raises(Refused, match="ended by reviewer, who rejected: looks right"):
        roll_back_to(world, 1)
    record = airflow.answer_rollback(1)
    read = record.details["review"]
    for key in ("body", "subject"):
        record.details["review"] = read | {key: "Withdraw version 2?"}
        with pytest.raises(Refused, match="what was confirmed is not what there is now"):
            roll_back_to(world, 1, "back-2")
    assert read_aliases(world) == {"champion": 2, "previous": 1}


def test_a_rollback_is_to_what_was_champion_and_says_so(two_champions, airflow):
    world = two_champions
    evidence = world.client.get_model_version("made-binary", "1").tags["breakhis.evidence"]
    record = airflow.answer_rollback(1)
    assert evidence in record.details["review"]["body"]
    assert roll_back_to(world, 1)["evidence"] == evidence
    next(model_folder(2).rglob("*.pkl")).write_bytes(b"")
    airflow.answer_rollback(2)
    with pytest.raises(Refused, match="version 2: changed after"):
        roll_back_to(world, 2, "back-2")
    assert read_aliases(world) == {"champion": 1, "previous": 2}


def test_from_a_champion_that_was_tampered_with_there_is_a_way_back(two_champions, airflow):
    world = two_champions
    world.client.set_model_version_tag("made-binary", "2", "breakhis.evidence", "evidence-0123456789ab")
    airflow.answer_rollback(1)
    assert roll_back_to(world, 1)["decision"] == "rolled_back"


def test_an_alias_moved_by_hand_is_noticed_and_put_right(two_champions, airflow):
    world = two_champions
    third = register_run(world.log_run(auc=0.97), world.store, world.settings)
    world.client.set_registered_model_alias("made-binary", "champion", "1")
    moved = find_alias_fault(RegisteredModel("made-binary", world.settings), open_log(world))
    assert "champion is on version 1, but by the audit log it belongs to version 2" in moved
    world.client.set_registered_model_alias("made-binary", "champion", "2")
    airflow.answer_promotion(third)
    world.client.set_registered_model_alias("made-binary", "champion", "1")
    with pytest.raises(Refused, match="moved without a recorded decision"):
        promote(world, third, "made-binary-v3")
    airflow.answer_rollback(2)
    roll_back_to(world, 2)
    assert read_aliases(world)["champion"] == 2
    assert is_consistent(world)


def test_a_withdrawn_candidate_can_be_approved_no_more(world, airflow):
    registered = register_run(world.log_run(), world.store, world.settings)
    record = airflow.answer_rollback(1, reason="mislabelled slide")
    done = withdraw_version("made-binary", "1", "out-1", world.store, world.settings)
    assert (done["decision"], done["reason"]) == ("withdrawn", "mislabelled slide")
    assert read_aliases(world) == {}
    airflow.answer_promotion(registered)
    with pytest.raises(Refused, match="was withdrawn by engineer: mislabelled slide"):
        promote(world, registered)
    record = airflow.answer_rollback(1, reason="")
    with pytest.raises(Refused, match="with a reason"):
        withdraw_version("made-binary", "1", "out-2", world.store, world.settings)
    record = airflow.answer_rollback(1, started_by=None)
    with pytest.raises(Refused, match="started by a person"):
        withdraw_version("made-binary", "1", "out-3", world.store, world.settings)
    assert record.run["conf"]["version"] == "1"


def test_what_is_no_version_cannot_be_withdrawn(world, airflow):
    register_run(world.log_run(), world.store, world.settings)
    airflow.answer_rollback(7)
    with pytest.raises(RegistryError, match="no version 7"):
        withdraw_version("made-binary", "7", "out", world.store, world.settings)
    assert list_decisions(world) == []


def test_the_champion_cannot_be_withdrawn(two_champions, airflow):
    airflow.answer_rollback(2)
    with pytest.raises(Refused, match="is the champion"):
        withdraw_version("made-binary", "2", "out", two_champions.store, two_champions.settings)


def test_a_rejected_rollback_stays_rejected_where_its_review_was_cleared_before_it_was_carried_out(
    two_champions, airflow
):
    world = two_champions
    airflow.answer_rollback(1)
    airflow.reject_elsewhere({"model": "made-binary", "version": 1, "evidence": None}, "back-1")
    assert roll_back_to(world, 1)["decision"] == "rejected"
    assert read_aliases(world) == {"champion": 2, "previous": 1}
    airflow.answer_rollback(1)
    assert roll_back_to(world, 1, "back-2")["decision"] == "rolled_back"  # another request, with reasons of its own


def test_to_go_back_to_a_withdrawn_version_has_to_be_asked_for_expressly(two_champions, airflow):
    world = two_champions
    airflow.answer_rollback(1, reason="mislabelled slide")
    withdraw_version("made-binary", "1", "out-1", world.store, world.settings)
    asked = ("made-binary", "1", "it fails on 400X", world.store, world.settings)
    with pytest.raises(
        Refused, match=r'withdrawn by engineer on .*: mislabelled slide; .* \("although_withdrawn": true'
    ):
        propose_rollback(*asked)
    proposed = propose_rollback(*asked, although_withdrawn=True)
    body = proposed["review"]
    assert "**Withdrawn.** engineer withdrew this version on" in body
    assert "mislabelled slide" in body

    airflow.answer_rollback(1)
    airflow.detail.update(subject=proposed["title"], body=body)
    for said in (False, "true", 1):
        airflow.run["conf"]["although_withdrawn"] = said
        with pytest.raises(Refused, match="was withdrawn by engineer"):
            roll_back_to(world, 1)
    assert read_aliases(world)["champion"] == 2
    airflow.run["conf"]["although_withdrawn"] = True
    assert roll_back_to(world, 1)["decision"] == "rolled_back"

    airflow.answer_rollback(2)  # and back: having been champion again, version 1 is withdrawn no more
    roll_back_to(world, 2, "back-2")
    assert "Withdrawn" not in propose_rollback(*asked)["review"]
