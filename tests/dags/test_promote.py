import json

import pytest
from airflow.sdk.exceptions import ParamValidationError
from airflow.serialization.serialized_objects import DagSerialization

EVIDENCE = ["--evidence", "{{ params.evidence }}"]
CANDIDATE = ["--", "{{ params.model }}", "{{ params.version }}"]
CONF = {"model": "demo-binary", "version": "3", "evidence": "evidence-0123456789ab"}


@pytest.fixture
def dag(conf, read):
    return read("promote")["promote"]


def test_gate_then_a_person_then_the_registry(dag):
    downstream = {task.task_id: task.downstream_task_ids for task in dag.tasks}
    assert downstream == {
        "gate": {"review"},
        "review": {"review_2", "promote"},
        "review_2": {"review_3", "promote"},
        "review_3": {"promote"},
        "promote": {"decision"},
        "decision": {"approved", "rejected"},
        "approved": set(),
        "rejected": set(),
    }


def test_the_same_version_and_evidence_are_judged_and_promoted(dag):
    assert dag.get_task("gate").arguments == [*EVIDENCE, *CANDIDATE]
    assert dag.get_task("promote").arguments == [*EVIDENCE, "--dag-run", "{{ run_id }}", *CANDIDATE]


def test_the_reviewer_sees_what_the_gate_wrote(dag):
    for number, name in enumerate(("review", "review_2", "review_3"), start=1):
        review = dag.get_task(name)
        assert review.subject == "{{ ti.xcom_pull(task_ids='gate')['title'] }}"
        assert review.body == "{{ ti.xcom_pull(task_ids='gate')['review'] }}"
        assert list(review.params) == ["reason"]
        assert (review.number, review.approvals) == (number, "{{ ti.xcom_pull(task_ids='gate')['approvals'] }}")
    # Skipped reviews do not skip what follows; a failed one stops it.
    assert dag.get_task("promote").trigger_rule == "none_failed_min_one_success"


def test_only_what_asks_and_what_decides_has_the_service_account_and_one_at_a_time(dag):
    connections = {task.task_id: getattr(task, "connections", {}) for task in dag.tasks}
    assert {task: used for task, used in connections.items() if used} == {
        "gate": ("breakhis_airflow", "breakhis_audit", "breakhis_mlflow_promoter"),
        "promote": ("breakhis_airflow", "breakhis_audit", "breakhis_mlflow_promoter"),
    }
    assert dag.get_task("promote").pool == "promotion"
    assert dag.max_active_runs > 16  # a candidate that waits for a person holds up no other


def test_it_starts_only_when_told_to_and_is_not_paused(dag):
    assert dag.timetable.__class__.__name__ == "NullTimetable"
    assert dag.is_paused_upon_creation is False


def test_decision_shows_what_was_recorded(dag):
    decide = dag.get_task("decision").python_callable
    assert [decide("approved"), decide("rejected")] == ["approved", "rejected"]


def test_a_run_needs_a_whole_candidate(dag):
    dag.params.update(CONF)
    dag.params.validate()


@pytest.mark.parametrize("wrong", [{"model": ""}, {"version": "latest"}, {"version": "0"}, {"evidence": "evidence-1"}])
def test_a_run_of_half_a_candidate_is_refused(dag, wrong):
    with pytest.raises(ParamValidationError):
        dag.params.update({**CONF, **wrong})


def test_what_airflow_stores_of_it_holds_no_secret(conf, read, monkeypatch):
    monkeypatch.setenv("AIRFLOW_CONN_BREAKHIS_AIRFLOW", "http://service:planted@airflow:8080")
    assert "planted" not in json.dumps(DagSerialization.to_dict(read("promote")["promote"]))
