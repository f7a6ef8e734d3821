"""The check of the whole audit log, and of the registry and the champions' files against it."""

from datetime import UTC, datetime, timedelta

from ml.core.errors import Refused, RegistryError, StoreError
from ml.core.settings import Settings
from ml.core.store import Json, Store
from ml.promotion.alias_history import CARRIED_OUT, derive_aliases, find_pending_decisions
from ml.promotion.audit_log import AuditLog
from ml.promotion.champion import find_alias_fault
from ml.promotion.evidence import read_verified_evidence
from ml.registry.registered_model import audit_anchors, declared_models

_LONG = timedelta(minutes=10)
"""What is not carried out by then was left by a process that died, and that nobody came after."""


def audit_registry(store: Store, settings: Settings) -> Json:
    """Check the whole log, and each of our models against it, down to the champions' files.

    Returns:
        ``{passed, records, decisions, models, faults}``.
    """
    log = AuditLog(store, settings)
    known = audit_anchors(settings)
    faults = log.verify(known)
    records = [] if faults else log.records()
    models = sorted({record["model"] for record in records} | known.keys() | set(declared_models(settings)))
    if not faults:
        faults = [fault for model in models for fault in _faults_of(model, log, store, settings)]
    return {
        "passed": not faults,
        "records": len(records),
        "decisions": sum(record["event"] != CARRIED_OUT for record in records),
        "models": models,
        "faults": faults,
    }


def _faults_of(model: str, log: AuditLog, store: Store, settings: Settings) -> list[str]:
    records = log.of(model)
    faults = [
        f"{model}: record {one['sequence']} ({one['event']}, version {one['version']}) has not been carried out since "
        f"{one['at'][:16]}: what decided it died, or the end of the log was cut off; any further decision about the "
        "model carries it out"
        for one in find_pending_decisions(records)
        if datetime.now(UTC) - datetime.fromisoformat(one["at"]) > _LONG
    ]
    if wrong := find_alias_fault(model, log, settings):
        faults.append(wrong)
    now = derive_aliases(records)
    for number in [one for one in (now.champion, now.previous) if one]:
        try:
            read_verified_evidence(model, number, records, store, settings)
        except (Refused, RegistryError, StoreError) as fault:
            faults.append(str(fault))
    return faults
