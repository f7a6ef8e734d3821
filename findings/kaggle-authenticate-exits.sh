#!/usr/bin/env bash
# One would guess that importing the kaggle package does nothing, and that authenticate() without credentials raises an
# error of the package's own that a caller can catch.
# The import itself authenticates: without credentials it prints a page of advice on standard output, and goes on.
# authenticate() prints the same page and raises SystemExit, which passes every `except Exception` and ends the process.
# This matters where a source is read inside a long task or worker: missing credentials must become a named error.
# Library: kaggle 2.2.4, with six 1.17.0, which it imports and does not declare. Nothing is sent: without credentials it
# stops before any request.
set -euo pipefail

kaggle="${KAGGLE_VERSION:-2.2.4}"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile --disable-pip-version-check "kaggle==$kaggle" six==1.17.0
# A home of its own, so that no credentials are found.
mkdir home
bare=(env -i "PATH=$PATH" "HOME=$work/home" venv/bin/python)

venv/bin/python -c 'import importlib.metadata; print("kaggle", importlib.metadata.version("kaggle"))'
cat > guarded.py <<'PY'
from kaggle.api.kaggle_api_extended import KaggleApi

try:
    KaggleApi().authenticate()
except Exception as error:
    print("caught", type(error).__name__)
except SystemExit as stop:
    print("SystemExit, code", stop.code)
PY
"${bare[@]}" -c 'import kaggle' > imported.txt 2> /dev/null
"${bare[@]}" guarded.py > guarded.txt 2> /dev/null
echo "The import alone prints $(wc -l < imported.txt) lines on standard output, the first of them:"
sed -n '1s/^/  /p' imported.txt
echo "authenticate() inside 'except Exception' ends with:"
sed -n '$s/^/  /p' guarded.txt
if [ ! -s imported.txt ]; then
  echo "CHANGED: importing kaggle without credentials prints nothing any more" >&2
  exit 1
fi
if ! tail -n 1 guarded.txt | grep -q '^SystemExit, code 1$'; then
  echo "CHANGED: authenticate() without credentials no longer raises SystemExit" >&2
  exit 1
fi
