"""Training, from files in the store to a model that MLflow loads, on small drawn data."""

import base64
import json
import threading
import time
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest

from ml.core.errors import ConfigError, DataError, DeviceError, NoGpuError, StoreError
from ml.core.mlflow_client import connect
from ml.core.store import Json
from ml.core.taxonomy import LABELS, SUBTYPES
from ml.data.ledger import Ledger, read_ledger
from ml.data.splits import read_split, split_dataset
from ml.data.training_sets import read_dataset
from ml.images.augmentation_settings import Augmentation
from ml.images.decoding import decode
from ml.promotion.registration import register_run
from ml.training import checkpoints, procedure
from ml.training import features as features_module
from ml.training import run as training_module
from ml.training.backbone_weights import fetch_weights
from ml.training.features import extract_features
from ml.training.presets import load_preset, preset_names
from ml.training.procedure import prepare_training_data
from ml.training.run import _code_facts, train
from tests.helpers import made_up
from tests.helpers.small_training import (  # noqa: F401  # fixtures
    ignore_finished_runs,
    predictions,
    quick_preset,
    tiny,
    train_again,
    without_pictures,
    world,
)

pytestmark = pytest.mark.integration


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


def test_a_run_says_what_it_was_made_of(world, runs):
    client = connect(world.settings)
    for task, result in runs.items():
        run = client.get_run(result["run_id"])
        assert run.info.status == "FINISHED"
        tags = run.data.tags
        assert tags["breakhis.dataset"] == world.dataset
        assert tags["breakhis.split"] == world.split
        assert tags["breakhis.weights_kind"] == "random"
        note = tags["mlflow.note.content"].splitlines()
        assert "Random backbone weights" in note[0]
        assert len(note) == 10
        assert f"{run.data.metrics['test_macro_f1']:.3f}" in note[6]
        assert run.data.params["training.epochs"] == "2"
        assert run.data.params["selection.folds"] == "3"
        assert len(client.get_metric_history(result["run_id"], "out_of_fold_loss")) == 2
        assert len(client.get_metric_history(result["run_id"], "loss")) == run.data.metrics["chosen_epochs"]
        assert {"oof_macro_f1", "oof_macro_f1_low", "test_macro_f1_high"} <= run.data.metrics.keys()
        logged = run.data.metrics
        assert logged["test/macro_f1_high"] == logged["test_macro_f1_high"]
        assert logged["test/patients/macro_f1"] == logged["test_patient_macro_f1"]
        assert any(name.startswith("oof/by_magnification/") for name in logged)
        assert tags["breakhis.code_sha256"] == _code_facts()["code_sha256"]
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


def test_what_was_trained_can_be_registered(world, runs):
    """Its metrics follow from its predictions, and its files are those that may be registered."""
    for task, result in runs.items():
        folder = Path(mlflow.artifacts.download_artifacts(f"runs:/{result['run_id']}/model"))
        assert not list(folder.rglob("*.pyc"))
        evidence = world.store.meta(register_run(result["run_id"], world.store, world.settings)["evidence"])
        assert evidence["metrics"]["macro_f1"] == result["metrics"]["test_macro_f1"]
        assert (evidence["model"], evidence["dag_runs"]) == (f"small-{task}", [])
        assert len(evidence["preset_sha256"]) == len(evidence["code_sha256"]) == 64


def test_a_run_says_which_runs_of_a_dag_trained_it(world):
    client = connect(world.settings)
    run = client.create_run("0").info.run_id
    for name in ("r1", "r2", "r2"):
        own = world.settings.model_copy(update={"dag": "retrain_small", "dag_run": name})
        training_module._log_origin(run, own)
    training_module._log_origin(run, world.settings)  # by hand
    told = json.loads(client.get_run(run).data.tags["breakhis.dag_runs"])
    assert told == [["retrain_small", "r1"], ["retrain_small", "r2"]]


@pytest.mark.parametrize("task", ["binary", "subtype"])
def test_trained_anew_the_same_seed_gives_the_same_model(world, runs, ignore_finished_runs, task):
    second = train(
        task,
        dataset=world.dataset,
        split=world.split,
        preset=world.preset,
        seed=0,
        store=world.store,
        settings=world.settings,
    )
    assert second["reused"] is False
    assert second["run_id"] != runs[task]["run_id"]
    assert second["metrics"] == runs[task]["metrics"]
    assert predictions(second).equals(predictions(runs[task]))


def test_views_and_more_of_rare_subtypes(world):
    """Two views of training images, three of rare subtypes, one of the test side; the number of views has an effect."""
    rows = read_dataset(world.dataset, world.store)
    sides = rows["patient"].map(read_split(world.split, world.store).sides)
    learnt = (sides != "test").to_numpy()
    cases = rows[learnt].groupby("subtype")["patient"].nunique()
    rare = rows["subtype"].isin(cases.index[cases == cases.min()]).to_numpy()
    assert 0 < (rare & learnt).sum() < learnt.sum()
    seen = {"augmentation": Augmentation(flips=True, rotations=True, hed=0.1, brightness=0.1, contrast=0.1)}
    seen |= {"count": 2, "rare_count": 3, "rare_below_cases": int(cases.min()) + 1}
    preset = quick_preset(2, views=seen)
    with procedure.prepare_training_data(
        "subtype", world.dataset, read_split(world.split, world.store), preset, world.store, world.settings
    ) as data:
        assert data.view_counts.tolist() == np.where(learnt, np.where(rare, 3, 2), 1).tolist()
        assert not np.array_equal(data.features[1, learnt], data.features[0, learnt])
    plain, few, more = (
        train_again(world, preset=one)
        for one in (quick_preset(2), quick_preset(2, views={**seen, "rare_count": 2}), preset)
    )
    logged = connect(world.settings).get_run(more["run_id"])
    assert logged.info.status == "FINISHED"
    assert [logged.data.params[f"views.{name}"] for name in ("count", "rare_count")] == ["2", "3"]
    told = [predictions(run).filter(like="p_").to_numpy() for run in (plain, few, more)]
    assert not np.allclose(told[0], told[1])
    assert not np.allclose(told[1], told[2])
    assert all(np.allclose(one.sum(axis=1), 1) for one in told)


def test_a_training_that_died_before_its_checkpoint_knew_of_its_run_goes_on_in_it(world, monkeypatch):
    client = connect(world.settings)
    experiment = client.get_experiment_by_name("small").experiment_id
    left = []

    def begun(job, *_):
        left.append(client.create_run(experiment, tags={"breakhis.job": job}).info.run_id)

    monkeypatch.setattr(training_module, "_finished", begun)
    assert train_again(world, seed=11)["run_id"] == left[0]
    assert not client.search_runs([experiment], "attributes.status = 'RUNNING'")


def test_what_was_learnt_by_other_code_or_on_another_device_is_no_result(world, monkeypatch):
    split = read_split(world.split, world.store)

    def named():
        with prepare_training_data("binary", world.dataset, split, world.preset, world.store, world.settings) as data:
            return data.inputs_digest

    first = named()
    assert named() == first
    monkeypatch.setattr(procedure, "_VERSION", procedure._VERSION + 1)
    newer = named()
    monkeypatch.setattr(procedure, "fine_tuning_applies", lambda _: True)
    assert len({first, newer, named()}) == 3


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
    pink = np.full((224, 224, 3), (220, 150, 200), np.uint8)
    (row,) = model.predict(pd.DataFrame({"image": [pink]})).to_dict("records")
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
    """A case that is tied to train and to test is on neither side, and the training leaves it out."""
    rows = read_dataset(world.dataset, world.store)
    sides = read_split(world.split, world.store).sides
    learnt = rows[(rows["subtype"] == "DC") & (rows["patient"].map(sides) == "train")]
    lost = learnt["patient"].iloc[0]
    known = {case: side for case, side in sides.items() if case != lost}
    ledger = Ledger("torn").append(known, {}, world.dataset, 0)
    world.store.put_json("ledgers/torn.json", ledger.to_json())
    pixels = rows[rows["patient"] == lost]["pixel_sha256"].iloc[0]
    ties = [made_up.tie_row(pixels, next(c for c in known if known[c] == side), lost) for side in ("train", "test")]
    dataset = made_up.create_dataset(world.store, rows, ledger="torn", set_name="small", ties=pd.concat(ties))
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
    dealt = read_split(split["split"], world.store)
    with procedure.prepare_training_data("binary", dataset, dealt, world.preset, world.store, world.settings) as data:
        used = np.concatenate(list(data.rows_by_side.values()))
        assert sorted(used) == np.flatnonzero(data.rows["patient"] != lost).tolist()
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


def test_what_is_being_trained_is_waited_for_and_not_trained_twice(world, monkeypatch, capsys):
    fit = training_module.fit_and_calibrate
    answers: dict[str, Json] = {}
    other = threading.Thread(target=lambda: answers.update(second=train_again(world, seed=9)))

    def meanwhile(*arguments):
        if not other.is_alive():
            other.start()
            deadline = time.monotonic() + 60
            while "waiting for its end" not in capsys.readouterr().err and time.monotonic() < deadline:
                time.sleep(0.05)
        return fit(*arguments)

    monkeypatch.setattr(training_module, "fit_and_calibrate", meanwhile)
    monkeypatch.setattr(checkpoints, "_SECONDS_BETWEEN_CHECKS", 0.1)
    first = train_again(world, seed=9)
    other.join(60)
    assert answers["second"] == {**first, "reused": True}
    runs = connect(world.settings).search_runs(
        [connect(world.settings).get_run(first["run_id"]).info.experiment_id], "tags.`breakhis.seed` = '9'"
    )
    assert [run.info.run_id for run in runs] == [first["run_id"]]


def test_identical_inputs_return_the_finished_run(world, capsys):
    first = train_again(world, seed=22)
    assert first["reused"] is False
    assert train_again(world, seed=22) == {**first, "reused": True}
    ids = {"dataset": world.dataset, "split": world.split, "ledger": world.store.meta(world.split)["ledger"]}
    assert {**ids, "preset": world.preset.name, "seed": 22}.items() <= first["inputs"].items()
    assert f"nothing to train: these very inputs were trained to the end in MLflow run {first['run_id']}" in (
        capsys.readouterr().err
    )
    other = train_again(world, seed=22, preset=quick_preset(3))
    assert (other["reused"], other["run_id"] == first["run_id"]) == (False, False)


def test_a_finished_run_that_was_deleted_is_trained_again_to_the_same_result(world):
    first = train_again(world, seed=21)
    connect(world.settings).delete_run(first["run_id"])
    second = train_again(world, seed=21)
    assert second["run_id"] != first["run_id"]
    assert (second["reused"], second["metrics"]) == (False, first["metrics"])


def test_weights_by_id_are_taken_from_the_store_alone(world, monkeypatch):
    made = fetch_weights("random", world.store, allow_random=False)
    assert (made["weights"], made["kind"], made["pretrained"]) == (world.made["weights"], "random", False)
    monkeypatch.setattr(features_module, "resolve_weights", None)
    found = extract_features(world.dataset, world.preset, world.store, world.settings, weights_id=made["weights"])
    assert (found["extracted"], found["weights"]) == (0, made["weights"])
    run = train_again(world, seed=10, weights_id=made["weights"])
    assert connect(world.settings).get_run(run["run_id"]).data.tags["breakhis.weights"] == made["weights"]
    for unknown in ("weights-000000000000", world.dataset):
        with pytest.raises(StoreError, match=unknown):
            extract_features(world.dataset, world.preset, world.store, world.settings, weights_id=unknown)


def test_a_gpu_that_was_asked_for_is_not_replaced_by_the_cpu(world, monkeypatch):
    import tensorflow as tf

    settings = world.settings.model_copy(update={"gpu_required": True, "backend": "auto"})
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda *_: [])
    monkeypatch.setattr(procedure, "read_dataset", None)  # at once, rather than after any work
    with pytest.raises(NoGpuError, match=r"TensorFlow .* sees 0 .*nothing was trained"):
        train_again(world, settings=settings)


def test_what_does_not_converge_names_the_setting(world):
    preset = quick_preset(3, training={"epochs": 3, "learning_rate": 1e30})
    with pytest.raises(ConfigError, match=r"fold 1 of repeat 1: .* not finite after epoch 1 of 3; lower learning_rate"):
        train_again(world, preset=preset)


@pytest.mark.parametrize("error", [MemoryError(), type("ResourceExhaustedError", (Exception,), {})("OOM when …\n")])
def test_out_of_memory_is_one_line(world, monkeypatch, error):
    def full(*_):
        raise error

    monkeypatch.setattr(procedure, "_run_procedure", full)
    with pytest.raises(DeviceError, match=r"out of .*memory: the head trains on \d+ images .*lower batch_size"):
        train_again(world, seed=8)
