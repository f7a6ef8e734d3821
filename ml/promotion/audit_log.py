"""The audit log: who decided what about which model version, when, why and on which evidence.

Append-only, under audit/log/ in the store: one file a record, numbered without a gap. Each record carries the code of
the one before and its own, an HMAC under a key that only the service identity has, so an edit, a deletion, a reordering
or an insertion shows. What a chain alone cannot show is that its end was cut off: the last of each model's records is
anchored as a tag of the registered model, which only the service identity may set.

B. Schneier, J. Kelsey, "Secure Audit Logs to Support Computer Forensics", ACM TISSEC 2(2), 1999.
"""

import hashlib
import hmac
import json
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime

from ml.core.errors import ConfigError, Conflict, Refused, TryAgain
from ml.core.settings import Settings
from ml.core.store import Json, Store, canonical
from ml.promotion.alias_history import CARRIED_OUT, DECISION_EVENTS

_FOLDER = "audit/log"
_BEFORE_THE_FIRST = "0" * 64
_UNKNOWN = "(unknown)"

DAMAGED = "damaged"
"""The event of what is shown in place of a record that cannot be read."""


class AuditLog:
    """The log in a store, under a key.

    Raises:
        ConfigError: the settings have no key.
    """

    def __init__(self, store: Store, settings: Settings) -> None:
        self._store = store
        self._key = _key_of(settings)

    def append(self, event: str, model: str, *, after: int | None = None, **facts: object) -> Json:
        """Add a record at the end, whoever else adds one; returns it.

        Args:
            event: what happened.
            model: to what.
            after: the model's last record that it was decided on, 0 for none; default: whatever there is.
            facts: whatever else is told.

        Raises:
            TryAgain: the model has a later record than ``after``, so it has to be decided anew.
        """
        while True:
            records = self.records()
            if (
                after is not None
                and (found := find_last_sequence(record for record in records if record["model"] == model)) != after
            ):
                raise TryAgain(f"{model}: record {found} of the audit log was written meanwhile; try again")
            last = records[-1] if records else None
            record: Json = {
                "sequence": last["sequence"] + 1 if last else 1,
                "before": last["code"] if last else _BEFORE_THE_FIRST,
                "at": datetime.now(UTC).isoformat(timespec="milliseconds"),
                "event": event,
                "model": model,
                **facts,
            }
            record["code"] = self._code(record)
            try:
                self._store.compare_and_set(_key(record["sequence"]), record, None)
            except Conflict:  # somebody was quicker
                continue
            return record

    def records(self) -> list[Json]:
        """Every record, in order.

        Raises:
            Refused: the log was changed; nothing can be decided on it until that is understood.
        """
        records, faults = self._read()
        if faults:
            raise Refused(
                f"the audit log {self._store.uri(_FOLDER)} was changed: {faults[0]}; see: breakhis audit verify"
            )
        return records

    def of(self, model: str) -> list[Json]:
        """The records of one model, in order."""
        return [record for record in self.records() if record["model"] == model]

    def uri(self, record: Json) -> str:
        """Where a record lies."""
        return self._store.uri(_key(record["sequence"]))

    def verify(self, anchors: Mapping[str, str], model: str | None = None) -> list[str]:
        """Everything that is wrong with the log, in plain words; nothing if it is whole.

        Args:
            anchors: model -> what its tag in the registry says of its last record, as of :func:`format_anchor`.
            model: the only one whose anchor is looked at; default: all.
        """
        records, faults = self._read()
        whole = {record["sequence"]: record for record in records}
        carried_out = {record["model"]: max(record["of"]) for record in records if record["event"] == CARRIED_OUT}
        if model is not None:
            anchors = {name: said for name, said in anchors.items() if name == model}
            carried_out = {name: number for name, number in carried_out.items() if name == model}
        for name, said in sorted(anchors.items()):
            number, _, code = said.partition(":")
            record = whole.get(int(number)) if number.isdecimal() else None
            if record is None and number.isdecimal() and f"{int(number):08d}.json" in self._store.keys(_FOLDER):
                continue  # edited, which is told already
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

    def _read(self) -> tuple[list[Json], list[str]]:
        """The records whose code holds, which are as they were written, and what is wrong with the others."""
        names = [name for name in self._store.keys(_FOLDER) if name.endswith(".json")]
        records: list[Json] = []
        faults: list[str] = []
        before, expected = _BEFORE_THE_FIRST, 1
        for name in names:
            try:
                record, _ = self._store.read(f"{_FOLDER}/{name}")
                number = int(name.removesuffix(".json"))
                code, its_own = str(record["code"]), self._code(record)
            except (ValueError, TypeError, KeyError):
                faults.append(f"{name} is no record")
                continue
            if number != expected:
                faults.append(f"record {expected} is missing" if number > expected else f"{name} is one too many")
            if not hmac.compare_digest(code.encode(), its_own.encode()):
                faults.append(f"record {number} was edited, or written under another key")
            else:
                if record["sequence"] != number:
                    faults.append(f"{name} holds record {record['sequence']}: records were reordered")
                elif number == expected and record["before"] != before:
                    faults.append(f"record {number} does not follow record {number - 1}: one of them was replaced")
                records.append(record)
            before, expected = code, number + 1
        return records, faults

    def _code(self, record: Json) -> str:
        content = {name: value for name, value in record.items() if name != "code"}
        return hmac.new(self._key, canonical(content), hashlib.sha256).hexdigest()


class SealedMemos:
    """Memos of the store that only who has the key can have written.

    Args:
        store: holds them, and beside them what others wrote of the same.
        settings: have the key.
        alike: whether what others wrote is as good as what was made anew: on another machine the last digits differ.

    Raises:
        ConfigError: the settings have no key.
    """

    def __init__(self, store: Store, settings: Settings, alike: Callable[[Json, Json], bool]) -> None:
        self._store = store
        self._alike = alike
        self._key = _key_of(settings)

    def memo(self, name: str, inputs: object) -> Json | None:
        """What was made of these inputs earlier, or None."""
        known = self._store.memo(f"{name}-sealed", inputs) or {}
        result, code = known.get("result"), str(known.get("code"))
        return result if hmac.compare_digest(code.encode(), self._code(name, inputs, result).encode()) else None

    def set_memo(self, name: str, inputs: object, result: Json) -> None:
        """Remember what was made of these inputs: in the words of others if these were right, else put theirs right."""
        others = self._store.memo(name, inputs)
        if others and self._alike(others, result):
            result = others
        else:
            self._store.set_memo(name, inputs, result)
        self._store.set_memo(f"{name}-sealed", inputs, {"result": result, "code": self._code(name, inputs, result)})

    def _code(self, name: str, inputs: object, result: Json | None) -> str:
        # Not in the canonical spelling, which knows no NaN: the simulation may.
        told = json.dumps(["memo", name, inputs, result], sort_keys=True)
        return hmac.new(self._key, told.encode(), hashlib.sha256).hexdigest()


def _key_of(settings: Settings) -> bytes:
    secret = settings.audit_key.get_secret_value()
    if not secret:
        raise ConfigError(
            "decisions are recorded under a key: set BREAKHIS_AUDIT_KEY (in Airflow: the connection "
            "breakhis_audit); the local stack and .env have one"
        )
    return secret.encode()


def find_last_sequence(records: Iterable[Json]) -> int:
    """The number of the last of some records, 0 of none."""
    return max((int(record["sequence"]) for record in records), default=0)


def read_decisions(store: Store, model: str | None = None, log: AuditLog | None = None) -> list[Json]:
    """The decisions in the log, of one model or of all, the latest first, whatever was done to them.

    Args:
        store: holds the log.
        model: the one; a record of which nobody can tell any more what it was about is shown with each.
        log: checks them.

    Returns:
        The records, with ``verified`` if there is a log to check them: whether each is as it was written. Of a damaged
        one that is False, and its event says so.
    """
    whole = None if log is None else {record["sequence"]: record for record in log._read()[0]}
    found = []
    for name in store.keys(_FOLDER):
        if not name.endswith(".json"):
            continue
        record = _of_file(name, store)
        if record["event"] == CARRIED_OUT or (model is not None and record["model"] not in (model, _UNKNOWN)):
            continue
        told = {key: value for key, value in record.items() if key != "verified"}
        if whole is not None or record["event"] == DAMAGED:
            told["verified"] = record["event"] != DAMAGED and (whole or {}).get(record["sequence"]) == record
        found.append(told)
    return sorted(found, key=lambda one: -int(one["sequence"]))


def read_unverified_records(store: Store, model: str) -> list[Json]:
    """The records of a model in order, carried out or not, as they lie there: for who has no key and looks ahead."""
    names = [name for name in store.keys(_FOLDER) if name.endswith(".json")]
    return [record for name in names if (record := _of_file(name, store))["model"] == model]


def _of_file(name: str, store: Store) -> Json:
    """A record that has at least what every record has, or what stands for one that has not."""
    stem = name.removesuffix(".json")
    number = int(stem) if stem.isdecimal() else 0
    try:
        record, _ = store.read(f"{_FOLDER}/{name}")
        if record["event"] in DECISION_EVENTS:
            whole = all(isinstance(record[key], str) for key in ("at", "model", "by", "reason"))
            champion = record.get("champion")
            whole = whole and isinstance(record["version"], int) and (champion is None or isinstance(champion, int))
        else:
            whole = record["event"] == CARRIED_OUT and isinstance(record["of"], list)
        if whole and record["sequence"] == number and isinstance(record["model"], str):
            return dict(record)
    except (ValueError, TypeError, KeyError, AttributeError):
        pass
    lost = {"version": 0, "by": "", "reason": f"{name} is damaged", "champion": None, "verified": False}
    return {"sequence": number, "at": "", "event": DAMAGED, "model": _UNKNOWN, **lost}


def find_chain_faults(store: Store) -> list[str]:
    """What can be seen to be wrong with the log by whoever has no key: records that are missing or do not follow.

    Whether a record was written by the service only the key tells: see :meth:`AuditLog.verify`.
    """
    faults = []
    before, expected = _BEFORE_THE_FIRST, 1
    for name in [name for name in store.keys(_FOLDER) if name.endswith(".json")]:
        try:
            record, _ = store.read(f"{_FOLDER}/{name}")
            number, follows, code = int(name.removesuffix(".json")), record["before"], record["code"]
        except (ValueError, TypeError, KeyError):
            faults.append(f"{name} is no record")
            continue
        if number != expected:
            faults.append(f"record {expected} is missing")
        elif follows != before:
            faults.append(f"record {number} does not follow record {number - 1}")
        before, expected = code, number + 1
    return faults


def format_anchor(record: Json) -> str:
    """What the registry is told of a model's last record."""
    return f"{record['sequence']}:{record['code']}"


def _key(sequence: int) -> str:
    return f"{_FOLDER}/{sequence:08d}.json"
