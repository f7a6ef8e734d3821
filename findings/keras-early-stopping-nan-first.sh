#!/usr/bin/env bash
# One would guess that EarlyStopping treats a NaN as worse than any number, and restores the weights of the best epoch.
# A NaN in the first epoch becomes the best value and stays it, since no number is less than NaN: training stops after
# its patience however much it improves, and restore_best_weights brings back the weights of the epoch with the NaN.
# This matters where a metric is undefined for a while: an AUC over a validation set of one class, a loss in float16.
# Library: keras 3.15.1 with tensorflow 2.21.0.
set -euo pipefail

keras="${KERAS_VERSION:-3.15.1}"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile --disable-pip-version-check "keras==$keras" tensorflow==2.21.0

KERAS_HOME="$work" TF_CPP_MIN_LOG_LEVEL=3 CUDA_VISIBLE_DEVICES=-1 venv/bin/python - <<'PY'
import sys

import keras
import numpy as np

print("keras", keras.__version__)


class Score(keras.callbacks.Callback):
    """Reports the loss as a score of its own, undefined in one epoch."""

    def __init__(self, undefined):
        super().__init__()
        self.undefined = undefined
        self.scores, self.slopes = [], []

    def on_epoch_end(self, epoch, logs=None):
        logs["score"] = float("nan") if epoch == self.undefined else logs["loss"]
        self.scores.append(logs["score"])
        self.slopes.append(self.model.get_weights()[0].item())


def train(undefined):
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, kernel_initializer="zeros")])
    model.compile(keras.optimizers.SGD(0.1), "mse")
    x = np.linspace(-1, 1, 32, dtype="float32")[:, None]
    score = Score(undefined)
    stop = keras.callbacks.EarlyStopping("score", mode="min", patience=3, restore_best_weights=True)
    model.fit(x, 2 * x, epochs=12, batch_size=32, shuffle=False, verbose=0, callbacks=[score, stop])
    kept = score.slopes.index(model.get_weights()[0].item()) + 1
    return score.scores, stop.best, kept


print("Twelve epochs, each better than the last, patience 3:")
outcomes = {}
for name, undefined in (("NaN in the first epoch", 0), ("NaN in the second", 1)):
    scores, best, kept = outcomes[name] = train(undefined)
    print(f"  {name}: {len(scores)} epochs run, best {best:.3f}, weights kept are those of epoch {kept}")
    print("    scores", [round(score, 3) for score in scores])
scores, best, kept = outcomes["NaN in the first epoch"]
if not (np.isnan(best) and len(scores) == 4 and kept == 1):
    sys.exit("CHANGED: a NaN in the first epoch no longer stays the best")
scores, best, kept = outcomes["NaN in the second"]
if not (len(scores) == 12 and kept == 12):
    sys.exit("CHANGED: a NaN in a later epoch is no longer passed over")
PY
