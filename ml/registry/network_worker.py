"""Scores pictures with a network: reads them from standard input and writes probabilities, as JSON, to a pipe.

``ml.registry.version_scoring`` starts this file, and nothing imports it. It runs this release's code alone: of the
logged model it reads ``network.keras``, which :mod:`ml.registry.network_archive` has checked. The protocol is that of
``model_worker.py``; a row is ``{probabilities}`` or, of a picture that cannot be decoded, ``{error}``.
"""

import json
import os
import sys
from typing import Any

import numpy as np

from ml.core.devices import import_tensorflow_quietly
from ml.core.errors import ImageError
from ml.images.decoding import decode, resize


def main(network_file: str, answers_to: int) -> None:
    """Load the network and answer on the file descriptor ``answers_to`` until standard input ends."""
    import_tensorflow_quietly()
    import keras

    network = keras.saving.load_model(network_file, compile=False, safe_mode=True)
    with os.fdopen(answers_to, "w", encoding="utf-8") as answers:
        print("loaded", file=answers, flush=True)
        while sizes := sys.stdin.buffer.readline():
            pictures = [sys.stdin.buffer.read(size) for size in json.loads(sizes)]
            print(json.dumps(score(network, pictures)), file=answers, flush=True)


def score(network: Any, pictures: list[bytes]) -> list[dict[str, Any]]:
    """Returns a row for each picture: the network's outputs for it, or why it cannot be decoded."""
    rows: list[dict[str, Any]] = []
    decoded = []
    for picture in pictures:
        try:
            decoded.append(resize(decode(picture)))
            rows.append({})
        except ImageError as error:
            rows.append({"error": str(error)})
    if decoded:
        # As one graph: layer by layer a network takes several times the memory.
        outputs = np.asarray(network.predict_on_batch(np.stack(decoded).astype(np.float32)), dtype=np.float64)
        unscored = iter(outputs.tolist())
        for row in rows:
            if not row:
                row["probabilities"] = next(unscored)
    return rows


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
