#!/usr/bin/env bash
# One would guess that five folds over six groups each hold at least one group.
# StratifiedGroupKFold can leave a test fold empty, without an error or a warning: by rounding alone, a fold that holds
# groups already can come out better than an empty one.
# This matters where folds are dealt by patient or slide: one model in five would be tested on nothing.
# Library: scikit-learn 1.9.1.
set -euo pipefail

sklearn="${SCIKIT_LEARN_VERSION:-1.9.1}"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile --disable-pip-version-check "scikit-learn==$sklearn"

venv/bin/python - <<'PY'
import sys
import warnings

import numpy as np
import sklearn
from sklearn.model_selection import StratifiedGroupKFold

print("scikit-learn", sklearn.__version__)
tables = [  # pictures of each group, and the class of each group
    ([11, 16, 29, 17, 16, 22], [0, 1, 0, 3, 4, 2]),
    ([12, 16, 15, 24, 26, 8], [0, 1, 2, 3, 0, 0]),
    ([23, 12, 13, 28, 19, 23], [1, 2, 3, 0, 4, 1]),
]
print("Pictures in the five test folds of six groups:")
empty = 0
warnings.simplefilter("error")  # a warning would end this
for pictures, classes in tables:
    labels = np.repeat(classes, pictures)
    groups = np.repeat(range(len(pictures)), pictures)
    folds = [len(test) for _, test in StratifiedGroupKFold(5).split(labels, labels, groups)]
    print(f"  groups of {pictures}, classes {classes}: {folds}")
    empty += 0 in folds
if not empty:
    sys.exit("CHANGED: no fold is empty in any of these tables")
PY
