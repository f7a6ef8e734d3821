#!/usr/bin/env bash
# One would guess that Series.to_numpy(dtype=str) gives the texts, with some word in place of a missing one.
# With pandas 3 and pyarrow, one missing value makes every text come back as its first letter, without a warning.
# A column without a missing value is not cut, and numpy.asarray(series, dtype=str) cuts nothing either.
# This matters wherever names of cases or slides become the groups of a split: all that begin alike become one group.
# Library: pandas 3.1.1 with pyarrow 25.0.1.
set -euo pipefail

pandas="${PANDAS_VERSION:-3.1.1}"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile --disable-pip-version-check "pandas==$pandas" pyarrow==25.0.1

venv/bin/python - <<'PY'
import sys

import numpy as np
import pandas as pd

print(f"pandas {pd.__version__}")
whole = pd.Series(["adenosis", "fibroadenoma"])
partly = pd.Series(["adenosis", "fibroadenoma", None])
print("A text column with one missing value is cut to first letters by to_numpy(dtype=str):")
print("  none missing, to_numpy:", whole.to_numpy(dtype=str))
print("  one missing, to_numpy: ", partly.to_numpy(dtype=str))
print("  one missing, asarray:  ", np.asarray(partly, dtype=str))
if list(whole.to_numpy(dtype=str)) != ["adenosis", "fibroadenoma"]:
    sys.exit("CHANGED: texts of a column without a missing value are no longer kept")
if list(partly.to_numpy(dtype=str))[:2] != ["a", "f"]:
    sys.exit("CHANGED: texts beside a missing value are no longer cut to their first letter")
if list(np.asarray(partly, dtype=str))[:2] != ["adenosis", "fibroadenoma"]:
    sys.exit("CHANGED: numpy.asarray no longer keeps the texts")
PY
