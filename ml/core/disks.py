"""Local files: writing one in one step, and our errors for a disk that is full, read-only, broken or out of bounds."""

import errno
import getpass
import os
import resource
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import unquote

from ml.core.errors import BreakhisError, ConfigError, TryAgain
from ml.core.messages import MAX_FAULT, cut_text
from ml.core.settings import read_settings

LARGER_DISK = "move the store (BREAKHIS_STORE), the home folder (BREAKHIS_HOME) or temporary files (TMPDIR) elsewhere"
"""What helps where a disk cannot be written and cannot be mended."""

_SECONDS_UNTIL_ABANDONED = 24 * 3600


def write_in_one_step(path: Path, data: bytes) -> None:
    """Writes a local file, which then has all of its content or is as it was; makes its folder.

    Raises:
        ConfigError: the disk is full, read-only, or forbids it; see :func:`explain_os_error`.
    """
    with explained_os_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        # A hidden file in the target's folder: a rename within one folder makes the file appear in one step.
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


def replace_folder(folder: Path, target: Path) -> None:
    """Moves a whole folder to where what is left of a damaged one may be in the way; the leftovers are deleted."""
    leftovers = folder.with_name(f"{folder.name}.damaged")
    if target.is_symlink() or target.exists():
        target.rename(leftovers)
    folder.rename(target)
    if leftovers.is_dir() and not leftovers.is_symlink():
        shutil.rmtree(leftovers)
    else:
        leftovers.unlink(missing_ok=True)


@contextmanager
def scratch_folder(parent: Path | None) -> Iterator[Path]:
    """Context manager that makes a scratch folder and removes it afterwards.

    Args:
        parent: the folder to make it in, for scratch folders alone: those of killed processes are removed by the next
            call, once nothing has been written to them for a day. None: a folder of the system's for temporary files.

    Raises:
        ConfigError: the disk is full or read-only, or forbids it, also in the block.
    """
    with explained_os_errors(parent):
        if parent:
            parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=parent, prefix="breakhis-", ignore_cleanup_errors=True) as scratch:
            if parent:
                # Both times are the disk's: a host whose clock is ahead would remove what others are writing.
                _remove_old_folders(parent, Path(scratch).stat().st_mtime - _SECONDS_UNTIL_ABANDONED)
            yield Path(scratch)


def _remove_old_folders(parent: Path, before: float) -> None:
    for folder in parent.iterdir():
        with suppress(OSError):  # other processes remove their folders meanwhile
            if max(path.stat().st_mtime for path in (folder, *folder.rglob("*"))) < before:
                shutil.rmtree(folder, ignore_errors=True)


def refuse_special_file(path: Path) -> None:
    """Checks that a file is none that reading waits on for ever. One that is missing passes.

    Raises:
        ConfigError: it is a pipe, a socket or a device.
    """
    try:
        mode = path.stat().st_mode
    except OSError:  # reading says what is wrong
        return
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        kind = "pipe" if stat.S_ISFIFO(mode) else "socket" if stat.S_ISSOCK(mode) else "device"
        raise ConfigError(f"{path}: it is a {kind}, where an ordinary file is meant; move it away")


@contextmanager
def explained_os_errors(folder: Path | None) -> Iterator[None]:
    """Raises our errors for those of a disk, as :func:`explain_os_error` makes them; all others go on as they are.

    Args:
        folder: what the block writes to, for errors of a write, which do not name their file.
    """
    try:
        yield
    except OSError as error:
        if explained := explain_os_error(error, folder):
            raise explained from error
        raise


def explain_os_error(error: BaseException, folder: Path | None = None) -> BreakhisError | None:
    """Returns our error where a disk, a path or a limit on open files is at fault, and not the program.

    Args:
        error: what was raised, also for the reason of such an OSError.
        folder: where it happened, if the error itself names no file.

    Returns:
        TryAgain where the whole machine has too many open files or a server of files was restarted, ConfigError for
        all else, which stays until somebody acts; it names the folder and what to free or change. None for any other
        error.
    """
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__
    if cause is None:
        return None
    if cause.errno == errno.ENOENT and "No usable temporary directory" in (cause.strerror or ""):  # tempfile's own
        return ConfigError(f"{cause.strerror}; free some space there, or set TMPDIR to a folder that can be written")
    if limit := explain_file_limit(cause, folder):
        return limit
    path = _find_path(cause) or (folder if cause.errno in _NAME_NO_FILE else None)
    explain = _EXPLANATIONS.get(cause.errno or 0)
    # Calls that concern no file, such as kill and mount, are refused by the same errors: they are not about a disk.
    if explain is None or not (path or cause.errno in _NEED_ROOM):
        return None
    if cause.errno in _NEED_ROOM:
        return ConfigError(explain.format(place=_describe_room(path)))
    kind = TryAgain if cause.errno == errno.ESTALE else ConfigError
    return kind(explain.format(place=f"{cut_text(path, MAX_FAULT)}: ", user=_find_user()))


def explain_file_limit(error: OSError, folder: Path | None = None) -> BreakhisError | None:
    """Returns our error where a limit on open files is at fault, and not the file; see :func:`explain_os_error`."""
    path = _find_path(error) or folder
    place = f"{path}: " if path else ""
    if error.errno == errno.ENFILE:
        return TryAgain(f"{place}this machine has as many open files as its kernel allows (fs.file-max); try again")
    if error.errno != errno.EMFILE:
        return None
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    return ConfigError(
        f"{place}cannot be opened, since this process has {now:,} files open and may have no more; raise the limit by "
        f"'ulimit -n' (at most {most:,} without an administrator)"
    )


_NEED_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""Errors of a write for which there is no room."""

_NAME_NO_FILE = _NEED_ROOM | {errno.EIO, errno.ESTALE}
"""Errors of reading and writing an open file, which name no file."""

_EXPLANATIONS = {
    errno.ENOSPC: f"{{place}}the disk is full; free some space, or {LARGER_DISK}",
    errno.EDQUOT: f"{{place}}this user's quota is used up; free some space, have it raised, or {LARGER_DISK}",
    errno.EFBIG: "{place}a file would be larger than may be; raise the limit by 'ulimit -f', or use another disk",
    errno.EROFS: f"{{place}}the disk is read-only; mount it for writing, or {LARGER_DISK}",
    errno.EACCES: f"{{place}}user {{user}} has no right to it; give it by chown or chmod, or {LARGER_DISK}",
    errno.EPERM: f"{{place}}user {{user}} may not change it; see its owner and attributes, or {LARGER_DISK}",
    errno.ENAMETOOLONG: "{place}the name is too long for this disk; shorten it, or that of a folder above",
    errno.EMLINK: f"{{place}}a folder above has as many folders or links as this disk allows; {LARGER_DISK}",
    errno.ELOOP: "{place}links on the way lead in circles; remove one of them, or name another path",
    errno.ENOTDIR: "{place}something on the way is a file and no folder; move it away, or name another path",
    errno.EISDIR: "{place}it is a folder, where a file is meant; move it away, or name another path",
    errno.ENXIO: "{place}it is a socket, or a device or pipe that nobody serves; move it away, or name another path",
    errno.ESTALE: "{place}its server of files was restarted or has lost it (stale file handle); mount it anew",
    errno.EIO: "{place}the disk or its server has failed (I/O error); the kernel's messages (dmesg) say more. Mend it, "
    f"or {LARGER_DISK}",
}


def _find_path(error: OSError) -> Path | None:
    """Returns the file that an error names, if it names any."""
    for name in (error.filename2, error.filename):
        if isinstance(name, str | bytes | os.PathLike):
            return Path(os.path.abspath(os.fsdecode(name)))  # noqa: PTH100 - resolve() would follow a link
    return None


def _describe_room(path: Path | None) -> str:
    """Returns the folder of a file and how much is free there; where none is known, all places that we write to."""
    places = [path] if path else _list_places()
    folders = [next((p for p in (place, *place.parents) if p.is_dir()), Path("/")) for place in places]
    shown = (f"{folder} ({shutil.disk_usage(folder).free / 1e6:,.0f} MB free)" for folder in dict.fromkeys(folders))
    return f"{', or '.join(shown)}: "


def _list_places() -> list[Path]:
    """Returns the folders on this machine that we write to."""
    places = []
    with suppress(BreakhisError):
        settings = read_settings()
        if settings.store.startswith("file://"):
            places.append(Path(unquote(settings.store.removeprefix("file://"))))
        places.append(settings.home)
    with suppress(OSError):
        places.append(Path(tempfile.gettempdir()))
    return places or [Path("/")]


def _find_user() -> str:
    with suppress(Exception):  # a container may run as a user without a name
        return getpass.getuser()
    return str(os.getuid())
