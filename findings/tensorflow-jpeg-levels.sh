#!/usr/bin/env bash
# One would guess that TensorFlow and Pillow decode one JPEG file to the same pixels, both being built on libjpeg-turbo.
# By default TensorFlow uses a faster, less exact inverse transform: most values differ, some by several levels of 255.
# With dct_method="INTEGER_ACCURATE" the two agree in every value.
# This matters where pictures are decoded by one library for training and by another for serving or for cached features.
# Library: tensorflow 2.21.0, against Pillow 13.0.0.
set -euo pipefail

tensorflow="${TENSORFLOW_VERSION:-2.21.0}"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile --disable-pip-version-check "tensorflow==$tensorflow" pillow==13.0.0

TF_CPP_MIN_LOG_LEVEL=3 CUDA_VISIBLE_DEVICES=-1 venv/bin/python - <<'PY'
import io
import sys

import numpy as np
import tensorflow as tf
from PIL import Image

print("tensorflow", tf.__version__)
print("Decoded values that differ from Pillow's, and the largest difference in levels of 255:")
coarse = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
picture = Image.fromarray(coarse).resize((240, 160), Image.Resampling.BICUBIC)
for quality in (75, 95):
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality)
    expected = np.asarray(Image.open(file)).astype(int)
    usual = abs(tf.io.decode_jpeg(file.getvalue()).numpy() - expected)
    exact = abs(tf.io.decode_jpeg(file.getvalue(), dct_method="INTEGER_ACCURATE").numpy() - expected)
    print(f"  quality {quality}: default {(usual > 0).mean():.0%}, {usual.max()}; INTEGER_ACCURATE {exact.max()}")
    if usual.max() < 2:
        sys.exit("CHANGED: the default no longer differs by several levels")
    if exact.max() != 0:
        sys.exit("CHANGED: INTEGER_ACCURATE no longer agrees with Pillow")
PY
