#!/usr/bin/env bash
# One would guess that each run with a metric is found by ">= 0" or by "< 0".
# A run whose metric is NaN is found by neither, nor by "= 0". "!= 1" finds it, and both directions sort it last.
# This matters where good or broken runs are listed by a metric: a run that diverged is in neither list.
# Library: mlflow 3.17.2 with its SQLite store.
set -euo pipefail

mlflow="${MLFLOW_VERSION:-3.17.2}"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile --disable-pip-version-check "mlflow==$mlflow"

venv/bin/python -W ignore - 2> errors.txt <<'PY' || { cat errors.txt >&2; exit 1; }
import sys

import mlflow

print("mlflow", mlflow.__version__)
mlflow.set_tracking_uri("sqlite:///runs.db")
experiment = mlflow.create_experiment("search", artifact_location="artifacts")
for name, auc in {"good": 0.9, "zero": 0.0, "diverged": float("nan")}.items():
    with mlflow.start_run(experiment_id=experiment, run_name=name):
        mlflow.log_metric("auc", auc)


def found(**asked):
    runs = mlflow.search_runs([experiment], output_format="list", **asked)
    return [run.info.run_name for run in runs]


print("A run whose metric is NaN is found by '!=' alone:")
for condition in ("= 0", ">= 0", "< 0", "!= 1"):
    names = found(filter_string=f"metrics.auc {condition}")
    print(f"  metrics.auc {condition}: {names}")
    if ("diverged" in names) != (condition == "!= 1"):
        sys.exit(f"CHANGED: '{condition}' treats NaN otherwise")
for direction in ("ASC", "DESC"):
    names = found(order_by=[f"metrics.auc {direction}"])
    print(f"  order by metrics.auc {direction}: {names}")
    if names[-1] != "diverged":
        sys.exit(f"CHANGED: NaN is no longer last in order {direction}")
PY
