"""The compose stack as tests drive it: its own project, ports, networks and secrets on the engine at hand."""

import json
import os
import secrets
import socket
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import requests

from ml.core.airflow_api import AirflowApi
from ml.core.settings import Settings
from ml.local.ports import free_ports
from ml.local.processes import Process
from ml.local.stack import Service, StackState
from ml.local.workflow import Workflow

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
    """A stack of docker-compose.yaml, or of another such ``file``. ``environment`` is its .env."""

    folder: Path
    project: str
    environment: dict[str, str] = field(default_factory=dict)
    file: str = "docker-compose.yaml"

    @property
    def airflow(self) -> str:
        return self.address("AIRFLOW_PORT")

    @property
    def mlflow(self) -> str:
        return self.address("MLFLOW_PORT")

    def address(self, port: str) -> str:
        """Where a service is published."""
        return f"http://{self.environment['BIND']}:{self.environment[port]}"

    def run(self, *arguments: str, check: bool = True) -> str:
        """docker compose, with this stack's settings and none of the caller's."""
        return self.command("docker", "compose", *arguments, check=check)

    def command(self, *command: str, check: bool = True) -> str:
        """A command that finds this stack where docker compose looks for one."""
        known = {name: os.environ[name] for name in ("PATH", "HOME", "DOCKER_HOST") if name in os.environ}
        known |= {"COMPOSE_FILE": str(ROOT / self.file), "COMPOSE_ENV_FILES": str(self.folder / ".env")}
        done = subprocess.run(command, capture_output=True, text=True, env=known, cwd=ROOT, check=False)
        if check and done.returncode:
            raise AssertionError(f"{' '.join(command)}:\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")
        return done.stdout

    def api(self, user: str) -> AirflowApi:
        password = {"breakhis-service": "SERVICE"}.get(user, user.upper())
        return AirflowApi(self.airflow, user, self.environment[f"{password}_PASSWORD"])

    def ask_mlflow(self, path: str, **params: str) -> Any:
        auth = ("admin", self.environment["MLFLOW_ADMIN_PASSWORD"])
        answer = requests.get(f"{self.mlflow}/api/2.0/mlflow/{path}", params=params, auth=auth, timeout=60)
        return answer.json() if answer.ok else None


@contextmanager
def stack(
    folder: Path, settings: Mapping[str, str], *, before: Callable[[Compose], object] = lambda _: None
) -> Iterator[Compose]:
    """Start a stack, and take all of it down again with its volumes. ``before`` its start something may be done."""
    project = f"breakhis-test-{secrets.token_hex(4)}"
    made = Compose(folder, project)
    file = folder / ".env"
    subprocess.run(["python3", "docker/make_secrets.py", ".env.example", str(file)], cwd=ROOT, check=True)
    names = ("AIRFLOW_PORT", "MLFLOW_PORT", "S3_PORT", "REDIS_PORT", "WORKER_LOG_PORT")
    with free_ports(*(0 for _ in names)) as ports:
        own = {"BREAKHIS_PROJECT": project, "BREAKHIS_NETWORK": project, "BIND": "127.0.0.1"}
        chosen = {**own, **dict(zip(names, map(str, ports), strict=True)), **settings}
        chosen["AIRFLOW_ADDRESS"] = f"http://{chosen['BIND']}:{chosen['AIRFLOW_PORT']}"
        chosen["MLFLOW_ALLOWED_HOSTS"] = f"mlflow:5000,{chosen['BIND']}:*"
        if chosen["BIND"] != own["BIND"]:  # where other hosts look for it
            chosen["S3_ADDRESS"] = f"http://{chosen['BIND']}:{chosen['S3_PORT']}"
        made.environment = _write(file, chosen)
        try:
            before(made)
            made.run("up", "--detach", "--wait", "--wait-timeout", "600")
        except BaseException:
            print(made.run("logs", "--no-color", "--tail", "60", check=False)[-30000:])
            made.run("down", "--volumes", "--timeout", "10", check=False)
            raise
    try:
        yield made
    finally:
        made.run("down", "--volumes", "--timeout", "10", check=False)


@contextmanager
def worker_host(folder: Path, first: Compose) -> Iterator[Compose]:
    """A further host by docker/compose.worker.yaml: of the stack it knows the published addresses and the keys."""
    there = first.environment
    made = Compose(folder, f"{first.project}-worker", file="docker/compose.worker.yaml")
    keys = ("FERNET_KEY", "JWT_SECRET", "API_SECRET", "REDIS_PASSWORD", "AIRFLOW_ADDRESS", "WORKER_LOG_PORT", "BIND")
    settings = {
        "BREAKHIS_PROJECT": made.project,
        **{name: there[name] for name in keys},
        "AIRFLOW_URL": first.airflow,
        "MLFLOW_URL": first.mlflow,
        "REDIS_HOST": f"{there['BIND']}:{there['REDIS_PORT']}",
        "WORKER_NAME": there["BIND"],
        "BREAKHIS_WEIGHTS": there["BREAKHIS_WEIGHTS"],
        "BREAKHIS_DAGS": there["BREAKHIS_DAGS"],
        "BREAKHIS_DOCKER_GPUS": there["BREAKHIS_DOCKER_GPUS"],
        "DOCKER_GID": there["DOCKER_GID"],
    }
    made.environment = _write(folder / ".env", settings)
    try:
        made.run("up", "--detach", "--wait", "--wait-timeout", "300")
        yield made
    except BaseException:
        print(made.run("logs", "--no-color", "--tail", "60", check=False)[-8000:])
        raise
    finally:
        made.run("down", "--volumes", "--timeout", "10", check=False)


def bridge() -> str:
    """An address of this machine that containers of every network reach, and nobody beyond this machine."""
    # Asked of the interface: of a bridge that the engine has just made, `docker network inspect` knows no gateway yet.
    name = '{{index .Options "com.docker.network.bridge.name"}}'
    command = ["docker", "network", "inspect", "bridge", "--format", name]
    interface = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return next(one.address for one in psutil.net_if_addrs()[interface] if one.family == socket.AF_INET)


def _write(file: Path, chosen: Mapping[str, str]) -> dict[str, str]:
    """Set ``chosen`` in an .env file; returns all that it sets."""
    present = file.read_text().splitlines() if file.exists() else []
    lines = [line for line in present if line.partition("=")[0] not in chosen]
    lines += [f"{name}={value}" for name, value in chosen.items()]
    file.write_text("\n".join(lines) + "\n")
    file.chmod(0o600)
    return dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))


class _Remote:
    """A compose stack where the workflow's driver expects the local one."""

    compose: Compose

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def up(self, extra_set: Path | None = None) -> StackState:
        return self.state()

    def state(self) -> StackState:
        here = Process.of(os.getpid())
        urls = {"airflow": self.compose.airflow, "mlflow": self.compose.mlflow}
        services = {name: Service(process=here, url=url, log=Path("-")) for name, url in urls.items()}
        return StackState(started=datetime.now(UTC), services=services, settings={})

    def check_dags(self, state: StackState) -> list[str]:
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
    """The containers that tasks of this stack have started, on whichever host, as the engine describes them."""
    command = ["docker", "ps", "--all", "--quiet", "--no-trunc", "--filter", "label=breakhis"]
    for each in filters:
        command += ["--filter", each]
    found = inspect(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    address = compose.environment["AIRFLOW_ADDRESS"]
    return [each for each in found if each["Config"]["Labels"]["breakhis.deployment"].split()[0] == address]


def inspect(ids: str) -> list[Json]:
    """What the engine knows of containers; of those that are gone meanwhile, nothing."""
    if not ids.split():
        return []
    command = ["docker", "inspect", *ids.split()]
    found: list[Json] = json.loads(subprocess.run(command, capture_output=True, text=True, check=False).stdout)
    return found
