import io

import numpy as np
import pytest
from PIL import Image

from ml.core.errors import StoreError
from ml.core.store import Store
from ml.images.decoding import decode, resize
from ml.images.pixel_cache import PixelCache, _quickly
from ml.images.pixel_formats import pixel_hash
from tests.helpers.made_up import png


def jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(decode(png())).save(buffer, "JPEG")
    return buffer.getvalue()


def test_both_decoders_agree_on_an_ordinary_png():
    assert np.array_equal(_quickly(png()), decode(png()))


@pytest.mark.parametrize("data", [*(png(mode=mode) for mode in ("1", "L", "LA", "P", "RGBA")), jpeg(), b"", b"text"])
def test_any_other_file_is_left_to_pillow(data):
    assert _quickly(data) is None


def cache_image(store: Store, data: bytes, pixels):
    """Returns the cached image of a file that the manifest recorded with these pixels."""
    ((hashes, pictures),) = PixelCache(store).stream({pixel_hash(pixels): store.put_blob(data)}, 8, 1)
    assert hashes == [pixel_hash(pixels)]
    return pictures[0]


@pytest.mark.parametrize("data", [png(), png(mode="RGBA"), jpeg()], ids=["ordinary", "other", "JPEG"])
def test_an_image_is_decoded_and_resized_by_either_decoder(tmp_path, data):
    store = Store(tmp_path.as_uri())
    assert np.array_equal(cache_image(store, data, decode(data)), resize(decode(data)))


@pytest.mark.parametrize("place", range(60, len(png()) - 20, 797))
def test_a_changed_byte_is_always_detected(tmp_path, place):
    store, broken = Store(tmp_path.as_uri()), bytearray(png())
    broken[place] ^= 0x55
    with pytest.raises(StoreError, match=r"is damaged|does not hold the picture"):
        cache_image(store, bytes(broken), decode(png()))
    assert not PixelCache(store).index()
    assert not list((tmp_path / "tmp").iterdir())


@pytest.mark.parametrize("workers", [1, 2])
def test_images_come_in_order_and_stay_unchanged(any_store, tmp_path, monkeypatch, workers):
    monkeypatch.setattr("ml.images.pixel_cache._PART", 5)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    store, pictures = any_store, [decode(png(seed=seed)) for seed in range(13)]
    files = {pixel_hash(one): store.put_blob(png(seed=seed)) for seed, one in enumerate(pictures)}
    batches = list(PixelCache(store).stream(files, 2, workers))  # looked at after their parts were put away
    assert [len(hashes) for hashes, _ in batches] == [2, 2, 1, 2, 2, 1, 2, 1]
    assert [h for hashes, _ in batches for h in hashes] == list(files)
    assert np.array_equal(np.concatenate([some for _, some in batches]), np.stack([resize(one) for one in pictures]))
    assert np.array_equal(PixelCache(store).read(list(files)), np.stack([resize(one) for one in pictures]))
    assert not list(tmp_path.rglob("breakhis-*"))
