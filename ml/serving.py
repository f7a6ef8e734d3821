"""The model as it is logged and registered: images in, probabilities and a label out.

``mlflow.pyfunc.load_model`` runs this file ("models from code"); it needs TensorFlow, Pillow, NumPy and pandas, and of
this package only what stands beside it here.
"""

import base64
import binascii
import json
from pathlib import Path
from typing import Any

import mlflow.pyfunc  # noqa: TID253  # this file is loaded by MLflow itself, and by nothing else at start-up
import numpy as np
import pandas as pd

from ml.devices import quiet_tensorflow
from ml.errors import ImageError
from ml.imaging import Pixels, decode, read_image, resize

_BATCH = 32


class ImageClassifier(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
    """A classifier of single images of any size.

    Takes a path, encoded bytes (PNG, JPEG, TIFF …, also base64), a uint8 array (height, width, 3), a list of these, or
    a DataFrame whose first column holds them. Returns a DataFrame, a row an image: ``label``, the probability of each
    class as ``p_<class>``, and for the binary model the ``threshold`` that the label was taken at; ``run_id`` names the
    training run.
    """

    def load_context(self, context: Any) -> None:
        """Load network and facts from the model's artifacts."""
        quiet_tensorflow()
        import keras

        self._network = keras.saving.load_model(context.artifacts["network"], compile=False)
        self._facts = json.loads(Path(context.artifacts["facts"]).read_text(encoding="utf-8"))

    # Hinted as a DataFrame, though it takes more: from any other hint MLflow makes a schema, and warns without one.
    def predict(self, context: Any, model_input: pd.DataFrame, params: Any = None) -> pd.DataFrame:  # noqa: ARG002
        """Classify images; see the class for what goes in and comes out.

        Raises:
            ImageError: an input is no usable picture; names the file, or its position.
        """
        images = _as_list(model_input)
        pictures = [resize(_as_pixels(image, number)) for number, image in enumerate(images, start=1)]
        if not pictures:
            return self._frame(np.empty((0, len(self._facts["classes"]))))
        # Called rather than .predict(): no progress bar, and no new graph for every batch size.
        batches = [np.stack(pictures[i : i + _BATCH]) for i in range(0, len(pictures), _BATCH)]
        outputs = [np.asarray(self._network(batch.astype(np.float32), training=False)) for batch in batches]
        return self._frame(np.concatenate(outputs).astype(np.float64))

    def _frame(self, outputs: np.ndarray) -> pd.DataFrame:
        names = self._facts["classes"]
        threshold = self._facts["threshold"]
        if threshold is None:
            probabilities, chosen = outputs, outputs.argmax(axis=1)
        else:
            malignant = outputs[:, -1]
            probabilities = np.stack([1 - malignant, malignant], axis=1)
            chosen = (malignant >= threshold).astype(int)
        frame = pd.DataFrame({"label": [names[k] for k in chosen]})
        for k, name in enumerate(names):
            frame[f"p_{name}"] = probabilities[:, k]
        if threshold is not None:
            frame["threshold"] = threshold
        frame["run_id"] = self._facts["run_id"]
        return frame


def _as_list(model_input: Any) -> list[Any]:
    if isinstance(model_input, pd.DataFrame):
        return model_input.iloc[:, 0].tolist()
    if isinstance(model_input, str | bytes | Path):
        return [model_input]
    if isinstance(model_input, np.ndarray):
        return [model_input] if model_input.ndim == 3 else list(model_input)
    return list(model_input)


def _as_pixels(image: Any, number: int) -> Pixels:
    try:
        if isinstance(image, bytes):
            return decode(image)
        if isinstance(image, np.ndarray) and image.ndim == 3:
            if image.dtype != np.uint8 or image.shape[2] != 3:
                raise ImageError(
                    "mode", f"array of {image.dtype}, shape {image.shape}; expected uint8 (height, width, 3)"
                )
            return image
        if isinstance(image, str | Path):
            return _from_text(str(image))
    except ImageError as error:
        raise ImageError(error.reason, f"image {number}: {error.detail}") from None
    raise ImageError("type", f"image {number} is a {type(image).__name__}; expected a path, bytes or a uint8 array")


def _from_text(text: str) -> Pixels:
    # No file name is as long as the smallest picture in base64, and a path that exists is a path.
    if len(text) < 1024 and Path(text).is_file():
        return read_image(Path(text))
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        data = b""
    if len(data) < 32:
        raise ImageError("unreadable", f"{text[:200]}: no such file")
    return decode(data)


mlflow.models.set_model(ImageClassifier())
