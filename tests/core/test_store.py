import contextlib
import os
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ml.core.errors import Conflict, StoreError
from ml.core.hashes import canonical, digest, object_id
from ml.core.s3_access import find_boto_client
from ml.core.store import Store
from tests.helpers.old_objects import drop_checksums

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@pytest.fixture
def store(any_store):
    return any_store


@given(json_values)
def test_digest_does_not_depend_on_key_order(value):
    if isinstance(value, dict):
        assert digest(dict(reversed(value.items()))) == digest(value)
    assert canonical(value) == canonical(value)


def test_object_id_is_kind_and_twelve_hex():
    kind, _, hexes = object_id("manifest", {"a": 1}).rpartition("-")
    assert kind == "manifest"
    assert len(hexes) == 12
    assert int(hexes, 16) >= 0


def test_nan_has_no_digest():
    with pytest.raises(ValueError, match="not JSON compliant"):
        digest({"value": float("nan")})


def test_root_must_be_a_known_scheme():
    with pytest.raises(StoreError, match="BREAKHIS_STORE"):
        Store("/just/a/path")


def test_a_folder_with_a_space(tmp_path):
    folder = tmp_path / "my store"
    Store(folder.as_uri()).put_json("refs/x.json", 1)
    assert (folder / "refs" / "x.json").is_file()


def test_blob_round_trip_and_same_bytes_once(store):
    first = store.put_blob(b"picture")
    assert store.put_blob(b"picture") == first
    assert store.blob(first) == b"picture"
    with pytest.raises(StoreError, match="not in the store"):
        store.blob("0" * 64)


def test_create_keeps_files_and_meta_and_fills_once(store):
    calls = []

    def fill(folder: Path) -> None:
        calls.append(folder)
        (folder / "sub").mkdir()
        (folder / "sub" / "file.txt").write_text("content")

    oid = store.create("thing", {"a": 1}, {"n": 3}, fill)
    assert store.create("thing", {"a": 1}, {"n": 3}, fill) == oid
    assert len(calls) == 1
    assert store.exists(oid)
    assert store.meta(oid) == {"id": oid, "n": 3}
    assert store.file(oid, "sub/file.txt").read_text() == "content"


def test_a_failed_create_leaves_nothing(tmp_path):
    store = Store(tmp_path.as_uri())

    def fill(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise RuntimeError("killed in between")

    with pytest.raises(RuntimeError):
        store.create("thing", 1, {}, fill)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_an_object_whose_meta_was_taken_from_another_keeps_its_own_id(store):
    other = store.create("split", 1, {"n": 1})
    made = store.create("split", 2, {**store.meta(other), "n": 2})
    assert store.meta(made) == {"id": made, "n": 2}


@pytest.mark.parametrize("leftover", ["no object.json", "a link to itself", "a file"])
def test_what_is_left_of_a_damaged_object_is_replaced(tmp_path, leftover):
    """Such as after a restore that was broken off: the object could never be made again otherwise."""
    store = Store((tmp_path / "store").as_uri())
    made = store.create("split", {"n": 1}, {"n": 1}, lambda folder: (folder / "rows").write_text("1"))
    target = store.path(store.object_key(made))
    (target / "object.json").unlink()
    if leftover == "a link to itself":
        (target / "object.json").symlink_to("object.json")
    elif leftover == "a file":
        (target / "rows").unlink()
        target.rmdir()
        target.write_text("")
    assert store.create("split", {"n": 1}, {"n": 1}, lambda folder: (folder / "rows").write_text("2")) == made
    assert store.meta(made)["n"] == 1
    assert store.file(made, "rows").read_text() == "2"
    assert list((tmp_path / "store" / "tmp").iterdir()) == []


def rows_of(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "rows").write_text(text)


def overwrite(store: Store, key: str, text: str) -> None:
    path = store.path(key)
    if isinstance(path, Path):
        path.write_text(text)
    else:
        find_boto_client(path).put_object(Bucket=path.bucket, Key=path.key, Body=text.encode())


@pytest.mark.parametrize("damage", ["", "null", "[]", '{"id": ', '{"id": 5}', "\0\0", "[" * 100_000])
def test_an_object_whose_object_json_is_damaged_is_no_object_and_is_made_again(store, damage):
    made = store.create("thing", 1, {"n": 1}, rows_of("1"))
    overwrite(store, f"{store.object_key(made)}/object.json", damage)
    assert not store.exists(made)
    with pytest.raises(StoreError, match=r"object\.json is damaged"):
        store.file(made, "rows")
    assert store.create("thing", 1, {"n": 1}, rows_of("1")) == made
    assert store.exists(made)
    assert store.meta(made) == {"id": made, "n": 1}
    assert store.file(made, "rows").read_text() == "1"


def test_a_file_that_was_changed_is_noticed_and_replaced_when_its_object_is_made_again(store):
    made = store.create("split", 1, {"n": 1}, rows_of("as written"))
    key = f"{store.object_key(made)}/rows"
    overwrite(store, key, "as wrItten")
    with pytest.raises(StoreError, match=r"rows is damaged: .*SHA-256.*; .*run 'breakhis split' again") as error:
        store.file(made, "rows")
    assert store.uri(key) in str(error.value)
    assert store.create("split", 1, {"n": 1}, rows_of("as written")) == made
    assert store.file(made, "rows").read_text() == "as written"


def test_a_file_that_was_added_is_noticed(store):
    made = store.create("thing", 1, {}, rows_of("1"))
    overwrite(store, f"{store.object_key(made)}/more", "2")
    with pytest.raises(StoreError, match="does not name it"):
        store.file(made, "more")


def test_an_object_of_an_earlier_release_has_no_checksums_and_is_read(store):
    made = store.create("thing", 1, {"n": 1}, rows_of("1"))
    drop_checksums(store, made)
    assert store.file(made, "rows").read_text() == "1"
    assert store.create("thing", 1, {"n": 1}, rows_of("2")) == made
    assert store.file(made, "rows").read_text() == "1"


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
@pytest.mark.parametrize("has_checksums", [True, False])
def test_a_replacement_that_is_killed_at_any_step_leaves_an_object_that_can_be_read(
    tmp_path, monkeypatch, steps, has_checksums
):
    store = Store((tmp_path / "store").as_uri())
    made = store.create(
        "thing", 1, {"n": 1}, lambda folder: [rows_of("old")(folder), (folder / "other").write_text("o")]
    )
    if not has_checksums:
        drop_checksums(store, made)
    new = tmp_path / "new"
    new.write_text("new")
    written: list[str] = []

    def write(key: str, source: Path, put: Callable[[str, Path], None] = store.put_file) -> None:
        if len(written) == steps:
            raise KeyboardInterrupt
        written.append(key)
        put(key, source)

    monkeypatch.setattr(store, "put_file", write)
    with contextlib.suppress(KeyboardInterrupt):
        store.replace_file(made, "rows", new)
    monkeypatch.undo()
    is_new = steps >= (2 if has_checksums else 1)
    assert store.file(made, "rows").read_text() == ("new" if is_new else "old")
    assert store.file(made, "other").read_text() == "o"
    assert store.meta(made) == {"id": made, "n": 1}
    new.write_text("new")
    store.replace_file(made, "rows", new)
    assert store.file(made, "rows").read_text() == "new"
    assert store.file(made, "other").read_text() == "o"


def test_unknown_ids_name_their_kind(store):
    with pytest.raises(StoreError, match="no such dataset"):
        store.meta("dataset-0123456789ab")
    with pytest.raises(StoreError, match="not in the store"):
        store.local("objects/nothing/here")


def test_memo(store):
    assert store.memo("stage", {"in": 1}) is None
    store.set_memo("stage", {"in": 1}, {"out": 2})
    assert store.memo("stage", {"in": 1}) == {"out": 2}


def test_compare_and_set(store):
    assert store.read("refs/x.json") == (None, None)
    store.compare_and_set("refs/x.json", {"v": 1}, None)
    with pytest.raises(Conflict):
        store.compare_and_set("refs/x.json", {"v": 9}, None)
    value, tag = store.read("refs/x.json")
    assert value == {"v": 1}
    store.compare_and_set("refs/x.json", {"v": 2}, tag)
    with pytest.raises(Conflict):
        store.compare_and_set("refs/x.json", {"v": 3}, tag)
    assert store.read("refs/x.json")[0] == {"v": 2}


def test_compare_and_set_loses_no_update_among_threads(tmp_path):
    store = Store(tmp_path.as_uri())
    store.compare_and_set("refs/n.json", 0, None)

    def add_ten() -> None:
        done = 0
        while done < 10:
            value, tag = store.read("refs/n.json")
            try:
                store.compare_and_set("refs/n.json", value + 1, tag)
                done += 1
            except Conflict:
                pass

    threads = [threading.Thread(target=add_ten) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.read("refs/n.json")[0] == 40


def test_keys_are_sorted_and_empty_for_an_unknown_prefix(store):
    store.put_json("caches/c/b.json", 1)
    store.put_json("caches/c/a.json", 1)
    assert store.keys("caches/c") == ["a.json", "b.json"]
    assert store.keys("caches/none") == []


def test_scratch_of_killed_processes_is_removed_and_that_of_living_ones_stays(tmp_path):
    store, yesterday = Store(tmp_path.as_uri()), time.time() - 25 * 3600
    with store.staging() as living:
        (living / "part").write_text("coming")
        dead = living.with_name("breakhis-dead")
        (dead / "inner").mkdir(parents=True)
        for one in (dead / "inner", dead, living):
            os.utime(one, (yesterday, yesterday))
        with store.staging():
            assert (living / "part").read_text() == "coming"
            assert not dead.exists()


def test_a_folder_that_was_seen_idle_is_looked_at_again_before_it_is_removed(tmp_path):
    store, now = Store(tmp_path.as_uri()), time.time()
    with store.staging() as long_lived:
        (long_lived / "part").write_text("a day ago")
        for hours, stays in ((23, True), (25, False)):
            for one in (long_lived, long_lived / "part"):
                os.utime(one, (now - hours * 3600, now - hours * 3600))
            with store.staging():
                assert (long_lived / "part").exists() is stays


def test_a_host_whose_clock_is_ahead_removes_nothing_that_others_write(tmp_path, monkeypatch):
    store, now = Store(tmp_path.as_uri()), time.time()
    with store.staging() as living:
        (living / "part").write_text("coming")
        monkeypatch.setattr(time, "time", lambda: now + 3 * 24 * 3600)
        with store.staging():
            assert (living / "part").exists()


def test_stores_in_one_bucket_share_a_client(s3_endpoint):
    credentials = {"AWS_ENDPOINT_URL": s3_endpoint, "AWS_ACCESS_KEY_ID": "one", "AWS_SECRET_ACCESS_KEY": "secret"}
    first, second = (Store("s3://shared-client/store", dict(credentials)) for _ in range(2))
    assert first.path("x").client is second.path("x").client
    other = Store("s3://shared-client/store", credentials | {"AWS_ACCESS_KEY_ID": "two"})
    assert other.path("x").client is not first.path("x").client


@pytest.mark.parametrize(
    "damaged",
    [b"", b"{", b'{"a": 1}x', b"\xff\xfe{}", b'{"a": "\\ud800"}', b"[" * 100_000, b'{"a":' + b"[" * 100_000],
)
def test_damaged_json_names_its_file(store, damaged):
    evidence = store.create("evidence", {}, {})
    store.set_memo("judged", 1, {})
    store.put_json("refs/sources/made.json", {})
    readers = {
        store.object_key(evidence) + "/object.json": lambda: store.meta(evidence),
        f"objects/memos/judged/{digest(1)}.json": lambda: store.memo("judged", 1),
        "refs/sources/made.json": lambda: store.read("refs/sources/made.json"),
    }
    for key, read in readers.items():
        read()
        store.path(key).write_bytes(damaged)
        advice = "remove the file, it is made again" if "memos" in key else "restore it from a backup"
        with pytest.raises(StoreError, match=f"{re.escape(store.uri(key))} is damaged: .*; {advice}"):
            read()


def test_an_object_whose_file_holds_something_else_is_damaged(store):
    evidence = store.create("evidence", {}, {})
    store.path(store.object_key(evidence) + "/object.json").write_bytes(b"[1]")
    with pytest.raises(StoreError, match="holds no JSON object"):
        store.meta(evidence)


def test_the_age_of_a_key_is_by_the_stores_own_clock(any_store, monkeypatch):
    assert any_store.age("jobs/x.json") is None
    any_store.put_json("jobs/x.json", {})
    assert 0 <= any_store.age("jobs/x.json") < 60
    path = any_store.path("jobs/x.json")
    if isinstance(path, Path):
        then = path.stat().st_mtime - 5000
        os.utime(path, (then, then))
        assert 5000 <= any_store.age("jobs/x.json") < 5060


@pytest.mark.parametrize("name", ["", "x" * 5000, "../../etc", "a/b", "a\0b", "\ud800", "--help", " "])
def test_what_cannot_be_an_id_is_refused_in_words(store, name):
    for read in (store.meta, store.exists, lambda oid: store.file(oid, "x")):
        with pytest.raises(StoreError, match="is no id; give one that a stage printed") as refused:
            read(name)
        assert len(str(refused.value)) < 400
