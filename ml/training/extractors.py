"""Feature extractors: the frozen backbone by OpenVINO on a CPU, or by TensorFlow on a GPU."""

import uuid
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ml.core.devices import has_gpu_driver, import_tensorflow_quietly
from ml.core.settings import Settings
from ml.core.store import Store
from ml.images.decoding import INPUT_SIZE, Pixels
from ml.training.backbone_weights import FEATURE_SIZE, load_backbone

Features = NDArray[np.float32]

_AT_ONCE = 2  # pictures a request of OpenVINO: the activations of more do not stay in a core's cache


class Extractor(Protocol):
    """The frozen backbone, run by one of the backends."""

    name: str
    """The backend, as settings name it."""
    batch: int
    """Pictures a call."""

    def __call__(self, pixels: Pixels) -> Features:
        """Compute features: uint8 (n, 224, 224, 3) -> float32 (n, 1280)."""


class OpenVINOExtractor:
    """The backbone on the CPU, by OpenVINO: two to three times as fast as TensorFlow there, with the same results.

    Each core works on its own pair of pictures, which is a fifth faster than all cores on one larger batch. Without the
    precision hint OpenVINO would use bfloat16 on a CPU that has it, with an error of 14%, and would be slower.

    Args:
        weights: the id of weights in the store.
        store: the store that holds them.
        cache: a folder of this machine, for the converted network.
    """

    name = "openvino"
    batch = 32

    def __init__(self, weights: str, store: Store, cache: Path) -> None:
        import openvino

        # The converted network is kept in this machine's cache folder: conversion needs TensorFlow's slow import, and
        # nothing else here does.
        file = cache / "openvino" / f"{weights}-{openvino.__version__.split('-')[0]}" / "backbone.xml"
        if not file.exists():
            self._write_network(weights, store, file)
        core = openvino.Core()
        network = core.read_model(file)
        network.reshape([_AT_ONCE, INPUT_SIZE, INPUT_SIZE, 3])
        settings = {"PERFORMANCE_HINT": "THROUGHPUT", "INFERENCE_PRECISION_HINT": "f32"}
        self._queue = openvino.AsyncInferQueue(core.compile_model(network, "CPU", settings))
        self._queue.set_callback(_copy_output)
        # One input array for each request. OpenVINO reads it in place, so each request reuses its own.
        self._inputs = [np.zeros((_AT_ONCE, INPUT_SIZE, INPUT_SIZE, 3), np.float32) for _ in range(len(self._queue))]

    def __call__(self, pixels: Pixels) -> Features:
        """Compute features: uint8 (n, 224, 224, 3) -> float32 (n, 1280)."""
        result = np.empty((len(pixels), FEATURE_SIZE), np.float32)
        for start in range(0, len(pixels), _AT_ONCE):
            request_input = self._inputs[self._queue.get_idle_request_id()]
            pair = pixels[start : start + _AT_ONCE]
            request_input[: len(pair)] = pair  # what remains behind the last pictures is computed too, and ignored
            self._queue.start_async(request_input, result[start : start + _AT_ONCE], share_inputs=True)
        self._queue.wait_all()
        return result

    @staticmethod
    def _write_network(weights: str, store: Store, file: Path) -> None:
        import warnings

        import openvino

        backbone = load_backbone(weights, store)
        with warnings.catch_warnings():
            # Keras warns that OpenVINO passes a tuple where it expects a tensor; both are one input.
            warnings.filterwarnings("ignore", message="The structure of `inputs`")
            network = openvino.convert_model(backbone, input=[openvino.PartialShape([-1, INPUT_SIZE, INPUT_SIZE, 3])])
        file.parent.mkdir(parents=True, exist_ok=True)
        # The .bin comes first: readers look for the .xml, and two processes may convert at once.
        scratch = file.with_name(f".{uuid.uuid4().hex}.xml")
        openvino.save_model(network, scratch, compress_to_fp16=False)
        scratch.with_suffix(".bin").replace(file.with_suffix(".bin"))
        scratch.replace(file)


def _copy_output(request: Any, rows: Features) -> None:
    rows[:] = request.get_output_tensor().data[: len(rows)]


class TensorFlowExtractor:
    """The backbone by TensorFlow, for a GPU.

    Args:
        weights: the id of weights in the store.
        store: the store that holds them.
    """

    name = "tensorflow"
    batch = 64

    def __init__(self, weights: str, store: Store) -> None:
        import_tensorflow_quietly()
        import tensorflow as tf

        backbone = load_backbone(weights, store)
        self._run: Any = tf.function(
            lambda pixels: backbone(tf.cast(pixels, tf.float32), training=False),
            # For any number of pictures: otherwise the last batch of a view would be traced again.
            input_signature=[tf.TensorSpec((None, INPUT_SIZE, INPUT_SIZE, 3), tf.uint8)],
        )

    def __call__(self, pixels: Pixels) -> Features:
        """Compute features: uint8 (n, 224, 224, 3) -> float32 (n, 1280)."""
        result: Features = self._run(pixels).numpy()
        return result


def load_extractor(backend: str, weights: str, store: Store, cache: Path) -> Extractor:
    """Load the backbone with these weights into ``openvino`` or ``tensorflow``; ``cache`` is a local folder."""
    return OpenVINOExtractor(weights, store, cache) if backend == "openvino" else TensorFlowExtractor(weights, store)


def choose_backend(settings: Settings) -> str:
    """Returns the backend of the settings; for ``auto``, ``tensorflow`` if it can use a GPU, otherwise ``openvino``."""
    if settings.backend != "auto":
        return settings.backend
    if settings.gpu_required:  # without a GPU the stage has already failed
        return "tensorflow"
    if not has_gpu_driver():  # saves the import of TensorFlow on a machine without a GPU
        return "openvino"
    import_tensorflow_quietly()
    import tensorflow as tf

    return "tensorflow" if tf.config.list_physical_devices("GPU") else "openvino"
