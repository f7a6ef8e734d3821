"""Trainings that were killed resume where they were, in the same MLflow run, and give the same result."""

import os
import signal
import subprocess
import sys
import time

import pytest

from ml.core.mlflow_client import connect
from ml.promotion.registration import register_run
from ml.training import checkpoints
from ml.training import run as training_module
from ml.training.checkpoints import Checkpoint
from tests.conftest import PROJECT
from tests.helpers.small_training import (  # noqa: F401  # fixtures
    SELECT_ON_VALIDATION,
    Killed,
    ignore_finished_runs,
    kill_after_epoch,
    predictions,
    quick_preset,
    tiny,
    train_again,
    without_pictures,
    world,
)

pytestmark = pytest.mark.integration


def curves(world, run):
    client = connect(world.settings)
    names = ("loss", "out_of_fold_loss")
    return {n: sorted((m.step, m.value) for m in client.get_metric_history(run["run_id"], n)) for n in names}


def jobs(world):
    return [job for job in world.store.keys("jobs/training") if world.store.keys(f"jobs/training/{job}")]


@pytest.fixture(scope="module")
def whole(world):
    """A training of four epochs that is not interrupted."""
    return train_again(world, preset=quick_preset(4))


@pytest.fixture(params=["fold 2 of repeat 1", "the model"])
def killed(world, whole, ignore_finished_runs, monkeypatch, request):
    """The same training, killed after the second epoch of a fold, or of the model itself; its MLflow run."""
    return kill_after_epoch(request.param, 2, lambda: train_again(world, preset=quick_preset(4)), monkeypatch)


def test_a_killed_training_goes_on_to_the_same_result_in_the_same_run(world, whole, killed, capsys):
    client = connect(world.settings)
    assert client.get_run(killed).info.status == "FAILED"
    client.update_run(killed, status="RUNNING")  # as SIGKILL would have left it
    resumed = train_again(world, preset=quick_preset(4))
    assert f"after epoch 2) in MLflow run {killed}" in capsys.readouterr().err
    assert resumed["run_id"] == killed != whole["run_id"]
    assert resumed["metrics"] == whole["metrics"]
    assert predictions(resumed).equals(predictions(whole))
    assert curves(world, resumed) == curves(world, whole)
    assert client.get_run(killed).info.status == "FINISHED"
    assert jobs(world) == []


PROGRAM = """
import sys, time
from types import SimpleNamespace
from ml.training import checkpoints
from ml.training import run as training
from ml.core.settings import Settings
from ml.core.store import Store
from tests.helpers.small_training import quick_preset, train_again

if __name__ == "__main__":
    dataset, split, root, home, mlflow_uri, weights = sys.argv[1:]
    checkpoints._SECONDS_BETWEEN_SAVES = 0.0
    training._finished = lambda *_: None
    save = checkpoints.Checkpoint.save

    def slow(self, *arguments):
        save(self, *arguments)
        time.sleep(0.3)

    checkpoints.Checkpoint.save = slow
    settings = Settings(home=home, store=root, weights="random", backend="openvino", workers=1, mlflow_uri=mlflow_uri)
    world = SimpleNamespace(store=Store(root), settings=settings, dataset=dataset, split=split, preset=None)
    train_again(world, preset=quick_preset(4), weights_id=weights)
"""


def start_training(world) -> subprocess.Popen:
    file = world.root / "program.py"
    file.write_text(PROGRAM)
    settings = world.settings
    arguments = (world.dataset, world.split, world.store.root, settings.home, settings.mlflow_uri)
    command = [sys.executable, str(file), *map(str, arguments), world.made["weights"]]
    return subprocess.Popen(command, cwd=PROJECT, env={**os.environ, "PYTHONPATH": str(PROJECT)})


def runs(world):
    client = connect(world.settings)
    experiment = client.get_experiment_by_name("small").experiment_id
    return {run.info.run_id for run in client.search_runs([experiment], max_results=1000)}


def fold_at_work(world):
    """Returns the training's state if a fold is in progress and another one is finished."""
    for job in jobs(world):
        state, _ = world.store.read(f"jobs/training/{job}/state.json")
        if state and state["finished"] and (state["current"] or {}).get("part", "").startswith("fold"):
            return state
    return None


def test_a_process_that_is_killed_in_a_fold_leaves_what_another_goes_on_from(
    world, whole, ignore_finished_runs, monkeypatch, capfd
):
    before = runs(world)
    with start_training(world) as process:
        deadline = time.monotonic() + 400  # on a busy machine; usually it is some ten seconds
        while not (state := fold_at_work(world)) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert state
    client = connect(world.settings)
    assert client.get_run(state["run_id"]).info.status == "RUNNING"
    monkeypatch.setattr(checkpoints, "_SECONDS_UNTIL_DEAD", 1.0)
    monkeypatch.setattr(checkpoints, "_SECONDS_BETWEEN_CHECKS", 0.2)
    resumed = train_again(world, preset=quick_preset(4))
    assert f"resuming ({len(state['finished'])} parts finished, fold" in capfd.readouterr().err
    assert resumed["run_id"] == state["run_id"]
    assert runs(world) - before == {state["run_id"]}
    assert client.get_run(resumed["run_id"]).info.status == "FINISHED"
    assert resumed["metrics"] == whole["metrics"]
    assert predictions(resumed).equals(predictions(whole))
    assert curves(world, resumed) == curves(world, whole)
    assert jobs(world) == []


def test_where_the_run_was_deleted_another_takes_its_place(world, whole, killed, capsys):
    connect(world.settings).delete_run(killed)
    resumed = train_again(world, preset=quick_preset(4))
    assert f"after epoch 2) in MLflow run {resumed['run_id']}" in capsys.readouterr().err
    assert resumed["run_id"] != killed
    assert resumed["metrics"] == whole["metrics"]
    assert predictions(resumed).equals(predictions(whole))


def test_killed_in_fine_tuning_it_goes_on_to_the_same_result(world, ignore_finished_runs, monkeypatch):
    fine_tuning = {"when": "always", "epochs": 2, "learning_rate": 0.001}
    preset = quick_preset(1, selection=SELECT_ON_VALIDATION, fine_tuning=fine_tuning)
    undisturbed = train_again(world, preset=preset)
    killed = kill_after_epoch("the model, fine-tuning", 1, lambda: train_again(world, preset=preset), monkeypatch)
    resumed = train_again(world, preset=preset)
    assert resumed["run_id"] == killed
    assert resumed["run_id"] != undisturbed["run_id"]
    assert resumed["metrics"] == undisturbed["metrics"]
    assert predictions(resumed).equals(predictions(undisturbed))
    logged = connect(world.settings).get_run(resumed["run_id"]).data.metrics
    assert {"fine_tuning_loss", "fine_tuning_validation_loss", "loss"} <= logged.keys()
    untuned = train_again(world, preset=quick_preset(1, selection=SELECT_ON_VALIDATION))
    assert not predictions(untuned).equals(predictions(resumed))


@pytest.mark.parametrize("last", ["_log_metrics", "forget"])
def test_killed_while_logging_a_run_still_has_one_model_and_each_metric_once(
    world, whole, ignore_finished_runs, monkeypatch, last
):
    owner = Checkpoint if last == "forget" else training_module
    done, runs = getattr(owner, last), []

    def log_and_die(*arguments):
        runs.append(arguments[0] if last == "_log_metrics" else arguments[0].run_id)
        if last == "_log_metrics":
            done(*arguments)
        raise Killed

    preset = quick_preset(4)
    with monkeypatch.context() as patch:
        patch.setattr(owner, last, log_and_die)
        with pytest.raises(Killed):
            train_again(world, preset=preset)
    resumed = train_again(world, preset=preset)
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
