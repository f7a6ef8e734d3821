"""The DAG ``audit``: checks every day that the audit log is whole and that the champions are those it names."""

from airflow.sdk import DAG

from breakhis_airflow.operators import DEFAULT_ARGS
from breakhis_airflow.places import stage

DOC = """
Is the record of promotions whole, and are the champions in use those that were approved?

Fails, and by `notifications.yaml` tells somebody, where a record of the audit log was edited, deleted, reordered or cut
off, a decision was not carried out, the alias `champion` or `previous` of a model is not where the log says, or the
files, metrics or evidence of either version were changed since. The task's error says which.
The same by hand: `breakhis audit verify`. What was decided about a model: `breakhis history MODEL`. An alias is put
right by the DAG `rollback`; a log that was tampered with has to be restored from a backup of the store.
"""

with DAG(
    "audit",
    description="Checks the audit log and the champions.",
    doc_md=DOC,
    schedule="@daily",
    catchup=False,
    is_paused_upon_creation=False,
    default_args=DEFAULT_ARGS,
    tags=["promote"],
) as dag:
    stage("audit", "verify", connections=["breakhis_audit", "breakhis_mlflow_promoter"])
