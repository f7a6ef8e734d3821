"""What a review is: the question that Airflow puts to a reviewer, and what counts as an answer to it.

Asked by the Airflow plugin, read by the promotion, and answered by ``breakhis demo``.
"""

from collections.abc import Mapping

DAG, TASK = "promote", "review"
"""Where the question is asked."""

APPROVE, REJECT = "Approve", "Reject"

SHORTEST_REASON = 3
"""Characters, less blanks around them."""


def given_reason(params: Mapping[str, object] | None) -> str:
    """The reason in an answer's parameters, which Airflow does not check; empty if there is none worth the name."""
    reason = (params or {}).get("reason")
    stripped = reason.strip() if isinstance(reason, str) else ""
    return stripped if len(stripped) >= SHORTEST_REASON else ""
