"""Questions: whether reviewers may be asked about a version, and the record that they were.

Whoever may start runs may delete them and their tasks, too, and with them what was answered there. So each question is
recorded in the audit log when it is asked, with the id that Airflow gave the review: nobody can choose such an id, so
another run of the same name and time has others. A promotion does not take "Airflow has no such review" for "nobody has
rejected it".
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ml.core.errors import Refused
from ml.core.messages import cut_text
from ml.core.settings import Settings
from ml.core.store import Json, Store
from ml.promotion.alias_history import ASKED, NOT_COUNTED, WITHDRAWN, find_refusal, is_registered
from ml.promotion.answers import ReviewRun, explain_unknown_starters
from ml.promotion.audit_log import AuditLog, format_anchor
from ml.promotion.evidence import read_verified_object
from ml.promotion.reviews import PROMOTE
from ml.registry.registered_model import RegisteredModel

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion


def check_undecided(model: str, number: int, evidence: str | None, records: Sequence[Json]) -> None:
    """Check that nobody has settled for good that a version on this evidence is not promoted.

    Args:
        model: the registered model.
        number: its version.
        evidence: id of its evidence.
        records: audit records of the model.

    Raises:
        Refused: a reviewer has rejected it, or it was withdrawn.
    """
    refusal = find_refusal(records, number, evidence, PROMOTE)
    if refusal and refusal["event"] == WITHDRAWN:
        raise Refused(f"{model} version {number} was withdrawn by {refusal['by']}: {refusal['reason']}")
    if refusal:
        raise Refused(
            f"{model} version {number} was rejected by {refusal['by']} on {refusal['at'][:10]}, in the run "
            f"{refusal['run']}: {refusal['reason']}. That is final for this version and its evidence, in every run; "
            "train another version, with other data, another recipe or another seed"
        )


def check_registered(version: "ModelVersion", evidence: str, records: Sequence[Json]) -> None:
    """Check that ``breakhis register`` made this evidence of a version: tags in MLflow and objects in the store do not.

    Args:
        version: the version.
        evidence: id of its evidence.
        records: audit records of the model.

    Raises:
        Refused: the audit log does not say so.
    """
    if not is_registered(records, int(version.version), evidence):
        raise Refused(
            f"{version.name} version {version.version}: the audit log has no record that breakhis registered it with "
            f"{evidence}; somebody else made it, or an earlier release or a process without the audit log's key "
            f"registered it: register its run again, by breakhis register {version.run_id}, which checks it anew, and "
            "start a new run with the evidence that this names"
        )


def check_may_be_asked(model: str, number: str, evidence: str, store: Store, settings: Settings) -> None:
    """Check that an approval of a version could count, before reviewers are asked for one.

    Raises:
        Refused: nothing says that it was registered, it was rejected or withdrawn, a review in which it was asked was
            deleted, or nobody is entitled to approve it.
    """
    records = AuditLog(store, settings).read_model_records(model)
    check_registered(RegisteredModel(model, settings).find_version(number), evidence, records)
    check_undecided(model, int(number), evidence, records)
    review_run = ReviewRun(settings, PROMOTE, settings.dag_run)
    if rejected := review_run.find_unrecorded_rejection(model, number):
        raise Refused(
            f"{model} version {number} was rejected by {rejected.answers[0].reviewer} in the run {rejected.run}, which "
            f"has not carried it out yet: {rejected.answers[0].reason}. Unpause the DAG {PROMOTE}, or clear that run's "
            f"task {PROMOTE}. The rejection is final for this version and its evidence"
        )
    review_run.check_questions_are_there(int(number), records)
    content = read_verified_object(evidence, store)
    if unknown := content.get("starters", {}).get("unknown"):
        raise Refused(f"{model} version {number}: {explain_unknown_starters(unknown)}")


def record_question(subject: Json, run: str, review: str, store: Store, settings: Settings) -> None:
    """Record that a review of the DAG ``promote`` asks reviewers about a version, before it does.

    Args:
        subject: ``{model, version, evidence}``, as the run's conf says.
        run: id of the run.
        review: id of the review's task instance in Airflow, which is another one in each try.
        store: holds the audit log.
        settings: have its key, and say where MLflow is.

    Raises:
        ConfigError: the audit log's key is not set.
        Refused: the audit log was changed.
    """
    log, model = AuditLog(store, settings), str(subject["model"])
    question: Json = {"version": int(subject["version"]), "evidence": str(subject["evidence"])}
    question |= {"run": f"{PROMOTE}/{run}", "review": review}
    for record in log.read_model_records(model):
        if record["event"] == ASKED and question.items() <= record.items():
            return
    # Anchored, so that the record cannot be cut off without notice.
    RegisteredModel(model, settings).set_audit_anchor(format_anchor(log.append(ASKED, model, **question)))


def record_uncounted_answer(
    subject: Json, run: str, review: str, answer: Json, problem: str, store: Store, settings: Settings
) -> None:
    """Record an answer that does not count, before the review is asked again: Airflow then forgets it.

    Args:
        subject: has the ``model`` and ``version`` that the run's conf names.
        run: the run, as ``dag/run``.
        review: id of the review's task instance in Airflow.
        answer: as Airflow gives it to the task.
        problem: why it does not count, in words.
        store: holds the audit log.
        settings: have its key, and say where MLflow is.

    Raises:
        ConfigError: the audit log's key is not set.
        Refused: the audit log was changed.
    """
    model, user = str(subject["model"]), answer.get("responded_by_user") or {}
    record = AuditLog(store, settings).append(
        NOT_COUNTED,
        model,
        version=int(subject["version"]),
        run=run,
        review=review,
        by=cut_text(user.get("name", "")),
        answer=cut_text(", ".join(answer.get("chosen_options") or [])),
        reason=cut_text((answer.get("params_input") or {}).get("reason") or ""),
        problem=problem,
    )
    RegisteredModel(model, settings).set_audit_anchor(format_anchor(record))
