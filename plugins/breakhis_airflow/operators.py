"""A stage of the ``breakhis`` command as an Airflow task: *what* runs, and apart from that *where* it runs.

``StageOperator`` builds the command, the environment and the secrets, and makes of the outcome what Airflow needs. Each
place it can run at (:mod:`breakhis_airflow.places`) is a subclass that starts the command and passes its output on.
"""

import os
import re
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from airflow.sdk import Asset, AssetAlias, BaseOperator, Context
from airflow.sdk.exceptions import AirflowException, AirflowFailException
from airflow.sdk.log import mask_secret

from breakhis_airflow.connections import read_connection
from breakhis_airflow.environment import stage_environment
from breakhis_airflow.links import LINKS
from breakhis_airflow.notifications import tell_of_failure
from ml.core.errors import EXIT_BAD_INPUT, EXIT_REFUSED
from ml.core.settings import read_settings

DEFAULT_ARGS: dict[str, Any] = {
    "owner": "breakhis",
    "retries": 2,
    "retry_delay": timedelta(minutes=1),
    "retry_exponential_backoff": 2.0,
    "max_retry_delay": timedelta(minutes=15),
    "on_failure_callback": tell_of_failure,
}
"""For every DAG. Retries are for lost networks and lost machines: what cannot get better by itself is never retried."""

_EXIT_USAGE = 2
_NO_RETRY = frozenset({_EXIT_USAGE, EXIT_BAD_INPUT, EXIT_REFUSED})


@dataclass(frozen=True)
class Job:
    """One try at a stage: what a place has to run."""

    arguments: list[str]
    """The stage and its arguments."""
    key: str
    """Where in the store the result goes."""
    environment: dict[str, str]
    """All of the stage's environment."""
    context: Context

    def command(self, store: str) -> list[str]:
        """The command line, for a place that sees the store at this address."""
        return ["breakhis", *self.arguments, "--json", "--result", f"{store}/{self.key}"]


@dataclass(frozen=True)
class Ended:
    """How a job ended."""

    status: int
    """The exit status; of a command that was killed, the signal's number with a minus sign."""
    key: str
    """Where its result lies, if it wrote one: that of an earlier try, where that was taken up again."""
    why: str = ""
    """What the place knows of a failure that the stage itself could not say."""
    final: bool = False
    """Whether trying again cannot help."""


class StageOperator(BaseOperator):
    """Run one stage and return its JSON result, which becomes the task's XCom.

    A stage that says no (bad input, failed validation, blocked gates) fails the task without a retry, with the stage's
    own words; if it wrote a result all the same, that is the XCom. Everything else that goes wrong may be retried.

    :param stage: The stage: a command of ``breakhis``, such as ``fetch``.
    :param arguments: What follows it on the command line. (templated)
    :param news: What this stage may make a new version of. An event of it is emitted, with the result as its extra,
        where the result says ``changed``, and none where it does not: what runs on that event has nothing to do then.
    :param connections: Airflow connections that this stage is given besides those in BREAKHIS_CONNECTIONS. They are
        fetched when the task runs, and what two of them say of the same thing is said by these;
        :mod:`breakhis_airflow.connections` says what the stage finds of each.
    """

    template_fields: Sequence[str] = ("arguments",)
    ui_color = "#dbe7f5"

    stage_result: dict[str, Any] | None = None
    """What the stage answered, once it has run here; the links on the task are made of it."""

    def __init__(
        self,
        *,
        stage: str,
        arguments: Sequence[str] = (),
        connections: Sequence[str] = (),
        news: Asset | None = None,
        **kwargs: Any,
    ) -> None:
        # By an alias: an asset as an outlet has an event whenever its task succeeds.
        super().__init__(**kwargs, **({"outlets": [_alias(news)]} if news else {}))
        self.news = news
        if not re.fullmatch(r"[a-z][a-z-]*", stage):
            raise ValueError(f"stage must be a command of breakhis such as 'fetch', not {stage!r}")
        if isinstance(arguments, str) or not all(isinstance(argument, str) for argument in arguments):
            raise ValueError(f"arguments of stage {stage} must be a list of strings, not {arguments!r}")
        self.stage = stage
        self.arguments = list(arguments)
        self.connections = tuple(connections)
        self.operator_extra_links = LINKS.get(stage, ())

    def value(self, key: str) -> str:
        """A template of one value of this task's result, for the arguments of later tasks."""
        return f"{{{{ ti.xcom_pull(task_ids={self.task_id!r})[{key!r}] }}}}"

    def execute(self, context: Context) -> dict[str, Any]:
        """Run the stage; returns its result.

        Raises:
            AirflowFailException: the stage refused, or was called wrongly; trying again cannot help.
            AirflowException: it was killed, crashed, or asks to be tried again.
        """
        from ml.core.store import Store

        ti = context["ti"]
        # With the instance's own id: run ids come back (an old store under a new Airflow database), results must not.
        key = f"jobs/{ti.dag_id}/{ti.run_id}/{ti.task_id}/{ti.try_number}-{ti.id}.json"
        secrets, given = self._connect()
        output = _Output(self.log, hidden=secrets)
        origin = {"BREAKHIS_DAG": ti.dag_id, "BREAKHIS_DAG_RUN": ti.run_id}
        job = Job([self.stage, *self.arguments], key, {**stage_environment(os.environ), **origin, **given}, context)
        self.log.info("Running: %s", " ".join(job.command(read_settings().store)))
        ended = self.run_stage(job, output)
        self.stage_result, _ = Store(read_settings().store, {**os.environ, **given}).read(ended.key)
        for link in self.operator_extra_links:
            if address := link.get_link(self, ti_key=ti):
                self.log.info("%s: %s", link.name, address)

        if ended.status == 0 and self.stage_result is not None:
            if self.news and self.stage_result["changed"]:
                context["outlet_events"][_alias(self.news)].add(self.news, extra=self.stage_result)
            return self.stage_result
        if self.stage_result is not None:
            ti.xcom_push(key="return_value", value=self.stage_result)
        problem = f"breakhis {self.stage}{_problem(ended, output.error)}"
        final = ended.final or ended.status in _NO_RETRY
        raise AirflowFailException(problem) if final else AirflowException(problem)

    @abstractmethod
    def run_stage(self, job: Job, output: Callable[[str], None]) -> Ended:
        """Run a job to its end; ``output`` is called with each line that it prints."""

    def _connect(self) -> tuple[list[str], dict[str, str]]:
        """The secrets in this stage's connections, and the environment made of them."""
        secrets: list[str] = []
        given: dict[str, str] = {}
        for connection_id in dict.fromkeys([*read_settings().connections, *self.connections]):
            found = read_connection(connection_id, self.stage)
            for secret in found.secrets:
                mask_secret(secret)
            secrets += found.secrets
            given |= found.environment
        return secrets, given


def _alias(news: Asset) -> AssetAlias:
    return AssetAlias(f"{news.name}_news")


# --- what a stage says ------------------------------------------------------------------------------------------------


class _Output:
    """Passes a stage's lines on to the task's log, and keeps its last error.

    Secrets are struck out here. Airflow masks them in the task's log, but not where the supervisor repeats that log on
    the scheduler's or worker's own output.
    """

    def __init__(self, log: Any, hidden: Sequence[str]) -> None:
        self.error = ""
        self._log = log
        self._hidden = [secret for secret in hidden if secret]

    def __call__(self, line: str) -> None:
        for secret in self._hidden:
            line = line.replace(secret, "***")
        self._log.info("%s", line)
        if line.lower().startswith("error: "):  # the stages' own errors, and click's about how they are called
            self.error = line[len("error: ") :]


def _problem(ended: Ended, error: str) -> str:
    if error and not ended.final:
        return f": {error}"
    if ended.why:
        return f" {ended.why}"
    if ended.status == 0:
        return " ended well but wrote no result"
    return f" ended with status {ended.status}; its last lines above say why"
