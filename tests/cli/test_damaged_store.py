"""Stages over a store of which a file was overwritten: one line that names it, and exit status 3."""

import json
from pathlib import Path

import pytest

from ml.core.store import Store
from tests.helpers.made_up import create_dataset, every_class, manifest_rows


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("BREAKHIS_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("BREAKHIS_STORE", (tmp_path / "store").as_uri())
    return Store((tmp_path / "store").as_uri())


def overwrite(store: Store, key: str, content: str) -> str:
    path = Path(str(store.path(key)))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return store.uri(key)


@pytest.mark.parametrize("content", ["[]", "5", '{"seed": {}}', '{"ledger": ["made"]}', "{}", '"text"'])
def test_a_dataset_that_was_overwritten(store, command, content):
    dataset = create_dataset(store, manifest_rows(every_class()))
    uri = overwrite(store, f"{store.object_key(dataset)}/object.json", content)
    code, _, errors = command("split", dataset)
    assert code == 3
    assert f"error: {uri} is damaged: " in errors
    assert "Traceback" not in errors


def test_a_split_that_was_overwritten_is_made_again(store, command):
    dataset = create_dataset(store, manifest_rows(every_class()))
    made = json.loads(command("split", dataset, "--json")[1])["split"]
    before = store.meta(made)
    overwrite(store, f"{store.object_key(made)}/object.json", "null")
    assert command("split", dataset)[0] == 0
    assert store.meta(made) == before


def test_one_byte_of_a_dataset_is_noticed(store, command):
    dataset = create_dataset(store, manifest_rows(every_class()))
    table = store.path(f"{store.object_key(dataset)}/dataset.parquet")
    data = bytearray(table.read_bytes())
    data[len(data) // 3] ^= 0x01
    table.write_bytes(data)
    code, _, errors = command("split", dataset)
    assert code == 3
    assert f"error: {table.as_uri()} is damaged: its content is not what was written (SHA-256); restore it" in errors


@pytest.mark.parametrize("content", ["[1]", '"raw"', '{"raw": []}', '{"fetched": "now"}'])
def test_a_reference_that_was_overwritten(store, command, content):
    uri = overwrite(store, "refs/raw/demo.json", content)
    code, _, errors = command("manifest", "demo")
    assert code == 3
    assert f"error: {uri} is damaged: " in errors
    assert "restore it from a backup of the store" in errors


@pytest.mark.parametrize("content", ["[1]", "7", '{"version": 1}'])
def test_a_published_version_that_was_overwritten(store, command, content):
    uri = overwrite(store, "refs/sources/demo.json", content)
    code, _, errors = command("assemble", "demo")
    assert code == 3
    assert f"error: {uri} is damaged: " in errors
