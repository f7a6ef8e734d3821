"""``run`` and ``demo`` with simulated Airflow and MLflow: what counts as success, and what is reported otherwise."""

import json
import os
import signal
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from ml.core.errors import AirflowError, BreakhisError, CredentialsError, Refused, StackError
from ml.core.settings import Settings
from ml.local import cli, watch, workflow
from ml.local.processes import Process
from ml.local.stack import Service, StackState
from ml.local.workflow import REASON, Workflow

Json = dict[str, Any]
NOW = "2026-01-01T00:00:00+00:00"


class Airflow:
    """Runs every DAG at once; the ``promote`` runs wait for an answer unless their gate blocks."""

    def __init__(self) -> None:
        self.user = ""
        self.failing: str | None = None
        self.blocked: set[str] = set()
        self.decided: dict[str, Json] = {}
        self.triggered: list[tuple[str, str]] = []
        self.unpaused: set[str] = set()
        self.absent: set[str] = set()
        self.stranded: set[str] = set()
        self.losing: dict[str, int] = {}
        self.answers: list[str] = []
        self.versions = {"demo-binary": 3, "demo-subtype": 4}

    def dags(self) -> list[Json]:
        return [{"dag_id": d} for d in ("ingest_demo", "retrain_demo", "promote") if d not in self.absent]

    def unpause(self, dag: str) -> None:
        self.unpaused.add(dag)

    def trigger(self, dag: str) -> Json:
        self.triggered.append((dag, self.user))
        return {"dag_run_id": f"{dag}-run"}

    def dag_run(self, dag: str, run: str) -> Json:
        if dag != "promote":
            failed = any(task["state"] == "failed" for task in self.task_instances(dag, run))
            return {"state": "failed" if failed else "success"}
        model = run.rpartition("-v")[0]
        if model in self.blocked or run in self.stranded:
            return {"state": "failed"}
        return {"state": "success" if run in self.decided else "running"}

    def task_instances(self, dag: str, run: str) -> list[Json]:
        if dag != "promote":
            names = ["fetch", "publish"] if dag.startswith("ingest") else ["assemble", "train_binary"]
            shards = (
                [] if dag.startswith("ingest") else [{**_task("features", "success"), "map_index": n} for n in (0, 1)]
            )
            return shards + [_task(name, "failed" if name == self.failing else "success") for name in names]
        if run.rpartition("-v")[0] in self.blocked:
            return [_task("gate", "failed"), _task("review", "upstream_failed")]
        if run in self.stranded:
            return [_task("gate", "success"), _task("review", "success"), _task("promote", "failed")]
        return [_task("gate", "success"), _task("review", "success" if run in self.decided else "awaiting_input")]

    def task_log(self, dag: str, run: str, task: str, tried: int, map_index: int) -> list[str]:
        return [*(f"line {n}" for n in range(100)), f"the reason why {task} failed"]

    def xcom(self, dag: str, run: str, task: str, map_index: int = -1) -> Any:
        if task == "gate":
            passed = run.rpartition("-v")[0] not in self.blocked
            gate = {"name": "ROC AUC", "metric": "roc_auc", "value": 0.8, "limit": 0.75, "passed": passed}
            return {"passed": passed, "gates": [{**gate, "reason": "" if passed else "ROC AUC 0.8 is too low"}]}
        stage, _, kind = task.partition("_")
        if stage == "train":
            return {"run_id": f"run-{kind}", "metrics": {"test_roc_auc": 0.8}}
        if stage == "register":
            return {"model": f"demo-{kind}", "version": self.versions[f"demo-{kind}"], "evidence": "evidence-1"}
        if stage == "split":
            return {side: {"images": 10, "cases": 2} for side in ("train", "validation", "test")}
        return {"images": 15, "extracted": map_index, "cached": 15 - map_index}

    def answer(self, dag: str, run: str, task: str, option: str, params: Json) -> None:
        if self.user != "reviewer":
            raise CredentialsError("not a respondent")
        self.answers.append(run)
        if self.losing.get(run, 0) > 0:
            self.losing[run] -= 1
            return
        self.decided[run] = {"option": option, "by": self.user, "reason": params["reason"]}

    def hitl_detail(self, dag: str, run: str, task: str) -> Json:
        if run.rpartition("-v")[0] in self.blocked:
            raise AirflowError("nobody was asked", 404)
        answer = self.decided.get(run)
        if answer is None:
            return {"response_received": False}
        return {
            "response_received": True,
            "chosen_options": [answer["option"]],
            "responded_by_user": {"id": answer["by"], "name": answer["by"]} if answer["by"] else None,
            "params_input": {"reason": answer["reason"]},
        }


def _task(name: str, state: str) -> Json:
    return {"task_id": name, "state": state, "start_date": NOW, "end_date": NOW, "try_number": 1, "map_index": -1}


class FakeStack:
    """The stack, as far as a workflow knows it."""

    airflow: Airflow
    problems: list[str]
    downs: int
    dead: bool

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def up(self, extra_set: Path | None = None) -> StackState:
        state = self.state()
        assert state
        return state

    def state(self) -> StackState | None:
        process = Process(pid=1, birth="x") if self.dead else Process.of(os.getpid())
        service = Service(process=process, url="http://here", log=Path("airflow.log"))
        return StackState(started=datetime.now(UTC), services={"airflow": service, "mlflow": service}, settings={})

    def check_dags(self, state: StackState) -> list[str]:
        return self.problems

    def api(self, user: str) -> Airflow:
        self.airflow.user = user
        return self.airflow

    def users(self) -> dict[str, str]:
        return {"reviewer": "user", "breakhis-service": "viewer"}

    def passwords(self) -> dict[str, str]:
        return {"reviewer": "pass-word", "breakhis-service": "secret"}

    def down(self) -> bool:
        type(self).downs += 1
        return True


@pytest.fixture
def airflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Airflow:
    conf = tmp_path / "conf"
    for folder in ("sources", "training_sets"):
        (conf / folder).mkdir(parents=True)
    (conf / "sources" / "demo.yaml").write_text("name: demo\nkind: demo\n")
    (conf / "training_sets" / "demo.yaml").write_text(
        "name: demo\nsources: [demo]\nledger: demo\npolicy: demo\npreset: demo\n"
    )
    monkeypatch.setenv("BREAKHIS_CONF", str(conf))
    monkeypatch.setenv("BREAKHIS_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(watch, "_SECONDS_BETWEEN_LOOKS", 0.0)
    monkeypatch.setattr(workflow, "_SECONDS_BEFORE_ANSWERING", 0.0)
    monkeypatch.setattr(workflow, "_SECONDS_TO_TAKE_AN_ANSWER", 0.0)
    monkeypatch.setattr(workflow, "Stack", FakeStack)
    played = Airflow()
    FakeStack.airflow, FakeStack.problems, FakeStack.downs, FakeStack.dead = played, [], 0, False
    registry(monkeypatch, {"demo-binary": "3", "demo-subtype": "4"})
    return played


def registry(monkeypatch: pytest.MonkeyPatch, champions: dict[str, str]) -> None:
    """MLflow's answers: the champions there are, once they were approved or before."""

    def answer(self: Workflow, path: str, **params: str) -> Json | None:
        if path == "runs/get":
            return {"run": {"info": {"experiment_id": "7"}}}
        version = champions.get(params["name"])
        return {"model_version": {"version": version}} if version else None

    monkeypatch.setattr(Workflow, "_mlflow", answer)


def demo() -> tuple[Any, Json]:
    result = CliRunner().invoke(cli.demo, ["demo", "--json"])
    return result, json.loads(result.stdout.splitlines()[-1])


def test_demo_approves_as_the_reviewer_and_stops(airflow: Airflow) -> None:
    result, summary = demo()
    assert result.exception is None
    assert (summary["ok"], summary["error"]) == (True, None)
    assert [m["champion"] for m in summary["models"]] == ["3", "4"]
    assert {m["reviewer"] for m in summary["models"]} == {"reviewer"}
    assert {m["reason"] for m in summary["models"]} == {REASON}
    assert airflow.triggered == [("ingest_demo", "engineer"), ("retrain_demo", "engineer")]
    assert airflow.unpaused == {"ingest_demo", "retrain_demo", "promote"}
    assert FakeStack.downs == 1
    assert "ROC AUC 0.800 (at least 0.750)" in result.stderr
    assert "Approve" in result.stderr


def test_demo_counts_what_the_reviewer_approved_earlier(airflow: Airflow) -> None:
    for run in ("demo-binary-v3", "demo-subtype-v4"):
        airflow.decided[run] = {"option": "Approve", "by": "reviewer", "reason": "good"}
    assert demo()[1]["ok"]


def test_a_review_that_lost_its_answer_is_answered_again(airflow: Airflow) -> None:
    airflow.losing = {"demo-binary-v3": 2}
    result, summary = demo()
    assert (result.exception, summary["ok"]) == (None, True)
    assert airflow.answers == ["demo-binary-v3", "demo-subtype-v4", "demo-binary-v3", "demo-binary-v3"]


def test_a_review_that_takes_no_answer_ends_the_demo(airflow: Airflow) -> None:
    airflow.losing = {"demo-subtype-v4": 99}
    _, summary = demo()
    assert "demo-subtype-v4 was approved 4 times and still waits" in summary["error"]
    assert FakeStack.downs == 1


def test_an_answer_that_airflow_is_slow_to_take_is_no_error(airflow: Airflow, monkeypatch: pytest.MonkeyPatch) -> None:
    answer, late = airflow.answer, {}

    def slow(dag: str, run: str, *rest: Any) -> None:
        if run in late:  # the second answer finds the first, which now takes effect
            airflow.decided[run] = late[run]
            raise AirflowError("answered already", 409)
        answer(dag, run, *rest)
        late[run] = airflow.decided.pop(run)

    monkeypatch.setattr(airflow, "answer", slow)
    result, summary = demo()
    assert (result.exception, summary["ok"]) == (None, True)


@pytest.mark.parametrize(("option", "by"), [("Reject", "reviewer"), ("Approve", "somebody else"), ("Approve", "")])
def test_demo_fails_if_it_was_not_the_reviewers_approval(airflow: Airflow, option: str, by: str) -> None:
    airflow.decided["demo-binary-v3"] = {"option": option, "by": by, "reason": "hm"}
    result, summary = demo()
    assert isinstance(result.exception, Refused)
    assert not summary["ok"]
    assert "demo-binary version 3 was not approved by reviewer" in summary["error"]
    assert "demo-subtype" not in summary["error"]


def test_demo_fails_if_another_version_is_champion(airflow: Airflow, monkeypatch: pytest.MonkeyPatch) -> None:
    registry(monkeypatch, {"demo-binary": "3", "demo-subtype": "1"})
    assert "demo-subtype version 4 is not the champion (which is: 1)" in demo()[1]["error"]
    registry(monkeypatch, {"demo-binary": "3"})
    assert "(which is: none)" in demo()[1]["error"]


def test_demo_reports_a_blocking_gate(airflow: Airflow) -> None:
    airflow.blocked = {"demo-subtype"}
    result, summary = demo()
    assert isinstance(result.exception, Refused)
    assert result.exception.exit_code == 4
    assert summary["error"] == "demo-subtype version 4 was blocked by its gates: ROC AUC 0.8 is too low"
    assert [m["passed"] for m in summary["models"]] == [True, False]
    assert FakeStack.downs == 1


def test_a_failed_task_shows_the_end_of_its_log(airflow: Airflow) -> None:
    airflow.failing = "train_binary"
    result, summary = demo()
    assert isinstance(result.exception, StackError)
    assert "the reason why train_binary failed" in result.stderr
    assert "line 99" in result.stderr
    assert "line 50" not in result.stderr
    assert "train_binary failed in retrain_demo" in summary["error"]
    assert "http://here/dags/retrain_demo/runs/retrain_demo-run" in summary["error"]
    assert FakeStack.downs == 1


def test_a_promotion_that_breaks_down_is_no_blocked_gate(airflow: Airflow) -> None:
    airflow.stranded = {"demo-binary-v3"}
    _, summary = demo()
    assert "promote failed in promote" in summary["error"]


def test_a_missing_dag_is_named_with_the_reason(airflow: Airflow) -> None:
    airflow.absent = {"retrain_demo"}
    FakeStack.problems = ["retrain.py does not import: SyntaxError"]
    result, summary = demo()
    assert "no DAG retrain_demo" in summary["error"]
    assert "SyntaxError" in result.stderr
    assert airflow.triggered == []


def test_servers_that_die_end_the_waiting(airflow: Airflow) -> None:
    FakeStack.dead = True
    assert "airflow has ended in the meantime" in demo()[1]["error"]


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_demo_stops_the_stack_when_it_is_stopped(
    airflow: Airflow, monkeypatch: pytest.MonkeyPatch, kind: signal.Signals
) -> None:
    monkeypatch.setattr(Workflow, "run_until_review", lambda self: os.kill(os.getpid(), kind))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        result = CliRunner().invoke(cli.demo, ["demo", "--json"])
    finally:
        signal.signal(signal.SIGINT, before)
    assert result.exit_code != 0
    assert FakeStack.downs == 1
    assert '"error": "stopped"' in result.stdout


def test_nothing_interrupts_the_stopping(airflow: Airflow, monkeypatch: pytest.MonkeyPatch) -> None:
    def down(self: FakeStack) -> bool:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        FakeStack.downs += 1
        return True

    monkeypatch.setattr(FakeStack, "down", down)
    assert demo()[1]["ok"]
    assert FakeStack.downs == 1


def test_run_leaves_the_reviews_to_people(airflow: Airflow) -> None:
    result = CliRunner().invoke(cli.run, ["demo"])
    assert result.exception is None
    assert airflow.decided == {}
    assert FakeStack.downs == 0
    for line in (
        "http://here/dags/promote/runs/demo-binary-v3/tasks/review/required_actions",
        "http://here/dags/retrain_demo/runs/retrain_demo-run",
        "http://here/#/models/demo-subtype/versions/4?workflowType=machine_learning",
        "http://here/#/experiments/7/runs/run-binary?workflowType=machine_learning",
        "http://here/required_actions",
        "pass-word",
        "make down",
    ):
        assert line in result.stdout
    assert "secret" not in result.stdout
    assert "log in as reviewer" in result.stdout


def test_run_says_what_was_blocked_and_what_was_decided(airflow: Airflow) -> None:
    airflow.blocked = {"demo-subtype"}
    airflow.decided["demo-binary-v3"] = {"option": "Approve", "by": "reviewer", "reason": "good"}
    result = CliRunner().invoke(cli.run, ["demo"])
    assert isinstance(result.exception, Refused)
    assert "demo-subtype version 4: blocked by its gates: ROC AUC 0.8 is too low" in result.stdout
    assert "demo-binary version 3: is the champion; reviewer approved it" in result.stdout
    assert "Nothing waits for a review" in result.stdout


def test_an_unknown_set_starts_nothing(airflow: Airflow, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeStack, "up", lambda *a, **k: pytest.fail("started"))
    result = CliRunner().invoke(cli.run, ["nonsense"])
    assert isinstance(result.exception, BreakhisError)
    assert "nonsense.yaml: no such file" in str(result.exception)
