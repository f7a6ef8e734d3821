#!/usr/bin/env bash
# One would guess that a column of type "str" is in the list of types ["str", "object"], since the expectation for one
# type succeeds on it with "str".
# With pandas 3, whose text columns have the type str, the list expectation fails on them. It raises no error and
# reports the observed value "str", which is in the list. On an object column it succeeds.
# This matters where a suite checks the columns of a table: after a move to pandas 3 it rejects every text column.
# Library: great_expectations 1.24.1 with pandas 3.1.1.
set -euo pipefail

gx="${GREAT_EXPECTATIONS_VERSION:-1.24.1}"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile --disable-pip-version-check "great-expectations==$gx" pandas==3.1.1

GX_ANALYTICS_ENABLED=false venv/bin/python -W ignore - 2> errors.txt <<'PY' || { cat errors.txt >&2; exit 1; }
import sys

import great_expectations as gx
import great_expectations.expectations as gxe
import pandas as pd

print("great_expectations", gx.__version__, "with pandas", pd.__version__)
context = gx.get_context(mode="ephemeral")
asset = context.data_sources.add_pandas("tables").add_dataframe_asset("slides")
batches = asset.add_batch_definition_whole_dataframe("whole")
text = pd.DataFrame({"slide": ["22549AB", "14134"]})
one = gxe.ExpectColumnValuesToBeOfType(column="slide", type_="str")
several = gxe.ExpectColumnValuesToBeInTypeList(column="slide", type_list=["str", "object"])

print("The same text column is of type 'str', but not in the list ['str', 'object']:")
for title, table, expectation, expected in (
    ("column of type str, one type", text, one, True),
    ("column of type str, list of types", text, several, False),
    ("column of type object, list of types", text.astype(object), several, True),
):
    result = batches.get_batch({"dataframe": table}).validate(expectation)
    print(f"  {title}: success={result.success}, observed {result.result.get('observed_value', 'row by row')}")
    if result.success != expected or result.exception_info.get("raised_exception"):
        sys.exit(f"CHANGED: {title}: success={result.success}, {result.exception_info}")
PY
