import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from ml.errors import DataError
from ml.evaluation import evaluate, plot_confusion, plot_history, plot_roc, youden_threshold


def test_binary_by_hand():
    # 2 of 3 malignant and 1 of 2 benign called malignant at 0.5.
    truth = np.array([1, 1, 1, 0, 0])
    p = np.array([0.9, 0.8, 0.2, 0.6, 0.1])
    result = evaluate("binary", truth, p, 0.5)
    m = result.metrics
    assert m["accuracy"] == pytest.approx(3 / 5)
    assert m["precision"] == pytest.approx(2 / 3)
    assert m["recall"] == pytest.approx(2 / 3)
    assert m["specificity"] == pytest.approx(1 / 2)
    assert m["f1"] == pytest.approx(2 / 3)
    assert m["macro_f1"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert m["roc_auc"] == pytest.approx(5 / 6)  # of 6 pairs, only (0.2, 0.6) is the wrong way round
    assert m["threshold"] == 0.5
    assert result.confusion.tolist() == [[1, 1], [1, 2]]
    assert result.report["malignant"]["support"] == 3


def test_a_side_with_one_class_has_no_auc_and_says_which_is_absent():
    result = evaluate("binary", np.array([1, 1]), np.array([0.9, 0.2]), 0.5)
    assert "roc_auc" not in result.metrics
    assert result.absent == ("benign",)
    assert all(math.isfinite(value) for value in result.metrics.values())


def test_subtype_macro_figures_are_means_over_the_classes_present():
    truth = np.array([0, 0, 4, 4, 4])
    p = np.full((5, 8), 0.01)
    p[[0, 2, 3], [0, 4, 4]] = 0.9
    p[1, 4] = p[4, 7] = 0.9  # one A called DC, one DC called PC
    result = evaluate("subtype", truth, p, None)
    assert result.absent == ("F", "PT", "TA", "LC", "MC", "PC")
    assert result.metrics["accuracy"] == pytest.approx(3 / 5)
    assert result.metrics["micro_f1"] == pytest.approx(3 / 5)
    assert result.metrics["macro_f1"] == pytest.approx(np.mean([2 / 3, 2 / 3]))
    assert result.metrics["macro_f1"] > f1_score(truth, p.argmax(1), labels=range(8), average="macro", zero_division=0)
    assert 0 <= result.metrics["roc_auc_ovr"] <= 1
    assert result.report["A"]["recall"] == pytest.approx(1 / 2)


def test_perfect_and_useless_subtype_scores():
    truth = np.arange(8).repeat(3)
    perfect = evaluate("subtype", truth, np.eye(8)[truth], None).metrics
    assert (perfect["macro_f1"], perfect["roc_auc_ovr"]) == (1, 1)
    useless = evaluate("subtype", truth, np.full((24, 8), 1 / 8), None).metrics
    assert useless["roc_auc_ovr"] == pytest.approx(0.5)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 20)), min_size=2, max_size=40))
def test_no_threshold_beats_youdens(pairs):
    truth = np.array([int(t) for t, _ in pairs])
    p = np.array([v / 20 for _, v in pairs])
    if len(set(truth)) < 2:
        with pytest.raises(DataError, match="one class only"):
            youden_threshold(truth, p)
        return

    def j(threshold: float) -> float:
        called = p >= threshold
        return called[truth == 1].mean() - called[truth == 0].mean()

    best = youden_threshold(truth, p)
    assert j(best) == pytest.approx(max(j(t) for t in [*p, 2.0]))


def test_pictures_are_drawn_even_if_classes_are_absent(tmp_path):
    truth = np.array([0, 0, 4, 4])
    p = np.eye(8)[[0, 4, 4, 4]]
    result = evaluate("subtype", truth, p, None)
    plot_confusion(result, tmp_path / "confusion.png")
    plot_roc(result, truth, p, tmp_path / "roc.png")
    plot_history({"loss": [1.0, 0.5], "val_loss": [1.0, 0.9]}, tmp_path / "curve.png")
    assert all((tmp_path / f"{n}.png").read_bytes().startswith(b"\x89PNG") for n in ("confusion", "roc", "curve"))
