"""Runs stages in containers, on a GPU where there is one: the place ``docker``.

A container outlives its worker. When a worker is killed, the retry finds the container by its id, which is kept in
Airflow's task state, or by its name; it shows the container's log from the beginning and waits for it to end. A task
never has two containers, since they would have the same name. Results are read from the store, never from the log, and
are never unpickled.
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
from breakhis_airflow.environment import select_container_environment
from breakhis_airflow.operators import Job, JobEnd, StageOperator
from ml.core.airflow_api import AirflowApi
from ml.core.errors import AirflowError, BreakhisError
from ml.core.hashes import digest
from ml.core.settings import Settings, read_settings

LABEL = "breakhis"
"""What the labels of our containers begin with."""

_SCRATCH = "/scratch"
"""The only folder that a container may write to. It is in the image, and its user owns it."""
_SECONDS_BETWEEN_LOOKS = 1.0
_SECONDS_TO_STOP = 10
_EXIT_KILLED = 128 + 9
_ACTIVE_STATES = frozenset({"running", "restarting", "paused"})
_FINAL_STATES = frozenset({"success", "failed", "skipped", "upstream_failed", "removed"})


class DockerStageOperator(ResumableJobMixin, StageOperator, DockerOperator):
    """Runs a stage in a container of the trainer's image. The settings BREAKHIS_DOCKER_* say what it may use.

    The container has a read-only root file system and no capabilities, cannot gain privileges, and writes to a scratch
    volume that is removed with it. Its environment is made when the task runs, and is passed to the engine alone.
    """

    _container: str | None = None
    _is_stopped = False
    _ended: JobEnd | None = None

    def __init__(self, **kwargs: Any) -> None:
        settings = read_settings()
        super().__init__(
            image=settings.docker_image,
            docker_url=settings.docker_url or None,
            docker_conn_id=settings.docker_connection or None,
            network_mode=settings.docker_network or None,
            mount_tmp_dir=False,
            **kwargs,
        )

    # --- one job ------------------------------------------------------------------------------------------------

    def run_stage(self, job: Job, output: Callable[[str], None]) -> JobEnd:
        """Runs a job in a container, or waits for the one that an earlier try has left running; see the base class."""
        self._job, self._output = job, output
        try:
            ended: JobEnd = self.execute_resumable(job.context)
        except DockerException as error:
            raise AirflowException(f"breakhis {self.stage}: the Docker engine at {self.docker_url}: {error}") from error
        return ended

    def submit_job(self, context: Context) -> str:
        """Starts the container and returns its id; if one of this task still runs, that one's."""
        existing = self._find_container(self._container_name(context))
        if existing and self.is_job_active(existing["State"]["Status"]):
            self.log.info("Container %s of an earlier try still runs", existing["Id"][:12])
            self._watch(str(existing["Id"]))
            return str(existing["Id"])
        if existing:
            self._remove_container(existing["Id"])
        self._remove_orphans()
        self._ensure_image()
        container = self._create_container(context)
        try:
            self.cli.start(container)
        except APIError as error:
            self._remove_container(container)
            if "device driver" in str(error):
                raise AirflowFailException(
                    f"breakhis {self.stage} asks for a GPU (BREAKHIS_DOCKER_GPUS={read_settings().docker_gpus}) and "
                    f"the Docker engine at {self.docker_url} offers none: install nvidia-container-toolkit there, or "
                    "set BREAKHIS_DOCKER_GPUS=0 to train on the CPU"
                ) from None
            raise
        self._watch(container)
        self.log.info("Started container %s from %s", container[:12], self.image)
        return container

    def get_job_status(self, external_id: Any, context: Context) -> str:  # noqa: ARG002
        """Returns ``missing``, a state of the engine's such as ``running``, or ``exited:`` with the exit status."""
        container = self._find_container(str(external_id))
        if not container:
            return "missing"
        state = container["State"]
        return state["Status"] if state["Status"] in _ACTIVE_STATES else f"exited:{state['ExitCode']}"

    def is_job_active(self, status: str) -> bool:
        """Returns whether the container still runs."""
        return status in _ACTIVE_STATES

    def is_job_succeeded(self, status: str) -> bool:
        """Returns whether the container ended with status 0 while no task watched it."""
        return status == "exited:0"

    def poll_until_complete(self, external_id: Any, context: Context) -> JobEnd:
        """Passes on the container's log, from the beginning, until it has ended; returns how it ended.

        The log is asked for again and again rather than followed, since a proxy would cut an idle connection.
        """
        container, last = str(external_id), ""
        self._watch(container)
        while True:
            status = self.cli.inspect_container(container)["State"]["Status"]
            # The log is read after the state: if the container has ended, this is all of it.
            for moment, line in self._read_log_after(container, last):
                self._output(line)
                last = moment
            if status not in _ACTIVE_STATES:
                return self.get_job_result(container, context)
            time.sleep(_SECONDS_BETWEEN_LOOKS)

    def get_job_result(self, external_id: Any, context: Context) -> JobEnd:  # noqa: ARG002
        """Removes the container, whose result is in the store and whose log in the task's; returns how it ended."""
        if self._ended is None:
            container = str(external_id)
            described = self.cli.inspect_container(container)
            if self._container is None:  # the container ended before this try began
                for _, line in self._read_log_after(container, ""):
                    self._output(line)
            state = described["State"]
            self._ended = JobEnd(
                state["ExitCode"], described["Config"]["Labels"][f"{LABEL}.result"], *_explain_end(state)
            )
            self._remove_container(container)
            self._container = None
        return self._ended

    def _watch(self, container: str) -> None:
        """Makes a container the one that ``on_kill`` stops. Where that was called before, removes it and raises.

        Airflow's signal may come at any line, and the task goes on after ``on_kill``.
        """
        self._container = container
        if self._is_stopped:
            self._remove_container(container)
            raise AirflowException(f"breakhis {self.stage} was stopped before it could watch its container")

    def on_kill(self) -> None:
        """Stops and removes the container. Airflow calls this when the task is cleared, marked or stopped by hand."""
        self._is_stopped = True
        if self._container:
            self.log.warning("Stopping container %s of breakhis %s", self._container[:12], self.stage)
            self._remove_container(self._container)

    # --- containers ---------------------------------------------------------------------------------------------

    def _create_container(self, context: Context) -> str:
        settings, ti = read_settings(), context["ti"]
        devices = [DeviceRequest(count=settings.docker_gpus, capabilities=[["gpu"]])] if settings.docker_gpus else None
        host = self.cli.create_host_config(
            network_mode=self.network_mode,
            mounts=[
                Mount(_SCRATCH, None, type="volume"),
                *(_parse_mount(volume) for volume in settings.docker_volumes),
            ],
            tmpfs={"/tmp": "size=256m,mode=1777"},  # noqa: S108
            read_only=True,
            cap_drop=["ALL"],
            security_opt=["no-new-privileges"],
            pids_limit=4096,
            init=True,
            mem_limit=settings.docker_memory or None,
            memswap_limit=settings.docker_memory or None,  # no swap: a training that swaps takes forever
            nano_cpus=round(settings.docker_cpus * 1e9) or None,
            shm_size=settings.docker_shm,
            device_requests=devices,
            log_config=LogConfig(config={"max-size": "50m", "max-file": "2"}),
        )
        created = self.cli.create_container(
            image=self.image,
            name=self._container_name(context),
            command=self._job.command(settings.docker_store or settings.store),
            environment=self._environment(settings),
            host_config=host,
            labels={
                LABEL: self.stage,
                f"{LABEL}.deployment": _deployment_label(settings),
                f"{LABEL}.dag": ti.dag_id,
                f"{LABEL}.run": ti.run_id,
                f"{LABEL}.task": ti.task_id,
                f"{LABEL}.map": str(ti.map_index),
                f"{LABEL}.try": str(ti.try_number),
                f"{LABEL}.result": self._job.key,
            },
        )
        return str(created["Id"])

    def _environment(self, settings: Settings) -> dict[str, str]:
        environment = {
            **select_container_environment(self._job.environment),
            "HOME": _SCRATCH,
            "TMPDIR": _SCRATCH,
            "BREAKHIS_HOME": f"{_SCRATCH}/breakhis",
            "BREAKHIS_STORE": settings.docker_store or settings.store,
            "BREAKHIS_MLFLOW_URI": settings.docker_mlflow_uri or settings.mlflow_uri,
        }
        if settings.docker_gpus:
            environment["BREAKHIS_GPU_REQUIRED"] = "true"
        return environment

    def _container_name(self, context: Context) -> str:
        ti = context["ti"]
        key = [_deployment_label(read_settings()), ti.dag_id, ti.run_id, ti.task_id, ti.map_index]
        return f"{LABEL}-{digest(key)[:16]}"

    def _ensure_image(self) -> None:
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

    def _find_container(self, container: str) -> Mapping[str, Any] | None:
        try:
            described: Mapping[str, Any] = self.cli.inspect_container(container)
        except NotFound:
            return None
        return described

    def _remove_container(self, container: str) -> None:
        """Stops a container if it runs, and removes it with its scratch volume."""
        with suppress(NotFound):
            self.cli.stop(container, timeout=_SECONDS_TO_STOP)
            self.cli.remove_container(container, v=True, force=True)

    def _read_log_after(self, container: str, last: str) -> Iterator[tuple[str, str]]:
        """Yields lines after the time ``last``, each with its time: RFC 3339 to the nanosecond, sortable as text."""
        since = datetime.fromisoformat(last[:26].rstrip("Z") + "+00:00").timestamp() if last else None
        output = self.cli.logs(container, stdout=True, stderr=True, timestamps=True, since=since)
        for line in output.decode("utf-8", "replace").splitlines():
            moment, _, text = line.partition(" ")
            if moment > last:
                yield moment, text.rstrip("\r")

    def _remove_orphans(self) -> None:
        """Removes containers whose tasks run no more: cleared, or failed by hand, while their worker was gone."""
        filters = {"label": [LABEL, f"{LABEL}.deployment={_deployment_label(read_settings())}"]}
        others = self.cli.containers(all=True, filters=filters)
        if not others:
            return
        try:
            environment = read_connection(AIRFLOW, self.stage).environment
            # Workers on other hosts than the API server's may have to call it by another name.
            url = read_settings().airflow_url or environment["BREAKHIS_AIRFLOW_URL"]
            api = AirflowApi(url, environment["BREAKHIS_AIRFLOW_USER"], environment["BREAKHIS_AIRFLOW_PASSWORD"])
            for container in others:
                if not _is_awaited(container["Labels"], api):
                    self.log.warning("Removing container %s, which no task waits for", container["Id"][:12])
                    self._remove_container(container["Id"])
        except (AirflowException, BreakhisError, KeyError) as error:
            self.log.warning("Containers whose tasks run no more were not looked for: %s", error)


def _is_awaited(labels: Mapping[str, str], api: AirflowApi) -> bool:
    try:
        tasks = api.task_instances(labels[f"{LABEL}.dag"], labels[f"{LABEL}.run"])
    except AirflowError as error:
        if error.status != 404:
            raise
        return False
    instance = (labels[f"{LABEL}.task"], labels[f"{LABEL}.map"])
    return any(
        (task["task_id"], str(task["map_index"])) == instance and task["state"] not in _FINAL_STATES for task in tasks
    )


def _deployment_label(settings: Settings) -> str:
    """Returns a label by which the containers of two Airflows on one engine differ."""
    return f"{conf.get('api', 'base_url', fallback='')} {settings.docker_network}".strip()


def _parse_mount(volume: str) -> Mount:
    """Returns the mount written as ``name:/path`` or ``/path/on/the/engine:/path``, with ``:ro`` to read only."""
    source, target, *mode = volume.split(":")
    return Mount(target, source, type="bind" if source.startswith("/") else "volume", read_only=mode == ["ro"])


def _explain_end(state: Mapping[str, Any]) -> tuple[str, bool]:
    """Returns what the engine knows of a container's failure, and whether trying again is useless."""
    if state.get("OOMKilled"):
        limit = read_settings().docker_memory or "all of the machine"
        return (
            f"ran out of memory, of which it may use {limit}: raise BREAKHIS_DOCKER_MEMORY or lower the batch size",
            True,
        )
    if state["ExitCode"] == _EXIT_KILLED:
        return "was killed: somebody or something stopped its container", False
    return str(state.get("Error") or ""), False
