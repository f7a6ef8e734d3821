import contextlib
import io
import random
import stat
import tarfile
import tracemalloc
import zipfile
from functools import partial
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kaggle_server import mirror_zip, some_names

from ml.core.errors import SourceError
from ml.core.settings import Settings
from ml.data.sources import archive
from ml.data.sources.archive import TarArchive
from ml.data.sources.files import is_image

ZipArchive = partial(archive.ZipArchive, settings=Settings())
open_archive = partial(archive.open_archive, settings=Settings())


def zipped(path: Path, *members: tuple[str | zipfile.ZipInfo, bytes], compression: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, data in members:
            file.writestr(name, data)
    return path


def packed(path: Path, *members: tuple[str, bytes]) -> Path:
    return zipped(path, *members) if path.suffix == ".zip" else tarred(path, *members)


def test_images_are_read_in_the_mirrors_layout(tmp_path: Path) -> None:
    path = tmp_path / "mirror.zip"
    path.write_bytes(mirror_zip(some_names()))
    with ZipArchive(path) as found:
        assert len(found.images) == 2 * 82
        assert found.images[0].startswith(
            "dataset_cancer_v1/dataset_cancer_v1/classificacao_binaria/100X/benign/SOB_B_A-"
        )
        assert found.skipped == ["dataset_cancer_v1/dataset_cancer_v1/leia-me.txt"]
        twins = [found.read(name) for name in found.images if name.endswith("SOB_B_A-14-22549AB-100-001.png")]
        assert len(twins) == 2
        assert twins[0] == twins[1]
        assert found.unpacked_bytes == sum(len(found.read(name)) for name in found.images)


@pytest.mark.parametrize(
    "name", ["/etc/x.png", "../x.png", "a/../../x.png", "..\\x.png", "\\x.png", "C:\\x.png", "../x.txt"]
)
def test_names_that_lead_out_are_refused(tmp_path: Path, name: str) -> None:
    path = zipped(tmp_path / "a.zip", ("ok.png", b"x"), (name, b"x"))
    with pytest.raises(SourceError, match=r"a\.zip: the name .* leads out of the archive"):
        ZipArchive(path)


def test_names_with_dots_are_no_offence(tmp_path: Path) -> None:
    with ZipArchive(zipped(tmp_path / "a.zip", ("a..b/..c/d...png", b"x"))) as found:
        assert found.images == ["a..b/..c/d...png"]


def test_links_are_refused(tmp_path: Path) -> None:
    link = zipfile.ZipInfo("link.png")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with pytest.raises(SourceError, match=r"'link\.png' is a link"):
        ZipArchive(zipped(tmp_path / "a.zip", (link, b"/etc/passwd")))


def test_a_file_without_a_name_is_left_aside(tmp_path: Path) -> None:
    path = zipped(tmp_path / "a.zip", ("x", b""), ("y.png", b"y"))
    path.write_bytes(path.read_bytes().replace(b"x", b"\0"))  # zipfile takes a name to end there
    with ZipArchive(path) as found:
        assert (found.images, found.skipped) == (["y.png"], [""])


def test_folders_are_neither_images_nor_skipped(tmp_path: Path) -> None:
    with ZipArchive(zipped(tmp_path / "a.zip", ("x.png/", b""), ("x.png/y.png", b"y"))) as found:
        assert (found.images, found.skipped) == (["x.png/y.png"], [])


def test_a_name_met_twice_is_refused(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="Duplicate name"):
        path = zipped(tmp_path / "a.zip", ("a.png", b"1"), ("a.png", b"2"))
    with pytest.raises(SourceError, match=r"'a\.png' is in it twice"):
        ZipArchive(path)


def test_a_bomb_is_refused_before_anything_is_unpacked(tmp_path: Path) -> None:
    path = zipped(tmp_path / "a.zip", ("a.png", bytes(30 * 2**20)))
    assert path.stat().st_size < 100_000
    with pytest.raises(SourceError, match=r"would unpack to 31,457,280, more than 100 times as many"):
        ZipArchive(path)


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_one_enormous_file_costs_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(archive, "MAX_FILE_BYTES", 1000)
    with open_archive(packed(tmp_path / f"a.{kind}", ("a.png", bytes(1001)), ("b.png", b"b"))) as found:
        assert [(name, read()) for name, read in found.items()] == [("b.png", b"b")]
        assert [(path, reason) for path, reason, _ in found.rejected] == [("a.png", "size")]
        assert "1,001 bytes, more than" in found.rejected[0].detail


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_the_number_of_entries_is_limited_by_a_setting(tmp_path: Path, kind: str) -> None:
    path = packed(tmp_path / f"a.{kind}", *((f"{n}.txt", b"") for n in range(4)))
    with pytest.raises(SourceError, match=r"a\..*: more than the 3 files and .* raise BREAKHIS_ARCHIVE_ENTRIES"):
        archive.open_archive(path, Settings(archive_entries=3))
    with archive.open_archive(path, Settings(archive_entries=4)) as found:
        assert len(found.skipped) == 4


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
@pytest.mark.parametrize("name", ["a.png", "a.csv"])
def test_the_unpacked_size_is_limited_by_a_setting(tmp_path: Path, kind: str, name: str) -> None:
    noise = random.Random(0).randbytes(600_000)  # within the ratio
    path = packed(tmp_path / f"a.{kind}", (name, noise), (f"b/{name}", noise))
    with pytest.raises(SourceError, match=r"a\..*: unpacks to more than the 1 MB allowed; .* BREAKHIS_ARCHIVE_SIZE"):
        archive.open_archive(path, Settings(archive_size=1))
    with archive.open_archive(path, Settings(archive_size=2)) as found:
        assert len(found.images) + len(found.skipped) == 2


def test_a_declared_size_that_lies_gives_an_error_not_more_bytes(tmp_path: Path) -> None:
    path = zipped(tmp_path / "a.zip", ("a.png", bytes(5000)))
    data = path.read_bytes()
    assert data.count((5000).to_bytes(4, "little")) == 2  # in the local header and in the directory
    path.write_bytes(data.replace((5000).to_bytes(4, "little"), (50).to_bytes(4, "little")))
    with ZipArchive(path) as found, pytest.raises(SourceError, match=r"a\.png in it is damaged"):
        found.read("a.png")


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
def test_a_truncated_archive_is_refused(tmp_path: Path, share: float) -> None:
    path = tmp_path / "a.zip"
    data = mirror_zip(some_names()[:5])
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(SourceError, match=r"a\.zip: not a whole zip archive"):
        ZipArchive(path)


def test_a_web_page_is_no_archive(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    path.write_text("<html>Please sign in</html>")
    with pytest.raises(SourceError, match=r"not a whole zip archive"):
        ZipArchive(path)


def test_a_damaged_image_is_named(tmp_path: Path) -> None:
    path = zipped(
        tmp_path / "a.zip", ("a.png", b"good bytes"), ("b.png", b"more bytes"), compression=zipfile.ZIP_STORED
    )
    path.write_bytes(path.read_bytes().replace(b"more bytes", b"more bites"))
    with ZipArchive(path) as found:
        assert found.read("a.png") == b"good bytes"
        with pytest.raises(SourceError, match=r"a\.zip: b\.png in it is damaged"):
            found.read("b.png")


def test_an_encrypted_image_is_named(tmp_path: Path) -> None:
    path = zipped(tmp_path / "a.zip", ("a.png", b"bytes"), compression=zipfile.ZIP_STORED)
    data = bytearray(path.read_bytes())
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(signature) + flags] |= 1
    path.write_bytes(data)
    with ZipArchive(path) as found, pytest.raises(SourceError, match=r"a\.png in it is damaged or cannot be unpacked"):
        found.read("a.png")


@pytest.fixture(scope="module")
def whole() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for number in range(3):
            file.writestr(f"folder/{number}.png", bytes(range(number, 60 + number)) * 3)
    return buffer.getvalue()


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.booleans(), st.floats(0, 0.9999), st.integers(0, 255)), min_size=1, max_size=8))
def test_no_damage_brings_anything_but_a_source_error(
    tmp_path: Path, whole: bytes, changes: list[tuple[bool, float, int]]
) -> None:
    data = bytearray(whole)
    directory = whole.index(b"PK\x01\x02")
    for in_directory, place, value in changes:
        start = directory if in_directory else 0
        data[start + int(place * (len(data) - start))] = value
    path = tmp_path / "a.zip"
    path.write_bytes(data)
    with contextlib.suppress(SourceError), ZipArchive(path) as found:
        for name in found.images:
            found.read(name)


# --- tar ----------------------------------------------------------------------------------------------------


def tarred(path: Path, *members: tuple[str, bytes] | tarfile.TarInfo, mode: str = "w:gz") -> Path:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                entry = tarfile.TarInfo(member[0])
                entry.size = len(member[1])
                tar.addfile(entry, io.BytesIO(member[1]))
    return path


def special(name: str, kind: bytes) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, "/etc/passwd"
    return entry


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_a_tar_is_read_like_a_zip(tmp_path: Path, mode: str) -> None:
    path = tarred(tmp_path / "a.tar", ("b/2.png", b"two"), special("b", tarfile.DIRTYPE), ("r.txt", b""), mode=mode)
    with open_archive(path) as found:
        assert isinstance(found, TarArchive)
        assert (found.images, found.skipped, found.unpacked_bytes) == (["b/2.png"], ["r.txt"], 3)
        assert [(name, read()) for name, read in found.items()] == [("b/2.png", b"two")]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("../x.png", b"")], "leads out of the archive"),
        ([special("x.png", tarfile.SYMTYPE)], "is a link"),
        ([special("x.png", tarfile.LNKTYPE)], "is a link"),
        ([special("x.png", tarfile.CHRTYPE)], "is a device"),
        ([special("x.png", tarfile.FIFOTYPE)], "is a device"),
        ([("x.png", b"1"), ("x.png", b"2")], "is in it twice"),
        ([("x.png", bytes(2**26))], "would unpack to"),
    ],
)
def test_tars_that_no_honest_publisher_makes(tmp_path: Path, members: list[tarfile.TarInfo], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        open_archive(tarred(tmp_path / "a.tar.gz", *members))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(st.data())
def test_a_tar_that_was_cut_off_is_refused(tmp_path: Path, data: st.DataObject) -> None:
    whole = tarred(tmp_path / "a.tar.gz", ("x.png", bytes(range(256)) * 20), ("y.png", b"y" * 3000)).read_bytes()
    path = tmp_path / "cut.tar.gz"
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(SourceError, match="not a whole zip or tar archive"):
        open_archive(path)


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_a_member_is_called_the_same_with_and_without_a_dot(tmp_path: Path, kind: str) -> None:
    names = ["./", "./b.csv", "./a/./1.png", "a//2.png", "3.png", "./a/._1.png"]
    path = tmp_path / f"a.{kind}"
    if kind == "zip":
        zipped(path, *((name, b"" if name.endswith("/") else b"x") for name in names))
    else:
        with tarfile.open(path, "w") as tar:
            for name in names[1:]:
                member = tarfile.TarInfo(name)
                member.size = 1
                tar.addfile(member, io.BytesIO(b"x"))
    with open_archive(path, is_wanted=lambda name: is_image(name) or name == "b.csv") as found:
        assert found.images == ["3.png", "a/1.png", "a/2.png", "b.csv"]
        assert found.skipped == ["a/._1.png"]
        assert {name: read() for name, read in found.items()} == dict.fromkeys(found.images, b"x")


def test_the_same_member_with_and_without_a_dot_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"'a\.png' is in it twice"):
        ZipArchive(zipped(tmp_path / "a.zip", ("a.png", b"x"), ("./a.png", b"y")))


# --- archives as people make them -------------------------------------------------------------------------------------

CLUTTER = ["._1.png", "a/._2.png", "__MACOSX/a/._1.png", "__MACOSX/1.png", "a/.ipynb_checkpoints/1-checkpoint.png"]
CLUTTER += [".AppleDouble/1.png", "@eaDir/1.png/THUMB_M.jpg", ".Trash-1000/files/1.png", "$RECYCLE.BIN/$R1.png"]
CLUTTER += [".DS_Store", "a/.DS_Store", "Thumbs.db", "a/desktop.ini", ".ipynb_checkpoints/x.ipynb"]


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_what_systems_add_is_left_aside_and_listed(tmp_path: Path, kind: str) -> None:
    path = packed(tmp_path / f"a.{kind}", *((name, name.encode()) for name in ["a/1.png", "a/2.PNG", *CLUTTER]))
    with open_archive(path) as found:
        assert found.images == ["a/1.png", "a/2.PNG"]
        assert found.skipped == sorted(CLUTTER)
        assert {name: read() for name, read in found.items()} == {"a/1.png": b"a/1.png", "a/2.PNG": b"a/2.PNG"}


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_backslashes_are_slashes(tmp_path: Path, kind: str) -> None:
    names = [".\\b.csv", "a\\b\\1.png", "a\\__MACOSX\\2.png", "a\\._1.png"]
    path = packed(tmp_path / f"a.{kind}", *((name, b"x") for name in names))
    with open_archive(path, is_wanted=lambda name: is_image(name) or name == "b.csv") as found:
        assert found.images == ["a/b/1.png", "b.csv"]
        assert found.skipped == ["a/._1.png", "a/__MACOSX/2.png"]
        assert {name: read() for name, read in found.items()} == dict.fromkeys(found.images, b"x")


def test_a_folder_with_a_backslash_at_its_end_is_a_folder(tmp_path: Path) -> None:
    with ZipArchive(zipped(tmp_path / "a.zip", ("x.png\\", b""), ("x.png\\y.png", b"y"))) as found:
        assert (found.images, found.skipped) == (["x.png/y.png"], [])


def test_the_same_member_with_both_slashes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"'a/b\.png' is in it twice"):
        ZipArchive(zipped(tmp_path / "a.zip", ("a/b.png", b"x"), ("a\\b.png", b"y")))


def test_a_directory_of_too_many_entries_is_not_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = zipped(tmp_path / "a.zip", *((f"{number}.txt", b"") for number in range(100)))
    made: list[zipfile.ZipInfo] = []
    monkeypatch.setattr(zipfile, "ZipInfo", lambda *arguments: made.append(zipfile.ZipInfo(*arguments)))
    with pytest.raises(SourceError, match="more than the 99 files and folders allowed"):
        archive.open_archive(path, Settings(archive_entries=99))
    assert not made


def test_a_directory_of_too_many_bytes_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "many.zip"
    with zipfile.ZipFile(path, "w") as made:
        for number in range(40):
            member = zipfile.ZipInfo(f"{number}.png")
            member.comment = bytes(60_000)
            made.writestr(member, b"x")
    tracemalloc.start()
    try:
        with pytest.raises(
            SourceError, match=r"many\.zip: its directory is 2,40\d,\d{3} bytes, more than the 1,060,576"
        ):
            archive.open_archive(path, Settings(archive_entries=40))
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()
    with archive.open_archive(path, Settings(archive_entries=6000)) as found:
        assert len(found.images) == 40


def test_a_member_larger_than_any_directory_is_read(tmp_path: Path) -> None:
    path = tmp_path / "large.zip"
    with zipfile.ZipFile(path, "w") as made:
        made.writestr("large.png", bytes(5_000_000))
    with archive.open_archive(path, Settings(archive_entries=1)) as found:
        assert [len(read()) for _, read in found.items()] == [5_000_000]


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_a_name_that_no_system_allows_is_refused(tmp_path: Path, kind: str) -> None:
    with open_archive(packed(tmp_path / f"a.{kind}", ("a/" * 2046 + ".png", b""))) as found:
        assert len(found.images + found.skipped) == 1
    with pytest.raises(SourceError, match=r"b\..*a name of 4,09. bytes, more than 4,096"):
        open_archive(packed(tmp_path / f"b.{kind}", ("a/" * 2047 + ".png", b"")))


@pytest.mark.parametrize(
    ("method", "named"), [(zipfile.ZIP_BZIP2, "bzip2"), (zipfile.ZIP_LZMA, "LZMA"), (98, "PPMd"), (77, "method 77")]
)
def test_a_zip_of_other_methods_is_refused_before_anything_is_unpacked(tmp_path: Path, method: int, named: str) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as made:
        made.writestr("notes.txt", b"not taken" * 50, zipfile.ZIP_BZIP2)
        made.writestr("a.png", b"a" * 500, zipfile.ZIP_DEFLATED)
        made.writestr("b.png", b"b" * 500, method if method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA) else 0)
    if method not in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):  # Python writes no such archive
        data = path.read_bytes()
        entry = data.rindex(b"PK\1\2")
        path.write_bytes(data[: entry + 10] + method.to_bytes(2, "little") + data[entry + 12 :])
    other = rf"a\.zip: 'b\.png' is packed by {named}, and only deflate is read; pack the files again, by 'zip -r'"
    with pytest.raises(SourceError, match=other):
        open_archive(path)


def test_other_files_of_a_zip_may_be_packed_by_any_method(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as made:
        made.writestr("notes.txt", b"not taken" * 50, zipfile.ZIP_BZIP2)
        made.writestr("a.png", b"a" * 500)
    with open_archive(path) as found:
        assert (found.images, found.skipped) == (["a.png"], ["notes.txt"])
