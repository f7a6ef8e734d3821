"""From files in the store to a model that MLflow loads: features, training and serving on small drawn data."""

import base64
import json
from pathlib import Path
from types import SimpleNamespace

import mlflow
import numpy as np
import pandas as pd
import pytest

from ml import features as features_module
from ml.errors import DataError, StoreError
from ml.features import FeatureCache, OpenVINO, TensorFlow, extract, read_features
from ml.imaging import decode
from ml.manifest import make_manifest
from ml.presets import load_preset, preset_names
from ml.settings import Settings
from ml.sources import fetch, load_source
from ml.splits import split_dataset
from ml.store import Store
from ml.taxonomy import LABELS, SUBTYPES
from ml.tracking import connect
from ml.training import _class_weights, train
from ml.training_sets import assemble, load_training_set, read_dataset
from ml.versions import publish_manifest

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A demo source of 82 pictures, ingested, assembled, split, with its features."""
    root = tmp_path_factory.mktemp("training")
    conf = root / "conf"
    for folder in ("sources", "training_sets"):
        (conf / folder).mkdir(parents=True)
    (conf / "sources" / "drawn.yaml").write_text("name: drawn\nkind: demo\nimages: 82\n")
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
    source = load_source("drawn", conf)
    fetch(source, store, settings)
    training_set = load_training_set("small", conf)
    with pytest.raises(DataError, match="no published version yet; run the DAG ingest_drawn"):
        assemble(training_set, store, settings)
    publish_manifest(make_manifest(source, store, 1)["manifest"], store)
    dataset = assemble(training_set, store, settings)["dataset"]
    split = split_dataset(dataset, store)["split"]
    connect(settings).create_experiment("small", artifact_location=(root / "artifacts").as_uri())
    preset = load_preset("demo").model_copy(update={"epochs": 2})
    made = extract(dataset, preset, store, settings)
    return SimpleNamespace(
        root=root, store=store, settings=settings, dataset=dataset, split=split, preset=preset, made=made
    )


@pytest.fixture(scope="module")
def runs(world):
    return {
        task: train(
            task,
            dataset=world.dataset,
            split=world.split,
            preset=world.preset,
            seed=0,
            store=world.store,
            settings=world.settings,
        )
        for task in ("binary", "subtype")
    }


def test_everything_is_extracted_once(world, monkeypatch):
    images = len(read_dataset(world.dataset, world.store))
    assert (world.made["extracted"], world.made["decoded"], world.made["cached"]) == (images, images, 0)
    monkeypatch.setattr(features_module, "OpenVINO", None)  # would fail if it were asked for
    again = extract(world.dataset, world.preset, world.store, world.settings)
    assert (again["extracted"], again["decoded"], again["cached"]) == (0, 0, images)


def test_new_data_costs_only_its_own_images(world):
    cache = FeatureCache(world.store, world.made["weights"], "openvino")
    (part,) = world.store.keys(cache.prefix)
    with np.load(world.store.local(f"{cache.prefix}/{part}")) as whole:
        hashes, vectors = whole["hashes"].tolist(), whole["features"]
    partial = FeatureCache(Store((world.root / "other").as_uri()), world.made["weights"], "openvino")
    partial.write(hashes[:5], vectors[:5])
    assert partial.known() == set(hashes[:5])
    assert (partial.read([hashes[3], hashes[0]]) == vectors[[3, 0]]).all()
    with pytest.raises(StoreError, match="1 of 2 images have no features"):
        partial.read([hashes[0], hashes[7]])


def test_openvino_and_tensorflow_agree(world):
    weights = world.made["weights"]
    rows = read_dataset(world.dataset, world.store)
    from ml.imaging import resize

    pixels = np.stack([resize(decode(world.store.blob(sha))) for sha in rows["sha256"][:4]])
    a = OpenVINO(weights, world.store, world.settings.cache)(pixels)
    b = TensorFlow(weights, world.store)(pixels)
    assert np.linalg.norm(a - b) / np.linalg.norm(b) < 1e-4
    cached, _ = read_features(world.dataset, world.preset, world.store, world.settings)
    assert np.allclose(cached[:4], a, rtol=1e-3, atol=1e-4)


def test_a_run_says_what_it_was_made_of(world, runs):
    client = connect(world.settings)
    for task, result in runs.items():
        run = client.get_run(result["run_id"])
        assert run.info.status == "FINISHED"
        tags = run.data.tags
        assert tags["breakhis.dataset"] == world.dataset
        assert tags["breakhis.split"] == world.split
        assert tags["breakhis.weights_kind"] == "random"
        assert "Random backbone weights" in tags["mlflow.note.content"]
        assert run.data.params["epochs"] == "2"
        assert len(client.get_metric_history(result["run_id"], "loss")) == 2
        assert result["metrics"] == {k: v for k, v in run.data.metrics.items() if k.startswith("test_")}
        expected = {"test_roc_auc", "test_threshold"} if task == "binary" else {"test_roc_auc_ovr", "test_micro_f1"}
        assert expected | {"test_macro_f1", "test_accuracy"} <= result["metrics"].keys()
        names = {item.path for item in client.list_artifacts(result["run_id"], "evaluation")}
        assert {f"evaluation/{n}.png" for n in ("confusion_matrix", "roc", "training_curve")} < names


def test_the_same_seed_gives_the_same_model(world, runs):
    again = train(
        "binary",
        dataset=world.dataset,
        split=world.split,
        preset=world.preset,
        seed=0,
        store=world.store,
        settings=world.settings,
    )
    assert again["metrics"] == pytest.approx(runs["binary"]["metrics"])


def test_the_logged_model_takes_images_as_they_come(world, runs, tmp_path):
    mlflow.set_tracking_uri(world.settings.mlflow_uri)
    model = mlflow.pyfunc.load_model(f"runs:/{runs['binary']['run_id']}/model")
    row = read_dataset(world.dataset, world.store).iloc[0]
    data = world.store.blob(row["sha256"])
    path = tmp_path / "picture.png"
    path.write_bytes(data)
    pixels = decode(data)
    expected = model.predict([str(path)])
    assert list(expected.columns) == ["label", *(f"p_{name}" for name in LABELS), "threshold", "run_id"]
    p = expected["p_malignant"][0]
    assert expected["label"][0] == LABELS[int(p >= expected["threshold"][0])]
    assert expected["p_benign"][0] + p == pytest.approx(1)
    encoded = base64.b64encode(data).decode()
    for given in (str(path), data, [data], encoded, pixels, pixels[None], pd.DataFrame({"image": [str(path)]})):
        assert model.predict(given)["p_malignant"][0] == pytest.approx(p, abs=1e-6)
    small = np.random.default_rng(0).integers(0, 256, (31, 17, 3), dtype=np.uint8)
    assert len(model.predict([small, pixels])) == 2
    assert model.predict([]).empty
    for bad, message in (("/no/such.png", "no such file"), (b"text", "image 1"), (np.zeros((4, 4, 3)), "float64")):
        with pytest.raises(Exception, match=message):
            model.predict([bad])


def test_the_subtype_model_gives_eight_probabilities(world, runs):
    mlflow.set_tracking_uri(world.settings.mlflow_uri)
    model = mlflow.pyfunc.load_model(f"runs:/{runs['subtype']['run_id']}/model")
    (row,) = model.predict([np.full((224, 224, 3), 200, np.uint8)]).to_dict("records")
    assert sum(row[f"p_{name}"] for name in SUBTYPES) == pytest.approx(1, abs=1e-5)
    assert row["label"] == max(SUBTYPES, key=lambda name: row[f"p_{name}"])
    assert row["run_id"] == runs["subtype"]["run_id"]


def test_the_evaluation_and_the_predictions_agree(world, runs):
    from sklearn.metrics import roc_auc_score

    folder = Path(mlflow.artifacts.download_artifacts(run_id=runs["binary"]["run_id"], artifact_path="evaluation"))
    table = pd.read_parquet(folder / "test_predictions.parquet")
    stated = json.loads((folder / "metrics.json").read_text())["metrics"]["roc_auc"]
    assert roc_auc_score(table["label"] == "malignant", table["p_malignant"]) == pytest.approx(stated)


def test_a_class_that_cannot_be_learnt_is_named(world):
    sides = dict.fromkeys(read_dataset(world.dataset, world.store)["patient"], "train")
    rows = read_dataset(world.dataset, world.store)
    sides |= dict.fromkeys(rows[rows["subtype"] == "PT"]["patient"], "test")
    sides |= dict.fromkeys(rows[rows["subtype"] == "DC"]["patient"].unique()[:2], "validation")
    meta = {**world.store.meta(world.split), "sides": sides}
    split = world.store.create("split", ["no PT to train on"], meta)
    with pytest.raises(DataError, match="no training image of PT"):
        train(
            "subtype",
            dataset=world.dataset,
            split=split,
            preset=world.preset,
            seed=0,
            store=world.store,
            settings=world.settings,
        )


def test_class_weights_by_hand():
    # 1/sqrt of 4 and 1 images: 0.5 and 1, scaled so that the mean over the five images is 1.
    assert _class_weights(np.array([0, 0, 0, 0, 1])) == pytest.approx({0: 5 / 6, 1: 5 / 3})


def test_shipped_presets():
    assert preset_names() == ["demo", "paper"]
    paper = load_preset("paper")
    assert not paper.random_weights_allowed
    assert (paper.standardize, paper.class_weights) == (False, "none")
