"""The DAG ``try_notifications``, where notifications.yaml names a notifier: sends a trial message."""

from pathlib import Path

from airflow.sdk import DAG, get_current_context, task
from airflow.sdk.exceptions import AirflowFailException

from breakhis_airflow.notifications import (
    Failure,
    Review,
    find_notification_files,
    read_notifications,
    send_notifications,
)
from breakhis_airflow.run_conf import refuse_unknown_conf
from breakhis_airflow.yaml_dags import build_dags
from ml.core.settings import read_settings

DOC = """
Is somebody told when something fails, and when a review waits? A run of this DAG sends what a failing task and a review
would, by every notifier in `{file}`. It is green if all went out; the error of one that did not is in the task's log.

{notifiers}
"""


def build_trial_dag(file: Path) -> DAG:
    """Builds the DAG that sends a trial message by each notifier in the file."""
    notifications = read_notifications(file)
    with DAG(
        "try_notifications",
        description="Sends a trial message by each notifier in notifications.yaml.",
        doc_md=DOC.format(
            file=file,
            notifiers="\n".join(f"- {place}: `{notification.notifier}`" for place, notification in notifications),
        ),
        schedule=None,
        is_paused_upon_creation=False,
        default_args={"owner": "breakhis", "pre_execute": refuse_unknown_conf},
        tags=["notifications"],
        auto_register=False,
    ) as dag:

        @task
        def send() -> None:
            """Sends messages about a failure and a review that there are not."""
            context = get_current_context()
            ti = context["ti"]
            error = "This is a trial: nothing has failed."
            failure = Failure(ti.dag_id, ti.run_id, ti.task_id, error, ti.log_url, ())
            review = Review(
                "This is a trial: nothing waits for a review.", ti.log_url, "", read_settings().review_hours
            )
            problems = send_notifications(notifications.on_failure, context, failure=failure)
            problems += send_notifications(notifications.on_review, context, review=review)
            if problems:
                raise AirflowFailException("; ".join(f"{type(problem).__name__}: {problem}" for problem in problems))

        send()
    return dag


globals().update(build_dags(find_notification_files(read_settings().conf), build_trial_dag, prefix="try"))
