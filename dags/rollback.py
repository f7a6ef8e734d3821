"""The DAG ``rollback``: makes a former champion the champion again, once a reviewer has confirmed it."""

from airflow.sdk import DAG, Param

from breakhis_airflow.operators import DEFAULT_ARGS
from breakhis_airflow.places import stage
from breakhis_airflow.review_operator import ReviewOperator
from breakhis_airflow.run_conf import MODEL_PATTERN, VERSION_PATTERN
from ml.promotion.reviews import MIN_REASON_LENGTH, ROLLBACK

DOC = """
A champion disappoints: go back to one that was champion before.

1. **propose** checks that the version was champion once, and says what would change. A version that was withdrawn
   is refused unless *Although withdrawn* is ticked; its reviewer then reads who withdrew it and why.
2. **review** waits for a reviewer to confirm it. Who starts a run here cannot confirm it.
3. **rollback** reads the answer in Airflow's own record and moves the aliases, in one step. Who decided what, when and
   why is in the audit log: `breakhis history MODEL`, which also lists the versions that were champion.

Where **rollback** says that something changed since it was confirmed, start a new run with the same values: a cleared
review would show what was there before.

It also puts right an alias that somebody has moved by hand.
"""

with DAG(
    ROLLBACK,
    description="Makes a former champion the champion again.",
    doc_md=DOC,
    schedule=None,
    catchup=False,
    max_active_runs=100,
    is_paused_upon_creation=False,
    default_args=DEFAULT_ARGS,
    params={
        "model": Param(
            type="string",
            pattern=MODEL_PATTERN,
            title="Model",
            description="Its name in the registry, such as demo-binary.",
        ),
        "version": Param(
            type="string",
            pattern=VERSION_PATTERN,
            title="Version",
            description="One that was champion before; the alias 'previous' is on the last.",
        ),
        "reason": Param(
            type="string",
            minLength=MIN_REASON_LENGTH,
            title="Reason",
            description="Why; kept with the decision for good.",
        ),
        "although_withdrawn": Param(
            False,
            type="boolean",
            title="Although withdrawn",
            description="Go back to this version even if it was withdrawn. Its reviewer reads by whom and why.",
        ),
    },
    tags=["promote"],
) as dag:
    which = ("--", "{{ params.model }}", "{{ params.version }}")
    decided = {
        "pool": "promotion",
        "connections": ["breakhis_airflow", "breakhis_audit", "breakhis_mlflow_promoter"],
    }

    propose = stage(
        "rollback",
        *("--dry-run", "--reason", "{{ params.reason }}"),
        *("--although-withdrawn", "{{ params.although_withdrawn }}", *which),
        task_id="propose",
        connections=["breakhis_audit", "breakhis_mlflow_promoter"],
    )
    review = ReviewOperator(task_id="review", subject=propose.value("title"), body=propose.value("review"))

    propose >> review >> stage("rollback", "--dag-run", "{{ run_id }}", *which, **decided)
