"""What asks TensorFlow for another state than the product does, each in a process of its own; prints what came out."""

import json
import sys
import tempfile
from itertools import islice
from pathlib import Path

import numpy as np
import tensorflow as tf

from ml.core.devices import convert_memory_errors, import_tensorflow_quietly
from ml.core.errors import DeviceError
from ml.core.store import Store
from ml.data.sources.demo import draw_files
from ml.images.decoding import INPUT_SIZE, Pixels, decode, resize
from ml.training.backbone_weights import load_backbone, resolve_weights
from ml.training.extractors import OpenVINOExtractor, TensorFlowExtractor
from tests.training.two_devices import fit

_MIB = 500
_BATCH = 256


def little_memory(store: Store) -> list[str]:
    """What is said where the GPU's memory does not suffice: for the backbone, and for fine-tuning."""
    gpu = tf.config.list_physical_devices("GPU")[0]
    tf.config.set_logical_device_configuration(gpu, [tf.config.LogicalDeviceConfiguration(memory_limit=_MIB)])
    weights = resolve_weights("random", store).id
    said = []
    for attempt in (
        lambda: TensorFlowExtractor(weights, store)(np.zeros((_BATCH, INPUT_SIZE, INPUT_SIZE, 3), np.uint8)),
        lambda: fit(_BATCH, backbone=lambda: load_backbone(weights, store), batch_size=_BATCH, epochs=1),
    ):
        try:
            with convert_memory_errors("take less"):
                attempt()
            said.append("it sufficed")
        except DeviceError as error:
            said.append(str(error))
    return said


def determinism(store: Store) -> dict[str, dict[str, float]]:
    """How far apart EfficientNetB0 fine-tuned twice is, in float32 and in float16, and how much it learnt."""
    tf.config.experimental.enable_op_determinism()
    weights = resolve_weights("random", store).id
    # Drawn, as random weights are made for: what noise comes to in them is too large for float16.
    pixels, found = _drawn(24), {}
    for name, mixed in (("float32", False), ("float16", True)):
        one, other = (
            fit(24, backbone=lambda: load_backbone(weights, store), pixels=pixels, batch_size=8, mixed=mixed)
            for _ in range(2)
        )
        found[name] = {
            "apart": float(np.abs(one.logits - other.logits).max()),
            "learnt": float(np.abs(one.logits[-1] - one.logits[0]).max()),
        }
    return found


def rounding(store: Store) -> dict[str, float]:
    """How far TensorFlow on the GPU is from OpenVINO on the processor, in float32 and in TF32."""
    weights, pixels = resolve_weights("random", store).id, _drawn(64)
    right, found = OpenVINOExtractor(weights, store, Path(store.root.removeprefix("file://")) / "cache")(pixels), {}
    for name, rounded in (("TF32", True), ("float32", False)):
        # Another graph each: what cuDNN runs is chosen at its first call.
        backbone = TensorFlowExtractor(weights, store)
        tf.config.experimental.enable_tensor_float_32_execution(rounded)
        found[name] = float(np.linalg.norm(backbone(pixels) - right) / np.linalg.norm(right))
    return {**found, "pictures": float(np.linalg.norm(right[0] - right[1]) / np.linalg.norm(right[1]))}


def _drawn(images: int) -> Pixels:
    return np.stack([resize(decode(data)) for _, data in islice(draw_files(82, seed=0, workers=1), images)])


if __name__ == "__main__":
    import_tensorflow_quietly()
    with tempfile.TemporaryDirectory(prefix="breakhis-gpu-") as folder:
        print(json.dumps(globals()[sys.argv[1]](Store(Path(folder).as_uri()))))
