"""The report of a training: metrics, pictures and one self-contained page with a model card, for people.

The card follows M. Mitchell et al., "Model Cards for Model Reporting", FAT* 2019 (arXiv:1810.03993).
"""

import base64
import json
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ml.core.store import Json
from ml.core.taxonomy import class_names
from ml.data.splits import GROUP_COLUMNS
from ml.evaluation import figures
from ml.evaluation.evaluation import Evaluation
from ml.evaluation.gradcam import agreement, choose_cases, grad_cam, randomized
from ml.evaluation.metric_names import METRIC_NAMES
from ml.evaluation.scores import LabelledPredictions
from ml.images.decoding import Pixels

if TYPE_CHECKING:
    import keras
    from jinja2 import Template

_ERRORS = 12
_WHAT = {"binary": "benign or malignant", "subtype": "eight tumour subtypes"}
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
"""In tables for people, of images and of patients. Micro-F1 is the accuracy; the rest stands in metrics.json."""


class Section(NamedTuple):
    """A picture of the page."""

    name: str
    title: str
    text: str


SECTIONS = (
    Section("roc", "ROC", "How sensitivity is traded against specificity; the dotted line is chance."),
    Section("precision_recall", "Precision and recall", "The dotted line is the share of the class."),
    Section("reliability", "Calibration", "On the dotted line a probability comes true as often as it says."),
    Section("confusion_matrix", "Confusion", "Of patients: by the mean probability of a patient's images."),
    Section(
        "per_class",
        "Found and right, by class",
        "Recall: share of the class that was found. F1: its balance with precision.",
    ),
    Section("slices", "By magnification, source and subtype", "A model should not lean on one of them."),
    Section("worst_patients", "Patients with the most errors", "Where to look first."),
    Section("errors", "The surest errors", "Images of the wrong label that the model was surest of."),
    Section(
        "grad_cam",
        "Where the model looks",
        "Bright: what speaks for the label (Grad-CAM). Beside it the same head on a backbone with random weights: "
        "where both agree (a rank correlation near 1), the map says nothing of what was learnt.",
    ),
    Section("training_curve", "Training", "The number of epochs was chosen before the test side was scored."),
)
"""The page's pictures, in its order; a picture that could not be drawn is left out."""


def write_evaluation(
    folder: Path,
    test: tuple[LabelledPredictions, Evaluation],
    held_out: tuple[LabelledPredictions, Evaluation],
    history: figures.History,
    facts: Json,
    pictures: Callable[[list[str]], Pixels],
    network: "tuple[keras.Model, keras.Model]",
) -> None:
    """Write metrics.json, the pictures and report.html into a folder.

    Args:
        folder: an empty one.
        test: the test side, scored once.
        held_out: the out-of-fold predictions, or the validation side.
        history: curves of the training.
        facts: of the run: what it was made of, the recipe, and what was chosen.
        pictures: pixel hashes -> uint8 (n, 224, 224, 3).
        network: backbone and head (features -> logits).
    """
    scores, evaluation = test
    (folder / "metrics.json").write_text(json.dumps(evaluation.to_json(), indent=1))
    alone = never_learnt(held_out[0], facts)
    told = {**held_out[1].to_json(), "never_learnt": alone}
    (folder / f"{facts['held_out']}_metrics.json").write_text(json.dumps(told, indent=1))
    figures.plot_curves(scores, evaluation, folder / "roc.png", "roc")
    figures.plot_curves(scores, evaluation, folder / "precision_recall.png", "precision_recall")
    figures.plot_reliability(scores, evaluation, folder / "reliability.png")
    figures.plot_confusion(scores, evaluation, folder / "confusion_matrix.png")
    figures.plot_classes(evaluation, folder / "per_class.png")
    figures.plot_slices(evaluation, folder / "slices.png")
    figures.plot_worst_patients(evaluation, folder / "worst_patients.png")
    figures.plot_history(history, facts["chosen"]["epochs"], folder / "training_curve.png")
    _draw_errors(scores, pictures, folder / "errors.png")
    _draw_grad_cam(scores, pictures, network, folder / "grad_cam.png")
    card = render_card(evaluation, facts)
    (folder / "model_card.md").write_text(card, encoding="utf-8")
    page = render(folder, evaluation, held_out[1], card, facts, alone)
    (folder / "report.html").write_text(page, encoding="utf-8")


def never_learnt(held_out: LabelledPredictions, facts: Json) -> list[str]:
    """Classes that no model could have learnt when it predicted them out of fold: all they have is one case.

    They are there, so they count in means over classes, with a recall of 0 but for luck.
    """
    if facts["held_out"] != "out_of_fold":
        return []
    groups = held_out.rows[GROUP_COLUMNS[facts["split_group"]]].to_numpy(dtype=str)
    names = class_names(held_out.task)
    return [name for k, name in enumerate(names) if len(set(groups[held_out.truth == k])) == 1]


def render_card(test: Evaluation, facts: Json) -> str:
    """The model card as Markdown: in the report, and the description of the registered version."""
    headline = [name for name in _HEADLINE[test.task] if name in test.metrics]
    return _template("model_card.md").render(
        facts=facts, test=test, headline=headline, names=METRIC_NAMES, what=_WHAT[test.task]
    )


def render(
    folder: Path, test: Evaluation, held_out: Evaluation, card: str, facts: Json, alone: Sequence[str] = ()
) -> str:
    """The page: it needs nothing beside it, and no network. ``alone`` is of :func:`never_learnt`."""
    from markdown_it import MarkdownIt
    from markupsafe import Markup

    # Markup in the card's text, such as in a source's name, is shown and not obeyed.
    converter = MarkdownIt("commonmark", {"html": False}).enable("table")
    drawn = [
        {**section._asdict(), "data": base64.b64encode((folder / f"{section.name}.png").read_bytes()).decode()}
        for section in SECTIONS
        if (folder / f"{section.name}.png").exists()
    ]
    of_patients = [*(f"patient_{name}" for name in _HEADLINE[test.task]), "patient_recognition_rate"]
    return _template("report.html").render(
        facts=facts,
        test=test.to_json(),
        held_out=held_out.to_json(),
        never_learnt=alone,
        held_out_name={"out_of_fold": "out of fold", "validation": "validation"}[facts["held_out"]],
        headline=[name for name in _HEADLINE[test.task] if name in test.metrics],
        of_patients=[name for name in of_patients if name in test.metrics],
        names=METRIC_NAMES,
        sections=drawn,
        what=_WHAT[test.task],
        card=Markup(converter.render(card.split("\n", 1)[1])),  # noqa: S704  # escaped by the converter
        classes=class_names(test.task),
        recipe=json.dumps(facts["recipe"], indent=2),
    )


def _template(name: str) -> "Template":
    from jinja2 import Environment, FunctionLoader, StrictUndefined, select_autoescape

    def read(name: str) -> str:
        return files("ml.evaluation.templates").joinpath(name).read_text(encoding="utf-8")

    # Markdown is escaped where it becomes HTML.
    environment = Environment(
        loader=FunctionLoader(read),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def _draw_errors(scores: LabelledPredictions, pictures: Callable[[list[str]], Pixels], path: Path) -> None:
    wide = scores.probabilities
    if scores.task == "binary":
        wide = np.stack([1 - wide, wide], axis=1)
    wrong = np.flatnonzero(scores.predicted != scores.truth)
    # By how little they gave to the truth.
    rows = wrong[np.argsort(wide[wrong, scores.truth[wrong]], kind="stable")][:_ERRORS]
    names = class_names(scores.task)
    captions = []
    for row in rows:
        truth, of = names[scores.truth[row]], scores.rows.iloc[row]
        given = f"p({truth}) = {wide[row, scores.truth[row]]:.3f}"
        captions.append(
            f"{truth} called {names[scores.predicted[row]]}\n{given}, {of['patient']}, {of['magnification']}X"
        )
    shown = pictures(scores.rows["pixel_sha256"].iloc[rows].tolist())
    figures.plot_gallery(shown, captions, f"{len(rows)} of {len(wrong)} wrong of {len(scores.truth)} images", path)


def _draw_grad_cam(
    scores: LabelledPredictions,
    pictures: Callable[[list[str]], Pixels],
    network: "tuple[keras.Model, keras.Model]",
    path: Path,
) -> None:
    backbone, head = network
    kinds = choose_cases(scores)
    rows = [row for mine in kinds.values() for row in mine]
    if not rows:
        return
    shown = pictures(scores.rows["pixel_sha256"].iloc[rows].tolist())
    labels = scores.predicted[rows]
    maps, controls = grad_cam(backbone, head, shown, labels), grad_cam(randomized(backbone), head, shown, labels)
    names = class_names(scores.task)
    captions = []
    for kind, row, rank in zip(
        [kind for kind, mine in kinds.items() for _ in mine], rows, agreement(maps, controls), strict=True
    ):
        compared = "no map to compare" if np.isnan(rank) else f"correlation with control {rank:.2f}"
        truth, label = names[scores.truth[row]], names[scores.predicted[row]]
        captions.append(f"{kind}: {truth} called {label}\n{compared}")
    figures.plot_grad_cam(shown, maps, controls, captions, path)
