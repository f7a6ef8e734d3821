"""A training set of 82 synthetic images that is trained on in seconds, shared by the tests of training."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import mlflow
import pandas as pd
import pytest

from ml.core.errors import DataError
from ml.core.mlflow_client import connect
from ml.core.settings import Settings
from ml.core.store import Store
from ml.data.manifest import make_manifest
from ml.data.source_versions import publish_manifest
from ml.data.sources import fetch_source, load_source
from ml.data.splits import split_dataset
from ml.data.training_sets import assemble_dataset, load_training_set
from ml.images.decoding import INPUT_SIZE
from ml.training import backbone_weights, checkpoints
from ml.training import run as training_module
from ml.training.backbone_weights import FEATURE_SIZE
from ml.training.checkpoints import Checkpoint
from ml.training.features import extract_features
from ml.training.presets import Preset, load_preset
from ml.training.run import train


def quick_preset(epochs: int, **sections: dict[str, object]) -> Preset:
    """Returns the demo preset with this number of epochs, few bootstrap draws, and other changes to both recipes."""
    changes = {"training": {"epochs": epochs}, **sections}
    preset = load_preset("demo").model_copy(update={"bootstrap_draws": 20})
    return preset.with_changes("binary", **changes).with_changes("subtype", **changes)


def train_again(world, **changes):
    """Trains the subtype model of a world, with changes to the arguments of :func:`train`."""
    arguments = {"dataset": world.dataset, "split": world.split, "preset": world.preset, "seed": 7}
    return train("subtype", store=world.store, **{**arguments, "settings": world.settings, **changes})


def predictions(run):
    """Returns a run's predictions on the test side."""
    folder = mlflow.artifacts.download_artifacts(run_id=run["run_id"], artifact_path="evaluation")
    return pd.read_parquet(Path(folder) / "test_predictions.parquet")


SELECT_ON_VALIDATION = {"using": "validation", "folds": 0, "repeats": 0, "choose_epochs": False, "calibrate": False}
"""Selects on the validation side, without cross-validation: each fold takes as long as the model."""


class Killed(BaseException):
    """Raised in place of killing a training."""


def kill_after_epoch(part, epoch, training, monkeypatch):
    """Kills a training once it has saved this epoch of a part; returns the training's MLflow run id."""
    monkeypatch.setattr(checkpoints, "_SECONDS_BETWEEN_SAVES", 0.0)
    save, saved = Checkpoint.save, []

    def save_and_die(self, *given):
        save(self, *given)
        if given[:2] == (part, epoch):
            saved.append(self.run_id)
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "save", save_and_die)
        with pytest.raises(Killed):
            training()
    (run,) = saved
    return run


def run_in_own_process(*module):
    """Runs a module with its arguments in a process of its own; returns its last line, which is JSON."""
    command = [sys.executable, "-m", *module]
    process = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads(process.stdout.splitlines()[-1])


@pytest.fixture
def ignore_finished_runs(monkeypatch):
    """Makes a training run again although a finished run of the same inputs exists."""
    monkeypatch.setattr(training_module, "_finished", lambda *_: None)


def tiny_backbone():
    """Returns a network with the inputs, outputs and layer names of EfficientNetB0 that loads and runs quickly."""
    import keras

    keras.utils.set_random_seed(0)
    pixels = x = keras.Input((INPUT_SIZE, INPUT_SIZE, 3))
    x = keras.layers.Rescaling(1 / 255)(x)
    x = keras.layers.AveragePooling2D(8)(x)
    x = keras.layers.Conv2D(24, 3, strides=2, activation="relu", name="block7a_conv")(x)
    x = keras.layers.BatchNormalization(name="block7a_bn")(x)
    x = keras.layers.Conv2D(FEATURE_SIZE, 1, name="top_conv")(x)
    x = keras.layers.Activation("swish", name="top_activation")(x)
    return keras.Model(pixels, keras.layers.GlobalAveragePooling2D()(x), name="tiny")


@pytest.fixture(scope="module")
def tiny():
    """Replaces the randomly initialized backbone by a tiny network in this module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backbone_weights, "_random", tiny_backbone)
        yield


@pytest.fixture(scope="module")
def world(tiny, tmp_path_factory):
    """A world with a demo source of 82 images; see :func:`prepare`."""
    return prepare(tmp_path_factory.mktemp("training"), "kind: demo\nimages: 82")


def prepare(root, source):
    """Ingests a source, given by the lines of its YAML, assembles and splits its dataset and extracts its features."""
    conf = root / "conf"
    for folder in ("sources", "training_sets"):
        (conf / folder).mkdir(parents=True)
    (conf / "sources" / "drawn.yaml").write_text(f"name: drawn\n{source}\n")
    (conf / "training_sets" / "small.yaml").write_text(
        "name: small\nsources: [drawn]\nledger: small\npolicy: none\npreset: demo\n"
    )
    store = Store((root / "store").as_uri())
    settings = Settings(
        home=root / "home",
        store=store.root,
        conf=conf,
        weights="random",
        backend="openvino",
        mlflow_uri=f"sqlite:///{root / 'mlflow.db'}",
        workers=1,
    )
    spec = load_source("drawn", conf)
    fetch_source(spec, store, settings)
    training_set = load_training_set("small", conf)
    with pytest.raises(DataError, match="no published version yet; run the DAG ingest_drawn"):
        assemble_dataset(training_set, store, settings)
    publish_manifest(make_manifest(spec, store, 0)["manifest"], store)
    dataset = assemble_dataset(training_set, store, settings)["dataset"]
    split = split_dataset(dataset, store)["split"]
    connect(settings).create_experiment("small", artifact_location=(root / "artifacts").as_uri())
    preset = quick_preset(2)
    made = extract_features(dataset, preset, store, settings)
    return SimpleNamespace(
        root=root, store=store, settings=settings, dataset=dataset, split=split, preset=preset, made=made
    )


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch):
    """Writes no figures and no report: they take longer than these trainings. The fixtures above do write them."""

    def write_metrics_only(folder, test, *_):
        (folder / "metrics.json").write_text(json.dumps(test[1].to_json()))

    monkeypatch.setattr(training_module, "write_evaluation", write_metrics_only)
