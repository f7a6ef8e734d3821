"""A trained network as a model in MLflow: one pyfunc with signature, input example and pinned requirements."""

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


_NEEDS = ("mlflow", "tensorflow", "keras", "numpy", "pandas", "pillow")


def log_classifier(
    network: "keras.Model", task: Task, rule: DecisionRule, run_id: str, example: bytes, facts: Json
) -> "ModelInfo":
    """Log a classifier to the active MLflow run, as ``ml.registry.pyfunc`` loads it.

    Args:
        network: pixels (n, 224, 224, 3) in [0, 255] -> calibrated probabilities, (n, 1) of malignant or (n, 8).
        task: which classes.
        rule: how labels are taken.
        run_id: the training run.
        example: an encoded picture, which becomes the input example.
        facts: whatever else should be kept beside the network.
    """
    import mlflow
    import pandas as pd
    from mlflow.models import ModelSignature
    from mlflow.types.schema import AnyType, ColSpec, Schema

    names = class_names(task)
    outputs = [ColSpec("string", "label"), *(ColSpec("double", f"p_{name}") for name in names)]
    outputs += [ColSpec("double", "threshold")] if rule.threshold is not None else []
    outputs += [ColSpec("string", name) for name in ("model_version", "run_id")]
    # One column of anything, without a name: under a name MLflow would take neither a path nor a list.
    signature = ModelSignature(inputs=Schema([ColSpec(AnyType())]), outputs=Schema(outputs))
    kept = {
        **facts,
        "task": task,
        "classes": list(names),
        **rule.to_json(),
        "run_id": run_id,
        "preparation": PREPROCESSING,
    }
    with tempfile.TemporaryDirectory(prefix="breakhis-") as scratch, warnings.catch_warnings(), _no_bytecode():
        # MLflow warns of pandas' coming changes in its own code.
        warnings.filterwarnings("ignore", message="Operation with range is deprecated")
        folder = Path(scratch)
        network.save(folder / "network.keras")
        (folder / "facts.json").write_text(json.dumps(kept, indent=1))
        return mlflow.pyfunc.log_model(
            name="model",
            python_model=str(Path(__file__).with_name("pyfunc.py")),
            artifacts={"network": str(folder / "network.keras"), "facts": str(folder / "facts.json")},
            signature=signature,
            input_example=pd.DataFrame({"image": [base64.b64encode(example).decode()]}),
            model_config={"allow_paths": True},
            code_paths=[str(Path(ml.__file__).parent)],
            # Named, not inferred: inference loads the model in another process for a quarter of a minute.
            pip_requirements=[f"{name}=={metadata.version(name)}" for name in _NEEDS],
            metadata={"python": platform.python_version(), "breakhis": metadata.version("breakhis")},
        )


@contextmanager
def _no_bytecode() -> Iterator[None]:
    """MLflow runs the model's code where it lies, to validate it; what Python compiles of it is not to be logged."""
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        yield
    finally:
        sys.dont_write_bytecode = before
