import contextlib
import io
import pickle

import numpy as np
import pytest
from PIL import Image

from ml.core.errors import ImageError
from ml.images import decoding
from ml.images.decoding import decode, read_image, resize
from ml.images.deep_pictures import decode_scaled
from ml.images.pixel_formats import pixel_hash
from tests.helpers.made_up import png
from tests.helpers.pictures import pillow, tiff
from tests.helpers.pictures import png as deep_png


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


def classes_of_exceptions(base: type[Exception] = Exception) -> set[type[Exception]]:
    found = {base}
    for each in base.__subclasses__():
        found |= classes_of_exceptions(each)
    return found


def make(kind: type[Exception]) -> Exception | None:
    for arguments in ((), ("it broke",), ("utf-8", b"", 0, 1, "it broke")):
        try:
            return kind(*arguments)
        except Exception:  # it wants others
            continue
    return None


DEEP = np.arange(30 * 40 * 3, dtype=np.uint16).reshape(30, 40, 3)
DECODERS = {
    "PIL.PngImagePlugin.PngImageFile._open": png(),
    "PIL.ImageFile.ImageFile.load": png(),
    "PIL.Image.Image.crop": png(size=(1100, 1000)),
    "PIL.TiffImagePlugin.TiffImageFile._setup": pillow(Image.new("RGB", (40, 30), "red"), "TIFF"),
    "imagecodecs.png_decode": deep_png(DEEP),
    "tifffile.TiffFile": tiff(DEEP, photometric="rgb"),
    "tifffile.TiffPage.asarray": tiff(DEEP, photometric="rgb"),
}


@pytest.mark.parametrize("decoder", DECODERS)
def test_whatever_a_decoder_raises_is_an_image_error(decoder, monkeypatch):
    decode_scaled(DECODERS[decoder], 16)  # there is nothing wrong with the picture
    theirs = ("builtins", "struct", "zlib", "PIL", "imagecodecs", "tifffile")
    kinds = [kind for kind in classes_of_exceptions() if kind.__module__.partition(".")[0].strip("_") in theirs]
    assert {"MemoryError", "RecursionError", "AttributeError", "ZeroDivisionError"} <= {kind.__name__ for kind in kinds}
    for error in filter(None, map(make, kinds)):

        def fail(*_, error=error, **__):
            raise error

        monkeypatch.setattr(decoder, fail)
        with pytest.raises(ImageError) as caught:
            decode_scaled(DECODERS[decoder], 16)
        assert caught.value.reason in {"undecodable", "truncated", "mode", "size", "memory"}
        assert caught.value.detail
        assert "\n" not in caught.value.detail


def write_other_formats() -> dict[str, bytes]:
    Image.init()
    written = {}
    for form in sorted(set(Image.SAVE) & set(Image.OPEN) - {"PNG", "JPEG", "TIFF", "BMP", "DIB", "MPO"}):
        for mode in ("RGB", "L", "1", "F"):
            with contextlib.suppress(OSError, ValueError, KeyError):  # no such pictures, or no encoder
                written.setdefault(form, pillow(Image.new(mode, (64, 64)), form))
    return written


OTHER_FORMATS = write_other_formats()


@pytest.mark.parametrize("form", OTHER_FORMATS)
def test_no_other_format_is_opened_whatever_the_file_is_called(form, tmp_path, monkeypatch):
    assert len(OTHER_FORMATS) > 10
    factory, _ = Image.OPEN[form]
    monkeypatch.setitem(Image.OPEN, form, (lambda *_: pytest.fail("it was opened"), None))
    file = tmp_path / "SOB_M_DC-14-2523-40-001.png"
    file.write_bytes(OTHER_FORMATS[form])
    with pytest.raises(ImageError, match=r"-001\.png: ") as refused:
        read_image(file)
    assert refused.value.reason in {"undecodable", "mode"}
    if form in {"GIF", "WEBP", "JPEG2000", "AVIF"}:
        assert f"file format {form}, and only PNG, TIFF, JPEG and BMP are read" in refused.value.detail
    if form in {"GIF", "WEBP"}:  # earlier releases took them, and their manifests have them
        monkeypatch.setitem(Image.OPEN, form, (factory, None))
        assert decode(OTHER_FORMATS[form]).shape == (64, 64, 3)


def test_a_tile_of_a_tiff_counts_for_the_memory_and_not_what_shows_of_it():
    data = tiff(np.zeros((30, 40, 3), np.uint8), photometric="rgb", tile=(2048, 2048), compression="zlib")
    with pytest.raises(ImageError, match="memory: 40x30 pixels take up to 34 MB"):
        decode(data, strict=True, memory=16_000_000)


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
