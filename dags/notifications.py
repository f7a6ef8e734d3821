"""The DAG ``try_notifications``, where notifications.yaml names a notifier: sends a trial message."""

from pathlib import Path

from airflow.sdk import DAG, get_current_context, task
from airflow.sdk.exceptions import AirflowFailException

from breakhis_airflow.declared import dags_of
from breakhis_airflow.notifications import Failure, notification_files, read_notifications, tell
from ml.settings import settings

DOC = """
Is somebody told when something fails? A run of this DAG sends what a failing task would, by every notifier in `{file}`.
It is green if all went out; the error of one that did not is in the task's log.

{notifiers}
"""


def trial(file: Path) -> DAG:
    """The DAG that tries out the file."""
    wanted = read_notifications(file)
    with DAG(
        "try_notifications",
        description="Sends a trial message by each notifier in notifications.yaml.",
        doc_md=DOC.format(file=file, notifiers="\n".join(f"- `{one.notifier}`" for one in wanted.on_failure)),
        schedule=None,
        is_paused_upon_creation=False,
        default_args={"owner": "breakhis"},
        tags=["notifications"],
        auto_register=False,
    ) as dag:

        @task
        def send() -> None:
            """Tell of a failure that was none."""
            context = get_current_context()
            ti = context["ti"]
            error = "This is a trial: nothing has failed."
            problems = tell(wanted, context, Failure(ti.dag_id, ti.run_id, ti.task_id, error, ti.log_url, ()))
            if problems:
                raise AirflowFailException("; ".join(f"{type(one).__name__}: {one}" for one in problems))

        send()
    return dag


globals().update(dags_of(notification_files(settings().conf), trial, prefix="try"))
