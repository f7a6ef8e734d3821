"""The comparison of presets: its arithmetic on made-up predictions, and the whole command on small drawn data."""

import csv
import json

import numpy as np
import pytest
from sklearn.metrics import f1_score, roc_auc_score

from ml.core.errors import ConfigError
from ml.core.mlflow_client import connect
from ml.data.training_sets import load_training_set
from ml.evaluation.decision_rule import DecisionRule
from ml.evaluation.scores import LabelledPredictions
from ml.training import reproduction
from ml.training.preset_metrics import NEVER_FOUND, compute_metrics, compute_rows
from ml.training.reproduction import reproduce
from tests.helpers import made_up
from tests.helpers.small_training import quick_preset, tiny, world  # noqa: F401  # fixtures

ROWS = made_up.manifest_rows({f"14-{k:03d}": ("A" if k % 2 else "DC", 4) for k in range(40)}).sort_values(
    "pixel_sha256"
)
TRUTH = (ROWS["label"] == "malignant").to_numpy().astype(np.int64)


def scores(skill, seed):
    """Probabilities that tell more the more skill there is, patient by patient."""
    rng = np.random.default_rng(seed)
    of_patient = {name: rng.normal() for name in sorted(set(ROWS["patient"]))}
    noise = ROWS["patient"].map(of_patient).to_numpy() + rng.normal(size=len(ROWS))
    return LabelledPredictions(
        "binary", ROWS, TRUTH, 1 / (1 + np.exp(-(skill * (2 * TRUTH - 1) + noise))), DecisionRule(threshold=0.5)
    )


def row(rows, metric):
    return next(one for one in rows if one.metric == metric)


def test_figures_are_means_over_seeds():
    mine = [scores(0.5, seed) for seed in (1, 2, 3)]
    found = compute_metrics(mine, draws=0).values
    assert found["roc_auc"] == pytest.approx(np.mean([roc_auc_score(TRUTH, one.probabilities) for one in mine]))
    assert found["macro_f1"] == pytest.approx(
        np.mean([f1_score(TRUTH, one.predicted, average="macro") for one in mine])
    )
    assert found[NEVER_FOUND] == 0
    blind = LabelledPredictions("binary", ROWS, TRUTH, np.zeros(len(TRUTH)), DecisionRule(threshold=0.5))
    assert compute_metrics([blind, mine[0]], draws=0).values[NEVER_FOUND] == 0.5


def test_differences_are_paired():
    """Alike models differ by nothing in any draw, which is no interval, though each one's own is wide."""
    first = compute_metrics([scores(0.5, 1)], draws=200)
    same = row(
        compute_rows("ledger", "binary", {"a": [first], "b": [compute_metrics([scores(0.5, 1)], draws=200)]}), "roc_auc"
    )
    assert same.difference == (0, None, None)
    assert same.presets["a"].high - same.presets["a"].low > 0.05
    better = row(
        compute_rows("ledger", "binary", {"a": [first], "b": [compute_metrics([scores(2.0, 1)], draws=200)]}), "roc_auc"
    )
    assert 0 < better.difference.low < better.difference.value < better.difference.high
    assert (better.level, better.notebooks) == ("image", 0.853)


def test_of_several_folds_the_mean_and_one_standard_deviation():
    folds = [compute_metrics([scores(1.0, seed)], draws=0) for seed in range(3)]
    others = [compute_metrics([scores(1.5, seed)], draws=0) for seed in range(3)]
    found = row(compute_rows("spanhol", "binary", {"a": folds, "b": others}), "patient_recognition_rate_100x")
    rates = np.array([one.values["patient_recognition_rate_100x"] for one in folds])
    by_hand = [
        np.mean([np.mean(one.predicted[mine] == TRUTH[mine]) for mine in patients()])
        for one in (scores(1.0, seed) for seed in range(3))
    ]
    assert rates == pytest.approx(by_hand)
    spread = np.std(by_hand, ddof=1)
    assert found.presets["a"] == pytest.approx((rates.mean(), rates.mean() - spread, rates.mean() + spread))
    gained = [b.values[found.metric] - a.values[found.metric] for a, b in zip(folds, others, strict=True)]
    assert found.difference.value == pytest.approx(np.mean(gained))
    assert found.level == "patient"


def patients():
    return [(ROWS["patient"] == name).to_numpy() for name in sorted(set(ROWS["patient"]))]


@pytest.mark.integration
def test_a_comparison_is_written_logged_and_never_done_twice(world, tmp_path, monkeypatch, capsys):  # noqa: F811
    training_set = load_training_set("small", world.settings.conf)
    ours = quick_preset(2)
    validated = {"using": "validation", "folds": 0, "repeats": 0, "choose_epochs": False, "calibrate": False}
    theirs = quick_preset(2, selection=validated).model_copy(update={"name": "paper"})
    common = {"training_set": training_set, "output": tmp_path / "out", "store": world.store}
    common |= {"settings": world.settings, "presets": [theirs, ours], "protocols": ["notebooks", "ledger"]}
    first = reproduce(seeds=1, **common)
    assert (first["trainings"], first["trained"]) == (8, 8)
    assert not any(world.store.keys(f"jobs/training/{job}") for job in world.store.keys("jobs/training"))
    whole = json.loads((tmp_path / "out" / "reproduction.json").read_text())
    assert whole["rows"] == first["rows"]
    assert any("RANDOM" in note for note in whole["notes"])
    text = (tmp_path / "out" / "table.md").read_text()
    assert "| metric | notebooks | paper | demo | demo - paper |" in text
    for title in ("## notebooks, binary, by image", "## ledger, subtype, by patient"):
        assert title in text
    with (tmp_path / "out" / "table.csv").open() as file:
        told = list(csv.DictReader(file))
    assert len(told) == len(first["rows"])
    auc = next(one for one in told if (one["protocol"], one["metric"]) == ("notebooks", "roc_auc"))
    assert auc["notebooks"] == "0.853"
    assert float(auc["difference"]) == pytest.approx(float(auc["demo"]) - float(auc["paper"]))
    client = connect(world.settings)
    run = client.get_run(first["run_id"])
    assert run.data.tags["breakhis.kind"] == "reproduction"
    assert run.data.metrics["ledger_binary_demo_roc_auc"] == pytest.approx(
        next(
            r["presets"]["demo"]["value"]
            for r in first["rows"]
            if r["metric"] == "roc_auc" and r["protocol"] == "ledger"
        )
    )
    assert {file.path for file in client.list_artifacts(first["run_id"])} == {
        "comparison.png",
        "reproduction.json",
        "table.csv",
        "table.md",
    }
    again = reproduce(seeds=1, **common)
    assert (again["trained"], again["rows"]) == (0, first["rows"])
    more = reproduce(seeds=2, **{**common, "protocols": ["ledger"]})
    assert (more["trainings"], more["trained"]) == (8, 4)

    learn = reproduction.fit_and_calibrate
    monkeypatch.setattr(
        reproduction, "fit_and_calibrate", None
    )  # a file of another training is not taken for this one's
    file = tmp_path / "out" / "trainings" / "ledger-binary-paper-seed-0.npz"
    file.write_bytes((tmp_path / "out" / "trainings" / "ledger-binary-paper-seed-1.npz").read_bytes())
    with pytest.raises(TypeError):
        reproduce(seeds=1, **common)
    monkeypatch.setattr(reproduction, "fit_and_calibrate", learn)
    assert reproduce(seeds=1, **common)["trained"] == 1


@pytest.mark.integration
def test_what_another_has_trained_meanwhile_is_taken_and_not_trained_again(world, tmp_path, monkeypatch):  # noqa: F811
    """Two are begun at once: the second waits, and finds the training in the folder."""
    common = {"training_set": load_training_set("small", world.settings.conf), "output": tmp_path / "out"}
    common |= {"store": world.store, "settings": world.settings, "presets": [quick_preset(1)], "protocols": ["ledger"]}
    first = reproduce(seeds=1, **common)
    kept = {file: file.read_bytes() for file in (tmp_path / "out" / "trainings").iterdir()}
    for file in kept:
        file.unlink()
    waited = []

    def wait(*arguments):
        waited.append(arguments)
        for file, data in kept.items():
            file.write_bytes(data)

    monkeypatch.setattr(reproduction, "wait_for_concurrent_training", wait)
    second = reproduce(seeds=1, **common)
    assert waited
    assert (second["trainings"], second["trained"], second["rows"]) == (2, 0, first["rows"])


@pytest.mark.integration
def test_what_cannot_be_compared_is_refused_at_once(world, tmp_path):  # noqa: F811
    training_set = load_training_set("small", world.settings.conf)
    common = {"training_set": training_set, "protocols": ["ledger"], "store": world.store, "settings": world.settings}
    with pytest.raises(ConfigError, match="nothing to compare"):
        reproduce(presets=[], seeds=1, output=tmp_path, **common)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--output .*file"):
        reproduce(presets=[quick_preset(1)], seeds=1, output=tmp_path / "file", **common)
