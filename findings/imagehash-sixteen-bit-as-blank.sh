#!/usr/bin/env bash
# One would guess that a perceptual hash of a 16-bit greyscale picture resembles that of its 8-bit copy.
# It is the hash of a blank white picture: ImageHash asks Pillow to convert to 8 bits, and Pillow clips every level
# above 255 to white instead of scaling. Any two such pictures are therefore 0 bits apart.
# This matters where near-duplicates are found by distance: all 16-bit pictures of a source would count as one.
# Library: imagehash 4.3.2 with Pillow 13.0.0.
set -euo pipefail

imagehash="${IMAGEHASH_VERSION:-4.3.2}"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile --disable-pip-version-check "imagehash==$imagehash" pillow==13.0.0

venv/bin/python - <<'PY'
import importlib.metadata
import sys

import imagehash
import numpy as np
from PIL import Image

print("imagehash", importlib.metadata.version("imagehash"))
row, column = np.mgrid[0:128, 0:128]
levels = {  # between 0.1 and 0.9
    "waves": 0.5 + 0.2 * (np.sin(column / 9) + np.cos(row / 13)),
    "ramp": 0.1 + 0.8 * (row + column**2 / 128) / 256,
}
hashes = {}
for name, level in levels.items():
    Image.fromarray((level * 65535).astype(np.uint16)).save(f"{name}.png")
    with Image.open(f"{name}.png") as picture:
        hashes[name, 16] = imagehash.phash(picture)
    hashes[name, 8] = imagehash.phash(Image.fromarray((level * 255).astype(np.uint8)))
blank = imagehash.phash(Image.new("L", (128, 128), 255))

print("Two different pictures saved with 16 bits hash like a blank one:")
print("  blank:", blank)
for (name, bits), value in hashes.items():
    print(f"  {name}, {bits} bits: {value}")
if not hashes["waves", 16] == hashes["ramp", 16] == blank:
    sys.exit("CHANGED: 16-bit pictures no longer hash like a blank one")
if hashes["waves", 8] - hashes["ramp", 8] < 10:
    sys.exit("CHANGED: the 8-bit copies are no longer far apart")
PY
