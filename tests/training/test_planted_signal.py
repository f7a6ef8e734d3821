"""Reported metrics are right: from files to a logged run, on pictures whose signal is known."""

import numpy as np
import pytest
from PIL import Image

from ml.core.errors import DataError
from ml.core.mlflow_client import connect
from ml.data.splits import read_split
from ml.data.training_sets import read_dataset
from ml.training.run import train
from tests.helpers import made_up
from tests.helpers.small_training import prepare, quick_preset, tiny, without_pictures  # noqa: F401  # fixtures

pytestmark = pytest.mark.integration

_PATIENTS, _IMAGES = 60, 4


def write_pictures(folder, *, shuffled):
    """Write pictures of patients, redder ones for malignant patients. Shuffled, labels are those of other patients."""
    rng = np.random.default_rng(3)
    malignant = np.arange(_PATIENTS) % 2 == 1
    labels = rng.permutation(malignant) if shuffled else malignant
    for patient in range(_PATIENTS):
        tint = np.array([190 if malignant[patient] else 150, 120, 160]) + rng.normal(0, 8, 3)
        for seq in range(1, _IMAGES + 1):
            pixels = np.clip(tint + rng.normal(0, 30, (92, 140, 3)), 0, 255).astype(np.uint8)
            name = made_up.name("DC" if labels[patient] else "A", f"14-{10_000 + patient}", 100, seq)
            Image.fromarray(pixels).save(folder / name)


def train_on_pictures(folder, *, shuffled):
    """Train a binary model on such pictures and return its metrics."""
    (folder / "pictures").mkdir()
    write_pictures(folder / "pictures", shuffled=shuffled)
    made = prepare(folder, f"kind: directory\npath: {folder / 'pictures'}")
    preset = quick_preset(10).model_copy(update={"bootstrap_draws": 500})
    run = train(
        "binary",
        dataset=made.dataset,
        split=made.split,
        preset=preset,
        seed=0,
        store=made.store,
        settings=made.settings,
    )
    return connect(made.settings).get_run(run["run_id"]).data.metrics


def test_a_planted_signal_is_found(tiny, tmp_path):  # noqa: F811
    metrics = train_on_pictures(tmp_path, shuffled=False)
    for side in ("test", "oof"):
        # Without an interval where the AUC is 1 in every draw.
        assert metrics.get(f"{side}_roc_auc_low", metrics[f"{side}_roc_auc"]) > 0.9
        assert metrics[f"{side}_patient_roc_auc"] > 0.95


def test_shuffled_labels_are_not_learnt(tiny, tmp_path):  # noqa: F811
    """The same pictures with random labels: the interval of the AUC contains a half."""
    metrics = train_on_pictures(tmp_path, shuffled=True)
    for side in ("test", "oof"):
        assert metrics[f"{side}_roc_auc_low"] < 0.5 < metrics[f"{side}_roc_auc_high"]
    assert metrics["oof_roc_auc_high"] < 0.8


def test_a_planted_leak_is_refused(tiny, tmp_path):  # noqa: F811
    """A picture of a test patient that is also a training patient's is refused before any training."""
    (tmp_path / "pictures").mkdir()
    write_pictures(tmp_path / "pictures", shuffled=False)
    made = prepare(tmp_path, f"kind: directory\npath: {tmp_path / 'pictures'}")
    rows = read_dataset(made.dataset, made.store)
    sides = read_split(made.split, made.store).sides
    tested = rows[rows["patient"].map(sides) == "test"].iloc[0]
    learnt = rows[rows["patient"].map(sides) == "train"].index[0]
    for column in ("pixel_sha256", "sha256"):
        rows.loc[learnt, column] = tested[column]
    leaking = made_up.create_dataset(made.store, rows, ledger="small", set_name="small")
    with pytest.raises(DataError, match=f"same picture lies on two sides of the split: pixels {tested.pixel_sha256}"):
        train(
            "binary",
            dataset=leaking,
            split=made.split,
            preset=made.preset,
            seed=0,
            store=made.store,
            settings=made.settings,
        )
    experiment = connect(made.settings).get_experiment_by_name("small").experiment_id
    assert not connect(made.settings).search_runs([experiment])
