"""What the review pages show of Airflow's own database: reviews that wait, and the last checks of the audit log."""

from typing import Any, NamedTuple
from urllib.parse import quote

from breakhis_airflow.addresses import form_of, on_this_site, root
from ml.promotion.reviews import PROMOTE, ROLLBACK, parse_bundle_id

AUDIT = "audit"
"""The DAG that checks the audit log."""

_AUDITS = 100  # runs in which the last that passed is looked for


class Waiting(NamedTuple):
    """A review that nobody has answered yet."""

    subject: str
    bundle: str | None
    since: str
    form: str
    """Airflow's page with the answer form, without its host."""
    dag: str = PROMOTE
    """In which it is asked: a promotion or a rollback."""


class AuditCheck(NamedTuple):
    """What became of the daily check of the audit log; times are UTC, empty if there was no such run."""

    passed: str = ""
    failed: str = ""
    """When it last failed, if it has not passed since."""
    run: str = ""
    """Airflow's page of that failure, without its host."""


def waiting_reviews() -> list[Waiting]:
    """The reviews of promotions and rollbacks that wait, the oldest first, as Airflow's database has them."""
    from airflow.models.hitl import HITLDetail
    from airflow.models.taskinstance import TaskInstance
    from airflow.utils.session import create_session
    from sqlalchemy import select

    with create_session() as session:
        asked = (
            select(HITLDetail)
            .join(TaskInstance, TaskInstance.id == HITLDetail.ti_id)
            .where(
                TaskInstance.dag_id.in_((PROMOTE, ROLLBACK)),
                TaskInstance.state.in_(("awaiting_input", "deferred")),
                HITLDetail.responded_at.is_(None),
            )
            .order_by(HITLDetail.created_at)
        )
        return [_waiting(detail) for detail in session.scalars(asked)]


def _waiting(detail: Any) -> Waiting:
    ti = detail.task_instance
    form = on_this_site(form_of(ti.dag_id, ti.run_id, ti.task_id))
    return Waiting(detail.subject, parse_bundle_id(detail.body), _minute(detail.created_at), form, ti.dag_id)


def audit_check() -> AuditCheck:
    """How the DAG ``audit`` last ended, as Airflow's database has it."""
    from airflow.models.dagrun import DagRun
    from airflow.utils.session import create_session
    from sqlalchemy import select

    with create_session() as session:
        ended = select(DagRun).where(DagRun.dag_id == AUDIT, DagRun.state.in_(("success", "failed")))
        runs = list(session.scalars(ended.order_by(DagRun.end_date.desc()).limit(_AUDITS)))
        passed = next((_minute(run.end_date) for run in runs if run.state == "success"), "")
        if not runs or runs[0].state == "success":
            return AuditCheck(passed)
        return AuditCheck(
            passed, _minute(runs[0].end_date), on_this_site(root(f"dags/{AUDIT}/runs/{quote(runs[0].run_id)}"))
        )


def _minute(time: Any) -> str:
    return str(time.isoformat(sep=" ", timespec="minutes"))[:16]
