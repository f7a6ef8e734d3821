"""What a model's records in the audit log say about its aliases. The log decides, the registry only shows it."""

from collections.abc import Sequence

from ml.core.store import Json
from ml.promotion.reviews import PROMOTE
from ml.registry.registered_model import Aliases

APPROVED, REJECTED, ROLLED_BACK, WITHDRAWN = "approved", "rejected", "rolled back", "withdrawn"
"""Events of the audit log that are decisions."""

DECISION_EVENTS = (APPROVED, REJECTED, ROLLED_BACK, WITHDRAWN)

STARTED, REGISTERED, ASKED, NOT_COUNTED = "started", "registered", "asked", "not counted"
"""Events that are no decisions: a run that trains the model was started, a version was registered, reviewers were asked
about one, one of them answered without what makes an answer count."""

UNORDERED_EVENTS = (STARTED, REGISTERED, ASKED, NOT_COUNTED)
"""Events on whose order no decision depends."""

NOBODY_IN_TIME = "(nobody, by the deadline)"
"""The reviewer in a record of a rejection by the deadline. Nobody has rejected then, so another run may ask anew."""

CARRIED_OUT = "carried out"
"""The event that follows decisions, once the registry's aliases agree with them."""

_CHAMPION_EVENTS = (APPROVED, ROLLED_BACK)
"""Events that make a version champion."""


def derive_aliases(records: Sequence[Json], candidate: int | None = None) -> Aliases:
    """Returns the versions that a model's aliases must point to. Only a record makes a version champion.

    Args:
        records: audit records of one model, in order.
        candidate: the version that is candidate in the registry. It stays candidate until it is decided about.
    """
    champion = previous = None
    if champion_records := [record for record in records if record["event"] in _CHAMPION_EVENTS]:
        last = champion_records[-1]
        champion = last["version"]
        previous = last["champion"] if last["champion"] != champion else last.get("previous")
    if any(record["event"] in DECISION_EVENTS and record["version"] == candidate for record in records):
        candidate = None
    return Aliases(champion, previous, candidate)


def find_pending_decisions(records: Sequence[Json]) -> list[Json]:
    """Returns the decisions that are not known to be carried out: the registry may not show them yet."""
    done = {number for record in records if record["event"] == CARRIED_OUT for number in record["of"]}
    return [record for record in records if record["event"] in DECISION_EVENTS and record["sequence"] not in done]


def list_all_champions(records: Sequence[Json]) -> set[int]:
    """Returns the versions that are or were champion."""
    return {int(record["version"]) for record in records if record["event"] in _CHAMPION_EVENTS}


def is_registered(records: Sequence[Json], number: int, evidence: str) -> bool:
    """Returns whether the log says that ``breakhis register`` made this evidence of a version.

    An earlier release kept no record of that; its champions have one of their approval.
    """
    return any(
        record["event"] in (REGISTERED, *_CHAMPION_EVENTS)
        and (record.get("version"), record.get("evidence")) == (number, evidence)
        for record in records
    )


def find_rejection(records: Sequence[Json], number: int, evidence: str | None, dag: str) -> Json | None:
    """Returns the record of a reviewer's rejection of a version on this evidence, or None if there is none.

    Args:
        records: audit records of the model.
        number: the version.
        evidence: id of the evidence; None for any.
        dag: the DAG in whose runs it was rejected: rejecting a rollback is no verdict on the version.
    """
    return next(
        (
            record
            for record in records
            if (record["event"], record.get("version")) == (REJECTED, number)
            and str(record.get("run")).startswith(f"{dag}/")
            and record["by"] != NOBODY_IN_TIME
            and (evidence is None or record.get("evidence") in (None, evidence))
        ),
        None,
    )


def find_refusal(records: Sequence[Json], number: int, evidence: str | None, dag: str) -> Json | None:
    """Returns the record by which a version on this evidence can no longer be approved, or None if there is none.

    Arguments are those of :func:`find_rejection`.
    """
    withdrawals = (r for r in records if (r["event"], r.get("version")) == (WITHDRAWN, number))
    return next(withdrawals, None) or find_rejection(records, number, evidence, dag)


def list_open_questions(records: Sequence[Json]) -> list[Json]:
    """Returns the last record of each question about a version that nothing has settled: no decision, no withdrawal.

    A decision of the run settles its questions, and a later approval those of all runs about the same evidence. What
    Airflow has of a question plays no part: it forgets.

    Args:
        records: audit records of one model, in order.
    """
    last = {
        (record["run"], record["version"], record["evidence"]): record for record in records if record["event"] == ASKED
    }

    def is_settled(asked: Json) -> bool:
        later = [r for r in records if r["event"] in DECISION_EVENTS and r["sequence"] > asked["sequence"]]
        return find_refusal(records, asked["version"], asked["evidence"], PROMOTE) is not None or any(
            record.get("run") == asked["run"]
            or (
                (record["event"], record["version"]) == (APPROVED, asked["version"])
                and record.get("evidence") == asked["evidence"]
            )
            for record in later
        )

    return [asked for asked in last.values() if not is_settled(asked)]


def find_withdrawal(records: Sequence[Json], number: int) -> Json | None:
    """Returns the record of a version's withdrawal, unless it became champion again since; None if there is none."""
    own = [record for record in records if record.get("version") == number]
    last = next((r for r in reversed(own) if r["event"] in (*_CHAMPION_EVENTS, WITHDRAWN)), None)
    return last if last and last["event"] == WITHDRAWN else None


def find_champion_evidence_id(number: int, records: Sequence[Json]) -> str | None:
    """Returns the id of the evidence on which a version last became champion, or None if it never did."""
    promotions = (
        record for record in reversed(records) if record["event"] in _CHAMPION_EVENTS and record["version"] == number
    )
    return next((str(record["evidence"]) for record in promotions if record.get("evidence")), None)
