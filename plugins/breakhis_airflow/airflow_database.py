"""Reads from Airflow's own database what its API does not give: reviews, and checks of the audit log."""

from collections.abc import Collection
from typing import Any, NamedTuple
from urllib.parse import quote

from breakhis_airflow.addresses import build_airflow_url, build_answer_form_url, strip_host
from ml.promotion.reviews import PROMOTE, ROLLBACK, parse_bundle_id, review_tasks

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
        return [_describe_review(detail) for detail in session.scalars(query)]


def _describe_review(detail: Any) -> WaitingReview:
    ti = detail.task_instance
    form = strip_host(build_answer_form_url(ti.dag_id, ti.run_id, ti.task_id))
    since = _format_minute(detail.created_at)
    return WaitingReview(detail.subject, parse_bundle_id(detail.body), since, form, ti.dag_id, ti.run_id)


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
