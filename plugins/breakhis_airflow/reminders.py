"""Reminds of reviews that nobody has answered when half of their time has passed."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from breakhis_airflow.addresses import form_of, page_of
from breakhis_airflow.connections import AIRFLOW, read_connection
from breakhis_airflow.notifications import Review, tell_of_review
from ml.core.airflow_api import AirflowApi
from ml.core.errors import Conflict
from ml.core.settings import read_settings
from ml.core.store import Json, Store
from ml.promotion.reviews import PROMOTE, ROLLBACK


def remind(context: Mapping[str, Any], now: datetime | None = None) -> list[str]:
    """Tell of each review of a promotion or rollback that is due for it, once; returns the runs.

    Args:
        context: of the task that reminds.
        now: the time; default: what it is.
    """
    given = read_connection(AIRFLOW, "remind").environment
    api = AirflowApi(*(given[f"BREAKHIS_AIRFLOW_{name}"] for name in ("URL", "USER", "PASSWORD")))
    store, hours = Store(read_settings().store), read_settings().review_hours
    reminded = []
    for detail in api.list_pending_questions():
        ti = detail["task_instance"]
        age = ((now or datetime.now(UTC)) - datetime.fromisoformat(detail["created_at"])).total_seconds() / 3600
        if ti["dag_id"] not in (PROMOTE, ROLLBACK) or not hours / 2 <= age < hours or not _first(detail, store):
            continue
        form = form_of(ti["dag_id"], ti["dag_run_id"], ti["task_id"])
        tell_of_review(context, Review(detail["subject"], form, page_of(detail["body"]), hours - age, reminder=True))
        reminded.append(ti["dag_run_id"])
    return reminded


def _first(detail: Json, store: Store) -> bool:
    """Whether nobody was reminded of this very question yet; marks it."""
    try:
        store.compare_and_set(f"jobs/reminders/{detail['task_instance']['id']}.json", detail["created_at"], None)
    except Conflict:
        return False
    return True
