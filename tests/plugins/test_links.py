import pytest

from breakhis_airflow.links import STAGE_LINKS
from breakhis_airflow.places import stage
from breakhis_airflow.review_operator import ReviewOperator

TRAINED = {"run_id": "abc", "experiment_id": "7"}
SIDE = "?workflowType=machine_learning"
"""Without it, a fresh browser gets MLflow's GenAI side."""


def link(name: str, result) -> str:
    task = stage(name)
    task.stage_result = result
    return task.operator_extra_links[0].get_link(task, ti_key=None)


@pytest.fixture(autouse=True)
def mlflow(monkeypatch):
    monkeypatch.setenv("BREAKHIS_MLFLOW_URI", "http://mlflow:5000/")


def test_a_training_leads_to_its_run():
    assert link("train", TRAINED) == f"http://mlflow:5000/#/experiments/7/runs/abc{SIDE}"


@pytest.mark.parametrize("name", ["register", "gate", "promote"])
def test_a_version_leads_to_the_registry(name):
    page = "http://mlflow:5000/#/models/demo-binary/versions/3"
    assert link(name, {"model": "demo-binary", "version": 3}) == page + SIDE


def test_a_training_leads_to_its_report_and_a_gate_to_the_review_page():
    train, gate = stage("train"), stage("gate")
    train.stage_result, gate.stage_result = TRAINED, {"bundle": "bundle-0123456789ab"}
    report = train.operator_extra_links[1].get_link(train, ti_key=None)
    assert report == f"http://mlflow:5000/#/experiments/7/runs/abc/artifacts/evaluation/report.html{SIDE}"
    review = gate.operator_extra_links[1].get_link(gate, ti_key=None)
    assert review.endswith("/breakhis/reviews/bundle-0123456789ab/")


def test_a_review_leads_to_its_page_while_it_waits():
    bundle = "bundle-0123456789ab"
    body = f"see bundle-666666666666; judged as `{bundle}`. Your answer is recorded."
    task = ReviewOperator(task_id="review", subject="Promote?", body=body)
    (link,) = task.operator_extra_links
    assert link.get_link(task, ti_key=None).endswith(f"/breakhis/reviews/{bundle}/")
    task.body = "{{ ti.xcom_pull(task_ids='gate')['review'] }}"
    assert link.get_link(task, ti_key=None) == ""


def test_a_proposed_rollback_leads_to_what_was_approved():
    task = stage("rollback", "--dry-run", task_id="propose")
    task.stage_result = {"model": "demo-binary", "version": 1, "bundle": "bundle-0123456789ab"}
    version, review = (link.get_link(task, ti_key=None) for link in task.operator_extra_links)
    assert version.endswith(f"/models/demo-binary/versions/1{SIDE}")
    assert review.endswith("/breakhis/reviews/bundle-0123456789ab/")
    task.stage_result["bundle"] = None
    assert task.operator_extra_links[1].get_link(task, ti_key=None) == ""


def test_a_validation_leads_to_its_report(monkeypatch):
    result = {"validation": "validation-0123456789ab"}
    page = "/breakhis/docs/validation-0123456789ab/index.html"
    monkeypatch.setenv("AIRFLOW__API__BASE_URL", "https://airflow.example/base")
    assert link("validate", result) == f"https://airflow.example/base{page}"
    monkeypatch.delenv("AIRFLOW__API__BASE_URL")
    assert link("validate", result).endswith(page)


@pytest.mark.parametrize("name", ["validate", "publish"])
@pytest.mark.parametrize(
    ("more", "shown"), [({}, True), ({"quarantined": {"name": 1}}, True), ({"quarantined": {}}, False)]
)
def test_the_quarantine_is_shown_unless_it_is_known_to_be_empty(name, more, shown):
    task = stage(name)
    task.stage_result = {"validation": "validation-0123456789ab", **more}
    report, quarantine = (link.get_link(task, ti_key=None) for link in task.operator_extra_links)
    assert report.endswith("/validation-0123456789ab/index.html")
    assert quarantine == (report.replace("index", "quarantine") if shown else "")


@pytest.mark.parametrize("name", STAGE_LINKS)
@pytest.mark.parametrize("result", [None, {}, {"other": 1}])
def test_without_a_result_there_is_no_link(name, result):
    task = stage(name)
    task.stage_result = result
    assert not any(each.get_link(task, ti_key=None) for each in task.operator_extra_links)


def test_without_an_mlflow_server_there_is_no_link(monkeypatch):
    monkeypatch.setenv("BREAKHIS_MLFLOW_URI", "sqlite:////tmp/mlflow.db")
    assert link("train", TRAINED) == ""


def test_other_stages_have_no_links():
    assert not stage("fetch").operator_extra_links
