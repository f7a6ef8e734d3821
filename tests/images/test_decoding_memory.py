"""What the header of a picture says about the memory that decoding it takes, against what it took."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ml.core.errors import ImageError
from ml.images.deep_pictures import decode_scaled

MAKE = {
    "png": "Image.fromarray(rgb).save(file, 'PNG', compress_level=1)",
    "palette png": "Image.fromarray(rgb).quantize(64).save(file, 'PNG')",
    "opaque rgba png": "Image.fromarray(rgb).convert('RGBA').save(file, 'PNG', compress_level=1)",
    "jpeg": "Image.fromarray(rgb).save(file, 'JPEG', quality=90)",
    "progressive jpeg": "Image.fromarray(rgb).save(file, 'JPEG', quality=90, progressive=True, subsampling=0)",
    "tiff": "Image.fromarray(rgb).save(file, 'TIFF')",
    "tiff in one strip": "tifffile.imwrite(file, rgb, compression='zlib', rowsperstrip=3000, photometric='rgb')",
    "tiled tiff": "tifffile.imwrite(file, rgb, compression='zlib', tile=(3008, 4000), photometric='rgb')",
    "planar tiff": "tifffile.imwrite(file, rgb.transpose(2, 0, 1).copy(), photometric='rgb', planarconfig=2)",
    "bmp": "Image.fromarray(rgb).save(file, 'BMP')",
    "deep png": "file.write_bytes(imagecodecs.png_encode(deep, level=1))",
    "deep rgba png": "file.write_bytes(imagecodecs.png_encode(np.dstack([deep, np.full_like(deep[..., 0], 65535)])))",
    "deep tiff": "tifffile.imwrite(file, deep, photometric='rgb', rowsperstrip=3000, compression='zlib')",
    "deep planar tiff": "tifffile.imwrite(file, deep.transpose(2, 0, 1).copy(), photometric='rgb', planarconfig=2)",
}
MEASURE = """
import json, sys
from pathlib import Path
import imagecodecs, numpy as np, tifffile
from PIL import Image
from ml.images.deep_pictures import decode_scaled
from ml.images.pixel_formats import pixel_hash
from ml.images.file_facts import perceptual_hashes

def memory(kind):  # in bytes: what is taken now (VmRSS), or was at the most since the last call (VmHWM)
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind)]
    Path("/proc/self/clear_refs").write_text("5")
    return int(line.split()[1]) * 1024

sums = np.arange(4000, dtype=np.uint32)[None, :, None] + np.arange(3000, dtype=np.uint32)[:, None, None]
rgb = (sums * np.array([1, 2, 3], np.uint32) // 16 % 256).astype(np.uint8)
deep = (sums * np.array([1, 2, 3], np.uint32) % 4096).astype(np.uint16)
del sums
folder, made = Path(sys.argv[1]), json.loads(sys.argv[2])
for name, code in made.items():
    exec(code, globals() | {"file": folder / name})
del rgb, deep
perceptual_hashes(np.zeros((64, 64, 3), np.uint8))  # what it imports is no picture's
took = {}
for name in made:
    data = (folder / name).read_bytes()
    before = memory("VmRSS")
    pixels, _ = decode_scaled(data, 12)
    perceptual_hashes(pixels), pixel_hash(pixels)
    took[name] = memory("VmHWM") - before
    del pixels, _, data
print(json.dumps(took))
"""


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
    """Returns a folder with a picture of each kind, and the bytes that decoding each took at the most."""
    folder = tmp_path_factory.mktemp("pictures")
    command = [sys.executable, "-c", MEASURE, str(folder), json.dumps(MAKE)]
    # With a fixed threshold, the memory of one picture is given back before the next.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return folder, json.loads(done.stdout)


@pytest.mark.parametrize("kind", MAKE)
def test_decoding_takes_no_more_memory_than_the_header_tells(kind: str, measured: tuple[Path, dict[str, int]]) -> None:
    folder, took = measured
    with pytest.raises(ImageError, match=r"^memory: 4000x3000 pixels take up to .* BREAKHIS_DECODING_MEM") as refused:
        decode_scaled((folder / kind).read_bytes(), 12, 16_000_000)
    told = float(refused.value.detail.split(" take up to ")[1].split(" MB")[0].replace(",", "")) * 1e6
    assert told / 4 <= took[kind] <= told + 5e6
