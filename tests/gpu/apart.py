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

_MIB = 800


def little_memory(store: Store) -> list[str]:
    """What is said where the GPU's memory does not suffice: for the backbone, and for fine-tuning."""
    gpu = tf.config.list_physical_devices("GPU")[0]
    tf.config.set_logical_device_configuration(gpu, [tf.config.LogicalDeviceConfiguration(memory_limit=_MIB)])
    weights = resolve_weights("random", store).id
    said = []
    for attempt in (
        lambda: TensorFlow(weights, store)(np.zeros((512, SIZE, SIZE, 3), np.uint8)),
        lambda: fit(512, backbone=lambda: load_backbone(weights, store), batch_size=512, epochs=1),
    ):
        try:
            with name_exhaustion("take less"):
                attempt()
            said.append("it sufficed")
        except DeviceError as error:
            said.append(str(error))
    return said


def determinism(store: Store) -> str:
    """What TensorFlow says if the fine-tuning of EfficientNetB0 is to be deterministic."""
    tf.config.experimental.enable_op_determinism()
    tf.keras.utils.set_random_seed(0)
    weights = resolve_weights("random", store).id
    try:
        fit(16, backbone=lambda: load_backbone(weights, store), epochs=1)
    except tf.errors.UnimplementedError as error:
        return str(error)
    return "it is done"


if __name__ == "__main__":
    quiet_tensorflow()
    with tempfile.TemporaryDirectory(prefix="breakhis-gpu-") as folder:
        print(json.dumps(globals()[sys.argv[1]](Store(Path(folder).as_uri()))))
