"""The place ``docker`` with a simulated engine; tests/e2e tries it on a real one."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
from airflow.sdk.exceptions import AirflowException, AirflowFailException
from docker.errors import APIError, ImageNotFound, NotFound

from breakhis_airflow import containers
from breakhis_airflow.containers import DockerStageOperator
from breakhis_airflow.places import mapped_stage, stage
from breakhis_airflow.process import ProcessStageOperator
from ml.core.store import Store

Json = dict[str, Any]


class Engine:
    """Runs no container, but knows what it was asked: each inspection lets the next scene of its script happen."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.images = {"breakhis-trainer:latest"}
        self.containers: dict[str, Json] = {}
        self.asked: list[str] = []
        self.script: list[Any] = [lambda c: self.end(c, 0, {"run_id": "r1"})]
        self.refuses_to_start: str | None = None

    # what docker-py's client has
    def create_host_config(self, **kwargs: Any) -> Json:
        return kwargs

    def inspect_image(self, image: str) -> Json:
        if image not in self.images:
            raise ImageNotFound("no such image")
        return {}

    def pull(self, image: str) -> None:
        raise APIError("pull access denied")

    def create_container(self, *, image: str, name: str, **kwargs: Any) -> Json:
        found = f"id-{len(self.asked)}-{name}"
        config = {"Labels": kwargs["labels"], "Env": kwargs["environment"], "Cmd": kwargs["command"]}
        state = {"Status": "created", "ExitCode": 0, "OOMKilled": False}
        self.containers[found] = {
            **{"Id": found, "Name": name, "Config": config, "HostConfig": kwargs["host_config"], "State": state},
            "log": [],
        }
        self.asked.append("create")
        return {"Id": found}

    def start(self, container: str) -> None:
        self.asked.append("start")
        if self.refuses_to_start:
            raise APIError(self.refuses_to_start)
        self._get(container)["State"]["Status"] = "running"

    def inspect_container(self, container: str) -> Json:
        found = self._get(container)
        if found["State"]["Status"] == "running" and self.script:
            self.script.pop(0)(found)
        return json.loads(json.dumps(found, default=str)) | {"HostConfig": found["HostConfig"]}

    def logs(self, container: str, since: float | None = None, **_: Any) -> bytes:
        return "".join(f"{line}\n" for line in self._get(container)["log"]).encode()

    def stop(self, container: str, timeout: int) -> None:
        self._get(container)
        self.asked.append("stop")

    def remove_container(self, container: str, v: bool, force: bool) -> None:
        assert v  # or its scratch volume stays
        del self.containers[self._get(container)["Id"]]
        self.asked.append("remove")

    def containers_(self, all: bool, filters: Json) -> list[Json]:
        return [{"Id": c["Id"], "Labels": c["Config"]["Labels"]} for c in self.containers.values()]

    def _get(self, container: str) -> Json:
        for found in self.containers.values():
            if container in (found["Id"], found["Name"]):
                return found
        raise NotFound(f"no such container {container}")

    # what tests let happen
    def say(self, container: Json, *lines: str) -> None:
        for line in lines:
            container["log"].append(f"2026-11-23T01:00:00.{len(container['log']):09d}Z {line}")

    def end(self, container: Json, status: int, result: Json | None = None, **state: Any) -> None:
        if result is not None:
            self.store.put_json(container["Config"]["Labels"]["breakhis.result"], result)
        container["State"] |= {"Status": "exited", "ExitCode": status, **state}


class Kept(dict[str, Any]):
    """Airflow's task state, which outlives a try."""

    def set(self, key: str, value: Any) -> None:
        self[key] = value


@pytest.fixture
def engine(store: Store, monkeypatch: pytest.MonkeyPatch) -> Engine:
    played = Engine(store)
    client = SimpleNamespace(**{name: getattr(played, name) for name in dir(played) if not name.startswith("_")})
    client.containers = played.containers_
    monkeypatch.setattr(DockerStageOperator, "cli", client)
    monkeypatch.setattr(containers, "_SECONDS_BETWEEN_LOOKS", 0.0)
    monkeypatch.setenv("BREAKHIS_PLACE", "docker")
    return played


@pytest.fixture
def kept() -> Kept:
    return Kept()


@pytest.fixture
def run(context: Any, kept: Kept) -> Any:
    def make(number: int = 1) -> Json:
        made: Json = context(number)
        made["ti"].map_index = -1
        made["ti"].stats_tags = {}
        return {**made, "task_state_store": kept}

    return make


def train() -> DockerStageOperator:
    task = stage("train", "binary", "--dataset", "dataset-1")
    assert isinstance(task, DockerStageOperator)
    return task


def test_only_what_computes_runs_in_containers(engine: Engine) -> None:
    assert type(stage("gate", "m", "1")) is ProcessStageOperator
    assert {type(stage(name)) for name in ("weights", "features", "train")} == {DockerStageOperator}
    assert train().queue == "gpu"


def test_a_shared_out_stage_is_a_mapped_task(engine: Engine) -> None:
    from airflow.sdk import DAG

    with DAG("a_dag"):
        task = mapped_stage("features", [("d", "--shard", "1/2"), ("d", "--shard", "2/2")], pool="gpu")
    assert task.operator_class is DockerStageOperator
    assert (task.task_id, task.pool, task.queue) == ("features", "gpu", "gpu")


def test_the_result_comes_from_the_store_and_the_container_goes(engine: Engine, run: Any) -> None:
    engine.script = [
        lambda c: engine.say(c, "epoch 1", "epoch 2"),
        lambda c: engine.say(c, "epoch 3", '{"run_id": "the last line of the log"}'),
        lambda c: engine.end(c, 0, {"run_id": "r1"}),
    ]
    assert train().execute(run()) == {"run_id": "r1"}
    assert engine.containers == {}
    assert engine.asked == ["create", "start", "stop", "remove"]


def test_each_line_is_logged_once(engine: Engine, run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    engine.script = [
        lambda c: engine.say(c, "epoch 1"),
        lambda c: None,
        lambda c: engine.say(c, "epoch 2"),
        lambda c: engine.end(c, 0, {}),
    ]
    train().execute(run())
    log = capsys.readouterr().out
    assert (log.count("epoch 1"), log.count("epoch 2")) == (1, 1)


def test_what_the_engine_is_asked_for(engine: Engine, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "BREAKHIS_DOCKER_GPUS": "2",
        "BREAKHIS_DOCKER_MEMORY": "6g",
        "BREAKHIS_DOCKER_CPUS": "1.5",
        "BREAKHIS_DOCKER_NETWORK": "hospital",
        "BREAKHIS_DOCKER_VOLUMES": "store:/store,/srv/slides:/slides:ro",
        "BREAKHIS_DOCKER_STORE": "file:///store",
        "BREAKHIS_DOCKER_MLFLOW_URI": "http://mlflow:5000",
    }.items():
        monkeypatch.setenv(name, value)
    seen: list[Json] = []
    engine.script = [seen.append, lambda c: engine.end(c, 0, {})]
    train().execute(run())

    host = seen[0]["HostConfig"]
    [request] = host["device_requests"]
    assert (request["Count"], request["Capabilities"]) == (2, [["gpu"]])
    assert (host["read_only"], host["cap_drop"], host["security_opt"]) == (True, ["ALL"], ["no-new-privileges"])
    assert (host["mem_limit"], host["memswap_limit"], host["nano_cpus"]) == ("6g", "6g", 1_500_000_000)
    assert (host["network_mode"], host["shm_size"], host["init"]) == ("hospital", "1g", True)
    mounts = {mount["Target"]: (mount["Type"], mount.get("Source"), mount.get("ReadOnly")) for mount in host["mounts"]}
    assert mounts == {
        "/scratch": ("volume", None, False),
        "/store": ("volume", "store", False),
        "/slides": ("bind", "/srv/slides", True),
    }
    environment = seen[0]["Config"]["Env"]
    assert environment["BREAKHIS_GPU_REQUIRED"] == "true"
    assert environment["BREAKHIS_STORE"] == "file:///store"
    assert environment["BREAKHIS_MLFLOW_URI"] == "http://mlflow:5000"
    assert environment["HOME"] == environment["TMPDIR"] == "/scratch"
    assert seen[0]["Config"]["Cmd"][:3] == ["breakhis", "train", "binary"]
    assert seen[0]["Config"]["Cmd"][-1].startswith("file:///store/jobs/a_dag/")
    labels = seen[0]["Config"]["Labels"]
    assert {labels["breakhis.dag"], labels["breakhis.task"]} == {"a_dag", "a_task"}


def test_without_a_gpu_none_is_asked_for(engine: Engine, run: Any) -> None:
    seen: list[Json] = []
    engine.script = [seen.append, lambda c: engine.end(c, 0, {})]
    train().execute(run())
    assert seen[0]["HostConfig"]["device_requests"] is None
    assert "BREAKHIS_GPU_REQUIRED" not in seen[0]["Config"]["Env"]


def test_nothing_of_the_worker_gets_in(engine: Engine, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AIRFLOW__CORE__FERNET_KEY", "POSTGRES_PASSWORD", "BREAKHIS_AIRFLOW_PASSWORD", "BREAKHIS_DOCKER_URL"):
        monkeypatch.setenv(name, "planted")
    monkeypatch.setenv("AIRFLOW_CONN_BREAKHIS_STORE", '{"conn_type": "aws", "login": "key", "password": "planted-s3"}')
    monkeypatch.setenv("BREAKHIS_CONNECTIONS", "breakhis_store")
    monkeypatch.setenv("BREAKHIS_WEIGHTS", "random")
    seen: list[Json] = []
    engine.script = [seen.append, lambda c: engine.end(c, 0, {})]
    train().execute(run())
    environment = seen[0]["Config"]["Env"]
    assert {name: value for name, value in environment.items() if "planted" in value} == {
        "AWS_SECRET_ACCESS_KEY": "planted-s3"
    }
    assert environment["BREAKHIS_WEIGHTS"] == "random"
    assert not {"PATH", "VIRTUAL_ENV", "PYTHONPATH"} & environment.keys()


class WorkerKilled(BaseException):
    pass


def killed(container: Json) -> None:
    raise WorkerKilled


def test_a_retry_waits_for_the_container_that_was_left_running(
    engine: Engine, run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.script = [lambda c: engine.say(c, "epoch 1"), killed]
    with pytest.raises(WorkerKilled):
        train().execute(run(1))
    capsys.readouterr()
    engine.script = [
        lambda c: None,
        lambda c: engine.say(c, "epoch 2"),
        lambda c: engine.end(c, 0, {"run_id": "the first try's"}),
    ]
    assert train().execute(run(2)) == {"run_id": "the first try's"}
    assert engine.asked.count("create") == 1
    log = capsys.readouterr().out
    assert "epoch 1" in log
    assert "epoch 2" in log


def test_so_does_one_whose_id_was_not_kept_in_time(engine: Engine, run: Any, kept: Kept) -> None:
    engine.script = [killed]
    with pytest.raises(WorkerKilled):
        train().execute(run(1))
    kept.clear()
    engine.script = [lambda c: None, lambda c: engine.end(c, 0, {"run_id": "r1"})]
    assert train().execute(run(2)) == {"run_id": "r1"}
    assert engine.asked.count("create") == 1


def test_one_that_ended_while_nobody_looked_counts(
    engine: Engine, run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.script = [killed]
    with pytest.raises(WorkerKilled):
        train().execute(run(1))
    [left] = engine.containers.values()
    engine.say(left, "the end")
    engine.end(left, 0, {"run_id": "r1"})
    assert train().execute(run(2)) == {"run_id": "r1"}
    assert engine.asked.count("create") == 1
    assert "the end" in capsys.readouterr().out


def test_a_killed_container_is_started_anew(engine: Engine, run: Any) -> None:
    engine.script = [lambda c: engine.end(c, 137)]
    with pytest.raises(AirflowException, match="was killed: somebody or something") as caught:
        train().execute(run(1))
    assert not isinstance(caught.value, AirflowFailException)
    engine.script = [lambda c: engine.end(c, 0, {"run_id": "r2"})]
    assert train().execute(run(2)) == {"run_id": "r2"}
    assert engine.asked.count("create") == 2


def test_stopping_the_task_stops_the_container(engine: Engine, run: Any) -> None:
    task = train()
    engine.script = [lambda c: task.on_kill()]
    with pytest.raises(AirflowException):
        task.execute(run())
    assert engine.containers == {}


@pytest.mark.parametrize("moment", ["inspect_image", "create_container", "start"])
def test_stopping_the_task_while_it_starts_the_container_leaves_none(
    engine: Engine, run: Any, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """The task goes on after ``on_kill``, until Airflow kills it seconds later."""
    task = train()
    call = getattr(task.cli, moment)

    def stop_meanwhile(*arguments: Any, **kwargs: Any) -> Any:
        task.on_kill()
        return call(*arguments, **kwargs)

    monkeypatch.setattr(task.cli, moment, stop_meanwhile)
    engine.script = []
    with pytest.raises(AirflowException, match="was stopped"):
        task.execute(run())
    assert engine.containers == {}


def test_stopping_the_task_while_it_finds_the_container_of_an_earlier_try_leaves_none(
    engine: Engine, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.script = [killed]
    with pytest.raises(WorkerKilled):
        train().execute(run(1))
    task = train()
    inspect = task.cli.inspect_container

    def stop_meanwhile(container: str) -> Json:
        task.on_kill()
        found: Json = inspect(container)
        return found

    monkeypatch.setattr(task.cli, "inspect_container", stop_meanwhile)
    engine.script = []
    with pytest.raises(AirflowException, match="was stopped"):
        task.execute(run(2))
    assert engine.containers == {}


def test_out_of_memory_says_so_and_is_final(engine: Engine, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BREAKHIS_DOCKER_MEMORY", "2g")
    engine.script = [lambda c: engine.end(c, 137, OOMKilled=True)]
    with pytest.raises(AirflowFailException, match="ran out of memory, of which it may use 2g: raise BREAKHIS_DOCKER"):
        train().execute(run())


def test_a_missing_image_is_final(engine: Engine, run: Any) -> None:
    engine.images.clear()
    with pytest.raises(AirflowFailException, match=r"no image 'breakhis-trainer:latest'.*docker/build\.sh"):
        train().execute(run())
    assert engine.asked == []


def test_an_engine_without_gpus_is_final(engine: Engine, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BREAKHIS_DOCKER_GPUS", "1")
    engine.refuses_to_start = 'could not select device driver "" with capabilities: [[gpu]]'
    with pytest.raises(AirflowFailException, match="install nvidia-container-toolkit"):
        train().execute(run())
    assert engine.containers == {}


@pytest.mark.parametrize(("status", "final"), [(3, True), (4, True), (75, False), (1, False)])
def test_a_stages_own_errors_are_as_everywhere(engine: Engine, run: Any, status: int, final: bool) -> None:
    engine.script = [lambda c: engine.say(c, "error: it does not fit"), lambda c: engine.end(c, status)]
    with pytest.raises(AirflowException, match=r"^breakhis train: it does not fit$") as caught:
        train().execute(run())
    assert isinstance(caught.value, AirflowFailException) is final


@pytest.mark.parametrize(
    ("state", "stays"), [("running", True), ("up_for_retry", True), ("failed", False), (None, True)]
)
def test_containers_that_no_task_waits_for_are_removed(
    engine: Engine, run: Any, monkeypatch: pytest.MonkeyPatch, state: str | None, stays: bool
) -> None:
    monkeypatch.setenv("AIRFLOW_CONN_BREAKHIS_AIRFLOW", '{"conn_type": "http", "host": "a", "password": "p"}')
    task = {"task_id": "other_task", "map_index": -1, "state": state}
    monkeypatch.setattr(containers.AirflowApi, "task_instances", lambda self, dag, run: [task])
    engine.script = [killed]
    other = run(1)
    other["ti"].task_id = "other_task"
    with pytest.raises(WorkerKilled):
        train().execute({**other, "task_state_store": Kept()})
    engine.script = [lambda c: engine.end(c, 0, {})]
    train().execute(run(2))
    assert [c["Config"]["Labels"]["breakhis.task"] for c in engine.containers.values()] == ["other_task"] * stays
