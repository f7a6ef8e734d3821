"""``breakhis sources``: adding, checking and listing."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from ml.cli.sources import sources
from ml.core.errors import ConfigError
from ml.core.settings import PROJECT, read_settings
from ml.core.store import Store
from ml.data.sources import SOURCE_KINDS
from tests.helpers.made_up import png, write_tree

FILLED_IN = {
    "directory": {"path": "./images"},
    "kaggle": {"dataset": "owner/slug"},
    "s3": {"bucket": "pathology"},
    "http": {"url": "https://example.org/a.zip", "sha256": "0" * 64},
    "demo": {},
}


@pytest.fixture
def conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configuration without sources, and a home of this test's own."""
    folder = tmp_path / "conf"
    shutil.copytree(PROJECT / "dags" / "training_sets", folder / "training_sets")
    monkeypatch.setenv("BREAKHIS_CONF", str(folder))
    monkeypatch.setenv("BREAKHIS_HOME", str(tmp_path / "home"))
    return folder


@pytest.fixture
def run(conf: Path) -> Callable[..., Any]:
    def call(*arguments: str) -> Any:
        done = CliRunner().invoke(sources, [*arguments, "--json"], catch_exceptions=False)
        return json.loads(done.stdout)

    return call


@pytest.mark.parametrize("kind", list(SOURCE_KINDS))
def test_a_new_source_says_what_to_fill_in_and_is_good_then(run: Any, conf: Path, kind: str) -> None:
    made = run("new", "ours", "--kind", kind)
    file = conf / "sources" / "ours.yaml"
    assert made == {"file": str(file), "fill_in": list(FILLED_IN[kind]), "then": "breakhis sources check ours"}
    declared = yaml.safe_load(file.read_text())
    assert declared.keys() == SOURCE_KINDS[kind].model_fields.keys()
    for key in FILLED_IN[kind]:
        with pytest.raises(ConfigError, match=rf"ours\.yaml: still to be filled in: .*{key}"):
            run("check", "ours")
    file.write_text(yaml.safe_dump(declared | FILLED_IN[kind]))
    assert run("check", "ours")["kind"] == kind
    assert [path.name for path in file.parent.iterdir()] == ["ours.yaml"]


def test_a_new_source_with_a_table(run: Any, conf: Path) -> None:
    made = run("new", "ours", "--kind", "s3", "--layout", "table")
    assert made["fill_in"] == [
        "bucket",
        *(f"table.{k}" for k in ("file", "path", "patient", "subtype", "magnification")),
    ]
    file = conf / "sources" / "ours.yaml"
    with pytest.raises(ConfigError, match=r"bucket, table\.file, table\.path"):
        run("check", "ours")
    file.write_text(file.read_text().replace("file: TO FILL IN", "file: a.csv").replace("TO FILL IN", "something"))
    assert run("check", "ours")["table"]["file"] == "a.csv"


def test_what_is_there_is_not_overwritten(run: Any, conf: Path) -> None:
    run("new", "ours", "--kind", "demo")
    file = conf / "sources" / "ours.yaml"
    file.write_text("mine")
    with pytest.raises(ConfigError, match="is there already"):
        run("new", "ours", "--kind", "demo")
    assert file.read_text() == "mine"


@pytest.mark.parametrize("name", ["Ours", "../ours", "1st", "a b"])
def test_names_that_cannot_be(run: Any, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be a source's name"):
        run("new", name, "--kind", "demo")


def test_the_list_says_how_far_each_has_come(run: Any, conf: Path, tmp_path: Path) -> None:
    from ml.data.manifest import make_manifest
    from ml.data.source_versions import publish_manifest
    from ml.data.sources import fetch_source, load_source

    (conf / "sources").mkdir()
    (conf / "sources" / "bad.yaml").write_text("name: bad\nkind: nothing\n")
    (conf / "sources" / "ours.yaml").write_text("name: ours\nkind: directory\npath: ../../images\n")

    def state() -> dict[str, Any]:
        found: dict[str, Any] = {row["name"]: row for row in run("list")["sources"]}
        return found

    assert state()["ours"]["state"] == "never ingested"
    assert state()["bad"]["state"].startswith("invalid: ")
    assert "unknown kind 'nothing'" in state()["bad"]["state"]
    names = [f"SOB_B_A-14-{case}-100-{n:03d}.png" for case in ("1", "2") for n in (1, 2)]
    write_tree(tmp_path / "images", {name: png(k) for k, name in enumerate(names)})
    own = read_settings()
    store, spec = Store(own.store), load_source("ours", own.conf)
    fetched = fetch_source(spec, store, own)
    assert state()["ours"]["state"] == "fetched, not published"
    made = make_manifest(spec, store, 0, fetched["version"])
    version = publish_manifest(made["manifest"], store)["version"]
    assert state()["ours"] | {"published": ""} == {
        **{"name": "ours", "file": str(conf / "sources" / "ours.yaml"), "kind": "directory", "schedule": None},
        **{"images": 4, "version": version, "published": "", "state": "published"},
    }
    write_tree(tmp_path / "images", {"SOB_B_A-14-3-100-001.png": png(9)})
    fetch_source(spec, store, own)
    assert state()["ours"]["state"] == "published; what was fetched since is not"


def test_a_file_that_cannot_be_used_is_a_row_of_the_list(run: Any, conf: Path) -> None:
    folder = conf / "sources"
    folder.mkdir()
    (folder / "good.yaml").write_text("name: good\nkind: demo\n")
    (folder / "loop.yaml").symlink_to("loop.yaml")
    (folder / ".#good.yaml").symlink_to("somebody@host.1234:5678")
    Path(os.fsdecode(bytes(folder) + b"/\xff.yaml")).write_text("name: other\nkind: demo\n")
    states = {row["name"]: row["state"] for row in run("list")["sources"]}
    assert states.keys() == {"good", "loop", r"\udcff"}
    assert states["good"] == "never ingested"
    assert "a link that leads to no file" in states["loop"]
    assert "make them agree" in states[r"\udcff"]


def test_drawn_pictures_make_a_folder_to_try_a_source_with(run: Any, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    assert run("draw", str(folder), "--images", "82") == {"folder": str(folder), "images": 82}
    assert len(list(folder.rglob("SOB_*.png"))) == 82
    with pytest.raises(ConfigError, match="is there already"):
        run("draw", str(folder))
