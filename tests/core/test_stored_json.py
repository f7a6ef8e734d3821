"""JSON of the store that was edited or overwritten: of another type, or without what is read."""

import os
import pickle
import re
import socket
from pathlib import Path

import pytest

from ml.core.errors import ConfigError, StoreError
from ml.core.hashes import canonical, digest
from ml.core.store import Store
from ml.data.ledger import read_ledger


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store((tmp_path / "store").as_uri())


def write(store: Store, key: str, content: object) -> None:
    path = Path(str(store.path(key)))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(canonical(content))


@pytest.mark.parametrize(
    ("oid", "content", "words"),
    [
        ("raw-0123456789ab", {"source": 5}, "source: .*string, not 5"),
        ("raw-0123456789ab", {"skipped_names": {"a": 1}}, "skipped_names: "),
        ("manifest-0123456789ab", {"quarantined": []}, "quarantined: .*dictionary"),
        ("manifest-0123456789ab", {"ties": "3"}, "ties: .*integer, not '3'"),
        ("validation-0123456789ab", {"passed": "yes"}, "passed: .*boolean, not 'yes'"),
        ("dataset-0123456789ab", {"sources": ["made"]}, "sources: "),
        ("dataset-0123456789ab", {"split": {"method": 1, "group": "case"}}, r"split\.method: "),
        ("dataset-0123456789ab", {"seed": True}, "seed: "),
        ("split-0123456789ab", {"sides": {"1001": None}}, r"sides\.1001: "),
        ("split-0123456789ab", {"train": {"images": 1.5}}, r"train\.images: "),
        ("weights-0123456789ab", {"kind": []}, "kind: "),
    ],
)
def test_a_field_of_another_type_is_named_with_its_file(store, oid, content, words):
    key = f"{store.object_key(oid)}/object.json"
    write(store, key, content)
    with pytest.raises(
        StoreError, match=f"^{re.escape(store.uri(key))} is damaged: {words}.*; restore it from a backup"
    ):
        store.meta(oid)


@pytest.mark.parametrize("content", [[], 5, "text", None])
def test_something_else_than_an_object_is_named(store, content):
    key = f"{store.object_key('dataset-0123456789ab')}/object.json"
    write(store, key, content)
    with pytest.raises(StoreError, match=re.escape(store.uri(key))):
        store.meta("dataset-0123456789ab")


@pytest.mark.parametrize("key", ["ledgers/demo.json", "refs/erased/breakhis.json", "jobs/leases/x", "audit/1.json"])
def test_null_is_damage_and_no_missing_file(any_store, key):
    """Readers take None for a file that is not there, and would wait for ever for a writer who takes it away."""
    any_store.put_json(key, None)
    with pytest.raises(StoreError, match=f"^{re.escape(any_store.uri(key))} is damaged: it holds null; "):
        any_store.read(key)


def test_a_ledger_that_holds_null_is_damaged(any_store):
    any_store.put_json("ledgers/demo.json", None)
    with pytest.raises(StoreError, match=r"ledgers/demo\.json is damaged: it holds null; restore it from a backup"):
        read_ledger("demo", any_store)


def make_pipe(file):
    os.mkfifo(file)


def make_socket(file):
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(file))


@pytest.mark.parametrize(
    ("make", "kind"),
    [(make_pipe, "pipe"), (make_socket, "socket"), (lambda file: file.symlink_to("/dev/zero"), "device")],
)
def test_what_is_no_file_is_named_and_not_waited_for(tmp_path, monkeypatch, make, kind):
    monkeypatch.chdir(tmp_path)  # a socket's path may have no more than 107 characters
    store, oid, sha256 = Store((tmp_path / "s").as_uri()), "dataset-0123456789ab", "0" * 64
    memo = f"objects/memos/stage/{digest(1)}.json"
    keys = ("ledgers/demo.json", f"{store.object_key(oid)}/object.json", store.blob_key(sha256), memo)
    for key in keys:
        file = Path("s") / key
        file.parent.mkdir(parents=True)
        make(file)
    for ask, key in (
        (lambda: read_ledger("demo", store), keys[0]),
        (lambda: store.meta(oid), keys[1]),
        (lambda: store.file(oid, "object.json"), keys[1]),
        (lambda: store.blob(sha256), keys[2]),
        (lambda: store.open_blob(sha256), keys[2]),
        (lambda: store.memo("stage", 1), keys[3]),
    ):
        with pytest.raises(ConfigError, match=f"^{re.escape(str(store.path(key)))}: it is a {kind}, where an ordinary"):
            ask()


def test_a_key_that_is_missing_is_named_with_its_file_at_any_depth(store):
    key = f"{store.object_key('split-0123456789ab')}/object.json"
    write(store, key, {"id": "split-0123456789ab", "train": {"images": 3}})
    meta = store.meta("split-0123456789ab")
    assert meta["train"]["images"] == 3
    for read in (
        lambda: meta["sides"],
        lambda: meta["train"]["cases"],
        lambda: pickle.loads(pickle.dumps(meta))["sides"],
    ):
        with pytest.raises(StoreError, match=f"^{re.escape(store.uri(key))} is damaged: it has no '(sides|cases)'; "):
            read()


@pytest.mark.parametrize(
    ("key", "content", "words"),
    [
        ("refs/raw/made.json", [], "its content: .*; restore it"),
        ("refs/raw/made.json", {"raw": 1}, "raw: .*; restore it"),
        ("refs/raw/made.json", {"raw": "12_000"}, "raw: .*pattern.*not '12_000'; restore it"),
        ("refs/sources/made.json", {"validation": None}, "validation: .*; restore it"),
        ("refs/erased/made.json", {"1001": []}, "1001: .*; restore it"),
        ("jobs/leases/made.json", {"owner": "x", "beat": "now"}, "beat: .*; remove the file while nothing runs"),
        (
            "jobs/training/0/state.json",
            {"owner": "x", "beat": 0},
            "run_id: .*; remove its folder, to train from the start",
        ),
        ("objects/caches/pixels-0/a.json", [1], "0: .*; remove the file, it is made again"),
        ("objects/caches/pictures-1/a.json", [["0", "1", 2]], "0: .*; remove the file, it is made again"),
        ("objects/caches/pictures-1/a.json", [[]], "0: .*; remove the file, it is made again"),
    ],
)
def test_what_is_kept_at_other_places_is_named_with_what_to_do(store, key, content, words):
    write(store, key, content)
    with pytest.raises(StoreError, match=f"^{re.escape(store.uri(key))} is damaged: {words}"):
        store.read(key)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("manifest", {"manifest": 1}),
        ("weights", {"id": "weights-0"}),
        ("draw", []),
        ("s3_objects", {"a.png": ["1", 2]}),
    ],
)
def test_a_memo_of_another_type_is_named(store, name, content):
    key = f"objects/memos/{name}/{digest(1)}.json"
    write(store, key, content)
    with pytest.raises(
        StoreError, match=f"^{re.escape(store.uri(key))} is damaged: .*; remove the file, it is made again"
    ):
        store.memo(name, 1)


def test_what_is_not_known_is_read_as_it_is(store):
    write(store, "jobs/a_dag/a_run/a_task/1-x.json", {"changed": True, "n": [1, {"a": None}]})
    assert store.read("jobs/a_dag/a_run/a_task/1-x.json")[0] == {"changed": True, "n": [1, {"a": None}]}
