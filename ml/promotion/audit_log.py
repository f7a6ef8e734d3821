"""The audit log: who decided what about which model version, when, why and on which evidence.

The log is append-only and lies under audit/log/ in the store: one file per record, numbered without a gap. Each record
carries its own code and that of the record before. A code is an HMAC under a key that only the service identity has, so
an edit, a deletion, a reordering or an insertion shows. A chain alone cannot show that its end was cut off: therefore
the last record of each model is anchored as a tag of the registered model, which only the service identity may set.

B. Schneier, J. Kelsey, "Secure Audit Logs to Support Computer Forensics", ACM TISSEC 2(2), 1999.
"""

import hashlib
import hmac
import json
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime

from ml.core.errors import ConfigError, Conflict, Refused, StoreError, TryAgain
from ml.core.hashes import canonical
from ml.core.settings import Settings
from ml.core.store import Json, Store
from ml.promotion.alias_history import ASKED, CARRIED_OUT, DECISION_EVENTS, UNORDERED_EVENTS

_FOLDER = "audit/log"
_NO_PREDECESSOR = "0" * 64
"""What the first record has as the code of the record before."""

_UNKNOWN_MODEL = "(unknown)"

DAMAGED = "damaged"
"""The event of the stand-in that is shown for a record that cannot be read."""


class AuditLog:
    """The audit log of a store, with the key that its records are signed with.

    Raises:
        ConfigError: the settings have no key.
    """

    def __init__(self, store: Store, settings: Settings) -> None:
        self._store = store
        self._key = _read_key(settings)

    def append(self, event: str, model: str, *, after: int | None = None, **facts: object) -> Json:
        """Add a record at the end and return it. Several processes may append at once.

        Args:
            event: what happened.
            model: the registered model that it happened to.
            after: number of the model's last record when the decision was taken, 0 if it had none. None skips the
                check.
            facts: further fields of the record.

        Raises:
            TryAgain: the model has a later record than ``after``, so the decision has to be taken anew.
            Refused: the log was changed.
        """
        while True:
            records = self.read_records()
            if (
                after is not None
                and (last_sequence := find_last_sequence(r for r in records if r["model"] == model)) != after
            ):
                raise TryAgain(f"{model}: record {last_sequence} of the audit log was written meanwhile; try again")
            last = records[-1] if records else None
            record: Json = {
                "sequence": last["sequence"] + 1 if last else 1,
                "before": last["code"] if last else _NO_PREDECESSOR,
                "at": datetime.now(UTC).isoformat(timespec="milliseconds"),
                "event": event,
                "model": model,
                **facts,
            }
            record["code"] = self._compute_code(record)
            try:
                self._store.compare_and_set(_record_key(record["sequence"]), record, None)
            except Conflict:  # another process has written this number
                continue
            return record

    def read_records(self) -> list[Json]:
        """Returns all records, in order.

        Raises:
            Refused: the log was changed; nothing can be decided until that is understood.
        """
        records, faults = self._read_intact()
        if faults:
            raise Refused(
                f"the audit log {self._store.uri(_FOLDER)} was changed: {faults[0]}; see: breakhis audit verify"
            )
        return records

    def read_model_records(self, model: str) -> list[Json]:
        """Returns the records of one model, in order.

        Raises:
            Refused: the log was changed.
        """
        return [record for record in self.read_records() if record["model"] == model]

    def uri(self, record: Json) -> str:
        """Returns the address of a record's file in the store."""
        return self._store.uri(_record_key(record["sequence"]))

    def verify(self, anchors: Mapping[str, str], model: str | None = None) -> list[str]:
        """Returns all faults of the log, in plain words; an empty list if it is whole.

        Args:
            anchors: model -> the anchor of its last record in the registry, as :func:`format_anchor` writes it.
            model: the one model whose anchor is checked; default: all models.
        """
        records, faults = self._read_intact()
        intact = {record["sequence"]: record for record in records}
        carried_out = {record["model"]: max(record["of"]) for record in records if record["event"] == CARRIED_OUT}
        if model is not None:
            anchors = {name: tag for name, tag in anchors.items() if name == model}
            carried_out = {name: number for name, number in carried_out.items() if name == model}
        for name, tag in sorted(anchors.items()):
            number, _, code = tag.partition(":")
            record = intact.get(int(number)) if number.isdecimal() else None
            if record is None and number.isdecimal() and f"{int(number):08d}.json" in self._store.keys(_FOLDER):
                continue  # it was edited, which is among the faults already
            if record is None:
                faults.append(
                    f"record {number} of {name}, which the registry knows, is not there: the log's end was cut off"
                )
            elif int(number) < carried_out.get(name, 0):
                faults.append(f"the registry was set back: it knows record {number} of {name} and none after it")
            elif not hmac.compare_digest(record["code"], code) or record["model"] != name:
                faults.append(f"record {number} is not the one that the registry knows of {name}")
        faults += [
            f"the registry knows of no record of {name}, but record {number} was carried out: its tag was removed"
            for name, number in sorted(carried_out.items())
            if name not in anchors
        ]
        return faults

    def _read_intact(self) -> tuple[list[Json], list[str]]:
        """Returns the records whose code is right, so they are as they were written, and the faults of the rest."""
        names = [name for name in self._store.keys(_FOLDER) if name.endswith(".json")]
        records: list[Json] = []
        faults: list[str] = []
        before, expected = _NO_PREDECESSOR, 1
        for name in names:
            try:
                record, _ = self._store.read(f"{_FOLDER}/{name}")
                number = int(name.removesuffix(".json"))
                code, computed = str(record["code"]), self._compute_code(record)
            except (ValueError, TypeError, KeyError, RecursionError, StoreError):
                faults.append(f"{name} is no record")
                continue
            if number != expected:
                faults.append(f"record {expected} is missing" if number > expected else f"{name} is one too many")
            if not hmac.compare_digest(code.encode(), computed.encode()):
                faults.append(f"record {number} was edited, or written under another key")
            else:
                if record["sequence"] != number:
                    faults.append(f"{name} holds record {record['sequence']}: records were reordered")
                elif number == expected and record["before"] != before:
                    faults.append(f"record {number} does not follow record {number - 1}: one of them was replaced")
                records.append(record)
            before, expected = code, number + 1
        return records, faults

    def _compute_code(self, record: Json) -> str:
        content = {name: value for name, value in record.items() if name != "code"}
        return hmac.new(self._key, canonical(content), hashlib.sha256).hexdigest()


class SealedMemos:
    """Memos of the store that were signed with the audit log's key, so that nobody without it can have written them.

    Args:
        store: holds the signed memos, and beside them the unsigned ones, which anybody may write.
        settings: have the key.
        are_equal: whether an unsigned result equals one computed anew, up to the last digits that differ between
            machines.

    Raises:
        ConfigError: the settings have no key.
    """

    def __init__(self, store: Store, settings: Settings, are_equal: Callable[[Json, Json], bool]) -> None:
        self._store = store
        self._are_equal = are_equal
        self._key = _read_key(settings)

    def memo(self, name: str, inputs: object) -> Json | None:
        """Returns the signed result that was remembered for these inputs, or None."""
        memo = self._store.memo(f"{name}-sealed", inputs) or {}
        result, code = memo.get("result"), str(memo.get("code"))
        return result if hmac.compare_digest(code.encode(), self._compute_code(name, inputs, result).encode()) else None

    def set_memo(self, name: str, inputs: object, result: Json) -> None:
        """Sign and remember the result of these inputs.

        The unsigned memo's result is signed where it equals this one; otherwise this one replaces it.
        """
        unsigned = self._store.memo(name, inputs)
        if unsigned and self._are_equal(unsigned, result):
            result = unsigned
        else:
            self._store.set_memo(name, inputs, result)
        code = self._compute_code(name, inputs, result)
        self._store.set_memo(f"{name}-sealed", inputs, {"result": result, "code": code})

    def _compute_code(self, name: str, inputs: object, result: Json | None) -> str:
        # Canonical JSON allows no NaN, but the simulation's results may hold one.
        content = json.dumps(["memo", name, inputs, result], sort_keys=True)
        return hmac.new(self._key, content.encode(), hashlib.sha256).hexdigest()


def _read_key(settings: Settings) -> bytes:
    secret = settings.audit_key.get_secret_value()
    if not secret:
        raise ConfigError(
            "the audit log is signed with a key, which is not set: set BREAKHIS_AUDIT_KEY (in Airflow: the connection "
            "breakhis_audit); the local stack and .env have one"
        )
    return secret.encode(errors="surrogateescape")  # as it is in the environment, where it may be any bytes


def find_last_sequence(records: Iterable[Json]) -> int:
    """Returns the number of the last of these records, 0 if there are none.

    Records of events on whose order no decision depends do not count.
    """
    return max((int(record["sequence"]) for record in records if record["event"] not in UNORDERED_EVENTS), default=0)


def read_decisions(store: Store, model: str | None = None, log: AuditLog | None = None) -> list[Json]:
    """Returns the decisions of one model or of all, the latest first. Damaged records are among them.

    Args:
        store: holds the log.
        model: the one model; default: all. A damaged record, whose model is unknown, is returned for every model.
        log: checks the records, if given.

    Returns:
        The records. With a log, each has ``verified``: whether it is as it was written. A damaged record has the event
        :data:`DAMAGED` and is not verified.
    """
    intact = None if log is None else {record["sequence"]: record for record in log._read_intact()[0]}
    decisions = []
    for name in store.keys(_FOLDER):
        if not name.endswith(".json"):
            continue
        record = _read_record(name, store)
        is_decision = record["event"] in (*DECISION_EVENTS, DAMAGED)
        if not is_decision or (model is not None and record["model"] not in (model, _UNKNOWN_MODEL)):
            continue
        decision = {key: value for key, value in record.items() if key != "verified"}
        if intact is not None or record["event"] == DAMAGED:
            decision["verified"] = record["event"] != DAMAGED and (intact or {}).get(record["sequence"]) == record
        decisions.append(decision)
    return sorted(decisions, key=lambda decision: -int(decision["sequence"]))


def read_unverified_records(store: Store, model: str | None = None) -> list[Json]:
    """Returns all records in order, of one model or of all, without checking their codes: for a process with no key."""
    names = [name for name in store.keys(_FOLDER) if name.endswith(".json")]
    return [record for name in names if (record := _read_record(name, store))["model"] == model or model is None]


def _read_record(name: str, store: Store) -> Json:
    """Returns a record that has at least the fields of every record, or a stand-in where the file is damaged."""
    stem = name.removesuffix(".json")
    number = int(stem) if stem.isdecimal() else 0
    try:
        record, _ = store.read(f"{_FOLDER}/{name}")
        if record["event"] in DECISION_EVENTS:
            is_complete = all(isinstance(record[key], str) for key in ("at", "model", "by", "reason"))
            champion = record.get("champion")
            is_complete = is_complete and isinstance(record["version"], int)
            is_complete = is_complete and (champion is None or isinstance(champion, int))
        elif record["event"] == CARRIED_OUT:
            is_complete = isinstance(record["of"], list)
        else:
            is_complete = record["event"] in UNORDERED_EVENTS and isinstance(record["run"], str)
            if record["event"] == ASKED:
                is_complete = is_complete and isinstance(record["version"], int)
                is_complete = is_complete and all(isinstance(record[key], str) for key in ("at", "evidence"))
        if is_complete and record["sequence"] == number and isinstance(record["model"], str):
            return dict(record)
    except (ValueError, TypeError, KeyError, AttributeError, StoreError):
        pass
    stand_in = {"version": 0, "by": "", "reason": f"{name} is damaged", "champion": None, "verified": False}
    return {"sequence": number, "at": "", "event": DAMAGED, "model": _UNKNOWN_MODEL, **stand_in}


def find_chain_faults(store: Store) -> list[str]:
    """Returns the faults of the log that show without the key: records that are missing or do not follow.

    Only the key tells whether the service wrote a record: see :meth:`AuditLog.verify`.
    """
    faults = []
    before, expected = _NO_PREDECESSOR, 1
    for name in [name for name in store.keys(_FOLDER) if name.endswith(".json")]:
        try:
            record, _ = store.read(f"{_FOLDER}/{name}")
            number, before_it, code = int(name.removesuffix(".json")), record["before"], record["code"]
        except (ValueError, TypeError, KeyError, StoreError):
            faults.append(f"{name} is no record")
            continue
        if number != expected:
            faults.append(f"record {expected} is missing")
        elif before_it != before:
            faults.append(f"record {number} does not follow record {number - 1}")
        before, expected = code, number + 1
    return faults


def format_anchor(record: Json) -> str:
    """Returns the anchor of a model's last record, ``<sequence>:<code>``, for the tag in the registry."""
    return f"{record['sequence']}:{record['code']}"


def _record_key(sequence: int) -> str:
    return f"{_FOLDER}/{sequence:08d}.json"
