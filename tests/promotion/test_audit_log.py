import itertools
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ml.core.errors import ConfigError, Refused, TryAgain
from ml.core.settings import Settings
from ml.core.store import Store
from ml.promotion.alias_history import ASKED, CARRIED_OUT, STARTED
from ml.promotion.audit_log import AuditLog, SealedMemos, find_chain_faults, format_anchor, read_decisions


def open_log(folder, key="secret"):
    store = Store((folder / "store").as_uri())
    return AuditLog(store, Settings(home=folder, store=store.root, audit_key=key))


@pytest.fixture
def log(tmp_path):
    made = open_log(tmp_path)
    for version in range(1, 5):
        made.append("approved", "m-binary", version=version)
    return made


def files(tmp_path):
    return sorted((tmp_path / "store" / "audit" / "log").glob("*.json"))


def test_records_follow_one_another(log):
    records = log.read_records()
    assert [record["sequence"] for record in records] == [1, 2, 3, 4]
    assert all(after["before"] == before["code"] for before, after in itertools.pairwise(records))
    assert log.verify({"m-binary": format_anchor(records[-1])}) == []
    assert log.read_model_records("other") == []


def edit(paths):
    record = json.loads(paths[1].read_text())
    paths[1].write_text(json.dumps(record | {"version": 9}))


def delete(paths):
    paths[1].unlink()


def swap(paths):
    first, second = paths[1].read_text(), paths[2].read_text()
    paths[1].write_text(second)
    paths[2].write_text(first)


def renumber(paths):
    """Take one out and close the gap."""
    paths[1].unlink()
    for k, path in enumerate(paths[2:], start=2):
        path.rename(path.with_name(f"{k:08d}.json"))


def rewrite(paths):
    """A record of one's own, with a code that is made up."""
    record = json.loads(paths[3].read_text())
    paths[3].write_text(json.dumps(record | {"version": 1, "code": "0" * 64}))


def damage(paths):
    paths[0].write_text("{")


def rename_a_field(paths):
    paths[0].write_text(paths[0].read_text().replace('"sequence"', '"sequencf"'))


def not_a_number(paths):
    record = json.loads(paths[0].read_text())
    paths[0].write_text(json.dumps(record | {"version": float("nan")}))


def odd_code(paths):
    record = json.loads(paths[0].read_text())
    paths[0].write_text(json.dumps(record | {"code": "ä" * 64}))


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (edit, "record 2 was edited"),
        (delete, "record 2 is missing"),
        (swap, "records were reordered"),
        (renumber, "records were reordered"),
        (rewrite, "record 4 was edited"),
        (damage, "00000001.json is no record"),
        (rename_a_field, "record 1 was edited"),
        (not_a_number, "00000001.json is no record"),
        (odd_code, "record 1 was edited"),
    ],
)
def test_every_change_shows(log, tmp_path, tamper, message):
    known = {"m-binary": format_anchor(log.read_records()[0])}
    tamper(files(tmp_path))
    assert any(message in fault for fault in log.verify(known))
    assert not any("cut off" in fault for fault in log.verify(known))
    with pytest.raises(Refused, match="was changed"):
        log.read_records()
    with pytest.raises(Refused):
        log.append("approved", "m-binary", version=5)


def test_a_cut_tail_shows_by_what_the_registry_knows(log, tmp_path):
    anchor = format_anchor(log.read_records()[-1])
    files(tmp_path)[-1].unlink()
    assert log.read_records()  # the chain by itself is whole
    assert "the log's end was cut off" in log.verify({"m-binary": anchor})[0]
    log.append("approved", "m-binary", version=7)  # another end in its place
    assert "is not the one that the registry knows" in log.verify({"m-binary": anchor})[0]


def test_the_registrys_tag_taken_away_or_set_back_shows(log):
    records = log.read_records()
    log.append(CARRIED_OUT, "m-binary", of=[4])
    assert log.verify({"m-binary": format_anchor(records[3])}) == []
    assert "its tag was removed" in log.verify({})[0]
    assert "was set back" in log.verify({"m-binary": format_anchor(records[1])})[0]
    assert log.verify({"m-binary": "nonsense"})


def test_what_is_wrong_with_another_model_is_not_this_ones_fault(log):
    log.append(CARRIED_OUT, "m-binary", of=[4])
    assert log.verify({}, "m-subtype") == []
    assert "its tag was removed" in log.verify({}, "m-binary")[0]
    assert log.verify({"m-subtype": "99:0"}, "m-binary")[0].startswith("the registry knows of no record of m-binary")


def test_what_was_decided_on_what_is_past_is_decided_anew(log):
    assert log.append("approved", "m-binary", after=4)["sequence"] == 5
    assert log.append("approved", "m-subtype", after=0)["sequence"] == 6  # another model's records do not count
    with pytest.raises(TryAgain, match="record 5 of the audit log was written meanwhile"):
        log.append("approved", "m-binary", after=4)


def test_damaged_records_are_shown_as_such(log, tmp_path):
    store = Store((tmp_path / "store").as_uri())
    for number in range(5, 9):
        log.append("approved", "m-binary", version=number, by="reviewer", reason="fine", champion=None)
    paths = files(tmp_path)
    paths[4].write_text("{")
    paths[5].write_text("[]")
    record = json.loads(paths[6].read_text())
    paths[6].write_text(json.dumps(record | {"by": "somebody else"}))
    by_sequence = {one["sequence"]: one for one in read_decisions(store, "m-binary", log)}
    assert [by_sequence[n]["event"] for n in (5, 6, 7, 8)] == ["damaged", "damaged", "approved", "approved"]
    assert [by_sequence[n]["verified"] for n in (5, 6, 7, 8)] == [False, False, False, True]
    assert by_sequence[5]["reason"] == "00000005.json is damaged"
    assert [one["event"] for one in read_decisions(store)][:2] == ["approved", "approved"]  # without the key
    assert "verified" not in read_decisions(store)[0]


def test_another_key(log, tmp_path):
    assert any("under another key" in fault for fault in open_log(tmp_path, "other").verify({}))


def test_without_a_key(tmp_path):
    with pytest.raises(ConfigError, match="BREAKHIS_AUDIT_KEY"):
        open_log(tmp_path, "")


def test_several_writers_lose_nothing(tmp_path):
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda k: open_log(tmp_path).append("approved", "m", version=k), range(24)))
    records = open_log(tmp_path).read_records()
    assert sorted(record["version"] for record in records) == list(range(24))
    assert [record["sequence"] for record in records] == list(range(1, 25))


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_edit_of_any_byte_that_changes_a_record_shows(log, tmp_path, data):
    path = data.draw(st.sampled_from(files(tmp_path)))
    before = path.read_bytes()
    where = data.draw(st.integers(0, len(before) - 1))
    changed = before[:where] + bytes([data.draw(st.integers(0, 127))]) + before[where + 1 :]
    try:
        same = json.loads(changed) == json.loads(before)
    except ValueError:
        same = False
    path.write_bytes(changed)
    try:
        assert bool(log.verify({})) != same
    finally:
        path.write_bytes(before)


@pytest.mark.parametrize(
    ("tamper", "faults"),
    [
        (delete, ["record 2 is missing"]),
        (swap, ["record 2 does not follow record 1", "record 3 does not follow record 2"]),
        (renumber, ["record 2 does not follow record 1"]),
        (lambda paths: paths[1].write_text('{"no": "record"}'), ["00000002.json is no record"]),
    ],
)
def test_what_is_seen_without_the_key(log, tmp_path, tamper, faults):
    store = Store((tmp_path / "store").as_uri())
    assert find_chain_faults(store) == []
    tamper(files(tmp_path))
    assert find_chain_faults(store)[: len(faults)] == faults


def test_a_memo_that_somebody_else_wrote_is_none(tmp_path):
    store = Store((tmp_path / "store").as_uri())
    sealed = SealedMemos(store, Settings(home=tmp_path, store=store.root, audit_key="secret"), lambda *_: False)
    sealed.set_memo("critical", [1], {"value": 2.0})
    assert sealed.memo("critical", [1]) == {"value": 2.0}
    assert sealed.memo("critical", [2]) is None
    code = store.memo("critical-sealed", [1])["code"]
    for forged in ({"result": {"value": 0.0}, "code": code}, {"result": {"value": 0.0}}, {}):
        store.set_memo("critical-sealed", [1], forged)
        assert sealed.memo("critical", [1]) is None


def test_what_is_no_decision_is_no_decision_and_disturbs_none(log, tmp_path):
    log.append(STARTED, "m-binary", run="retrain_m/r1", users={"engineer": "retrain_m/r1"}, unknown="")
    log.append(ASKED, "m-binary", version=4, evidence="evidence-1", run="promote/a", begun="2026-01-01")
    store = Store((tmp_path / "store").as_uri())
    events = [record["event"] for record in read_decisions(store, "m-binary", log)]
    assert len(events) == 4
    assert not {STARTED, ASKED} & set(events)
    assert log.append("withdrawn", "m-binary", after=4, version=4)["sequence"] == 7
    with pytest.raises(TryAgain):
        log.append("withdrawn", "m-binary", after=4, version=4)


def test_a_key_may_be_any_bytes(tmp_path):
    """As an environment variable of other bytes than UTF-8 is read."""
    store = Store((tmp_path / "store").as_uri())
    key = Settings(home=tmp_path, store=store.root, audit_key="\udcff\udcfe")
    AuditLog(store, key).append("started", "made-binary", run="retrain_made/r")
    assert AuditLog(store, key).verify({}) == []
