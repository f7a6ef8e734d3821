"""Features: what the frozen backbone makes of each picture, computed once and cached.

While the backbone is frozen its output is a constant, so both models train on the same cached vectors. A cache is keyed
by weights, view, backend and precision; within it vectors lie by the hash of the decoded picture, so that new data
costs only its own images. Pictures are decoded and changed ahead of the backbone, so that neither waits for the other.
"""

import uuid
from collections.abc import Collection, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ml.core.devices import convert_memory_errors, has_gpu_driver, import_tensorflow_quietly, require_gpu
from ml.core.errors import StoreError
from ml.core.progress import say, track
from ml.core.settings import Settings
from ml.core.store import Json, Store, digest
from ml.core.workers import prefetch
from ml.data.training_sets import read_dataset
from ml.images.augmentation import IDENTITY_VIEW, View
from ml.images.decoding import INPUT_SIZE, Pixels
from ml.images.pixel_cache import PixelCache
from ml.training.backbone_weights import FEATURE_SIZE, load_backbone, look_up_weights, resolve_weights

if TYPE_CHECKING:
    from ml.training.presets import Preset

Features = NDArray[np.float32]

ViewPlan = Sequence[tuple[View, Collection[str]]]
"""Views besides the picture as it is, and the pixel hashes of the images that want each."""

_PART = 512  # images a cache part: 2.6 MB of features
_AHEAD = 3  # batches that wait for the backbone
_AT_ONCE = 2  # pictures that OpenVINO computes together: what comes of more does not stay in a core's cache


class Extractor(Protocol):
    """The frozen backbone, run by something."""

    name: str
    batch: int

    def __call__(self, pixels: Pixels) -> Features:
        """uint8 (n, 224, 224, 3) -> float32 (n, 1280)."""


class OpenVINOExtractor:
    """The backbone on the CPU: two to three times as fast as TensorFlow there, with the same numbers.

    Each core works on pictures of its own, a pair at a time: a fifth faster than all cores on one larger batch. Without
    the precision hint OpenVINO would take bfloat16 on a CPU that has it, which is 14% off and slower.
    """

    name = "openvino"
    batch = 32

    def __init__(self, weights: str, store: Store, cache: Path) -> None:
        import openvino

        # The converted network is kept beside the caches of this machine: converting takes TensorFlow's import, and
        # nothing else here does.
        file = cache / "openvino" / f"{weights}-{openvino.__version__.split('-')[0]}" / "backbone.xml"
        if not file.exists():
            self._convert(weights, store, file)
        core = openvino.Core()
        network = core.read_model(file)
        network.reshape([_AT_ONCE, INPUT_SIZE, INPUT_SIZE, 3])
        settings = {"PERFORMANCE_HINT": "THROUGHPUT", "INFERENCE_PRECISION_HINT": "f32"}
        self._queue = openvino.AsyncInferQueue(core.compile_model(network, "CPU", settings))
        self._queue.set_callback(_keep)
        # One for each request, and the same memory each time, which OpenVINO reads in place.
        self._inputs = [np.zeros((_AT_ONCE, INPUT_SIZE, INPUT_SIZE, 3), np.float32) for _ in range(len(self._queue))]

    def __call__(self, pixels: Pixels) -> Features:
        """uint8 (n, 224, 224, 3) -> float32 (n, 1280)."""
        result = np.empty((len(pixels), FEATURE_SIZE), np.float32)
        for start in range(0, len(pixels), _AT_ONCE):
            given = self._inputs[self._queue.get_idle_request_id()]
            some = pixels[start : start + _AT_ONCE]
            given[: len(some)] = some  # behind the last ones lies what was there before; nobody looks at its features
            self._queue.start_async(given, result[start : start + _AT_ONCE], share_inputs=True)
        self._queue.wait_all()
        return result

    @staticmethod
    def _convert(weights: str, store: Store, file: Path) -> None:
        import warnings

        import openvino

        backbone = load_backbone(weights, store)
        with warnings.catch_warnings():
            # Keras remarks that OpenVINO hands a tuple where it expects a tensor; both are one input.
            warnings.filterwarnings("ignore", message="The structure of `inputs`")
            network = openvino.convert_model(backbone, input=[openvino.PartialShape([-1, INPUT_SIZE, INPUT_SIZE, 3])])
        file.parent.mkdir(parents=True, exist_ok=True)
        # The .bin first: a reader looks for the .xml, and two processes may convert at once.
        scratch = file.with_name(f".{uuid.uuid4().hex}.xml")
        openvino.save_model(network, scratch, compress_to_fp16=False)
        scratch.with_suffix(".bin").replace(file.with_suffix(".bin"))
        scratch.replace(file)


def _keep(request: Any, rows: Features) -> None:
    rows[:] = request.get_output_tensor().data[: len(rows)]


class TensorFlowExtractor:
    """The backbone in TensorFlow: for a GPU."""

    name = "tensorflow"
    batch = 64

    def __init__(self, weights: str, store: Store) -> None:
        import_tensorflow_quietly()
        import tensorflow as tf

        backbone = load_backbone(weights, store)
        self._run: Any = tf.function(
            lambda pixels: backbone(tf.cast(pixels, tf.float32), training=False),
            # For any number of pictures: the last batch of a view would be traced anew.
            input_signature=[tf.TensorSpec((None, INPUT_SIZE, INPUT_SIZE, 3), tf.uint8)],
        )

    def __call__(self, pixels: Pixels) -> Features:
        """uint8 (n, 224, 224, 3) -> float32 (n, 1280)."""
        result: Features = self._run(pixels).numpy()
        return result


def load_extractor(backend: str, weights: str, store: Store, cache: Path) -> Extractor:
    """The backbone with these weights, run by ``openvino`` or ``tensorflow``; ``cache`` is a folder of this machine."""
    return OpenVINOExtractor(weights, store, cache) if backend == "openvino" else TensorFlowExtractor(weights, store)


def choose_backend(settings: Settings) -> str:
    """``openvino`` or ``tensorflow``: what was asked for, or TensorFlow where there is a GPU that it can use."""
    if settings.backend != "auto":
        return settings.backend
    if settings.gpu_required:  # where TensorFlow sees none we do not get here
        return "tensorflow"
    if not has_gpu_driver():  # spares importing TensorFlow on a machine without
        return "openvino"
    import_tensorflow_quietly()
    import tensorflow as tf

    return "tensorflow" if tf.config.list_physical_devices("GPU") else "openvino"


@dataclass(frozen=True)
class FeatureCache:
    """Feature vectors by pixel hash, in parts under objects/caches/features-…/.

    A part is one .npz with ``hashes`` (n,) and ``features`` float32 (n, 1280), written whole; two writers that compute
    the same images at once only waste space.
    """

    store: Store
    weights: str
    backend: str
    view: View = IDENTITY_VIEW

    @cached_property
    def prefix(self) -> str:
        """Where the parts lie."""
        key = {"weights": self.weights, "view": self.view.key, "backend": self.backend, "precision": "float32"}
        return f"objects/caches/features-{digest(key)[:12]}"

    def read(self, hashes: list[str]) -> Features:
        """The features of these images, float32 (n, 1280), in this order.

        Raises:
            StoreError: some are not cached.
        """
        wanted = {h: row for row, h in enumerate(hashes)}
        features = np.empty((len(hashes), FEATURE_SIZE), np.float32)
        missing = set(wanted)
        for part_hashes, part in self._parts():
            rows = [(i, wanted[h]) for i, h in enumerate(part_hashes) if h in wanted]
            if rows:
                source, target = zip(*rows, strict=True)
                features[list(target)] = part()[list(source)]
                missing.difference_update(part_hashes)
        if missing:
            raise StoreError(f"{len(missing)} of {len(hashes)} images have no features in {self.prefix}; run: features")
        return features

    def cached_hashes(self) -> set[str]:
        """The hashes of the images that are cached."""
        return {h for hashes, _ in self._parts() for h in hashes}

    def write(self, hashes: list[str], features: Features) -> None:
        """Add one part."""
        _write_part(self.prefix, hashes, features, self.store)

    @staticmethod
    def remove_images(hashes: Collection[str], store: Store) -> None:
        """Take these pictures' features out of every cache, whatever made them."""
        for folder in store.caches("features"):
            for name in store.keys(folder):
                key = f"{folder}/{name}"
                with np.load(store.local(key)) as part:
                    known = part["hashes"].tolist()
                    left = [row for row, h in enumerate(known) if h not in hashes]
                    if len(left) == len(known):
                        continue
                    kept, features = [known[row] for row in left], part["features"][left]
                if left:
                    _write_part(folder, kept, features, store)
                store.remove(key)

    def _parts(self) -> Iterator[tuple[list[str], Any]]:
        for name in self.store.keys(self.prefix):
            with np.load(self.store.local(f"{self.prefix}/{name}")) as part:
                yield part["hashes"].tolist(), lambda part=part: part["features"]


def _write_part(prefix: str, hashes: list[str], features: Features, store: Store) -> None:
    with store.staging() as folder:
        file = folder / "part.npz"
        np.savez(file, hashes=np.array(hashes), features=features)
        store.put_file(f"{prefix}/{digest(hashes)[:16]}.npz", file)


class Shard(NamedTuple):
    """One of ``of`` parts of a dataset, by the hash of each picture: the same whatever else is in the dataset."""

    number: int
    """From 1."""
    of: int

    def takes(self, pixel_sha256: str) -> bool:
        """Whether a picture is in this part."""
        return int(pixel_sha256[:8], 16) % self.of == self.number - 1

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"


def extract_features(
    dataset: str,
    preset: "Preset",
    store: Store,
    settings: Settings,
    *,
    weights_id: str | None = None,
    shard: Shard | None = None,
    plan: ViewPlan | None = None,
) -> Json:
    """Compute what is not cached yet of a dataset's pixels and features (the ``features`` stage).

    What is computed is kept a part at a time: whoever is killed loses one part at the most, and the next call computes
    what is missing. Two calls at once compute the same images twice, to the same result.

    Args:
        dataset: its id.
        preset: says whether random weights will do.
        store: where everything lies.
        settings: weights, backend, workers.
        weights_id: weights in the store, rather than those that the settings name.
        shard: look at this part of the dataset alone.
        plan: views to compute as well. Every image is seen as it is, and hashes that the dataset lacks count for
            nothing.

    Returns:
        ``{images, views, extracted, cached, decoded, weights, weights_kind, backend, shard}``: ``images`` and
        ``decoded`` count images of the shard, ``extracted`` and ``cached`` vectors, of which an image has one a view.

    Raises:
        WeightsError: the backbone's weights cannot be had.
        StoreError: a file cannot be decoded any more, or holds another picture than was recorded.
        NoGpuError: the settings ask for a GPU and there is none.
        DeviceError: memory does not suffice.
        TryAgain: a worker process was killed.
    """
    if settings.gpu_required:
        require_gpu()
    rows = read_dataset(dataset, store)
    if shard:
        rows = rows[rows["pixel_sha256"].map(shard.takes)]
    if weights_id:
        weights = look_up_weights(weights_id, store)
    else:
        weights = resolve_weights(settings.weights, store, or_random=preset.random_weights_allowed)
    backend = choose_backend(settings)
    files = dict(zip(rows["pixel_sha256"], rows["sha256"], strict=True))
    wanted = _wanted(list(files), plan or ())
    caches = {view: FeatureCache(store, weights.id, backend, view) for view in wanted}
    missing: dict[View, dict[str, str]] = {}
    for view, hashes in wanted.items():
        known = caches[view].cached_hashes()
        missing[view] = {h: files[h] for h in hashes if h not in known}
    vectors, extracted = sum(map(len, wanted.values())), sum(map(len, missing.values()))
    decoded = 0
    if extracted:
        pixels = PixelCache(store)
        decoded = len({h for some in missing.values() for h in some} - pixels.index().keys())
        batch = (OpenVINOExtractor if backend == "openvino" else TensorFlowExtractor).batch
        feed = _feed(missing, pixels, batch, settings.worker_count)
        with (
            convert_memory_errors(f"the backbone takes {batch} images at a time; free the device of other work"),
            prefetch(feed, _AHEAD) as fed,  # and so decoding begins while the backbone is being loaded
        ):
            extractor = load_extractor(backend, weights.id, store, settings.cache)
            total = sum(-(-len(some) // batch) for some in missing.values())
            _compute(caches, extractor, track(fed, total=total, what=f"extracting features, batches of {batch}"))
    said = f" of {len(wanted)} views" if plan else ""
    say(f"features{said}: {extracted} computed, {vectors - extracted} cached, weights {weights.id} ({weights.kind})")
    return {
        "images": len(rows),
        "views": len(wanted),
        "extracted": extracted,
        "cached": vectors - extracted,
        "decoded": decoded,
        "weights": weights.id,
        "weights_kind": weights.kind,
        "backend": backend,
        "shard": str(shard) if shard else None,
    }


def _wanted(hashes: list[str], plan: ViewPlan) -> dict[View, list[str]]:
    """Each view and its images, in the dataset's order."""
    chosen: dict[View, set[str]] = {IDENTITY_VIEW: set(hashes)}
    for view, some in plan:
        chosen.setdefault(view, set()).update(some)
    return {view: [h for h in hashes if h in some] for view, some in chosen.items()}


_Fed = tuple[View, list[str], Pixels]


def _feed(
    missing: Mapping[View, Mapping[str, str]], pixels: PixelCache, size: int, workers: int
) -> Generator[_Fed, None, None]:
    """Batches for the backbone, one view after the other: all but the first find the pixels cached.

    Threads make the views: NumPy lets go of the interpreter for nearly all of it, and no array has to be passed on.
    """
    with ThreadPoolExecutor(workers) as threads:
        for view, files in missing.items():
            for hashes, pictures in pixels.stream(files, size, workers):
                if view == IDENTITY_VIEW:
                    yield view, hashes, pictures
                else:
                    yield view, hashes, np.stack(list(threads.map(view.apply, pictures, hashes)))


def _compute(caches: Mapping[View, FeatureCache], extractor: Extractor, batches: Iterable[_Fed]) -> None:
    for view, group in groupby(batches, key=lambda fed: fed[0]):
        done: list[str] = []
        vectors: list[Features] = []
        for _, hashes, pictures in group:
            done += hashes
            vectors.append(extractor(pictures))
            if len(done) >= _PART:
                caches[view].write(done, np.concatenate(vectors))
                done, vectors = [], []
        if done:
            caches[view].write(done, np.concatenate(vectors))
