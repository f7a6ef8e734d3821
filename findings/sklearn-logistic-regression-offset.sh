#!/usr/bin/env bash
# One would guess that adding a constant to every feature changes only the intercept of a logistic regression, which is
# not penalised, and that a solver that falls short of the solution says so.
# For a large constant neither holds.
# With its default solver LogisticRegression stops early at other coefficients, with other predictions, and no
# ConvergenceWarning: n_iter_ is far below max_iter, as if it had converged.
# This matters for a linear head on embeddings or intensities, which seldom have mean zero: they must be centred first.
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
from sklearn.linear_model import LogisticRegression

print("scikit-learn", sklearn.__version__)
draw = np.random.default_rng(0)
features = draw.normal(size=(400, 5))
labels = (features @ [2, -1, 1, 0, 0] + draw.logistic(size=400) > 0).astype(int)
warnings.simplefilter("error")  # a ConvergenceWarning would end this
print("The same features with a constant added, iterations of at most 10,000:")
coefficients = {}
for offset in (0, 10, 1000, 10000):
    model = LogisticRegression(max_iter=10_000).fit(features + offset, labels)
    coefficients[offset] = model.coef_[0]
    accuracy = model.score(features + offset, labels)
    print(f"  +{offset}: {model.n_iter_[0]} iterations, accuracy {accuracy:.4f}, coefficients", model.coef_[0].round(2))
if not np.allclose(coefficients[10], coefficients[0], atol=0.05):
    sys.exit("CHANGED: even a small constant changes the coefficients now")
if np.allclose(coefficients[10000], coefficients[0], atol=0.2):
    sys.exit("CHANGED: a large constant no longer changes the coefficients")
PY
