import pytest

from ml.core.settings import Settings
from ml.training.run_note import RANDOM_WEIGHTS, write_run_note

FACTS = {
    "set": "small",
    "task": "binary",
    "dataset": "dataset-1",
    "split": "split-2",
    "ledger": "ledger-3",
    "preset": "demo",
    "description": "Small and quick.",
    "seed": "7",
    "weights": "weights-4",
    "weights_kind": "imagenet",
    "sides": {
        "train": {"images": 1200, "cases": 40},
        "validation": {"images": 300, "cases": 10},
        "test": {"images": 400, "cases": 12},
    },
}
METRICS = {"patient_recall": 0.9, "roc_auc": 0.95, "macro_f1": 0.8, "accuracy": 0.7}


def write(facts=FACTS, *, pretrained=True, intervals=None, **settings):
    made = Settings(mlflow_uri="sqlite:///nothing.db", **settings)
    ends = {"roc_auc": (0.91, 0.97)} if intervals is None else intervals
    return write_run_note(
        facts, METRICS, ends, run_id="r", experiment_id="5", pretrained=pretrained, settings=made
    ).splitlines()


def test_the_note_says_in_ten_lines_what_the_run_is():
    lines = write(
        pretrained=False,
        mlflow_ui="http://mlflow",
        airflow_ui="http://airflow/",
        dag="retrain_small",
        dag_run="manual__2026-01-01T00:00:00+00:00",
    )
    assert len(lines) == 10
    assert lines[0] == RANDOM_WEIGHTS
    assert lines[1:7] == [
        "- Training set: small, task binary, dataset dataset-1",
        "- Images: 1,900 (1,200 train, 300 validation, 400 test)",
        "- Patients: 62 (40 train, 10 validation, 12 test); split split-2 of ledger ledger-3",
        "- Preset: demo, seed 7. Small and quick.",
        "- Backbone weights: imagenet (weights-4)",
        "- Result on the test side: recall (sensitivity) of patients 0.900 (no interval); "
        "ROC AUC of images 0.950 (95% interval 0.910 to 0.970); macro-F1 of images 0.800 (no interval)",
    ]
    page = "http://mlflow/#/experiments/5/runs/r/artifacts/evaluation/report.html?workflowType=machine_learning"
    assert f"({page})" in lines[7]
    assert "(http://airflow/breakhis/reviews/)" in lines[8]
    assert "(http://airflow/dags/retrain_small/runs/manual__2026-01-01T00%3A00%3A00%2B00%3A00)" in lines[9]


def test_without_addresses_the_note_has_no_links():
    lines = write()
    assert not any("](" in line for line in lines)
    assert lines[-1].endswith("trained from the command line")
    assert write(dag="retrain_small", dag_run="manual")[-1] == "- Airflow run: retrain\\_small, manual"


@pytest.mark.parametrize("name", ["set", "description", "preset"])
def test_what_users_wrote_stays_text_on_its_line(name):
    lines = write({**FACTS, name: "a\n\n# b [c](http://d) <img src=x>"})
    assert len(lines) == 9
    assert not any("[c]" in line or "<img" in line.replace("\\<", "") for line in lines)
