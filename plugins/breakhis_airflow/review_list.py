"""Renders the list of reviews, on which nothing disappears: /breakhis/reviews/?model=…&page=….

Airflow forgets: whoever may start runs may delete or mark them, and ``airflow db clean`` removes old ones, also while
they wait. So what was asked and what was decided is read from the audit log. Airflow only says which of the questions
can be answered now, and what became of the runs of the others.
"""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import NamedTuple
from urllib.parse import quote, urlencode

from breakhis_airflow.addresses import build_airflow_url, strip_host
from breakhis_airflow.airflow_database import AuditCheck, WaitingReview
from breakhis_airflow.glossary import TERMS
from breakhis_airflow.review_pages import is_settled, make_environment, read_bundle, read_shown_decisions
from ml.core.errors import StoreError
from ml.core.messages import quote_value
from ml.core.store import Json, Store
from ml.promotion.alias_history import APPROVED, NOBODY_IN_TIME, REJECTED, ROLLED_BACK, list_open_questions
from ml.promotion.audit_log import find_chain_faults, read_unverified_records
from ml.promotion.reviews import PROMOTE, ROLLBACK

MAX_PAGE = 100_000
_DECISIONS_PER_PAGE = 50

_GOING_ON = ("queued", "running")
_NEW_RUN = "start a new run of the DAG promote with the same model, version and evidence"
_STATES = {
    "queued": "waits in Airflow to go on; is the DAG promote paused?",
    "running": "is being carried out, or is about to be asked again",
    "failed": f"failed on the way, or was marked as failed: its log says why. To have it asked again, {_NEW_RUN}",
    "success": f"ended without a decision: somebody marked it. To have it asked again, {_NEW_RUN}",
}
_GONE = (
    "is in Airflow no more: the run was deleted, by somebody or by airflow db clean. A rejection may have gone with "
    "it, so the version cannot be promoted any more: train it again, with another seed, and withdraw this version"
)


class UnansweredQuestion(NamedTuple):
    """A question that is open by the audit log, but that nobody can answer now."""

    asked: Json
    """Its record in the audit log."""
    state: str
    """What became of it, in words, and what to do."""
    is_trouble: bool
    run: str
    """Address of the run in Airflow, without its host; empty where Airflow has it no more."""


def list_open_runs(store: Store) -> list[str]:
    """Returns the ids of the runs of the DAG ``promote`` whose questions are open by the audit log."""
    return [_run_id(asked) for asked in _list_all_open_questions(read_unverified_records(store))]


def find_unanswerable(states: Mapping[str, str], store: Store) -> list[UnansweredQuestion]:
    """Returns the open questions that will not go on by themselves: of runs that ended or that Airflow has no more.

    Args:
        states: states of the runs whose questions are open, those that Airflow has.
        store: holds the audit log.
    """
    found = _list_unanswered(read_unverified_records(store), states)
    return [one for one in found if one.is_trouble]


def render_review_list(
    waiting: Sequence[WaitingReview],
    states: Mapping[str, str],
    audit: AuditCheck,
    store: Store,
    *,
    model: str = "",
    page: int = 1,
) -> str:
    """Returns the HTML page of reviews that wait, of those on their way, and of a page of decisions.

    Args:
        waiting: the reviews that can be answered in Airflow now.
        states: states of the runs whose questions are open by the audit log, those that Airflow has.
        audit: outcome of the daily check of the audit log.
        store: holds the audit log.
        model: the one model that is shown; empty for all.
        page: number of the page of decisions, from 1, the latest first.

    Raises:
        StoreError: the log has nothing about the model, or no such page.
    """
    records = read_unverified_records(store)
    models = sorted({record["model"] for record in records})
    if model and model not in models:
        raise StoreError(f"the audit log has nothing about a model {quote_value(model)}")
    decisions = _tell_what_followed(read_shown_decisions(store, model or None))
    pages = max(1, -(-len(decisions) // _DECISIONS_PER_PAGE))
    if page > pages:
        raise StoreError(f"there is no page {page} of decisions: the last one is {pages}")
    first = (page - 1) * _DECISIONS_PER_PAGE
    live = {review.run for review in waiting if review.dag == PROMOTE}
    unanswered = _list_unanswered(records, states)
    return (
        make_environment()
        .get_template("reviews.html")
        .render(
            waiting=[r for r in waiting if _is_about(r, model, store) and not is_settled(r.dag, r.bundle, store)],
            unanswered=[
                one for one in unanswered if _run_id(one.asked) not in live and model in ("", one.asked["model"])
            ],
            rollback=ROLLBACK,
            decisions=decisions[first : first + _DECISIONS_PER_PAGE],
            model=model,
            models=[(name, _link(name, 1)) for name in models],
            page=page,
            pages=pages,
            newer=_link(model, page - 1) if page > 1 else "",
            older=_link(model, page + 1) if page < pages else "",
            audit=audit,
            faults=find_chain_faults(store),
            terms=TERMS,
        )
    )


def _list_all_open_questions(records: Sequence[Json]) -> list[Json]:
    """Returns the records of open questions about all models, the oldest first."""
    ordered = sorted(records, key=lambda record: (record["model"], record["sequence"]))
    found = [
        asked
        for _, own in groupby(ordered, key=lambda record: record["model"])
        for asked in list_open_questions(list(own))
    ]
    return sorted(found, key=lambda record: int(record["sequence"]))


def _list_unanswered(records: Sequence[Json], states: Mapping[str, str]) -> list[UnansweredQuestion]:
    """Returns the open questions with what became of them, but for runs that ended and were started anew by another.

    One that Airflow has no more stays, since it blocks the version in every run.
    """
    asked = _list_all_open_questions(records)
    asked_anew = {_subject(one) for one in asked if states.get(_run_id(one)) in _GOING_ON}
    return [
        _describe_unanswered(one, states)
        for one in asked
        if states.get(_run_id(one)) in (None, *_GOING_ON) or _subject(one) not in asked_anew
    ]


def _describe_unanswered(asked: Json, states: Mapping[str, str]) -> UnansweredQuestion:
    run = _run_id(asked)
    if run not in states:
        return UnansweredQuestion(asked, _GONE, True, "")
    address = strip_host(build_airflow_url(f"dags/{PROMOTE}/runs/{quote(run)}"))
    return UnansweredQuestion(
        asked, _STATES.get(states[run], states[run]), states[run] in ("failed", "success"), address
    )


def _tell_what_followed(decisions: Sequence[Json]) -> list[Json]:
    """Returns decisions, the latest first, with what followed from each in words as ``followed``."""
    told: list[Json] = []
    successors: dict[str, Json] = {}
    for decision in decisions:
        event, later = decision["event"], successors.get(decision["model"])
        followed = ""
        if event in (APPROVED, ROLLED_BACK):
            followed = f"in use until {later['at'][:10]}, then version {later['version']}" if later else "in use now"
            successors[decision["model"]] = decision
        elif event == REJECTED:
            is_silence = decision["by"] == NOBODY_IN_TIME
            followed = "expired; a new run may ask again" if is_silence else "not promoted"
        told.append(decision | {"followed": followed})
    return told


def _is_about(review: WaitingReview, model: str, store: Store) -> bool:
    """Returns whether a review is about a model. One whose model cannot be told is about each, to be seen."""
    if not model or not review.bundle:
        return True
    try:
        return bool(read_bundle(review.bundle, store)["evidence"]["model"] == model)
    except StoreError:
        return True


def _link(model: str, page: int) -> str:
    return "?" + urlencode({"model": model, "page": page}, errors="replace")


def _subject(asked: Json) -> tuple[str, int, str]:
    return asked["model"], asked["version"], asked["evidence"]


def _run_id(asked: Json) -> str:
    return str(asked["run"]).partition("/")[2]
