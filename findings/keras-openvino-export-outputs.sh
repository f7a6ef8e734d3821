#!/usr/bin/env bash
# One would guess that a network with one output, exported by Keras in OpenVINO's format, has one output.
# EfficientNetB0 exported so has 50: its features first, then 49 inner ones, as many as it has swish activations.
# openvino.convert_model makes of the same network a model with one input and one output.
# This matters for a frozen backbone that computes features on a CPU: a caller of it keeps fifty arrays alive.
# Library: keras 3.15.1 with tensorflow 2.21.0 and openvino 2026.4.1. The weights are random.
set -euo pipefail

keras="${KERAS_VERSION:-3.15.1}"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile --disable-pip-version-check \
  "keras==$keras" tensorflow==2.21.0 openvino==2026.4.1 scipy==1.17.1

HOME="$work" KERAS_HOME="$work" TF_CPP_MIN_LOG_LEVEL=3 CUDA_VISIBLE_DEVICES=-1 venv/bin/python -W ignore - <<'PY'
import sys

import keras
import openvino

print("keras", keras.__version__, "with openvino", openvino.__version__)
network = keras.applications.EfficientNetB0(include_top=False, pooling="avg", weights=None, input_shape=(64, 64, 3))
network.export("exported.xml", format="openvino", verbose=False)
exported = openvino.Core().read_model("exported.xml")
converted = openvino.convert_model(network)
print("One network, inputs", len(network.inputs), "and outputs", len(network.outputs))
for name, model in (("exported by Keras", exported), ("openvino.convert_model", converted)):
    shapes = [str(output.partial_shape) for output in model.outputs]
    more = ", ..." if len(shapes) > 3 else ""
    print(f"  {name}: inputs {len(model.inputs)}, outputs {len(shapes)}: {', '.join(shapes[:3])}{more}")
if len(exported.outputs) < 2:
    sys.exit("CHANGED: the export by Keras no longer has more outputs than the network")
if len(converted.outputs) != 1:
    sys.exit("CHANGED: openvino.convert_model no longer gives one output")
PY
