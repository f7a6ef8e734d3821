"""Who started what led to a model is kept where nobody can change it; what is unknown entitles nobody."""

import json

import pytest

from ml.core.airflow_api import AirflowApi
from ml.core.errors import AirflowError, ConfigError, Refused
from ml.data.training_sets import load_training_set
from ml.promotion.alias_history import STARTED
from ml.promotion.judging import judge_version
from ml.promotion.registration import register_run
from ml.promotion.starters import find_starters, record_starters, trace_starters
from tests.helpers.decisions import is_consistent, open_log, promote, read_aliases

RETRAINING = ("retrain_made", "r1")
BY_A_RUN = {"triggering_user_name": None, "triggered_by": "operator"}
RUNS = {
    RETRAINING: {"triggering_user_name": None, "run_type": "asset_triggered", "triggered_by": "asset"},
    ("retrain_made", "r2"): {"triggering_user_name": None, "run_type": "scheduled", "triggered_by": "timetable"},
    ("retrain_made", "r6"): {"triggering_user_name": None, "run_type": "scheduled", "triggered_by": "backfill"},
    ("retrain_made", "r3"): {"triggering_user_name": None, "triggered_by": "rest_api"},
    ("retrain_made", "r4"): BY_A_RUN | {"conf": {"origin": {"dag": "ingest_made", "run": "i1"}}},
    ("retrain_made", "r5"): BY_A_RUN | {"conf": {"origin": {"dag": "ingest_made", "run": "gone"}}},
    ("ingest_made", "i1"): {"triggering_user_name": "reviewer", "triggered_by": "ui"},
}


@pytest.fixture
def runs(monkeypatch):
    """Airflow's runs, which tests may change, and the events that started those that news started."""
    known = {run: dict(record) for run, record in RUNS.items()}
    events = [{"source_dag_id": "ingest_made", "source_run_id": "i1"}]

    def dag_run(self, dag, run):
        if (dag, run) not in known:
            raise AirflowError("no such run", status=404)
        return {"conf": {}} | known[dag, run]

    monkeypatch.setattr(AirflowApi, "dag_run", dag_run)
    monkeypatch.setattr(AirflowApi, "upstream_events", lambda self, dag, run: events)
    known["events"] = events
    return known


@pytest.fixture
def in_run(world):
    """The settings of a stage in the run r1 of the retraining."""
    return world.settings.model_copy(update=dict(zip(("dag", "dag_run"), RETRAINING, strict=True)))


@pytest.mark.parametrize(
    ("run", "users", "unknown"),
    [
        (RETRAINING, {"reviewer": "ingest_made/i1"}, ""),
        (("retrain_made", "r2"), {}, ""),
        (("retrain_made", "r3"), {}, "Airflow does not say who started run r3"),
        (("retrain_made", "r6"), {}, "Airflow does not say who started run r6"),  # a user did, and chose its conf
        (("retrain_made", "r4"), {"reviewer": "ingest_made/i1"}, ""),
        (("retrain_made", "r5"), {}, "Airflow has run gone of the DAG ingest_made no more"),
        (("retrain_made", "gone"), {}, "Airflow has run gone of the DAG retrain_made no more"),
    ],
)
def test_runs_are_traced_to_people(runs, run, users, unknown):
    found = trace_starters([run, run], AirflowApi("http://localhost:1", "service", "stand-in"))
    assert (found.users, found.unknown.startswith(unknown), bool(found.unknown)) == (users, True, bool(unknown))


def test_news_that_no_run_made_is_of_unknown_origin(runs):
    runs["events"][0]["source_run_id"] = None
    found = trace_starters([RETRAINING], AirflowApi("http://localhost:1", "service", "stand-in"))
    assert "asset event that no run made" in found.unknown


def test_who_started_a_run_stays_known_after_it_was_deleted_and_started_again_by_another(world, runs, in_run):
    made = load_training_set("made", world.settings.conf)
    run = ("retrain_made", "again")
    settings = in_run.model_copy(update={"dag_run": "again"})
    runs[run] = {"triggering_user_name": "reviewer"}
    assert record_starters(made, world.store, settings)["users"] == {"reviewer": "retrain_made/again"}
    record_starters(made, world.store, settings)  # a retry
    runs[run] = {"triggering_user_name": "engineer"}  # it was deleted, and started again under its name
    record_starters(made, world.store, settings)
    del runs[run]
    records = open_log(world).read_model_records("made-binary")
    assert set(find_starters(run, records).users) == {"reviewer", "engineer"}
    assert len([r for r in records if r["event"] == STARTED and r["run"] == "retrain_made/again"]) == 2
    assert is_consistent(world)


def test_by_hand_nobody_started_a_run(world):
    with pytest.raises(ConfigError, match="as a task of one, not by hand"):
        record_starters(load_training_set("made", world.settings.conf), world.store, world.settings)


@pytest.mark.parametrize(
    ("tag", "starter", "message"),
    [
        ([["retrain_made", "r1"]], "reviewer", "reviewer started run r7 of the DAG retrain_made, which led to this"),
        ([], "engineer", "nobody is entitled to approve it: its MLflow run does not say"),
        ([["retrain_made", "gone"]], "engineer", "the audit log does not say who started run gone"),
        ([["retrain_made", "r1"], ["retrain_made", "gone"]], "engineer", "who started run gone"),
        ([["retrain_made", "r1"]], "engineer", None),
    ],
)
def test_who_may_approve_is_what_the_log_says(world, airflow, tag, starter, message):
    """Airflow is not asked, so nothing that is cleared or deleted there, and no tag that is missing, helps anybody."""
    if starter != "engineer":
        tag = [["retrain_made", "r7"]]
        world.record_starter(starter, ("retrain_made", "r7"))
    registered = register_run(world.log_run(**{"breakhis.dag_runs": json.dumps(tag)}), world.store, world.settings)
    airflow.answer_promotion(registered)
    if message is None:
        assert promote(world, registered)["decision"] == "approved"
        return
    with pytest.raises(Refused, match=message):
        promote(world, registered)
    assert read_aliases(world) == {"candidate": 1}


def test_a_starter_that_is_unknown_in_the_log_is_unknown(world, airflow):
    world.record_starter(run=("retrain_made", "r8"), unknown="Airflow does not say who started run r8")
    tag = json.dumps([["retrain_made", "r8"]])
    registered = register_run(world.log_run(**{"breakhis.dag_runs": tag}), world.store, world.settings)
    airflow.answer_promotion(registered)
    with pytest.raises(Refused, match="nobody is entitled to approve it: Airflow does not say who started run r8"):
        promote(world, registered)


def test_a_tag_removed_after_the_registration_is_noticed(world, airflow):
    registered = register_run(world.log_run(), world.store, world.settings)
    airflow.answer_promotion(registered)
    run = world.client.get_model_version("made-binary", "1").run_id
    world.client.delete_tag(run, "breakhis.dag_runs")
    with pytest.raises(Refused, match=r"changed after evidence-.* was recorded: dag_runs"):
        promote(world, registered)


def test_reviewers_are_not_asked_where_nobody_may_approve(world, airflow):
    registered = register_run(world.log_run(**{"breakhis.dag_runs": "[]"}), world.store, world.settings)
    airflow.answer_promotion(registered)
    asking = world.settings.model_copy(update={"dag": "promote", "dag_run": "asked-1"})
    with pytest.raises(Refused, match="nobody is entitled to approve it"):
        judge_version("made-binary", "1", world.store, asking, evidence=registered["evidence"])


def register_as_earlier(world, tag):
    """Takes over a version with evidence of an earlier release, which does not say who started what."""
    run = world.log_run(**{"breakhis.dag_runs": json.dumps(tag)})
    registered = register_run(run, world.store, world.settings)
    content = {k: v for k, v in world.store.meta(registered["evidence"]).items() if k not in ("id", "starters")}
    earlier = world.store.create("evidence", content, content)
    world.client.set_model_version_tag("made-binary", "1", "breakhis.evidence", earlier)
    registered = register_run(run, world.store, world.settings)
    assert registered["evidence"] == earlier
    return registered


@pytest.mark.parametrize(
    ("tag", "origin", "changes", "message"),
    [
        ([["retrain_made", "r9"]], None, {}, "reviewer started run i1 of the DAG ingest_made"),
        ([["retrain_made", "r2"]], {"dag": "retrain_made", "run": "r9"}, {}, "reviewer started run i1 of the DAG"),
        ([["retrain_made", "r2"]], None, {("retrain_made", "r2"): {"triggering_user_name": "reviewer"}}, "run r2 of"),
        ([["retrain_made", "gone"]], None, {}, "Airflow has run gone of the DAG retrain_made no more"),
        ([], None, {}, "nobody is entitled to approve it: its MLflow run does not say"),
        ([["retrain_made", "r2"]], None, {}, None),
        ([["retrain_made", "r9"]], None, {("ingest_made", "i1"): {"triggering_user_name": "engineer"}}, None),
    ],
)
def test_of_versions_registered_by_an_earlier_release_airflow_is_asked(
    world, airflow, runs, monkeypatch, tag, origin, changes, message
):
    runs |= {("retrain_made", "r9"): RUNS[RETRAINING]} | changes
    registered = register_as_earlier(world, tag)
    airflow.answer_promotion(registered)
    run = airflow.run | {"conf": airflow.run["conf"] | ({"origin": origin} if origin else {})}
    runs["promote", "made-binary-v1"] = run
    if message is None:
        assert promote(world, registered)["decision"] == "approved"
        return
    with pytest.raises(Refused, match=message):
        promote(world, registered)
    assert read_aliases(world) == {"candidate": 1}


def test_the_order_in_which_runs_are_named_does_not_matter(runs):
    api = AirflowApi("http://localhost:1", "service", "stand-in")
    names = [run for run in RUNS if run[0] == "retrain_made"]
    assert trace_starters(names, api).users == trace_starters(names[::-1], api).users
