#!/usr/bin/env bash
# One would guess that set_experiment(name) either raises or makes the experiment that it returns the active one.
# When another process creates the experiment between its look-up and its creation, it returns the other's experiment
# and leaves the active one as it was: the next start_run writes to the experiment "Default".
# This matters where two trainings begin at once on a new MLflow: one of them logs where nobody looks, with no warning.
# The script plays the other process at the moment at which MLflow logs that it creates the experiment.
# Library: mlflow 3.17.2 with its SQLite store.
set -euo pipefail

mlflow="${MLFLOW_VERSION:-3.17.2}"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile --disable-pip-version-check "mlflow==$mlflow"

venv/bin/python -W ignore - 2> errors.txt <<'PY' || { cat errors.txt >&2; exit 1; }
import logging
import sys

import mlflow

print("mlflow", mlflow.__version__)
mlflow.set_tracking_uri("sqlite:///runs.db")
others = mlflow.MlflowClient()


class OtherProcess(logging.Handler):
    met = False

    def emit(self, record):
        if "Creating a new experiment" in record.getMessage():
            OtherProcess.met = True
            others.create_experiment("retraining", artifact_location="artifacts")


logging.getLogger("mlflow.tracking.fluent").addHandler(OtherProcess())
returned = mlflow.set_experiment("retraining")
if not OtherProcess.met:
    sys.exit("CHANGED: set_experiment no longer logs that it creates one, so the other process could not be played")
with mlflow.start_run() as run:
    pass
used = mlflow.get_experiment(run.info.experiment_id).name
print(f"  set_experiment returned: {returned.name}")
print(f"  the run went to:         {used}")
if (returned.name, used) != ("retraining", "Default"):
    sys.exit("CHANGED: the experiment that was returned is the active one")
mlflow.set_experiment(experiment_id=returned.experiment_id)
with mlflow.start_run() as run:
    pass
print(f"  set again by its id:     {mlflow.get_experiment(run.info.experiment_id).name}")
PY
