#!/usr/bin/env bash
# One would guess that a contract covers every module below its root package that Python can import.
# A folder without an __init__.py is importable, as a namespace package, but import-linter does not read it at all: an
# import that breaks a contract is kept there, exit code 0, and nothing says that files were left out.
# This matters where contracts hold the layers of a code base: one forgotten file switches them off in a folder.
# Tool: import-linter 2.17.
set -euo pipefail

linter="${IMPORT_LINTER_VERSION:-2.17}"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile --disable-pip-version-check "import-linter==$linter"

mkdir -p code/app/inner code/app/tools
cd code
touch app/__init__.py app/inner/__init__.py app/inner/secret.py
echo "import app.inner.secret" > app/tools/report.py
cat > .importlinter <<'CONFIG'
[importlinter]
root_package = app

[importlinter:contract:tools]
name = Nobody imports the secret module
type = protected
protected_modules =
    app.inner.secret
allowed_importers =
    app.inner
CONFIG

../venv/bin/python -c 'import importlib.metadata as m; print("import-linter", m.version("import-linter"))'
../venv/bin/python -c "import app.tools.report"
without=0
../venv/bin/lint-imports --no-cache > ../without.txt 2>&1 || without=$?
touch app/tools/__init__.py
with=0
../venv/bin/lint-imports --no-cache > ../with.txt 2>&1 || with=$?
echo "A forbidden import in app/tools, which Python imports either way:"
echo "  without __init__.py: exit code $without, $(grep 'Analyzed' ../without.txt), $(grep 'Contracts:' ../without.txt)"
echo "  with __init__.py:    exit code $with, $(grep 'Analyzed' ../with.txt), $(grep 'Contracts:' ../with.txt)"
if [ "$without" -ne 0 ] || grep -q tools ../without.txt; then
  echo "CHANGED: the folder without __init__.py is read or mentioned now" >&2
  exit 1
fi
if [ "$with" -ne 1 ] || ! grep -q "app.tools.report -> app.inner.secret" ../with.txt; then
  echo "CHANGED: the import is no longer found in a folder with __init__.py" >&2
  exit 1
fi
