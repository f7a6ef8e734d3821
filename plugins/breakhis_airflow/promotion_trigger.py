"""The last task of a retraining: it hands a candidate over to the DAG ``promote``."""

from typing import Any

from airflow.providers.standard.operators.trigger_dagrun import TriggerDagRunOperator
from airflow.sdk import Context

from ml.core.messages import cut_text

Json = dict[str, Any]


class PromotionTrigger(TriggerDagRunOperator):
    """Triggers ``promote``, and says first if the training found nothing new, with what it compared.

    That is this task's log and XCom. A note on the run of the DAG would need the right to change runs: Airflow lets no
    task write one on its own run, and the service account only reads.

    :param trained_by: The task ``train`` whose result says whether anything was trained.
    """

    def __init__(self, *, trained_by: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.trained_by = trained_by

    def execute(self, context: Context) -> None:
        """Triggers the run; where that exists already, Airflow skips this task."""
        ti = context["ti"]
        trained = ti.xcom_pull(task_ids=self.trained_by)
        if trained["reused"] and "inputs" in trained:  # results of before an update have none
            found = _describe_nothing_new(trained)
            self.log.info("%s", found)
            ti.xcom_push(key="return_value", value={"nothing_new": found, "compared": trained["inputs"]})
        super().execute(context)


def _describe_nothing_new(trained: Json) -> str:
    """Returns what a training compared that found a finished run of the same inputs."""
    compared = ", ".join(f"{name} {cut_text(value, 80)}" for name, value in trained["inputs"].items())
    return (
        f"nothing new for the task {trained['task']}: {compared} are those of MLflow run {trained['run_id']}, "
        "so nothing was trained"
    )
