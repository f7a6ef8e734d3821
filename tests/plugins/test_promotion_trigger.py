import pytest
from airflow.sdk.exceptions import DagRunTriggerException

from breakhis_airflow.promotion_trigger import PromotionTrigger

TRAINED = {"task": "binary", "run_id": "abc", "inputs": {"dataset": "dataset-1", "ledger": "main", "seed": 7}}


@pytest.fixture
def trigger():
    return PromotionTrigger(
        task_id="trigger_promote_binary",
        trained_by="train_binary",
        trigger_dag_id="promote",
        trigger_run_id="demo-binary-v1",
        logical_date=None,
        skip_when_already_exists=True,
    )


def run(trigger, context, trained):
    made = context()
    made["ti"].xcom_pull = lambda task_ids: {"train_binary": trained}[task_ids]
    with pytest.raises(DagRunTriggerException) as raised:
        trigger.execute(made)
    assert (raised.value.dag_run_id, raised.value.skip_when_already_exists) == ("demo-binary-v1", True)
    return made["ti"].pushed.get("return_value")


def test_a_training_that_found_nothing_new_says_what_it_compared(trigger, context, capsys):
    said = run(trigger, context, {**TRAINED, "reused": True})
    assert said["compared"] == TRAINED["inputs"]
    assert "dataset dataset-1, ledger main, seed 7 are those of MLflow run abc" in said["nothing_new"]
    assert said["nothing_new"] in capsys.readouterr().out


@pytest.mark.parametrize("trained", [{**TRAINED, "reused": False}, {"task": "binary", "run_id": "a", "reused": True}])
def test_any_other_training_is_handed_over_in_silence(trigger, context, trained):
    assert run(trigger, context, trained) is None
