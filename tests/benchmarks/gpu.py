"""A GPU: extraction and fine-tuning there, against their parts. By name alone, as few machines have one."""

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import click
import numpy as np

from ml.core.devices import describe_devices, has_gpu, import_tensorflow_quietly
from ml.core.store import Store
from ml.images.pixel_cache import PixelCache
from ml.training.backbone_weights import load_backbone, resolve_weights
from ml.training.examples import Examples
from ml.training.head_fitting import Fitter
from ml.training.presets import load_preset
from tests.benchmarks.extraction import kept, speeds
from tests.benchmarks.measure import Figure, watched
from tests.benchmarks.replica import Replica

_IMAGES = 7_680
_TUNED = 2_560  # pictures an epoch


def figures(replica: Replica) -> list[Figure]:
    """All figures of this page, with random weights, which cost what any weights do."""
    if not has_gpu():
        raise click.ClickException("TensorFlow sees no GPU; breakhis doctor says more")
    workers = len(os.sched_getaffinity(0))
    with replica.home(workers, WEIGHTS="random", BACKEND="tensorflow") as (home, environment):
        store = Store((home / "store").as_uri())
        files = dict(list(kept(replica, store).items())[:_IMAGES])
        speed = speeds(home, store, files, environment)
        tuned = _tuned(home, list(files)[:_TUNED], environment)
    slowest = min(speed["model"], speed["decode"])
    return [
        Figure(
            f"GPU: features of {len(files):,} files of 700x460",
            f"{speed['extraction']:.0f} images/s",
            f"tf.data and Keras' predict: {speed['keras']:.0f} images/s",
            speed["extraction"] / speed["keras"],
        ),
        Figure(
            "the same",
            f"{speed['extraction']:.0f} images/s",
            f"bare model {speed['model']:.0f}, bare decode in {workers} processes {speed['decode']:.0f}",
            speed["extraction"] / slowest,
        ),
        Figure(
            "features from cached pixels",
            f"{speed['cached']:.0f} images/s",
            f"bare model: {speed['model']:.0f} images/s",
            speed["cached"] / speed["model"],
        ),
        *(
            Figure(
                f"fine-tuning as default does, {tuned['images']:,} pictures, {what}",
                f"{tuned[name]:.0f} images/s",
                f"the same batch over and over: {tuned[f'bare {name}']:.0f} images/s",
                tuned[name] / tuned[f"bare {name}"],
            )
            for name, what in (("learnt", "an epoch"), ("predicted", "predictions"))
        ),
    ]


def _tuned(home: Path, hashes: list[str], environment: Mapping[str, str]) -> dict[str, float]:
    (home / "hashes.json").write_text(json.dumps(hashes))
    return watched(["-m", "tests.benchmarks.gpu", str(home)], environment).result


def _main(folder: str) -> None:
    """The second of two epochs, and predictions after them."""
    import_tensorflow_quietly()
    import tensorflow as tf

    tf.config.experimental.enable_op_determinism()  # as any training
    home = Path(folder)
    store, names = Store((home / "store").as_uri()), json.loads((home / "hashes.json").read_text())
    recipe, pixels = load_preset("default").binary, PixelCache(store)
    weights, rows = resolve_weights("random", store).id, np.arange(len(names))
    examples = Examples(
        "binary",
        recipe,
        rows % 2,
        np.zeros((1, len(names), 1280), np.float32),
        np.ones(len(names), int),
        lambda few: pixels.read([names[row] for row in few]),
        names,
    )
    tuning = Fitter(examples, lambda: load_backbone(weights, store))._tuning
    size = recipe.fine_tuning.batch_size
    steps = -(-len(names) // size)
    batches, seconds = tuning.batches(rows, 0, range(3)), dict[str, float]()

    def epoch(name: str, batch: object = None) -> None:
        begin = time.perf_counter()
        for _ in range(steps):
            tuning.step(batch or next(batches))
        float(tuning.network.get_metrics_result()["loss"])  # waits for it
        seconds[name] = time.perf_counter() - begin

    epoch("start")
    epoch("learnt")
    epoch("bare learnt", next(batches))
    tuning.predict(rows[:size])
    begin = time.perf_counter()
    tuning.predict(rows)
    seconds["predicted"] = time.perf_counter() - begin
    shown = pixels.read(names[:size])
    begin = time.perf_counter()
    for _ in range(steps):
        last = tuning._traced(shown)
    np.asarray(last)
    seconds["bare predicted"] = time.perf_counter() - begin
    speed = {name: len(names) / took for name, took in seconds.items()}
    print(json.dumps({**speed, "start": seconds["start"], "images": len(names), "device": describe_devices()}))


if __name__ == "__main__":
    _main(*sys.argv[1:])
