"""Extraction: pixels and features against a usual TensorFlow pipeline and against their own parts, and its memory."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ml.core.settings import read_settings
from ml.core.store import Store
from ml.core.workers import map_in_processes
from ml.images.decoding import INPUT_SIZE, decode, resize
from ml.images.pixel_formats import pixel_hash
from ml.training.backbone_weights import resolve_weights
from tests.benchmarks.measure import Figure, Run, breakhis
from tests.benchmarks.replica import MAX_PICTURES, Replica
from tests.helpers import made_up

_TURNS = 2
_WORKERS = 2
_IMAGES = 1_280  # that speeds are measured with
_FEW = 1_000  # images whose memory is compared with that of all
_NEW = 10  # percent
_MIB = 2**20


def figures(replica: Replica) -> list[Figure]:
    """All figures of this page, with random weights, which cost what any weights do."""
    with replica.home(_WORKERS, WEIGHTS="random", BACKEND="openvino") as (home, environment):
        store = Store((home / "store").as_uri())
        files = kept(replica, store)
        used = min(_IMAGES, len(files) * 100 // (100 + _NEW))
        speed = speeds(home, store, dict(list(files.items())[:used]), environment)
        more = used * (100 + _NEW) // 100
        unchanged = _features(store, files, used, environment)
        added = _features(store, files, more, environment)
        _clear(store, "pixels", "features")
        few = _features(store, files, min(_FEW, len(files)), environment)
        memory = [_memory_of(few)]
        if replica.images >= MAX_PICTURES:
            _clear(store, "pixels", "features")
            memory.append(_memory_of(_features(store, files, len(files), environment), few))
    serial = 1 / (1 / speed["model"] + 1 / speed["decode"])
    return [
        Figure(
            f"features of {used:,} files of 700x460",
            f"{speed['extraction']:.1f} images/s",
            f"tf.data and Keras' predict: {speed['keras']:.1f} images/s",
            speed["extraction"] / speed["keras"],
            "at least 1.40",
            speed["extraction"] >= 1.4 * speed["keras"],
        ),
        Figure(
            "the same",
            f"{speed['extraction']:.1f} images/s",
            f"bare model {speed['model']:.1f}, bare decode {speed['decode']:.1f}; one after the other {serial:.1f}",
            speed["extraction"] / serial,
            "at least 0.85",
            speed["extraction"] >= 0.85 * serial,
        ),
        Figure(
            "features from cached pixels",
            f"{speed['cached']:.1f} images/s",
            f"bare model: {speed['model']:.1f} images/s",
            speed["cached"] / speed["model"],
            "at least 0.90",
            speed["cached"] >= 0.9 * speed["model"],
        ),
        Figure(
            "features of unchanged data",
            f"{_counts(unchanged)}, {unchanged.seconds:.1f} s",
            wanted="nothing decoded or extracted",
            met=(unchanged.result["decoded"], unchanged.result["extracted"]) == (0, 0),
        ),
        Figure(
            f"features with {more - used} new images ({_NEW}%)",
            f"{_counts(added)}, {added.seconds:.1f} s",
            wanted="the new ones alone",
            met=(added.result["decoded"], added.result["extracted"]) == (more - used, more - used),
        ),
        *memory,
    ]


def speeds(home: Path, store: Store, files: dict[str, str], environment: Mapping[str, str]) -> dict[str, float]:
    """Images/s of each contestant, the best of some turns, with the backend and the processes of the environment."""
    (home / "files.json").write_text(json.dumps(files))
    resolve_weights("random", store)
    seconds: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    for _ in range(_TURNS):
        for name, found in seconds.items():
            found.append(_seconds_of(name, home, environment))
    return {name: len(files) / min(found) for name, found in seconds.items()}


def kept(replica: Replica, store: Store) -> dict[str, str]:
    """Pixel hash -> file hash, of every picture in the store: each once."""
    jobs = ((store.root, file) for file in sorted(replica.folder.rglob("*.png")))
    return dict(map_in_processes(_keep, jobs, len(os.sched_getaffinity(0))))


def _keep(job: tuple[str, Path]) -> tuple[str, str]:
    root, file = job
    data = file.read_bytes()
    return pixel_hash(decode(data)), Store(root).put_blob(data)


def _features(store: Store, files: dict[str, str], images: int, environment: Mapping[str, str]) -> Run:
    """The stage, over a dataset of the first so many pictures."""
    rows = made_up.manifest_rows({"14-1": ("DC", images)})
    rows["pixel_sha256"], rows["sha256"] = list(files)[:images], list(files.values())[:images]
    dataset = made_up.create_dataset(store, rows)
    return breakhis("features", dataset, "--preset", "demo", environment=environment)


def _counts(run: Run) -> str:
    return f"{run.result['decoded']} decoded, {run.result['extracted']} extracted"


def _memory_of(run: Run, few: Run | None = None) -> Figure:
    what = f"memory for {run.result['images']:,} images, with all processes"
    measured = f"{run.memory / _MIB:.0f} MiB anonymous"
    if few is None:
        return Figure(what, measured, wanted="below 3 GiB", met=run.memory < 3 * 2**30)
    grown = (run.memory - few.memory) / _MIB
    met = run.memory < 3 * 2**30 and grown < 150
    compared = f"{few.result['images']:,} images: {few.memory / _MIB:.0f} MiB"
    return Figure(what, measured, compared, run.memory / few.memory, "below 3 GiB, 150 MiB more at the most", met)


def _clear(store: Store, *kinds: str) -> None:
    for kind in kinds:
        for folder in store.caches(kind):
            shutil.rmtree(store.local(folder))


def _seconds_of(contestant: str, home: Path, environment: Mapping[str, str]) -> float:
    """How long one takes, in a process of its own: libraries and network loaded, caches as it needs them."""
    command = [sys.executable, "-m", "tests.benchmarks.extraction", contestant, str(home)]
    return float(subprocess.run(command, env=dict(environment), check=True, capture_output=True, text=True).stdout)


def _extraction(store: Store, home: Path, files: dict[str, str]) -> Callable[[], None]:
    """What the stage does once it knows what is missing; the start of the processes that decode is counted."""
    from ml.core.workers import prefetch
    from ml.images.augmentation import IDENTITY_VIEW
    from ml.images.pixel_cache import PixelCache
    from ml.training.extractors import load_extractor
    from ml.training.features import _AHEAD, FeatureCache, _compute, _feed

    weights = resolve_weights("random", store).id
    backbone = load_extractor(read_settings().backend, weights, store, home / "cache")
    backbone(np.zeros((backbone.batch, INPUT_SIZE, INPUT_SIZE, 3), np.uint8))
    caches = {IDENTITY_VIEW: FeatureCache(store, weights, backbone.name)}

    def run() -> None:
        with prefetch(
            _feed({IDENTITY_VIEW: files}, PixelCache(store), backbone.batch, read_settings().worker_count), _AHEAD
        ) as fed:
            _compute(caches, backbone, fed)

    return run


def _extract(store: Store, home: Path, files: dict[str, str]) -> Callable[[], None]:
    _clear(store, "pixels", "features")
    return _extraction(store, home, files)


def _cached(store: Store, home: Path, files: dict[str, str]) -> Callable[[], None]:
    _clear(store, "features")
    return _extraction(store, home, files)


def _model(store: Store, home: Path, files: dict[str, str]) -> Callable[[], None]:
    """The network alone, on the same few pictures over and over."""
    from ml.training.extractors import _AT_ONCE, OpenVINOExtractor, load_extractor

    backbone = load_extractor(read_settings().backend, resolve_weights("random", store).id, store, home / "cache")
    if not isinstance(backbone, OpenVINOExtractor):
        return _on_a_gpu(backbone, len(files))
    queue = backbone._queue
    queue.set_callback(lambda request, _: request.get_output_tensor().data)
    some = np.random.default_rng(0).integers(0, 256, (_AT_ONCE, INPUT_SIZE, INPUT_SIZE, 3)).astype(np.float32)

    def run() -> None:
        for _ in range(-(-len(files) // _AT_ONCE)):
            queue.start_async(some, None, share_inputs=True)
        queue.wait_all()

    run()
    return run


def _on_a_gpu(backbone: Any, images: int) -> Callable[[], None]:
    """On pictures that lie in the GPU's memory; only the last features are waited for."""
    import tensorflow as tf

    rng = np.random.default_rng(0)
    some = tf.constant(rng.integers(0, 256, (backbone.batch, INPUT_SIZE, INPUT_SIZE, 3), dtype=np.uint8))

    def run() -> None:
        for _ in range(-(-images // backbone.batch)):
            features = backbone._run(some)
        features.numpy()

    run()
    return run


def _decode(store: Store, home: Path, files: dict[str, str]) -> Callable[[], None]:
    """Processes decode and resize all files, by libspng as the product does, and no more; their start counted."""
    from tests.benchmarks.extraction import decode_one  # not this program's own, which processes do not have

    paths = [store.local(store.blob_key(sha256)) for sha256 in files.values()]

    def run() -> None:
        assert sum(map_in_processes(decode_one, paths, read_settings().worker_count)) == INPUT_SIZE * len(paths)

    return run


def decode_one(file: Path) -> int:
    """Decode and resize one file; returns the picture's height."""
    from ml.images.pixel_cache import _quickly

    quick = _quickly(file.read_bytes())
    assert quick is not None
    return len(resize(quick))


def _keras(store: Store, home: Path, files: dict[str, str]) -> Callable[[], None]:
    """What one would write with TensorFlow alone; nothing is kept of it."""
    import tensorflow as tf

    from ml.training.backbone_weights import load_backbone

    backbone = load_backbone(resolve_weights("random", store).id, store)
    paths = [str(store.local(store.blob_key(sha256))) for sha256 in files.values()]

    def load(path: object) -> object:
        return tf.image.resize(tf.io.decode_png(tf.io.read_file(path), channels=3), (INPUT_SIZE, INPUT_SIZE))

    def pipeline(some: list[str]) -> object:
        data = tf.data.Dataset.from_tensor_slices(some).map(load, num_parallel_calls=tf.data.AUTOTUNE)
        return data.batch(32).prefetch(tf.data.AUTOTUNE)

    backbone.predict(pipeline(paths[:32]), verbose=0)  # traces it
    return lambda: backbone.predict(pipeline(paths), verbose=0)


CONTESTANTS = {"keras": _keras, "model": _model, "decode": _decode, "extraction": _extract, "cached": _cached}
"""In this order: the pixels that the last one reads are those that the one before it has kept."""


def _main(name: str, folder: str) -> None:
    home = Path(folder)
    files = json.loads((home / "files.json").read_text())
    run = CONTESTANTS[name](Store((home / "store").as_uri()), home, files)
    begin = time.perf_counter()
    run()
    print(time.perf_counter() - begin)


if __name__ == "__main__":
    _main(*sys.argv[1:])
