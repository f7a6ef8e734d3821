"""From files in the store to a model that MLflow loads: features, training and serving on small drawn data."""

import base64
import json
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import mlflow
import numpy as np
import pandas as pd
import pytest

from ml import checkpoints
from ml import features as features_module
from ml import training as training_module
from ml.checkpoints import Checkpoint
from ml.errors import DataError, DeviceError, NoGpuError, StoreError
from ml.features import FeatureCache, OpenVINO, Shard, TensorFlow, choose_backend, extract
from ml.imaging import decode
from ml.manifest import make_manifest
from ml.models import fetch_weights
from ml.presets import Preset, load_preset, preset_names
from ml.registry import register_run
from ml.settings import Settings
from ml.sources import fetch, load_source
from ml.splits import Ledger, read_ledger, read_split, split_dataset
from ml.store import Json, Store
from ml.taxonomy import LABELS, SUBTYPES
from ml.tracking import connect
from ml.training import _code, train
from ml.training_sets import assemble, load_training_set, read_dataset
from ml.versions import publish_manifest
from tests import made_up

pytestmark = pytest.mark.integration


def quick(epochs: int, **sections: dict[str, object]) -> Preset:
    """The demo preset with so many epochs, few draws, and other changes to both recipes."""
    changes = {"training": {"epochs": epochs}, **sections}
    preset = load_preset("demo").model_copy(update={"bootstrap_draws": 20})
    return preset.changed("binary", **changes).changed("subtype", **changes)


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
    preset = quick(2)
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


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch):
    """Pictures and page take longer than these trainings; those of the fixtures above have them."""

    def metrics_alone(folder, test, *_):
        (folder / "metrics.json").write_text(json.dumps(test[1].to_json()))

    monkeypatch.setattr(training_module, "write_evaluation", metrics_alone)


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
    cached = FeatureCache(world.store, weights, "openvino").read(rows["pixel_sha256"].tolist()[:4])
    assert np.allclose(cached, a, rtol=1e-3, atol=1e-4)


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
        assert run.data.params["training.epochs"] == "2"
        assert run.data.params["selection.folds"] == "3"
        assert len(client.get_metric_history(result["run_id"], "out_of_fold_loss")) == 2
        assert len(client.get_metric_history(result["run_id"], "loss")) == run.data.metrics["chosen_epochs"]
        assert {"oof_macro_f1", "oof_macro_f1_low", "test_macro_f1_high"} <= run.data.metrics.keys()
        assert tags["breakhis.code_sha256"] == _code()["code_sha256"]
        assert len(tags["breakhis.lock_sha256"]) == 64
        assert {i.dataset.name for i in run.inputs.dataset_inputs} == {
            f"{world.dataset}, {side}" for side in ("train", "validation", "test")
        }
        assert result["metrics"] == {
            name: value
            for name, value in run.data.metrics.items()
            if name.startswith("test_") and not name.endswith(("_low", "_high"))
        }
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
    extra = ["threshold", "model_version", "run_id"]
    assert list(expected.columns) == ["label", *(f"p_{name}" for name in LABELS), *extra]
    p = expected["p_malignant"][0]
    assert expected["label"][0] == LABELS[int(p >= expected["threshold"][0])]
    assert expected["p_benign"][0] + p == pytest.approx(1)
    encoded = base64.b64encode(data).decode()
    for given in (str(path), data, [data], encoded, *(pd.DataFrame({"image": [i]}) for i in (str(path), data, pixels))):
        assert model.predict(given)["p_malignant"][0] == pytest.approx(p, abs=1e-6)
    small = np.random.default_rng(0).integers(0, 256, (31, 17, 3), dtype=np.uint8)
    assert len(model.predict(pd.DataFrame({"image": [small, pixels]}))) == 2
    assert model.predict(pd.DataFrame({"image": []})).empty


def test_the_subtype_model_gives_eight_probabilities(world, runs):
    mlflow.set_tracking_uri(world.settings.mlflow_uri)
    model = mlflow.pyfunc.load_model(f"runs:/{runs['subtype']['run_id']}/model")
    (row,) = model.predict(pd.DataFrame({"image": [np.full((224, 224, 3), 200, np.uint8)]})).to_dict("records")
    assert sum(row[f"p_{name}"] for name in SUBTYPES) == pytest.approx(1, abs=1e-5)
    assert row["label"] == max(SUBTYPES, key=lambda name: row[f"p_{name}"])
    assert row["run_id"] == runs["subtype"]["run_id"]


def test_the_evaluation_and_the_predictions_agree(world, runs):
    from sklearn.metrics import roc_auc_score

    folder = Path(mlflow.artifacts.download_artifacts(run_id=runs["binary"]["run_id"], artifact_path="evaluation"))
    table = pd.read_parquet(folder / "test_predictions.parquet")
    stated = json.loads((folder / "metrics.json").read_text())["metrics"]["roc_auc"]
    assert roc_auc_score(table["label"] == "malignant", table["p_malignant"]) == pytest.approx(stated)


def test_quarantined_rows_take_no_part(world):
    """A case that is tied to train and to test is on neither, and the training goes on without it."""
    rows = read_dataset(world.dataset, world.store)
    sides = read_split(world.split, world.store).sides
    learnt = rows[(rows["subtype"] == "DC") & (rows["patient"].map(sides) == "train")]
    lost = learnt["patient"].iloc[0]
    known = {case: side for case, side in sides.items() if case != lost}
    ledger = Ledger("torn").append(known, {}, world.dataset, 0)
    world.store.put_json("ledgers/torn.json", ledger.to_json())
    pixels = rows[rows["patient"] == lost]["pixel_sha256"].iloc[0]
    ties = [made_up.tie(pixels, next(c for c in known if known[c] == side), lost) for side in ("train", "test")]
    dataset = made_up.dataset(world.store, rows, ledger="torn", set_name="small", ties=pd.concat(ties))
    split = split_dataset(dataset, world.store)
    images = int((rows["patient"] == lost).sum())
    assert split["quarantined"] == {"opposite_sides": images}
    run = train(
        "binary",
        dataset=dataset,
        split=split["split"],
        preset=world.preset,
        seed=0,
        store=world.store,
        settings=world.settings,
    )
    data = connect(world.settings).get_run(run["run_id"]).data
    logged = [int(data.params[f"{side}_images"]) for side in ("train", "validation", "test")]
    assert sum(logged) == len(rows) - images
    assert (data.tags["breakhis.split_method"], data.tags["breakhis.split_group"]) == ("allocator", "case")
    with training_module._prepared(
        "binary", dataset, split["split"], world.preset, 0, world.store, world.settings, None
    ) as prepared:
        used = np.concatenate(list(prepared.on.values()))
        assert sorted(used) == np.flatnonzero(prepared.rows["patient"] != lost).tolist()
    assert lost not in read_ledger("torn", world.store)[0].sides


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


def test_shipped_presets():
    assert preset_names() == ["default", "demo", "paper"]
    paper = load_preset("paper")
    assert not paper.random_weights_allowed
    assert (paper.binary.head.standardize, paper.binary.selection.using) == (False, "validation")
    assert paper.subtype.views.augmentation is None


def again(world, **changes):
    arguments = {"dataset": world.dataset, "split": world.split, "preset": world.preset, "seed": 7}
    return train("subtype", store=world.store, **{**arguments, "settings": world.settings, **changes})


def predictions(run):
    folder = mlflow.artifacts.download_artifacts(run_id=run["run_id"], artifact_path="evaluation")
    return pd.read_parquet(Path(folder) / "test_predictions.parquet")


def curves(world, run):
    client = connect(world.settings)
    names = ("loss", "out_of_fold_loss")
    return {n: sorted((m.step, m.value) for m in client.get_metric_history(run["run_id"], n)) for n in names}


def jobs(world):
    return [job for job in world.store.keys("jobs/training") if world.store.keys(f"jobs/training/{job}")]


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def whole(world):
    """A training of four epochs that nobody disturbs."""
    return again(world, preset=quick(4))


@pytest.fixture
def anew(monkeypatch):
    """Training again what was trained already."""
    monkeypatch.setattr(training_module, "_finished", lambda *_: None)


@pytest.fixture(params=["fold 2 of repeat 1", "the model"])
def killed(world, whole, anew, monkeypatch, request):
    """The same training, killed after the second epoch of a fold, or of the model itself; its MLflow run."""
    monkeypatch.setattr(checkpoints, "_SECONDS_BETWEEN_SAVES", 0.0)
    save, saved = Checkpoint.save, []

    def save_and_die(self, part, epoch, history, arrays):
        save(self, part, epoch, history, arrays)
        if (part, epoch) == (request.param, 2):
            saved.append(self.run_id)
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "save", save_and_die)
        with pytest.raises(Killed):
            again(world, preset=quick(4))
    (run,) = saved
    return run


def test_a_killed_training_goes_on_to_the_same_result_in_the_same_run(world, whole, killed, capsys):
    client = connect(world.settings)
    assert client.get_run(killed).info.status == "FAILED"
    client.update_run(killed, status="RUNNING")  # as SIGKILL would have left it
    resumed = again(world, preset=quick(4))
    assert f"after epoch 2) in MLflow run {killed}" in capsys.readouterr().err
    assert resumed["run_id"] == killed != whole["run_id"]
    assert resumed["metrics"] == whole["metrics"]
    assert predictions(resumed).equals(predictions(whole))
    assert curves(world, resumed) == curves(world, whole)
    assert client.get_run(killed).info.status == "FINISHED"
    assert jobs(world) == []


def test_where_the_run_was_deleted_another_takes_its_place(world, whole, killed, capsys):
    connect(world.settings).delete_run(killed)
    resumed = again(world, preset=quick(4))
    assert f"after epoch 2) in MLflow run {resumed['run_id']}" in capsys.readouterr().err
    assert resumed["run_id"] != killed
    assert resumed["metrics"] == whole["metrics"]


def test_killed_in_fine_tuning_it_goes_on_to_the_same_result(world, anew, monkeypatch):
    """On validation alone, since a fold takes as long as the model."""
    preset = quick(
        1,
        selection={"using": "validation", "folds": 0, "repeats": 0, "choose_epochs": False, "calibrate": False},
        fine_tuning={"when": "always", "epochs": 2, "learning_rate": 0.001},
    )
    undisturbed = again(world, preset=preset)
    monkeypatch.setattr(checkpoints, "_SECONDS_BETWEEN_SAVES", 0.0)
    save = Checkpoint.save

    def save_and_die(self, part, *arguments):
        save(self, part, *arguments)
        assert part == "the model, fine-tuning"
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "save", save_and_die)
        with pytest.raises(Killed):
            again(world, preset=preset)
    resumed = again(world, preset=preset)
    assert resumed["run_id"] != undisturbed["run_id"]
    assert resumed["metrics"] == pytest.approx(undisturbed["metrics"])
    logged = connect(world.settings).get_run(resumed["run_id"]).data.metrics
    assert {"fine_tuning_loss", "fine_tuning_validation_loss", "loss"} <= logged.keys()
    untuned = again(world, preset=quick(1, selection=preset.subtype.selection.model_dump()))
    assert not predictions(untuned).equals(predictions(resumed))


@pytest.mark.parametrize("last", ["_log_metrics", "forget"])
def test_killed_while_logging_a_run_still_has_one_model_and_each_metric_once(world, whole, anew, monkeypatch, last):
    owner = Checkpoint if last == "forget" else training_module
    done, runs = getattr(owner, last), []

    def log_and_die(*arguments):
        runs.append(arguments[0] if last == "_log_metrics" else arguments[0].run_id)
        if last == "_log_metrics":
            done(*arguments)
        raise Killed

    preset = quick(4)
    with monkeypatch.context() as patch:
        patch.setattr(owner, last, log_and_die)
        with pytest.raises(Killed):
            again(world, preset=preset)
    resumed = again(world, preset=preset)
    assert [resumed["run_id"]] == runs
    assert curves(world, resumed) == curves(world, whole)
    client = connect(world.settings)
    assert len(client.get_metric_history(resumed["run_id"], "test_macro_f1")) == 1
    experiment = client.get_run(resumed["run_id"]).info.experiment_id
    (model,) = client.search_logged_models([experiment], filter_string=f"source_run_id = '{resumed['run_id']}'")
    assert str(model.status) == "READY"
    assert "test_macro_f1" in {metric.key for metric in model.metrics}
    registered = register_run(resumed["run_id"], world.store, world.settings)
    assert registered["model"] == "small-subtype"


def test_what_is_being_trained_is_waited_for_and_not_trained_twice(world, monkeypatch, capsys):
    fit = training_module._learn
    answers: dict[str, Json] = {}
    other = threading.Thread(target=lambda: answers.update(second=again(world, seed=9)))

    def meanwhile(*arguments):
        if not other.is_alive():
            other.start()
            deadline = time.monotonic() + 60
            while "waiting for its end" not in capsys.readouterr().err and time.monotonic() < deadline:
                time.sleep(0.05)
        return fit(*arguments)

    monkeypatch.setattr(training_module, "_learn", meanwhile)
    monkeypatch.setattr(checkpoints, "_SECONDS_BETWEEN_LOOKS", 0.1)
    first = again(world, seed=9)
    other.join(60)
    assert answers["second"] == {**first, "reused": True}
    runs = connect(world.settings).search_runs(
        [connect(world.settings).get_run(first["run_id"]).info.experiment_id], "tags.`breakhis.seed` = '9'"
    )
    assert [run.info.run_id for run in runs] == [first["run_id"]]


def test_identical_inputs_return_the_finished_run(world, capsys):
    first = again(world, seed=22)
    assert first["reused"] is False
    assert again(world, seed=22) == {**first, "reused": True}
    assert f"nothing to train: these very inputs were trained to the end in MLflow run {first['run_id']}" in (
        capsys.readouterr().err
    )
    other = again(world, seed=22, preset=quick(3))
    assert (other["reused"], other["run_id"] == first["run_id"]) == (False, False)


def test_a_finished_run_that_was_deleted_is_trained_again_to_the_same_result(world):
    first = again(world, seed=21)
    connect(world.settings).delete_run(first["run_id"])
    second = again(world, seed=21)
    assert second["run_id"] != first["run_id"]
    assert (second["reused"], second["metrics"]) == (False, first["metrics"])


def test_shards_share_the_images_out_and_leave_none(world, monkeypatch):
    images = set(read_dataset(world.dataset, world.store)["pixel_sha256"])
    parts = [{h for h in images if Shard(n, 3).takes(h)} for n in (1, 2, 3)]
    assert set.union(*parts) == images
    assert sum(map(len, parts)) == len(images)
    monkeypatch.setattr(FeatureCache, "prefix", "objects/caches/features-of-this-test")  # of its own, still empty
    for number, part in enumerate(parts, start=1):
        made = extract(world.dataset, world.preset, world.store, world.settings, shard=Shard(number, 3))
        assert (made["images"], made["extracted"], made["cached"]) == (len(part), len(part), 0)
        assert made["shard"] == f"{number}/3"
    rest = extract(world.dataset, world.preset, world.store, world.settings)
    assert (rest["images"], rest["extracted"], rest["cached"]) == (len(images), 0, len(images))
    assert rest["shard"] is None


def test_weights_by_id_are_taken_from_the_store_alone(world, monkeypatch):
    made = fetch_weights("random", world.store, or_random=False)
    assert (made["weights"], made["kind"], made["pretrained"]) == (world.made["weights"], "random", False)
    monkeypatch.setattr(features_module, "resolve_weights", None)
    found = extract(world.dataset, world.preset, world.store, world.settings, weights_id=made["weights"])
    assert (found["extracted"], found["weights"]) == (0, made["weights"])
    run = again(world, seed=10, weights_id=made["weights"])
    assert connect(world.settings).get_run(run["run_id"]).data.tags["breakhis.weights"] == made["weights"]
    for unknown in ("weights-000000000000", world.dataset):
        with pytest.raises(StoreError, match=unknown):
            extract(world.dataset, world.preset, world.store, world.settings, weights_id=unknown)


def test_a_gpu_that_was_asked_for_is_not_replaced_by_the_cpu(world, monkeypatch):
    import tensorflow as tf

    settings = world.settings.model_copy(update={"gpu_required": True, "backend": "auto"})
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda *_: [])
    monkeypatch.setattr(features_module, "read_dataset", None)  # at once, rather than after any work
    monkeypatch.setattr(training_module, "read_dataset", None)
    for stage in (
        lambda: extract(world.dataset, world.preset, world.store, settings),
        lambda: again(world, settings=settings),
    ):
        with pytest.raises(NoGpuError, match=r"TensorFlow .* sees 0 .*nothing was trained"):
            stage()
    assert choose_backend(settings) == "tensorflow"


@pytest.mark.parametrize("error", [MemoryError(), type("ResourceExhaustedError", (Exception,), {})("OOM when …\n")])
def test_out_of_memory_is_one_line(world, monkeypatch, error):
    def full(*_):
        raise error

    monkeypatch.setattr(training_module, "_learn", full)
    with pytest.raises(DeviceError, match=r"out of .*memory: the head trains on \d+ images .*lower batch_size"):
        again(world, seed=8)
    monkeypatch.setattr(features_module, "_compute", full)
    monkeypatch.setattr(FeatureCache, "prefix", "objects/caches/features-nothing-cached")
    with pytest.raises(DeviceError, match=r"out of .*memory: the backbone takes \d+ images at a time"):
        extract(world.dataset, world.preset, world.store, world.settings)
