"""Sends reminders of reviews that nobody has answered, and tells of those that nobody can answer any more."""

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from breakhis_airflow.addresses import build_answer_form_url, build_page_url, build_review_page_url
from breakhis_airflow.airflow_database import WAITING_STATES
from breakhis_airflow.connections import AIRFLOW, read_connection
from breakhis_airflow.notifications import Review, notify_of_review
from breakhis_airflow.review_list import find_unanswerable, list_open_runs
from breakhis_airflow.review_pages import is_settled
from ml.core.airflow_api import AirflowApi
from ml.core.errors import AirflowError, Conflict
from ml.core.settings import read_settings
from ml.core.store import Store
from ml.promotion.reviews import PROMOTE, ROLLBACK, parse_bundle_id


def send_reminders(context: Mapping[str, Any], now: datetime | None = None) -> list[str]:
    """Sends one reminder of each review of a promotion or rollback of which half of the time has passed.

    Args:
        context: of the task that sends.
        now: the current time; default: the clock's.

    Returns:
        The ids of the DAG runs whose reviews they are.
    """
    api, store, hours = _connect(), Store(read_settings().store), read_settings().review_hours
    reminded = []
    for detail in api.list_pending_questions():
        ti = detail["task_instance"]
        age = ((now or datetime.now(UTC)) - datetime.fromisoformat(detail["created_at"])).total_seconds() / 3600
        if ti["dag_id"] not in (PROMOTE, ROLLBACK) or not hours / 2 <= age < hours:
            continue
        # Airflow takes an answer, without effect, also where the task or its run was marked by hand or cleared.
        if ti.get("state") not in WAITING_STATES:
            continue
        if is_settled(ti["dag_id"], parse_bundle_id(detail["body"]), store) or not _mark(
            ti["id"], detail["created_at"], store
        ):
            continue
        form = build_answer_form_url(ti["dag_id"], ti["dag_run_id"], ti["task_id"])
        notify_of_review(
            context, Review(detail["subject"], form, build_review_page_url(detail["body"]), hours - age, reminder=True)
        )
        reminded.append(ti["dag_run_id"])
    return reminded


def tell_of_unanswerable_reviews(context: Mapping[str, Any]) -> list[str]:
    """Sends one message of each review that is open by the audit log and that nobody can answer any more.

    Whether one is open is known from the log and not from Airflow, where whoever may start runs may delete or mark
    them, and an administrator may clean them away.

    Args:
        context: of the task that sends.

    Returns:
        The ids of the DAG runs whose reviews they are.
    """
    api, store = _connect(), Store(read_settings().store)
    told = []
    for question in find_unanswerable(_read_states(list_open_runs(store), api), store):
        asked = question.asked
        if not _mark(f"{asked['sequence']}-unanswerable", asked["at"], store):
            continue
        title = f"{asked['model']} version {asked['version']}, run {asked['run']}"
        trouble = f"The review {question.state}."
        notify_of_review(context, Review(title, build_page_url("reviews/"), "", 0, trouble=trouble))
        told.append(asked["run"].partition("/")[2])
    return told


def _connect() -> AirflowApi:
    environment = read_connection(AIRFLOW, "remind").environment
    return AirflowApi(*(environment[f"BREAKHIS_AIRFLOW_{name}"] for name in ("URL", "USER", "PASSWORD")))


def _read_states(runs: Iterable[str], api: AirflowApi) -> dict[str, str]:
    """Returns the states of those runs of the DAG ``promote`` that Airflow has."""
    states = {}
    for run in runs:
        try:
            states[run] = str(api.dag_run(PROMOTE, run)["state"])
        except AirflowError as error:
            if error.status != 404:
                raise
    return states


def _mark(name: str, value: str, store: Store) -> bool:
    """Marks a question as one of which a message was sent; returns False if it was marked before."""
    try:
        store.compare_and_set(f"jobs/reminders/{name}.json", value, None)
    except Conflict:
        return False
    return True
