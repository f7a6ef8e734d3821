"""Stages over a store of which a file was overwritten: one line that names it, and exit status 3."""

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
