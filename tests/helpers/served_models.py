"""Tiny models in an MLflow of their own, shared by the tests that predict with them.

TensorFlow and MLflow are imported where they are used, since this module is imported while tests are collected.
"""

import io
from typing import TYPE_CHECKING

import pytest
from PIL import Image

from ml.core.mlflow_client import connect
from ml.core.settings import Settings
from ml.evaluation.decision_rule import DecisionRule
from ml.registry.packaging import log_classifier
from tests.helpers.made_up import png

if TYPE_CHECKING:
    import keras


def network(outputs: int) -> "keras.Model":
    """Returns a tiny network with this number of outputs."""
    import keras

    keras.utils.set_random_seed(0)
    x = inputs = keras.Input((224, 224, 3))
    x = keras.layers.Rescaling(1 / 255)(keras.layers.GlobalAveragePooling2D()(x))
    return keras.Model(inputs, keras.layers.Dense(outputs, activation="sigmoid" if outputs == 1 else "softmax")(x))


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """Logs a binary and a subtype model and registers the binary one; returns their URIs and the settings."""
    import mlflow

    root = tmp_path_factory.mktemp("serving")
    settings = Settings(mlflow_uri=f"sqlite:///{root / 'mlflow.db'}")
    connect(settings).create_experiment("made", artifact_location=(root / "artifacts").as_uri())
    mlflow.set_experiment("made")
    uris = {}
    offsets = (0.0,) * 7 + (100.0,)
    for task, outputs, rule in (
        ("binary", 1, DecisionRule(threshold=0.3)),
        ("subtype", 8, DecisionRule(offsets=offsets)),
    ):
        with mlflow.start_run() as run:
            info = log_classifier(network(outputs), task, rule, run.info.run_id, png(), {"preset": "demo"})
            uris[task] = info.model_uri
    version = mlflow.register_model(uris["binary"], "made-binary")
    return {**uris, "registered": f"models:/made-binary/{version.version}", "settings": settings}


def encoded(image: Image.Image, form: str = "PNG") -> bytes:
    """Returns the image as the bytes of a file."""
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()
