"""Tests of training on a GPU (``make gpu``), which the other tests run on a CPU, or on a CPU as several devices.

TensorFlow stays in the state that the product puts it in. A check that needs another state is a process of its own.
"""

import mlflow
import numpy as np
import pytest
import tensorflow as tf

from ml.core import devices
from ml.core.errors import NoGpuError
from ml.core.mlflow_client import connect
from ml.core.taxonomy import SUBTYPES
from ml.data.training_sets import read_dataset
from ml.local import doctor
from ml.training.features import FeatureCache, extract_features
from tests.helpers.small_training import (  # noqa: F401  # fixtures
    SELECT_ON_VALIDATION,
    ignore_finished_runs,
    kill_after_epoch,
    predictions,
    prepare,
    quick_preset,
    run_in_own_process,
    train_again,
    without_pictures,
)

pytestmark = pytest.mark.gpu

TUNED = {"when": "gpu", "blocks": 2, "epochs": 4, "batch_size": 16, "learning_rate": 0.0003, "mixed_precision": True}


@pytest.fixture(scope="module", autouse=True)
def require_gpu():
    try:
        devices.require_gpu()
    except NoGpuError as error:
        pytest.exit(str(error), returncode=1)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The world of other tests, with features of the CPU; everything after this must run on a GPU."""
    made = prepare(tmp_path_factory.mktemp("gpu"), "kind: demo\nimages: 82")
    made.settings = made.settings.model_copy(update={"backend": "auto", "gpu_required": True})
    return made


def relative_difference(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def test_the_doctor_finds_it_and_a_run_names_it():
    assert doctor.check_gpu().state == "ok"
    assert devices.has_gpu()
    assert not devices.describe_devices().startswith(devices.processor_name())
    print(devices.describe_devices())


def test_features_are_those_of_the_processor(world):
    made = extract_features(world.dataset, world.preset, world.store, world.settings)
    hashes = read_dataset(world.dataset, world.store)["pixel_sha256"].tolist()
    assert (made["backend"], made["extracted"], made["decoded"]) == ("tensorflow", len(hashes), 0)
    gpu, cpu = (FeatureCache(world.store, made["weights"], name).read(hashes) for name in ("tensorflow", "openvino"))
    print(f"float32 on the GPU and on the processor: {relative_difference(gpu, cpu):.1e} apart")
    assert relative_difference(gpu, cpu) < 1e-4
    assert relative_difference(gpu[:1], gpu[1:2]) > 1e-3  # else it would say little


def test_in_tf32_they_would_be_others():
    result = run_in_own_process("tests.gpu.isolated", "rounding")
    print(result)
    assert result["float32"] < 1e-4
    assert result["pictures"] > 1e-3
    gpu = tf.config.experimental.get_device_details(tf.config.list_physical_devices("GPU")[0])
    if gpu["compute_capability"] >= (8, 0):  # older ones have no TF32
        assert result["TF32"] > 1e-4


def test_a_seed_gives_the_same_head_twice(world, ignore_finished_runs):
    first, second = (train_again(world, preset=quick_preset(3)) for _ in range(2))
    assert first["run_id"] != second["run_id"]
    assert predictions(first).equals(predictions(second))
    result = connect(world.settings).get_run(first["run_id"]).data
    assert devices.describe_devices() in {*result.tags.values(), *result.params.values()}


def test_fine_tuned_in_float16_and_killed_it_goes_on_and_the_model_says_what_the_run_said(
    world, ignore_finished_runs, monkeypatch
):
    preset = quick_preset(1, selection=SELECT_ON_VALIDATION, fine_tuning=TUNED)
    whole = train_again(world, preset=preset)
    history = connect(world.settings).get_metric_history(whole["run_id"], "fine_tuning_loss")
    loss = [m.value for m in sorted(history, key=lambda m: m.step)]
    print("fine-tuning's loss:", loss)
    assert np.isfinite(loss).all()
    assert loss[-1] < loss[0]

    predicted = predictions(whole)
    rows = read_dataset(world.dataset, world.store).set_index("pixel_sha256")
    files = rows.loc[predicted["pixel_sha256"], "sha256"]
    pictures = [world.store.blob(sha256) for sha256 in files]
    mlflow.set_tracking_uri(world.settings.mlflow_uri)
    model = mlflow.pyfunc.load_model(f"runs:/{whole['run_id']}/model")
    names = [f"p_{name}" for name in SUBTYPES]
    answers, stated = model.predict(pictures)[names].to_numpy(), predicted[names].to_numpy()
    print(f"probabilities of the model and of the run: {np.abs(answers - stated).max():.1e} apart")
    assert answers == pytest.approx(stated, abs=1e-4)

    killed = kill_after_epoch("the model, fine-tuning", 2, lambda: train_again(world, preset=preset), monkeypatch)
    resumed = train_again(world, preset=preset)
    assert resumed["run_id"] == killed
    assert predictions(resumed).equals(predicted)


def test_two_devices_of_one_gpu_learn_what_one_does():
    result = run_in_own_process("tests.training.two_devices", "GPU")
    print(result)
    for part in result["two"]:
        assert part["change"] > 1
        assert part["difference"] < 1e-3
    loss = result["float16"]["loss"]
    assert np.isfinite(loss).all()
    assert loss[-1] < loss[0]
    assert result["float16"]["kept as"] == ["float32"]


def test_memory_that_does_not_suffice_is_one_line():
    result = run_in_own_process("tests.gpu.isolated", "little_memory")
    print(result)
    for message in result:
        assert message.startswith("out of the GPU's memory: ")
        assert "\n" not in message


def test_fine_tuned_twice_it_is_the_same():
    result = run_in_own_process("tests.gpu.isolated", "determinism")
    print(result)
    for part in result.values():
        assert part["difference"] == 0
        assert part["change"] > 0
