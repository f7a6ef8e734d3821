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
from ml import training as training_module
from ml.checkpoints import Checkpoint
from ml.errors import DataError, DeviceError, StoreError
from ml.features import FeatureCache, OpenVINO, Shard, TensorFlow, extract, read_features
from ml.imaging import decode
from ml.manifest import make_manifest
from ml.models import fetch_weights
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


def again(world, **changes):
    arguments = {"dataset": world.dataset, "split": world.split, "preset": world.preset, "seed": 7}
    return train("subtype", store=world.store, **{**arguments, "settings": world.settings, **changes})


class Killed(BaseException):
    pass


def test_a_killed_training_goes_on_to_the_same_result_in_the_same_run(world, monkeypatch, capsys):
    preset = world.preset.model_copy(update={"epochs": 4})
    whole = again(world, preset=preset)

    save, saved = Checkpoint.save, []

    def save_and_die(self, epoch, history, arrays):
        save(self, epoch, history, arrays)
        saved.append(self.run_id)
        if epoch == 2:
            raise Killed

    monkeypatch.setattr(Checkpoint, "due", lambda self: True)
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "save", save_and_die)
        with pytest.raises(Killed):
            again(world, preset=preset)
    capsys.readouterr()
    resumed = again(world, preset=preset)

    assert "resuming after epoch 2" in capsys.readouterr().err
    assert resumed["run_id"] == saved[0] != whole["run_id"]
    assert resumed["metrics"] == whole["metrics"]
    client = connect(world.settings)
    histories = [client.get_metric_history(run["run_id"], "val_loss") for run in (whole, resumed)]
    assert [m.value for m in histories[0]] == [m.value for m in histories[1]]
    assert client.get_run(resumed["run_id"]).info.status == "FINISHED"
    assert world.store.keys("jobs/training") == [] or not any(
        world.store.keys(f"jobs/training/{job}") for job in world.store.keys("jobs/training")
    )


def test_the_same_training_on_purpose_is_another_run(world):
    first, second = again(world), again(world)
    assert first["run_id"] != second["run_id"]
    assert first["metrics"] == second["metrics"]


def test_shards_share_the_images_out_and_leave_none(world):
    images = set(read_dataset(world.dataset, world.store)["pixel_sha256"])
    parts = [{h for h in images if Shard(n, 3).takes(h)} for n in (1, 2, 3)]
    assert set.union(*parts) == images
    assert sum(map(len, parts)) == len(images)
    made = extract(world.dataset, world.preset, world.store, world.settings, shard=Shard(2, 3))
    assert (made["images"], made["cached"], made["extracted"]) == (len(parts[1]), len(parts[1]), 0)


def test_weights_by_id_are_taken_from_the_store_alone(world, monkeypatch):
    made = fetch_weights("random", world.store, or_random=False)
    assert (made["weights"], made["kind"], made["pretrained"]) == (world.made["weights"], "random", False)
    monkeypatch.setattr(features_module, "resolve_weights", None)
    found = extract(world.dataset, world.preset, world.store, world.settings, weights_id=made["weights"])
    assert (found["extracted"], found["weights"]) == (0, made["weights"])
    with pytest.raises(StoreError, match="weights-000000000000"):
        extract(world.dataset, world.preset, world.store, world.settings, weights_id="weights-000000000000")


def test_a_gpu_that_was_asked_for_is_not_replaced_by_the_cpu(world):
    settings = world.settings.model_copy(update={"gpu_required": True})
    for stage in (
        lambda: extract(world.dataset, world.preset, world.store, settings),
        lambda: again(world, settings=settings),
    ):
        with pytest.raises(DeviceError, match=r"TensorFlow .* sees none .*Nothing was computed"):
            stage()


@pytest.mark.parametrize("error", [MemoryError(), type("ResourceExhaustedError", (Exception,), {})("OOM when …\n")])
def test_out_of_memory_is_one_line(world, monkeypatch, error):
    def fit(*_):
        raise error

    monkeypatch.setattr(training_module, "_fit", fit)
    with pytest.raises(DeviceError, match=r"out of .*memory: the head trains on \d+ images a step; lower batch_size"):
        again(world, seed=8)
