"""Fine-tunes a tiny network on one device, on two, and in float16, and prints the results.

It runs in its own process: TensorFlow can use one CPU or GPU as two devices only if that is set before anything else.
"""

import json
import sys
from collections.abc import Callable
from types import SimpleNamespace

import keras
import numpy as np
import tensorflow as tf

from ml.core.devices import import_tensorflow_quietly
from ml.images.decoding import Pixels
from ml.training import fine_tuning
from ml.training.examples import Examples
from ml.training.head_fitting import FittedNetwork, Fitter
from ml.training.presets import load_preset
from tests.helpers.small_training import tiny_backbone


def fit(
    images: int,
    *,
    backbone: Callable[[], keras.Model] = tiny_backbone,
    pixels: Pixels | None = None,
    batch_size: int = 4,
    epochs: int = 2,
    mixed: bool = False,
    learning_rate: float = 1e-4,
) -> FittedNetwork:
    """Fine-tune without dropout, whose masks differ between devices."""
    recipe = (
        load_preset("demo")
        .with_changes(
            "subtype",
            head={"dropout": 0.0},
            training={"epochs": 1},
            fine_tuning={
                "when": "always",
                "epochs": epochs,
                "batch_size": batch_size,
                "learning_rate": learning_rate,
                "mixed_precision": mixed,
            },
        )
        .subtype
    )
    rows = np.arange(images)
    pictures = (
        np.random.default_rng(0).integers(0, 256, (images, 224, 224, 3), dtype=np.uint8) if pixels is None else pixels
    )
    features = np.asarray(backbone().predict(pictures, batch_size=4, verbose=0))[None]
    examples = Examples(
        "subtype", recipe, rows % 8, features, np.ones(images, int), lambda few: pictures[few], [*map(str, rows)]
    )
    empty_checkpoint = SimpleNamespace(
        read_finished=lambda _: None,
        read_unfinished=lambda _: SimpleNamespace(epoch=0, history={}, arrays=[]),
        is_due=lambda: False,
        finish=lambda *_: None,
    )
    return Fitter(examples, backbone).fit("it", rows, rows, 0, empty_checkpoint)  # type: ignore[arg-type]


def _main(kind: str) -> None:
    import_tensorflow_quietly()  # otherwise everything before a fit is computed in TF32
    device = tf.config.list_physical_devices(kind)[0]
    half = [tf.config.LogicalDeviceConfiguration(memory_limit=None if kind == "CPU" else 4096)] * 2
    tf.config.set_logical_device_configuration(device, half)
    one_device = fine_tuning._choose_strategy
    results = []
    for images in (12, 9):  # the last batch: whole, and of one image, for one of the devices
        one = fit(images)
        fine_tuning._choose_strategy = lambda: tf.distribute.MirroredStrategy([f"{kind}:0", f"{kind}:1"])
        two = fit(images)
        fine_tuning._choose_strategy = one_device
        results.append(
            {
                "difference": float(np.abs(two.logits - one.logits).max()),
                "change": float(np.abs(one.logits[-1] - one.logits[0]).max()),
            }
        )
    fine_tuning.has_gpu = lambda: True
    tuned = fit(8, epochs=8, mixed=True, learning_rate=1e-5)
    print(
        json.dumps(
            {
                "two": results,
                "float16": {
                    "loss": tuned.history["fine_tuning_loss"],
                    "kept as": sorted({str(a.dtype) for a in tuned.backbone}),  # type: ignore[union-attr]
                },
            }
        )
    )


if __name__ == "__main__":
    _main(*sys.argv[1:])
