"""The champion of a model: the version that the audit log names, and how the registry's aliases are moved to it."""

from collections.abc import Sequence
from typing import NamedTuple

from ml.core.errors import Refused, RunGone, TryAgain
from ml.core.store import Json, Store
from ml.promotion.alias_history import CARRIED_OUT, derive_aliases, find_champion_evidence_id, find_pending_decisions
from ml.promotion.audit_log import AuditLog, find_last_sequence, format_anchor, read_unverified_records
from ml.promotion.evidence import read_verified_evidence, read_verified_object
from ml.registry.registered_model import CHAMPION, RegisteredModel


class Champion(NamedTuple):
    """The champion of a model."""

    evidence: Json
    """What it was promoted on. Where its run is gone, this names no artifacts."""
    gone: str
    """Says that its run is gone from MLflow, and what follows from that; empty where it is there and was verified."""


def read_champion(model: RegisteredModel, store: Store, records: Sequence[Json] | None = None) -> Champion | None:
    """Returns a model's champion after verifying it, or None where there is no champion.

    The champion is the version that the audit log names: the alias may be late while a decision is carried out.

    Args:
        model: the registered model.
        store: holds evidence and log.
        records: verified audit records of the model; default: those in the store, unverified, since that takes the key.

    Raises:
        Refused: the alias was moved without a decision, or the champion was changed after it became champion.
    """
    known = read_unverified_records(store, model.name) if records is None else records
    while True:
        expected, actual = derive_aliases(known).champion, model.alias(CHAMPION)
        if actual == expected or find_pending_decisions(known):
            break
        later = read_unverified_records(store, model.name) if records is None else known
        if later == known:
            raise Refused(_describe_misplaced_alias(model.name, CHAMPION, actual, expected))
        known = later  # a decision was carried out between reading the log and reading the alias
    if expected is None:
        return None
    try:
        return Champion(read_verified_evidence(model, expected, known, store), "")
    except RunGone as error:
        # The audit log names the evidence by its hash, so what was recorded can still be shown.
        evidence = read_verified_object(str(find_champion_evidence_id(expected, known)), store)
        return Champion(evidence | {"artifacts": {}}, str(error))


def reconcile_aliases(model: RegisteredModel, log: AuditLog) -> None:
    """Move the aliases to where the audit log says they belong, if a decision is pending.

    Raises:
        Refused: the log has faults. For instance, the registry knows of a record that the log lacks: its end was cut
            off.
    """
    anchor = model.audit_anchor()
    if faults := log.verify({model.name: anchor} if anchor else {}, model.name):
        raise Refused(f"{faults[0]}; nothing is decided about {model.name} before that is understood")
    is_overtaken = False
    while True:
        records, current = log.read_model_records(model.name), model.aliases()
        pending = find_pending_decisions(records)
        if not pending and not is_overtaken:
            # A process that was killed after the last record has not anchored it. Before anything was decided, there
            # may be no registered model yet.
            if find_last_sequence(records):
                model.set_audit_anchor(format_anchor(records[-1]))
            return
        wanted = derive_aliases(records, current.candidate)
        model.move_aliases(wanted, decided=current.candidate if wanted.candidate is None else None)
        model.set_audit_anchor(format_anchor(records[-1]))
        # If this process was paused while another one decided, it has just set the aliases to an outdated state.
        is_overtaken = log.read_model_records(model.name)[-1] != records[-1]
        if pending and not is_overtaken:
            numbers = [record["sequence"] for record in pending]
            moved = {"champion": wanted.champion, "previous": wanted.previous}
            try:
                log.append(CARRIED_OUT, model.name, after=find_last_sequence(records), of=numbers, **moved)
            except TryAgain:
                is_overtaken = True  # as above; if the store itself fails, the next reading raises its error


def find_alias_fault(model: RegisteredModel, log: AuditLog) -> str:
    """Returns, in words, which aliases are not on the version that the audit log gives them; empty if all are."""
    current, records = model.aliases(), log.read_model_records(model.name)
    expected = derive_aliases(records)
    if find_pending_decisions(records):
        return ""
    names = ("champion", "previous")
    return "; ".join(
        _describe_misplaced_alias(model.name, name, getattr(current, name), getattr(expected, name))
        for name in names
        if getattr(current, name) != getattr(expected, name)
    )


def _describe_misplaced_alias(model: str, alias: str, actual: int | None, expected: int | None) -> str:
    remedy = "correct it with the DAG rollback" if expected else f"take the alias {alias} away in MLflow"
    return (
        f"{model}: the alias {alias} is on version {actual or 'none'}, but by the audit log it belongs to version "
        f"{expected or 'none'}: it was moved without a recorded decision; {remedy}"
    )
