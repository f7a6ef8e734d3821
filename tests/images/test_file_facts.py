import io
from dataclasses import astuple
from itertools import permutations

import numpy as np
import pytest
from PIL import Image

from ml.core.store import Store
from ml.data.sources.check_settings import NearDuplicates
from ml.data.sources.demo import draw_files
from ml.images.decoding import decode
from ml.images.file_facts import (
    HASH_DIGITS,
    ORIENTATIONS,
    PictureFacts,
    PictureFactsCache,
    inspect_files,
    perceptual_hashes,
)
from tests.helpers.made_up import png
from tests.helpers.pictures import png as deep_png


def hashes_of(pixels) -> list[int]:
    text = perceptual_hashes(pixels)
    return [int(text[start : start + HASH_DIGITS], 16) for start in range(0, len(text), HASH_DIGITS)]


@pytest.fixture
def store(tmp_path) -> Store:
    return Store((tmp_path / "store").as_uri())


@pytest.fixture(scope="module")
def drawn():
    return [decode(data) for _, data in draw_files(82, 1, 1)][:12]


def test_perceptual_hash_barely_changes_when_an_image_is_resized_or_compressed(drawn):
    def distance(one, other):
        return (hashes_of(one)[0] ^ hashes_of(other)[0]).bit_count()

    for pixels in drawn:
        image = Image.fromarray(pixels)
        lossy = io.BytesIO()
        image.save(lossy, "JPEG", quality=70)
        assert distance(pixels, np.asarray(image.resize((224, 224)))) <= NearDuplicates().distance
        assert distance(pixels, decode(lossy.getvalue())) <= NearDuplicates().distance
    assert min(distance(a, b) for i, a in enumerate(drawn) for b in drawn[:i]) > NearDuplicates().distance


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_a_copy_in_any_orientation_is_found_also_if_it_was_resized_or_compressed(drawn, orientation):
    """Each element of the dihedral group. The copy's first hash is near to one of the original's, and the reverse."""
    limit = NearDuplicates().distance
    for pixels in drawn:
        image = Image.fromarray(pixels)
        turned = image if orientation == "UPRIGHT" else image.transpose(Image.Transpose[orientation])
        lossy = io.BytesIO()
        turned.resize((turned.width // 2, turned.height // 2)).save(lossy, "JPEG", quality=85)
        upright = hashes_of(pixels)
        for copy in (np.asarray(turned), decode(lossy.getvalue())):
            found = hashes_of(copy)
            assert min((found[0] ^ look).bit_count() for look in upright) <= limit
            assert min((upright[0] ^ look).bit_count() for look in found) <= limit
        if orientation != "UPRIGHT":
            assert (hashes_of(np.asarray(turned))[0] ^ upright[0]).bit_count() > 2 * limit  # one hash does not find it


def test_different_pictures_stay_apart_in_all_orientations_and_distances_are_even(drawn):
    looks = [hashes_of(pixels) for pixels in drawn]
    apart = [(a[0] ^ look).bit_count() for i, a in enumerate(looks) for b in looks[:i] for look in b]
    assert min(apart) > NearDuplicates().distance
    assert {bits % 2 for bits in apart} == {0}


def test_a_deeper_picture_is_scaled_once_and_made_again_if_it_is_gone(store: Store) -> None:
    deep = np.random.default_rng(0).integers(0, 4096, (40, 40, 3), dtype=np.uint16)
    file = store.put_blob(deep_png(deep))
    found, decoded = inspect_files({file}, store, 0, 12)
    scaled = found[file].scaled_sha256
    assert decoded == 1
    assert (decode(store.blob(scaled), strict=True) == np.rint(deep * 255.0 / 4095).astype(np.uint8)).all()
    assert inspect_files({file}, store, 0, 12) == (found, 0)
    assert inspect_files({file}, store, 0)[0][file].reason == "mode"  # the rule is part of what is remembered
    assert inspect_files({file}, store, 0, 10)[0][file].reason == "mode"
    store.remove(store.blob_key(scaled))
    assert inspect_files({file}, store, 0, 12) == (found, 1)
    assert store.blob(scaled)


def test_each_file_is_decoded_once_and_can_be_removed(any_store: Store) -> None:
    files = [any_store.put_blob(data) for data in (png(1), png(2), b"no picture")]
    found, decoded = inspect_files(set(files), any_store, 0)
    assert decoded == 3
    assert (found[files[0]].width, found[files[0]].height, found[files[2]].reason) == (70, 46, "undecodable")
    assert inspect_files({*files, any_store.put_blob(png(3))}, any_store, 0)[1] == 1
    PictureFactsCache.forget({files[0]}, any_store)
    assert files[0] not in PictureFactsCache(any_store).read()
    again, decoded = inspect_files(set(files), any_store, 0)
    assert (again, decoded) == (found, 1)


def too_slow(seconds: float) -> PictureFacts:
    return PictureFacts(reason="time", detail=f"more than {seconds} s", cpu_seconds=seconds)


def test_a_picture_that_took_too_long_is_tried_again_under_a_higher_limit_alone(store: Store) -> None:
    file = store.put_blob(png(1))
    PictureFactsCache(store).write({file: too_slow(30.0)})
    assert inspect_files({file}, store, 0, cpu_seconds=30.0) == ({file: too_slow(30.0)}, 0)
    assert inspect_files({file}, store, 0, cpu_seconds=20.0) == ({file: too_slow(30.0)}, 0)
    found, decoded = inspect_files({file}, store, 0, cpu_seconds=30.5)
    assert (found[file].reason, decoded) == ("", 1)
    assert inspect_files({file}, store, 0, cpu_seconds=20.0) == (found, 0)
    PictureFactsCache.forget({file}, store)
    assert PictureFactsCache(store).read() == {}


@pytest.mark.parametrize("order", [*permutations([too_slow(30.0), too_slow(60.0), PictureFacts("h", "p", 7, 4)])])
def test_what_was_found_under_the_highest_limit_counts(store: Store, order: tuple[PictureFacts, ...]) -> None:
    """Whatever the order in which the store lists the cache's parts."""
    cache = PictureFactsCache(store)
    parts = {f"{number}.json": [["file", *astuple(facts)]] for number, facts in enumerate(order)}
    for name, part in parts.items():
        store.put_json(f"{cache.prefix}/{name}", part)
    assert cache.read() == {"file": PictureFacts("h", "p", 7, 4)}
    settled = next(name for name, facts in zip(parts, order, strict=True) if not facts.reason)
    store.remove(f"{cache.prefix}/{settled}")
    assert cache.read() == {"file": too_slow(60.0)}


def test_facts_of_earlier_releases_are_read(store: Store) -> None:
    cache = PictureFactsCache(store)
    store.put_json(f"{cache.prefix}/old.json", [["file", "h", "p", 7, 4, "", "", ""]])
    assert cache.read() == {"file": PictureFacts("h", "p", 7, 4)}
