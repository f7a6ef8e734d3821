"""The DAG ``remind``: reminds of reviews that nobody has answered when half of their time has passed."""

from airflow.sdk import DAG, get_current_context, task

from breakhis_airflow.operators import DEFAULT_ARGS

DOC = """
Reviews have a deadline (`BREAKHIS_REVIEW_HOURS`), after which they count as rejected. Every hour this DAG looks for
those of promotions and rollbacks that have used up half of their time, and sends a reminder of each, once, by the
notifiers under `on_review` in `notifications.yaml`. Without any it does nothing.
The result of the task `remind` lists the runs that it has reminded of. Waiting reviews are under *Reviews* in the
menu, and under *Required actions*.
"""

with DAG(
    "remind",
    description="Reminds of reviews that wait.",
    doc_md=DOC,
    schedule="@hourly",
    catchup=False,
    is_paused_upon_creation=False,
    default_args=DEFAULT_ARGS,
    tags=["promote"],
) as dag:

    @task
    def remind() -> list[str]:
        """Sends the reminders that are due; returns the runs whose reviews they are of."""
        from breakhis_airflow.failures import explained_failures
        from breakhis_airflow.reminders import send_reminders

        with explained_failures("remind"):
            return send_reminders(get_current_context())

    remind()
