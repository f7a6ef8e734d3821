"""The compose stack as tests drive it: its own project, ports, networks and secrets on the engine at hand."""

import json
import os
import secrets
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import requests

from ml.airflow_api import AirflowApi
from ml.local.stack import Process, Service, State, free_ports
from ml.local.workflow import Workflow
from ml.settings import Settings

Json = dict[str, Any]

ROOT = Path(__file__).parents[2]
STANDINS = {
    "POSTGRES_IMAGE": "breakhis-standin-postgres:latest",
    "REDIS_IMAGE": "breakhis-standin-redis:latest",
    "S3_IMAGE": "breakhis-standin-s3:latest",
    "S3_COMMAND": "moto_server --host 0.0.0.0 --port 8333",
}


@dataclass
class Compose:
    """A stack of docker-compose.yaml. ``environment`` is its .env."""

    folder: Path
    project: str
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def airflow(self) -> str:
        return f"http://127.0.0.1:{self.environment['AIRFLOW_PORT']}"

    @property
    def mlflow(self) -> str:
        return f"http://127.0.0.1:{self.environment['MLFLOW_PORT']}"

    def run(self, *arguments: str, check: bool = True) -> str:
        """docker compose, with this stack's settings and none of the caller's."""
        command = ["docker", "compose", "--file", str(ROOT / "docker-compose.yaml"), "--project-directory", str(ROOT)]
        command += ["--env-file", str(self.folder / ".env"), *arguments]
        known = {name: os.environ[name] for name in ("PATH", "HOME", "DOCKER_HOST") if name in os.environ}
        done = subprocess.run(command, capture_output=True, text=True, env=known, check=False)
        if check and done.returncode:
            raise AssertionError(f"docker compose {' '.join(arguments)}:\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")
        return done.stdout

    def api(self, user: str) -> AirflowApi:
        password = {"breakhis-service": "SERVICE"}.get(user, user.upper())
        return AirflowApi(self.airflow, user, self.environment[f"{password}_PASSWORD"])

    def ask_mlflow(self, path: str, **params: str) -> Any:
        auth = ("admin", self.environment["MLFLOW_ADMIN_PASSWORD"])
        answer = requests.get(f"{self.mlflow}/api/2.0/mlflow/{path}", params=params, auth=auth, timeout=60)
        return answer.json() if answer.ok else None


@contextmanager
def stack(folder: Path, settings: Mapping[str, str], *up: str) -> Iterator[Compose]:
    """Start a stack, and take all of it down again with its volumes."""
    project = f"breakhis-test-{secrets.token_hex(4)}"
    made = Compose(folder, project)
    file = folder / ".env"
    subprocess.run(["python3", "docker/make_secrets.py", ".env.example", str(file)], cwd=ROOT, check=True)
    with free_ports(0, 0, 0, 0) as ports:
        names = ("AIRFLOW_PORT", "MLFLOW_PORT", "S3_PORT", "REDIS_PORT")
        own = {"BREAKHIS_PROJECT": project, "BREAKHIS_NETWORK": project, "COMPOSE_PROJECT_NAME": project}
        chosen = {**own, **dict(zip(names, map(str, ports), strict=True)), **settings}
        lines = [line for line in file.read_text().splitlines() if line.partition("=")[0] not in chosen]
        file.write_text("\n".join([*lines, *(f"{name}={value}" for name, value in chosen.items())]) + "\n")
        made.environment = dict(line.split("=", 1) for line in file.read_text().splitlines() if "=" in line)
        try:
            made.run("up", "--detach", "--wait", "--wait-timeout", "600", *up)
        except BaseException:
            print(made.run("logs", "--no-color", "--tail", "60", check=False)[-8000:])
            made.run("down", "--volumes", "--timeout", "10", check=False)
            raise
    try:
        yield made
    finally:
        made.run("down", "--volumes", "--timeout", "10", check=False)


class _Remote:
    """A compose stack where the workflow's driver expects the local one."""

    compose: Compose

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def up(self, extra_set: Path | None = None) -> State:
        return self.state()

    def state(self) -> State:
        here = Process.of(os.getpid())
        urls = {"airflow": self.compose.airflow, "mlflow": self.compose.mlflow}
        services = {name: Service(process=here, url=url, log=Path("-")) for name, url in urls.items()}
        return State(started=datetime.now(UTC), services=services, settings={})

    def check_dags(self, state: State) -> list[str]:
        return []

    def api(self, user: str) -> AirflowApi:
        return self.compose.api(user)


def drive(compose: Compose, set_name: str = "demo") -> Workflow:
    """The workflow of a training set on this stack, not begun."""

    class Driver(Workflow):
        def _mlflow(self, path: str, **params: str) -> Json | None:
            found: Json | None = compose.ask_mlflow(path, **params)
            return found

    stack_class = type("Remote", (_Remote,), {"compose": compose})
    workflow = Driver(set_name, Settings())
    workflow.stack = stack_class(workflow.stack.settings)
    return workflow


def containers(compose: Compose, *filters: str) -> list[Json]:
    """The containers that tasks of this stack have started, as the engine describes them."""
    command = ["docker", "ps", "--all", "--quiet", "--no-trunc", "--filter", "label=breakhis"]
    for each in (f"network={compose.project}", *filters):
        command += ["--filter", each]
    ids = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    if not ids:
        return []
    found = subprocess.run(["docker", "inspect", *ids], capture_output=True, text=True, check=False).stdout
    listed: list[Json] = json.loads(found)
    return listed
