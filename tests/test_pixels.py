import io

import numpy as np
import pytest
from PIL import Image

from ml.errors import StoreError
from ml.imaging import decode, pixel_hash, resize
from ml.pixels import _load_resized, _quickly
from ml.store import Store
from tests.made_up import png


def jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(decode(png())).save(buffer, "JPEG")
    return buffer.getvalue()


def test_an_ordinary_png_is_the_same_by_both_decoders():
    assert np.array_equal(_quickly(png()), decode(png()))


@pytest.mark.parametrize("data", [*(png(mode=mode) for mode in ("1", "L", "LA", "P", "RGBA")), jpeg(), b"", b"text"])
def test_any_other_file_is_left_to_pillow(data):
    assert _quickly(data) is None


@pytest.mark.parametrize("data", [png(), png(mode="RGBA"), jpeg()], ids=["ordinary", "other", "JPEG"])
def test_a_picture_is_decoded_and_resized_whatever_decodes_it(tmp_path, data):
    store = Store(tmp_path.as_uri())
    pixels = decode(data)
    loaded = _load_resized((store.root, store.put_blob(data), pixel_hash(pixels)))
    assert np.array_equal(loaded, resize(pixels))


@pytest.mark.parametrize("place", range(60, len(png()) - 20, 797))
def test_a_changed_byte_is_never_taken_for_the_picture(tmp_path, place):
    store, broken = Store(tmp_path.as_uri()), bytearray(png())
    broken[place] ^= 0x55
    with pytest.raises(StoreError, match=r"is damaged|does not hold the picture"):
        _load_resized((store.root, store.put_blob(bytes(broken)), pixel_hash(decode(png()))))
