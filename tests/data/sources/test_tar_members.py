"""Tar archives as programs write them, and such as nobody should have to read twice."""

import io
import tarfile
import time
import tracemalloc
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ml.core.errors import SourceError
from ml.core.settings import Settings
from ml.data.sources import archive
from ml.data.sources.tar_members import MAX_NAME, read_members

open_archive = partial(archive.open_archive, settings=Settings())
END = bytes(2 * tarfile.BLOCKSIZE)


def extension(kind: bytes, content: bytes) -> bytes:
    """A header that says more about the next member, or about all of them."""
    header = tarfile.TarInfo("./@LongLink")
    header.type, header.size = kind, len(content)
    return header.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % tarfile.BLOCKSIZE)


def record(key: str, value: bytes) -> bytes:
    """A record of a pax header, with its own length before it."""
    rest = b" " + key.encode() + b"=" + value + b"\n"
    length = len(rest)
    while len(str(length)) + len(rest) != length:
        length = len(str(length)) + len(rest)
    return str(length).encode() + rest


def pax(*records: bytes) -> bytes:
    return extension(tarfile.XHDTYPE, b"".join(records))


def member(name: str = "a.png", content: bytes = b"content", kind: bytes = tarfile.REGTYPE) -> bytes:
    header = tarfile.TarInfo(name)
    header.size, header.type = len(content), kind
    return header.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % tarfile.BLOCKSIZE)


def read(data: bytes) -> dict[str, bytes]:
    return {found.name: found.content.read(found.size) for found in read_members(io.BytesIO(data))}


@given(
    contents=st.dictionaries(
        st.text(st.characters(codec="utf-8", exclude_characters="\0/"), min_size=1, max_size=300),
        st.binary(max_size=2000),
    ),
    form=st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    headers=st.dictionaries(st.sampled_from(["comment", "SCHILY.xattr.a", "mtime"]), st.text(max_size=3000)),
)
def test_members_are_those_that_tarfile_wrote(contents: dict[str, bytes], form: int, headers: dict[str, str]) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form, pax_headers=headers) as tar:
        for name, content in contents.items():
            info = tarfile.TarInfo(name)
            info.size, info.pax_headers = len(content), {"LIBARCHIVE.xattr.b": "x" * len(content)}
            tar.addfile(info, io.BytesIO(content))
    assert read(buffer.getvalue()) == contents


@pytest.mark.parametrize(
    ("before", "name"),
    [
        (pax(record("path", b"b.png")), "b.png"),
        (pax(record("path", "é.png".encode()), record("comment", bytes(3000))), "é.png"),
        (pax(record("SCHILY.xattr.x", bytes(3000)), record("path", b"b.png")), "b.png"),
        (pax(record("path", b"b.png") + bytes(100)), "b.png"),
        (pax(record("path", b"b" * MAX_NAME)), "b" * MAX_NAME),
        (pax(record("size", b"7")), "a.png"),
        (extension(tarfile.SOLARIS_XHDTYPE, record("path", b"b.png")), "b.png"),
        (extension(tarfile.XGLTYPE, record("comment", b"a commit's hash")), "a.png"),
        (extension(tarfile.XGLTYPE, record("path", b"c.png")) + pax(record("path", b"b.png")), "b.png"),
        (extension(tarfile.GNUTYPE_LONGNAME, b"b" * 300 + b"\0"), "b" * 300),
        (extension(tarfile.GNUTYPE_LONGLINK, b"b" * 10_000 + b"\0"), "a.png"),
        (pax(record("comment", b"x")) * 2000, "a.png"),  # tarfile reads each within the one before
    ],
)
def test_headers_before_a_member_are_read(before: bytes, name: str) -> None:
    assert read(before + member() + END) == {name: b"content"}


def test_a_size_in_a_pax_header_counts() -> None:
    header = tarfile.TarInfo("a.png").tobuf(tarfile.GNU_FORMAT)  # which says 0
    content = b"content".ljust(tarfile.BLOCKSIZE, b"\0")
    assert read(pax(record("size", b"7")) + header + content + member("b.png") + END) == {
        "a.png": b"content",
        "b.png": b"content",
    }


def test_folders_have_no_content() -> None:
    header = tarfile.TarInfo("a")
    header.type, header.size = tarfile.DIRTYPE, 4096  # some write what the folder takes on its disk
    [folder, file] = read_members(io.BytesIO(header.tobuf(tarfile.GNU_FORMAT) + member() + END))
    assert (folder.kind, file.kind) == ("folder", "file")
    [folder] = read_members(io.BytesIO(member("old/", b"", tarfile.AREGTYPE) + END))
    assert folder.kind == "folder"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (pax(record("path", b"b" * (MAX_NAME + 1))) + member(), "a name of 4,098 bytes, more than 4,096"),
        (extension(tarfile.GNUTYPE_LONGNAME, b"b" * 5000) + member(), "a name of 5,000 bytes, more than 4,096"),
        (pax(b"no record") + member(), "a damaged pax header"),
        (pax(b"5 path=b.png\n") + member(), "a damaged pax header"),
        (pax(b"2000 path=b.png\n") + member(), "ends within a name"),
        (pax(b"2000 comment=b.png\n") + member(), "ends within a record"),
        (pax(record("size", b"-1")) + member(), "a member's size is no number"),
        (member(), "before the mark of its end"),
        (member() + pax(record("path", b"b.png")), "before the mark of its end"),
        (pax(record("size", b"99999999")) + member(), "ends within a member"),
    ],
)
def test_damaged_headers_are_refused(data: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(data)
    with pytest.raises(SourceError, match=rf"a\.tar: not a whole zip or tar archive.*{message}"):
        open_archive(path)


@pytest.mark.parametrize("place", [0, 100, 148, 1024, 1124, 1500])
def test_a_damaged_header_is_not_taken_for_the_end(tmp_path: Path, place: int) -> None:
    data = bytearray(member("a.png") + member("b.png") + member("c.png") + END)
    data[place] ^= 0x55
    path = tmp_path / "a.tar"
    path.write_bytes(data)
    with pytest.raises(SourceError, match="not a whole zip or tar archive"):
        open_archive(path)


@pytest.mark.parametrize("blocks", range(6))
def test_an_unpacked_tar_that_was_cut_off_is_refused(tmp_path: Path, blocks: int) -> None:
    path = tmp_path / "a.tar"
    for length in (blocks * tarfile.BLOCKSIZE, blocks * tarfile.BLOCKSIZE + 100):
        path.write_bytes((member("a.png") + member("b.png") + member("c.png") + END)[:length])
        with pytest.raises(SourceError, match="not a whole zip or tar archive"):
            open_archive(path)


def test_files_with_holes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    for data in (pax(record("GNU.sparse.major", b"1")) + member(), member(kind=tarfile.GNUTYPE_SPARSE)):
        path.write_bytes(data + END)
        with pytest.raises(SourceError, match=r"'a\.png' is a file with holes \(packed with --sparse\)"):
            open_archive(path)


def test_a_name_that_is_not_utf8_costs_no_other_file(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    names = ("caf\udce9.png", "caf\udce9.txt", "a.png")
    headers = [tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape") for name in names]
    path.write_bytes(b"".join(headers) + END)
    with open_archive(path) as found:
        assert (found.images, found.skipped) == (["a.png"], ["caf\\xe9.txt"])
        assert [(rejected.path, rejected.reason) for rejected in found.rejected] == [("caf\\xe9.png", "name")]
        assert "not UTF-8, so no table can hold it; rename the file" in found.rejected[0].detail


# --- headers made to cost time and memory -----------------------------------------------------------------------------

MB = 2**20


class Made:
    """A file that is made while it is read."""

    def __init__(self, *parts: bytes | tuple[bytes, int]) -> None:
        self._chunks = self._make(parts)
        self._ahead = b""

    def _make(self, parts: tuple[bytes | tuple[bytes, int], ...]) -> Iterator[bytes]:
        for part in parts:
            if isinstance(part, bytes):
                yield part
            else:
                yield from (part[0] for _ in range(part[1]))

    def read(self, size: int) -> bytes:
        while len(self._ahead) < size and (chunk := next(self._chunks, b"")):
            self._ahead += chunk
        data, self._ahead = self._ahead[:size], self._ahead[size:]
        return data


def header_of(kind: bytes, size: int) -> bytes:
    header = tarfile.TarInfo("x")
    header.type, header.size = kind, size
    return header.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK])
def test_a_header_of_any_length_takes_little_memory(kind: bytes) -> None:
    start = str(256 * MB).encode() + b" LIBARCHIVE.xattr.com.apple.ResourceFork="
    content = start, (bytes(MB), 255), bytes(MB - len(start))
    tracemalloc.start()
    try:
        [found] = read_members(Made(header_of(kind, 256 * MB), *content, member(), END))  # type: ignore[arg-type]
        assert tracemalloc.get_traced_memory()[1] < 16 * MB
    finally:
        tracemalloc.stop()
    assert found.name == "a.png"


def test_a_long_name_is_not_read() -> None:
    made = Made(header_of(tarfile.GNUTYPE_LONGNAME, 2**40), (b"x" * MB, 2))
    with pytest.raises(tarfile.ReadError, match=r"a name of 1,099,511,627,776 bytes"):
        list(read_members(made))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "content",
    [
        b"1" * MB,  # digits without an end
        b"5 a=\n" * (MB // 5),  # many records
        b"9" * 20 + b" path=",
        b"7 " * (MB // 2) + b"=",  # keys that reach to the end
        record("path", b"b" * 1000) * 1000,
        b"".join(record(f"key{number}", b"") for number in range(60_000)),
    ],
)
def test_a_header_of_a_megabyte_takes_linear_time(content: bytes) -> None:
    start = time.process_time()
    try:
        read(pax(content) + member() + END)
    except tarfile.ReadError as error:
        assert "pax header" in str(error) or "a name of" in str(error)  # noqa: PT017 (some of them are whole)
    assert time.process_time() - start < 3
