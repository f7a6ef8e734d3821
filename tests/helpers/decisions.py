"""What tests of decisions do in a :class:`RegistryWorld`, and what they look at afterwards."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlflow
import pytest

from ml.core.airflow_api import AirflowApi
from ml.core.errors import AirflowError, Refused
from ml.core.store import Json
from ml.promotion.alias_history import DECISION_EVENTS
from ml.promotion.audit_log import AuditLog
from ml.promotion.champion import find_alias_fault
from ml.promotion.decisions import promote_version, propose_rollback, roll_back
from ml.promotion.judging import judge_version
from ml.promotion.questions import record_question
from ml.registry.registered_model import RegisteredModel, audit_anchors
from tests.helpers.registry_world import RegistryWorld


class AirflowRecord:
    """Airflow's record of one run, in place of Airflow's API. Tests may change it."""

    run: Json
    """The DAG run."""
    details: dict[str, Json]
    """Task -> its review."""
    others: dict[str, Json]
    """Id -> another run of the DAG ``promote``."""
    earlier: dict[tuple[str, str], list[Json]]
    """Run and task -> what was answered in the tries of that task."""
    gone: set[str]
    """Ids of runs that Airflow has no more."""
    reviews: dict[str, list[str]]
    """Run -> ids of its reviews, of all tries."""

    def __init__(self, world: RegistryWorld, monkeypatch: pytest.MonkeyPatch) -> None:
        self._world = world
        self.run, self.details, self.others, self.earlier, self.gone = {}, {}, {}, {}, {"deleted-1"}
        self.reviews = {}
        monkeypatch.setattr(AirflowApi, "list_asked_reviews", lambda _, run: self.reviews.get(run, []))
        monkeypatch.setattr(AirflowApi, "dag_run", lambda _, dag, run: self._read_run(run))
        monkeypatch.setattr(
            AirflowApi, "dag_runs", lambda _, dag: [{"dag_run_id": name} | run for name, run in self.others.items()]
        )
        monkeypatch.setattr(
            AirflowApi, "list_hitl_details", lambda _, dag, run, task: self.earlier.get((run, task), [])
        )
        monkeypatch.setattr(AirflowApi, "hitl_detail", lambda _, dag, run, task: self._read_detail(task))

    @property
    def detail(self) -> Json:
        """The first review."""
        return self.details["review"]

    def answer_promotion(
        self, registered: Json, *answers: Json, started_by: str | None = "engineer", **only: Any
    ) -> "AirflowRecord":
        """Have the review of a version answered.

        Args:
            registered: result of :func:`ml.promotion.registration.register_run`.
            answers: of each reviewer, what differs from an approval by ``reviewer``.
            started_by: who started the run.
            only: the same of the only reviewer.
        """
        model, version = registered["model"], str(registered["version"])
        self.run = {
            "conf": {key: registered[key] for key in ("model", "version", "evidence")},
            "triggering_user_name": started_by,
        }
        verdict = judge_version(model, version, self._world.store, self._world.settings)
        title, body = verdict["title"], verdict["review"]
        tasks = ("review", "review_2", "review_3")
        given: Sequence[Json] = answers or [only]
        self.details = {task: _make_detail(title, body, **answer) for task, answer in zip(tasks, given, strict=False)}
        return self

    def answer_rollback(
        self, version: int, reason: str = "it fails on 400X", started_by: str | None = "engineer", **only: Any
    ) -> "AirflowRecord":
        """Have the review of a rollback answered; the run's conf serves a withdrawal, too."""
        conf = {"model": "made-binary", "version": str(version), "reason": reason}
        self.run = {"conf": conf, "triggering_user_name": started_by}
        try:
            proposed = propose_rollback("made-binary", str(version), reason, self._world.store, self._world.settings)
            title, body = proposed["title"], proposed["review"]
        except Refused:
            title, body = "forged", "forged"
        self.details = {"review": _make_detail(title, body, **only)}
        return self

    def reject_elsewhere(self, registered: Json, run: str, **only: Any) -> None:
        """Have the review of a version rejected in another run, or before the review was cleared."""
        conf = {key: registered[key] for key in ("model", "version", "evidence")}
        self.others[run] = {"conf": conf, "triggering_user_name": "engineer"}
        self.earlier[run, "review"] = [_make_detail("", "", **{"option": "Reject", "reason": "blurred"} | only)]

    def ask(self, registered: Json, run: str, review: str) -> None:
        """Have reviewers asked about a version in a review of this id, as the audit log then says."""
        self.reviews.setdefault(run, []).append(review)
        record_question(registered, run, review, self._world.store, self._world.settings)

    def _read_run(self, run: str) -> Json:
        if run in self.gone:
            raise AirflowError("no such run", status=404)
        return self.run

    def _read_detail(self, task: str) -> Json:
        if task not in self.details:
            raise AirflowError(f"no {task}", status=404)
        return self.details[task]


def _make_detail(
    title: str,
    body: str,
    option: str = "Approve",
    user: str | None = "reviewer",
    reason: str | None = "looks right",
    at: str = "2026-01-01T00:00:00Z",
) -> Json:
    return {
        "response_received": True,
        "responded_by_user": {"id": "7", "name": user} if user else None,
        "chosen_options": [option],
        "params_input": {"reason": reason},
        "subject": title,
        "body": body,
        "responded_at": at,
    }


class Killed(BaseException):
    """Stands for the death of a process."""


def promote(world: RegistryWorld, registered: Json, run: str = "made-binary-v1") -> Json:
    return promote_version(registered["model"], str(registered["version"]), run, world.store, world.settings)


def roll_back_to(world: RegistryWorld, version: int, run: str = "back-1") -> Json:
    return roll_back("made-binary", str(version), run, world.store, world.settings)


def open_log(world: RegistryWorld) -> AuditLog:
    return AuditLog(world.store, world.settings)


def list_decisions(world: RegistryWorld) -> list[tuple[str, int, str]]:
    """Event, version and reviewer of each decision in the log."""
    return [
        (r["event"], r["version"], r["by"])
        for r in open_log(world).read_model_records("made-binary")
        if r["event"] in DECISION_EVENTS
    ]


def is_consistent(world: RegistryWorld) -> bool:
    """Whether the log is whole and the aliases are where it says."""
    faults = open_log(world).verify(audit_anchors(world.settings))
    return not faults and not find_alias_fault(RegisteredModel("made-binary", world.settings), open_log(world))


def read_aliases(world: RegistryWorld) -> dict[str, int]:
    aliases = world.client.get_registered_model("made-binary").aliases
    return {alias: int(version) for alias, version in aliases.items()}


def model_folder(version: int) -> Path:
    """Where the files of a version lie."""
    return Path(mlflow.artifacts.download_artifacts(artifact_uri=f"models:/made-binary/{version}"))
