import hashlib
import re

import pytest
from airflow.api_fastapi.core_api.security import get_user
from fastapi.testclient import TestClient

from breakhis_airflow import reviews
from breakhis_airflow.reviews import BUNDLE, WORDS, Waiting
from breakhis_airflow.web import create_app
from ml.audit import AuditLog
from ml.gates import METRIC_NAMES, judge_evidence
from ml.policies import Policy
from ml.settings import Settings
from ml.store import Store
from tests.made_up import evidence

PICTURE = b"\x89PNG made up"
REPORT = b"<h1>report</h1>"
FILES = {
    "evaluation/roc.png": hashlib.sha256(PICTURE).hexdigest(),
    "evaluation/report.html": hashlib.sha256(REPORT).hexdigest(),
    "evaluation/model_card.md": "0",
}
POLICY = Policy(name="p", binary={"roc_auc": 0.85, "macro_f1": 0.7})


def bundle(store: Store, champion: bool = True, **changes) -> str:
    slices = {
        "magnification": {
            "40": {"images": 5, "cases": 2, "recognised": 1, "metrics": {"accuracy": 0.8}, "intervals": {}}
        }
    }
    told = {"artifacts": FILES, "slices": slices, "validations": {"made": "validation-0"}, "evidence": "x"}
    mine = evidence(version=3, **told | changes)
    other = evidence(version=2, metrics={"roc_auc": 0.95, "macro_f1": 0.7}, **told) if champion else None
    pair = {"metric": "roc_auc", "where": "out of fold", "images": 9, "cases": 4, "champion": 0.95, "candidate": 0.9}
    pair |= {"difference": -0.05, "low": -0.04, "power": 0.6, "estimable": True, "reason": ""}
    unknown = pair | {"where": "on the test side", "difference": None, "estimable": False, "reason": "too few cases"}
    comparison = {"version": 2, "comparable": True, "reason": "", "pairs": [pair, unknown]} if champion else None
    content = {
        "evidence_id": "evidence-0123456789ab",
        "evidence": mine,
        "champion": other,
        "comparison": comparison,
        **judge_evidence(mine, POLICY, comparison),
    }

    def fill(folder):
        for whose in ("candidate", "champion") if champion else ("candidate",):
            (folder / whose).mkdir()
            (folder / whose / "roc.png").write_bytes(PICTURE)
            (folder / whose / "report.html").write_bytes(REPORT)

    return store.create("bundle", content, content, fill)


@pytest.fixture
def waiting(monkeypatch):
    found: list[Waiting] = []
    monkeypatch.setattr(reviews, "waiting_reviews", lambda: found)
    return found


@pytest.fixture
def anonymous() -> TestClient:
    return TestClient(create_app())


@pytest.fixture
def reader(waiting) -> TestClient:
    app = create_app()
    app.dependency_overrides[get_user] = object
    app.dependency_overrides[app.state.may_read] = lambda: None
    return TestClient(app)


def test_nothing_without_a_login(anonymous, store):
    made = bundle(store)
    for path in ("", f"{made}/", f"{made}/candidate/roc.png"):
        assert anonymous.get(f"/reviews/{path}").status_code == 401


def test_the_list_says_what_waits_and_what_was_decided(reader, store, waiting, tmp_path):
    assert "Nothing waits" in reader.get("/reviews/").text
    form = "/dags/promote/runs/made-binary-v3/tasks/review/required_actions"
    waiting.append(Waiting("Promote <made>?", "bundle-0123456789ab", "2026-11-23 12:00", form))
    key = Settings(home=tmp_path, store=store.root, audit_key="k")
    AuditLog(store, key).append(
        "approved", "made-binary", version=2, by="reviewer", reason="<b>fine</b>", champion=None, of=[]
    )
    page = reader.get("/reviews/").text
    assert "Promote &lt;made&gt;?" in page
    assert 'href="bundle-0123456789ab/"' in page
    assert f'href="{form}" target="_top"' in page
    assert "&lt;b&gt;fine&lt;/b&gt;" in page
    assert "made-binary version 2" in page


def test_a_candidate_beside_the_champion(reader, store, waiting):
    made = bundle(store)
    form = "/dags/promote/runs/r/tasks/review/required_actions"
    waiting.append(Waiting("Promote?", made, "2026-11-23 12:00", form))
    answer = reader.get(f"/reviews/{made}/")
    page = " ".join(answer.text.split())
    assert answer.headers["cache-control"] == "no-store"
    assert "script-src" not in answer.headers["content-security-policy"]
    assert "It would replace <b>version 2</b>" in page
    assert f'<a class="button" href="{form}" target="_top">Answer in Airflow</a>' in page
    assert "ROC AUC: 0.950 before, 0.900 now (-0.050)" in page
    assert "not estimable: too few cases" in page
    assert WORDS["macro_f1"] in page
    for whose in ("candidate", "champion"):
        assert f'src="{whose}/roc.png"' in page
    assert "precision_recall.png" not in page  # the evidence has none
    assert made in page


def test_the_first_of_its_kind(reader, store):
    page = reader.get(f"/reviews/{bundle(store, champion=False)}/").text
    assert "There is no champion yet" in page
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
    assert images <= WORDS.keys()
    assert BUNDLE.fullmatch("bundle-0123456789ab")
    assert not re.search(r"[<>]", "".join(WORDS.values()))
