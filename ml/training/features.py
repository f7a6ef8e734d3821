"""Features: the frozen backbone's embedding of each picture, computed once and cached.

While the backbone is frozen its output is constant, so both models train on the same cached vectors. A cache is keyed
by weights, view, backend and precision. Within a cache, vectors are keyed by the hash of the decoded picture, so that
new data costs only its own images. Decoding and augmentation run ahead of the backbone, so that neither waits for the
other.
"""

from collections.abc import Collection, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ml.core.devices import convert_memory_errors, require_gpu
from ml.core.errors import StoreError
from ml.core.hashes import digest
from ml.core.progress import say, track
from ml.core.settings import Settings
from ml.core.store import Json, Store
from ml.core.workers import prefetch
from ml.data.training_sets import read_dataset
from ml.images.augmentation import IDENTITY_VIEW, View
from ml.images.decoding import Pixels
from ml.images.pixel_cache import PixelCache
from ml.training.backbone_weights import FEATURE_SIZE, Weights, look_up_weights, resolve_weights
from ml.training.extractors import (
    Extractor,
    Features,
    OpenVINOExtractor,
    TensorFlowExtractor,
    choose_backend,
    load_extractor,
)

if TYPE_CHECKING:
    from ml.training.presets import Preset

ViewPlan = Sequence[tuple[View, Collection[str]]]
"""Views to compute in addition to the picture as it is, each with the pixel hashes of its images."""

_PART = 512  # images in a part of a cache: 2.6 MB of features
_AHEAD = 3  # batches that may wait for the backbone


@dataclass(frozen=True)
class FeatureCache:
    """Feature vectors by pixel hash, in parts under objects/caches/features-…/.

    A part is one .npz with ``hashes`` (n,) and ``features`` float32 (n, 1280) and is written as a whole. Two processes
    that compute the same images at once only waste space.

    Attributes:
        store: the store that holds the cache.
        weights: the id of the backbone's weights.
        backend: ``openvino`` or ``tensorflow``.
        view: the view of the pictures.
    """

    store: Store
    weights: str
    backend: str
    view: View = IDENTITY_VIEW

    @cached_property
    def prefix(self) -> str:
        """The folder of the parts in the store."""
        key = {"weights": self.weights, "view": self.view.key, "backend": self.backend, "precision": "float32"}
        return f"objects/caches/features-{digest(key)[:12]}"

    def read(self, hashes: list[str]) -> Features:
        """Returns the features of these images, float32 (n, 1280), in this order.

        Raises:
            StoreError: some images are not cached.
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
        """Returns the pixel hashes of the images that are cached."""
        return {h for hashes, _ in self._parts() for h in hashes}

    def write(self, hashes: list[str], features: Features) -> None:
        """Add the features of these images, float32 (n, 1280), as one part."""
        _write_part(self.prefix, hashes, features, self.store)

    @staticmethod
    def remove_images(hashes: Collection[str], store: Store) -> None:
        """Remove these images from the caches of all weights, views and backends."""
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
    """One of ``of`` parts of a dataset. The hash of a picture alone decides in which part it is."""

    number: int
    """From 1."""
    of: int

    def contains(self, pixel_sha256: str) -> bool:
        """Returns whether a picture is in this part."""
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
    """Compute the pixels and features of a dataset that are not cached yet (the ``features`` stage).

    Results are cached a part at a time: a process that is killed loses at most one part, and the next call computes the
    rest. Two calls at once compute the same images twice, with the same result.

    Args:
        dataset: the dataset's id.
        preset: says whether random weights are allowed.
        store: the store that holds dataset, pictures and caches.
        settings: weights, backend, workers.
        weights_id: weights in the store, instead of those that the settings name.
        shard: restricts the work to this part of the dataset.
        plan: views to compute besides the picture as it is. Hashes that the dataset lacks are ignored.

    Returns:
        ``{images, views, extracted, cached, decoded, weights, weights_kind, backend, shard}``: ``images`` and
        ``decoded`` count images of the shard, ``extracted`` and ``cached`` count vectors, one a view of an image.

    Raises:
        WeightsError: the backbone's weights are not available.
        StoreError: a file cannot be decoded any more, or holds another picture than was recorded.
        NoGpuError: the settings ask for a GPU and there is none.
        DeviceError: memory does not suffice.
        TryAgain: a worker process was killed.
    """
    if settings.gpu_required:
        require_gpu()
    rows = read_dataset(dataset, store)
    rows = rows[rows["pixel_sha256"].map(shard.contains)] if shard else rows
    weights, backend = _choose_weights(weights_id, preset, store, settings), choose_backend(settings)
    files = dict(zip(rows["pixel_sha256"], rows["sha256"], strict=True))
    wanted = _group_by_view(list(files), plan or ())
    caches = {view: FeatureCache(store, weights.id, backend, view) for view in wanted}
    missing = {view: _find_missing(hashes, files, caches[view]) for view, hashes in wanted.items()}
    extracted = sum(map(len, missing.values()))
    cached = sum(map(len, wanted.values())) - extracted
    decoded = _extract_missing(missing, caches, backend, weights.id, store, settings) if extracted else 0
    views_note = f" of {len(wanted)} views" if plan else ""
    say(f"features{views_note}: {extracted} computed, {cached} cached, weights {weights.id} ({weights.kind})")
    return {
        "images": len(rows),
        "views": len(wanted),
        "extracted": extracted,
        "cached": cached,
        "decoded": decoded,
        "weights": weights.id,
        "weights_kind": weights.kind,
        "backend": backend,
        "shard": str(shard) if shard else None,
    }


def _choose_weights(weights_id: str | None, preset: "Preset", store: Store, settings: Settings) -> Weights:
    """Returns the weights with this id, or without an id those that the settings name."""
    if weights_id:
        return look_up_weights(weights_id, store)
    return resolve_weights(settings.weights, store, allow_random=preset.random_weights_allowed)


def _find_missing(hashes: list[str], files: Mapping[str, str], cache: FeatureCache) -> dict[str, str]:
    """Returns pixel hash -> file hash of the images that the cache lacks."""
    cached = cache.cached_hashes()
    return {h: files[h] for h in hashes if h not in cached}


def _extract_missing(
    missing: Mapping[View, Mapping[str, str]],
    caches: Mapping[View, FeatureCache],
    backend: str,
    weights: str,
    store: Store,
    settings: Settings,
) -> int:
    """Compute features and write them to the caches.

    Args:
        missing: view -> pixel hash -> file hash of the images to compute.
        caches: the cache of each view.
        backend: ``openvino`` or ``tensorflow``.
        weights: the id of weights in the store.
        store: the store that holds pictures and caches.
        settings: workers and the local cache folder.

    Returns:
        the number of images whose pixels were not cached and are decoded.
    """
    pixels = PixelCache(store)
    decoded = len({h for files in missing.values() for h in files} - pixels.index().keys())
    batch = (OpenVINOExtractor if backend == "openvino" else TensorFlowExtractor).batch
    feed = _feed(missing, pixels, batch, settings.worker_count)
    with (
        convert_memory_errors(f"the backbone takes {batch} images at a time; free the device of other work"),
        prefetch(feed, _AHEAD) as batches,  # decoding thus begins while the backbone is being loaded
    ):
        extractor = load_extractor(backend, weights, store, settings.cache)
        total = sum(-(-len(files) // batch) for files in missing.values())
        _compute(caches, extractor, track(batches, total=total, what=f"extracting features, batches of {batch}"))
    return decoded


def _group_by_view(hashes: list[str], plan: ViewPlan) -> dict[View, list[str]]:
    """Returns each view with its images, in the dataset's order."""
    by_view: dict[View, set[str]] = {IDENTITY_VIEW: set(hashes)}
    for view, its_hashes in plan:
        by_view.setdefault(view, set()).update(its_hashes)
    return {view: [h for h in hashes if h in its_hashes] for view, its_hashes in by_view.items()}


_Batch = tuple[View, list[str], Pixels]
"""View, pixel hashes (n,), and the pictures in that view, uint8 (n, 224, 224, 3)."""


def _feed(
    missing: Mapping[View, Mapping[str, str]], pixels: PixelCache, size: int, workers: int
) -> Generator[_Batch, None, None]:
    """Yields batches for the backbone, one view after the other. All views but the first find the pixels cached.

    Threads augment the pictures: NumPy releases the interpreter's lock for nearly all of the work, and threads need not
    copy arrays as processes would.
    """
    with ThreadPoolExecutor(workers) as threads:
        for view, files in missing.items():
            for hashes, pictures in pixels.stream(files, size, workers):
                if view == IDENTITY_VIEW:
                    yield view, hashes, pictures
                else:
                    yield view, hashes, np.stack(list(threads.map(view.apply, pictures, hashes)))


def _compute(caches: Mapping[View, FeatureCache], extractor: Extractor, batches: Iterable[_Batch]) -> None:
    """Compute the features of these batches and write them to the caches, a part at a time."""
    for view, group in groupby(batches, key=lambda batch: batch[0]):
        computed: list[str] = []
        vectors: list[Features] = []
        for _, hashes, pictures in group:
            computed += hashes
            vectors.append(extractor(pictures))
            if len(computed) >= _PART:
                caches[view].write(computed, np.concatenate(vectors))
                computed, vectors = [], []
        if computed:
            caches[view].write(computed, np.concatenate(vectors))
