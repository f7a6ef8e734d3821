"""Reviews: their names in Airflow, and what counts as an answer to one.

The Airflow plugin asks the question, the promotion reads the answer, and ``breakhis demo`` answers. The module imports
little, since DAG files import it; :mod:`ml.promotion.review_texts` writes what is asked.
"""

import re
from collections.abc import Mapping
from typing import Any

from ml.core.airflow_pages import REVIEWS_PATH

PROMOTE, ROLLBACK, WITHDRAW = "promote", "rollback", "withdraw"
"""Ids of the DAGs in which something is decided."""

REVIEW_TASK = "review"
"""Id of the task that puts the question, or puts it first where several reviewers have to answer."""

MAX_APPROVALS = 3

APPROVE, REJECT = "Approve", "Reject"


def review_tasks(dag: str) -> tuple[str, ...]:
    """Returns the ids of a DAG's tasks that put the question, each to another reviewer."""
    return (
        (REVIEW_TASK, *(f"{REVIEW_TASK}_{k}" for k in range(2, MAX_APPROVALS + 1)))
        if dag == PROMOTE
        else (REVIEW_TASK,)
    )


BUNDLE_PATTERN = r"bundle-[0-9a-f]{12}"
"""The pattern of a bundle's id."""

MIN_REASON_LENGTH, MAX_REASON_LENGTH = 3, 5_000
"""In characters, without blanks around them. What is longer is cut, so that the records stay readable."""

_LAST_WORDS = re.compile(rf"judged as `({BUNDLE_PATTERN})`(?: \(SHA-256 `[0-9a-f]{{64}}`\))?\. Your answer is [^`]*\Z")


def parse_bundle_id(body: str | None) -> str | None:
    """Returns the id of the bundle that a review is about, or None if its body names none.

    Only the last words of the body count, since the text before them may quote what users wrote.
    """
    match = _LAST_WORDS.search(body or "")
    return match[1] if match else None


def parse_reason(params: Mapping[str, object] | None) -> str:
    """Returns the reason in an answer's parameters, which Airflow does not check; empty if missing or too short."""
    reason = (params or {}).get("reason")
    stripped = reason.strip() if isinstance(reason, str) else ""
    if len(stripped) > MAX_REASON_LENGTH:
        return f"{stripped[: MAX_REASON_LENGTH - 1]}…"
    return stripped if len(stripped) >= MIN_REASON_LENGTH else ""


def find_answer_problem(answer: Mapping[str, Any]) -> str:
    """Returns why somebody's answer does not count, in words; empty if it does. Airflow checks neither.

    Args:
        answer: has ``chosen_options`` and ``params_input``, as Airflow records them.
    """
    if not parse_reason(answer.get("params_input")):
        return f"it has no reason of at least {MIN_REASON_LENGTH} letters"
    return "" if len(answer.get("chosen_options") or []) == 1 else f"it says neither {APPROVE} nor {REJECT}"


def review_page_path(bundle: str) -> str:
    """Returns the path of a bundle's review page, below Airflow's address."""
    return f"{REVIEWS_PATH}{bundle}/"
