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
from urllib.parse import quote

from breakhis_airflow.links import form_of, on_this_site, root
from ml.core.errors import StoreError
from ml.core.store import Json, Store, object_id
from ml.core.taxonomy import SIDES, SUBTYPE_NAMES, classes
from ml.data.training_sets import dataset_changes
from ml.promotion.alias_history import APPROVED, ROLLED_BACK
from ml.promotion.audit_log import chain_faults, decisions_of
from ml.promotion.gates import METRIC_NAMES
from ml.promotion.policies import BEST_AT_ZERO
from ml.promotion.reviews import BUNDLE, PROMOTE, ROLLBACK, bundle_of, got_worse

if TYPE_CHECKING:
    from jinja2 import Environment

_TEMPLATES = Path(__file__).parent / "templates"
SCRIPT = (_TEMPLATES / "frame.js").read_text(encoding="utf-8")
"""The only script of these pages: it leads out of the frame that Airflow shows them in."""

AUDIT = "audit"
"""The DAG that checks the audit log."""

_AUDITS = 100  # runs in which the last that passed is looked for
_DECISIONS = 50  # that the list shows
_WHOSE = ("candidate", "champion")
_FILES = re.compile(r"[a-z_]+\.(png|html)")

WORDS = {
    "roc_auc": "How well the model ranks malignant images above benign ones: 1 is perfect, 0.5 is guessing.",
    "roc_auc_ovr": "How well each subtype is ranked above all others, on average: 1 is perfect, 0.5 is guessing.",
    "pr_auc": "How few false alarms there are for the malignant images that are found: 1 is perfect.",
    "pr_auc_ovr": "How few false alarms there are for each subtype against all others, on average: 1 is perfect.",
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

_OF_SUBTYPES = {
    "recall": "Of the images of a subtype, the share that the model recognises; the mean over subtypes.",
    "precision": "Of the images that the model gives a subtype, the share that have it; the mean over subtypes.",
}
"""The same of the model of subtypes, where it means something else."""

TERMS = {
    "candidate": "The new version of the model, which is used only if it is approved.",
    "champion": "The version of the model that is in use now.",
    "case": "What one case number stands for, mostly one patient. All images of a case are on the same side, so that "
    "no model is tested on a patient it has learnt from.",
    "gate": "Something that a new version has to reach before anybody is asked: a limit set beforehand.",
    "policy": "The file that says what the gates are. It was fixed before this model was trained.",
    "limit": "The value that has to be reached, or, of errors, not to be exceeded.",
    "inside by": "How far the value is on the right side of the limit; negative is beyond it.",
    "interval": "The range that the value could have had with other patients of the same kind: 95 of 100 such draws "
    "fall into it. With few patients it is wide.",
    "out of fold": "The model is trained several times, each time without some of the cases, and asked about those. "
    "So every case counts, and none was learnt from.",
    "test side": "Cases that were locked away before the first training. No model has learnt from them.",
    "validation side": "Cases on which choices were made, such as when to stop training.",
    "train side": "Cases that the model has learnt from.",
    "margin": "How much worse than the champion counts as no worse. It is set in the policy.",
    "difference": "Candidate less champion on the very same images: above 0 the candidate is better.",
    "at least": "The difference as low as it could be, since other patients would have given another one. The gate "
    "is passed if that is above the margin, with a minus sign.",
    "size": "How often a model that is worse by the whole margin would get through all the same. It should be at "
    "most 5%.",
    "power": "How often a model that is just as good as the champion would get through. Where it is low there are "
    "too few cases to tell, and passing or failing says little.",
    "recall": "Of the images of this class, the share that the model recognises.",
    "precision": "Of the images that the model puts into this class, the share that belongs there.",
    "cases recognised": "A case counts as recognised if the mean of what the model says of its images is right.",
    "Grad-CAM": "A map of the parts of an image that speak for the model's answer. It shows where the model looks, "
    "not whether it is right.",
    "split ledger": "The list of which case is on which side. Cases are only ever added: none changes its side, so "
    "that versions can be compared.",
    "recipe": "The settings of the training: how the network is built, and how long and how it learns.",
    "seed": "The number from which all chance in the training comes. The same seed makes the same model again.",
    "backbone weights": "What the network has learnt from everyday pictures before it saw any tissue.",
    "dataset": "The exact list of images; another image or label makes another dataset.",
    "relabelled": "In both, but now under another tumour type or another case.",
    "MLflow": "The system in which trainings and models are kept.",
    "evidence": "Everything that was measured of a version, under a code that changes if anything in it does.",
    "audit log": "The record of who decided what, when and why. Nobody can change it without being noticed.",
    "magnification": "Of the microscope's objective and ocular: 40, 100, 200 or 400 times.",
    "source": "Where images came from, such as a data set or a clinic.",
    "subtype": "One of eight kinds of tumour; benign and malignant are four each.",
}
"""What the words of this field mean, for people who have never met them."""

PICTURES = (
    (
        "roc",
        "Telling one class from the others (ROC)",
        "Higher and further left is better; the band is what other patients could have given.",
    ),
    ("precision_recall", "False alarms (precision and recall)", "Higher and further right is better."),
    ("reliability", "Can the probabilities be believed?", "On the dotted line, 80% means right in 8 of 10 cases."),
    ("confusion_matrix", "What is taken for what", "Rows are the truth, columns what the model says."),
    ("per_class", "Each class, drawn", "How much of it is found, and how balanced that is."),
    ("slices", "Each magnification, source and subtype, drawn", "A model should not lean on one of them."),
    ("worst_patients", "Patients with the most errors", "Where to look first."),
    ("errors", "The surest errors", "Images of the wrong label that the model was surest of."),
    (
        "grad_cam",
        "Where the model looks (Grad-CAM)",
        "Bright is what speaks for the answer. Beside it a control that has learnt nothing: where both look alike, the "
        "map says nothing.",
    ),
)
"""Pictures in the page's order: file, title, how to read it."""

_BROAD = {
    "binary": frozenset({"errors"}),
    "subtype": frozenset({"roc", "precision_recall", "confusion_matrix", "per_class", "errors"}),
}
"""Pictures that take the page's whole width: the champion's is below the candidate's and not beside it."""


class Waiting(NamedTuple):
    """A review that nobody has answered yet."""

    subject: str
    bundle: str | None
    since: str
    form: str
    """Airflow's page with the answer form, without its host."""
    dag: str = PROMOTE
    """In which it is asked: a promotion or a rollback."""


class AuditCheck(NamedTuple):
    """What became of the daily check of the audit log; times are UTC, empty if there was no such run."""

    passed: str = ""
    failed: str = ""
    """When it last failed, if it has not passed since."""
    run: str = ""
    """Airflow's page of that failure, without its host."""


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
    form = on_this_site(form_of(ti.dag_id, ti.run_id, ti.task_id))
    return Waiting(detail.subject, bundle_of(detail.body), _minute(detail.created_at), form, ti.dag_id)


def audit_check() -> AuditCheck:
    """How the DAG ``audit`` last ended, as Airflow's database has it."""
    from airflow.models.dagrun import DagRun
    from airflow.utils.session import create_session
    from sqlalchemy import select

    with create_session() as session:
        ended = select(DagRun).where(DagRun.dag_id == AUDIT, DagRun.state.in_(("success", "failed")))
        runs = list(session.scalars(ended.order_by(DagRun.end_date.desc()).limit(_AUDITS)))
        passed = next((_minute(run.end_date) for run in runs if run.state == "success"), "")
        if not runs or runs[0].state == "success":
            return AuditCheck(passed)
        return AuditCheck(
            passed, _minute(runs[0].end_date), on_this_site(root(f"dags/{AUDIT}/runs/{quote(runs[0].run_id)}"))
        )


def _minute(time: Any) -> str:
    return str(time.isoformat(sep=" ", timespec="minutes"))[:16]


def render_list(waiting: list[Waiting], audit: AuditCheck, store: Store) -> str:
    """The page of what waits and what was decided."""
    return (
        _environment()
        .get_template("reviews.html")
        .render(
            waiting=waiting,
            rollback=ROLLBACK,
            decisions=_decisions(store)[:_DECISIONS],
            audit=audit,
            faults=chain_faults(store),
            terms=TERMS,
        )
    )


def render_review(bundle: str, waiting: list[Waiting], audit: AuditCheck, store: Store) -> str:
    """The page of one candidate.

    Raises:
        StoreError: there is no such bundle.
    """
    facts = read_bundle(bundle, store)
    evidence, champion = facts["evidence"], facts["champion"]
    decisions = _decisions(store, evidence["model"])
    order = list(METRIC_NAMES)  # a stored object comes back in alphabetical order
    found = sorted(evidence["metrics"], key=lambda name: order.index(name) if name in order else len(order))
    metrics = [_metric(name, evidence, champion) for name in found]
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
            waiting=next((one for one in waiting if one.bundle == bundle), None),
            rollback=ROLLBACK,
            in_use=_in_use(decisions),
            decided=next((one for one in decisions if one["bundle"] == bundle), None),
            metrics=metrics,
            worse=got_worse(evidence, champion),
            classes=classes(evidence["task"]),
            class_names=SUBTYPE_NAMES,
            slices=_slices(evidence, champion),
            pictures=[one for one in drawn if one[3]],
            broad=_BROAD[evidence["task"]],
            data=_data(evidence, champion),
            changes=_changes(evidence, champion, store),
            sides=SIDES,
            words=WORDS | _OF_SUBTYPES if evidence["task"] == "subtype" else WORDS,
            terms=TERMS,
            names={name: shown.partition(":")[0] for name, shown in METRIC_NAMES.items()},
            decisions=decisions,
            audit=audit,
            faults=chain_faults(store),
        )
    )


def read_bundle(bundle: str, store: Store) -> Json:
    """An evidence bundle, checked against the hash in its name.

    Raises:
        StoreError: there is none, or it was changed.
    """
    if not re.fullmatch(BUNDLE, bundle):
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
    before = champion["metrics"].get(name) if champion else None
    change = None if before is None or name == "threshold" else evidence["metrics"][name] - before
    return {
        "name": name,
        "value": evidence["metrics"][name],
        "interval": evidence.get("intervals", {}).get(name),
        "note": evidence.get("interval_notes", {}).get(name, ""),
        "before": before,
        "interval_before": champion.get("intervals", {}).get(name) if champion else None,
        "change": change,
        "worse": change is not None and change != 0 and (change > 0) == (name in BEST_AT_ZERO),
    }


def _slices(evidence: Json, champion: Json | None) -> Json:
    """Column -> the metrics that are shown, and rows of (value, [(whose, what it scored)])."""
    found: Json = {}
    for column, values in evidence.get("slices", {}).items():
        before = champion.get("slices", {}).get(column, {}) if champion else {}
        order = sorted({**values, **before}, key=lambda value: (len(value), value))
        both = [
            (value, [(whose, of[value]) for whose, of in zip(_WHOSE, (values, before), strict=True) if value in of])
            for value in order
        ]
        shown = dict.fromkeys(name for _, rows in both for _, one in rows for name in one["metrics"])
        found[column] = {"metrics": list(shown), "rows": both}
    return found


def _data(evidence: Json, champion: Json | None) -> list[tuple[str, str, str, str]]:
    """What the two were made of: (what, the term that explains it, candidate, champion)."""

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
        **{side: (f"{side} side", f"{side} side") for side in SIDES},
        "sources": ("sources", "source"),
        "dataset": ("dataset", "dataset"),
        "ledger": ("split ledger", "split ledger"),
        "preset": ("recipe", "recipe"),
        "seed": ("seed", "seed"),
        "weights": ("backbone weights", "backbone weights"),
        "run_id": ("training run in MLflow", "MLflow"),
    }
    return [(shown, term, told(evidence, key), told(champion, key)) for key, (shown, term) in names.items()]


def _changes(evidence: Json, champion: Json | None, store: Store) -> Json:
    """What changed from the champion's dataset to the candidate's: ``{same, sources, missing}``.

    Computed from the two datasets, whose ids are hashes that the evidence names.
    """
    told: Json = {"same": bool(champion), "sources": {}, "missing": ""}
    if champion and evidence["dataset"] != champion["dataset"]:
        try:
            told = {**told, "same": False, "sources": dataset_changes(champion["dataset"], evidence["dataset"], store)}
        except StoreError as error:  # an old one was cleared away
            told = {**told, "same": False, "missing": str(error)}
    return told


def _in_use(decisions: list[Json]) -> Json | None:
    """The decision, of one model's, by which the champion is what it is."""
    last = next((one for one in decisions if one["event"] in (APPROVED, ROLLED_BACK)), None)
    return last if last and last["bundle"] else None


def _decisions(store: Store, model: str | None = None) -> list[Json]:
    """Decisions as a page shows them; ``verified`` is False of a record that is not as it was written.

    A rollback's evidence is what the version was approved on.
    """
    shown = {"at": "", "model": "", "version": "", "event": "", "by": "", "reason": ""}
    found = [shown | {"champion": None, "bundle": None, "verified": None} | one for one in decisions_of(store, model)]
    approved = {(one["model"], one["version"]): one["bundle"] for one in reversed(found) if one["event"] == APPROVED}
    return [one | {"bundle": one["bundle"] or approved.get((one["model"], one["version"]))} for one in found]


@cache
def _environment() -> "Environment":
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["script"] = Markup(SCRIPT)  # noqa: S704 (a file of ours)
    return environment
