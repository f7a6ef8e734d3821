"""A champion whose run was deleted in MLflow and purged, against a real MLflow registry on SQLite."""

import subprocess
import sys

import pytest

from ml.core.errors import RunGone
from ml.promotion.auditing import audit_registry
from ml.promotion.decisions import promote_version, propose_rollback
from ml.promotion.judging import judge_version
from ml.promotion.registration import register_run
from tests.helpers.decisions import read_aliases

GONE = r"made-binary version 2: its run \w+ was deleted in MLflow and purged"


@pytest.fixture
def bereaved(two_champions):
    """The registry after the run of the champion, version 2, was purged, and version 3 registered."""
    world = two_champions
    run = world.client.get_model_version("made-binary", "2").run_id
    world.client.delete_run(run)
    command = [sys.executable, "-m", "mlflow", "gc", "--backend-store-uri", world.settings.mlflow_uri, "--run-ids", run]
    subprocess.run(command, check=True, capture_output=True)
    register_run(world.log_run(auc=0.97), world.store, world.settings)
    return world


def leave_it_to_the_reviewer(world):
    world.policy.write_text(world.policy.read_text() + "comparison: {champion_gone: warn}\n")


def test_it_blocks_the_next_version_and_says_the_way_out(bereaved):
    world = bereaved
    verdict = judge_version("made-binary", "3", world.store, world.settings)
    assert not verdict["passed"]
    [gate] = [gate for gate in verdict["gates"] if not gate["passed"]]
    assert gate["name"] == "not worse than the champion (version 2)"
    for text in ("was deleted in MLflow and purged", "by the DAG rollback", "comparison: {champion_gone: warn}"):
        assert text in gate["reason"]
    [fault] = audit_registry(world.store, world.settings)["faults"]
    assert fault == gate["reason"]


def test_a_policy_may_leave_it_to_the_reviewer(bereaved, airflow):
    world = bereaved
    leave_it_to_the_reviewer(world)
    verdict = judge_version("made-binary", "3", world.store, world.settings)
    assert verdict["passed"]
    assert [warning for warning in verdict["warnings"] if "was deleted in MLflow and purged" in warning]
    bundle = world.store.meta(verdict["bundle"])
    assert bundle["champion"]["metrics"]["roc_auc"] == 0.95  # as the evidence says that the audit log names
    assert bundle["champion"]["artifacts"] == {}
    airflow.answer_promotion({"model": "made-binary", "version": 3, "evidence": verdict["evidence"]})
    promote_version("made-binary", "3", "made-binary-v3", world.store, world.settings)
    assert read_aliases(world) == {"champion": 3, "previous": 2}


def test_going_back_to_it_is_refused_in_the_same_words(bereaved, airflow):
    world = bereaved
    leave_it_to_the_reviewer(world)
    verdict = judge_version("made-binary", "3", world.store, world.settings)
    airflow.answer_promotion({"model": "made-binary", "version": 3, "evidence": verdict["evidence"]})
    promote_version("made-binary", "3", "made-binary-v3", world.store, world.settings)
    with pytest.raises(RunGone, match=GONE):
        propose_rollback("made-binary", "2", "it was better", world.store, world.settings)
