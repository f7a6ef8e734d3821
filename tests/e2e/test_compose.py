"""The compose stack on a real Docker engine: the whole workflow in it, and what happens when parts of it are killed.

``make e2e`` starts an engine where there is none, builds the images and runs this. One file, since each part goes on
with the stack that the part before it has left.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import boto3
import pytest
import requests

from ml.core.errors import CredentialsError
from ml.local.watch import DagRun
from ml.local.workflow import Workflow
from tests.e2e import compose as module
from tests.e2e.compose import ROOT, STANDINS, Compose, bridge, containers, drive, inspect

pytestmark = [pytest.mark.docker, pytest.mark.timeout(1800)]

Json = dict[str, Any]


@pytest.fixture(scope="module")
def dags(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This checkout's DAGs and YAML, with fewer pictures in the demo source; their number is not tested here."""
    folder = tmp_path_factory.mktemp("conf") / "dags"
    shutil.copytree(ROOT / "dags", folder, ignore=shutil.ignore_patterns("__pycache__"))
    source = folder / "sources" / "demo.yaml"
    fewer, count = re.subn(r"(?m)^images: \d+", "images: 200", source.read_text())
    assert count == 1
    source.write_text(fewer)
    return folder


@pytest.fixture(scope="module")
def settings(dags: Path) -> dict[str, str]:
    """What is set in every stack: addresses that further hosts find as well, and patience for a test's length."""
    return {
        "BIND": bridge(),
        "BREAKHIS_DAGS": str(dags),
        "BREAKHIS_WEIGHTS": "random",
        "BREAKHIS_SHARDS": "2",
        "HEARTBEAT_TIMEOUT": "20",
        **(STANDINS if os.environ.get("BREAKHIS_E2E_STANDINS") else {}),
    }


@pytest.fixture(scope="module")
def compose(tmp_path_factory: pytest.TempPathFactory, settings: dict[str, str]) -> Iterator[Compose]:
    with module.stack(tmp_path_factory.mktemp("compose"), settings) as made:
        yield made


@pytest.fixture(scope="module")
def second(compose: Compose, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compose]:
    """A further host: nothing but published addresses in common with the first, and no folder or volume."""
    with module.worker_host(tmp_path_factory.mktemp("second"), compose) as made:
        yield made


@pytest.fixture(scope="module")
def finished(compose: Compose, second: Compose) -> Workflow:
    """The workflow of the demo set on both hosts, reviewed by the reviewer's account."""
    workflow = drive(compose)
    workflow.prepare()
    workflow.run_until_review()
    workflow.answer_as_reviewer()
    workflow.read_decisions()
    return workflow


def wait_for(what: str, happens: Callable[[], Any], seconds: float = 600) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := happens():
            return found
        time.sleep(0.2)
    raise AssertionError(f"{what} did not come within {seconds:.0f} s")


def s3(compose: Compose) -> Any:
    return boto3.client(
        "s3",
        endpoint_url=compose.address("S3_PORT"),
        aws_access_key_id="breakhis",
        aws_secret_access_key=compose.environment["S3_SECRET"],
        region_name="us-east-1",
    )


def log_of(compose: Compose, run: DagRun, task: Json) -> str:
    number = max(task["try_number"], 1)
    lines = compose.api("engineer").task_log(run.dag, run.id, task["task_id"], number, task["map_index"])
    return "\n".join(lines)


# --- the workflow ---------------------------------------------------------------------------------------------------


def test_both_models_are_champions_by_the_reviewers_approval(compose: Compose, finished: Workflow) -> None:
    assert finished.shortcomings() == []
    assert [candidate.reviewer for candidate in finished.candidates] == ["reviewer", "reviewer"]
    _print_what_airflow_adds(compose, finished)


def test_nobody_but_the_promoter_moves_an_alias_and_a_reviewer_only_answers(
    compose: Compose, finished: Workflow
) -> None:
    candidate = finished.candidates[0]
    body = {"name": candidate.model, "alias": "champion", "version": candidate.version}
    services = {f"breakhis-{name}": f"MLFLOW_{name.upper()}_PASSWORD" for name in ("trainer", "promoter")}
    answers = {
        user: requests.post(
            f"{compose.mlflow}/api/2.0/mlflow/registered-models/alias",
            json=body,
            auth=(user, compose.environment[secret]),
            timeout=60,
        ).status_code
        for user, secret in {"engineer": "ENGINEER_PASSWORD", "reviewer": "REVIEWER_PASSWORD", **services}.items()
    }
    assert answers == {"engineer": 403, "reviewer": 403, "breakhis-trainer": 403, "breakhis-promoter": 200}
    with pytest.raises(CredentialsError):
        compose.api("reviewer").trigger("retrain_demo")
    detail = compose.api("breakhis-service").hitl_detail("promote", candidate.promote.id, "review")
    assert detail["responded_by_user"]["id"].isdigit()  # FAB's, to which the reviewer was a name


def test_what_computes_ran_in_containers_and_both_hosts_took_part(
    compose: Compose, second: Compose, finished: Workflow
) -> None:
    tasks = finished.retrain.tasks
    computing = [task for task in tasks if task["task_id"] in {"weights", "features", "train_binary", "train_subtype"}]
    assert len(computing) == 5
    for task in computing:
        assert "Started container" in log_of(compose, finished.retrain, task)
    hosts = {task["hostname"] for task in computing}
    assert len(hosts) == 2
    assert second.environment["WORKER_NAME"] in hosts
    assert containers(compose) == []  # each was removed when its task had ended


def test_artifacts_and_data_lie_in_the_object_store(compose: Compose, finished: Workflow) -> None:
    client = s3(compose)
    models = client.list_objects_v2(Bucket="mlflow")["Contents"]
    assert any(entry["Key"].endswith("network.keras") for entry in models)
    kinds = {p["Prefix"] for p in client.list_objects_v2(Bucket="breakhis", Delimiter="/")["CommonPrefixes"]}
    assert {"audit/", "jobs/", "ledgers/", "objects/", "refs/"} <= kinds


def _print_what_airflow_adds(compose: Compose, workflow: Workflow) -> None:
    runs = [DagRun(f"ingest_{name}", "") for name in workflow.sources]
    api = compose.api("engineer")
    for run in runs:
        [run.id] = [found["dag_run_id"] for found in api._call("GET", f"/api/v2/dags/{run.dag}/dagRuns")["dag_runs"]]
        run.refresh(api)
    wall, work = 0.0, 0.0
    for run in [*runs, workflow.retrain]:
        found = api.dag_run(run.dag, run.id)
        wall += (_when(found["end_date"]) - _when(found["queued_at"])).total_seconds()
        spans = []
        for task in run.tasks:
            result = _result(compose, run, task)
            if result and "seconds" in result:
                end = _when(task["end_date"]).timestamp()
                spans.append((end - result["seconds"], end))
        work += _covered(spans)
    print(f"\nworkflow {wall:.0f} s, of which stages worked {work:.0f} s: Airflow adds {wall - work:.0f} s")


def _result(compose: Compose, run: DagRun, task: Json) -> Json | None:
    from ml.core.errors import AirflowError

    try:
        found = compose.api("engineer").xcom(run.dag, run.id, task["task_id"], task["map_index"])
    except AirflowError:
        return None
    return found if isinstance(found, dict) else None


def _when(text: str) -> datetime:
    return datetime.fromisoformat(text)


def _covered(spans: list[tuple[float, float]]) -> float:
    total, until = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total


def test_airflow_says_how_long_it_parses(compose: Compose, finished: Workflow) -> None:
    took = {dag["dag_id"]: dag["last_parse_duration"] for dag in compose.api("engineer").dags()}
    print("\nseconds that Airflow took to parse each DAG's file:", took)
    assert {"ingest_demo", "ingest_breakhis", "retrain_demo", "retrain_breakhis", "promote"} <= took.keys()
    assert all(seconds is not None for seconds in took.values())


# --- secrets ----------------------------------------------------------------------------------------------------------


def test_secrets_are_where_they_are_needed_and_nowhere_else(
    compose: Compose, second: Compose, finished: Workflow
) -> None:
    names = [name for name in compose.environment if name.endswith(("_PASSWORD", "_SECRET", "_KEY"))]
    planted = {name: compose.environment[name] for name in names}
    assert len(planted) > 10

    def found_in(text: str) -> set[str]:
        return {name for name, secret in planted.items() if secret in text}

    images = ("AIRFLOW", "TRAINER", "MLFLOW", "ENGINE-PROXY")
    for image in images:
        history = ["docker", "history", "--no-trunc", f"breakhis-{image.lower()}:latest"]
        assert found_in(subprocess.run(history, capture_output=True, text=True, check=True).stdout) == set()
    api = compose.api("admin")
    runs = [finished.retrain, *(candidate.promote for candidate in finished.candidates)]
    for run in runs:
        for task in run.tasks:
            if task["hostname"]:  # it ran somewhere; a task that was skipped has no log
                assert found_in(log_of(compose, run, task)) == set()
            path = f"/api/v2/dags/{run.dag}/dagRuns/{run.id}/taskInstances/{task['task_id']}"
            assert found_in(json.dumps(api._all(f"{path}/xcomEntries", "xcom_entries"))) == set()
            assert found_in(json.dumps(api.task_instances(run.dag, run.id))) == set()  # with rendered fields
    for candidate in finished.candidates:
        assert found_in(json.dumps(compose.ask_mlflow("runs/get", run_id=candidate.run_id))) == set()
    for host in (compose, second):
        for line in host.run("ps", "--all", "--format", "json").splitlines():
            container = json.loads(line)
            service = container["Service"]
            seen = found_in(json.dumps(inspect(container["ID"])))
            assert seen <= _NEEDED.get(service, set()), (service, seen)
            assert found_in(host.run("logs", "--no-color", service)) == set(), service


_AIRFLOW = {"FERNET_KEY", "JWT_SECRET", "API_SECRET", "POSTGRES_PASSWORD", "REDIS_PASSWORD"}
_NEEDED = {
    "postgres": {"POSTGRES_PASSWORD", "MLFLOW_DB_PASSWORD"},
    "redis": {"REDIS_PASSWORD"},
    "s3": {"S3_SECRET"},
    "buckets": {"S3_SECRET"},
    "mlflow": {"MLFLOW_DB_PASSWORD", "MLFLOW_ADMIN_PASSWORD", "MLFLOW_SECRET_KEY", "S3_SECRET"},
    "airflow-init": {
        *(*_AIRFLOW, "S3_SECRET", "AUDIT_KEY"),
        *(f"{name}_PASSWORD" for name in ("ADMIN", "ENGINEER", "REVIEWER", "VIEWER", "SERVICE")),
        *(f"MLFLOW_{name}_PASSWORD" for name in ("ADMIN", "TRAINER", "PROMOTER")),
    },
    "apiserver": {*_AIRFLOW, "S3_SECRET"},
    **dict.fromkeys(("scheduler", "dag-processor", "triggerer", "worker", "worker-gpu"), _AIRFLOW),
}


# --- kills ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def survived(compose: Compose, second: Compose, finished: Workflow) -> Json:
    """A retraining in which one training's worker was killed, and the other's container.

    The second host has left; two workers of the first are at it, so that a retry finds the same engine again.
    """
    second.run("down", "--timeout", "30")
    compose.run("up", "--detach", "--wait", "--no-recreate", "--scale", "worker-gpu=2", "worker-gpu")
    api = compose.api("engineer")
    seen = set(s3_states(compose))
    run = DagRun("retrain_demo", api.trigger("retrain_demo", conf={"seed": 11})["dag_run_id"])
    facts: Json = {"run": run}

    def training(task: str) -> Any:
        found = containers(compose, f"label=breakhis.run={run.id}", f"label=breakhis.task={task}")
        return found[0] if found and found[0]["State"]["Running"] else None

    # The worker of train_binary dies. Its container is held, so that it cannot end before it is found again.
    binary = wait_for("the container of train_binary", lambda: training("train_binary"))
    facts["binary"] = binary["Id"]
    _docker("pause", binary["Id"])
    run.refresh(api)
    host = run.task("train_binary")["hostname"]
    killed = next(c for c in inspect(compose.run("ps", "--quiet", "worker-gpu")) if c["Config"]["Hostname"] == host)
    os.kill(killed["State"]["Pid"], signal.SIGKILL)
    wait_for("the worker's end", lambda: inspect(killed["Id"])[0]["RestartCount"] > killed["RestartCount"])
    facts["after the kill"] = [c["Id"] for c in containers(compose, "label=breakhis.task=train_binary")]

    # The container of train_subtype dies, once it has a checkpoint: at the same worker, or in its own time.
    subtype = wait_for("the container of train_subtype", lambda: training("train_subtype"))
    facts["subtype"] = subtype["Id"]
    facts["checkpoints"] = wait_for("a checkpoint", lambda: s3_states(compose) - seen, 300)
    _docker("kill", subtype["Id"])

    def reattached() -> bool:
        run.refresh(api)
        task = run.task("train_binary")
        return task["try_number"] >= 2 and task["state"] == "running" and _takes_up(log_of(compose, run, task))

    wait_for("the second try of train_binary", reattached)
    facts["at the second try"] = [c["Id"] for c in containers(compose, "label=breakhis.task=train_binary")]
    _docker("unpause", binary["Id"])

    wait_for_trainings(compose, run)
    # One run of a set at a time: the next one need not wait for this one's models.
    api._call("PATCH", f"/api/v2/dags/{run.dag}/dagRuns/{run.id}", body={"state": "failed"})
    return facts


def wait_for_trainings(compose: Compose, run: DagRun) -> None:
    """Wait until both trainings have ended well. What follows them is the same as in ``finished``."""
    api = compose.api("engineer")

    def ended() -> bool:
        run.refresh(api)
        states = {run.task(f"train_{task}").get("state") for task in ("binary", "subtype")}
        return run.has_ended or states == {"success"}

    wait_for("the end of the trainings", ended, 900)
    assert not run.failed_tasks(), [log_of(compose, run, task)[-2000:] for task in run.failed_tasks()]


def s3_states(compose: Compose) -> set[str]:
    """The trainings that have saved something."""
    listed = s3(compose).list_objects_v2(Bucket="breakhis", Prefix="jobs/training/").get("Contents", [])
    return {entry["Key"] for entry in listed if entry["Key"].endswith(".npz")}


def _takes_up(log: str) -> bool:
    """Whether a try found the container of the one before: by its id, or by its name."""
    return "econnecting to existing job" in log or "of an earlier try still runs" in log


def test_a_training_outlives_its_worker(compose: Compose, survived: Json) -> None:
    run: DagRun = survived["run"]
    assert _result(compose, run, run.task("train_binary"))
    assert survived["after the kill"] == survived["at the second try"] == [survived["binary"]]
    task = run.task("train_binary")
    assert task["try_number"] == 2
    log = log_of(compose, run, task)
    assert _takes_up(log)
    assert "Started container" not in log
    assert " of experiment demo" in log  # what a training says at its beginning
    assert _runs_of(compose, "binary", 11) == 1


def test_a_killed_container_is_started_again_and_goes_on(compose: Compose, survived: Json) -> None:
    run: DagRun = survived["run"]
    task = run.task("train_subtype")
    assert task["try_number"] == 2
    log = log_of(compose, run, task)
    assert "Started container" in log
    assert "resuming after epoch" in log
    assert _runs_of(compose, "subtype", 11) == 1
    assert s3_states(compose) == set()


def test_a_training_failed_by_hand_stops_its_container(compose: Compose, survived: Json) -> None:
    api = compose.api("engineer")
    run = DagRun("retrain_demo", api.trigger("retrain_demo", conf={"seed": 12})["dag_run_id"])
    label = f"label=breakhis.run={run.id}"
    wait_for("a training", lambda: containers(compose, label, "label=breakhis.task=train_binary"))
    for task in ("train_binary", "train_subtype"):
        path = f"/api/v2/dags/{run.dag}/dagRuns/{run.id}/taskInstances/{task}"
        api._call("PATCH", path, body={"new_state": "failed"})
    wait_for("the end of its container", lambda: not containers(compose, label), 120)


def _runs_of(compose: Compose, task: str, seed: int) -> int:
    experiment = compose.ask_mlflow("experiments/get-by-name", experiment_name="demo")["experiment"]["experiment_id"]
    answer = requests.post(
        f"{compose.mlflow}/api/2.0/mlflow/runs/search",
        json={
            "experiment_ids": [experiment],
            "filter": f"tags.`breakhis.task` = '{task}' and tags.`breakhis.seed` = '{seed}'",
        },
        auth=("admin", compose.environment["MLFLOW_ADMIN_PASSWORD"]),
        timeout=60,
    )
    return len(answer.json().get("runs", []))


def _docker(*arguments: str) -> None:
    subprocess.run(["docker", *arguments], check=True, capture_output=True)


# --- the same on other terms ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def restored(
    compose: Compose, survived: Json, settings: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Compose]:
    """A new stack with what a backup of the first has kept. It has no Celery: tasks run beside the scheduler."""
    folder = tmp_path_factory.mktemp("backup")
    compose.command("docker/backup.sh", "save", str(folder / "saved"))
    compose.run("stop", "--timeout", "10")
    local = {**settings, "AIRFLOW_EXECUTOR": "LocalExecutor", "COMPOSE_PROFILES": ""}
    # What is encrypted in the databases, kept there as a hash, or seals the audit log.
    local |= {name: compose.environment[name] for name in ("FERNET_KEY", "MLFLOW_ADMIN_PASSWORD", "AUDIT_KEY")}

    def restore(made: Compose) -> None:
        made.command("docker/backup.sh", "restore", str(folder / "saved"))
        made.run("run", "--rm", "--no-deps", "mlflow", "python3", "/opt/breakhis/docker/servers.py", "migrate-mlflow")

    with module.stack(tmp_path_factory.mktemp("restored"), local, before=restore) as made:
        yield made


def test_a_backup_brings_back_models_history_and_data(restored: Compose, finished: Workflow) -> None:
    for candidate in finished.candidates:
        model = restored.ask_mlflow("registered-models/get", name=candidate.model)["registered_model"]
        champions = [alias["version"] for alias in model["aliases"] if alias["alias"] == "champion"]
        assert champions == [str(candidate.version)]
        run = restored.ask_mlflow("runs/get", run_id=candidate.run_id)["run"]
        assert run["info"]["status"] == "FINISHED"
    before = finished.retrain
    assert restored.api("viewer").dag_run(before.dag, before.id)["state"] == "success"
    assert {p["Prefix"] for p in s3(restored).list_objects_v2(Bucket="breakhis", Delimiter="/")["CommonPrefixes"]} >= {
        "audit/",
        "objects/",
        "refs/",
    }


def test_without_celery_the_same_dags_train_in_containers(restored: Compose) -> None:
    services = restored.run("ps", "--services").split()
    assert not {"redis", "worker", "worker-gpu"} & set(services)
    api = restored.api("engineer")
    run = DagRun("retrain_demo", api.trigger("retrain_demo", conf={"seed": 13})["dag_run_id"])
    wait_for_trainings(restored, run)
    shards = [api.xcom(run.dag, run.id, "features", number) for number in (0, 1)]
    assert [shard["extracted"] for shard in shards] == [0, 0]  # what was restored is what it found
    for task in ("train_binary", "train_subtype"):
        assert "Started container" in log_of(restored, run, run.task(task))
        assert _runs_of(restored, task.removeprefix("train_"), 13) == 1
