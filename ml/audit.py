"""The audit log: who decided what about which model version, when, why and on which evidence.

Append-only, under audit/log/ in the store: one file a record, numbered without a gap. Each record carries the code of
the one before and its own, an HMAC under a key that only the service identity has, so an edit, a deletion, a reordering
or an insertion shows. What a chain alone cannot show is that its end was cut off: the head of each model's records is
anchored as a tag of the registered model, which only the service identity may set.

B. Schneier, J. Kelsey, "Secure Audit Logs to Support Computer Forensics", ACM TISSEC 2(2), 1999.
"""

import hashlib
import hmac
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime

from ml.errors import ConfigError, Conflict, Refused, TryAgain
from ml.settings import Settings
from ml.store import Json, Store, canonical

_FOLDER = "audit/log"
_BEFORE_THE_FIRST = "0" * 64


class AuditLog:
    """The log in a store, under a key.

    Raises:
        ConfigError: the settings have no key.
    """

    def __init__(self, store: Store, settings: Settings) -> None:
        secret = settings.audit_key.get_secret_value()
        if not secret:
            raise ConfigError(
                "decisions are recorded under a key: set BREAKHIS_AUDIT_KEY (in Airflow: the connection "
                "breakhis_audit); the local stack and .env have one"
            )
        self._store = store
        self._key = secret.encode()

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
                and (found := last_of(record for record in records if record["model"] == model)) != after
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
            anchors: model -> what its tag in the registry says of its last decision, as of :func:`anchor`.
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


CARRIED_OUT = "carried out"


def last_of(records: Iterable[Json]) -> int:
    """The number of the last of some records, 0 of none."""
    return max((int(record["sequence"]) for record in records), default=0)


def decisions_of(store: Store, model: str | None = None) -> list[Json]:
    """The decisions in the log, of one model or of all, the latest first. Without the key nothing of it is checked."""
    names = [name for name in store.keys(_FOLDER) if name.endswith(".json")]
    records = [record for name in names if (record := store.read(f"{_FOLDER}/{name}")[0])]
    of_model = [one for one in records if one["event"] != CARRIED_OUT and model in (None, one["model"])]
    return sorted(of_model, key=lambda one: -int(one["sequence"]))


def anchor(record: Json) -> str:
    """What the registry is told of a model's last decision."""
    return f"{record['sequence']}:{record['code']}"


def _key(sequence: int) -> str:
    return f"{_FOLDER}/{sequence:08d}.json"
