"""Checks that put TensorFlow into another state than the product does, each in its own process; prints the result."""

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
    """Returns the messages when the GPU's memory does not suffice: for the backbone, and for fine-tuning."""
    gpu = tf.config.list_physical_devices("GPU")[0]
    tf.config.set_logical_device_configuration(gpu, [tf.config.LogicalDeviceConfiguration(memory_limit=_MIB)])
    weights = resolve_weights("random", store).id
    messages = []
    for attempt in (
        lambda: TensorFlowExtractor(weights, store)(np.zeros((_BATCH, INPUT_SIZE, INPUT_SIZE, 3), np.uint8)),
        lambda: fit(_BATCH, backbone=lambda: load_backbone(weights, store), batch_size=_BATCH, epochs=1),
    ):
        try:
            with convert_memory_errors("take less"):
                attempt()
            messages.append("the memory sufficed")
        except DeviceError as error:
            messages.append(str(error))
    return messages


def determinism(store: Store) -> dict[str, dict[str, float]]:
    """Returns how much two equal fine-tunings of EfficientNetB0 differ, and how much one changes it, by precision."""
    tf.config.experimental.enable_op_determinism()
    weights = resolve_weights("random", store).id
    # Drawn tissue, for which random weights are made: with noise, their activations are too large for float16.
    pixels, result = _draw_pictures(24), {}
    for name, mixed in (("float32", False), ("float16", True)):
        one, other = (
            fit(24, backbone=lambda: load_backbone(weights, store), pixels=pixels, batch_size=8, mixed=mixed)
            for _ in range(2)
        )
        result[name] = {
            "difference": float(np.abs(one.logits - other.logits).max()),
            "change": float(np.abs(one.logits[-1] - one.logits[0]).max()),
        }
    return result


def rounding(store: Store) -> dict[str, float]:
    """Returns the relative error of TensorFlow on the GPU against OpenVINO on the CPU, in float32 and in TF32."""
    weights, pixels = resolve_weights("random", store).id, _draw_pictures(64)
    expected, result = OpenVINOExtractor(weights, store, Path(store.root.removeprefix("file://")) / "cache")(pixels), {}
    for name, rounded in (("TF32", True), ("float32", False)):
        # A graph for each: cuDNN chooses its kernels at the first call.
        backbone = TensorFlowExtractor(weights, store)
        tf.config.experimental.enable_tensor_float_32_execution(rounded)
        result[name] = float(np.linalg.norm(backbone(pixels) - expected) / np.linalg.norm(expected))
    return {**result, "pictures": float(np.linalg.norm(expected[0] - expected[1]) / np.linalg.norm(expected[1]))}


def _draw_pictures(images: int) -> Pixels:
    return np.stack([resize(decode(data)) for _, data in islice(draw_files(82, seed=0, workers=1), images)])


if __name__ == "__main__":
    import_tensorflow_quietly()
    with tempfile.TemporaryDirectory(prefix="breakhis-gpu-") as folder:
        print(json.dumps(globals()[sys.argv[1]](Store(Path(folder).as_uri()))))
