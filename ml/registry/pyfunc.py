"""The model as it is logged and registered: images in, probabilities and a label out.

``mlflow.pyfunc.load_model`` runs this file ("models from code"); it needs TensorFlow, Pillow, NumPy and pandas, and of
this package only what stands beside it here.
"""

import base64
import binascii
import json
import os
import sys
from pathlib import Path
from typing import Any

import mlflow.pyfunc  # noqa: TID253  # this file is loaded by MLflow itself, and by nothing else at start-up
import numpy as np
import pandas as pd
import yaml

from ml.core.devices import import_tensorflow_quietly
from ml.core.errors import ImageError, RegistryError
from ml.evaluation.decision_rule import DecisionRule
from ml.images.decoding import MIN_SIDE, PREPROCESSING, Pixels, decode, read_image, resize

_BATCH = 32


class ImageClassifier(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
    """A classifier of single images of any size.

    Takes a path, encoded bytes (PNG, JPEG, TIFF …, also base64), a list of these, or a DataFrame whose first column
    holds them or uint8 arrays (height, width, 3); arrays come in a DataFrame, ``pd.DataFrame({"image": [array]})``,
    since MLflow reads a bare one as a table. Returns a DataFrame, a row an image: ``label``, the calibrated probability
    of each class as ``p_<class>``, for the binary model the ``threshold`` that the label was taken at,
    ``model_version`` (name and number in the registry, empty if it was not loaded from there) and ``run_id``, the
    training run.

    Paths are read on the machine that predicts: they are refused where the model is served, and wherever it was loaded
    with ``model_config={"allow_paths": False}``.
    """

    def load_context(self, context: Any) -> None:
        """Load network and facts from the model's artifacts."""
        import_tensorflow_quietly()
        import keras

        self._network = keras.saving.load_model(context.artifacts["network"], compile=False)
        self._facts = json.loads(Path(context.artifacts["facts"]).read_text(encoding="utf-8"))
        if self._facts.get("preparation") != PREPROCESSING:
            raise RegistryError(
                f"this model learnt from pictures that were prepared as {self._facts.get('preparation')}; the code of "
                f"this process prepares them as {PREPROCESSING}, and would have it say something else. Load it in a "
                "process that has not imported breakhis, such as 'mlflow models serve': it brings its own code along"
            )
        self._rule = DecisionRule.from_json(self._facts)
        self._version = _registered(Path(context.artifacts["network"]))
        self._allow_paths = bool((context.model_config or {}).get("allow_paths", True))

    # Hinted as a DataFrame, which MLflow makes of whatever else comes in.
    def predict(self, context: Any, model_input: pd.DataFrame, params: Any = None) -> pd.DataFrame:  # noqa: ARG002
        """Classify images; see the class for what goes in and comes out.

        Raises:
            ImageError: an input is no usable picture; names the file, or its position.
        """
        images = _as_list(model_input)
        allow_paths = self._allow_paths and not _is_served()
        outputs = [np.empty((0, 1 if self._rule.threshold is not None else len(self._facts["classes"])))]
        for start in range(0, len(images), _BATCH):
            few = enumerate(images[start : start + _BATCH], start=start + 1)
            batch = np.stack([resize(_as_pixels(image, number, allow_paths)) for number, image in few])
            # Called rather than .predict(): no progress bar, and no new graph for every batch size.
            outputs.append(np.asarray(self._network(batch.astype(np.float32), training=False), dtype=np.float64))
        return self._frame(np.concatenate(outputs))

    def _frame(self, outputs: np.ndarray) -> pd.DataFrame:
        names, threshold = self._facts["classes"], self._rule.threshold
        if threshold is not None:
            chosen = self._rule.assign_labels(outputs[:, 0])
            outputs = np.stack([1 - outputs[:, 0], outputs[:, 0]], axis=1)
        else:
            chosen = self._rule.assign_labels(outputs)
        frame = pd.DataFrame({"label": [names[k] for k in chosen]})
        for k, name in enumerate(names):
            frame[f"p_{name}"] = outputs[:, k]
        if threshold is not None:
            frame["threshold"] = threshold
        frame["model_version"] = self._version
        frame["run_id"] = self._facts["run_id"]
        return frame


def _registered(artifact: Path) -> str:
    """``name/number`` of the version that was loaded; MLflow leaves a note of it beside the model."""
    for folder in artifact.parents[:3]:
        note = folder / "registered_model_meta"
        if note.is_file():
            told = yaml.safe_load(note.read_text(encoding="utf-8")) or {}
            return f"{told['model_name']}/{told['model_version']}" if told.get("model_name") else ""
    return ""


def _is_served() -> bool:
    """Whether this process answers requests of others: MLflow's scoring server says so in either of these ways."""
    served = os.environ.get("_MLFLOW_IS_IN_SERVING_ENVIRONMENT", "").lower() == "true"
    return served or "__pyfunc_model_path__" in os.environ or "mlflow.pyfunc.scoring_server.app" in sys.modules


def _as_list(model_input: Any) -> list[Any]:
    if isinstance(model_input, pd.DataFrame):
        return model_input.iloc[:, 0].tolist()
    if isinstance(model_input, str | bytes | Path):
        return [model_input]
    if isinstance(model_input, np.ndarray):
        return [model_input] if model_input.ndim == 3 else list(model_input)
    return list(model_input)


def _as_pixels(image: Any, number: int, allow_paths: bool) -> Pixels:
    try:
        if isinstance(image, bytes):
            return decode(image, strict=True)
        if isinstance(image, np.ndarray) and image.ndim == 3:
            if image.dtype != np.uint8 or image.shape[2] != 3:
                raise ImageError(
                    "mode", f"array of {image.dtype}, shape {image.shape}; expected uint8 (height, width, 3)"
                )
            if min(image.shape[:2]) < MIN_SIDE:
                raise ImageError("size", f"{image.shape[1]}x{image.shape[0]} pixels; at least {MIN_SIDE} a side")
            return image
        if isinstance(image, str | Path):
            return _from_text(str(image), allow_paths)
    except ImageError as error:
        raise ImageError(error.reason, f"image {number}: {error.detail}") from None
    raise ImageError("type", f"image {number} is a {type(image).__name__}; expected a path, bytes or a uint8 array")


def _from_text(text: str, allow_paths: bool) -> Pixels:
    # No file name is as long as the smallest picture in base64, and a path that exists is a path.
    if allow_paths and len(text) < 1024 and Path(text).is_file():
        return read_image(Path(text))
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        data = b""
    if len(data) >= 32:
        return decode(data, strict=True)
    if not allow_paths:
        raise ImageError("unreadable", "no picture in base64; paths are not read here, send the picture itself")
    raise ImageError("unreadable", f"{text[:200]}: no such file")


mlflow.models.set_model(ImageClassifier())
