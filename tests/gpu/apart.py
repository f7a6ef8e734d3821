"""What asks TensorFlow for another state than the product does, each in a process of its own; prints what came out."""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import tensorflow as tf

from ml.devices import name_exhaustion, quiet_tensorflow
from ml.errors import DeviceError
from ml.features import TensorFlow
from ml.imaging import SIZE
from ml.models import load_backbone, resolve_weights
from ml.store import Store
from tests.two_devices import fit

_MIB = 500
_BATCH = 256


def little_memory(store: Store) -> list[str]:
    """What is said where the GPU's memory does not suffice: for the backbone, and for fine-tuning."""
    gpu = tf.config.list_physical_devices("GPU")[0]
    tf.config.set_logical_device_configuration(gpu, [tf.config.LogicalDeviceConfiguration(memory_limit=_MIB)])
    weights = resolve_weights("random", store).id
    said = []
    for attempt in (
        lambda: TensorFlow(weights, store)(np.zeros((_BATCH, SIZE, SIZE, 3), np.uint8)),
        lambda: fit(_BATCH, backbone=lambda: load_backbone(weights, store), batch_size=_BATCH, epochs=1),
    ):
        try:
            with name_exhaustion("take less"):
                attempt()
            said.append("it sufficed")
        except DeviceError as error:
            said.append(str(error))
    return said


def determinism(store: Store) -> dict[str, dict[str, float]]:
    """How far apart EfficientNetB0 fine-tuned twice is, in float32 and in float16, and how much it learnt."""
    tf.config.experimental.enable_op_determinism()
    weights = resolve_weights("random", store).id
    found = {}
    for name, mixed in (("float32", False), ("float16", True)):
        one, other = (
            fit(24, backbone=lambda: load_backbone(weights, store), batch_size=8, mixed=mixed) for _ in range(2)
        )
        found[name] = {
            "apart": float(np.abs(one.logits - other.logits).max()),
            "learnt": float(np.abs(one.logits[-1] - one.logits[0]).max()),
        }
    return found


if __name__ == "__main__":
    quiet_tensorflow()
    with tempfile.TemporaryDirectory(prefix="breakhis-gpu-") as folder:
        print(json.dumps(globals()[sys.argv[1]](Store(Path(folder).as_uri()))))
