"""The champion of a model: the version that the audit log names, and bringing the registry's aliases there."""

from collections.abc import Sequence

from ml.core.errors import Refused, TryAgain
from ml.core.settings import Settings
from ml.core.store import Json, Store
from ml.promotion.alias_history import CARRIED_OUT, derive_aliases, find_pending_decisions
from ml.promotion.audit_log import AuditLog, find_last_sequence, format_anchor, read_unverified_records
from ml.promotion.evidence import read_verified_evidence
from ml.registry.registered_model import CHAMPION, RegisteredModel


def read_champion_evidence(
    model: str, store: Store, settings: Settings, records: Sequence[Json] | None = None
) -> Json | None:
    """The evidence of a model's champion, or None where there is no champion: it still is what it became champion as.

    The champion is the one that the audit log names: while a decision is carried out, the alias may be late.

    Args:
        model: whose.
        store: holds evidence and log.
        settings: say where the registry is.
        records: of the model, checked; default: what lies in the store, which is not checked without a key.

    Raises:
        Refused: the alias was moved behind the log's back, or the champion was changed after it became it.
    """
    told = read_unverified_records(store, model) if records is None else records
    while True:
        expected, found = derive_aliases(told).champion, RegisteredModel(model, settings).alias(CHAMPION)
        if found == expected or find_pending_decisions(told):
            break
        later = read_unverified_records(store, model) if records is None else told
        if later == told:
            raise Refused(_misplaced(model, CHAMPION, found, expected))
        told = later  # a decision was carried out between the two readings
    return None if expected is None else read_verified_evidence(model, expected, told, store, settings)


def reconcile_aliases(model: str, log: AuditLog, settings: Settings) -> None:
    """Move the aliases to where the audit log says they belong, if a decision was left half carried out.

    Raises:
        Refused: the registry knows of records that the log has not: its end was cut off.
    """
    registered = RegisteredModel(model, settings)
    known = registered.audit_anchor()
    if faults := log.verify({model: known} if known else {}, model):
        raise Refused(f"{faults[0]}; nothing is decided about {model} before that is understood")
    late = False
    while True:
        records, current = log.of(model), registered.aliases()
        waiting = find_pending_decisions(records)
        if not waiting and not late:
            if records:  # who was killed after the last record did not tell the registry of it
                registered.set_audit_anchor(format_anchor(records[-1]))
            return
        wanted = derive_aliases(records, current.candidate)
        registered.move_aliases(wanted, decided=current.candidate if wanted.candidate is None else None)
        registered.set_audit_anchor(format_anchor(records[-1]))
        # If this process was stopped and another went on, the aliases were just set to what was right before.
        late = log.of(model)[-1] != records[-1]
        if waiting and not late:
            numbers = [record["sequence"] for record in waiting]
            shown = {"champion": wanted.champion, "previous": wanted.previous}
            try:
                log.append(CARRIED_OUT, model, after=find_last_sequence(records), of=numbers, **shown)
            except TryAgain:
                late = True  # likewise; where it is the store that fails, reading it says so


def find_alias_fault(model: str, log: AuditLog, settings: Settings) -> str:
    """Returns which aliases are not on the version that the audit log gives them, in words; nothing if all are."""
    current, records = RegisteredModel(model, settings).aliases(), log.of(model)
    expected = derive_aliases(records)
    if find_pending_decisions(records):
        return ""
    names = ("champion", "previous")
    wrong = [name for name in names if getattr(current, name) != getattr(expected, name)]
    return "; ".join(_misplaced(model, name, getattr(current, name), getattr(expected, name)) for name in wrong)


def _misplaced(model: str, alias: str, found: int | None, expected: int | None) -> str:
    """What to say of an alias that is not where the audit log says."""
    mend = "put it right with the DAG rollback" if expected else f"take the alias {alias} away in MLflow"
    return (
        f"{model}: the alias {alias} is on version {found or 'none'}, but by the audit log it belongs to version "
        f"{expected or 'none'}: it was moved behind the log's back; {mend}"
    )
