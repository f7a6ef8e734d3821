"""The review page: what a reviewer needs to decide about a model version, in plain words.

/breakhis/reviews/                      the reviews that wait, and what was decided lately
/breakhis/reviews/<bundle>/             one candidate beside the champion
/breakhis/reviews/<bundle>/<whose>/<file>   a picture or report of either, as it was when the gates were judged

Everything is read from the evidence bundle in the store: what is shown is what an approval holds for.
"""

import hashlib
import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ml.audit import decisions_of
from ml.errors import StoreError
from ml.gates import METRIC_NAMES
from ml.policies import BEST_AT_ZERO
from ml.reviews import PROMOTE, ROLLBACK
from ml.store import Json, Store, object_id
from ml.taxonomy import SIDES, classes

if TYPE_CHECKING:
    from jinja2 import Environment

BUNDLE = re.compile(r"bundle-[0-9a-f]{12}")

_WHOSE = ("candidate", "champion")
_FILES = re.compile(r"[a-z_]+\.(png|html)")

WORDS = {
    "roc_auc": "How well the model ranks malignant images above benign ones: 1 is perfect, 0.5 is guessing.",
    "roc_auc_ovr": "How well each subtype is ranked above all others, on average: 1 is perfect, 0.5 is guessing.",
    "pr_auc": "How few false alarms there are for the malignant images that are found: 1 is perfect.",
    "pr_auc_ovr": "The same for each subtype against all others, on average: 1 is perfect.",
    "recall": "Of the images that are malignant, the share that the model calls malignant.",
    "specificity": "Of the images that are benign, the share that the model calls benign.",
    "precision": "Of the images that the model calls malignant, the share that are.",
    "f1": "Balance of recall and precision of malignant: 1 is perfect.",
    "macro_f1": "Balance of recall and precision, each class counting the same however rare: 1 is perfect.",
    "micro_f1": "Share of images with the right label.",
    "weighted_f1": "Balance of recall and precision, classes counting by their number of images.",
    "accuracy": "Share of images with the right label.",
    "balanced_accuracy": "Share of images with the right label, each class counting the same.",
    "mcc": "Agreement of labels and truth, corrected for chance: 1 is perfect, 0 is chance.",
    "brier": "Mean squared distance of the probabilities from the truth: 0 is perfect.",
    "ece": "How far probabilities are from how often they come true: 0 is perfect.",
    "threshold": "The probability from which an image is called malignant. It was locked before the test.",
    "patient_recognition_rate": "For each patient the share of images with the right label; the mean of that.",
}
"""What a metric says, for people who have never met it."""

PICTURES = (
    (
        "roc",
        "Finding malignant images (ROC)",
        "Higher and further left is better; the band is what other patients could have given.",
    ),
    ("precision_recall", "False alarms (precision and recall)", "Higher and further right is better."),
    ("reliability", "Can the probabilities be believed?", "On the dotted line, 80% means right in 8 of 10 cases."),
    ("confusion_matrix", "What is taken for what", "Rows are the truth, columns what the model says."),
    ("per_class", "Each class", "How much of it is found, and how balanced that is."),
    ("slices", "Each magnification, source and subtype", "A model should not lean on one of them."),
    ("worst_patients", "Patients with the most errors", "Where to look first."),
    ("errors", "The surest errors", "Images of the wrong label that the model was surest of."),
    (
        "grad_cam",
        "Where the model looks",
        "Beside it a control that has learnt nothing: where both agree, the map says nothing.",
    ),
)


class Waiting(NamedTuple):
    """A review that nobody has answered yet."""

    subject: str
    bundle: str | None
    since: str
    form: str
    """Airflow's page with the answer form, relative to its root."""


def waiting_reviews() -> list[Waiting]:
    """The reviews of promotions and rollbacks that wait, the oldest first, as Airflow's database has them."""
    from airflow.models.hitl import HITLDetail
    from airflow.models.taskinstance import TaskInstance
    from airflow.utils.session import create_session
    from sqlalchemy import select

    with create_session() as session:
        asked = (
            select(HITLDetail)
            .join(TaskInstance, TaskInstance.id == HITLDetail.ti_id)
            .where(
                TaskInstance.dag_id.in_((PROMOTE, ROLLBACK)),
                TaskInstance.state.in_(("awaiting_input", "deferred")),
                HITLDetail.responded_at.is_(None),
            )
            .order_by(HITLDetail.created_at)
        )
        return [_waiting(detail) for detail in session.scalars(asked)]


def _waiting(detail: Any) -> Waiting:
    ti = detail.task_instance
    found = BUNDLE.search(detail.body or "")
    form = f"/dags/{ti.dag_id}/runs/{ti.run_id}/tasks/{ti.task_id}/required_actions"
    return Waiting(
        detail.subject, found.group() if found else None, detail.created_at.isoformat(sep=" ", timespec="minutes"), form
    )


def render_list(waiting: list[Waiting], store: Store) -> str:
    """The page of what waits and what was decided."""
    return _environment().get_template("reviews.html").render(waiting=waiting, decisions=decisions_of(store)[:50])


def render_review(bundle: str, waiting: list[Waiting], store: Store) -> str:
    """The page of one candidate.

    Raises:
        StoreError: there is no such bundle.
    """
    facts = read_bundle(bundle, store)
    evidence, champion = facts["evidence"], facts["champion"]
    mine = next((one for one in waiting if one.bundle == bundle), None)
    drawn = [
        (name, title, text, [whose for whose in _WHOSE if _known(facts, whose, f"{name}.png")])
        for name, title, text in PICTURES
    ]
    return (
        _environment()
        .get_template("review.html")
        .render(
            id=bundle,
            bundle=facts,
            evidence=evidence,
            champion=champion,
            waiting=mine,
            metrics=[_metric(name, evidence, champion) for name in evidence["metrics"]],
            classes=classes(evidence["task"]),
            slices=evidence.get("slices", {}),
            worse=[one for one in (_metric(name, evidence, champion) for name in evidence["metrics"]) if one["worse"]],
            pictures=[one for one in drawn if one[3]],
            data=_data(evidence, champion),
            sides=SIDES,
            words=WORDS,
            decisions=decisions_of(store, evidence["model"]),
        )
    )


def read_bundle(bundle: str, store: Store) -> Json:
    """An evidence bundle, checked against the hash in its name.

    Raises:
        StoreError: there is none, or it was changed.
    """
    if not BUNDLE.fullmatch(bundle):
        raise StoreError(f"{bundle!r} is no bundle")
    facts = {key: value for key, value in store.meta(bundle).items() if key != "id"}
    if object_id("bundle", facts) != bundle:
        raise StoreError(f"{bundle} was changed after it was judged")
    return facts


def bundle_file(bundle: str, whose: str, name: str, store: Store) -> Path:
    """A picture or report of the candidate or the champion, if it still is what the evidence says.

    Raises:
        StoreError: there is none, or it was changed.
    """
    facts = read_bundle(bundle, store)
    if whose not in _WHOSE or not _FILES.fullmatch(name) or not _known(facts, whose, name):
        raise StoreError(f"{bundle}/{whose}/{name}: no such file")
    file = store.file(bundle, f"{whose}/{name}")
    if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != _known(facts, whose, name):
        raise StoreError(f"{bundle}/{whose}/{name} is not what was judged")
    return file


def _known(facts: Json, whose: str, name: str) -> str | None:
    """The hash that the evidence has of a file."""
    evidence = facts["evidence" if whose == "candidate" else "champion"] or {}
    found: str | None = evidence.get("artifacts", {}).get(f"evaluation/{name}")
    return found


def _metric(name: str, evidence: Json, champion: Json | None) -> Json:
    """A row of the table of metrics."""
    patient = name.startswith("patient_")
    before = champion["metrics"].get(name) if champion else None
    change = None if before is None or name == "threshold" else evidence["metrics"][name] - before
    return {
        "name": METRIC_NAMES.get(name, name) + (" of patients" if patient else ""),
        "words": WORDS.get(name) or WORDS.get(name.removeprefix("patient_"), ""),
        "value": evidence["metrics"][name],
        "interval": evidence.get("intervals", {}).get(name),
        "note": evidence.get("interval_notes", {}).get(name, ""),
        "before": before,
        "interval_before": champion.get("intervals", {}).get(name) if champion else None,
        "change": change,
        "worse": change is not None and change != 0 and (change > 0) == (name in BEST_AT_ZERO),
    }


def _data(evidence: Json, champion: Json | None) -> list[tuple[str, str, str]]:
    """What the two were made of: (what, candidate, champion), where they differ or always tell."""

    def told(of: Json | None, key: str) -> str:
        if not of:
            return ""
        if key == "sources":
            return ", ".join(f"{name} ({version})" for name, version in of["sources"].items())
        if key == "weights":
            return f"{of['weights']['kind']} ({of['weights']['id']})"
        if key in SIDES:
            return f"{of['sides'][key]['images']} images of {of['sides'][key]['cases']} cases"
        return str(of.get(key, ""))

    names = {
        "dataset": "dataset",
        "sources": "sources",
        **{side: f"{side} side" for side in SIDES},
        "ledger": "split ledger",
        "preset": "recipe (preset)",
        "seed": "seed",
        "weights": "backbone weights",
        "run_id": "MLflow run",
    }
    return [(shown, told(evidence, key), told(champion, key)) for key, shown in names.items()]


@cache
def _environment() -> "Environment":
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
