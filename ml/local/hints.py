"""What a retraining that ended well does not show in Airflow's lists, for ``breakhis status``."""

from ml.core.airflow_api import AirflowApi
from ml.core.errors import AirflowError
from ml.core.messages import cut_text, list_items
from ml.promotion.reviews import PROMOTE

_RETRAIN = "retrain_"


def find_hints(api: AirflowApi) -> list[str]:
    """Returns a text for each DAG ``promote`` that keeps candidates waiting, and each retraining with nothing new."""
    dags = {dag["dag_id"]: dag for dag in api.dags()}
    hints = []
    if dags.get(PROMOTE, {}).get("is_paused"):
        hints += _find_waiting_candidates(api)
    for name in sorted(dags):
        if name.startswith(_RETRAIN):
            hints += _find_nothing_new(api, name)
    return hints


def _find_waiting_candidates(api: AirflowApi) -> list[str]:
    waiting = [run["dag_run_id"] for run in api.list_queued_runs(PROMOTE)]
    if not waiting:
        return []
    return [
        f"the DAG {PROMOTE} is paused, and {len(waiting)} of its runs wait for that ({list_items(waiting)}): unpause "
        "it in Airflow to have the gates checked and the reviewers asked"
    ]


def _find_nothing_new(api: AirflowApi, dag: str) -> list[str]:
    """Returns what the tasks that hand over said in the latest run of a retraining, if that found nothing new."""
    run = api.find_latest_run(dag)
    if run is None:
        return []
    said = []
    for task in api.task_instances(dag, run["dag_run_id"]):
        if not task["task_id"].startswith("trigger_promote_"):
            continue
        try:
            value = api.xcom(dag, run["dag_run_id"], task["task_id"])
        except AirflowError as error:
            if error.status != 404:  # it trained, or has not come so far
                raise
            continue
        if isinstance(value, dict) and value.get("nothing_new"):
            said.append(f"{dag}, run {run['dag_run_id']}: {cut_text(value['nothing_new'], 600)}")
    return said
