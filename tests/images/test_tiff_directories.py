"""TIFFs with more pictures or planes than one, refused before any of them is parsed or decoded."""

import io
import struct

import numpy as np
import pytest

from ml.core.errors import ImageError
from ml.images import tiff_directories
from ml.images.decoding import decode
from ml.images.deep_pictures import decode_scaled
from ml.images.tiff_directories import check_directories
from tests.helpers.pictures import png, tiff

COLOUR = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
DEEP = COLOUR.astype(np.uint16) * 16
TIFFS = [
    pytest.param({"byteorder": order, "bigtiff": is_big}, id=f"{order}{' big' if is_big else ''}")
    for order in "<>"
    for is_big in (False, True)
]


def stack(pages: int, samples: np.ndarray = COLOUR, **layout: object) -> bytes:
    import tifffile

    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer, **layout) as file:
        for _ in range(pages):
            file.write(samples, photometric="rgb", metadata=None, subfiletype=1, contiguous=False)
    return buffer.getvalue()


@pytest.fixture(autouse=True)
def low_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiff_directories, "MAX_DIRECTORIES", 3)


@pytest.mark.parametrize("layout", TIFFS)
def test_pictures_in_a_tiff_are_counted(layout: dict[str, object]) -> None:
    file = io.BytesIO(stack(3, **layout))
    check_directories(file)
    assert file.tell() == 0
    many = "^mode: more than 3 pictures in one file, and only the first would be read; save each as a file$"
    with pytest.raises(ImageError, match=many):
        check_directories(io.BytesIO(stack(4, **layout)))


def test_no_picture_of_too_many_is_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("PIL.TiffImagePlugin.ImageFileDirectory_v2.load", lambda *_: pytest.fail("was parsed"))
    for samples in (COLOUR, DEEP):
        with pytest.raises(ImageError, match="more than 3 pictures"):
            decode_scaled(stack(4, samples), 12)


def test_what_earlier_releases_took_is_still_read() -> None:
    assert (decode(stack(4)) == COLOUR).all()


def test_a_damaged_chain_is_left_to_the_decoder() -> None:
    data = stack(1)
    [first] = struct.unpack_from("<L", data, 4)
    [entries] = struct.unpack_from("<H", data, first)
    end = first + 2 + 12 * entries
    for after in (first, 2**32 - 1, len(data)):
        chained = data[:end] + struct.pack("<L", after) + data[end + 4 :]
        check_directories(io.BytesIO(chained))
    for cut in range(0, len(data), 7):
        check_directories(io.BytesIO(data[:cut]))
    check_directories(io.BytesIO(png(COLOUR)))
    check_directories(io.BytesIO(b"II+\0" + b"\xff" * 12))


@pytest.mark.parametrize("samples", [COLOUR, DEEP], ids=["8 bits", "16 bits"])
@pytest.mark.parametrize(("tag", "what"), [(32997, "planes"), (32998, "planes a tile")])
def test_a_stack_of_planes_is_no_picture(samples: np.ndarray, tag: int, what: str) -> None:
    data = tiff(samples, photometric="rgb", extratags=[(65_000, 4, 1, 1, True)])
    own = struct.pack("<HHLL", 65_000, 4, 1, 1)
    assert data.count(own) == 1
    one, two = (data.replace(own, struct.pack("<HHLL", tag, 4, 1, planes)) for planes in (1, 2))
    assert decode_scaled(one, 12)[0].shape == COLOUR.shape
    with pytest.raises(ImageError, match=f"^mode: TIFF of 2 {what}; save each plane as a file"):
        decode_scaled(two, 12)
