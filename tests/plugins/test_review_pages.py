"""The pages of reviews, and that no bundle, parameter or failing server makes one of them answer 500.

One file, since all of it asks the same application about variations of one bundle.
"""

import base64
import copy
import errno
import hashlib
import re
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest
from airflow.api_fastapi import app as airflow_app
from airflow.api_fastapi.auth.managers.simple.simple_auth_manager import SimpleAuthManager
from airflow.api_fastapi.auth.managers.simple.user import SimpleAuthManagerUser
from airflow.api_fastapi.core_api.security import get_user
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from markupsafe import escape
from sqlalchemy.exc import OperationalError

from breakhis_airflow import airflow_database, answer_form, review_pages
from breakhis_airflow.airflow_database import AuditCheck, GivenAnswer, WaitingReview
from breakhis_airflow.glossary import METRIC_MEANINGS, TERMS
from breakhis_airflow.web import create_app
from ml.core.errors import ConfigError, TryAgain
from ml.core.settings import Settings
from ml.core.store import Store
from ml.evaluation.metric_names import METRIC_NAMES
from ml.promotion.alias_history import NOBODY_IN_TIME
from ml.promotion.audit_log import AuditLog
from ml.promotion.gates import judge_evidence
from ml.promotion.policies import Policy
from tests.helpers.hostile_text import STORABLE, read_tags
from tests.helpers.made_up import create_dataset, evidence, manifest_rows

PICTURE = b"\x89PNG made up"
REPORT = b"<h1>report</h1>"
FILES = {
    "evaluation/roc.png": hashlib.sha256(PICTURE).hexdigest(),
    "evaluation/report.html": hashlib.sha256(REPORT).hexdigest(),
    "evaluation/model_card.md": "0",
}
POLICY = Policy(name="p", binary={"roc_auc": 0.85, "macro_f1": 0.7})


def slices(accuracy: float) -> dict:
    scores = {"images": 5, "cases": 2, "recognised": 1, "metrics": {"accuracy": accuracy}, "intervals": {}}
    return {"magnification": {"100": scores, "40": scores}}


def bundle(store: Store, champion: bool = True, before: dict | None = None, **changes) -> str:
    facts = {"artifacts": FILES, "slices": slices(0.811), "validations": {"made": "validation-0"}, "evidence": "x"}
    candidate_evidence = evidence(version=3, **facts | changes)
    old = {**facts, "slices": slices(0.722), "metrics": {"roc_auc": 0.95, "macro_f1": 0.7}, **(before or {})}
    champion_evidence = evidence(version=2, **old) if champion else None
    pair = {"metric": "roc_auc", "where": "out of fold", "images": 9, "cases": 4, "champion": 0.95, "candidate": 0.9}
    pair |= {"difference": -0.05, "low": -0.04, "size": 0.043, "power": 0.6, "estimable": True, "reason": ""}
    unknown = pair | {"where": "on the test side", "difference": None, "estimable": False, "reason": "too few cases"}
    comparison = {"version": 2, "comparable": True, "reason": "", "pairs": [pair, unknown]} if champion else None
    content = {
        "evidence_id": "evidence-0123456789ab",
        "evidence": candidate_evidence,
        "champion": champion_evidence,
        "comparison": comparison,
        **judge_evidence(candidate_evidence, POLICY, comparison),
    }

    def fill(folder):
        for role in ("candidate", "champion") if champion else ("candidate",):
            (folder / role).mkdir()
            (folder / role / "roc.png").write_bytes(PICTURE)
            (folder / role / "report.html").write_bytes(REPORT)

    return store.create("bundle", content, content, fill)


@pytest.fixture
def waiting(monkeypatch):
    found: list[WaitingReview] = []
    monkeypatch.setattr(airflow_app, "get_auth_manager", SimpleAuthManager)
    monkeypatch.setattr(airflow_database, "read_waiting_reviews", lambda: found)
    monkeypatch.setattr(airflow_database, "read_run_states", lambda runs: {})
    monkeypatch.setattr(airflow_database, "read_last_answer", lambda bundle: None)
    return found


@pytest.fixture
def audited(monkeypatch):
    def set_audit(*values: str) -> None:
        monkeypatch.setattr(airflow_database, "read_audit_check", lambda: AuditCheck(*values))

    set_audit()
    return set_audit


@pytest.fixture
def anonymous() -> TestClient:
    return TestClient(create_app())


@pytest.fixture
def reader(waiting, audited) -> TestClient:
    app = create_app()
    app.dependency_overrides[get_user] = lambda: SimpleAuthManagerUser(username="reviewer", role="OP")
    app.dependency_overrides[app.state.may_read] = lambda: None
    return TestClient(app)


def test_nothing_without_a_login(anonymous, store):
    made = bundle(store)
    for path in ("", f"{made}/", f"{made}/candidate/roc.png"):
        assert anonymous.get(f"/reviews/{path}").status_code == 401
    assert anonymous.get("/reviews-asked?run=made-binary-v3").status_code == 401


def test_the_list_says_what_waits_and_what_was_decided(reader, store, waiting, tmp_path):
    assert "Nothing waits" in reader.get("/reviews/").text
    form = "/dags/promote/runs/made-binary-v3/tasks/review/required_actions"
    waiting.append(WaitingReview("Promote <made>?", "bundle-0123456789ab", "2026-11-23 12:00", form))
    key = Settings(home=tmp_path, store=store.root, audit_key="k")
    AuditLog(store, key).append(
        "approved", "made-binary", version=2, by="reviewer", reason="<b>fine</b>", champion=None, of=[]
    )
    page = reader.get("/reviews/").text
    assert "Promote &lt;made&gt;?" in page
    assert '<a href="bundle-0123456789ab/" aria-label="Read and answer: Promote &lt;made&gt;?">' in page
    assert form not in page
    waiting[0] = waiting[0]._replace(bundle=None)
    assert f'href="{form}" target="_top"' in reader.get("/reviews/").text
    assert "&lt;b&gt;fine&lt;/b&gt;" in page
    assert "made-binary version 2" in page


def test_a_candidate_beside_the_champion(reader, store, waiting):
    made = bundle(store)
    form = "/dags/promote/runs/r/tasks/review/required_actions"
    waiting.append(WaitingReview("Promote?", made, "2026-11-23 12:00", form, assigned=("reviewer", "ada"), id="0199"))
    answer = reader.get(f"/reviews/{made}/")
    page = " ".join(answer.text.split())
    assert answer.headers["cache-control"] == "no-store"
    known = base64.b64encode(hashlib.sha256(re.search("<script>(.*)</script>", answer.text, re.S)[1].encode()).digest())
    assert answer.headers["content-security-policy"].endswith(f"script-src 'sha256-{known.decode()}'")
    assert "This candidate would replace version 2 , the champion in use" in text_of(answer.text)
    assert '<form method="post" action="confirm">' in page
    assert page.count('name="option"') == 2
    assert "form-action 'self'" in answer.headers["content-security-policy"]
    assert f'<a href="{form}" target="_top">Airflow\'s own form of this review</a>' in page
    assert "ROC AUC : 0.950 before, 0.900 now (-0.050)" in text_of(answer.text)
    assert "not estimable: too few cases" in page
    assert METRIC_MEANINGS["macro_f1"] in page
    for role in ("candidate", "champion"):
        assert f'src="{role}/roc.png"' in page
    assert "precision_recall.png" not in page  # the evidence has none
    assert made in page


def test_who_may_not_answer_reads_who_may(reader, store, waiting):
    made = bundle(store)
    waiting.append(WaitingReview("Promote?", made, "2026-11-23 12:00", "/form", assigned=("ada", "grace"), id="0199"))
    page = text_of(reader.get(f"/reviews/{made}/").text)
    assert "You are logged in as reviewer, who is not one of the reviewers. May answer: ada, grace ." in page
    assert 'name="option"' not in reader.get(f"/reviews/{made}/").text


@pytest.mark.parametrize(
    ("state", "told"), [("running", "It is being carried out"), ("failed", "and nothing was decided")]
)
def test_what_becomes_of_an_answer_is_told(reader, store, monkeypatch, state, told):
    answer = GivenAnswer("<ada>", "Approve", "2026-11-30 12:00", state, "/dags/promote/runs/r")
    monkeypatch.setattr(airflow_database, "read_last_answer", lambda bundle: answer)
    page = reader.get(f"/reviews/{bundle(store)}/").text
    assert "&lt;ada&gt; has answered Approve on 2026-11-30 12:00 UTC" in text_of(page).replace("<ada>", "&lt;ada&gt;")
    assert told in page
    assert 'href="/dags/promote/runs/r"' in page


@pytest.mark.parametrize(
    ("at", "told"),
    [("2999-01-01 12:00", "It is being carried out"), ("1999-01-01 12:00", "This was approved by reviewer")],
)
def test_an_answer_is_told_before_what_was_decided_earlier(reader, store, monkeypatch, tmp_path, at, told):
    made = bundle(store)
    decide(store, tmp_path, version=3, bundle=made)
    answer = GivenAnswer("ada", "Approve", at, "running", "/dags/rollback/runs/r")
    monkeypatch.setattr(airflow_database, "read_last_answer", lambda _: answer)
    notes = re.findall('<p class="note">(.*?)</p>', reader.get(f"/reviews/{made}/").text)
    assert [told in text_of(note) for note in notes] == [True]


def test_an_answer_that_did_not_count_is_told(reader, store, waiting, tmp_path):
    made = bundle(store)
    waiting.append(WaitingReview("Promote?", made, "2026-11-23 12:00", "/form", id="0199"))
    key = Settings(home=tmp_path, store=store.root, audit_key="k")
    told = {"run": "promote/r", "by": "<ada>", "answer": "Approve", "problem": "it has no reason"}
    for review in ("0199", "0200"):
        AuditLog(store, key).append("not counted", "made-binary", version=3, review=review, **told)
    page = text_of(reader.get(f"/reviews/{made}/").text)
    assert page.count("That does not count, since it has no reason; the review was asked again.") == 1
    assert "<ada>" not in reader.get(f"/reviews/{made}/").text


def test_the_first_of_its_kind(reader, store):
    page = reader.get(f"/reviews/{bundle(store, champion=False)}/").text
    assert "There is no champion yet" in text_of(page)
    assert "What got worse" not in page
    assert "No review of exactly this waits" in page


def test_what_random_weights_are_worth_is_said(reader, store):
    made = bundle(store, weights={"id": "w", "kind": "random"}, absent_classes=["benign"])
    page = reader.get(f"/reviews/{made}/").text
    assert "Random backbone weights" in page
    assert "Not measured, since no test image shows it: benign" in page
    assert "backbone weights are random" in page


def test_files_are_what_was_judged(reader, store):
    made = bundle(store)
    answer = reader.get(f"/reviews/{made}/champion/roc.png")
    assert (answer.status_code, answer.content, answer.headers["content-type"]) == (200, PICTURE, "image/png")
    assert reader.get(f"/reviews/{made}/candidate/report.html").content == REPORT
    store.local(f"{store.object_key(made)}/candidate/roc.png").write_bytes(PICTURE + b"!")
    assert reader.get(f"/reviews/{made}/candidate/roc.png").status_code == 404


@pytest.mark.parametrize(
    "path",
    [
        "bundle-0123456789ab/",
        "nonsense/",
        "{id}/nobody/roc.png",
        "{id}/candidate/errors.png",
        "{id}/candidate/model_card.md",
        "{id}/candidate/..%2f..%2fobject.json",
    ],
)
def test_what_is_not_there(reader, store, path):
    assert reader.get(f"/reviews/{path.format(id=bundle(store))}").status_code == 404


def test_a_bundle_that_was_changed_is_not_shown(reader, store):
    made = bundle(store)
    file = store.local(f"{store.object_key(made)}/object.json")
    file.write_text(file.read_text().replace("0.95", "0.99"))
    answer = reader.get(f"/reviews/{made}/")
    assert answer.status_code == 404
    assert "was changed after it was judged" in answer.text


def test_every_metric_is_explained():
    images = {name for name in METRIC_NAMES if not name.startswith("patient_")}
    assert images <= METRIC_MEANINGS.keys()
    assert not re.search(r"[<>]", "".join([*METRIC_MEANINGS.values(), *TERMS.values()]))


def text_of(page: str) -> str:
    """The text that a page shows before the pointer rests on anything."""
    shown = re.sub(r'<style>.*?</style>|<span role="note">[^<]*</span>', "", page, flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]+>", " ", shown).split())


def test_slices_stand_beside_the_champions(reader, store):
    page = reader.get(f"/reviews/{bundle(store)}/").text
    part = text_of(page[page.index('id="slices-table"') : page.index('id="data"')])
    assert part.index("40X candidate 5 1 of 2 0.811 champion 5 1 of 2 0.722") < part.index("100X candidate")


def test_a_picture_that_the_champion_lacks(reader, store):
    page = reader.get(f"/reviews/{bundle(store)}/").text
    assert "there is none" not in page
    drawn = {**FILES, "evaluation/reliability.png": "0"}
    page = text_of(reader.get(f"/reviews/{bundle(store, artifacts=drawn)}/").text)
    assert page.count("Of the champion there is none") == 1


def test_size_and_power_of_the_comparison_are_shown(reader, store):
    part = text_of(reader.get(f"/reviews/{bundle(store)}/").text)
    assert re.search(r"9 \(4\) 0\.950 0\.900 -0\.050 -0\.040 4\.3% 60%", part)


def test_what_changed_in_the_data_is_counted(reader, store):
    before = create_dataset(store, manifest_rows({"14-1": ("A", 2), "14-2": ("DC", 3)}))
    after = create_dataset(store, manifest_rows({"14-2": ("DC", 3), "14-3": ("F", 4), "14-4": ("LC", 1)}))
    page = text_of(reader.get(f"/reviews/{bundle(store, before={'dataset': before}, dataset=after)}/").text)
    assert "made 5 images of 2 cases 2 images of 1 case none" in page


def test_the_same_data_and_data_that_is_gone(reader, store):
    page = text_of(reader.get(f"/reviews/{bundle(store)}/").text)
    assert "Nothing: both were trained on the same dataset" in page
    page = text_of(reader.get(f"/reviews/{bundle(store, before={'dataset': 'dataset-0123456789ab'})}/").text)
    assert "What changed cannot be told any more" in page


@pytest.mark.parametrize(
    "term", ["case", "out of fold", "power", "size", "margin", "Grad-CAM", "split ledger", "audit log", "interval"]
)
def test_the_words_of_the_field_are_explained_by_pointer_and_key(reader, store, term):
    picture = {"artifacts": {**FILES, "evaluation/grad_cam.png": "0"}}
    page = reader.get(f"/reviews/{bundle(store, **picture)}/").text
    assert re.search(
        rf'<span class="word" tabindex="0">[^<]+<span role="note">{re.escape(str(escape(TERMS[term])))}', page
    )


def test_every_explanation_is_used(reader, store, waiting):
    picture = {"artifacts": {**FILES, "evaluation/grad_cam.png": "0"}}
    datasets = [create_dataset(store, manifest_rows({"14-1": ("A", n)})) for n in (1, 2)]
    parts = {name: slices(0.8)["magnification"] for name in ("magnification", "source", "subtype")}
    facts = {**picture, "slices": parts, "dataset": datasets[1], "before": {"dataset": datasets[0]}}
    pages = reader.get("/reviews/").text + reader.get(f"/reviews/{bundle(store, **facts)}/").text
    assert [term for term, text in TERMS.items() if str(escape(text)) not in pages] == []


def decide(store: Store, tmp_path, event: str = "approved", **facts) -> dict:
    log = AuditLog(store, Settings(home=tmp_path, store=store.root, audit_key="k"))
    record = {"version": 2, "by": "reviewer", "reason": "fine", "champion": None, "of": []}
    return log.append(event, "made-binary", **record | facts)


def test_a_review_that_was_answered_says_how(reader, store, tmp_path):
    made = bundle(store)
    decide(store, tmp_path, version=3, bundle=made, reason="maps are plausible")
    page = text_of(reader.get(f"/reviews/{made}/").text)
    assert "This was approved by reviewer on" in page
    assert "UTC: maps are plausible" in page
    assert f'href="{made}/"' in reader.get("/reviews/").text


def test_a_rollback_shows_what_the_former_champion_was_approved_on(reader, store, waiting, tmp_path):
    made = bundle(store)
    decide(store, tmp_path, version=3, bundle=made)
    decide(store, tmp_path, version=4, bundle="bundle-0123456789ab", champion=3)
    form = "/dags/rollback/runs/r/tasks/review/required_actions"
    decide(store, tmp_path, "withdrawn", version=3, reason="blurred <slides>")
    asked = WaitingReview("Go back to made-binary version 3?", made, "2026-11-23 12:00", form, "rollback")
    waiting.append(asked._replace(started_by="grace", asked_because="false <alarms>"))
    page = reader.get(f"/reviews/{made}/").text
    assert "Asked for by grace because: false &lt;alarms&gt;" in text_of(page)
    assert "This version was withdrawn by reviewer on" in text_of(page)
    assert "UTC: blurred &lt;slides&gt;" in text_of(page)
    assert "somebody asks to go back to it" in page
    assert '<a href="../bundle-0123456789ab/">What version 4, in use now, was approved on</a>' in page
    assert "would replace" not in page
    assert f'href="{form}"' in page
    assert "(a rollback" in reader.get("/reviews/").text
    decide(store, tmp_path, "rolled back", version=3, champion=4)
    assert reader.get("/reviews/").text.count(f'href="{made}/" aria-label="look at the evidence of') == 3


def test_when_the_audit_log_was_last_checked(reader, audited):
    assert "has not passed yet" in text_of(reader.get("/reviews/").text)
    audited("2026-11-23 00:00")
    page = text_of(reader.get("/reviews/").text)
    assert "last passed at 2026-11-23 00:00 UTC" in page
    assert "check of the audit log failed" not in page
    audited("2026-11-23 00:00", "2026-11-24 00:00", "/dags/audit/runs/r")
    page = reader.get("/reviews/").text
    assert "The daily check of the audit log failed" in page
    assert 'href="/dags/audit/runs/r"' in page


def test_a_record_that_is_missing_or_damaged_is_told(reader, store, tmp_path, monkeypatch):
    records = [decide(store, tmp_path, reason=f"reason {n}") for n in range(3)]
    assert "No record is missing" in reader.get("/reviews/").text
    monkeypatch.setattr(
        review_pages, "read_decisions", lambda store, model=None: [{**records[2], "verified": False}, *records[:2]]
    )
    assert reader.get("/reviews/").text.count("this record is not as it was written") == 1
    store.remove("audit/log/00000002.json")
    page = reader.get("/reviews/").text
    assert "audit log" in page
    assert "record 2 is missing" in page
    assert "No record is missing" not in page


def test_files_of_a_run_are_nobodys(reader, store):
    answer = reader.get(f"/reviews/{bundle(store)}/candidate/report.html")
    policy = answer.headers["content-security-policy"]
    assert policy.endswith("; sandbox allow-popups")
    assert "frame-ancestors 'self'" in policy


def test_a_class_that_is_found_less_often_got_worse(reader, store):
    found = evidence()["per_class"]
    before = {"per_class": {**found, "benign": {**found["benign"], "recall": 0.95}}}
    page = reader.get(f"/reviews/{bundle(store, before=before)}/").text
    part = text_of(page[page.index('id="worse"') : page.index('id="gates"')])
    assert "recall (sensitivity) of the class benign: 0.950 before, 0.800 now (-0.150, by more than the margin" in part
    assert "malignant" not in part


def test_a_form_is_found_below_the_address_of_this_airflow(monkeypatch):
    monkeypatch.setenv("AIRFLOW__API__BASE_URL", "https://airflow.example/base")
    made = "bundle-0123456789ab"
    run = SimpleNamespace(triggering_user_name="engineer")
    task = SimpleNamespace(
        dag_id="promote", run_id="manual__2026-11-22T21:00:00+00:00", task_id="review", id="0199", dag_run=run
    )
    users = [{"id": "7", "name": "grace"}]
    asked = datetime(2026, 11, 23, 12, tzinfo=UTC)
    body = f"judged as `{made}`. Your answer is recorded."
    found = airflow_database._describe_review(
        SimpleNamespace(task_instance=task, body=body, subject="Promote?", created_at=asked, assigned_users=users),
        ("ada",),
    )
    form = "/base/dags/promote/runs/manual__2026-11-22T21%3A00%3A00%2B00%3A00/tasks/review/required_actions"
    about = ("Promote?", made, "2026-11-23 12:00", form, "promote", task.run_id, "review", "0199")
    assert found == WaitingReview(*about, assigned=("7",), started_by="engineer", approved_by=("ada",))


@pytest.mark.parametrize(
    ("facts", "is_offered"),
    [
        ({"event": "rejected", "evidence": "evidence-0123456789ab"}, False),
        ({"event": "withdrawn"}, False),
        ({"event": "rejected", "evidence": "evidence-of-another"}, True),
        ({"event": "rejected", "evidence": "evidence-0123456789ab", "by": NOBODY_IN_TIME}, True),
        ({"event": "rejected", "evidence": "evidence-0123456789ab", "version": 4}, True),
        ({"event": "rejected", "run": "rollback/back-1"}, True),
    ],
)
def test_what_was_settled_is_no_longer_asked(reader, store, waiting, tmp_path, facts, is_offered):
    made = bundle(store)
    form = "/dags/promote/runs/again/tasks/review/required_actions"
    waiting.append(WaitingReview("Promote?", made, "2026-11-23 12:00", form))
    offers = {"": "Read and answer: Promote?", f"{made}/": f'href="{form}"'}
    assert offers[""] in reader.get("/reviews/").text
    decide(store, tmp_path, **{"version": 3, "run": "promote/made-binary-v3"} | facts)
    for path, offer in offers.items():
        assert (offer in reader.get(f"/reviews/{path}").text) == is_offered


TEXTS = (
    "interval_notes",
    "absent_classes",
    "sources",
    "split_method",
    "preset",
    "policy",
    "warnings",
    "slices",
    "note",
)


@settings(max_examples=40, deadline=timedelta(seconds=10), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.fixed_dictionaries(dict.fromkeys(TEXTS, STORABLE)))
def test_no_text_becomes_more_than_text(store, texts):
    """Whatever evidence and bundle hold as text: the page has the same tags with the same attributes."""

    def render(texts):
        facts = {"interval_notes": {"macro_f1": texts["interval_notes"]}, "absent_classes": [texts["absent_classes"]]}
        facts |= {"sources": {texts["sources"]: "version-0"}, "split_method": texts["split_method"]}
        facts |= {"validated": {texts["sources"]: True}, "preset": texts["preset"]}
        facts["slices"] = {"source": {texts["slices"]: slices(0.8)["magnification"]["100"]}}
        made = bundle(store, champion=False, **facts)
        content = review_pages.read_bundle(made, store)
        content |= {"policy": texts["policy"], "warnings": [texts["warnings"]]}
        return review_pages.render_review(
            store.create("bundle", content, content), [], AuditCheck(), store, answer_form.make_form
        )

    assert read_tags(render(texts)) == read_tags(render(dict.fromkeys(TEXTS, "x")))


def change(content: dict, path: str, value: object) -> dict:
    """A copy with another value at ``a.b.c``; without that key for ``...``."""
    changed = copy.deepcopy(content)
    *keys, last = (int(key) if key.isdecimal() else key for key in path.split("."))
    place = changed
    for key in keys:
        place = place[key]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return changed


@pytest.mark.parametrize("value", [None, [], 5, "text", {"a": [1]}, 10**300, True, ...])
@pytest.mark.parametrize(
    "path",
    [
        *("evidence", "evidence_id", "gates", "comparison", "warnings", "approvals"),
        *("evidence.model", "evidence.version", "evidence.task", "evidence.metrics", "evidence.per_class"),
        *("evidence.per_class.benign", "evidence.slices", "evidence.slices.magnification", "evidence.sides.test"),
        *("evidence.weights", "evidence.sources", "evidence.artifacts", "evidence.validations"),
        *("champion.metrics", "champion.per_class.benign", "champion.version", "champion.weights.kind"),
        *("gates.0", "gates.0.value", "gates.0.passed", "comparison.pairs", "comparison.pairs.0.size"),
    ],
)
def test_a_bundle_that_holds_anything_is_shown_or_named(reader, store, waiting, path, value):
    content = review_pages.read_bundle(bundle(store), store)
    changed = change(content, path, value)
    made = store.create("bundle", changed, changed)
    waiting.append(WaitingReview("Promote?", made, "2026-11-23 12:00", "/form"))
    assert reader.get("/reviews/").status_code == 200
    for address in (f"/reviews/{made}/", f"/reviews/{made}/candidate/report.html"):
        answer = reader.get(address)
        assert answer.status_code in {200, 404}
        if answer.status_code == 404:
            uri = store.uri(f"{store.object_key(made)}/object.json")
            assert f"{uri} is damaged: {path.split('.')[0]}" in answer.text or f"{made}/candidate" in answer.text


@pytest.mark.parametrize("damaged", ["[1]", "{", '{"evidence": NaN}', '{"a": ' + "[" * 5_000])
def test_a_bundle_whose_file_was_overwritten_is_named(reader, store, damaged):
    made = bundle(store)
    store.local(f"{store.object_key(made)}/object.json").write_text(damaged)
    answer = reader.get(f"/reviews/{made}/")
    assert answer.status_code == 404
    assert f"{store.uri(store.object_key(made))}/object.json is damaged" in answer.text
    assert "restore it from a backup of the store" in answer.text


def test_a_dataset_whose_file_was_overwritten_is_told(reader, store):
    before, after = (create_dataset(store, manifest_rows({"14-1": ("A", n)})) for n in (1, 2))
    made = bundle(store, before={"dataset": before}, dataset=after)
    for damaged in (b"", b"PAR1", b"text"):
        store.local(f"{store.object_key(after)}/dataset.parquet").write_bytes(damaged)
        page = text_of(reader.get(f"/reviews/{made}/").text)
        assert "What changed cannot be told any more" in page
        assert f"{store.uri(store.object_key(after))}/dataset.parquet" in page


def test_a_database_that_cannot_be_asked_is_told(reader, monkeypatch):
    def fail():
        raise OperationalError("SELECT secret", {}, Exception("the server is away"))

    monkeypatch.setattr(airflow_database, "read_waiting_reviews", fail)
    answer = reader.get("/reviews/")
    assert answer.status_code == 503
    assert "Airflow's database cannot be asked (OperationalError); try again" in answer.json()["detail"]


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (TryAgain("the store's server is away"), 503, "the store's server is away"),
        (ConfigError("BREAKHIS_STORE is wrong"), 503, "BREAKHIS_STORE is wrong"),
        (PermissionError(errno.EACCES, "Permission denied", "/store/x"), 503, "/store/x: user"),
        (OSError(errno.EIO, "Input/output error"), 503, "the store cannot be read"),
    ],
)
def test_a_store_that_cannot_be_read_is_told(reader, monkeypatch, error, status, words):
    def fail(*_):
        raise error

    monkeypatch.setattr(Store, "keys", fail)
    answer = reader.get("/reviews/")
    assert answer.status_code == status
    assert words in answer.json()["detail"]
