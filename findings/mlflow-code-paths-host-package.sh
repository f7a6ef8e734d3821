#!/usr/bin/env bash
# One would guess that a pyfunc model saved with code_paths runs with the code that was saved along with it.
# Where the loading process has already imported a package of that name, the model runs with the host's package, even
# for submodules that nobody had imported before. Nothing warns of it, and the answers are those of other code.
# This matters where a registered model is scored again by a process that has imported a newer version of the package.
# Library: mlflow 3.17.2.
set -euo pipefail

mlflow="${MLFLOW_VERSION:-3.17.2}"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile --disable-pip-version-check "mlflow==$mlflow"

for place in saved host; do
  mkdir -p "$place/tissue"
  echo "RULE = 'the $place rule'" > "$place/tissue/__init__.py"
  echo "THRESHOLD = 'the $place threshold'" > "$place/tissue/late.py"
done
cat > model.py <<'PY'
import mlflow


class Answers(mlflow.pyfunc.PythonModel):
    def predict(self, context, model_input: list[str], params=None) -> list[str]:
        import tissue
        import tissue.late

        return [tissue.RULE, tissue.late.THRESHOLD]


mlflow.models.set_model(Answers())
PY
cat > load.py <<'PY'
import sys

import mlflow

if sys.argv[1] == "imported":
    sys.path.insert(0, "host")
    import tissue
print(mlflow.pyfunc.load_model("stored").predict(["a picture"]))
PY
venv/bin/python - 2> /dev/null <<'PY'
import mlflow

print("mlflow", mlflow.__version__)
mlflow.pyfunc.save_model("stored", python_model="model.py", code_paths=["saved/tissue"], pip_requirements=["mlflow"])
PY
venv/bin/python load.py fresh > fresh.txt 2> /dev/null
venv/bin/python load.py imported > imported.txt 2> said.txt
echo "The same stored model, in a fresh process and in one that has imported another package of that name:"
echo "  fresh:    $(cat fresh.txt)"
echo "  imported: $(cat imported.txt)"
echo "  warnings that name the package: $(grep -c tissue said.txt || true)"
if ! grep -q "the saved rule.*the saved threshold" fresh.txt; then
  echo "CHANGED: a fresh process no longer runs the saved code" >&2
  exit 1
fi
if ! grep -q "the host rule.*the host threshold" imported.txt; then
  echo "CHANGED: the model no longer runs with the host's package" >&2
  exit 1
fi
if grep -q tissue said.txt; then
  echo "CHANGED: something is said about the package now" >&2
  exit 1
fi
