"""Refuses runs whose conf has a key that nothing reads. Airflow accepts any, so a misspelt one would be without effect.

It is the hook before every task's execution (:data:`breakhis_airflow.operators.DEFAULT_ARGS`): a run with such a key
ends in its first task, whatever started it.
"""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from airflow.sdk.exceptions import AirflowFailException

from ml.core.messages import list_items, quote_value
from ml.core.yaml_files import NAME_PATTERN

# In Python $ also matches before a line break at the end, and a number with one would name the same version in other
# words. Browsers, which check the forms, do not know \Z.
MODEL_PATTERN = NAME_PATTERN + r"(?!\n)"
VERSION_PATTERN = r"^[1-9][0-9]*$(?!\n)"
EVIDENCE_PATTERN = r"^evidence-[0-9a-f]{12}$(?!\n)"
"""Patterns of a DAG's params that name a registered model, its version, and evidence."""

KEYS_OF_EVERY_DAG = frozenset({"origin"})
"""Keys that a run may have besides the params of its DAG: ``origin`` names the run that started it."""


def refuse_unknown_conf(context: Mapping[str, Any]) -> None:
    """Checks the conf of a task's run against the params of its DAG.

    Raises:
        AirflowFailException: it has keys that nothing reads; names them and the nearest known ones. No retry helps.
    """
    known = sorted({*context["dag"].params, *KEYS_OF_EVERY_DAG})
    unknown = [str(key) for key in context["dag_run"].conf or {} if key not in known]
    if not unknown:
        return
    listed = list_items(_describe_key(key, known) for key in sorted(unknown))
    takes = ", ".join(key for key in known if key not in KEYS_OF_EVERY_DAG) or "none"
    raise AirflowFailException(
        f"the conf of this run has keys that {context['dag'].dag_id} does not know: {listed}; it takes: {takes}. "
        "Start a new run without them"
    )


def _describe_key(key: str, known: list[str]) -> str:
    nearest = get_close_matches(key, known, n=1)
    return f"{key!r} (did you mean {nearest[0]!r}?)" if nearest else quote_value(key, 80)
