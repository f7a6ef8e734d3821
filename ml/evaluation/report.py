"""The report of a training: metrics, figures, a model card, and one self-contained page for people.

The model card follows M. Mitchell et al., "Model Cards for Model Reporting", FAT* 2019 (arXiv:1810.03993).
"""

import base64
import json
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ml.core.columns import read_texts
from ml.core.markdown import escape_markdown
from ml.core.store import Json
from ml.core.taxonomy import class_names
from ml.data.splits import GROUP_COLUMNS
from ml.evaluation import figures
from ml.evaluation.evaluation import Evaluation
from ml.evaluation.gradcam import choose_examples, compute_grad_cam, correlate_maps, randomize_weights
from ml.evaluation.metric_names import METRIC_NAMES
from ml.evaluation.scores import LabelledPredictions
from ml.images.decoding import Pixels

if TYPE_CHECKING:
    import keras
    from jinja2 import Template

_ERRORS = 12
_CLASS_DESCRIPTIONS = {"binary": "benign or malignant", "subtype": "eight tumour subtypes"}
_HEADLINE = {
    "binary": (
        *("roc_auc", "pr_auc", "recall", "specificity", "precision", "accuracy", "balanced_accuracy"),
        *("f1", "macro_f1", "weighted_f1", "mcc", "brier", "ece"),
    ),
    "subtype": (
        *("roc_auc_ovr", "pr_auc_ovr", "accuracy", "balanced_accuracy"),
        *("macro_f1", "weighted_f1", "mcc", "brier", "ece"),
    ),
}
"""Metrics in the report's tables, of images and of patients. Micro-F1 equals accuracy; metrics.json has all metrics."""


class Section(NamedTuple):
    """A figure of the page.

    Attributes:
        name: of the PNG file, without its suffix.
        title: above the figure.
        text: what the figure shows.
    """

    name: str
    title: str
    text: str


SECTIONS = (
    Section("roc", "ROC", "How sensitivity is traded against specificity; the dotted line is chance."),
    Section("precision_recall", "Precision and recall", "The dotted line is the share of the class."),
    Section("reliability", "Calibration", "On the dotted line, predictions come true as often as they say."),
    Section("confusion_matrix", "Confusion", "A patient's label follows from the mean probability of its images."),
    Section(
        "per_class",
        "Recall and F1, by class",
        "Recall: share of the class that was found. F1: harmonic mean of recall and precision.",
    ),
    Section("slices", "By magnification, source and subtype", "A model should be about as good in each of them."),
    Section("worst_patients", "Patients with the most errors", "Where to look first."),
    Section("errors", "The surest errors", "Images with a wrong label of which the model was surest."),
    Section(
        "grad_cam",
        "Where the model looks",
        "Bright areas speak for the label (Grad-CAM). The control beside it has the same head on a backbone with "
        "random weights. Where both agree (a rank correlation near 1), the map shows nothing of what was learnt.",
    ),
    Section("training_curve", "Training", "The number of epochs was chosen before the test side was scored."),
)
"""The page's figures, in order. A figure that could not be drawn is left out."""


def write_evaluation(
    folder: Path,
    test: tuple[LabelledPredictions, Evaluation],
    held_out: tuple[LabelledPredictions, Evaluation],
    history: figures.History,
    facts: Json,
    pictures: Callable[[list[str]], Pixels],
    network: "tuple[keras.Model, keras.Model]",
) -> None:
    """Write the metrics, the figures, the model card and report.html into a folder.

    Args:
        folder: an empty folder.
        test: predictions and evaluation of the test side, which is scored once.
        held_out: the same of the out-of-fold predictions, or of the validation side.
        history: training curves.
        facts: of the run: its inputs, the recipe, and the parameters that were chosen.
        pictures: pixel hashes -> uint8 (n, 224, 224, 3).
        network: backbone and head (features -> logits).
    """
    predictions, evaluation = test
    (folder / "metrics.json").write_text(json.dumps(evaluation.to_json(), indent=1))
    single_case_classes = find_single_case_classes(held_out[0], facts)
    held_out_metrics = {**held_out[1].to_json(), "never_learnt": single_case_classes}
    (folder / f"{facts['held_out']}_metrics.json").write_text(json.dumps(held_out_metrics, indent=1))
    figures.plot_curves(predictions, evaluation, folder / "roc.png", "roc")
    figures.plot_curves(predictions, evaluation, folder / "precision_recall.png", "precision_recall")
    figures.plot_reliability(predictions, evaluation, folder / "reliability.png")
    figures.plot_confusion(predictions, evaluation, folder / "confusion_matrix.png")
    figures.plot_classes(evaluation, folder / "per_class.png")
    figures.plot_slices(evaluation, folder / "slices.png")
    figures.plot_worst_patients(evaluation, folder / "worst_patients.png")
    figures.plot_history(history, facts["chosen"]["epochs"], folder / "training_curve.png")
    _plot_surest_errors(predictions, pictures, folder / "errors.png")
    _plot_grad_cam(predictions, pictures, network, folder / "grad_cam.png")
    card = render_model_card(evaluation.to_json(), facts)
    (folder / "model_card.md").write_text(card, encoding="utf-8")
    page = render_report(folder, evaluation, held_out[1], card, facts, single_case_classes)
    (folder / "report.html").write_text(page, encoding="utf-8")


def find_single_case_classes(held_out: LabelledPredictions, facts: Json) -> list[str]:
    """Returns the classes with a single case, which no model could learn before it predicted them out of fold.

    Such a class is present, so it counts in means over classes, with a recall of 0 but for luck.

    Args:
        held_out: the out-of-fold predictions, or those of the validation side, for which nothing is returned.
        facts: of the run; ``held_out`` and ``split_group`` are used.
    """
    if facts["held_out"] != "out_of_fold":
        return []
    groups = read_texts(held_out.rows, GROUP_COLUMNS[facts["split_group"]])
    names = class_names(held_out.task)
    return [name for k, name in enumerate(names) if len(set(groups[held_out.truth == k])) == 1]


def render_model_card(test: Json, facts: Json) -> str:
    """Returns the model card as Markdown. The report shows it, and it becomes the registered version's description.

    Args:
        test: ``task``, ``metrics``, ``intervals`` and ``interval_notes`` of the test side, as
            :meth:`ml.evaluation.evaluation.Evaluation.to_json` returns them.
        facts: of the run: ``set``, ``task``, ``preset``, ``seed``, ``run_id``, ``weights_kind``, ``dataset``,
            ``split_group``, ``sources`` (name -> ``version``) and ``sides`` (name -> ``images``, ``cases``).
    """
    headline = [name for name in _HEADLINE[test["task"]] if name in test["metrics"]]
    return _template("model_card.md").render(
        facts=facts, test=test, headline=headline, names=METRIC_NAMES, what=_CLASS_DESCRIPTIONS[test["task"]]
    )


def render_report(
    folder: Path,
    test: Evaluation,
    held_out: Evaluation,
    card: str,
    facts: Json,
    single_case_classes: Sequence[str] = (),
) -> str:
    """Returns the page as HTML, which needs no other file and no network.

    Args:
        folder: holds the figures.
        test: evaluation of the test side.
        held_out: evaluation of the out-of-fold predictions, or of the validation side.
        card: the model card as Markdown, whose first line is a heading.
        facts: of the run.
        single_case_classes: as :func:`find_single_case_classes` returns them.
    """
    from markdown_it import MarkdownIt
    from markupsafe import Markup

    # HTML in the card's text, such as in a source's name, is shown as text and not interpreted.
    converter = MarkdownIt("commonmark", {"html": False}).enable("table")
    sections = [
        {**section._asdict(), "data": base64.b64encode((folder / f"{section.name}.png").read_bytes()).decode()}
        for section in SECTIONS
        if (folder / f"{section.name}.png").exists()
    ]
    of_patients = [*(f"patient_{name}" for name in _HEADLINE[test.task]), "patient_recognition_rate"]
    return _template("report.html").render(
        facts=facts,
        test=test.to_json(),
        held_out=held_out.to_json(),
        never_learnt=single_case_classes,
        held_out_name={"out_of_fold": "out of fold", "validation": "validation"}[facts["held_out"]],
        headline=[name for name in _HEADLINE[test.task] if name in test.metrics],
        of_patients=[name for name in of_patients if name in test.metrics],
        names=METRIC_NAMES,
        sections=sections,
        what=_CLASS_DESCRIPTIONS[test.task],
        card=Markup(converter.render(card.split("\n", 1)[1])),  # noqa: S704  # escaped by the converter
        classes=class_names(test.task),
        recipe=json.dumps(facts["recipe"], indent=2),
    )


def _template(name: str) -> "Template":
    from jinja2 import Environment, FunctionLoader, StrictUndefined, select_autoescape

    def read(name: str) -> str:
        return files("ml.evaluation.templates").joinpath(name).read_text(encoding="utf-8")

    # Markdown has a filter of its own.
    environment = Environment(
        loader=FunctionLoader(read),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["markdown"] = escape_markdown
    return environment.get_template(name)


def _plot_surest_errors(predictions: LabelledPredictions, pictures: Callable[[list[str]], Pixels], path: Path) -> None:
    wide = predictions.probabilities
    if predictions.task == "binary":
        wide = np.stack([1 - wide, wide], axis=1)
    wrong = np.flatnonzero(predictions.predicted != predictions.truth)
    # The lowest probability of the true class comes first.
    rows = wrong[np.argsort(wide[wrong, predictions.truth[wrong]], kind="stable")][:_ERRORS]
    names = class_names(predictions.task)
    captions = []
    for row in rows:
        truth, image = names[predictions.truth[row]], predictions.rows.iloc[row]
        probability = f"p({truth}) = {wide[row, predictions.truth[row]]:.3f}"
        called = f"{truth} called {names[predictions.predicted[row]]}"
        captions.append(f"{called}\n{probability}, {image['patient']}, {image['magnification']}X")
    shown = pictures(predictions.rows["pixel_sha256"].iloc[rows].tolist())
    figures.plot_gallery(shown, captions, f"{len(rows)} of {len(wrong)} wrong of {len(predictions.truth)} images", path)


def _plot_grad_cam(
    predictions: LabelledPredictions,
    pictures: Callable[[list[str]], Pixels],
    network: "tuple[keras.Model, keras.Model]",
    path: Path,
) -> None:
    backbone, head = network
    examples = choose_examples(predictions)
    kinds = [kind for kind, rows in examples.items() for _ in rows]
    rows = [row for rows in examples.values() for row in rows]
    if not rows:
        return
    shown = pictures(predictions.rows["pixel_sha256"].iloc[rows].tolist())
    labels = predictions.predicted[rows]
    maps = compute_grad_cam(backbone, head, shown, labels)
    controls = compute_grad_cam(randomize_weights(backbone), head, shown, labels)
    names = class_names(predictions.task)
    captions = []
    for kind, row, correlation in zip(kinds, rows, correlate_maps(maps, controls), strict=True):
        compared = "no map to compare" if np.isnan(correlation) else f"correlation with control {correlation:.2f}"
        truth, label = names[predictions.truth[row]], names[predictions.predicted[row]]
        captions.append(f"{kind}: {truth} called {label}\n{compared}")
    figures.plot_grad_cam(shown, maps, controls, captions, path)
