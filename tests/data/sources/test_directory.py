import os
from pathlib import Path

import pytest

from ml.core.errors import ConfigError, SourceError, TryAgain
from ml.core.settings import Settings
from ml.data.sources import directory
from ml.data.sources.directory import Directory
from ml.data.sources.files import FileRejected

SETTINGS = Settings()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    return folder


def put(path: Path, data: bytes = b"picture") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def test_images_are_found_at_any_depth_by_suffix_in_any_case(root: Path) -> None:
    for name in ("a.png", "b/c/d.PNG", "e.JPeG", "f.tif", "g.TIFF", "h.bmp", "i.jpg"):
        put(root / name)
    found = Directory(root, SETTINGS)
    assert found.images == ["a.png", "b/c/d.PNG", "e.JPeG", "f.tif", "g.TIFF", "h.bmp", "i.jpg"]
    assert found.skipped == []
    assert found.read("b/c/d.PNG") == b"picture"


def test_other_files_are_listed_not_dropped(root: Path) -> None:
    for name in ("a.png", "Folds.csv", "deep/.DS_Store", "deep/png", "deep/x.png.part"):
        put(root / name)
    found = Directory(root, SETTINGS)
    assert found.images == ["a.png"]
    assert found.skipped == ["Folds.csv", "deep/.DS_Store", "deep/png", "deep/x.png.part"]


def test_what_systems_add_is_left_aside_and_listed(root: Path) -> None:
    added = ["__MACOSX/a.png", "._a.png", "deep/._b.png", "deep/.ipynb_checkpoints/b-checkpoint.png", "Thumbs.db"]
    added += [".DS_Store", "deep/.AppleDouble/b.png", "@eaDir/a.png/THUMB.jpg", ".Trashes/501/c.png"]
    for name in ("a.png", "deep/b.png", *added):
        put(root / name)
    found = Directory(root, SETTINGS)
    assert found.images == ["a.png", "deep/b.png"]
    assert found.skipped == sorted(added)


def test_a_root_below_a_trash_is_read_like_any(root: Path) -> None:
    put(root / "__MACOSX" / "a.png")
    assert Directory(root / "__MACOSX", SETTINGS).images == ["a.png"]


def test_files_with_backslashes_as_some_unpack_them_lie_in_folders(root: Path) -> None:
    put(root / "a\\b.png", b"b")
    put(root / "a\\._b.png")
    found = Directory(root, SETTINGS)
    assert (found.images, found.skipped) == (["a/b.png"], ["a/._b.png"])
    assert found.read("a/b.png") == b"b"
    put(root / "a" / "b.png", b"in a folder")
    found = Directory(root, SETTINGS)
    assert found.read("a/b.png") == b"in a folder"
    assert [(rejected.path, rejected.reason) for rejected in found.rejected] == [("a/b.png", "name")]
    assert r"is there with / and with \ in its name" in found.rejected[0].detail


def test_a_folder_with_an_images_name_is_a_folder(root: Path) -> None:
    put(root / "x.png" / "y.png")
    assert Directory(root, SETTINGS).images == ["x.png/y.png"]


def test_an_empty_folder_has_no_images(root: Path) -> None:
    found = Directory(root, SETTINGS)
    assert (found.images, found.skipped) == ([], [])


def test_a_missing_folder_is_named(root: Path) -> None:
    with pytest.raises(SourceError, match=r"nowhere: no such folder; create it, or correct 'path'"):
        Directory(root / "nowhere", SETTINGS)


def test_a_file_is_no_folder(root: Path) -> None:
    with pytest.raises(SourceError, match=r"data\.zip: not a folder; .*unpacked"):
        Directory(put(root / "data.zip"), SETTINGS)
    with pytest.raises(SourceError, match=r"no such folder"):
        Directory(root / "data.zip" / "deeper", SETTINGS)


def test_a_root_that_links_to_itself_is_named(root: Path) -> None:
    (root / "loop").symlink_to("loop")
    with pytest.raises(SourceError, match=r"loop: cannot be read \(Too many levels"):
        Directory(root / "loop", SETTINGS)


def test_links_are_not_followed_out_of_the_root_and_loops_end(root: Path) -> None:
    put(root / "a.png", b"a")
    outside = put(root.parent / "outside" / "secret.png").parent
    (root / "alias.png").symlink_to("a.png")
    (root / "secret.png").symlink_to(outside / "secret.png")
    (root / "dangling.png").symlink_to("nowhere.png")
    (root / "circle.png").symlink_to("circle.png")
    (root / "elsewhere").symlink_to(outside)
    (root / "loop").symlink_to(root)
    found = Directory(root, SETTINGS)
    assert found.images == ["a.png", "alias.png"]
    assert found.read("alias.png") == b"a"
    assert found.skipped == ["circle.png", "dangling.png", "elsewhere/", "loop/", "secret.png"]


def test_the_root_itself_may_be_a_link(root: Path) -> None:
    put(root / "a.png")
    link = root.parent / "link"
    link.symlink_to(root)
    assert Directory(link, SETTINGS).images == ["a.png"]


def test_a_pipe_is_no_image(root: Path) -> None:
    os.mkfifo(root / "a.png")
    found = Directory(root, SETTINGS)
    assert (found.images, found.skipped) == ([], ["a.png"])


def test_a_name_that_is_not_utf8_costs_no_other_file(root: Path) -> None:
    put(root / "a.png")
    for name in (b"caf\xe9.png", b"caf\xe9.txt", b"\xe9/b.png"):
        put(Path(os.fsdecode(os.fsencode(root) + b"/" + name)))
    found = Directory(root, SETTINGS)
    assert (found.images, found.skipped) == (["a.png"], [r"caf\xe9.txt"])
    assert sorted((rejected.path, rejected.reason) for rejected in found.rejected) == [
        (r"\xe9/b.png", "name"),
        (r"caf\xe9.png", "name"),
    ]
    assert "the name is not UTF-8, so no table can hold it; rename the file" in found.rejected[0].detail


def test_a_file_that_vanishes_meanwhile_is_named(root: Path) -> None:
    path = put(root / "a.png")
    found = Directory(root, SETTINGS)
    path.unlink()
    with pytest.raises(TryAgain, match=r"a\.png: disappeared meanwhile"):
        found.read("a.png")


def test_a_folder_that_vanishes_meanwhile_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "deep").mkdir()
    is_folder = directory._is_folder

    def remove(entry: "os.DirEntry[str]") -> bool:
        found = is_folder(entry)
        Path(entry.path).rmdir()
        return found

    monkeypatch.setattr(directory, "_is_folder", remove)
    with pytest.raises(TryAgain, match=r"deep: disappeared meanwhile; fetch again"):
        Directory(root, SETTINGS)


def test_an_unreadable_file_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(root / "a.png")
    found = Directory(root, SETTINGS)

    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)  # root may read everything, so chmod would prove nothing
    with pytest.raises(FileRejected, match=r"a\.png: cannot be read \(Permission denied\); make it readable"):
        found.read("a.png")


def test_a_limit_on_open_files_is_no_fault_of_a_file(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(root / "a.png")
    found = Directory(root, SETTINGS)

    def refuse(path: Path) -> bytes:
        raise OSError(24, "Too many open files", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(ConfigError, match=r"a\.png: cannot be opened, since this process has .* files open"):
        found.read("a.png")


def test_a_folder_that_cannot_be_listed_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "locked").mkdir()
    scandir = os.scandir

    def refuse(path: str) -> object:
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(SourceError, match=r"locked: cannot be listed \(Permission denied\)"):
        Directory(root, SETTINGS)
    (root / "locked").rename(root / "lost+found")
    (root / "lost+found" / "locked").mkdir()
    assert Directory(root, SETTINGS).images == []


def test_an_enormous_file_is_not_loaded(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory, "MAX_FILE_BYTES", 10)
    put(root / "a.png", b"x" * 11)
    with pytest.raises(FileRejected, match=r"a\.png: 11 bytes, more than the .* allowed"):
        Directory(root, SETTINGS).read("a.png")


def test_the_number_of_files_and_folders_is_limited_by_a_setting(root: Path) -> None:
    for name in ("a.png", "deep/b.png", "deep/c.txt"):
        put(root / name)
    with pytest.raises(SourceError, match=r"images: more than the 3 files and .* raise BREAKHIS_ARCHIVE_ENTRIES"):
        Directory(root, Settings(archive_entries=3))
    assert Directory(root, Settings(archive_entries=4)).images == ["a.png", "deep/b.png"]


def test_no_folder_is_listed_whole_before_it_is_counted(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(20):
        put(root / f"{number}.png")
    seen: list[Path] = []
    monkeypatch.setattr(directory, "_is_folder", lambda entry: seen.append(entry) or False)
    with pytest.raises(SourceError, match="more than the 3 files"):
        Directory(root, Settings(archive_entries=3))
    assert len(seen) == 4
