"""The report of made-up predictions, with drawn pictures and a small network that has the real one's structure."""

import json
import re

import keras
import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import average_precision_score

from ml.core.taxonomy import class_names
from ml.evaluation import figures
from ml.evaluation.decision_rule import DecisionRule
from ml.evaluation.evaluation import evaluate
from ml.evaluation.gradcam import choose_examples, compute_grad_cam, correlate_maps, randomize_weights
from ml.evaluation.report import SECTIONS, write_evaluation
from ml.evaluation.scores import LabelledPredictions
from ml.training.networks import build_head

FACTS = {
    "set": "made",
    "preset": "demo",
    "description": "<script>alert(1)</script>",
    "seed": "0",
    "run_id": "r",
    "weights_kind": "random",
    "dataset": "dataset-1",
    "split_group": "case",
    "sources": {"drawn": {"version": "version-1"}},
    "sides": {side: {"images": 3, "cases": 2} for side in ("train", "validation", "test")},
    "recipe": {"views": {"count": 1}},
    "held_out": "out_of_fold",
}


def backbone() -> keras.Model:
    """Returns a network with one convolution in place of EfficientNetB0's many."""
    keras.utils.set_random_seed(1)
    x = inputs = keras.Input((224, 224, 3))
    x = keras.layers.Rescaling(1 / 255)(x)
    x = keras.layers.Conv2D(8, 32, strides=32, name="conv")(x)
    x = keras.layers.Activation("relu", name="top_activation")(x)
    pooled = keras.layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, pooled, name="efficientnetb0")


def head(outputs: int) -> keras.Model:
    inputs = keras.Input((8,))
    return keras.Model(inputs, keras.layers.Dense(outputs)(inputs))


def make_predictions(task: str, n: int = 60, absent: int | None = None) -> LabelledPredictions:
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 2 if task == "binary" else 8, n)
    if absent is not None:
        truth[truth == absent] = (absent + 1) % (2 if task == "binary" else 8)
    rows = pd.DataFrame(
        {
            "patient": [f"<b>{t}-{k % 3}" for k, t in enumerate(truth)],
            "magnification": rng.choice([40, 100], n),
            "source": "drawn & more",
            "subtype": np.where(truth == 1, "DC", "A") if task == "binary" else np.array(class_names(task))[truth],
            "pixel_sha256": [f"h{k}" for k in range(n)],
        }
    )
    if task == "subtype":
        rows.loc[truth == 7, "patient"] = "only one"
    rows["slide"] = rows["patient"]
    if task == "binary":
        p = np.clip(truth * 0.4 + rng.random(n) * 0.6, 0, 1)
        return LabelledPredictions("binary", rows, truth, p, DecisionRule(threshold=0.5))
    return LabelledPredictions("subtype", rows, truth, rng.dirichlet(np.ones(8), n), DecisionRule())


def pictures(hashes: list[str]) -> np.ndarray:
    return np.random.default_rng(len(hashes)).integers(0, 256, (len(hashes), 224, 224, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("task", "absent", "draws"), [("binary", None, 20), ("subtype", None, 20), ("subtype", 2, 0), ("binary", 0, 20)]
)
def test_the_page_needs_no_other_file(tmp_path, task, absent, draws):
    scores = make_predictions(task, absent=absent)
    evaluation = evaluate(scores, draws=draws)
    chosen = {"epochs": 2, "tau": 0.5, "temperature": 1.2, **scores.rule.to_json()}
    write_evaluation(
        tmp_path,
        (scores, evaluation),
        (scores, evaluation),
        {"loss": [1.0, 0.5], "out_of_fold_loss": [1.1, 0.9]},
        {**FACTS, "task": task, "chosen": chosen},
        pictures,
        (backbone(), head(1 if task == "binary" else 8)),
    )
    page = (tmp_path / "report.html").read_text()
    assert page.count('src="data:image/png;base64,') == len(SECTIONS)
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert len(re.findall(r"<img ", page)) == len(re.findall(r'<img alt="[^"]+', page))
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "Not for clinical use" in page
    assert "Random backbone weights" in page
    assert ("Not measured, since no test image shows it" in page) == (absent is not None)
    assert json.loads((tmp_path / "metrics.json").read_text())["metrics"] == evaluation.metrics
    single_case_classes = ["PC"] if task == "subtype" else []
    assert json.loads((tmp_path / "out_of_fold_metrics.json").read_text())["never_learnt"] == single_case_classes
    assert ("Of PC there is one case to learn from." in page) == bool(single_case_classes)
    names_in_both_tables = [
        "macro-F1",
        "weighted F1",
        "Brier score (0 is best)",
        *(["precision", "F1"] if task == "binary" else []),
    ]
    assert {name: page.count(f"<tr><td>{name}</td>") for name in names_in_both_tables} == dict.fromkeys(
        names_in_both_tables, 2
    )
    assert {f"{section.name}.png" for section in SECTIONS} <= {file.name for file in tmp_path.iterdir()}


def test_a_slice_of_one_case_says_that_it_has_no_interval(tmp_path, monkeypatch):
    scores = make_predictions("binary")
    scores.rows.loc[scores.rows["subtype"] == "A", "patient"] = "one"
    drawn = []
    monkeypatch.setattr(figures, "_save", lambda figure, _: drawn.append(figure))
    figures.plot_slices(evaluate(scores, draws=20), tmp_path / "slices.png")
    labels = {label.get_text().split()[0]: label.get_text() for label in drawn[0].axes[0].get_yticklabels()}
    assert labels["A"].endswith("of 1 case recognised)\none case: no interval")
    assert labels["DC"].endswith("of 3 cases recognised)")


@pytest.mark.parametrize("kind", ["roc", "precision_recall"])
def test_a_curve_of_one_case_has_no_band_and_says_so(tmp_path, monkeypatch, kind):
    scores = make_predictions("subtype")
    scores.rows.loc[scores.rows["subtype"] == "A", "patient"] = "one"
    drawn = []
    monkeypatch.setattr(figures, "_save", lambda figure, _: drawn.append(figure))
    figures.plot_curves(scores, evaluate(scores, draws=20), tmp_path / "curves.png", kind)
    bands = {axes.get_title().split(":")[0]: (axes.get_title(), len(axes.collections)) for axes in drawn[0].axes}
    assert bands["A"][0].endswith("\none case: no band")
    assert bands["A"][1] == 0
    assert bands["DC"][0].count("\n") == 0
    assert bands["DC"][1] == 1


def test_precision_between_two_thresholds_is_that_of_the_next_threshold():
    positive, score = np.array([False, True, True]), np.array([0.9, 0.8, 0.7])
    (x,), (y,) = figures._compute_curve_points("precision_recall", positive, score, np.ones((1, 3)))
    heights = figures._interpolate_curve("precision_recall", x, y)
    assert heights[[25, 50, 75, 100]] == pytest.approx([1 / 2, 1 / 2, 2 / 3, 2 / 3])
    assert heights[1:].mean() == pytest.approx(average_precision_score(positive, score))


def test_a_map_is_bright_where_the_evidence_is():
    """The network's evidence for malignant is redness, and one quarter of the picture is red."""
    network, outputs = backbone(), head(1)
    kernel, bias = (np.zeros_like(w) for w in network.get_layer("conv").get_weights())
    kernel[:, :, 0, 0] = 1 / 32**2
    network.get_layer("conv").set_weights([kernel, bias])
    outputs.layers[-1].set_weights([np.eye(8)[:, :1], np.zeros(1)])
    pixels = np.zeros((1, 224, 224, 3), np.uint8)
    pixels[0, :112, 112:, 0] = 255
    (heat,) = compute_grad_cam(network, outputs, pixels, np.array([1]))
    assert heat.max() == pytest.approx(1)
    assert heat[:96, 128:].mean() > 0.8
    assert heat[160:].max() < 0.1
    assert compute_grad_cam(network, outputs, pixels, np.array([0])).max() == 0  # nothing speaks for benign


def test_the_control_has_random_weights_and_the_same_scaling_of_pixels():
    network = backbone()
    control = randomize_weights(network)
    assert not np.allclose(control.get_layer("conv").get_weights()[0], network.get_layer("conv").get_weights()[0])
    shown, both = pictures(["a", "b"]), np.array([0, 1])
    outputs = head(8)
    maps = compute_grad_cam(network, outputs, shown, both)
    assert correlate_maps(maps, maps) == pytest.approx(np.ones(2))
    assert np.isnan(correlate_maps(maps, np.zeros_like(maps))).all()


def test_example_images_are_of_different_patients():
    scores = make_predictions("binary", 200)
    chosen = choose_examples(scores)
    right = scores.predicted == scores.truth
    assert [len(rows) for rows in chosen.values()] == [3, 3, 3]
    assert right[chosen["correct"]].all()
    assert not right[chosen["wrong"]].any()
    for rows in chosen.values():
        assert len(set(scores.rows["patient"].iloc[rows])) == 3
    nearest = np.abs(scores.probabilities - 0.5).min()
    assert np.abs(scores.probabilities[chosen["borderline"]] - 0.5).min() == nearest


def test_grad_cam_works_with_a_head_of_the_real_width():
    inputs = keras.Input((224, 224, 3))
    x = keras.layers.Activation("relu", name="top_activation")(keras.layers.Conv2D(1280, 32, strides=32)(inputs))
    wide = keras.Model(inputs, keras.layers.GlobalAveragePooling2D()(x))
    maps = compute_grad_cam(wide, build_head("subtype", dropout=0.5, standardize=False), pictures(["a"]), np.array([3]))
    assert maps.shape == (1, 224, 224)
