"""The check that the audit log is whole, and that the registry and the champions' files agree with it."""

from datetime import UTC, datetime, timedelta

from ml.core.errors import Refused, RegistryError, StoreError
from ml.core.settings import Settings
from ml.core.store import Json, Store
from ml.promotion.alias_history import DECISION_EVENTS, derive_aliases, find_pending_decisions
from ml.promotion.audit_log import AuditLog
from ml.promotion.champion import find_alias_fault
from ml.promotion.evidence import read_verified_evidence
from ml.registry.registered_model import RegisteredModel, audit_anchors, declared_models

_MAX_PENDING = timedelta(minutes=10)
"""A decision that is pending for longer was left by a process that died, and no other process has carried it out."""


def audit_registry(store: Store, settings: Settings) -> Json:
    """Check the whole audit log, and each declared model against it, down to the champions' files.

    Returns:
        ``{passed, records, decisions, models, faults}``: the numbers of records and decisions, the models' names, and
        the faults in words.
    """
    log = AuditLog(store, settings)
    anchors = audit_anchors(settings)
    faults = log.verify(anchors)
    records = [] if faults else log.read_records()
    models = sorted({record["model"] for record in records} | anchors.keys() | set(declared_models(settings)))
    if not faults:
        registered = [RegisteredModel(model, settings) for model in models]
        faults = [fault for model in registered for fault in _find_model_faults(model, log, store)]
    return {
        "passed": not faults,
        "records": len(records),
        "decisions": sum(record["event"] in DECISION_EVENTS for record in records),
        "models": models,
        "faults": faults,
    }


def _find_model_faults(model: RegisteredModel, log: AuditLog, store: Store) -> list[str]:
    records = log.read_model_records(model.name)
    faults = [
        f"{model.name}: record {record['sequence']} ({record['event']}, version {record['version']}) has not been "
        f"carried out since {record['at'][:16]}: what decided it died, or the end of the log was cut off; any further "
        "decision about the model carries it out"
        for record in find_pending_decisions(records)
        if datetime.now(UTC) - datetime.fromisoformat(record["at"]) > _MAX_PENDING
    ]
    if alias_fault := find_alias_fault(model, log):
        faults.append(alias_fault)
    expected = derive_aliases(records)
    for number in [version for version in (expected.champion, expected.previous) if version]:
        try:
            read_verified_evidence(model, number, records, store)
        except (Refused, RegistryError, StoreError) as fault:
            faults.append(str(fault))
    return faults
