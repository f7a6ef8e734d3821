"""Renders the review pages, which show a reviewer in plain words what a decision about a model version depends on.

/breakhis/reviews/<bundle>/             a candidate beside the champion
/breakhis/reviews/<bundle>/<role>/<file>   a picture or report of either, as it was when the gates were judged

Everything is read from the evidence bundle in the store, for which an approval holds.
"""

import re
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from breakhis_airflow.airflow_database import AuditCheck, GivenAnswer, WaitingReview
from breakhis_airflow.bundle_shape import Bundle
from breakhis_airflow.glossary import METRIC_MEANINGS, PICTURES, SUBTYPE_METRIC_MEANINGS, TERMS
from ml.core.errors import StoreError
from ml.core.hashes import hash_file, object_id
from ml.core.messages import quote_value
from ml.core.store import Json, Store
from ml.core.stored_json import describe_damage
from ml.core.strict_json import check_shape
from ml.core.taxonomy import SIDES, SUBTYPE_NAMES, class_names
from ml.data.training_sets import compare_datasets
from ml.evaluation.metric_names import is_worse
from ml.promotion.alias_history import APPROVED, NOT_COUNTED, ROLLED_BACK, WITHDRAWN, find_refusal
from ml.promotion.audit_log import find_chain_faults, read_decisions, read_unverified_records
from ml.promotion.gates import find_outcome
from ml.promotion.reviews import BUNDLE_PATTERN, PROMOTE, REJECT, ROLLBACK
from ml.promotion.verdict import find_margin, give_verdict, list_regressions, name_figure, rank_clinically

if TYPE_CHECKING:
    from jinja2 import Environment

    from breakhis_airflow.answer_form import AnswerForm

_TEMPLATES = Path(__file__).parent / "templates"
SCRIPT = (_TEMPLATES / "frame.js").read_text(encoding="utf-8")
"""The only script of these pages. It leads out of the frame in which Airflow shows them."""

_ROLES = ("candidate", "champion")
_FILE_NAME = re.compile(r"[a-z_]{1,100}\.(png|html)")

_WIDE_PICTURES = {
    "binary": frozenset({"errors"}),
    "subtype": frozenset({"roc", "precision_recall", "confusion_matrix", "per_class", "errors"}),
}
"""Pictures that take the page's whole width, by task: the champion's is below the candidate's and not beside it."""


def render_review(
    bundle: str,
    waiting: list[WaitingReview],
    audit: AuditCheck,
    store: Store,
    make_form: Callable[[WaitingReview, Json], "AnswerForm"],
    answered: GivenAnswer | None = None,
) -> str:
    """Returns the HTML page of a candidate.

    Args:
        bundle: id of the evidence bundle.
        waiting: the reviews that wait.
        audit: outcome of the daily check of the audit log.
        store: holds the bundle, and the audit log.
        make_form: returns the reader's form for a review on this evidence.
        answered: the last answer to a review on this evidence.

    Raises:
        StoreError: there is no such bundle, or it was changed.
    """
    content = read_bundle(bundle, store)
    evidence, champion = content["evidence"], content["champion"]
    decisions = read_shown_decisions(store, evidence["model"])
    review = next((one for one in waiting if one.bundle == bundle and not is_settled(one.dag, bundle, store)), None)
    names = sorted(evidence["metrics"], key=rank_clinically)
    metrics = [_make_metric_row(name, evidence, champion) for name in names]
    pictures = [
        (name, title, text, [role for role in _ROLES if _find_recorded_hash(content, role, f"{name}.png")])
        for name, title, text in PICTURES
    ]
    return (
        make_environment()
        .get_template("review.html")
        .render(
            id=bundle,
            bundle=content,
            evidence=evidence,
            champion=champion,
            waiting=review,
            form=make_form(review, evidence) if review else None,
            uncounted=_list_uncounted_answers(review, evidence["model"], store),
            rollback=ROLLBACK,
            reject=REJECT,
            answered=answered,
            withdrawal=_find_withdrawal(review, evidence["version"], decisions),
            in_use=_find_current_approval(decisions),
            decided=_find_last_decision(bundle, decisions, answered),
            metrics=metrics,
            verdict=give_verdict(content),
            worse=list_regressions(evidence, champion, find_margin(content)),
            outcomes=[find_outcome(gate) for gate in content["gates"]],
            classes=class_names(evidence["task"]),
            class_names=SUBTYPE_NAMES,
            slices=_make_slice_tables(evidence, champion),
            pictures=[picture for picture in pictures if picture[3]],
            broad=_WIDE_PICTURES[evidence["task"]],
            data=_make_data_rows(evidence, champion),
            changes=_find_data_changes(evidence, champion, store),
            sides=SIDES,
            words=METRIC_MEANINGS | (SUBTYPE_METRIC_MEANINGS if evidence["task"] == "subtype" else {}),
            terms=TERMS,
            name_figure=name_figure,
            decisions=decisions,
            audit=audit,
            faults=find_chain_faults(store),
        )
    )


def render_confirmation(evidence: Json, review: WaitingReview, option: str, reason: str, token: str) -> str:
    """Returns the page that asks whether an answer is meant, and names what it is about.

    Args:
        evidence: of the version.
        review: the review that waits.
        option: the answer.
        reason: the reason that was given.
        token: of the form's second step.
    """
    shown = {"evidence": evidence, "back": review.dag == ROLLBACK, "option": option, "reason": reason, "token": token}
    return make_environment().get_template("confirm.html").render(shown | {"reject": REJECT})


def render_refusal(message: str) -> str:
    """Returns the page that says why a form was not carried out."""
    return make_environment().get_template("refused.html").render(message=message)


def _list_uncounted_answers(review: WaitingReview | None, model: str, store: Store) -> list[Json]:
    """Returns the answers to a review that did not count, after which it was asked again."""
    if review is None:
        return []
    records = read_unverified_records(store, model)
    found = [one for one in records if one["event"] == NOT_COUNTED and one.get("review") == review.id]
    return [{"by": "", "answer": "", "problem": ""} | one for one in found]


def is_settled(dag: str, bundle: str | None, store: Store) -> bool:
    """Returns whether no answer to a review can count any more, as its version was rejected or withdrawn since."""
    if dag != PROMOTE or not bundle:
        return False
    try:
        content = read_bundle(bundle, store)
    except StoreError:
        return False
    evidence = content["evidence"]
    records = read_unverified_records(store, evidence["model"])
    return find_refusal(records, evidence["version"], content["evidence_id"], PROMOTE) is not None


def read_bundle(bundle: str, store: Store) -> Json:
    """Returns an evidence bundle, checked against the hash in its name and against what the pages read of it.

    Raises:
        StoreError: there is no such one, it was changed, or it is no bundle; names its file.
    """
    if not re.fullmatch(BUNDLE_PATTERN, bundle):
        raise StoreError(f"{quote_value(bundle)} is no bundle")
    content = {key: value for key, value in store.meta(bundle).items() if key != "id"}
    fail = partial(describe_damage, store.uri(f"{store.object_key(bundle)}/object.json"))
    try:
        is_unchanged = object_id("bundle", content) == bundle
    except (ValueError, RecursionError):  # it holds what is never hashed, such as NaN
        is_unchanged = False
    if not is_unchanged:
        raise fail(f"{bundle} was changed after it was judged")
    check_shape(content, Bundle, fail)
    return content


def find_bundle_file(bundle: str, role: str, name: str, store: Store) -> Path:
    """Returns a picture or report of the candidate or the champion, checked against the hash in the evidence.

    Raises:
        StoreError: there is no such one, or it was changed.
    """
    content = read_bundle(bundle, store)
    if role not in _ROLES or not _FILE_NAME.fullmatch(name) or not _find_recorded_hash(content, role, name):
        raise StoreError(f"{bundle}/{role}/{name}: no such file")
    file = store.file(bundle, f"{role}/{name}")
    if not file.is_file() or hash_file(file) != _find_recorded_hash(content, role, name):
        raise StoreError(f"{bundle}/{role}/{name} is not what was judged")
    return file


def _find_recorded_hash(content: Json, role: str, name: str) -> str | None:
    """Returns the hash of a file in the evidence; None if the evidence does not have the file."""
    evidence = content["evidence" if role == "candidate" else "champion"] or {}
    recorded: str | None = evidence.get("artifacts", {}).get(f"evaluation/{name}")
    return recorded


def _find_withdrawal(review: WaitingReview | None, version: int, decisions: list[Json]) -> Json | None:
    """Returns the last withdrawal of the version that a rollback would go back to."""
    if review is None or review.dag != ROLLBACK:
        return None
    return next((one for one in decisions if (one["event"], one["version"]) == (WITHDRAWN, version)), None)


def _find_last_decision(bundle: str, decisions: list[Json], answered: GivenAnswer | None) -> Json | None:
    """Returns the last decision on a bundle; None if a review on it was answered since."""
    last = next((decision for decision in decisions if decision["bundle"] == bundle), None)
    # What a rollback goes back to was approved long ago. Until it is carried out, that is no news to who has answered.
    is_earlier = last and answered and last["at"][:16].replace("T", " ") < answered.at
    return None if is_earlier else last


def _make_metric_row(name: str, evidence: Json, champion: Json | None) -> Json:
    """Returns a row of the table of metrics."""
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
        "worse": before is not None and is_worse(name, before, evidence["metrics"][name]),
    }


def _make_slice_tables(evidence: Json, champion: Json | None) -> Json:
    """Returns, by column, the metrics shown, and rows of (value, [(role, scores)])."""
    tables: Json = {}
    for column, values in evidence.get("slices", {}).items():
        before = champion.get("slices", {}).get(column, {}) if champion else {}
        order = sorted({**values, **before}, key=lambda value: (len(value), value))
        rows = [
            (value, [(role, of[value]) for role, of in zip(_ROLES, (values, before), strict=True) if value in of])
            for value in order
        ]
        names = dict.fromkeys(name for _, scored in rows for _, scores in scored for name in scores["metrics"])
        tables[column] = {"metrics": list(names), "rows": rows}
    return tables


def _make_data_rows(evidence: Json, champion: Json | None) -> list[tuple[str, str, str, str]]:
    """Returns what the two versions were made of: (name, the term that explains it, candidate's, champion's)."""

    def format_value(of: Json | None, key: str) -> str:
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
    return [
        (shown, term, format_value(evidence, key), format_value(champion, key)) for key, (shown, term) in names.items()
    ]


def _find_data_changes(evidence: Json, champion: Json | None, store: Store) -> Json:
    """Returns what changed from the champion's dataset to the candidate's: ``{same, sources, missing}``.

    It is computed from the two datasets. The evidence names their ids, which are hashes.
    """
    changes: Json = {"same": bool(champion), "sources": {}, "missing": ""}
    if champion and evidence["dataset"] != champion["dataset"]:
        try:
            sources = compare_datasets(champion["dataset"], evidence["dataset"], store)
            changes = {**changes, "same": False, "sources": sources}
        except StoreError as error:  # an old dataset was removed
            changes = {**changes, "same": False, "missing": str(error)}
    return changes


def _find_current_approval(decisions: list[Json]) -> Json | None:
    """Returns the decision, of one model's, that made the current champion; None if its bundle is not known."""
    last = next((decision for decision in decisions if decision["event"] in (APPROVED, ROLLED_BACK)), None)
    return last if last and last["bundle"] else None


def read_shown_decisions(store: Store, model: str | None = None) -> list[Json]:
    """Returns decisions as a page shows them; ``verified`` is False if a record was changed since it was written.

    A rollback has the bundle on which its version was approved.
    """
    texts = {"at": "", "model": "", "version": "", "event": "", "by": "", "reason": ""}
    empty = texts | {"champion": None, "bundle": None, "verified": None}
    decisions = [empty | record for record in read_decisions(store, model)]
    bundles = {
        (decision["model"], decision["version"]): decision["bundle"]
        for decision in reversed(decisions)
        if decision["event"] == APPROVED
    }
    return [
        decision | {"bundle": decision["bundle"] or bundles.get((decision["model"], decision["version"]))}
        for decision in decisions
    ]


@cache
def make_environment() -> "Environment":
    """Returns the templates of the review pages, which escape what they show."""
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
