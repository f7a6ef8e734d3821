"""The pictures people look at first: PNG files, readable at their own size, with the number of images stated."""

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
"""Training curves: name -> a value an epoch."""

_BLUE, _ORANGE, _GREEN, _RED, _GREY = "#0072b2", "#d55e00", "#009e73", "#b00020", "#888888"  # told apart by anyone
_COLOURS = (_BLUE, _ORANGE, _GREEN)
_DPI = 110
_BAND_DRAWS = 200
_GRID = np.linspace(0, 1, 101)


def plot_curves(scores: LabelledPredictions, evaluation: Evaluation, path: Path, kind: str) -> None:
    """ROC (``kind="roc"``) or precision-recall curves with 95% bands of the patient bootstrap.

    Malignant against benign, or a panel for each subtype against the rest; with one case it has no band.
    """
    names = ["malignant"] if scores.task == "binary" else list(SUBTYPES)
    figure, panels = _panels(len(names), 5.6 if len(names) == 1 else 2.6)
    weights = next(bootstrap_weights(scores, _BAND_DRAWS, 0)) if has_resampling_variance(scores) else None
    for k, (name, axes) in enumerate(zip(names, panels, strict=True)):
        positive = scores.truth == (1 if scores.task == "binary" else k)
        score = scores.probabilities if scores.task == "binary" else scores.probabilities[:, k]
        one_case = scores.rows["patient"][positive].nunique() == 1  # what it varies by is not known
        title = f"{name}: {positive.sum()} of {len(positive)}" + ("\none case: no band" if one_case else "")
        _curve(axes, kind, title, positive, score, None if one_case else weights, small=len(names) > 1)
    if scores.task == "binary" and not evaluation.absent_classes and len(evaluation.rules) == 1:
        negative, malignant = evaluation.confusion
        recall, called = malignant[1] / malignant.sum(), evaluation.confusion[:, 1].sum()
        at = negative[1] / negative.sum(), recall
        if kind != "roc":
            at = recall, malignant[1] / called if called else 1.0
        label = f"at threshold {evaluation.metrics['threshold']:.3f}"
        panels[0].plot(*at, "o", color=_RED, label=label)
        panels[0].legend(loc="lower right" if kind == "roc" else "lower left", fontsize=9)
    title = "ROC" if kind == "roc" else "Precision and recall"
    figure.suptitle(f"{title}, {_n(scores)}\nband: 95% of draws of patients", fontsize=11)
    _save(figure, path)


def _curve(
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
        lines = zip(*_lines(kind, positive, score, weights), strict=True)
        heights = [_heights(kind, x, y) for x, y in lines if np.isfinite((x, y)).all()]
        if len(heights) > 1:
            axes.fill_between(_GRID, *np.percentile(heights, (2.5, 97.5), axis=0), color=_BLUE, alpha=0.2, linewidth=0)
    (x,), (y,) = _lines(kind, positive, score, np.ones((1, len(positive))))
    axes.plot(x, y, color=_BLUE, drawstyle="default" if kind == "roc" else "steps-pre")


def _heights(kind: str, x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """A curve between its points, (101,), as its area is counted: ROC by lines, precision by steps.

    A line between two points of precision and recall would promise what no threshold gives: J. Davis, M. Goadrich, "The
    relationship between Precision-Recall and ROC curves", ICML 2006.
    """
    return np.interp(_GRID, x, y) if kind == "roc" else y[np.searchsorted(x, _GRID)]


def _lines(
    kind: str, positive: NDArray[np.bool_], score: NDArray[np.float64], weights: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Points of the curve under each row of weights, one a threshold: x and y, (draws, thresholds)."""
    order = np.argsort(-score, kind="stable")
    last = np.flatnonzero(np.diff(score[order], append=-np.inf))  # of images with the same score
    hits, false = (np.cumsum(weights[:, order] * which[order], axis=1)[:, last] for which in (positive, ~positive))
    with np.errstate(invalid="ignore", divide="ignore"):
        recall, fallout = hits / hits[:, -1:], false / false[:, -1:]
        precision = np.where(hits + false > 0, hits / (hits + false), 1.0)
    x, y, begin = (fallout, recall, 0.0) if kind == "roc" else (recall, precision, 1.0)
    return np.pad(x, ((0, 0), (1, 0))), np.pad(y, ((0, 0), (1, 0)), constant_values=begin)


def plot_reliability(scores: LabelledPredictions, evaluation: Evaluation, path: Path) -> None:
    """How often what was predicted with a probability came true, and how often each probability was given."""
    from matplotlib.figure import Figure

    binary = scores.task == "binary"
    p = scores.probabilities if binary else scores.probabilities.max(axis=1)
    happened = scores.truth == 1 if binary else scores.probabilities.argmax(axis=1) == scores.truth
    bins = np.minimum((p * 10).astype(int), 9)
    counts = np.bincount(bins, minlength=10)
    figure = Figure(figsize=(5.6, 6), dpi=_DPI, layout="constrained")
    top, bottom = figure.subplots(2, 1, height_ratios=(3, 1), sharex=True)
    top.plot([0, 1], [0, 1], linestyle=":", color=_GREY, label="perfect")
    full = counts > 0
    mean, share = (np.bincount(bins, weights=values, minlength=10)[full] / counts[full] for values in (p, happened))
    top.plot(mean, share, "o-", color=_BLUE, label=f"ECE {evaluation.metrics['ece']:.3f}")
    top.set_ylabel("share malignant" if binary else "share right")
    top.set_ylim(-0.02, 1.02)
    top.legend(loc="upper left", fontsize=9)
    top.set_title(f"Calibration, {_n(scores)}", fontsize=11)
    bottom.bar(np.arange(10) / 10 + 0.05, counts, width=0.09, color=_BLUE)
    bottom.set_ylabel("images")
    bottom.set_xlabel("predicted probability of malignant" if binary else "probability of the likeliest subtype")
    _save(figure, path)


def plot_confusion(scores: LabelledPredictions, evaluation: Evaluation, path: Path) -> None:
    """The confusion matrices of images and of patients: counts, shaded by the share of the true class."""
    from matplotlib.figure import Figure

    names, units = class_names(scores.task), scores.cases
    cases = np.zeros_like(evaluation.confusion)
    np.add.at(cases, (units.truth, units.predicted), 1)
    side = 2.2 + 0.5 * len(names)
    figure = Figure(figsize=(2 * side + 0.8, side + 0.3), dpi=_DPI, layout="constrained")
    both = figure.subplots(1, 2)
    for axes, counts, title in zip(both, (evaluation.confusion, cases), ("images", "patients"), strict=True):
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
    """Recall and F1 of each class with 95% intervals, and how many of its cases were recognised."""
    names = class_names(evaluation.task)
    figure, (axes,) = _panels(1, 5.6, wide=max(6.4, 1.5 * len(names)))
    for shift, metric, colour in ((-0.2, "recall", _BLUE), (0.2, "f1", _ORANGE)):
        for k, name in enumerate(names):
            one = evaluation.per_class[name]
            if not one["support"]:
                continue
            axes.bar(k + shift, one[metric], width=0.36, color=colour, label=metric if k == 0 else None)
            if metric in one["intervals"]:
                axes.plot([k + shift] * 2, one["intervals"][metric], color="#222222", linewidth=1.5)
    told = []
    for name in names:
        one = evaluation.per_class[name]
        told.append(f"{name}\n{one['recognised']} of {one['cases']} cases" if one["cases"] else f"{name}\nno case")
    axes.set_xticks(range(len(names)), told, fontsize=9)
    axes.set_ylim(0, 1.02)
    handles = {"recall": _BLUE, "F1": _ORANGE}
    from matplotlib.patches import Patch

    axes.legend(handles=[Patch(color=colour, label=name) for name, colour in handles.items()], fontsize=9)
    axes.set_title("By class; whiskers: 95% interval, where a class has two cases", fontsize=11)
    _save(figure, path)


def plot_slices(evaluation: Evaluation, path: Path) -> None:
    """The chief metrics by magnification and by source, and of each subtype how much of it was right."""
    area = "roc_auc" if evaluation.task == "binary" else "roc_auc_ovr"
    metrics = (
        (area, "ROC AUC", _BLUE),
        ("macro_f1", "macro-F1", _ORANGE),
        ("balanced_accuracy", "balanced accuracy", _GREEN),
    )
    of_subtypes = (("accuracy", "accuracy (of a subtype)", _GREY),)
    groups = [
        (f"{value}X" if column == "magnification" else value, metrics if column != "subtype" else of_subtypes, one)
        for column, by in evaluation.slices.items()
        for value, one in by.items()
    ]
    figure, (axes,) = _panels(1, 1.4 + 0.6 * len(groups), wide=7.2)
    for row, (_, shown, one) in enumerate(groups):
        shifts = (0.18, 0.0, -0.18) if len(shown) > 1 else (0.0,)
        for shift, (metric, label, colour) in zip(shifts, shown, strict=True):
            if metric in one["metrics"]:
                axes.plot(one["metrics"][metric], -row + shift, "o", color=colour, label=label)
            if metric in one["intervals"]:
                axes.plot(one["intervals"][metric], [-row + shift] * 2, color=colour)
    told = []
    for name, _, one in groups:
        images = f"{one['images']} image{'s' * (one['images'] != 1)}"
        cases = f"{one['recognised']} of {one['cases']} case{'s' * (one['cases'] != 1)} recognised"
        told.append(f"{name} ({images}, {cases})" + "\none case: no interval" * (one["cases"] == 1))
    axes.set_yticks([-row for row in range(len(groups))], told, fontsize=9)
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
    """Loss by epoch, and the epoch that was chosen."""
    figure, (axes,) = _panels(1, 4, wide=6.4)
    drawn = [name for name in history if name.endswith("loss")]
    for name, colour in zip(drawn, (_BLUE, _ORANGE, _GREEN, _RED), strict=False):
        values = history[name]
        first = 0 if name.startswith("fine_tuning_out") or name.startswith("fine_tuning_val") else 1
        style = "o" if len(values) == 1 else "-"  # a line of one point is not seen
        axes.plot(range(first, first + len(values)), values, style, label=name.replace("_", " "), color=colour)
    if chosen is not None:
        axes.axvline(chosen, linestyle=":", color=_GREY, label=f"chosen: {chosen}")
    axes.set_xlabel("epoch")
    axes.set_ylabel("loss")
    axes.set_title("Training curves", fontsize=11)
    axes.legend(fontsize=9)
    _save(figure, path)


def plot_worst_patients(evaluation: Evaluation, path: Path, most: int = 20) -> None:
    """The patients with the smallest shares of rightly labelled images."""
    worst = evaluation.patients[:most]
    figure, (axes,) = _panels(1, 1.4 + 0.28 * len(worst), wide=7.2)
    rows = [-float(k) for k in range(len(worst))]
    axes.barh(rows, [one["right"] for one in worst], color=_BLUE)
    axes.set_yticks(rows, [f"{one['patient']}: {one['class']}, called {one['label']}" for one in worst], fontsize=8)
    for row, one in zip(rows, worst, strict=True):
        inside = one["right"] > 0.8
        at, align, colour = one["right"] + (-0.01 if inside else 0.01), "right" if inside else "left", "white"
        told = f"{one['right']:.0%} of {one['images']}"
        axes.text(at, row, told, va="center", ha=align, color=colour if inside else "black", fontsize=8)
    axes.set_xlim(0, 1.02)
    axes.set_xlabel("share of the patient's images that got the right label")
    axes.set_title(f"Patients with the most errors, of {len(evaluation.patients)}", fontsize=11)
    _save(figure, path)


def plot_gallery(pictures: Pixels, captions: Sequence[str], title: str, path: Path) -> None:
    """Pictures in rows of four, each with its caption. ``pictures``: uint8 (n, 224, 224, 3)."""
    figure, panels = _panels(max(1, len(pictures)), 2.7)
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
    """Each picture beside its Grad-CAM and the control, whose backbone has random weights.

    Args:
        pictures: uint8 (n, 224, 224, 3).
        maps: float32 (n, 224, 224) in [0, 1].
        controls: likewise.
        captions: one a picture.
        path: the file.
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
    """Each preset's figures with their ends beside the notebooks', a panel for each protocol and model.

    Args:
        rows: of the table that :mod:`ml.training.reproduction` makes.
        title: above all panels.
        path: of the PNG.
    """
    parts: dict[str, list[Json]] = {}
    for row in rows:
        parts.setdefault(f"{row['protocol']}, {row['task']}", []).append(row)
    figure, panels = _panels(len(parts), 5.2, wide=7.2)
    figure.suptitle(title, fontsize=11)
    for axes, (name, mine) in zip(panels, parts.items(), strict=True):
        for at, one in enumerate(mine):
            presets = one["presets"]
            shifts = np.linspace(0.2, -0.2, len(presets)) if len(presets) > 1 else [0.0]
            for shift, colour, (preset, of) in zip(shifts, _COLOURS, presets.items(), strict=False):
                axes.plot(of["value"], -at + shift, "o", color=colour, label=preset if at == 0 else None)
                if of["low"] is not None:
                    axes.plot([of["low"], of["high"]], [-at + shift] * 2, color=colour)
            if one["notebooks"] is not None:
                axes.plot(one["notebooks"], -at, "D", color="black", label="notebooks" if at == 0 else None)
        axes.set_yticks([-at for at in range(len(mine))], [one["metric"] for one in mine], fontsize=8)
        axes.set_xlim(0, 1.02)
        axes.grid(axis="x", color="#dddddd")
        axes.set_title(name, fontsize=10)
        axes.legend(loc="lower left", fontsize=8)
    _save(figure, path)


def _panels(n: int, side: float, wide: float | None = None) -> "tuple[Figure, list[Axes]]":
    from matplotlib.figure import Figure

    columns = min(n, 4)
    rows = -(-n // columns)
    width = wide if n == 1 and wide else columns * side
    figure = Figure(figsize=(width, rows * side + 0.7), dpi=_DPI, layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in grid[n:]:
        axes.axis("off")
    return figure, grid[:n]


def _n(scores: LabelledPredictions) -> str:
    return f"{len(scores.truth)} images of {scores.rows['patient'].nunique()} patients"


def _save(figure: "Figure", path: Path) -> None:
    figure.savefig(path)
