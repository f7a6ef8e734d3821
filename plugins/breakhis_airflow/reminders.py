"""Sends reminders of reviews that nobody has answered when half of their time has passed."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from breakhis_airflow.addresses import build_answer_form_url, build_review_page_url
from breakhis_airflow.connections import AIRFLOW, read_connection
from breakhis_airflow.notifications import Review, notify_of_review
from breakhis_airflow.review_pages import is_settled
from ml.core.airflow_api import AirflowApi
from ml.core.errors import Conflict
from ml.core.settings import read_settings
from ml.core.store import Json, Store
from ml.promotion.reviews import PROMOTE, ROLLBACK, parse_bundle_id


def send_reminders(context: Mapping[str, Any], now: datetime | None = None) -> list[str]:
    """Sends one reminder of each review of a promotion or rollback of which half of the time has passed.

    Args:
        context: of the task that sends.
        now: the current time; default: the clock's.

    Returns:
        The ids of the DAG runs whose reviews they are.
    """
    environment = read_connection(AIRFLOW, "remind").environment
    api = AirflowApi(*(environment[f"BREAKHIS_AIRFLOW_{name}"] for name in ("URL", "USER", "PASSWORD")))
    store, hours = Store(read_settings().store), read_settings().review_hours
    reminded = []
    for detail in api.list_pending_questions():
        ti = detail["task_instance"]
        age = ((now or datetime.now(UTC)) - datetime.fromisoformat(detail["created_at"])).total_seconds() / 3600
        if ti["dag_id"] not in (PROMOTE, ROLLBACK) or not hours / 2 <= age < hours:
            continue
        if is_settled(ti["dag_id"], parse_bundle_id(detail["body"]), store) or not _mark_reminded(detail, store):
            continue
        form = build_answer_form_url(ti["dag_id"], ti["dag_run_id"], ti["task_id"])
        notify_of_review(
            context, Review(detail["subject"], form, build_review_page_url(detail["body"]), hours - age, reminder=True)
        )
        reminded.append(ti["dag_run_id"])
    return reminded


def _mark_reminded(detail: Json, store: Store) -> bool:
    """Marks a question as one of which a reminder was sent; returns False if it was marked before."""
    try:
        store.compare_and_set(f"jobs/reminders/{detail['task_instance']['id']}.json", detail["created_at"], None)
    except Conflict:
        return False
    return True
