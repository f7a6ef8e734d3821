"""Logging a trained network to MLflow, as a pyfunc model with signature, input example and pinned requirements."""

import base64
import json
import platform
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import ml
from ml.core.store import Json
from ml.core.taxonomy import Task, class_names
from ml.evaluation.decision_rule import DecisionRule
from ml.images.decoding import PREPROCESSING

if TYPE_CHECKING:
    import keras
    from mlflow.models.model import ModelInfo

REQUIREMENTS = ("mlflow", "tensorflow", "keras", "numpy", "pandas", "pillow")
"""Packages that a logged model needs, with the versions that it was trained with."""


def log_classifier(
    network: "keras.Model", task: Task, rule: DecisionRule, run_id: str, example: bytes, facts: Json
) -> "ModelInfo":
    """Log a classifier to the active MLflow run. :mod:`ml.registry.pyfunc` loads it.

    Args:
        network: pixels (n, 224, 224, 3) in [0, 255] -> calibrated probabilities, (n, 1) of malignant or (n, 8).
        task: the task, which names the classes.
        rule: the decision rule.
        run_id: the training run.
        example: an encoded picture, which becomes the input example.
        facts: further facts that are kept beside the network.
    """
    import mlflow
    import pandas as pd
    from mlflow.models import ModelSignature
    from mlflow.types.schema import AnyType, ColSpec, Schema

    names = class_names(task)
    outputs = [ColSpec("string", "label"), *(ColSpec("double", f"p_{name}") for name in names)]
    outputs += [ColSpec("double", "threshold")] if rule.threshold is not None else []
    outputs += [ColSpec("string", name) for name in ("model_version", "run_id")]
    # One column of any type, without a name: with a named column MLflow accepts neither a path nor a list.
    signature = ModelSignature(inputs=Schema([ColSpec(AnyType())]), outputs=Schema(outputs))
    model_facts = {
        **facts,
        "task": task,
        "classes": list(names),
        **rule.to_json(),
        "run_id": run_id,
        "preparation": PREPROCESSING,
    }
    with tempfile.TemporaryDirectory(prefix="breakhis-") as scratch, warnings.catch_warnings(), _without_bytecode():
        # MLflow's own code triggers a warning about coming changes in pandas.
        warnings.filterwarnings("ignore", message="Operation with range is deprecated")
        folder = Path(scratch)
        network.save(folder / "network.keras")
        (folder / "facts.json").write_text(json.dumps(model_facts, indent=1))
        return mlflow.pyfunc.log_model(
            name="model",
            python_model=str(Path(__file__).with_name("pyfunc.py")),
            artifacts={"network": str(folder / "network.keras"), "facts": str(folder / "facts.json")},
            signature=signature,
            input_example=pd.DataFrame({"image": [base64.b64encode(example).decode()]}),
            model_config={"allow_paths": True},
            code_paths=[str(Path(ml.__file__).parent)],
            # The requirements are named, since MLflow infers them by loading the model in another process for 15 s.
            pip_requirements=[f"{name}=={metadata.version(name)}" for name in REQUIREMENTS],
            metadata={"python": platform.python_version(), "breakhis": metadata.version("breakhis")},
        )


@contextmanager
def _without_bytecode() -> Iterator[None]:
    """Keep Python from writing compiled code, which would be logged: MLflow runs the model's code to validate it."""
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        yield
    finally:
        sys.dont_write_bytecode = before
