#!/usr/bin/env bash
# One would guess that downloading a registered model whose files are gone fails.
# With a destination folder, MLflow says nothing and returns that folder, empty. Without a destination it raises, and so
# does the download of a run's artifacts either way. And logging to the run makes a new folder at the old place.
# This matters where a database and its files were moved to another folder: MLflow keeps absolute paths, so a pipeline
# copies nothing, or goes on at a place that nobody looks at.
# Library: mlflow 3.17.2.
set -euo pipefail

mlflow="${MLFLOW_VERSION:-3.17.2}"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile --disable-pip-version-check "mlflow==$mlflow"

cat > model.py <<'PY'
import mlflow


class Echo(mlflow.pyfunc.PythonModel):
    def predict(self, context, model_input: list[str], params=None) -> list[str]:
        return model_input


mlflow.models.set_model(Echo())
PY
venv/bin/python - 2> /dev/null <<'PY'
import sys
from pathlib import Path

import mlflow
from mlflow.exceptions import MlflowException

print("mlflow", mlflow.__version__)
before, now = Path("before").absolute(), Path("now").absolute()
before.mkdir()
mlflow.set_tracking_uri(f"sqlite:///{before}/mlflow.db")
experiment = mlflow.create_experiment("made", artifact_location=(before / "files").as_uri())
with mlflow.start_run(experiment_id=experiment) as run:
    mlflow.log_text("0.9", "evaluation/auc.txt")
    mlflow.pyfunc.log_model(
        name="model", python_model="model.py", pip_requirements=["mlflow"], registered_model_name="made"
    )
before.rename(now)
mlflow.set_tracking_uri(f"sqlite:///{now}/mlflow.db")


def download(uri: str, folder: str | None) -> str:
    if folder:
        Path(folder).mkdir()
    try:
        found = Path(mlflow.artifacts.download_artifacts(uri, dst_path=folder))
    except MlflowException as error:
        return f"raises {type(error).__name__}"
    return f"a folder with {sum(1 for _ in found.rglob('*'))} files"


told = {
    "the model, into a folder": download("models:/made/1", "one"),
    "the model, where it lies": download("models:/made/1", None),
    "the run's artifacts, into a folder": download(f"runs:/{run.info.run_id}/evaluation", "two"),
}
mlflow.MlflowClient().log_text(run.info.run_id, "late", "gates/late.txt")
told["the old folder, after logging to the run"] = "is there again" if before.exists() else "is not there"
for what, outcome in told.items():
    print(f"  {what}: {outcome}")
expected = ["a folder with 0 files", "raises MlflowException", "raises MlflowException", "is there again"]
if list(told.values()) != expected:
    sys.exit("CHANGED")
PY
