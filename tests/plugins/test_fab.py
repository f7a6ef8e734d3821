"""FAB's users and roles for real: an API server with them, and a review that is asked there."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import requests

from ml.core.airflow_api import AirflowApi
from ml.core.errors import AirflowError, CredentialsError
from ml.local.ports import free_ports

ROOT = Path(__file__).parents[2]
PEOPLE = {
    "admin": "Admin",
    "engineer": "User",
    "reviewer": "Reviewer",
    "viewer": "Viewer",
    "breakhis-service": "Viewer",
}
RUN, CLEARED = "made-binary-v1", "made-binary-v1-cleared"
CONF = {"model": "made-binary", "version": "1", "evidence": "evidence-0123456789ab"}

SET_UP = """
from breakhis_airflow.fab import User, set_up_users
people = {people!r}
set_up_users({{name: User(role, "what it was before") for name, role in people.items()}})
set_up_users({{name: User(role, "password of " + name) for name, role in people.items()}})
"""
# What a worker and the scheduler make of the task `review`: it waits for one of these.
ASK = """
from airflow.models.hitl import HITLDetail
from airflow.models.taskinstance import TaskInstance
from airflow.utils.session import create_session
from breakhis_airflow.review_operator import ReviewOperator

asked = ReviewOperator(task_id="review", subject="May it?", body="evidence").assigned_users
with create_session() as session:
    for ti in session.query(TaskInstance).filter_by(dag_id="promote", task_id="review"):
        ti.state = "awaiting_input"
        question = dict(options=["Approve", "Reject"], subject="May it?", body="evidence", params={{}})
        session.add(HITLDetail(ti_id=ti.id, assignees=asked, **question))
"""


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    home = tmp_path_factory.mktemp("fab")
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("AIRFLOW", "BREAKHIS_", "MLFLOW_"))}
    with free_ports(0) as [port]:
        environment = {
            **inherited,
            "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "plugins"))),
            "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])),
            "AIRFLOW_HOME": str(home),
            "BREAKHIS_HOME": str(home / "breakhis"),
            "AIRFLOW__CORE__AUTH_MANAGER": "breakhis_airflow.fab.AuthManager",
            "AIRFLOW__CORE__PLUGINS_FOLDER": str(ROOT / "plugins"),
            "AIRFLOW__CORE__DAGS_FOLDER": str(ROOT / "dags"),
            "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
            "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{home / 'airflow.db'}",
            "AIRFLOW__API__SECRET_KEY": "a key of this test",
            "AIRFLOW__API_AUTH__JWT_SECRET": "another key of this test, which is long enough",
        }

        def run(*command: str) -> None:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=home, check=False)
            assert done.returncode == 0, f"{command}:\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}"

        run("airflow", "db", "migrate")
        run("airflow", "dags", "reserialize")
        run(sys.executable, "-c", SET_UP.format(people=PEOPLE))
        log = (home / "api-server.log").open("wb")
        command = ["airflow", "api-server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, cwd=home)
        address = f"http://127.0.0.1:{port}"
        try:
            for _ in range(240):
                assert server.poll() is None, (home / "api-server.log").read_text()[-5000:]
                with suppress(requests.RequestException):
                    if requests.get(f"{address}/api/v2/version", timeout=5, proxies={"http": ""}).ok:
                        break
                time.sleep(0.5)
            api(address, "engineer").unpause("promote")
            for name in (RUN, CLEARED):
                api(address, "engineer").trigger("promote", name, CONF)
            run(sys.executable, "-c", ASK.format())
            yield address
        finally:
            server.terminate()
            server.wait(timeout=30)
            log.close()


def api(address: str, user: str) -> AirflowApi:
    return AirflowApi(address, user, f"password of {user}")


pytestmark = pytest.mark.integration


def test_everybody_logs_in_and_a_password_that_was_is_none(url: str) -> None:
    for user in PEOPLE:
        assert "promote" in {dag["dag_id"] for dag in api(url, user).dags()}
        with pytest.raises(CredentialsError, match="refuses the password"):
            AirflowApi(url, user, "what it was before").dags()


@pytest.mark.parametrize("user", ["reviewer", "viewer", "breakhis-service"])
def test_who_does_not_run_things_can_neither_start_nor_mark_nor_clear_them(url: str, user: str) -> None:
    own, task = api(url, user), f"/api/v2/dags/promote/dagRuns/{RUN}/taskInstances/review"
    attempts = {
        "trigger": lambda: own.trigger("promote", "another", CONF),
        "mark": lambda: own._call("PATCH", task, body={"new_state": "success"}),
        "clear": lambda: own._call(
            "POST", "/api/v2/dags/promote/clearTaskInstances", body={"dag_run_id": RUN, "dry_run": False}
        ),
        "xcom": lambda: own._call("POST", f"{task}/xcomEntries", body={"key": "return_value", "value": "forged"}),
        "pool": lambda: own.set_pool("promotion", 9, "more"),
        "connections": lambda: own._call("GET", "/api/v2/connections"),
    }
    for what, attempt in attempts.items():
        with pytest.raises(CredentialsError):
            pytest.fail(f"{what}: {attempt()}")
    assert own.dag_run("promote", RUN)["triggering_user_name"] == "engineer"


def test_a_reviewer_may_ask_for_a_rollback_which_another_confirms(url: str) -> None:
    conf = {"model": "made-binary", "version": "1", "reason": "it fails on 400X"}
    assert api(url, "reviewer").trigger("rollback", "back", conf)["triggering_user_name"] == "reviewer"
    with pytest.raises(CredentialsError):
        api(url, "viewer").trigger("rollback", "again", conf)


@pytest.mark.parametrize("user", ["engineer", "reviewer", "viewer"])
def test_people_see_the_reviews_their_page_and_the_menu_with_it(url: str, user: str) -> None:
    own = api(url, user)
    waiting = own._all("/api/v2/dags/~/dagRuns/~/hitlDetails", "hitl_details")
    assert [one["subject"] for one in waiting] == ["May it?"] * 2
    assert "breakhis" in {plugin["name"] for plugin in own._all("/api/v2/plugins", "plugins")}
    assert own._send("GET", "/breakhis/reviews/").status_code == 200
    assert {"Dags", "Required Actions"} <= set(own._call("GET", "/ui/auth/menus")["authorized_menu_items"])


def test_a_review_is_answered_by_who_is_named_and_recorded_with_the_name(url: str) -> None:
    for user in ("admin", "engineer"):
        with pytest.raises(CredentialsError, match="not a respondent"):
            api(url, user).answer("promote", RUN, "review", "Approve", {"reason": "why not"})
    for user in ("viewer", "breakhis-service"):
        with pytest.raises(CredentialsError):
            api(url, user).answer("promote", RUN, "review", "Approve", {"reason": "why not"})
    api(url, "reviewer").answer("promote", RUN, "review", "Approve", {"reason": "fine on all slides"})
    detail = api(url, "breakhis-service").hitl_detail("promote", RUN, "review")
    assert detail["responded_by_user"]["name"] == "reviewer"
    assert detail["responded_by_user"]["id"].isdigit()
    with pytest.raises(AirflowError) as twice:
        api(url, "reviewer").answer("promote", RUN, "review", "Reject", {"reason": "changed my mind"})
    assert twice.value.status == 409


def test_the_ids_of_reviews_outlast_clearing_and_go_with_what_is_deleted(url: str) -> None:
    service, engineer = api(url, "breakhis-service"), api(url, "engineer")
    run = f"/api/v2/dags/promote/dagRuns/{CLEARED}"

    def clear_review() -> None:
        body = {"dag_run_id": CLEARED, "task_ids": ["review"], "dry_run": False, "only_failed": False}
        engineer._call("POST", "/api/v2/dags/promote/clearTaskInstances", body=body)

    def delete(path: str) -> None:
        with suppress(AirflowError):  # it answers with nothing, where the client expects JSON
            engineer._call("DELETE", path)

    reviews = {task["task_id"]: task["id"] for task in service.task_instances("promote", CLEARED)}
    asked = {reviews[task] for task in ("review", "review_2", "review_3")}
    assert set(service.list_asked_reviews(CLEARED)) == asked
    clear_review()
    assert asked < set(service.list_asked_reviews(CLEARED))
    # Until the cleared review asks again, Airflow takes answers of the question before.
    api(url, "reviewer").answer("promote", CLEARED, "review", "Reject", {"reason": "blurred"})
    clear_review()
    details = service.list_hitl_details("promote", CLEARED, "review")
    assert ["Reject"] in [detail["chosen_options"] for detail in details]
    delete(f"{run}/taskInstances/review")
    assert set(service.list_asked_reviews(CLEARED)) == asked - {reviews["review"]}
    engineer._call("PATCH", run, body={"state": "failed"})
    delete(run)
    assert service.list_asked_reviews(CLEARED) == []
    assert requests.get(f"{url}/breakhis/reviews-asked", params={"run": RUN}, timeout=60).status_code == 401
