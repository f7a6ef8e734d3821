"""Questions: whether reviewers may be asked about a version, and the record that they were.

Whoever may start runs may delete them, too, and with a run what was answered in it. So each question is recorded in the
audit log: a promotion does not take "Airflow has no such run" for "nobody has rejected it".
"""

from collections.abc import Sequence

from ml.core.errors import Refused
from ml.core.settings import Settings
from ml.core.store import Json, Store
from ml.promotion.alias_history import ASKED, WITHDRAWN, find_refusal
from ml.promotion.answers import ReviewRun, explain_unknown_starters
from ml.promotion.audit_log import AuditLog, format_anchor
from ml.promotion.evidence import read_verified_object
from ml.promotion.reviews import PROMOTE
from ml.registry.registered_model import RegisteredModel


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


def check_may_be_asked(model: str, number: str, evidence: str, store: Store, settings: Settings) -> None:
    """Check that an approval of a version could count, before reviewers are asked for one.

    Raises:
        Refused: it was rejected or withdrawn, a run in which it was asked was deleted, or nobody is entitled to approve
            it.
    """
    records = AuditLog(store, settings).read_model_records(model)
    check_undecided(model, int(number), evidence, records)
    rejected = ReviewRun(settings, PROMOTE, settings.dag_run).find_unrecorded_rejection(model, number, records)
    if rejected:
        raise Refused(
            f"{model} version {number} was rejected by {rejected.answers[0].reviewer} in the run {rejected.run}, which "
            f"has not carried it out yet: {rejected.answers[0].reason}. Unpause the DAG {PROMOTE}, or clear that run's "
            f"task {PROMOTE}. The rejection is final for this version and its evidence"
        )
    content = read_verified_object(evidence, store)
    if unknown := content.get("starters", {}).get("unknown"):
        raise Refused(f"{model} version {number}: {explain_unknown_starters(unknown)}")


def record_question(model: str, number: str, evidence: str, store: Store, settings: Settings) -> None:
    """Record that the present run of the DAG ``promote`` asks reviewers about a version, unless it is recorded.

    Raises:
        ConfigError: Airflow's address, the service account or the audit log's key is not set.
        Refused: the audit log was changed.
    """
    log, run = AuditLog(store, settings), ReviewRun(settings, PROMOTE, settings.dag_run)
    question: Json = {"version": int(number), "evidence": evidence, "run": run.name, "begun": run.begun}
    for record in log.read_model_records(model):
        if record["event"] == ASKED and question.items() <= record.items():
            return
    # Anchored, so that the record cannot be cut off without notice.
    RegisteredModel(model, settings).set_audit_anchor(format_anchor(log.append(ASKED, model, **question)))
