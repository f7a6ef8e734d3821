"""Tells people of failures and of reviews, by Airflow's notifiers, as ``notifications.yaml`` beside the sources says.

The callback of failures is the tasks' and not the DAGs': Airflow calls that where the task ran, once, after the last
retry, with the exception. A DAG's is called by the DAG processor, which knows neither the error nor the result. Tasks
behind the one that failed do not run and are not told of: a run in which one task fails sends one message.
"""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from html import escape
from importlib import import_module
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from breakhis_airflow.links import LINKS
from ml.core.errors import ConfigError
from ml.core.settings import read_settings
from ml.core.yaml_files import YamlModel, read_yaml

log = logging.getLogger(__name__)

_SECRET = re.compile(r"passw|secret|token|api[_-]?key|authorization|credential", re.IGNORECASE)
_PASSWORD_IN_ADDRESS = re.compile(r"://[^/@\s]*:[^/@\s]+@")


class Notification(YamlModel):
    """One notifier, and what it is told to send."""

    notifier: str = Field(description="A notifier's import path: of Airflow's providers, or one of your own.")
    arguments: dict[str, Any] = Field(
        default_factory=dict, description="Its arguments; Airflow fills in templates where the notifier has them."
    )

    @field_validator("arguments", mode="after")
    @classmethod
    def _no_secrets(cls, value: dict[str, Any]) -> dict[str, Any]:
        for key, text in _leaves(value):
            if _SECRET.search(key) or _PASSWORD_IN_ADDRESS.search(text):
                raise ValueError(
                    f"{key!r} is, or holds, a secret; put that into an Airflow connection and name it (…_conn_id)"
                )
        return value


class Notifications(YamlModel):
    """What may stand in notifications.yaml."""

    on_failure: tuple[Notification, ...] = Field((), description="Who is told when a task has failed for good.")
    on_review: tuple[Notification, ...] = Field(
        (), description="Who is told when a review waits, and again when half of its time has passed."
    )

    def __iter__(self) -> Iterator[tuple[str, Notification]]:  # type: ignore[override]
        """Every notifier, with where it stands."""
        for field in self.__class__.model_fields:
            for number, notification in enumerate(getattr(self, field)):
                yield f"{field}.{number}", notification


@dataclass(frozen=True)
class Failure:
    """A task that failed for good; templates find it as ``failure``."""

    dag: str
    run: str
    task: str
    error: str
    """What the stage itself said was wrong."""
    log_url: str
    links: tuple[tuple[str, str], ...]
    """Name and address of what shows more: Data Docs, quarantine, model version."""

    @property
    def subject(self) -> str:
        """One line."""
        return f"{self.dag}: {self.task} failed"

    @property
    def text(self) -> str:
        """The whole message, as plain text."""
        lines = [f"{self.subject} in the run {self.run}", "", self.error, ""]
        return "\n".join([*lines, *(f"{name}: {address}" for name, address in self._addresses())])

    @property
    def html(self) -> str:
        """The whole message, as HTML; what came with the data is escaped."""
        links = "".join(
            f'<li><a href="{escape(address)}">{escape(name)}</a></li>' for name, address in self._addresses()
        )
        return (
            f"<p><b>{escape(self.subject)}</b> in the run {escape(self.run)}</p>"
            f'<pre style="white-space: pre-wrap">{escape(self.error)}</pre><ul>{links}</ul>'
        )

    def _addresses(self) -> list[tuple[str, str]]:
        return [("Log", self.log_url), *self.links]


@dataclass(frozen=True)
class Review:
    """A review that waits; templates find it as ``review``."""

    question: str
    form: str
    """Address of the answer form."""
    page: str
    """Address of the review page, or empty."""
    hours_left: float
    """Until it counts as rejected."""
    reminder: bool = False

    @property
    def subject(self) -> str:
        """One line."""
        return f"{'Reminder: ' if self.reminder else ''}{self.question}"

    @property
    def text(self) -> str:
        """The whole message, as plain text."""
        lines = [self.question, "", f"Without an answer within {self.hours_left:.0f} hours it is rejected.", ""]
        return "\n".join([*lines, *(f"{name}: {address}" for name, address in self._addresses())])

    @property
    def html(self) -> str:
        """The whole message, as HTML."""
        links = "".join(f'<li><a href="{escape(address)}">{name}</a></li>' for name, address in self._addresses())
        left = f"Without an answer within {self.hours_left:.0f} hours it is rejected."
        return f"<p><b>{escape(self.question)}</b></p><p>{left}</p><ul>{links}</ul>"

    def _addresses(self) -> list[tuple[str, str]]:
        return [*([("Evidence", self.page)] if self.page else []), ("Answer", self.form)]


def notification_files(conf: Path) -> list[Path]:
    """The file, if it is there and says anything, be it wrong."""
    file = conf / "notifications.yaml"
    try:
        return [file] if list(_read(file)) else []
    except ConfigError:
        return [file]


def read_notifications(file: Path) -> Notifications:
    """Read the file and make each of its notifiers once, to see that all is well.

    Raises:
        ConfigError: the file does not fit, or what it names is no notifier or does not take its arguments; says which.
    """
    wanted = _read(file)
    for where, notification in wanted:
        try:
            notifier = _make(notification)
            environment = notifier.get_template_env()
            for field in notifier.template_fields:
                for _, text in _leaves({field: getattr(notifier, field)}):
                    environment.from_string(text)
        except Exception as error:  # whatever somebody else's constructor finds
            named = f"{where}: {notification.notifier}"
            raise ConfigError(f"{file}: {named}: {' '.join(str(error).split()) or type(error).__name__}") from error
    return wanted


def tell(wanted: Sequence[Notification], context: Mapping[str, Any], **message: Failure | Review) -> list[Exception]:
    """Send a message by each of these notifiers; returns what went wrong with that. None keeps back another.

    Args:
        wanted: the notifiers.
        context: of the task that tells.
        message: ``failure`` or ``review``, as templates find it.
    """
    problems: list[Exception] = []
    for notification in wanted:
        try:
            # Made anew each time: a notifier fills in its own templates in place.
            _make(notification)({**context, **message})
        except Exception as error:
            log.exception("%s could not tell of it", notification.notifier)
            problems.append(error)
    return problems


def tell_of_failure(context: Mapping[str, Any]) -> None:
    """The callback of every task; see :data:`breakhis_airflow.operators.DEFAULT_ARGS`."""
    if wanted := _wanted().on_failure:
        tell(wanted, context, failure=failure_of(context))


def tell_of_review(context: Mapping[str, Any], review: Review) -> None:
    """Tell of a review that waits. Where that goes wrong, it is in the log, and the review waits all the same."""
    tell(_wanted().on_review, context, review=review)


def _wanted() -> Notifications:
    file = read_settings().conf / "notifications.yaml"
    try:
        return _read(file)
    except ConfigError as error:
        log.error("Nobody is told: %s", error)
        return Notifications()


def failure_of(context: Mapping[str, Any]) -> Failure:
    """What there is to say about a task that failed, without any secret that Airflow knows of."""
    from airflow.sdk.log import redact

    ti, task = context["ti"], context["task"]
    # A worker that was killed cannot call. The DAG processor does so for it, and knows of no exception.
    error = context.get("exception") or "the task was lost with its worker, or was stopped from outside"
    shown = ((link.name, link.get_link(task, ti_key=ti)) for link in LINKS.get(getattr(task, "stage", ""), ()))
    return Failure(
        dag=ti.dag_id,
        run=ti.run_id,
        task=ti.task_id if ti.map_index in {None, -1} else f"{ti.task_id}[{ti.map_index}]",
        error=str(redact(str(error))),
        log_url=ti.log_url,
        links=tuple((name, address) for name, address in shown if address),
    )


def _read(file: Path) -> Notifications:
    return read_yaml(file, Notifications, optional=True)


def _make(notification: Notification) -> Any:
    from airflow.sdk import BaseNotifier

    module, _, name = notification.notifier.rpartition(".")
    kind = getattr(import_module(module), name) if module else None
    if not (isinstance(kind, type) and issubclass(kind, BaseNotifier)):
        raise TypeError("is not the import path of a class derived from airflow.sdk.BaseNotifier")
    return kind(**deepcopy(notification.arguments))


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Each text somewhere in arguments, with the key it stands under."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _leaves(inner, str(name))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _leaves(inner, key)
    elif isinstance(value, str):
        yield key, value
