"""Figures of an evaluation, as PNG files. Each is readable at its own size and states its number of images."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ml.core.store import Json
from ml.core.taxonomy import SUBTYPES, class_names
from ml.evaluation.evaluation import Evaluation
from ml.evaluation.intervals import bootstrap_weights, has_resampling_variance
from ml.evaluation.scores import LabelledPredictions
from ml.images.decoding import Pixels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

History = dict[str, list[float]]
"""Training curves: name -> one value an epoch."""

_BLUE, _ORANGE, _GREEN, _RED, _GREY = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#b00020",
    "#888888",
)  # also told apart by the colour-blind
_COLOURS = (_BLUE, _ORANGE, _GREEN)
_DPI = 110
_BAND_DRAWS = 200
_GRID = np.linspace(0, 1, 101)


def plot_curves(predictions: LabelledPredictions, evaluation: Evaluation, path: Path, kind: str) -> None:
    """Plot ROC (``kind="roc"``) or precision-recall curves with 95% bands of the patient bootstrap.

    There is one curve of malignant against benign, or a panel for each subtype against the rest. A class with one case
    has no band.
    """
    names = ["malignant"] if predictions.task == "binary" else list(SUBTYPES)
    figure, panels = _create_panels(len(names), 5.6 if len(names) == 1 else 2.6)
    weights = next(bootstrap_weights(predictions, _BAND_DRAWS, 0)) if has_resampling_variance(predictions) else None
    for k, (name, axes) in enumerate(zip(names, panels, strict=True)):
        positive = predictions.truth == (1 if predictions.task == "binary" else k)
        score = predictions.probabilities if predictions.task == "binary" else predictions.probabilities[:, k]
        one_case = predictions.rows["patient"][positive].nunique() == 1  # its variance is unknown
        title = f"{name}: {positive.sum()} of {len(positive)}" + ("\none case: no band" if one_case else "")
        _plot_curve(axes, kind, title, positive, score, None if one_case else weights, small=len(names) > 1)
    if predictions.task == "binary" and not evaluation.absent_classes and len(evaluation.rules) == 1:
        negative, malignant = evaluation.confusion
        recall, predicted = malignant[1] / malignant.sum(), evaluation.confusion[:, 1].sum()
        point = negative[1] / negative.sum(), recall
        if kind != "roc":
            point = recall, malignant[1] / predicted if predicted else 1.0
        label = f"at threshold {evaluation.metrics['threshold']:.3f}"
        panels[0].plot(*point, "o", color=_RED, label=label)
        panels[0].legend(loc="lower right" if kind == "roc" else "lower left", fontsize=9)
    title = "ROC" if kind == "roc" else "Precision and recall"
    figure.suptitle(f"{title}, {_describe_size(predictions)}\nband: 95% of draws of patients", fontsize=11)
    _save(figure, path)


def _plot_curve(
    axes: "Axes",
    kind: str,
    title: str,
    positive: NDArray[np.bool_],
    score: NDArray[np.float64],
    weights: NDArray[np.float64] | None,
    *,
    small: bool,
) -> None:
    n = int(positive.sum())
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.02, 1.02)
    axes.set_aspect("equal")
    axes.set_title(title, fontsize=9 if small else 10)
    if not small:
        axes.set_xlabel("1 - specificity" if kind == "roc" else "recall (sensitivity)")
        axes.set_ylabel("sensitivity" if kind == "roc" else "precision")
    if not 0 < n < len(positive):
        axes.text(0.5, 0.5, "not measured", ha="center", color=_GREY)
        return
    if kind == "roc":
        axes.plot([0, 1], [0, 1], linestyle=":", color=_GREY)
    else:
        axes.axhline(n / len(positive), linestyle=":", color=_GREY)
    if weights is not None:
        lines = zip(*_compute_curve_points(kind, positive, score, weights), strict=True)
        heights = [_interpolate_curve(kind, x, y) for x, y in lines if np.isfinite((x, y)).all()]
        if len(heights) > 1:
            axes.fill_between(_GRID, *np.percentile(heights, (2.5, 97.5), axis=0), color=_BLUE, alpha=0.2, linewidth=0)
    (x,), (y,) = _compute_curve_points(kind, positive, score, np.ones((1, len(positive))))
    axes.plot(x, y, color=_BLUE, drawstyle="default" if kind == "roc" else "steps-pre")


def _interpolate_curve(kind: str, x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """Interpolate a curve between its points, (101,), as its area is computed: ROC linearly, precision by steps.

    A line between two points of precision and recall would promise what no threshold gives: J. Davis, M. Goadrich, "The
    relationship between Precision-Recall and ROC curves", ICML 2006.
    """
    return np.interp(_GRID, x, y) if kind == "roc" else y[np.searchsorted(x, _GRID)]


def _compute_curve_points(
    kind: str, positive: NDArray[np.bool_], score: NDArray[np.float64], weights: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Compute the points of a curve under each row of weights, one for each threshold: x and y, (draws, thresholds)."""
    order = np.argsort(-score, kind="stable")
    last = np.flatnonzero(np.diff(score[order], append=-np.inf))  # the last image of each score
    true_positives, false_positives = (
        np.cumsum(weights[:, order] * members[order], axis=1)[:, last] for members in (positive, ~positive)
    )
    with np.errstate(invalid="ignore", divide="ignore"):
        recall = true_positives / true_positives[:, -1:]
        false_positive_rate = false_positives / false_positives[:, -1:]
        predicted = true_positives + false_positives
        precision = np.where(predicted > 0, true_positives / predicted, 1.0)
    x, y, first_y = (false_positive_rate, recall, 0.0) if kind == "roc" else (recall, precision, 1.0)
    return np.pad(x, ((0, 0), (1, 0))), np.pad(y, ((0, 0), (1, 0)), constant_values=first_y)


def plot_reliability(predictions: LabelledPredictions, evaluation: Evaluation, path: Path) -> None:
    """Plot how often predictions came true, by their probability, and how often each probability was predicted."""
    from matplotlib.figure import Figure

    binary = predictions.task == "binary"
    p = predictions.probabilities if binary else predictions.probabilities.max(axis=1)
    came_true = predictions.truth == 1 if binary else predictions.probabilities.argmax(axis=1) == predictions.truth
    bins = np.minimum((p * 10).astype(int), 9)
    counts = np.bincount(bins, minlength=10)
    figure = Figure(figsize=(5.6, 6), dpi=_DPI, layout="constrained")
    top, bottom = figure.subplots(2, 1, height_ratios=(3, 1), sharex=True)
    top.plot([0, 1], [0, 1], linestyle=":", color=_GREY, label="perfect")
    occupied = counts > 0
    mean, share = (
        np.bincount(bins, weights=values, minlength=10)[occupied] / counts[occupied] for values in (p, came_true)
    )
    top.plot(mean, share, "o-", color=_BLUE, label=f"ECE {evaluation.metrics['ece']:.3f}")
    top.set_ylabel("share malignant" if binary else "share right")
    top.set_ylim(-0.02, 1.02)
    top.legend(loc="upper left", fontsize=9)
    top.set_title(f"Calibration, {_describe_size(predictions)}", fontsize=11)
    bottom.bar(np.arange(10) / 10 + 0.05, counts, width=0.09, color=_BLUE)
    bottom.set_ylabel("images")
    bottom.set_xlabel("predicted probability of malignant" if binary else "probability of the likeliest subtype")
    _save(figure, path)


def plot_confusion(predictions: LabelledPredictions, evaluation: Evaluation, path: Path) -> None:
    """Plot the confusion matrices of images and of patients: counts, shaded by the share of the true class."""
    from matplotlib.figure import Figure

    names, cases = class_names(predictions.task), predictions.cases
    case_confusion = np.zeros_like(evaluation.confusion)
    np.add.at(case_confusion, (cases.truth, cases.predicted), 1)
    side = 2.2 + 0.5 * len(names)
    figure = Figure(figsize=(2 * side + 0.8, side + 0.3), dpi=_DPI, layout="constrained")
    both = figure.subplots(1, 2)
    for axes, counts, title in zip(both, (evaluation.confusion, case_confusion), ("images", "patients"), strict=True):
        shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        for row, column in np.ndindex(counts.shape):
            colour = "white" if shares[row, column] > 0.55 else "#333333"
            axes.text(column, row, f"{counts[row, column]}", ha="center", va="center", color=colour, fontsize=9)
        axes.set_xticks(range(len(names)), names, fontsize=9)
        axes.set_yticks(range(len(names)), names, fontsize=9)
        axes.set_xlabel("predicted")
        axes.set_ylabel("true")
        axes.set_title(f"{counts.sum()} {title}", fontsize=10)
    figure.colorbar(image, ax=both, label="share of the true class", shrink=0.8)
    _save(figure, path)


def plot_classes(evaluation: Evaluation, path: Path) -> None:
    """Plot recall and F1 of each class with 95% intervals, and how many of its cases were recognised."""
    names = class_names(evaluation.task)
    figure, (axes,) = _create_panels(1, 5.6, wide=max(6.4, 1.5 * len(names)))
    for shift, metric, colour in ((-0.2, "recall", _BLUE), (0.2, "f1", _ORANGE)):
        for k, name in enumerate(names):
            of_class = evaluation.per_class[name]
            if not of_class["support"]:
                continue
            axes.bar(k + shift, of_class[metric], width=0.36, color=colour, label=metric if k == 0 else None)
            if metric in of_class["intervals"]:
                axes.plot([k + shift] * 2, of_class["intervals"][metric], color="#222222", linewidth=1.5)
    labels = []
    for name in names:
        of_class = evaluation.per_class[name]
        labels.append(
            f"{name}\n{of_class['recognised']} of {of_class['cases']} cases"
            if of_class["cases"]
            else f"{name}\nno case"
        )
    axes.set_xticks(range(len(names)), labels, fontsize=9)
    axes.set_ylim(0, 1.02)
    handles = {"recall": _BLUE, "F1": _ORANGE}
    from matplotlib.patches import Patch

    axes.legend(handles=[Patch(color=colour, label=name) for name, colour in handles.items()], fontsize=9)
    axes.set_title("By class; whiskers: 95% interval, where a class has two cases", fontsize=11)
    _save(figure, path)


def plot_slices(evaluation: Evaluation, path: Path) -> None:
    """Plot the main metrics by magnification and source, and the accuracy of each subtype."""
    area = "roc_auc" if evaluation.task == "binary" else "roc_auc_ovr"
    metrics = (
        (area, "ROC AUC", _BLUE),
        ("macro_f1", "macro-F1", _ORANGE),
        ("balanced_accuracy", "balanced accuracy", _GREEN),
    )
    subtype_metrics = (("accuracy", "accuracy (of a subtype)", _GREY),)
    groups = [
        (
            f"{value}X" if column == "magnification" else value,
            metrics if column != "subtype" else subtype_metrics,
            figures,
        )
        for column, slices in evaluation.slices.items()
        for value, figures in slices.items()
    ]
    figure, (axes,) = _create_panels(1, 1.4 + 0.6 * len(groups), wide=7.2)
    for row, (_, shown, figures) in enumerate(groups):
        shifts = (0.18, 0.0, -0.18) if len(shown) > 1 else (0.0,)
        for shift, (metric, label, colour) in zip(shifts, shown, strict=True):
            if metric in figures["metrics"]:
                axes.plot(figures["metrics"][metric], -row + shift, "o", color=colour, label=label)
            if metric in figures["intervals"]:
                axes.plot(figures["intervals"][metric], [-row + shift] * 2, color=colour)
    captions = []
    for name, _, figures in groups:
        images = f"{figures['images']} image{'s' * (figures['images'] != 1)}"
        cases = f"{figures['recognised']} of {figures['cases']} case{'s' * (figures['cases'] != 1)} recognised"
        captions.append(f"{name} ({images}, {cases})" + "\none case: no interval" * (figures["cases"] == 1))
    axes.set_yticks([-row for row in range(len(groups))], captions, fontsize=9)
    axes.set_xlim(0, 1.02)
    axes.grid(axis="x", color="#dddddd")
    handles, labels = axes.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    axes.legend(
        once.values(), once.keys(), loc="upper center", bbox_to_anchor=(0.3, -0.5 / len(groups)), ncols=2, fontsize=9
    )
    figure.suptitle("By slice, with 95% intervals", fontsize=11)
    _save(figure, path)


def plot_history(history: History, chosen: int | None, path: Path) -> None:
    """Plot the loss by epoch, and the number of epochs that was chosen."""
    figure, (axes,) = _create_panels(1, 4, wide=6.4)
    drawn = [name for name in history if name.endswith("loss")]
    for name, colour in zip(drawn, (_BLUE, _ORANGE, _GREEN, _RED), strict=False):
        values = history[name]
        first = 0 if name.startswith("fine_tuning_out") or name.startswith("fine_tuning_val") else 1
        style = "o" if len(values) == 1 else "-"  # a line through one point is invisible
        axes.plot(range(first, first + len(values)), values, style, label=name.replace("_", " "), color=colour)
    if chosen is not None:
        axes.axvline(chosen, linestyle=":", color=_GREY, label=f"chosen: {chosen}")
    axes.set_xlabel("epoch")
    axes.set_ylabel("loss")
    axes.set_title("Training curves", fontsize=11)
    axes.legend(fontsize=9)
    _save(figure, path)


def plot_worst_patients(evaluation: Evaluation, path: Path, most: int = 20) -> None:
    """Plot the patients with the smallest shares of correctly labelled images; ``most`` is their largest number."""
    worst = evaluation.patients[:most]
    figure, (axes,) = _create_panels(1, 1.4 + 0.28 * len(worst), wide=7.2)
    rows = [-float(k) for k in range(len(worst))]
    axes.barh(rows, [record["right"] for record in worst], color=_BLUE)
    axes.set_yticks(
        rows, [f"{record['patient']}: {record['class']}, called {record['label']}" for record in worst], fontsize=8
    )
    for row, record in zip(rows, worst, strict=True):
        inside = record["right"] > 0.8
        x, align, colour = record["right"] + (-0.01 if inside else 0.01), "right" if inside else "left", "white"
        share = f"{record['right']:.0%} of {record['images']}"
        axes.text(x, row, share, va="center", ha=align, color=colour if inside else "black", fontsize=8)
    axes.set_xlim(0, 1.02)
    axes.set_xlabel("share of the patient's images that got the right label")
    axes.set_title(f"Patients with the most errors, of {len(evaluation.patients)}", fontsize=11)
    _save(figure, path)


def plot_gallery(pictures: Pixels, captions: Sequence[str], title: str, path: Path) -> None:
    """Plot pictures in rows of four, each with its caption. ``pictures``: uint8 (n, 224, 224, 3)."""
    figure, panels = _create_panels(max(1, len(pictures)), 2.7)
    for axes in panels:
        axes.axis("off")
    if not len(pictures):
        panels[0].text(0.5, 0.5, "none", ha="center", color=_GREY)
    for axes, picture, caption in zip(panels, pictures, captions, strict=False):
        axes.imshow(picture)
        axes.set_title(caption, fontsize=8)
    figure.suptitle(title, fontsize=11)
    _save(figure, path)


def plot_grad_cam(
    pictures: Pixels, maps: NDArray[np.float32], controls: NDArray[np.float32], captions: Sequence[str], path: Path
) -> None:
    """Plot each picture beside its Grad-CAM and the control, whose backbone has random weights.

    Args:
        pictures: uint8 (n, 224, 224, 3).
        maps: float32 (n, 224, 224) in [0, 1].
        controls: likewise.
        captions: one a picture.
        path: of the PNG.
    """
    from matplotlib.figure import Figure

    n = len(pictures)
    figure = Figure(figsize=(7.6, 2.6 * n + 0.4), dpi=100, layout="constrained")
    grid = figure.subplots(n, 3, squeeze=False)
    for row, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        for axes, heat, title in zip(
            grid[row], (None, maps[row], controls[row]), (caption, "Grad-CAM", "control: random weights"), strict=True
        ):
            axes.imshow(picture)
            if heat is not None:
                axes.imshow(heat, cmap="inferno", alpha=0.5, vmin=0, vmax=1)
            axes.set_title(title, fontsize=8)
            axes.axis("off")
    _save(figure, path)


def plot_comparison(rows: Sequence[Json], title: str, path: Path) -> None:
    """Plot each preset's figures with low and high ends beside the notebooks', a panel for each protocol and model.

    Args:
        rows: of the table that :mod:`ml.training.reproduction` makes.
        title: above all panels.
        path: of the PNG.
    """
    rows_of_panels: dict[str, list[Json]] = {}
    for row in rows:
        rows_of_panels.setdefault(f"{row['protocol']}, {row['task']}", []).append(row)
    figure, panels = _create_panels(len(rows_of_panels), 5.2, wide=7.2)
    figure.suptitle(title, fontsize=11)
    for axes, (name, panel_rows) in zip(panels, rows_of_panels.items(), strict=True):
        for at, row in enumerate(panel_rows):
            presets = row["presets"]
            shifts = np.linspace(0.2, -0.2, len(presets)) if len(presets) > 1 else [0.0]
            for shift, colour, (preset, figures) in zip(shifts, _COLOURS, presets.items(), strict=False):
                axes.plot(figures["value"], -at + shift, "o", color=colour, label=preset if at == 0 else None)
                if figures["low"] is not None:
                    axes.plot([figures["low"], figures["high"]], [-at + shift] * 2, color=colour)
            if row["notebooks"] is not None:
                axes.plot(row["notebooks"], -at, "D", color="black", label="notebooks" if at == 0 else None)
        axes.set_yticks([-at for at in range(len(panel_rows))], [row["metric"] for row in panel_rows], fontsize=8)
        axes.set_xlim(0, 1.02)
        axes.grid(axis="x", color="#dddddd")
        axes.set_title(name, fontsize=10)
        axes.legend(loc="lower left", fontsize=8)
    _save(figure, path)


def _create_panels(n: int, side: float, wide: float | None = None) -> "tuple[Figure, list[Axes]]":
    """Make a figure of ``n`` panels in rows of four; ``side`` and ``wide`` are inches, ``wide`` of a single panel."""
    from matplotlib.figure import Figure

    columns = min(n, 4)
    rows = -(-n // columns)
    width = wide if n == 1 and wide else columns * side
    figure = Figure(figsize=(width, rows * side + 0.7), dpi=_DPI, layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in grid[n:]:
        axes.axis("off")
    return figure, grid[:n]


def _describe_size(predictions: LabelledPredictions) -> str:
    return f"{len(predictions.truth)} images of {predictions.rows['patient'].nunique()} patients"


def _save(figure: "Figure", path: Path) -> None:
    figure.savefig(path)
