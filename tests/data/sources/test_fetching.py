import hashlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import pytest

from ml.core.errors import SourceError
from ml.core.settings import Settings
from ml.core.store import Store
from ml.data.sources import SourceSpec, demo, fetch_source
from ml.data.sources.fetching import _create_raw_version, _map_in_threads, _reuse_or_make, _Row

Declare = Callable[..., SourceSpec]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    for number in range(5):
        path = folder / ("deep" if number % 2 else "") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"picture %d" % number)
    return folder


def test_a_folder_becomes_blobs_and_a_raw_version(
    declare: Declare, images: Path, store: Store, settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    (images / "notes.txt").write_text("notes")
    result = fetch_source(declare(kind="directory", path=str(images)), store, settings)
    raw = result["version"]
    assert result == {"source": "mine", "kind": "directory", "version": raw, "files": 5, "bytes": 45} | {
        "skipped": 1,
        "rejected": 0,
    }
    meta = store.meta(raw)
    assert meta["skipped_names"] == ["notes.txt"]
    assert meta["origin"] == {"path": str(images)}
    listing = pd.read_parquet(store.file(raw, "files.parquet"))
    assert list(listing["path"]) == ["0.png", "2.png", "4.png", "deep/1.png", "deep/3.png"]
    assert str(listing["bytes"].dtype) == "int64"
    for path, sha256, size in listing.itertuples(index=False):
        data = (images / path).read_bytes()
        assert store.blob(sha256) == data
        assert hashlib.sha256(data).hexdigest() == sha256
        assert len(data) == size
    assert store.read("refs/raw/mine.json")[0]["raw"] == raw
    said = capsys.readouterr()
    assert said.out == ""
    assert "mine: 1 other files left aside, such as notes.txt" in said.err


def test_the_version_follows_from_names_and_content_alone(
    declare: Declare, images: Path, store: Store, settings: Settings
) -> None:
    spec = declare(kind="directory", path=str(images))
    first = fetch_source(spec, store, settings)["version"]
    ref = store.read("refs/raw/mine.json")
    moved = images.rename(images.with_name("moved"))
    again = declare(kind="directory", path=str(moved))
    assert fetch_source(again, store, settings)["version"] == first
    assert store.read("refs/raw/mine.json") == ref  # not even the time has changed
    (moved / "0.png").write_bytes(b"another")
    changed = fetch_source(again, store, settings)["version"]
    (moved / "0.png").rename(moved / "zero.png")
    renamed = fetch_source(again, store, settings)["version"]
    assert len({first, changed, renamed}) == 3
    assert store.read("refs/raw/mine.json")[0]["raw"] == renamed
    assert fetch_source(declare("other", kind="directory", path=str(moved)), store, settings)["version"] != renamed


@pytest.mark.parametrize("other", ["", "readme.txt"])
def test_a_folder_without_images_is_an_error_and_leaves_nothing(
    tmp_path: Path, declare: Declare, store: Store, settings: Settings, other: str
) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    if other:
        (folder / other).touch()
    with pytest.raises(
        SourceError, match=r"mine\.yaml: no image files below .*/empty.*; looked for \.bmp \.jpeg"
    ) as error:
        fetch_source(declare(kind="directory", path=str(folder)), store, settings)
    assert ("(1 other files, such as readme.txt)" in str(error.value)) == bool(other)
    assert store.keys("objects") == []
    assert store.keys("refs/raw") == []


def test_a_missing_folder_is_named(tmp_path: Path, declare: Declare, store: Store, settings: Settings) -> None:
    with pytest.raises(SourceError, match="gone: no such folder"):
        fetch_source(declare(kind="directory", path=str(tmp_path / "gone")), store, settings)


def test_a_file_that_cannot_be_read_costs_no_other(
    declare: Declare, images: Path, store: Store, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_bytes = Path.read_bytes

    def refuse(path: Path) -> bytes:
        if path.name == "3.png":
            raise PermissionError(13, "Permission denied", str(path))
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    spec = declare(kind="directory", path=str(images))
    without = fetch_source(spec, store, settings)
    assert (without["files"], without["rejected"]) == (4, 1)
    [row] = pd.read_parquet(store.file(without["version"], "rejected.parquet")).itertuples(index=False)
    assert row[:2] == ("deep/3.png", "unreadable")
    assert row.detail == "cannot be read (Permission denied); make it readable, or remove it"
    monkeypatch.undo()
    whole = fetch_source(spec, store, settings)
    assert (whole["files"], whole["rejected"]) == (5, 0)
    assert whole["version"] != without["version"]


def test_where_no_file_can_be_read_nothing_is_recorded(
    declare: Declare, images: Path, store: Store, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    spec = declare(kind="directory", path=str(images))
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(SourceError, match=r"mine\.yaml: none of its 5 image files can be taken; the first, 0\.png: "):
        fetch_source(spec, store, settings)
    assert store.keys("objects/raw") == []
    assert store.keys("refs/raw") == []


def test_demo_pictures_are_drawn_once(
    declare: Declare, store: Store, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = fetch_source(declare("demo", kind="demo", images=82, seed=3), store, settings)
    assert first["files"] == 82
    assert store.meta(first["version"])["origin"]["seed"] == 3
    listing = pd.read_parquet(store.file(first["version"], "files.parquet"))
    assert all(store.blob(sha256).startswith(b"\x89PNG") for sha256 in listing["sha256"])

    def draw_nothing(images: int, seed: int, workers: int) -> Iterator[tuple[str, bytes]]:
        raise AssertionError("drawn again")

    monkeypatch.setattr(demo, "draw_files", draw_nothing)
    assert fetch_source(declare("demo", kind="demo", images=82, seed=3), store, settings) == first
    with pytest.raises(AssertionError, match="drawn again"):
        fetch_source(declare("demo", kind="demo", images=82, seed=4), store, settings)


def test_few_files_are_in_memory_at_a_time() -> None:
    taken: list[int] = []
    given = 0

    def items() -> Iterator[int]:
        for number in range(200):
            taken.append(number)
            yield number

    for _ in _map_in_threads(lambda number: time.sleep(0.0001) or number, items()):
        given += 1
        assert len(taken) - given <= 20
    assert given == 200


def test_results_keep_their_order_and_the_first_error_ends_it() -> None:
    def work(number: int) -> int:
        time.sleep(0.001 * (number % 3))
        if number == 50:
            raise ValueError("fifty")
        return number

    results: list[int] = []
    with pytest.raises(ValueError, match="fifty"):
        results.extend(_map_in_threads(work, iter(range(10_000))))
    assert results == list(range(50))


def test_files_that_macos_puts_beside_pictures_are_left_aside_and_counted(
    declare: Declare, images: Path, store: Store, settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in list(images.rglob("*.png")):
        path.with_name(f"._{path.name}").write_bytes(b"\0\5\x16\7")
    result = fetch_source(declare(kind="directory", path=str(images)), store, settings)
    assert (result["files"], result["skipped"]) == (5, 5)
    assert "mine: 5 other files left aside, such as ._0.png, ._2.png, ._4.png" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "made_anew"), [("a/1.png", False), ("./a/1.png", True), ("a/._1.png", True)])
def test_what_an_early_release_called_otherwise_is_read_anew(
    declare: Declare, store: Store, name: str, made_anew: bool
) -> None:
    spec = declare(kind="http", url="https://example.org/a.tar", sha256="0" * 64)
    old = _create_raw_version(spec, [_Row(name, "0" * 64, 1)], [], store, {})
    new = _create_raw_version(spec, [_Row("b.png", "0" * 64, 1)], [], store, {})
    identity = {"sha256": spec.model_dump()["sha256"]}
    assert _reuse_or_make(spec, identity, store, lambda: old) == old
    assert _reuse_or_make(spec, identity, store, lambda: new) == (new if made_anew else old)
