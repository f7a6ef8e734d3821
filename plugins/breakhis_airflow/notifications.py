"""Sends messages about failures and reviews by Airflow's notifiers, as ``notifications.yaml`` in the conf folder says.

Failures are reported by the tasks' callback and not by the DAGs'. Airflow calls the former where the task ran, once,
after the last retry, with the exception. A DAG's is called by the DAG processor, which knows neither the error nor the
result. Tasks after the one that failed do not run and are not reported, so a run in which one task fails sends one
message.
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

from breakhis_airflow.links import STAGE_LINKS
from ml.core.errors import ConfigError
from ml.core.messages import cut_text, quote_value
from ml.core.settings import read_settings
from ml.core.yaml_files import YamlModel, read_yaml

log = logging.getLogger(__name__)

_SECRET = re.compile(r"passw|secret|token|api[_-]?key|authorization|credential", re.IGNORECASE)
_PASSWORD_IN_ADDRESS = re.compile(r"://[^/@\s]*:[^/@\s]+@")


class Notification(YamlModel):
    """One notifier with its arguments."""

    notifier: str = Field(description="A notifier's import path: of Airflow's providers, or one of your own.")
    arguments: dict[str, Any] = Field(
        default_factory=dict, description="Its arguments; Airflow fills in templates where the notifier has them."
    )

    @field_validator("arguments", mode="after")
    @classmethod
    def _no_secrets(cls, value: dict[str, Any]) -> dict[str, Any]:
        for key, text in _find_texts(value):
            if _SECRET.search(key) or _PASSWORD_IN_ADDRESS.search(text):
                raise ValueError(
                    f"{quote_value(key)} is, or holds, a secret; put that into an Airflow connection and "
                    "name it (…_conn_id)"
                )
        return value


class Notifications(YamlModel):
    """The content of notifications.yaml."""

    on_failure: tuple[Notification, ...] = Field((), description="Who is told when a task has failed for good.")
    on_review: tuple[Notification, ...] = Field(
        (), description="Who is told when a review waits, and again when half of its time has passed."
    )

    def __iter__(self) -> Iterator[tuple[str, Notification]]:  # type: ignore[override]
        """Yields every notifier with its place in the file, such as ``on_failure.0``."""
        for field in self.__class__.model_fields:
            for number, notification in enumerate(getattr(self, field)):
                yield f"{field}.{number}", notification


@dataclass(frozen=True)
class Failure:
    """A task that failed for good. Templates find it as ``failure``."""

    dag: str
    run: str
    task: str
    error: str
    """The stage's own error message."""
    log_url: str
    links: tuple[tuple[str, str], ...]
    """Names and addresses of the task's links, such as Data Docs, quarantine and model version."""

    @property
    def subject(self) -> str:
        """The message's subject: one line."""
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
    """A review that waits. Templates find it as ``review``."""

    question: str
    form: str
    """Address of the answer form; where nobody can answer, of the list of reviews."""
    page: str
    """Address of the review page, or an empty text."""
    hours_left: float
    """Hours until it counts as rejected."""
    reminder: bool = False
    trouble: str = ""
    """Why nobody can answer it any more and what to do, in a sentence; empty where it can be answered."""
    remark: str = ""
    """What is to be known beside the question, such as that an answer did not count."""

    @property
    def subject(self) -> str:
        """The message's subject: one line."""
        prefix = "Not decided, and nobody can answer it: " if self.trouble else "Reminder: " if self.reminder else ""
        return f"{prefix or ('Again: ' if self.remark else '')}{self.question}"

    @property
    def text(self) -> str:
        """The whole message, as plain text."""
        lines = [self.question, *(["", f"{self.remark}."] if self.remark else []), "", self._outlook, ""]
        return "\n".join([*lines, *(f"{name}: {address}" for name, address in self._addresses())])

    @property
    def html(self) -> str:
        """The whole message, as HTML."""
        links = "".join(f'<li><a href="{escape(address)}">{name}</a></li>' for name, address in self._addresses())
        remark = f"<p>{escape(self.remark)}.</p>" if self.remark else ""
        return f"<p><b>{escape(self.question)}</b></p>{remark}<p>{escape(self._outlook)}</p><ul>{links}</ul>"

    @property
    def _outlook(self) -> str:
        return self.trouble or f"Without an answer within {self.hours_left:.0f} hours it is rejected."

    def _addresses(self) -> list[tuple[str, str]]:
        form = "Reviews" if self.trouble else "Answer"
        return [*([("Evidence", self.page)] if self.page else []), (form, self.form)]


def find_notification_files(conf: Path) -> list[Path]:
    """Returns the file, unless it is missing or names no notifier. A file that cannot be used is returned, too."""
    file = conf / "notifications.yaml"
    try:
        return [file] if list(_read_file(file)) else []
    except ConfigError:
        return [file]


def read_notifications(file: Path) -> Notifications:
    """Reads the file, and makes each of its notifiers once to check it.

    Raises:
        ConfigError: the file is invalid, or a notifier that it names is none or does not take its arguments.
    """
    notifications = _read_file(file)
    for place, notification in notifications:
        try:
            notifier = _make_notifier(notification)
            environment = notifier.get_template_env()
            for field in notifier.template_fields:
                for _, text in _find_texts({field: getattr(notifier, field)}):
                    environment.from_string(text)
        except Exception as error:  # a notifier's constructor may raise anything
            named = f"{place}: {cut_text(notification.notifier)}"
            raise ConfigError(f"{file}: {named}: {cut_text(error) or type(error).__name__}") from error
    return notifications


def send_notifications(
    notifications: Sequence[Notification], context: Mapping[str, Any], **message: Failure | Review
) -> list[Exception]:
    """Sends a message by each notifier; the failure of one does not keep the others from sending.

    Args:
        notifications: the notifiers.
        context: of the task that sends.
        message: ``failure`` or ``review``, as templates find it.

    Returns:
        The errors of the notifiers that failed.
    """
    problems: list[Exception] = []
    for notification in notifications:
        try:
            # It is made for each message, since a notifier fills in its templates in place.
            _make_notifier(notification)({**context, **message})
        except Exception as error:
            log.exception("%s could not send the message", notification.notifier)
            problems.append(error)
    return problems


def notify_of_failure(context: Mapping[str, Any]) -> None:
    """Sends a message about a failed task: the callback in :data:`breakhis_airflow.operators.DEFAULT_ARGS`."""
    if notifications := _read_configured().on_failure:
        send_notifications(notifications, context, failure=describe_failure(context))


def notify_of_review(context: Mapping[str, Any], review: Review) -> None:
    """Sends a message about a review that waits. If that fails, the log says so, and the review waits all the same."""
    send_notifications(_read_configured().on_review, context, review=review)


def _read_configured() -> Notifications:
    file = read_settings().conf / "notifications.yaml"
    try:
        return _read_file(file)
    except ConfigError as error:
        log.error("No message is sent: %s", error)
        return Notifications()


def describe_failure(context: Mapping[str, Any]) -> Failure:
    """Describes a task that failed, without any secret that Airflow knows of."""
    from airflow.sdk.log import redact

    ti, task = context["ti"], context["task"]
    # For a worker that was killed, the DAG processor calls this, without an exception.
    error = context.get("exception") or "the task was lost with its worker, or was stopped from outside"
    links = ((link.name, link.get_link(task, ti_key=ti)) for link in STAGE_LINKS.get(getattr(task, "stage", ""), ()))
    return Failure(
        dag=ti.dag_id,
        run=ti.run_id,
        task=ti.task_id if ti.map_index in {None, -1} else f"{ti.task_id}[{ti.map_index}]",
        error=str(redact(str(error))),
        log_url=ti.log_url,
        links=tuple((name, address) for name, address in links if address),
    )


def _read_file(file: Path) -> Notifications:
    return read_yaml(file, Notifications, optional=True)


def _make_notifier(notification: Notification) -> Any:
    from airflow.sdk import BaseNotifier

    module, _, name = notification.notifier.rpartition(".")
    kind = getattr(import_module(module), name) if module else None
    if not (isinstance(kind, type) and issubclass(kind, BaseNotifier)):
        raise TypeError("is not the import path of a class derived from airflow.sdk.BaseNotifier")
    return kind(**deepcopy(notification.arguments))


def _find_texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yields each text anywhere in a notifier's arguments, with the key that holds it."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _find_texts(inner, str(name))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _find_texts(inner, key)
    elif isinstance(value, str):
        yield key, value
