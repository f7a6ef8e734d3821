import io

import numpy as np
from PIL import Image

from ml.core.store import Store
from ml.data.sources.check_settings import NearDuplicates
from ml.data.sources.demo import draw_files
from ml.images.decoding import decode
from ml.images.file_facts import PictureFactsCache, inspect_files, perceptual_hash
from tests.helpers.made_up import png


def test_perceptual_hash_barely_changes_when_an_image_is_resized_or_compressed():
    def distance(one, other):
        return (int(perceptual_hash(one), 16) ^ int(perceptual_hash(other), 16)).bit_count()

    drawn = [decode(data) for _, data in draw_files(82, 1, 1)][:12]
    for pixels in drawn:
        image = Image.fromarray(pixels)
        lossy = io.BytesIO()
        image.save(lossy, "JPEG", quality=70)
        assert distance(pixels, np.asarray(image.resize((224, 224)))) <= NearDuplicates().distance
        assert distance(pixels, decode(lossy.getvalue())) <= NearDuplicates().distance
    assert min(distance(a, b) for i, a in enumerate(drawn) for b in drawn[:i]) > NearDuplicates().distance


def test_each_file_is_decoded_once_and_can_be_removed(any_store: Store) -> None:
    files = [any_store.put_blob(data) for data in (png(1), png(2), b"no picture")]
    found, decoded = inspect_files(set(files), any_store, 1)
    assert decoded == 3
    assert (found[files[0]].width, found[files[0]].height, found[files[2]].reason) == (70, 46, "undecodable")
    assert inspect_files({*files, any_store.put_blob(png(3))}, any_store, 1)[1] == 1
    PictureFactsCache.forget({files[0]}, any_store)
    assert files[0] not in PictureFactsCache(any_store).read()
    again, decoded = inspect_files(set(files), any_store, 1)
    assert (again, decoded) == (found, 1)
