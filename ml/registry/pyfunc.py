"""The logged and registered model: it takes images and returns probabilities and labels.

``mlflow.pyfunc.load_model`` runs this file ("models from code"). It needs TensorFlow, Pillow, NumPy and pandas, and the
modules of this package that are imported below, which are logged with the model.
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
from ml.images.pixel_formats import check_colour

_BATCH = 8  # 32 take 3.9 GB


class ImageClassifier(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
    """A classifier of single images of any size.

    It takes a path, encoded bytes (PNG, JPEG, TIFF …, also base64), a list of these, or a DataFrame whose first column
    holds them or uint8 arrays (height, width, 3). Arrays come in a DataFrame, ``pd.DataFrame({"image": [array]})``,
    since MLflow reads a bare array as a table.

    It returns a DataFrame with one row an image: ``label``, the calibrated probability of each class as ``p_<class>``,
    for the binary model the decision ``threshold``, ``model_version`` (name and number in the registry, empty if the
    model was not loaded from there) and ``run_id``, the training run.

    Paths are read on the machine that predicts. They are refused where the model is served, and where it was loaded
    with ``model_config={"allow_paths": False}``.
    """

    def load_context(self, context: Any) -> None:
        """Load network and facts from the model's artifacts.

        Raises:
            RegistryError: the code of this process preprocesses pictures in another way than the model's own.
        """
        import_tensorflow_quietly()
        import keras

        self._network = keras.saving.load_model(context.artifacts["network"], compile=False)
        self._facts = json.loads(Path(context.artifacts["facts"]).read_text(encoding="utf-8"))
        if self._facts.get("preparation") != PREPROCESSING:
            raise RegistryError(
                f"this model was trained on pictures that were prepared as {self._facts.get('preparation')}; the code "
                f"of this process prepares them as {PREPROCESSING}, so predictions would differ. Load the model in a "
                "process that has not imported breakhis, such as 'mlflow models serve': it brings its own code along"
            )
        self._rule = DecisionRule.from_json(self._facts)
        self._version = _read_model_version(Path(context.artifacts["network"]))
        self._allow_paths = bool((context.model_config or {}).get("allow_paths", True))

    # The type hint has MLflow convert every other input to a DataFrame.
    def predict(self, context: Any, model_input: pd.DataFrame, params: Any = None) -> pd.DataFrame:  # noqa: ARG002
        """Classify images. The class describes inputs and outputs.

        Raises:
            ImageError: an input is no usable picture; the error names the file or its position.
        """
        images = _list_images(model_input)
        allow_paths = self._allow_paths and not _is_served()
        outputs = [np.empty((0, 1 if self._rule.threshold is not None else len(self._facts["classes"])))]
        for start in range(0, len(images), _BATCH):
            numbered = enumerate(images[start : start + _BATCH], start=start + 1)
            batch = np.stack([resize(_read_pixels(image, number, allow_paths)) for number, image in numbered])
            # The network is called, since .predict() shows a progress bar and builds a graph for every batch size.
            outputs.append(np.asarray(self._network(batch.astype(np.float32), training=False), dtype=np.float64))
        return self._build_table(np.concatenate(outputs))

    def _build_table(self, outputs: np.ndarray) -> pd.DataFrame:
        """Returns labels and probabilities as a table; ``outputs`` is (n, 1) of malignant, or (n, 8)."""
        names, threshold = self._facts["classes"], self._rule.threshold
        if threshold is not None:
            predicted = self._rule.assign_labels(outputs[:, 0])
            outputs = np.stack([1 - outputs[:, 0], outputs[:, 0]], axis=1)
        else:
            predicted = self._rule.assign_labels(outputs)
        frame = pd.DataFrame({"label": [names[k] for k in predicted]})
        for k, name in enumerate(names):
            frame[f"p_{name}"] = outputs[:, k]
        if threshold is not None:
            frame["threshold"] = threshold
        frame["model_version"] = self._version
        frame["run_id"] = self._facts["run_id"]
        return frame


def _read_model_version(artifact: Path) -> str:
    """Returns ``name/number`` of the loaded version, which MLflow writes to a file beside the model, or nothing."""
    for folder in artifact.parents[:3]:
        file = folder / "registered_model_meta"
        if file.is_file():
            version = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
            return f"{version['model_name']}/{version['model_version']}" if version.get("model_name") else ""
    return ""


def _is_served() -> bool:
    """Returns whether this process serves the model: MLflow's scoring server shows it in one of these ways."""
    served = os.environ.get("_MLFLOW_IS_IN_SERVING_ENVIRONMENT", "").lower() == "true"
    return served or "__pyfunc_model_path__" in os.environ or "mlflow.pyfunc.scoring_server.app" in sys.modules


def _list_images(model_input: Any) -> list[Any]:
    """Returns the images of any supported input, not yet decoded."""
    if isinstance(model_input, pd.DataFrame):
        return model_input.iloc[:, 0].tolist()
    if isinstance(model_input, str | bytes | Path):
        return [model_input]
    if isinstance(model_input, np.ndarray):
        return [model_input] if model_input.ndim == 3 else list(model_input)
    return list(model_input)


def _read_pixels(image: Any, number: int, allow_paths: bool) -> Pixels:
    """Returns the pixels of one image; ``number`` is its position, for errors."""
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
            check_colour(image)
            return image
        if isinstance(image, str | Path):
            return _read_path_or_base64(str(image), allow_paths)
    except ImageError as error:
        raise ImageError(error.reason, f"image {number}: {error.detail}") from None
    raise ImageError("type", f"image {number} is a {type(image).__name__}; expected a path, bytes or a uint8 array")


def _read_path_or_base64(text: str, allow_paths: bool) -> Pixels:
    # A path that exists is read as a path. It is shorter than the smallest picture in base64.
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
