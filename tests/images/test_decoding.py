import io
import pickle

import numpy as np
import pytest
from PIL import Image

from ml.core.errors import ImageError
from ml.images import decoding
from ml.images.decoding import decode, pixel_hash, read_image, resize
from tests.helpers.made_up import png


def encoded(array: np.ndarray, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, form, **options)
    return buffer.getvalue()


def test_rgb_pixels_are_unchanged():
    array = np.arange(5 * 4 * 3, dtype=np.uint8).reshape(5, 4, 3)
    assert (decode(encoded(array, "PNG")) == array).all()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA"])
def test_other_eight_bit_modes_become_rgb(mode):
    pixels = decode(png(mode=mode))
    assert pixels.shape == (46, 70, 3)
    assert pixels.dtype == np.uint8


def test_cmyk_jpeg_and_a_single_pixel():
    cmyk = np.zeros((8, 8, 4), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(cmyk, mode="CMYK").save(buffer, "JPEG")
    assert decode(buffer.getvalue()).shape == (8, 8, 3)
    assert decode(png(size=(1, 1))).shape == (1, 1, 3)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "undecodable"),
        (b"not a picture at all", "undecodable"),
        (png()[: len(png()) // 2], "truncated"),
        (encoded(np.zeros((4, 4), np.uint16), "PNG"), "mode"),
        (encoded(np.zeros((4, 4), np.float32), "TIFF"), "mode"),
    ],
)
def test_an_unusable_image_is_refused_with_a_reason(data, reason):
    with pytest.raises(ImageError) as caught:
        decode(data)
    assert caught.value.reason == reason
    assert "0x" not in caught.value.detail


def test_an_image_that_is_too_large_is_refused_before_it_is_decoded(monkeypatch):
    monkeypatch.setattr(decoding, "MAX_PIXELS", 1000)
    with pytest.raises(ImageError, match="size: 70x46 pixels"):
        decode(png())


def test_a_changed_byte_in_the_middle_is_detected():
    data = bytearray(png(size=(200, 200)))
    data[len(data) // 2] ^= 0xFF
    with pytest.raises(ImageError):
        decode(bytes(data))


def test_resize_to_the_networks_input():
    assert resize(decode(png())).shape == (224, 224, 3)
    exact = np.zeros((224, 224, 3), np.uint8)
    assert resize(exact) is exact


def test_pixel_hash_depends_on_the_image_and_not_on_the_file():
    array = np.random.default_rng(0).integers(0, 256, (6, 4, 3), dtype=np.uint8)
    slow, quick = encoded(array, "PNG", compress_level=9), encoded(array, "PNG", compress_level=0)
    assert slow != quick
    assert pixel_hash(decode(slow)) == pixel_hash(decode(quick))
    assert pixel_hash(array) != pixel_hash(array.reshape(4, 6, 3))


def test_read_image_names_the_file(tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"text")
    with pytest.raises(ImageError, match=r"bad\.png"):
        read_image(bad)
    with pytest.raises(ImageError, match=r"gone\.png: No such file"):
        read_image(tmp_path / "gone.png")


def test_image_errors_can_be_pickled():
    error = pickle.loads(pickle.dumps(ImageError("mode", "16 bits")))
    assert (str(error), error.reason) == ("mode: 16 bits", "mode")
