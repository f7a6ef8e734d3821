"""Extraction of features: each picture is decoded once and augmented once a view, whatever interrupts the stage."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest

from ml.core.errors import DeviceError, NoGpuError, StoreError
from ml.core.settings import Settings
from ml.core.store import Store
from ml.data.training_sets import read_dataset
from ml.images import pixel_cache as pixels_module
from ml.images.augmentation import IDENTITY_VIEW, View
from ml.images.augmentation_settings import Augmentation
from ml.images.decoding import decode, resize
from ml.images.pixel_cache import PixelCache
from ml.images.pixel_formats import pixel_hash
from ml.training import features as features_module
from ml.training.backbone_weights import FEATURE_SIZE, fetch_weights, resolve_weights
from ml.training.extractors import OpenVINOExtractor, TensorFlowExtractor, choose_backend
from ml.training.features import FeatureCache, Shard, extract_features
from ml.training.presets import load_preset
from tests.helpers import made_up

pytestmark = pytest.mark.integration

IMAGES = 40
CHANGED = Augmentation(flips=True, rotations=True, hed=0.05, brightness=0.05, contrast=0.1)
PRESET = load_preset("demo")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A store with random weights and their converted network only: made once, hard-linked by each test."""
    root = tmp_path_factory.mktemp("features")
    store = Store((root / "store").as_uri())
    weights = resolve_weights("random", store)
    OpenVINOExtractor(weights.id, store, root / "home" / "cache")
    return root


@pytest.fixture
def world(base, tmp_path):
    """A dataset of small pictures of which nothing is cached yet."""
    shutil.copytree(base, tmp_path / "world", copy_function=os.link)
    store = Store((tmp_path / "world/store").as_uri())
    settings = Settings(home=tmp_path / "world/home", store=store.root, weights="random", backend="openvino", workers=1)
    return SimpleNamespace(root=tmp_path, store=store, settings=settings, dataset=dataset(store, IMAGES))


def dataset(store: Store, images: int) -> str:
    """Make a dataset of this number of made-up pictures."""
    rows = made_up.manifest_rows({"14-1": ("DC", images)})
    files = [made_up.png(seed) for seed in range(images)]
    rows["sha256"] = [store.put_blob(data) for data in files]
    rows["pixel_sha256"] = [pixel_hash(decode(data)) for data in files]
    return made_up.create_dataset(store, rows)


def hashes_of(world, name: str | None = None) -> list[str]:
    return read_dataset(name or world.dataset, world.store)["pixel_sha256"].tolist()


def run(world, name: str | None = None, **options):
    return extract_features(name or world.dataset, PRESET, world.store, world.settings, **options)


def cache(world, view: View = IDENTITY_VIEW) -> FeatureCache:
    return FeatureCache(world.store, resolve_weights("random", world.store).id, "openvino", view)


def counts(made) -> tuple[int, int, int]:
    return made["extracted"], made["cached"], made["decoded"]


def read_view(view, hashes, made, store):
    """Returns the features of these pictures in a view, from the cache that ``made`` names."""
    return FeatureCache(store, made["weights"], made["backend"], view).read(hashes)


def test_everything_is_extracted_once(world, monkeypatch, capsys):
    made = run(world)
    assert list(made) == [
        *("images", "views", "extracted", "cached", "decoded", "weights", "weights_kind", "backend", "shard")
    ]
    assert (made["images"], made["views"], counts(made)) == (IMAGES, 1, (IMAGES, 0, IMAGES))
    assert f"features: {IMAGES} computed, 0 cached" in capsys.readouterr().err
    monkeypatch.setattr(
        features_module, "OpenVINOExtractor", SimpleNamespace(batch=8)
    )  # would fail if it were asked for
    monkeypatch.setattr(pixels_module, "_load_resized", None)
    assert counts(run(world)) == (0, IMAGES, 0)


def test_a_tenth_more_images_costs_only_them(world):
    run(world)
    more = dataset(world.store, IMAGES + 4)
    assert counts(run(world, more)) == (4, IMAGES, 4)
    assert counts(run(world, more)) == (0, IMAGES + 4, 0)
    assert len(world.store.keys(cache(world).prefix)) == 2


def test_a_cache_keeps_its_name_until_pixels_are_made_another_way(world):
    from ml.core.hashes import digest

    key = {
        "weights": "weights-1",
        "view": {"view": "identity", "size": 224, "resize": "pillow-reduce-bicubic", "version": 2},
        "backend": "openvino",
        "precision": "float32",
    }
    assert FeatureCache(world.store, "weights-1", "openvino").prefix == f"objects/caches/features-{digest(key)[:12]}"
    assert PixelCache(world.store).prefix == f"objects/caches/pixels-{digest(key['view'])[:12]}"


def test_features_are_those_of_each_picture_alone(world):
    made = run(world)
    features = read_view(IDENTITY_VIEW, hashes_of(world), made, world.store)
    assert features.shape == (IMAGES, FEATURE_SIZE)
    rows = read_dataset(world.dataset, world.store)
    alone = OpenVINOExtractor(made["weights"], world.store, world.settings.cache)
    for i in (0, 13, IMAGES - 1):
        picture = resize(decode(world.store.blob(rows["sha256"][i])))
        assert np.allclose(alone(picture[None])[0], features[i], rtol=1e-4, atol=1e-5)


def test_openvino_and_tensorflow_agree(world):
    weights = resolve_weights("random", world.store).id
    rows = read_dataset(world.dataset, world.store)
    pixels = np.stack([resize(decode(world.store.blob(sha))) for sha in rows["sha256"][:12]])
    a = OpenVINOExtractor(weights, world.store, world.settings.cache)(pixels)  # more than one batch of it
    b = TensorFlowExtractor(weights, world.store)(pixels)
    assert np.linalg.norm(a - b) / np.linalg.norm(b) < 1e-4
    assert np.linalg.norm(a[0] - a[1]) / np.linalg.norm(a[0]) > 1e-3  # else it would say little
    asked = world.settings.model_copy(update={"backend": "tensorflow"})
    made = extract_features(world.dataset, PRESET, world.store, asked)
    assert (made["backend"], counts(made)) == ("tensorflow", (IMAGES, 0, IMAGES))
    assert np.allclose(read_view(IDENTITY_VIEW, rows["pixel_sha256"].tolist()[:12], made, world.store), b, atol=1e-4)


def test_views_of_rare_images_alone(world, monkeypatch):
    everything, rare = hashes_of(world), set(hashes_of(world)[::4])
    first, second = View(1, CHANGED), View(2, CHANGED)
    plan = [(first, rare), (second, rare | {"0" * 64}), (first, everything[:2])]
    twelve = len(rare | set(everything[:2])) + len(rare)
    made = run(world, plan=plan)
    assert (made["views"], counts(made)) == (3, (IMAGES + twelve, 0, IMAGES))
    assert cache(world, first).cached_hashes() == rare | set(everything[:2])
    assert cache(world, second).cached_hashes() == rare
    assert cache(world).cached_hashes() == set(everything)
    assert len({cache(world, view).prefix for view in (IDENTITY_VIEW, first, second)}) == 3
    some = sorted(rare)
    backbone = OpenVINOExtractor(made["weights"], world.store, world.settings.cache)
    pictures = {h: p[0] for (h,), p in PixelCache(world.store).batches(some, 1)}
    expected = backbone(np.stack([second.apply(pictures[h], h) for h in some]))
    found = read_view(second, some, made, world.store)
    assert np.allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert not np.allclose(found, read_view(IDENTITY_VIEW, some, made, world.store), rtol=1e-4, atol=1e-5)
    with pytest.raises(StoreError, match="have no features"):
        read_view(second, everything, made, world.store)

    monkeypatch.setattr(pixels_module, "_load_resized", None)  # nothing is decoded for a view
    assert counts(run(world, plan=plan)) == (0, IMAGES + twelve, 0)
    third = run(world, plan=[*plan, (View(3, CHANGED), rare)])
    assert counts(third) == (len(rare), IMAGES + twelve, 0)
    assert counts(run(world)) == (0, IMAGES, 0)


def test_with_processes_the_result_is_the_same(world):
    plan = [(View(1, CHANGED), hashes_of(world)[:9])]
    one = run(world, plan=plan)
    alone = read_view(View(1, CHANGED), hashes_of(world)[:9], one, world.store)
    for folder in (*world.store.caches("pixels"), *world.store.caches("features")):
        shutil.rmtree(world.store.path(folder))
    world.settings = world.settings.model_copy(update={"workers": 2})
    two = run(world, plan=plan)
    assert two == one
    assert (read_view(View(1, CHANGED), hashes_of(world)[:9], two, world.store) == alone).all()


def test_pixels_that_were_lost_are_decoded_again_for_a_view(world):
    run(world)
    (folder,) = world.store.caches("pixels")
    shutil.rmtree(world.store.path(folder))
    assert counts(run(world, plan=[(View(1, CHANGED), hashes_of(world)[:5])])) == (5, IMAGES, 5)


def test_parts_are_written_as_they_come(world, monkeypatch):
    monkeypatch.setattr(pixels_module, "_PART", 16)
    monkeypatch.setattr(features_module, "_PART", 16)
    run(world)
    assert len(world.store.keys(cache(world).prefix)) == 3  # 16, 16, 8
    assert len(world.store.keys(PixelCache(world.store).prefix)) == 6
    index = PixelCache(world.store).index()
    for hashes, pictures in PixelCache(world.store).batches(hashes_of(world), 7):
        for h, picture in zip(hashes, pictures, strict=True):
            assert (
                picture
                == np.load(world.store.local(f"{PixelCache(world.store).prefix}/{index[h][0]}.npy"))[index[h][1]]
            ).all()


PROGRAM = """
import json, sys, time
from ml.training import features
from ml.images import pixel_cache as pixels
from ml.training.presets import load_preset
from ml.core.settings import Settings
from ml.core.store import Store

if __name__ == "__main__":
    dataset, root, home, pause, part = sys.argv[1:]
    pixels._PART = features._PART = int(part)
    run = features.OpenVINOExtractor.__call__

    def slow(self, pictures):
        time.sleep(float(pause))
        return run(self, pictures)

    features.OpenVINOExtractor.__call__ = slow
    settings = Settings(home=home, store=root, weights="random", backend="openvino", workers=2)
    print(json.dumps(features.extract_features(dataset, load_preset("demo"), Store(root), settings)))
"""


def start_extraction(world, *, pause: float, part: int) -> subprocess.Popen:
    file = world.root / "program.py"
    file.write_text(PROGRAM)
    arguments = (world.dataset, world.store.root, str(world.settings.home), str(pause), str(part))
    return subprocess.Popen([sys.executable, str(file), *arguments], stdout=subprocess.PIPE, text=True)


def test_killed_halfway_only_the_rest_is_computed(world):
    with start_extraction(world, pause=0.5, part=8) as process:
        deadline = time.monotonic() + 120
        while len(world.store.keys(cache(world).prefix)) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        family = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGKILL)
        process.wait()
    done, decoded = cache(world).cached_hashes(), set(PixelCache(world.store).index())
    assert 16 <= len(done) < IMAGES
    assert done <= decoded | set(hashes_of(world))
    _, alive = psutil.wait_procs(family, timeout=20)
    assert alive == []  # nobody waits for work that will not come
    made = run(world)
    assert counts(made) == (IMAGES - len(done), len(done), len(set(hashes_of(world)) - decoded))
    whole = read_view(IDENTITY_VIEW, hashes_of(world), made, world.store)
    shutil.rmtree(world.store.path(cache(world).prefix))
    assert np.allclose(read_view(IDENTITY_VIEW, hashes_of(world), run(world), world.store), whole, rtol=1e-4, atol=1e-5)


def test_two_at_once_end_well(world):
    with start_extraction(world, pause=0.05, part=16) as one, start_extraction(world, pause=0.05, part=16) as other:
        answers = [json.loads(process.communicate(timeout=200)[0]) for process in (one, other)]
    assert [one.returncode, other.returncode] == [0, 0]
    assert all(made["extracted"] + made["cached"] == IMAGES for made in answers)
    parts = len(world.store.keys(cache(world).prefix))
    assert parts == 3  # the same images in the same order have the same name
    together = read_view(IDENTITY_VIEW, hashes_of(world), answers[0], world.store)
    shutil.rmtree(world.store.path(cache(world).prefix))
    alone = read_view(IDENTITY_VIEW, hashes_of(world), run(world), world.store)
    assert (together == alone).all()


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("harm", ["truncated", "another", "gone"])
def test_a_file_that_is_not_what_it_was_is_named(world, harm, workers):
    world.settings = world.settings.model_copy(update={"workers": workers})
    sha256 = read_dataset(world.dataset, world.store)["sha256"].iloc[7]
    file = Path(world.store.path(world.store.blob_key(sha256)))
    message = f"{sha256}"
    if harm == "truncated":
        file.write_bytes(file.read_bytes()[:-200])
        message += r" is damaged \(truncated: .*\); remove it and fetch its source again"
    elif harm == "another":
        file.write_bytes(made_up.png(999))
        message += " .*does not hold the picture its manifest recorded; run manifest again"
    else:
        file.unlink()
        message += ": not in the store"
    before = set(psutil.Process().children())
    with pytest.raises(StoreError, match=message):
        run(world)
    assert set(psutil.Process().children()) <= before | {
        p for p in psutil.Process().children() if is_resource_tracker(p)
    }


def is_resource_tracker(process: psutil.Process) -> bool:
    """Whether this is multiprocessing's own process, which lives as long as this one."""
    return "resource_tracker" in " ".join(process.cmdline())


def test_a_cache_gives_rows_in_the_order_they_are_asked_for(world):
    vectors = np.random.default_rng(0).random((5, FEATURE_SIZE), dtype=np.float32)
    hashes = hashes_of(world)
    partial = FeatureCache(world.store, "weights-1", "openvino")
    partial.write(hashes[:5], vectors)
    assert partial.cached_hashes() == set(hashes[:5])
    assert (partial.read([hashes[3], hashes[0]]) == vectors[[3, 0]]).all()
    with pytest.raises(StoreError, match="1 of 2 images have no features"):
        partial.read([hashes[0], hashes[7]])


def test_shards_share_the_images_out_and_leave_none(world):
    images = set(hashes_of(world))
    parts = [{h for h in images if Shard(n, 3).contains(h)} for n in (1, 2, 3)]
    assert set.union(*parts) == images
    assert sum(map(len, parts)) == len(images)
    rare = set(sorted(images)[:10])
    plan = [(View(1, CHANGED), rare)]
    for number, part in enumerate(parts, start=1):
        made = run(world, shard=Shard(number, 3), plan=plan)
        assert made["images"] == len(part)
        assert counts(made) == (len(part) + len(part & rare), 0, len(part))
        assert made["shard"] == f"{number}/3"
    rest = run(world, plan=plan)
    assert (rest["images"], counts(rest)) == (IMAGES, (0, IMAGES + 10, 0))
    assert rest["shard"] is None


def test_weights_by_id_are_taken_from_the_store_alone(world, monkeypatch):
    made = fetch_weights("random", world.store, allow_random=False)
    assert (made["kind"], made["pretrained"]) == ("random", False)
    run(world)
    monkeypatch.setattr(features_module, "resolve_weights", None)
    found = run(world, weights_id=made["weights"])
    assert (found["extracted"], found["weights"]) == (0, made["weights"])
    for unknown in ("weights-000000000000", world.dataset):
        with pytest.raises(StoreError, match=unknown):
            run(world, weights_id=unknown)


def test_a_gpu_that_was_asked_for_is_not_replaced_by_the_cpu(world, monkeypatch):
    import tensorflow as tf

    world.settings = world.settings.model_copy(update={"gpu_required": True, "backend": "auto"})
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda *_: [])
    monkeypatch.setattr(features_module, "read_dataset", None)  # at once, rather than after any work
    with pytest.raises(NoGpuError, match=r"TensorFlow .* sees 0 .*nothing was trained"):
        run(world)
    assert choose_backend(world.settings) == "tensorflow"


@pytest.mark.parametrize("error", [MemoryError(), type("ResourceExhaustedError", (Exception,), {})("OOM when …\n")])
@pytest.mark.parametrize("where", ["_compute", "_feed"])
def test_out_of_memory_is_one_line(world, monkeypatch, error, where):
    def full(*_):
        raise error
        yield

    monkeypatch.setattr(features_module, where, full if where == "_feed" else lambda *given: next(full()))
    with pytest.raises(DeviceError, match=r"out of .*memory: the backbone takes \d+ images at a time"):
        run(world)
