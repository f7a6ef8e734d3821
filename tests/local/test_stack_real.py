"""The stack for real: Airflow and MLflow start, are used through the client, and are gone afterwards."""

import json
import os
import time
from collections.abc import Iterator
from contextlib import suppress

import psutil
import pytest
import requests

from ml.core.errors import AirflowError, CredentialsError
from ml.core.settings import Settings
from ml.local import airflow_server
from ml.local.processes import find_family
from ml.local.stack import Stack

DAGS = """
import os
from datetime import timedelta
from airflow.providers.standard.operators.hitl import HITLOperator
from airflow.sdk import DAG, task

with DAG("ingest_one", schedule=None):

    @task(pool="gpu")
    def values():
        print("hello from the task")
        return {"home": os.environ["BREAKHIS_HOME"], "mlflow": os.environ["BREAKHIS_MLFLOW_URI"]}

    values()

with DAG("promote", schedule=None):
    HITLOperator(
        task_id="review",
        subject="May it?",
        options=["Approve", "Reject"],
        assigned_users=[{"id": "reviewer", "name": "reviewer"}],
        retries=5,
        retry_delay=timedelta(seconds=1),
    )

for name in ("rollback", "withdraw", "audit", "remind", "retrain_two"):
    with DAG(name, schedule=None) as globals()[name]:
        values()
"""


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("stack")
    for name in ("sources", "training_sets", "dags", "plugins"):
        (folder / name).mkdir()
    (folder / "sources" / "one.yaml").write_text("name: one\nkind: demo\n")
    (folder / "training_sets" / "two.yaml").write_text(
        "name: two\nsources: [one]\nledger: two\npolicy: demo\npreset: demo\n"
    )
    (folder / "dags" / "dags.py").write_text(DAGS)
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("BREAKHIS_", "MLFLOW_"))]:
            patch.delenv(name)
        patch.setattr(airflow_server, "DAGS", folder / "dags")
        patch.setattr(airflow_server, "PLUGINS", folder / "plugins")
        stack = Stack(Settings(home=folder / "home", conf=folder, gpus=1))
        try:
            state = stack.up()
            assert stack.check_dags(state) == []
            yield stack
        finally:
            stack.down()


def wait_for(what: str, true: object) -> None:
    deadline = time.monotonic() + 120
    while not true():  # type: ignore[operator]
        assert time.monotonic() < deadline, what
        time.sleep(0.5)


@pytest.mark.integration
def test_the_stack_runs_a_task_and_a_review(stack: Stack) -> None:
    found = stack.status()
    assert (found["running"], found["healthy"]) == (True, True)
    engineer, reviewer, service = (stack.api(user) for user in ("engineer", "reviewer", "breakhis-service"))
    for dag in ("ingest_one", "promote"):
        engineer.unpause(dag)
    run = engineer.trigger("ingest_one")["dag_run_id"]
    assert engineer.trigger("promote", "one-binary-v1", {"model": "m"})["triggering_user_name"] == "engineer"
    with pytest.raises(AirflowError, match="has a run 'one-binary-v1' already"):
        engineer.trigger("promote", "one-binary-v1")
    with pytest.raises(CredentialsError, match="breakhis-service"):
        service.trigger("promote", "one-binary-v2")

    wait_for("the task", lambda: engineer.dag_run("ingest_one", run)["state"] == "success")
    assert engineer.xcom("ingest_one", run, "values") == {
        "home": str(stack.home),
        "mlflow": found["services"]["mlflow"]["url"],
    }
    assert any("hello from the task" in line for line in engineer.task_log("ingest_one", run, "values"))

    wait_for("the review", lambda: engineer.task_instances("promote", "one-binary-v1")[0]["state"] == "awaiting_input")
    time.sleep(5)
    assert not service.hitl_detail("promote", "one-binary-v1", "review")["response_received"]
    with pytest.raises(CredentialsError, match="not a respondent"):
        engineer.answer("promote", "one-binary-v1", "review", "Approve", {})
    reviewer.answer("promote", "one-binary-v1", "review", "Approve", {})
    with pytest.raises(AirflowError) as twice:
        reviewer.answer("promote", "one-binary-v1", "review", "Reject", {})
    assert twice.value.status == 409
    detail = service.hitl_detail("promote", "one-binary-v1", "review")
    assert (detail["responded_by_user"]["id"], detail["chosen_options"]) == ("reviewer", ["Approve"])
    answered = [time.monotonic()]

    def ended() -> bool:
        """A busy Airflow loses an answer to a review that it is still parking, and asks again."""
        if time.monotonic() - answered[0] > 20:
            answered[0] = time.monotonic()
            with suppress(AirflowError):  # 409: it was taken
                reviewer.answer("promote", "one-binary-v1", "review", "Approve", {})
        return bool(engineer.dag_run("promote", "one-binary-v1")["state"] == "success")

    wait_for("the end", ended)


@pytest.mark.integration
def test_mlflow_knows_the_people_and_its_service_accounts(stack: Stack) -> None:
    url = stack.status()["services"]["mlflow"]["url"]
    keys = json.loads((stack.home / "secrets.json").read_text())
    passwords = stack.passwords() | {name: keys[name] for name in ("breakhis-trainer", "breakhis-promoter")}

    def status(path: str, user: str, password: str) -> int:
        proxies = {"http": ""}
        answer = requests.get(f"{url}/api/2.0/mlflow/{path}", auth=(user, password), proxies=proxies, timeout=60)
        return answer.status_code

    for user in ("admin", "engineer", "reviewer", "viewer", "breakhis-trainer", "breakhis-promoter"):
        assert status("experiments/get?experiment_id=0", user, passwords[user]) == 200
        assert status("experiments/get?experiment_id=0", user, "wrong") == 401
    assert status("experiments/get?experiment_id=0", "breakhis-service", passwords["breakhis-service"]) == 401
    models = ("registered-models/get?name=two-binary", "registered-models/get?name=two-subtype")
    assert [status(model, "viewer", passwords["viewer"]) for model in models] == [200, 200]
    assert [status(model, "breakhis-trainer", passwords["breakhis-trainer"]) for model in models] == [403, 403]


@pytest.mark.integration
def test_down_leaves_no_process_and_up_finds_everything_again(stack: Stack) -> None:
    state = stack.state()
    assert state
    assert stack.up().started == state.started
    stack.api("admin").set_pool("gpu", 1, "changed")  # one that exists
    stack.api("engineer").trigger("promote", "kept", {"model": "m"})
    passwords = stack.passwords()

    family = find_family(state.list_processes())
    assert len(family) > 8
    secrets = [*passwords.values(), *json.loads((stack.home / "secrets.json").read_text()).values()]
    texts = [" ".join(process.cmdline()) for process in family if process.is_running()]
    texts += [path.read_text(errors="replace") for path in stack.home.rglob("*.log")]
    texts.append((stack.home / "stack.json").read_text())
    assert not [text for text in texts if any(secret in text for secret in secrets)]
    listening = {c.laddr.ip for p in family if p.is_running() for c in p.net_connections("tcp") if c.status == "LISTEN"}
    assert "127.0.0.1" in listening

    assert stack.down()
    assert not [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    for service in state.services.values():
        with pytest.raises(requests.ConnectionError):
            requests.get(service.url, timeout=5, proxies={"http": ""})
    assert not stack.down()

    again = stack.up()
    assert stack.check_dags(again) == []
    assert stack.passwords() == passwords
    assert stack.api("viewer").dag_run("promote", "kept")["conf"] == {"model": "m"}
