"""The DAG ``remind``: reminds of reviews that nobody has answered, and tells of those that nobody can answer."""

from airflow.sdk import DAG, get_current_context, task

from breakhis_airflow.operators import DEFAULT_ARGS

DOC = """
Reviews have a deadline (`BREAKHIS_REVIEW_HOURS`), after which they count as rejected. Every hour this DAG looks for
those of promotions and rollbacks that have used up half of their time, and sends a reminder of each, once, by the
notifiers under `on_review` in `notifications.yaml`. Without any it does nothing.
The task `tell` tells once, in the same way, of each review of a promotion that is open by the audit log while its run
ended without a decision or is in Airflow no more, as somebody has marked or deleted it. Its result lists these runs.
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

    @task
    def tell() -> list[str]:
        """Tells of reviews that nobody can answer any more; returns the runs whose reviews they are."""
        from breakhis_airflow.failures import explained_failures
        from breakhis_airflow.reminders import tell_of_unanswerable_reviews

        with explained_failures("tell"):
            return tell_of_unanswerable_reviews(get_current_context())

    remind()
    tell()
