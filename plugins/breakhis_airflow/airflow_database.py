"""Reads from Airflow's own database what its API does not give: reviews, and checks of the audit log."""

from collections.abc import Collection
from typing import Any, NamedTuple
from urllib.parse import quote

from breakhis_airflow.addresses import build_airflow_url, build_answer_form_url, strip_host
from ml.promotion.reviews import APPROVE, PROMOTE, ROLLBACK, parse_bundle_id, review_tasks

AUDIT_DAG = "audit"
"""The DAG that checks the audit log."""

WAITING_STATES = ("awaiting_input", "deferred")
"""States of a task whose question can be answered with effect."""

_MAX_AUDIT_RUNS = 100  # in which the last successful one is looked for


class WaitingReview(NamedTuple):
    """A review that nobody has answered yet."""

    subject: str
    bundle: str | None
    since: str
    form: str
    """Address of Airflow's answer form, without its host."""
    dag: str = PROMOTE
    """The DAG that asks it: the one of promotions or the one of rollbacks."""
    run: str = ""
    """Id of the run in which it is asked."""
    task: str = ""
    id: str = ""
    """Of the task instance, which is another one whenever the question is asked in another try."""
    assigned: tuple[str, ...] = ()
    """Whom it asks, as Airflow's auth manager identifies them."""
    started_by: str | None = None
    """Login name of the user who started the run."""
    approved_by: tuple[str, ...] = ()
    """Login names of those who have approved in the run already."""
    asked_because: str = ""
    """Why somebody asks for it, in their words; empty where nobody has to say why."""


class GivenAnswer(NamedTuple):
    """An answer that somebody gave, and what became of the run."""

    by: str
    """Login name."""
    option: str
    at: str
    state: str
    """Of the run: running while the answer is carried out."""
    run: str
    """Address of the run in Airflow, without its host."""


class AuditCheck(NamedTuple):
    """The outcome of the daily check of the audit log. Times are in UTC, and empty if there was no such run."""

    passed: str = ""
    failed: str = ""
    """When it last failed, unless it has passed since."""
    run: str = ""
    """Address of the failed run in Airflow, without its host."""


def read_waiting_reviews() -> list[WaitingReview]:
    """Returns the reviews of promotions and rollbacks that wait, the oldest first."""
    from airflow.models.hitl import HITLDetail
    from airflow.models.taskinstance import TaskInstance
    from airflow.utils.session import create_session
    from sqlalchemy import select

    with create_session() as session:
        query = (
            select(HITLDetail)
            .join(TaskInstance, TaskInstance.id == HITLDetail.ti_id)
            .where(
                TaskInstance.dag_id.in_((PROMOTE, ROLLBACK)),
                TaskInstance.state.in_(WAITING_STATES),
                HITLDetail.responded_at.is_(None),
            )
            .order_by(HITLDetail.created_at)
        )
        waiting = list(session.scalars(query))
        approvers = _read_approvers({detail.task_instance.run_id for detail in waiting}, session)
        keys = [(detail.task_instance.dag_id, detail.task_instance.run_id) for detail in waiting]
        return [
            _describe_review(detail, tuple(approvers.get(key, ()))) for detail, key in zip(waiting, keys, strict=True)
        ]


def read_last_answer(bundle: str) -> GivenAnswer | None:
    """Returns the last answer to a review on an evidence bundle, or None if Airflow has none."""
    from airflow.models.hitl import HITLDetail
    from airflow.utils.session import create_session
    from sqlalchemy import select

    with create_session() as session:
        # The body is text that quotes others' words, too: which bundle it is about is parsed from its last words.
        query = select(HITLDetail).where(HITLDetail.responded_at.is_not(None), HITLDetail.body.contains(bundle))
        for detail in session.scalars(query.order_by(HITLDetail.responded_at.desc())):
            ti = detail.task_instance
            if ti.dag_id in (PROMOTE, ROLLBACK) and parse_bundle_id(detail.body) == bundle and detail.responded_by:
                run = strip_host(build_airflow_url(f"dags/{quote(ti.dag_id)}/runs/{quote(ti.run_id)}"))
                option, at = ", ".join(detail.chosen_options or []), _format_minute(detail.responded_at)
                return GivenAnswer(str(detail.responded_by["name"]), option, at, str(ti.dag_run.state), run)
    return None


def _read_approvers(runs: Collection[str], session: Any) -> dict[tuple[str, str], list[str]]:
    """Returns the login names of those who have approved in runs of these names, by DAG and run."""
    from airflow.models.hitl import HITLDetail
    from airflow.models.taskinstance import TaskInstance
    from sqlalchemy import select

    answered = (
        select(HITLDetail)
        .join(TaskInstance, TaskInstance.id == HITLDetail.ti_id)
        .where(
            TaskInstance.dag_id.in_((PROMOTE, ROLLBACK)),
            TaskInstance.run_id.in_(runs),
            HITLDetail.responded_at.is_not(None),
        )
    )
    approvers: dict[tuple[str, str], list[str]] = {}
    for one in session.scalars(answered):
        if one.responded_by and one.chosen_options == [APPROVE]:
            key = (one.task_instance.dag_id, one.task_instance.run_id)
            approvers.setdefault(key, []).append(one.responded_by["name"])
    return approvers


def _describe_review(detail: Any, approvers: tuple[str, ...]) -> WaitingReview:
    ti = detail.task_instance
    return WaitingReview(
        subject=detail.subject,
        bundle=parse_bundle_id(detail.body),
        since=_format_minute(detail.created_at),
        form=strip_host(build_answer_form_url(ti.dag_id, ti.run_id, ti.task_id)),
        dag=ti.dag_id,
        run=ti.run_id,
        task=ti.task_id,
        id=str(ti.id),
        assigned=tuple(user["id"] for user in detail.assigned_users),
        started_by=ti.dag_run.triggering_user_name,
        approved_by=approvers,
        asked_because=str((ti.dag_run.conf or {}).get("reason", "")) if ti.dag_id == ROLLBACK else "",
    )


def read_run_states(runs: Collection[str]) -> dict[str, str]:
    """Returns the states of runs of the DAG ``promote``: queued, running, success or failed; those that there are."""
    from airflow.models.dagrun import DagRun
    from airflow.utils.session import create_session
    from sqlalchemy import select

    with create_session() as session:
        query = select(DagRun.run_id, DagRun.state).where(DagRun.dag_id == PROMOTE, DagRun.run_id.in_(runs))
        return {run: str(state) for run, state in session.execute(query)}


def read_asked_reviews(run: str) -> list[str]:
    """Returns the ids of a promotion's reviews, of the present try and of those before; none where there is no run.

    Airflow makes them up, and gives a task another one whenever it is cleared or tried again. They go with the run or
    the task.
    """
    from airflow.models.taskinstance import TaskInstance
    from airflow.models.taskinstancehistory import TaskInstanceHistory
    from airflow.utils.session import create_session
    from sqlalchemy import select

    columns = ((TaskInstance, TaskInstance.id), (TaskInstanceHistory, TaskInstanceHistory.task_instance_id))
    with create_session() as session:
        queries = [
            select(column).where(of.dag_id == PROMOTE, of.run_id == run, of.task_id.in_(review_tasks(PROMOTE)))
            for of, column in columns
        ]
        return sorted({str(review) for query in queries for review in session.scalars(query)})


def read_audit_check() -> AuditCheck:
    """Returns how the DAG ``audit`` last ended, and when it last succeeded."""
    from airflow.models.dagrun import DagRun
    from airflow.utils.session import create_session
    from sqlalchemy import select

    with create_session() as session:
        ended = select(DagRun).where(DagRun.dag_id == AUDIT_DAG, DagRun.state.in_(("success", "failed")))
        runs = list(session.scalars(ended.order_by(DagRun.end_date.desc()).limit(_MAX_AUDIT_RUNS)))
        passed = next((_format_minute(run.end_date) for run in runs if run.state == "success"), "")
        if not runs or runs[0].state == "success":
            return AuditCheck(passed)
        failed_run = strip_host(build_airflow_url(f"dags/{AUDIT_DAG}/runs/{quote(runs[0].run_id)}"))
        return AuditCheck(passed, _format_minute(runs[0].end_date), failed_run)


def _format_minute(time: Any) -> str:
    return str(time.isoformat(sep=" ", timespec="minutes"))[:16]
