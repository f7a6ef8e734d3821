"""A stage of the ``breakhis`` command as an Airflow task, whatever the place at which it runs.

``StageOperator`` builds the command, the environment and the secrets, and turns the outcome into what Airflow needs.
Each place (:mod:`breakhis_airflow.places`) is a subclass that starts the command and passes its output on.
"""

import json
import os
import re
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from airflow.sdk import Asset, AssetAlias, BaseOperator, Context
from airflow.sdk.exceptions import AirflowException, AirflowFailException

from breakhis_airflow.addresses import build_airflow_url
from breakhis_airflow.connections import read_connections
from breakhis_airflow.environment import select_stage_environment
from breakhis_airflow.failures import FINAL_STATUSES, explained_failures
from breakhis_airflow.links import STAGE_LINKS
from breakhis_airflow.notifications import notify_of_failure
from breakhis_airflow.run_conf import refuse_unknown_conf
from ml.core.messages import cut_text, quote_value
from ml.core.settings import read_settings

DEFAULT_ARGS: dict[str, Any] = {
    "owner": "breakhis",
    "retries": 2,
    "retry_delay": timedelta(minutes=1),
    "retry_exponential_backoff": 2.0,
    "max_retry_delay": timedelta(minutes=15),
    "on_failure_callback": notify_of_failure,
    "pre_execute": refuse_unknown_conf,
}
"""Arguments of every DAG. Retries are for lost networks and lost machines; errors that would recur are not retried."""

_MAX_ARGUMENT = 100_000
"""Bytes of one argument. Linux takes 131,072 at most."""


@dataclass(frozen=True)
class Job:
    """One try of a stage, for a place to run."""

    arguments: list[str]
    """The stage, and its options if ``operands`` has the rest."""
    operands: list[str]
    """What follows the options on the command line, with ``--`` first: none of it can be taken for an option."""
    key: str
    """Key in the store under which the stage writes its result."""
    environment: dict[str, str]
    """The stage's whole environment."""
    context: Context

    def command(self, store: str) -> list[str]:
        """Returns the command line, for a place that reaches the store at this address."""
        return ["breakhis", *self.arguments, "--json", "--result", f"{store}/{self.key}", *self.operands]


@dataclass(frozen=True)
class JobEnd:
    """How a job ended."""

    status: int
    """The exit status; for a command that was killed, the signal's number with a minus sign."""
    key: str
    """Key of its result in the store, if it wrote one; an earlier try's, if its container was taken up again."""
    reason: str = ""
    """What the place knows of a failure that the stage could not report itself."""
    is_final: bool = False
    """Whether a retry cannot help."""


class StageOperator(BaseOperator):
    """Runs a stage and returns its JSON result, which becomes the task's XCom.

    A stage that refuses (bad input, failed validation, blocked gates) fails the task without a retry, with the stage's
    own message; if it wrote a result all the same, that is the XCom. Any other failure may be retried.

    :param stage: The stage: a command of ``breakhis``, such as ``fetch``.
    :param arguments: What follows it on the command line. Values that are no options' own stand behind ``--``, since a
        name that comes with a run's conf or another task's result may begin with a dash. (templated)
    :param outlet_asset: The asset of which this stage may make a new version. Only where the result says ``changed``,
        an event of it is emitted, with the result as its extra.
    :param connections: Airflow connections that this stage is given besides those in BREAKHIS_CONNECTIONS, which they
        override. They are fetched when the task runs; :mod:`breakhis_airflow.connections` turns them into variables.
    """

    template_fields: Sequence[str] = ("arguments",)
    ui_color = "#dbe7f5"

    stage_result: dict[str, Any] | None = None
    """The stage's result, once it has run here. The links on the task are made of it."""

    def __init__(
        self,
        *,
        stage: str,
        arguments: Sequence[str] = (),
        connections: Sequence[str] = (),
        outlet_asset: Asset | None = None,
        **kwargs: Any,
    ) -> None:
        # An alias is used, since an asset as an outlet has an event whenever its task succeeds.
        super().__init__(**kwargs, **({"outlets": [_new_version_alias(outlet_asset)]} if outlet_asset else {}))
        self.outlet_asset = outlet_asset
        if not re.fullmatch(r"[a-z][a-z-]*", stage):
            raise ValueError(f"stage must be a command of breakhis such as 'fetch', not {stage!r}")
        if isinstance(arguments, str) or not all(isinstance(argument, str) for argument in arguments):
            raise ValueError(f"arguments of stage {stage} must be a list of strings, not {arguments!r}")
        self.stage = stage
        self.arguments = list(arguments)
        # Found before the values are filled in, any of which may be a dash or two.
        self.operands_at = self.arguments.index("--") if "--" in self.arguments else len(self.arguments)
        self.connections = tuple(connections)
        self.operator_extra_links = STAGE_LINKS.get(stage, ())

    def value(self, key: str) -> str:
        """Returns a template of one value of this task's result, for the arguments of later tasks."""
        return f"{{{{ ti.xcom_pull(task_ids={self.task_id!r})[{key!r}] }}}}"

    def execute(self, context: Context) -> dict[str, Any]:
        """Runs the stage and returns its result.

        Raises:
            AirflowFailException: the stage refused, or was called wrongly; a retry cannot help.
            AirflowException: it was killed, crashed, or asks for a retry.
        """
        from ml.core.store import Store

        ti = context["ti"]
        # The task instance's id keeps results apart where run ids recur: an old store under a new Airflow database.
        key = f"jobs/{ti.dag_id}/{ti.run_id}/{ti.task_id}/{ti.try_number}-{ti.id}.json"
        variables, secrets = read_connections([*read_settings().connections, *self.connections], self.stage)
        output = _OutputLogger(self.log, hidden=secrets)
        origin = {"BREAKHIS_DAG": ti.dag_id, "BREAKHIS_DAG_RUN": ti.run_id, "BREAKHIS_AIRFLOW_UI": _find_own_address()}
        for argument in self.arguments:
            _check_argument(argument, self.stage)
        options, operands = self.arguments[: self.operands_at], self.arguments[self.operands_at :]
        environment = {**select_stage_environment(os.environ), **origin, **variables}
        job = Job([self.stage, *options], operands, key, environment, context)
        self.log.info("Running: %s", " ".join(job.command(read_settings().store)))
        with explained_failures(f"breakhis {self.stage}"):
            ended = self.run_stage(job, output)
            result, _ = Store(read_settings().store, {**os.environ, **variables}).read(ended.key)
            self.stage_result = result if isinstance(result, dict) else None
        for link in self.operator_extra_links:
            if address := link.get_link(self, ti_key=ti):
                self.log.info("%s: %s", link.name, address)

        if ended.status == 0 and self.stage_result is not None:
            if self.outlet_asset and self.stage_result["changed"]:
                context["outlet_events"][_new_version_alias(self.outlet_asset)].add(
                    self.outlet_asset, extra=self.stage_result
                )
            return self.stage_result
        if self.stage_result is not None:
            ti.xcom_push(key="return_value", value=self.stage_result)
        problem = f"breakhis {self.stage}{_describe_problem(ended, output.error)}"
        is_final = ended.is_final or ended.status in FINAL_STATUSES
        raise AirflowFailException(problem) if is_final else AirflowException(problem)

    @abstractmethod
    def run_stage(self, job: Job, output: Callable[[str], None]) -> JobEnd:
        """Runs a job to its end; ``output`` is called with each line that it prints."""


def _find_own_address() -> str:
    """Returns Airflow's address as browsers have it, for links in what a stage writes; "" if only a path is set."""
    address = build_airflow_url("")
    return address if address.startswith(("http://", "https://")) else ""


def _check_argument(argument: str, stage: str) -> None:
    """Check that a value that was filled into a stage's arguments can stand on a command line.

    Raises:
        AirflowFailException: it is too long, or has a character that no command line holds.
    """
    try:
        is_possible = len(argument.encode()) <= _MAX_ARGUMENT and "\0" not in argument
    except UnicodeEncodeError:  # half a character
        is_possible = False
    if not is_possible:
        raise AirflowFailException(
            f"breakhis {stage} cannot be called with {quote_value(argument)}: it has over {_MAX_ARGUMENT:,} bytes, "
            "a null character or half a character; start a new run with another value"
        )


def _new_version_alias(asset: Asset) -> AssetAlias:
    # Airflow keeps the alias under this name.
    return AssetAlias(f"{asset.name}_news")


# --- a stage's output -------------------------------------------------------------------------------------------------


_ERROR, _WARNING = "error: ", "warning: "
"""What the stages' own errors and warnings begin with; click's about how a stage is called have a capital."""


class _OutputLogger:
    """Passes a stage's lines on to the task's log, errors and warnings as such, and keeps its last error.

    The result is the task's XCom; the log has a short line of it instead of its JSON. Secrets are masked. Airflow does
    so in the task's log, but not where the supervisor repeats that log in the output of the scheduler or worker.
    """

    def __init__(self, log: Any, hidden: Sequence[str]) -> None:
        self.error = ""
        self._log = log
        self._hidden = [secret for secret in hidden if secret]

    def __call__(self, line: str) -> None:
        for secret in self._hidden:
            line = line.replace(secret, "***")
        line = _shorten_result(line)
        start = line.lower()
        if start.startswith(_ERROR):
            self._log.error("%s", line)
            self.error = line[len(_ERROR) :]
        elif start.startswith(_WARNING):
            self._log.warning("%s", line)
        else:
            self._log.info("%s", line)


def _shorten_result(line: str) -> str:
    """Returns the values of a result that was printed as JSON that a line has room for, and any other line as it is."""
    if not line.startswith("{"):
        return line
    try:
        result = json.loads(line)
    except (ValueError, RecursionError):
        return line
    shown = (f"{key} {value}" for key, value in result.items() if isinstance(value, str | int | float) and value != "")
    return f"result: {cut_text(', '.join(shown))}"


def _describe_problem(ended: JobEnd, error: str) -> str:
    if error and not ended.is_final:
        return f": {error}"
    if ended.reason:
        return f" {ended.reason}"
    if ended.status == 0:
        return " ended well but wrote no result"
    return f" ended with status {ended.status}; its last lines above say why"
