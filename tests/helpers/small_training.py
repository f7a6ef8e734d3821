"""A set of 82 drawn pictures to train on in seconds, shared by the tests that do."""

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
    """The demo preset with so many epochs, few draws, and other changes to both recipes."""
    changes = {"training": {"epochs": epochs}, **sections}
    preset = load_preset("demo").model_copy(update={"bootstrap_draws": 20})
    return preset.with_changes("binary", **changes).with_changes("subtype", **changes)


def train_again(world, **changes):
    arguments = {"dataset": world.dataset, "split": world.split, "preset": world.preset, "seed": 7}
    return train("subtype", store=world.store, **{**arguments, "settings": world.settings, **changes})


def predictions(run):
    """What a run said of the test side."""
    folder = mlflow.artifacts.download_artifacts(run_id=run["run_id"], artifact_path="evaluation")
    return pd.read_parquet(Path(folder) / "test_predictions.parquet")


SELECT_ON_VALIDATION = {"using": "validation", "folds": 0, "repeats": 0, "choose_epochs": False, "calibrate": False}
"""Without folds, of which each takes as long as the model."""


class Killed(BaseException):
    """A training was killed."""


def kill_after_epoch(part, epoch, training, monkeypatch):
    """The MLflow run of a training that is killed when it has saved this epoch of a part."""
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
    """What a module, with its arguments, prints as its last line in a process of its own, as JSON."""
    command = [sys.executable, "-m", *module]
    ran = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads(ran.stdout.splitlines()[-1])


@pytest.fixture
def ignore_finished_runs(monkeypatch):
    """Training again what was trained already."""
    monkeypatch.setattr(training_module, "_finished", lambda *_: None)


def tiny_backbone():
    """A network with the inputs, outputs and layer names of EfficientNetB0 that is read and run in a moment."""
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
    """Within the module random weights are those of a tiny network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backbone_weights, "_random", tiny_backbone)
        yield


@pytest.fixture(scope="module")
def world(tiny, tmp_path_factory):
    """A demo source of 82 pictures, ingested, assembled, split, with its features."""
    return prepare(tmp_path_factory.mktemp("training"), "kind: demo\nimages: 82")


def prepare(root, source):
    """A source, by the lines of its YAML, ingested, assembled, split, with its features."""
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
    given = load_source("drawn", conf)
    fetch_source(given, store, settings)
    training_set = load_training_set("small", conf)
    with pytest.raises(DataError, match="no published version yet; run the DAG ingest_drawn"):
        assemble_dataset(training_set, store, settings)
    publish_manifest(make_manifest(given, store, 1)["manifest"], store)
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
    """Pictures and page take longer than these trainings; those of the fixtures above have them."""

    def metrics_alone(folder, test, *_):
        (folder / "metrics.json").write_text(json.dumps(test[1].to_json()))

    monkeypatch.setattr(training_module, "write_evaluation", metrics_alone)
