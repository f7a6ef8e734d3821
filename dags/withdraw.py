"""The DAG ``withdraw``: takes a waiting candidate back, so that it can be approved no more."""

from airflow.sdk import DAG, Param

from breakhis_airflow.operators import DEFAULT_ARGS
from breakhis_airflow.places import stage
from breakhis_airflow.run_conf import MODEL_PATTERN, VERSION_PATTERN
from ml.promotion.reviews import MIN_REASON_LENGTH, WITHDRAW

DOC = """
A candidate waits for its review and should not be promoted any more: something is wrong with its data, say. Whoever
may start a run here can take it back; who did and why is in the audit log. Its review stays open until it is answered
or its time is up, and an approval is refused. The champion cannot be withdrawn: see the DAG `rollback`.
"""

with DAG(
    WITHDRAW,
    description="Takes a waiting candidate back.",
    doc_md=DOC,
    schedule=None,
    catchup=False,
    is_paused_upon_creation=False,
    default_args=DEFAULT_ARGS,
    params={
        "model": Param(
            type="string",
            pattern=MODEL_PATTERN,
            title="Model",
            description="Its name in the registry, such as demo-binary.",
        ),
        "version": Param(type="string", pattern=VERSION_PATTERN, title="Version", description="Its number there."),
        "reason": Param(
            type="string",
            minLength=MIN_REASON_LENGTH,
            title="Reason",
            description="Why; kept with the decision for good.",
        ),
    },
    tags=["promote"],
) as dag:
    stage(
        "withdraw",
        *("--dag-run", "{{ run_id }}", "--", "{{ params.model }}", "{{ params.version }}"),
        pool="promotion",
        connections=["breakhis_airflow", "breakhis_audit", "breakhis_mlflow_promoter"],
    )
