#!/usr/bin/env bash
# One would guess that EfficientNetB0(weights="imagenet") and EfficientNetB0(weights=PATH) are the same network, where
# PATH is the very file that the first downloads.
# The first has one more Rescaling layer, which divides the normalised pixels by the square root of a standard deviation
# (0.229, 0.224, 0.225) once more. Given by path, the network gets inputs about half as large and says nothing.
# This matters where weights cannot be downloaded and come from a file: features differ from everybody else's.
# Library: keras 3.15.1 with tensorflow 2.21.0. The weights are random and saved here. The function by which Keras
# fetches a file is replaced by one that hands over this file, so nothing is downloaded.
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
from keras.src.utils import file_utils

print("keras", keras.__version__)
file = "random.weights.h5"
options = {"include_top": False, "input_shape": (32, 32, 3)}
keras.applications.EfficientNetB0(weights=None, **options).save_weights(file)
file_utils.get_file = lambda *asked, **more: file

by_path = keras.applications.EfficientNetB0(weights=file, **options)
by_name = keras.applications.EfficientNetB0(weights="imagenet", **options)


def normalised(network, pixels):
    """What the first convolution gets, before its padding."""
    part = keras.Model(network.input, network.get_layer("stem_conv_pad").input)
    return part.predict(pixels, verbose=0)


pixels = np.full((1, 32, 32, 3), 200, "float32")
ratio = (normalised(by_name, pixels) / normalised(by_path, pixels))[0, 0, 0]
expected = 1 / np.sqrt([0.229, 0.224, 0.225])
print("The same file, given by path and as 'imagenet':")
print(f"  layers: {len(by_path.layers)} by path, {len(by_name.layers)} by name")
print(f"  the first convolution gets {ratio.round(4)} times as much in red, green and blue by name")
print(f"  1 / sqrt(standard deviation) is {expected.round(4)}")
if len(by_name.layers) != len(by_path.layers) + 1:
    sys.exit("CHANGED: the two no longer differ by one layer")
if not np.allclose(ratio, expected, rtol=1e-4):
    sys.exit("CHANGED: the inputs no longer differ by 1 / sqrt(standard deviation)")
PY
