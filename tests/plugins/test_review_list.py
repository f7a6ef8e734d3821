"""The list of reviews: what is open by the audit log stays on it, and every decision is found."""

import pytest
from airflow.api_fastapi.core_api.security import get_user
from fastapi.testclient import TestClient

from breakhis_airflow import airflow_database
from breakhis_airflow.airflow_database import AuditCheck, WaitingReview
from breakhis_airflow.web import create_app
from ml.core.settings import Settings
from ml.promotion.alias_history import ASKED, NOBODY_IN_TIME
from ml.promotion.audit_log import AuditLog

FORM = "/dags/promote/runs/asked-1/tasks/review/required_actions"
EVIDENCE = "evidence-0123456789ab"


@pytest.fixture
def airflow(monkeypatch):
    """The reviews that wait in Airflow, and the states of its runs."""
    waiting, states = [], {}
    monkeypatch.setattr(airflow_database, "read_waiting_reviews", lambda: waiting)
    monkeypatch.setattr(airflow_database, "read_run_states", lambda runs: {r: states[r] for r in runs if r in states})
    monkeypatch.setattr(airflow_database, "read_audit_check", AuditCheck)
    return waiting, states


@pytest.fixture
def show(airflow):
    app = create_app()
    app.dependency_overrides[get_user] = object
    app.dependency_overrides[app.state.may_read] = lambda: None
    client = TestClient(app)

    def get(**parameters):
        return client.get("/reviews/", params=parameters)

    return get


@pytest.fixture
def log(store, tmp_path):
    log = AuditLog(store, Settings(home=tmp_path, store=store.root, audit_key="k"))

    def append(event, model="made-binary", **facts):
        record = {"version": 3, "run": "promote/asked-1"}
        if event == ASKED:
            record |= {"evidence": EVIDENCE, "review": "review-1"}
        else:
            record |= {"by": "reviewer", "reason": "because", "champion": None}
        return log.append(event, model, **record | facts)

    return append


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (None, "is in Airflow no more"),
        ("failed", "failed on the way"),
        ("success", "somebody marked it"),
        ("running", "is being carried out"),
        ("queued", "is the DAG promote paused?"),
        ("restarting", "restarting"),
    ],
)
def test_what_is_open_and_cannot_be_answered_stays_with_what_to_do(show, airflow, log, state, words):
    log(ASKED)
    if state:
        airflow[1]["asked-1"] = state
    page = show().text
    assert words in page
    assert EVIDENCE in page
    assert ("/dags/promote/runs/asked-1" in page) == (state is not None)


def test_what_waits_is_not_told_twice(show, airflow, log):
    log(ASKED)
    airflow[0].append(WaitingReview("Promote?", None, "2026-11-23 12:00", FORM, "promote", "asked-1"))
    assert FORM in show().text
    assert "not decided yet" not in show().text


@pytest.mark.parametrize(("state", "is_shown"), [("failed", False), ("success", False), (None, True)])
def test_a_run_that_ended_is_forgotten_once_another_asks_anew(show, airflow, log, state, is_shown):
    """But one that is gone blocks the version in the other run, too."""
    log(ASKED)
    log(ASKED, run="promote/asked-2", review="review-2")
    if state:
        airflow[1]["asked-1"] = state
    airflow[1]["asked-2"] = "running"
    page = show().text
    assert ("promote/asked-1" in page) == is_shown
    assert "promote/asked-2" in page


@pytest.mark.parametrize(
    ("facts", "is_open"),
    [
        ({"event": "approved", "evidence": EVIDENCE, "run": "promote/other"}, False),
        ({"event": "approved", "evidence": "evidence-of-another", "run": "promote/other"}, True),
        ({"event": "rejected", "evidence": EVIDENCE, "run": "promote/other"}, False),
        ({"event": "rejected", "by": NOBODY_IN_TIME}, False),
        ({"event": "rejected", "by": NOBODY_IN_TIME, "run": "promote/other"}, True),
        ({"event": "withdrawn", "run": "withdraw/a"}, False),
        ({"event": "withdrawn", "run": "withdraw/a", "version": 4}, True),
        ({"event": "approved", "model": "other", "evidence": EVIDENCE}, True),
    ],
)
def test_a_question_is_open_until_the_log_says_otherwise(show, log, facts, is_open):
    log(ASKED)
    log(**facts)
    assert ("Asked, and not decided yet" in show().text) == is_open


def test_a_run_that_asks_again_after_its_decision_is_open(show, log):
    log(ASKED)
    log("rejected", by=NOBODY_IN_TIME)
    log(ASKED, review="review-2")
    assert "Asked, and not decided yet" in show().text


def test_every_decision_is_on_a_page(show, log):
    for number in range(101):
        log("rejected", version=number, reason=f"reason {number}.", run=f"promote/{number}")
    first, second, third = (show(page=number).text for number in (1, 2, 3))
    assert "reason 100." in first
    assert "reason 50." not in first
    assert "reason 50." in second
    assert "reason 0." in third
    assert "page=2#decided" in first
    assert "Newer" not in first
    assert "page=1#decided" in second
    assert "page=3#decided" in second
    assert "Older" not in third


def test_one_model_is_shown_alone(show, log):
    for model in ("made-binary", "made <subtype>"):
        log(ASKED, model)
        log("approved", model, run="promote/other", reason=f"why {len(model)}")
    page = show(model="made <subtype>").text
    assert "why 14" in page
    assert "why 11" not in page
    assert "made-binary version" not in page
    assert "<b>made &lt;subtype&gt;</b>" in page
    assert 'href="?model=made-binary&amp;page=1"' in page
    assert "<form" not in page  # the page's headers forbid that a form is sent


def test_what_followed_is_told(show, log):
    log("approved", version=1)
    log("approved", version=2)
    log("rejected", version=3)
    log("rejected", version=4, by=NOBODY_IN_TIME)
    page = show().text
    for words in ("in use until", "then version 2", "in use now", "not promoted", "expired; a new run may ask again"):
        assert words in page


@pytest.mark.parametrize(
    "wrong",
    [
        {"page": "0"},
        {"page": "-1"},
        {"page": "x"},
        {"page": "9" * 50},
        {"page": "2"},
        {"model": "<b>"},
        {"model": "\0"},
    ],
)
def test_a_wrong_parameter_is_told(show, wrong):
    answer = show(**wrong)
    assert answer.status_code in {404, 422}
    assert answer.json()["detail"]


@pytest.mark.parametrize("damaged", ["{", "[1]", '{"event": "asked", "run": "promote/x", "model": "m", "sequence": 1}'])
def test_a_damaged_record_does_not_hide_the_list(show, log, store, damaged):
    log(ASKED)
    store.local("audit/log/00000001.json").write_text(damaged)
    assert show().status_code == 200
