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
from typing import TYPE_CHECKING

from breakhis_airflow.airflow_database import AuditCheck, WaitingReview
from breakhis_airflow.glossary import METRIC_MEANINGS, PICTURES, SUBTYPE_METRIC_MEANINGS, TERMS
from ml.core.errors import StoreError
from ml.core.store import Json, Store, object_id
from ml.core.taxonomy import SIDES, SUBTYPE_NAMES, class_names
from ml.data.training_sets import compare_datasets
from ml.evaluation.metric_names import LOWER_IS_BETTER, METRIC_NAMES
from ml.promotion.alias_history import APPROVED, ROLLED_BACK
from ml.promotion.audit_log import find_chain_faults, read_decisions
from ml.promotion.reviews import BUNDLE_PATTERN, ROLLBACK, list_regressions

if TYPE_CHECKING:
    from jinja2 import Environment

_TEMPLATES = Path(__file__).parent / "templates"
SCRIPT = (_TEMPLATES / "frame.js").read_text(encoding="utf-8")
"""The only script of these pages: it leads out of the frame that Airflow shows them in."""

_MAX_DECISIONS = 50  # that the list shows
_ROLES = ("candidate", "champion")
_FILE_NAME = re.compile(r"[a-z_]+\.(png|html)")

_WIDE_PICTURES = {
    "binary": frozenset({"errors"}),
    "subtype": frozenset({"roc", "precision_recall", "confusion_matrix", "per_class", "errors"}),
}
"""Pictures that take the page's whole width: the champion's is below the candidate's and not beside it."""


def render_review_list(waiting: list[WaitingReview], audit: AuditCheck, store: Store) -> str:
    """The page of what waits and what was decided."""
    return (
        _make_environment()
        .get_template("reviews.html")
        .render(
            waiting=waiting,
            rollback=ROLLBACK,
            decisions=_read_shown_decisions(store)[:_MAX_DECISIONS],
            audit=audit,
            faults=find_chain_faults(store),
            terms=TERMS,
        )
    )


def render_review(bundle: str, waiting: list[WaitingReview], audit: AuditCheck, store: Store) -> str:
    """The page of one candidate.

    Raises:
        StoreError: there is no such bundle.
    """
    facts = read_bundle(bundle, store)
    evidence, champion = facts["evidence"], facts["champion"]
    decisions = _read_shown_decisions(store, evidence["model"])
    order = list(METRIC_NAMES)  # a stored object comes back in alphabetical order
    found = sorted(evidence["metrics"], key=lambda name: order.index(name) if name in order else len(order))
    metrics = [_make_metric_row(name, evidence, champion) for name in found]
    drawn = [
        (name, title, text, [whose for whose in _ROLES if _find_recorded_hash(facts, whose, f"{name}.png")])
        for name, title, text in PICTURES
    ]
    return (
        _make_environment()
        .get_template("review.html")
        .render(
            id=bundle,
            bundle=facts,
            evidence=evidence,
            champion=champion,
            waiting=next((one for one in waiting if one.bundle == bundle), None),
            rollback=ROLLBACK,
            in_use=_find_current_approval(decisions),
            decided=next((one for one in decisions if one["bundle"] == bundle), None),
            metrics=metrics,
            worse=list_regressions(evidence, champion),
            classes=class_names(evidence["task"]),
            class_names=SUBTYPE_NAMES,
            slices=_make_slice_tables(evidence, champion),
            pictures=[one for one in drawn if one[3]],
            broad=_WIDE_PICTURES[evidence["task"]],
            data=_make_data_rows(evidence, champion),
            changes=_find_data_changes(evidence, champion, store),
            sides=SIDES,
            words=METRIC_MEANINGS | (SUBTYPE_METRIC_MEANINGS if evidence["task"] == "subtype" else {}),
            terms=TERMS,
            names={name: shown.partition(":")[0] for name, shown in METRIC_NAMES.items()},
            decisions=decisions,
            audit=audit,
            faults=find_chain_faults(store),
        )
    )


def read_bundle(bundle: str, store: Store) -> Json:
    """An evidence bundle, checked against the hash in its name.

    Raises:
        StoreError: there is none, or it was changed.
    """
    if not re.fullmatch(BUNDLE_PATTERN, bundle):
        raise StoreError(f"{bundle!r} is no bundle")
    facts = {key: value for key, value in store.meta(bundle).items() if key != "id"}
    if object_id("bundle", facts) != bundle:
        raise StoreError(f"{bundle} was changed after it was judged")
    return facts


def find_bundle_file(bundle: str, whose: str, name: str, store: Store) -> Path:
    """A picture or report of the candidate or the champion, if it still is what the evidence says.

    Raises:
        StoreError: there is none, or it was changed.
    """
    facts = read_bundle(bundle, store)
    if whose not in _ROLES or not _FILE_NAME.fullmatch(name) or not _find_recorded_hash(facts, whose, name):
        raise StoreError(f"{bundle}/{whose}/{name}: no such file")
    file = store.file(bundle, f"{whose}/{name}")
    if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != _find_recorded_hash(facts, whose, name):
        raise StoreError(f"{bundle}/{whose}/{name} is not what was judged")
    return file


def _find_recorded_hash(facts: Json, whose: str, name: str) -> str | None:
    """The hash that the evidence has of a file."""
    evidence = facts["evidence" if whose == "candidate" else "champion"] or {}
    found: str | None = evidence.get("artifacts", {}).get(f"evaluation/{name}")
    return found


def _make_metric_row(name: str, evidence: Json, champion: Json | None) -> Json:
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
        "worse": change is not None and change != 0 and (change > 0) == (name in LOWER_IS_BETTER),
    }


def _make_slice_tables(evidence: Json, champion: Json | None) -> Json:
    """Column -> the metrics that are shown, and rows of (value, [(whose, what it scored)])."""
    found: Json = {}
    for column, values in evidence.get("slices", {}).items():
        before = champion.get("slices", {}).get(column, {}) if champion else {}
        order = sorted({**values, **before}, key=lambda value: (len(value), value))
        both = [
            (value, [(whose, of[value]) for whose, of in zip(_ROLES, (values, before), strict=True) if value in of])
            for value in order
        ]
        shown = dict.fromkeys(name for _, rows in both for _, one in rows for name in one["metrics"])
        found[column] = {"metrics": list(shown), "rows": both}
    return found


def _make_data_rows(evidence: Json, champion: Json | None) -> list[tuple[str, str, str, str]]:
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


def _find_data_changes(evidence: Json, champion: Json | None, store: Store) -> Json:
    """What changed from the champion's dataset to the candidate's: ``{same, sources, missing}``.

    Computed from the two datasets, whose ids are hashes that the evidence names.
    """
    told: Json = {"same": bool(champion), "sources": {}, "missing": ""}
    if champion and evidence["dataset"] != champion["dataset"]:
        try:
            told = {**told, "same": False, "sources": compare_datasets(champion["dataset"], evidence["dataset"], store)}
        except StoreError as error:  # an old one was cleared away
            told = {**told, "same": False, "missing": str(error)}
    return told


def _find_current_approval(decisions: list[Json]) -> Json | None:
    """The decision, of one model's, by which the champion is what it is."""
    last = next((one for one in decisions if one["event"] in (APPROVED, ROLLED_BACK)), None)
    return last if last and last["bundle"] else None


def _read_shown_decisions(store: Store, model: str | None = None) -> list[Json]:
    """Decisions as a page shows them; ``verified`` is False of a record that is not as it was written.

    A rollback's evidence is what the version was approved on.
    """
    shown = {"at": "", "model": "", "version": "", "event": "", "by": "", "reason": ""}
    found = [shown | {"champion": None, "bundle": None, "verified": None} | one for one in read_decisions(store, model)]
    approved = {(one["model"], one["version"]): one["bundle"] for one in reversed(found) if one["event"] == APPROVED}
    return [one | {"bundle": one["bundle"] or approved.get((one["model"], one["version"]))} for one in found]


@cache
def _make_environment() -> "Environment":
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
