#!/usr/bin/env bash
# One would guess that a served model whose signature says "binary" gets the same bytes from each JSON form of request.
# From dataframe_split and dataframe_records the base64 text is decoded. From inputs and instances it is not: the model
# gets the letters of the text as its bytes, and the answer is still 200.
# This matters where pictures are sent to a served model: half of the documented forms hand it something else.
# Library: mlflow 3.17.2. The scoring server is called in process, without a port.
set -euo pipefail

mlflow="${MLFLOW_VERSION:-3.17.2}"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile --disable-pip-version-check "mlflow==$mlflow" httpx==0.28.1

cat > model.py <<'PY'
import mlflow


class Echo(mlflow.pyfunc.PythonModel):
    """Answers with the bytes that it was given, in hexadecimal digits."""

    def predict(self, context, model_input, params=None):
        return [picture.hex() for picture in model_input["picture"]]


mlflow.models.set_model(Echo())
PY
venv/bin/python -W ignore - 2> errors.txt <<'PY' || { cat errors.txt >&2; exit 1; }
import base64
import sys

import mlflow
from fastapi.testclient import TestClient
from mlflow.models import ModelSignature
from mlflow.pyfunc import scoring_server
from mlflow.types import ColSpec, DataType, Schema

print("mlflow", mlflow.__version__)
signature = ModelSignature(Schema([ColSpec(DataType.binary, "picture")]), Schema([ColSpec(DataType.string)]))
mlflow.pyfunc.save_model("stored", python_model="model.py", signature=signature, pip_requirements=["mlflow"])
client = TestClient(scoring_server.init(mlflow.pyfunc.load_model("stored")))

picture = b"\x89PNG\r\n"
text = base64.b64encode(picture).decode()
print(f"Bytes {picture.hex()} are sent as {text!r}; the model gets:")
forms = {
    "dataframe_split": {"columns": ["picture"], "data": [[text]]},
    "dataframe_records": [{"picture": text}],
    "inputs": {"picture": [text]},
    "instances": [{"picture": text}],
}
for form, content in forms.items():
    answer = client.post("/invocations", json={form: content})
    got = bytes.fromhex(answer.json()["predictions"][0]) if answer.status_code == 200 else None
    print(f"  {form}: status {answer.status_code}, {got}")
    decoded = form.startswith("dataframe")
    if got != (picture if decoded else text.encode()):
        sys.exit(f"CHANGED: {form} is no longer {'decoded' if decoded else 'handed over as it stands'}")
PY
