"""The DAG ``promote``: one run per candidate model version, from its gates over a reviewer's answer to the registry."""

from airflow.providers.standard.operators.empty import EmptyOperator
from airflow.sdk import DAG, Param, chain, task

from breakhis_airflow.operators import DEFAULT_ARGS
from breakhis_airflow.places import stage
from breakhis_airflow.review_operator import ReviewOperator
from breakhis_airflow.run_conf import EVIDENCE_PATTERN, MODEL_PATTERN, VERSION_PATTERN
from ml.promotion.reviews import PROMOTE, review_tasks

DOC = """
May this model version become the champion? A retraining starts a run here for each model it made.

1. **gate** holds the version's evidence against the promotion policy. Blocked versions end here; the task's error says
   which gate failed and by how much. So do versions that were rejected or withdrawn before, those of which it is not
   known who started their training, and those that breakhis did not register.
2. **review** waits for a reviewer. Read the evidence on its page, give a reason, and approve or reject there. Waiting
   reviews are listed under *Reviews*, and under *Required actions*. Who started the retraining cannot approve its
   models. Where the policy asks for several approvals, **review_2** and **review_3** wait for other people. What nobody
   answers in time is rejected.
3. **promote** reads the answer in Airflow's own record and carries it out: an approved version becomes the champion, a
   rejected one is a candidate no longer. Either way the decision is written down for good, with reviewer and reason.
4. **approved** or **rejected** is green: that was the decision. The other one is skipped.

Marking a task as success by hand promotes nothing: **promote** finds no answer and refuses.

A review that was answered without a reason goes on waiting: the answer is kept in the audit log and does not count.
Where **promote** says that something changed since the review, press *Trigger* and give the same model, version and
evidence again: a cleared review would show what was there before.

A reviewer's rejection is final for this version and evidence: clearing, pausing or another run does not undo it, and a
review that was rejected asks nobody again. What nobody answered in time may be asked anew in another run. Do not delete
a run whose review was asked, or the review: what was answered there is not known then, and the version cannot be
promoted any more.
"""

with DAG(
    PROMOTE,
    description="Gates, review and promotion of one model version.",
    doc_md=DOC,
    schedule=None,
    catchup=False,
    # A reviewer takes hours, for which other candidates must not wait. Stages that must not overlap are in a pool.
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
        "version": Param(type="string", pattern=VERSION_PATTERN, title="Version", description="Its number there."),
        "evidence": Param(
            type="string",
            pattern=EVIDENCE_PATTERN,
            title="Evidence",
            description="What the version is judged on: the id that the task register_… returned.",
        ),
    },
    tags=["promote"],
) as dag:
    evidence, candidate = ("--evidence", "{{ params.evidence }}"), ("--", "{{ params.model }}", "{{ params.version }}")

    gate = stage(
        "gate", *evidence, *candidate, connections=["breakhis_airflow", "breakhis_audit", "breakhis_mlflow_promoter"]
    )
    reviews = [
        ReviewOperator(
            task_id=task_id,
            subject=gate.value("title"),
            body=gate.value("review"),
            number=number,
            approvals=gate.value("approvals"),
        )
        for number, task_id in enumerate(review_tasks(PROMOTE), start=1)
    ]
    promote = stage(
        "promote",
        *(*evidence, "--dag-run", "{{ run_id }}", *candidate),
        pool="promotion",
        connections=["breakhis_airflow", "breakhis_audit", "breakhis_mlflow_promoter"],
        trigger_rule="none_failed_min_one_success",
    )

    @task.branch
    def decision(recorded: str) -> str:
        """Shows in the grid what was decided."""
        return recorded

    chain(gate, *reviews)
    (
        reviews
        >> promote
        >> decision(promote.value("decision"))
        >> [
            EmptyOperator(task_id="approved"),
            EmptyOperator(task_id="rejected"),
        ]
    )
