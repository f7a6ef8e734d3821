"""Disks that are full, read-only or out of bounds: one error of ours that says where and what to do."""

import errno
import io
import os
import resource
import tempfile
from pathlib import Path

import pytest

from ml.core import store as store_module
from ml.core.disks import explain_os_error, explained_os_errors, write_in_one_step
from ml.core.errors import ConfigError, TryAgain
from ml.core.result_files import write_result
from ml.core.store import Store


def os_error(number: int, name: object = None) -> OSError:
    return OSError(number, os.strerror(number), name)


@pytest.mark.parametrize(
    ("number", "kind", "words"),
    [
        (errno.ENOSPC, ConfigError, r"/here \([\d,]+ MB free\): the disk is full; free some space, or move the store"),
        (errno.EDQUOT, ConfigError, r"/here \([\d,]+ MB free\): this user's quota is used up; free some space"),
        (errno.EFBIG, ConfigError, "a file would be larger than may be; raise the limit by 'ulimit -f'"),
        (errno.EROFS, ConfigError, "here/file: the disk is read-only; mount it for writing, or move the store"),
        (errno.EACCES, ConfigError, "here/file: user .+ has no right to it; give it by chown or chmod"),
        (errno.EPERM, ConfigError, "here/file: user .+ may not change it; see its owner and attributes"),
        (errno.EMFILE, ConfigError, r"here/file: .* this process has [\d,]+ files open .*; raise the limit by 'ulimit"),
        (errno.ENAMETOOLONG, ConfigError, "here/file: the name is too long for this disk; shorten it"),
        (errno.EMLINK, ConfigError, "here/file: a folder above has as many folders or links as this disk allows; move"),
        (errno.ELOOP, ConfigError, "here/file: links on the way lead in circles; remove one of them"),
        (errno.ENOTDIR, ConfigError, "here/file: something on the way is a file and no folder; move it away"),
        (errno.ENXIO, ConfigError, "here/file: it is a socket, or a device or pipe that nobody serves; move it away"),
        (errno.EISDIR, ConfigError, "here/file: it is a folder, where a file is meant; move it away"),
        (
            errno.ESTALE,
            TryAgain,
            r"here/file: its server of files was restarted or .* \(stale file handle\); mount it anew",
        ),
        (errno.EIO, ConfigError, r"here/file: the disk or its server has failed \(I/O error\); the kernel's messages"),
        (errno.ENFILE, TryAgain, r"here/file: this machine has as many open files as its kernel allows .*; try again"),
    ],
)
def test_each_says_where_and_what_to_do(tmp_path: Path, number: int, kind: type[Exception], words: str) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    with pytest.raises(kind, match=words) as caught, explained_os_errors(None):
        raise os_error(number, str(folder / "file"))
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)


def test_an_error_of_a_write_names_the_folder_that_was_written_to(tmp_path: Path) -> None:
    full = rf"^{tmp_path} \([\d,]+ MB free\): the disk is full"
    with pytest.raises(ConfigError, match=full), explained_os_errors(tmp_path / "not" / "made"):
        raise os_error(errno.ENOSPC)


@pytest.mark.parametrize(("number", "kind"), [(errno.EIO, ConfigError), (errno.ESTALE, TryAgain)])
def test_a_broken_disk_is_named_by_the_folder(tmp_path: Path, number: int, kind: type[Exception]) -> None:
    with pytest.raises(kind, match=f"^{tmp_path}: .*(failed|restarted)"), explained_os_errors(tmp_path):
        raise os_error(number)


def test_paths_that_cannot_be(tmp_path: Path) -> None:
    """What the kernel itself says of them, and a name of any length."""
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    for path, words in (
        (tmp_path / ("x" * 300), "x: the name is too long for this disk"),
        (tmp_path / ("x" * 100_000), "…: the name is too long for this disk"),
        (tmp_path / "file" / "a", "file/a: something on the way is a file"),
        (tmp_path / "loop", "loop: links on the way lead in circles"),
        (tmp_path, "it is a folder, where a file is meant"),
    ):
        with pytest.raises(ConfigError, match=words) as caught, explained_os_errors(None):
            path.write_text("a")
        assert len(str(caught.value)) < 600


def test_where_nobody_knows_the_folder_all_that_are_written_to_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BREAKHIS_HOME", str(tmp_path))
    explained = explain_os_error(os_error(errno.ENOSPC))
    assert f"{tmp_path} (" in str(explained)
    assert f"{tempfile.gettempdir()} (" in str(explained)


def test_a_disk_as_the_reason_of_another_error_is_found() -> None:
    wrapped = RuntimeError("could not save")
    wrapped.__cause__ = os_error(errno.EROFS, "/mnt/a")
    assert "/mnt/a: the disk is read-only" in str(explain_os_error(wrapped))


@pytest.mark.parametrize(
    "error",
    [
        ValueError("no"),
        os_error(errno.ENOENT, "/a"),
        os_error(errno.EPERM),
        os_error(errno.EACCES),
        os_error(errno.ENOTDIR),
        OSError("text"),
    ],
)
def test_other_errors_are_not_a_disks(error: Exception) -> None:
    assert explain_os_error(error) is None
    with pytest.raises(type(error)) as caught, explained_os_errors(Path("/tmp")):
        raise error
    assert caught.value is error


def test_no_folder_for_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [str(tmp_path / "none")])
    none = r"No usable temporary directory found in .*none.*; free some space there"
    with pytest.raises(ConfigError, match=none), explained_os_errors(None), tempfile.TemporaryDirectory():
        pass


class FullFile(io.FileIO):
    """A file on a disk that has room for three more bytes."""

    def write(self, data: object) -> int:
        super().write(bytes(data)[:3])  # type: ignore[call-overload]
        raise os_error(errno.ENOSPC)


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file that is opened by its descriptor runs out of disk."""
    monkeypatch.setattr(os, "fdopen", lambda handle, _: FullFile(handle, "w"))


def files_below(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.is_file()]


@pytest.mark.usefixtures("full_disk")
def test_a_file_that_does_not_fit_leaves_nothing(tmp_path: Path) -> None:
    old = tmp_path / "file"
    old.write_bytes(b"as it was")
    store = Store((tmp_path / "store").as_uri())
    for write in (
        lambda: write_in_one_step(old, b"half of it"),
        lambda: write_result(str(old), {"a": 1}),
        lambda: store.put_blob(b"half of it"),
    ):
        with pytest.raises(ConfigError, match=rf"^{tmp_path}.* MB free\): the disk is full"):
            write()
    assert files_below(tmp_path) == ["file"]
    assert old.read_bytes() == b"as it was"


def fill_up(folder: Path) -> None:
    (folder / "half.parquet").write_bytes(b"half")
    raise os_error(errno.ENOSPC)


def test_an_object_that_does_not_fit_leaves_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path.as_uri())
    with pytest.raises(ConfigError, match=rf"^{tmp_path}/tmp \([\d,]+ MB free\): the disk is full"):
        store.create("thing", [1], {}, fill_up)
    assert store.keys("objects") == []
    assert files_below(tmp_path) == []


def test_a_value_that_does_not_fit_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path.as_uri())
    store.compare_and_set("refs/a.json", {"a": 1}, None)

    def write(path: Path, text: str) -> None:
        path.write_bytes(text.encode()[:3])
        raise os_error(errno.ENOSPC)

    monkeypatch.setattr(Path, "write_text", write)
    value, tag = store.read("refs/a.json")
    with pytest.raises(ConfigError, match="the disk is full"):
        store.compare_and_set("refs/a.json", {"a": 2}, tag)
    assert store.read("refs/a.json") == (value, tag)
    assert [name for name in files_below(tmp_path) if not name.endswith(".lock")] == ["a.json"]


def test_a_store_that_may_not_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, **_: object) -> None:
        raise os_error(errno.EACCES, str(path))

    store = Store((tmp_path / "store").as_uri())
    monkeypatch.setattr(Path, "mkdir", refuse)
    for write in (
        lambda: store.put_blob(b"a"),
        lambda: store.put_json("refs/a.json", 1),
        lambda: store.compare_and_set("refs/a.json", 1, None),
        lambda: store.create("thing", [1], {}),
        lambda: store.put_file("refs/a.json", tmp_path / "a"),
    ):
        with pytest.raises(ConfigError, match=rf"^{tmp_path}/store/.*: user .+ has no right to it; give it by"):
            write()


def test_too_many_open_files_in_the_store(tmp_path: Path) -> None:
    store = Store(tmp_path.as_uri())
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    store.put_blob(b"the modules are loaded")
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, before[1]))
    try:
        with pytest.raises(ConfigError, match=rf"^{tmp_path}/objects/.*: cannot be opened, .* 3 files open"):
            store.put_blob(b"one more")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert store_module.Store(tmp_path.as_uri()).put_blob(b"one more")
