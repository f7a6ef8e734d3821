from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from airflow.api_fastapi import app as airflow_app
from airflow.api_fastapi.auth.managers.simple.simple_auth_manager import SimpleAuthManager
from airflow.api_fastapi.auth.managers.simple.user import SimpleAuthManagerUser
from airflow.api_fastapi.core_api.datamodels.hitl import UpdateHITLDetailPayload
from airflow.api_fastapi.core_api.routes.public.hitl import task_instances_hitl_router
from airflow.api_fastapi.core_api.security import get_user
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from fastapi.testclient import TestClient

from breakhis_airflow import airflow_database, answer_form, review_pages
from breakhis_airflow.airflow_database import WaitingReview
from breakhis_airflow.web import create_app, find_airflow
from ml.promotion.reviews import MAX_REASON_LENGTH

BUNDLE = "bundle-0123456789ab"
EVIDENCE = {"model": "made-binary", "version": 3, "starters": {"users": {"ada": "retrain_made/r"}, "unknown": ""}}
REVIEW = WaitingReview(
    "Promote?",
    BUNDLE,
    "2026-11-30 12:00",
    "/form",
    "promote",
    "run 1/ä",
    "review",
    "0199",
    ("ada", "grace"),
    "engineer",
)
REASON = "Looked at every slide."


@dataclass
class Site:
    """The plugin's application with a user, and what Airflow's own was asked."""

    client: TestClient
    user: Any
    waiting: list[WaitingReview]
    evidence: dict[str, Any]
    asked: list[tuple[str, str, Any, str]] = field(default_factory=list)
    answer: Any = None

    def log_in(self, name: str, role: str = "OP") -> None:
        self.user.name = name
        self.user.now = SimpleAuthManagerUser(username=name, role=role)

    def make_token(self) -> str:
        return answer_form.make_form(self.waiting[0], self.evidence, self.user.now).token

    def confirm(self, option: str = "Approve", reason: str = REASON, **fields: str) -> Any:
        content = {"token": self.make_token(), "option": option, "reason": reason} | fields
        return self.client.post(f"/reviews/{BUNDLE}/confirm", data=content)

    def send(self, token: str, **headers: str) -> Any:
        return self.client.post(
            f"/reviews/{BUNDLE}/answer", data={"token": token}, headers=headers, follow_redirects=False
        )


def find_token(page: str) -> str:
    return page.split('name="token" value="')[1].split('"', maxsplit=1)[0]


@pytest.fixture
def site(store, monkeypatch):
    monkeypatch.setattr(airflow_app, "get_auth_manager", SimpleAuthManager)
    waiting, evidence, user = [REVIEW], dict(EVIDENCE), SimpleNamespace(now=None)
    monkeypatch.setattr(airflow_database, "read_waiting_reviews", lambda: waiting)
    monkeypatch.setattr(review_pages, "read_bundle", lambda *_: {"evidence": evidence, "evidence_id": "evidence-0"})
    app, airflow = create_app(), FastAPI()
    app.dependency_overrides[get_user] = lambda: user.now
    app.dependency_overrides[app.state.may_read] = lambda: None
    app.dependency_overrides[find_airflow] = lambda: airflow
    site = Site(TestClient(app, cookies={"_token": "session"}), user, waiting, evidence)
    site.log_in("grace")

    @airflow.api_route("/{path:path}", methods=["GET", "PATCH"])
    async def record(request: Request) -> JSONResponse:
        raw = request.scope["raw_path"].decode()
        site.asked.append((request.method, raw, await request.json(), request.headers.get("authorization", "")))
        return site.answer or JSONResponse({})

    return site


@pytest.mark.parametrize("option", ["Approve", "Reject"])
def test_an_answer_is_airflows_own_as_the_user_who_is_logged_in(site, option):
    shown = site.confirm(option)
    assert f"{option} made-binary version 3?" in shown.text
    assert REASON in shown.text
    assert ". Your name, the time" in " ".join(shown.text.split())
    assert site.asked == []
    sent = site.send(find_token(shown.text))
    assert (sent.status_code, sent.headers["location"]) == (303, "./")
    path = "/api/v2/dags/promote/dagRuns/run%201%2F%C3%A4/taskInstances/review/-1/hitlDetails"
    content = {"chosen_options": [option], "params_input": {"reason": REASON}}
    assert site.asked == [("PATCH", path, content, "Bearer session")]


def test_airflows_answer_api_is_as_the_form_calls_it():
    """An upgrade of Airflow that changes the path, the method or the fields fails here."""
    route = next(r for r in task_instances_hitl_router.routes if "PATCH" in r.methods)
    assert route.path == "/dags/{dag_id}/dagRuns/{dag_run_id}/taskInstances/{task_id}/{map_index}/hitlDetails"
    assert set(UpdateHITLDetailPayload.model_fields) == {"chosen_options", "params_input"}
    # The log of events has each answer, and the rights are those of the user.
    assert {getattr(d.dependency, "__qualname__", "") for d in route.dependencies} >= {
        "action_logging.<locals>.log_action",
        "requires_access_dag.<locals>.inner",
    }


@pytest.mark.parametrize(
    ("name", "role", "message"),
    [
        ("viewer", "VIEWER", "viewer, who is not one of the reviewers"),
        ("engineer", "OP", "engineer, who is not one of the reviewers"),
        ("grace", "VIEWER", "grace, whose role in Airflow may not answer"),
    ],
)
def test_only_reviewers_with_the_right_may_answer(site, name, role, message):
    site.log_in(name, role)
    assert answer_form.find_permission(REVIEW, EVIDENCE, site.user.now).options == ()
    answer = site.confirm()
    assert answer.status_code == 403
    assert message in answer.text


def test_who_started_the_run_may_not_answer(site):
    site.waiting[0] = REVIEW._replace(started_by="grace")
    assert "who started this run" in site.confirm("Reject").text


def test_who_started_the_training_may_only_reject(site):
    site.log_in("ada")
    assert "only others can approve it" in site.confirm("Approve").text
    assert site.confirm("Reject").status_code == 200


def test_nobody_approves_twice(site):
    site.waiting[0] = REVIEW._replace(task="review_2", approved_by=("grace",))
    assert "who has approved already" in site.confirm().text


@pytest.mark.parametrize("reason", ["", "  ", " ok ", "\n\n"])
def test_a_form_without_a_reason_is_not_taken(site, reason):
    answer = site.confirm(reason=reason)
    assert answer.status_code == 400
    assert "no reason of at least 3 letters" in answer.text


@pytest.mark.parametrize("length", [MAX_REASON_LENGTH + 1, 1_000_000])
def test_a_reason_that_is_too_long_is_not_taken(site, length):
    answer = site.confirm(reason="x" * length)
    assert answer.status_code in (400, 413)
    assert "over 5,000 characters" in answer.text
    assert len(answer.text) < 10_000


def test_the_longest_reason_of_any_letters_fits(site):
    reason = "".join(chr(0x1F300 + n % 512) for n in range(MAX_REASON_LENGTH))
    assert site.send(find_token(site.confirm(reason=reason).text)).status_code == 303
    assert site.asked[0][2]["params_input"]["reason"] == reason


@pytest.mark.parametrize("option", ["", "approve", "Withdraw"])
def test_another_answer_is_not_taken(site, option):
    assert site.confirm(option).status_code == 400


@pytest.mark.parametrize("token", ["", "x", "eyJhIjoxfQ.aaa.bbb", "ä"])
def test_a_forged_token_is_not_taken(site, token):
    assert site.confirm(token=token).status_code in (403, 409)
    assert site.send(token).status_code in (403, 409)
    assert site.asked == []


def test_the_first_steps_token_does_not_answer(site):
    assert site.send(site.make_token()).status_code == 403
    assert site.asked == []


def test_a_token_of_another_key_is_not_taken(site, monkeypatch):
    monkeypatch.setenv("AIRFLOW__API__SECRET_KEY", "another")
    token = site.make_token()
    monkeypatch.setenv("AIRFLOW__API__SECRET_KEY", "ours")
    assert site.confirm(token=token).status_code == 403


def test_a_form_of_another_user_is_not_taken(site):
    token = find_token(site.confirm().text)
    site.log_in("ada")
    assert site.send(token).status_code == 403
    assert site.asked == []


def test_a_form_of_a_review_that_was_asked_anew_is_not_taken(site):
    token = find_token(site.confirm().text)
    site.waiting[0] = REVIEW._replace(id="0200")
    answer = site.send(token)
    assert answer.status_code == 409
    assert "does not wait for an answer any more" in answer.text


def test_an_old_form_is_not_taken(site, monkeypatch):
    token = find_token(site.confirm().text)
    monkeypatch.setattr(answer_form, "_HOURS", -1.0)
    assert "too old" in site.send(token).text


@pytest.mark.parametrize(
    "headers", [{"sec-fetch-site": "cross-site"}, {"sec-fetch-site": "same-site"}, {"origin": "https://other.example"}]
)
def test_a_form_that_another_site_sends_is_not_taken(site, headers):
    token = find_token(site.confirm().text)
    assert site.send(token, **headers).status_code == 403
    assert site.asked == []


@pytest.mark.parametrize("headers", [{"sec-fetch-site": "same-origin"}, {"origin": "http://testserver"}])
def test_a_form_that_this_site_sends_is_taken(site, headers):
    assert site.send(find_token(site.confirm().text), **headers).status_code == 303


def test_a_proxy_may_change_the_host(site, monkeypatch):
    monkeypatch.setenv("AIRFLOW__API__BASE_URL", "http://airflow.example:8080/base")
    token = find_token(site.confirm().text)
    assert site.send(token, origin="http://airflow.example:8080").status_code == 303


def test_what_is_no_form_is_not_taken(site):
    assert site.client.post(f"/reviews/{BUNDLE}/confirm", json={"token": "x"}).status_code == 415


@pytest.mark.parametrize("status", [403, 404, 409, 422, 500])
def test_what_airflow_says_is_told(site, status):
    site.answer = JSONResponse({"detail": "It was <answered> meanwhile."}, status)
    answer = site.send(find_token(site.confirm().text))
    assert answer.status_code == (status if status in (403, 404, 409) else 503)
    assert "Airflow did not take the answer: It was &lt;answered&gt; meanwhile." in answer.text


def test_who_is_logged_in_no_more_is_told(site):
    del site.client.app.dependency_overrides[get_user]
    site.client.cookies.clear()
    answer = site.client.post(f"/reviews/{BUNDLE}/confirm", data={"token": "x"})
    assert answer.status_code == 401
    assert "You are not logged in any more" in answer.text


@pytest.mark.parametrize("path", ["confirm", "answer"])
def test_a_reload_leads_to_the_review(site, path):
    answer = site.client.get(f"/reviews/{BUNDLE}/{path}", follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (303, "./")


def test_markup_is_text(site):
    site.evidence["model"] = "<i>made</i>"
    markup = '</blockquote><script>alert("1")</script>{{ 7 * 7 }}\x00'
    page = site.confirm(reason=markup).text
    assert "<i>" not in page
    assert "<script>alert" not in page
    assert site.send(find_token(page)).status_code == 303
    assert site.asked[0][2]["params_input"]["reason"] == markup
