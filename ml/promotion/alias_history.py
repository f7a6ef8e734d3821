"""Where a model's aliases have to be by its records in the audit log: the log says it, the registry only shows it."""

from collections.abc import Sequence

from ml.core.store import Json
from ml.registry.registered_model import Aliases

APPROVED, REJECTED, ROLLED_BACK, WITHDRAWN = "approved", "rejected", "rolled back", "withdrawn"
"""Events of the audit log that are decisions."""

DECISION_EVENTS = (APPROVED, REJECTED, ROLLED_BACK, WITHDRAWN)

CARRIED_OUT = "carried out"
"""The event that follows decisions, once the registry is as they say."""

_MAKE_CHAMPION = (APPROVED, ROLLED_BACK)


def derive_aliases(records: Sequence[Json], candidate: int | None = None) -> Aliases:
    """What the aliases have to be. There is no champion but by a record.

    Args:
        records: of one model, in order.
        candidate: the version that the registry has as one; it stays one until something is decided about it.
    """
    champion = previous = None
    if decided := [record for record in records if record["event"] in _MAKE_CHAMPION]:
        last = decided[-1]
        champion = last["version"]
        previous = last["champion"] if last["champion"] != champion else last.get("previous")
    if any(record["event"] in DECISION_EVENTS and record["version"] == candidate for record in records):
        candidate = None
    return Aliases(champion, previous, candidate)


def find_pending_decisions(records: Sequence[Json]) -> list[Json]:
    """The decisions that the registry may not show yet."""
    done = {number for record in records if record["event"] == CARRIED_OUT for number in record["of"]}
    return [record for record in records if record["event"] in DECISION_EVENTS and record["sequence"] not in done]


def list_all_champions(records: Sequence[Json]) -> set[int]:
    """The versions that are or were champion."""
    return {int(record["version"]) for record in records if record["event"] in _MAKE_CHAMPION}


def find_champion_evidence_id(number: int, records: Sequence[Json]) -> str | None:
    """The evidence on which a version was last made champion, or None if it never was."""
    made = (one for one in reversed(records) if one["event"] in _MAKE_CHAMPION and one["version"] == number)
    return next((str(one["evidence"]) for one in made if one.get("evidence")), None)
