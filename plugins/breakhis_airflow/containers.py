"""The place ``docker``: a stage in a container, on a GPU where there is one.

A container outlives its worker. When a worker is killed, the retry finds the container by its id (kept in Airflow's
task state) or its name, shows its log from the beginning and waits for the same end. Two containers of one task cannot
be, since its name is taken. Results come from the store, never from the log and never unpickled.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from datetime import datetime
from typing import Any

from airflow.providers.docker.operators.docker import DockerOperator
from airflow.sdk import Context, ResumableJobMixin
from airflow.sdk.configuration import conf
from airflow.sdk.exceptions import AirflowException, AirflowFailException
from docker.errors import APIError, DockerException, ImageNotFound, NotFound
from docker.types import DeviceRequest, LogConfig, Mount

from breakhis_airflow.connections import AIRFLOW, read_connection
from breakhis_airflow.environment import container_environment
from breakhis_airflow.operators import Ended, Job, StageOperator
from ml.core.airflow_api import AirflowApi
from ml.core.errors import AirflowError, BreakhisError
from ml.core.settings import Settings, read_settings
from ml.core.store import digest

LABEL = "breakhis"
"""Labels of our containers begin with it."""

_SCRATCH = "/scratch"
"""The one place a container may write to: the image has this folder, owned by its user."""
_SECONDS_BETWEEN_LOOKS = 1.0
_SECONDS_TO_STOP = 10
_KILLED = 128 + 9
_ACTIVE = frozenset({"running", "restarting", "paused"})
_OVER = frozenset({"success", "failed", "skipped", "upstream_failed", "removed"})


class DockerStageOperator(ResumableJobMixin, StageOperator, DockerOperator):
    """Run a stage in a container of the trainer's image. What it may use is set by BREAKHIS_DOCKER_*.

    Its root file system is read-only, it has no capabilities and gains no privileges, and writes to a scratch volume
    that goes with it. Its environment is made when the task runs and passes to the engine alone.
    """

    _container: str | None = None
    _ended: Ended | None = None

    def __init__(self, **kwargs: Any) -> None:
        own = read_settings()
        super().__init__(
            image=own.docker_image,
            docker_url=own.docker_url or None,
            docker_conn_id=own.docker_connection or None,
            network_mode=own.docker_network or None,
            mount_tmp_dir=False,
            **kwargs,
        )

    # --- one job ------------------------------------------------------------------------------------------------

    def run_stage(self, job: Job, output: Callable[[str], None]) -> Ended:
        """Run a job in a container, or wait for the one that an earlier try has left running; see the base class."""
        self._job, self._output = job, output
        try:
            ended: Ended = self.execute_resumable(job.context)
        except DockerException as error:
            raise AirflowException(f"breakhis {self.stage}: the Docker engine at {self.docker_url}: {error}") from error
        return ended

    def submit_job(self, context: Context) -> str:
        """Start the container; returns its id. One of this task that still runs is taken up instead."""
        left = self._find(self._name(context))
        if left and self.is_job_active(left["State"]["Status"]):
            self.log.info("Container %s of an earlier try still runs", left["Id"][:12])
            return str(left["Id"])
        if left:
            self._remove(left["Id"])
        self._reap()
        self._have_image()
        container = self._create(context)
        try:
            self.cli.start(container)
        except APIError as error:
            self._remove(container)
            if "device driver" in str(error):
                raise AirflowFailException(
                    f"breakhis {self.stage} asks for a GPU (BREAKHIS_DOCKER_GPUS={read_settings().docker_gpus}) and "
                    "the "
                    f"Docker engine at {self.docker_url} offers none: install nvidia-container-toolkit there, or set "
                    "BREAKHIS_DOCKER_GPUS=0 to train on the CPU"
                ) from None
            raise
        self.log.info("Started container %s from %s", container[:12], self.image)
        return container

    def get_job_status(self, external_id: Any, context: Context) -> str:  # noqa: ARG002
        """``missing``, a state of the engine's such as ``running``, or ``exited:`` with the exit status."""
        found = self._find(str(external_id))
        if not found:
            return "missing"
        state = found["State"]
        return state["Status"] if state["Status"] in _ACTIVE else f"exited:{state['ExitCode']}"

    def is_job_active(self, status: str) -> bool:
        """Whether the container still runs."""
        return status in _ACTIVE

    def is_job_succeeded(self, status: str) -> bool:
        """Whether it ended well while nobody looked."""
        return status == "exited:0"

    def poll_until_complete(self, external_id: Any, context: Context) -> Ended:
        """Pass on what the container says until it has ended; returns how. Its log shows from the beginning.

        Asked for again and again rather than followed: a proxy would cut a connection on which nothing passes.
        """
        container = self._container = str(external_id)
        last = ""
        while True:
            status = self.cli.inspect_container(container)["State"]["Status"]
            # The log after the state: once that says ended, this is all of it.
            for moment, line in self._log_after(container, last):
                self._output(line)
                last = moment
            if status not in _ACTIVE:
                return self.get_job_result(container, context)
            time.sleep(_SECONDS_BETWEEN_LOOKS)

    def get_job_result(self, external_id: Any, context: Context) -> Ended:  # noqa: ARG002
        """How the container ended. It is removed: what it made lies in the store, what it said in the task's log."""
        if self._ended is None:
            container = str(external_id)
            found = self.cli.inspect_container(container)
            if self._container is None:  # ended before this try began
                for _, line in self._log_after(container, ""):
                    self._output(line)
            state = found["State"]
            self._ended = Ended(state["ExitCode"], found["Config"]["Labels"][f"{LABEL}.result"], *_explain(state))
            self._remove(container)
            self._container = None
        return self._ended

    def on_kill(self) -> None:
        """Stop and remove the container. Airflow calls this when the task is cleared, marked or stopped by hand."""
        if self._container:
            self.log.warning("Stopping container %s of breakhis %s", self._container[:12], self.stage)
            self._remove(self._container)

    # --- containers ---------------------------------------------------------------------------------------------

    def _create(self, context: Context) -> str:
        own, ti = read_settings(), context["ti"]
        devices = [DeviceRequest(count=own.docker_gpus, capabilities=[["gpu"]])] if own.docker_gpus else None
        host = self.cli.create_host_config(
            network_mode=self.network_mode,
            mounts=[Mount(_SCRATCH, None, type="volume"), *(_mount(volume) for volume in own.docker_volumes)],
            tmpfs={"/tmp": "size=256m,mode=1777"},  # noqa: S108
            read_only=True,
            cap_drop=["ALL"],
            security_opt=["no-new-privileges"],
            pids_limit=4096,
            init=True,
            mem_limit=own.docker_memory or None,
            memswap_limit=own.docker_memory or None,  # no swap beyond it: a training that swaps never ends
            nano_cpus=round(own.docker_cpus * 1e9) or None,
            shm_size=own.docker_shm,
            device_requests=devices,
            log_config=LogConfig(config={"max-size": "50m", "max-file": "2"}),
        )
        created = self.cli.create_container(
            image=self.image,
            name=self._name(context),
            command=self._job.command(own.docker_store or own.store),
            environment=self._environment(own),
            host_config=host,
            labels={
                LABEL: self.stage,
                f"{LABEL}.deployment": _deployment(own),
                f"{LABEL}.dag": ti.dag_id,
                f"{LABEL}.run": ti.run_id,
                f"{LABEL}.task": ti.task_id,
                f"{LABEL}.map": str(ti.map_index),
                f"{LABEL}.try": str(ti.try_number),
                f"{LABEL}.result": self._job.key,
            },
        )
        return str(created["Id"])

    def _environment(self, own: Settings) -> dict[str, str]:
        environment = {
            **container_environment(self._job.environment),
            "HOME": _SCRATCH,
            "TMPDIR": _SCRATCH,
            "BREAKHIS_HOME": f"{_SCRATCH}/breakhis",
            "BREAKHIS_STORE": own.docker_store or own.store,
            "BREAKHIS_MLFLOW_URI": own.docker_mlflow_uri or own.mlflow_uri,
        }
        if own.docker_gpus:
            environment["BREAKHIS_GPU_REQUIRED"] = "true"
        return environment

    def _name(self, context: Context) -> str:
        ti = context["ti"]
        return f"{LABEL}-{digest([_deployment(read_settings()), ti.dag_id, ti.run_id, ti.task_id, ti.map_index])[:16]}"

    def _have_image(self) -> None:
        try:
            self.cli.inspect_image(self.image)
        except ImageNotFound:
            self.log.info("Pulling %s", self.image)
            try:
                self.cli.pull(self.image)
            except DockerException as error:
                raise AirflowFailException(
                    f"breakhis {self.stage}: the Docker engine at {self.docker_url} has no image {self.image!r} "
                    f"(BREAKHIS_DOCKER_IMAGE) and cannot pull it: {error}. Build it there with docker/build.sh"
                ) from None

    def _find(self, container: str) -> Mapping[str, Any] | None:
        try:
            found: Mapping[str, Any] = self.cli.inspect_container(container)
        except NotFound:
            return None
        return found

    def _remove(self, container: str) -> None:
        """Stop it if it runs, and take it away with its scratch volume."""
        with suppress(NotFound):
            self.cli.stop(container, timeout=_SECONDS_TO_STOP)
            self.cli.remove_container(container, v=True, force=True)

    def _log_after(self, container: str, last: str) -> Iterator[tuple[str, str]]:
        """The lines since the moment ``last``, each with its own: RFC 3339 to the nanosecond, which sorts as text."""
        since = datetime.fromisoformat(last[:26].rstrip("Z") + "+00:00").timestamp() if last else None
        said = self.cli.logs(container, stdout=True, stderr=True, timestamps=True, since=since)
        for line in said.decode("utf-8", "replace").splitlines():
            moment, _, text = line.partition(" ")
            if moment > last:
                yield moment, text.rstrip("\r")

    def _reap(self) -> None:
        """Take away containers whose tasks run no more: cleared or failed by hand while their worker was gone."""
        filters = {"label": [LABEL, f"{LABEL}.deployment={_deployment(read_settings())}"]}
        others = self.cli.containers(all=True, filters=filters)
        if not others:
            return
        try:
            given = read_connection(AIRFLOW, self.stage).environment
            # Workers on other hosts than the API server's may have to call it by another name.
            url = read_settings().airflow_url or given["BREAKHIS_AIRFLOW_URL"]
            api = AirflowApi(url, given["BREAKHIS_AIRFLOW_USER"], given["BREAKHIS_AIRFLOW_PASSWORD"])
            for container in others:
                if not _is_awaited(container["Labels"], api):
                    self.log.warning("Removing container %s, which no task waits for", container["Id"][:12])
                    self._remove(container["Id"])
        except (AirflowException, BreakhisError, KeyError) as error:
            self.log.warning("Containers that nobody waits for were not looked for: %s", error)


def _is_awaited(labels: Mapping[str, str], api: AirflowApi) -> bool:
    try:
        tasks = api.task_instances(labels[f"{LABEL}.dag"], labels[f"{LABEL}.run"])
    except AirflowError as error:
        if error.status != 404:
            raise
        return False
    of = (labels[f"{LABEL}.task"], labels[f"{LABEL}.map"])
    return any((task["task_id"], str(task["map_index"])) == of and task["state"] not in _OVER for task in tasks)


def _deployment(own: Settings) -> str:
    """Tells the containers of two Airflows on one engine apart."""
    return f"{conf.get('api', 'base_url', fallback='')} {own.docker_network}".strip()


def _mount(volume: str) -> Mount:
    """A mount written as ``name:/path`` or ``/path/on/the/engine:/path``, with ``:ro`` for reading only."""
    source, target, *mode = volume.split(":")
    return Mount(target, source, type="bind" if source.startswith("/") else "volume", read_only=mode == ["ro"])


def _explain(state: Mapping[str, Any]) -> tuple[str, bool]:
    """What the engine knows of a container's end, and whether trying again is no use."""
    if state.get("OOMKilled"):
        limit = read_settings().docker_memory or "all of the machine"
        return (
            f"ran out of memory, of which it may use {limit}: raise BREAKHIS_DOCKER_MEMORY or lower the batch size",
            True,
        )
    if state["ExitCode"] == _KILLED:
        return "was killed: somebody or something stopped its container", False
    return str(state.get("Error") or ""), False
