"""Decisions are carried out by processes that are killed, paused and overtaken, in a real MLflow registry on SQLite."""

from contextlib import nullcontext

import pytest

from ml.core.errors import Refused
from ml.promotion import decisions
from ml.promotion.alias_history import CARRIED_OUT
from ml.promotion.audit_log import AuditLog
from ml.promotion.champion import reconcile_aliases
from ml.promotion.registration import register_run
from ml.registry.registered_model import Aliases, RegisteredModel
from tests.helpers.decisions import Killed, is_consistent, list_decisions, open_log, promote, read_aliases, roll_back_to


@pytest.mark.parametrize("where", ["move_aliases", "set_audit_anchor", "CARRIED_OUT", "the last anchor"])
def test_killed_anywhere_the_next_one_finishes_it(world, airflow, monkeypatch, where):
    registered = register_run(world.log_run(), world.store, world.settings)
    airflow.answer_promotion(registered)

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
    assert list_decisions(world) == [("approved", 1, "reviewer")]
    airflow.answer_rollback(1, started_by="engineer")  # another decision about the model, which is refused
    with pytest.raises(Refused):
        roll_back_to(world, 7)
    record = airflow.answer_promotion(registered) if where != "move_aliases" else None
    reconcile_aliases(RegisteredModel("made-binary", world.settings), open_log(world))
    assert read_aliases(world)["champion"] == 1
    assert is_consistent(world)
    assert record is None or list_decisions(world) == [("approved", 1, "reviewer")]
    airflow.answer_promotion(second)
    promote(world, second, "made-binary-v2")
    assert read_aliases(world) == {"champion": 2, "previous": 1}
    assert is_consistent(world)


def test_stopped_and_overtaken_it_puts_right_what_it_did_late(world, airflow, monkeypatch):
    """Between its reading and its setting of aliases, another process promotes a newer version."""
    first, second = (register_run(world.log_run(auc=auc), world.store, world.settings) for auc in (0.9, 0.95))
    airflow.answer_promotion(first)
    late, move_aliases = [], RegisteredModel.move_aliases

    def overtaken(model, wanted, **decided):
        if not late:
            late.append(wanted)
            monkeypatch.setattr(decisions, "hold_lease", lambda *_: nullcontext())  # its lease has run out
            reconcile_aliases(RegisteredModel(model.name, world.settings), open_log(world))
            airflow.answer_promotion(second)
            promote(world, second, "made-binary-v2")
        move_aliases(model, wanted, **decided)

    monkeypatch.setattr(RegisteredModel, "move_aliases", overtaken)
    promote(world, first)
    assert late[0].champion == 1
    assert read_aliases(world) == {"champion": 2, "previous": 1}
    assert is_consistent(world)


def test_a_candidate_that_came_meanwhile_stays_one(world):
    for auc in (0.9, 0.95):
        register_run(world.log_run(auc=auc), world.store, world.settings)
    RegisteredModel("made-binary", world.settings).move_aliases(Aliases(1), decided=1)
    assert read_aliases(world) == {"champion": 1, "candidate": 2}
    RegisteredModel("made-binary", world.settings).move_aliases(Aliases(1), decided=2)
    assert read_aliases(world) == {"champion": 1}


def test_the_end_of_the_log_cut_off_stops_everything(two_champions, airflow):
    world = two_champions
    third = register_run(world.log_run(auc=0.97), world.store, world.settings)
    airflow.answer_promotion(third)
    names = world.store.keys("audit/log")
    for name in names[2:]:
        world.store.remove(f"audit/log/{name}")
    with pytest.raises(Refused, match="the log's end was cut off; nothing is decided about made-binary"):
        promote(world, third, "made-binary-v3")
    assert not is_consistent(world)
