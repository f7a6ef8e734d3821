"""Image files in a folder of this machine."""

import errno
import os
import stat
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from ml.core.disks import explain_file_limit, explain_os_error
from ml.core.errors import SourceError, TryAgain
from ml.core.settings import Settings
from ml.data.sources.files import (
    MAX_FILE_BYTES,
    FileReader,
    FileRejected,
    PathFilter,
    RejectedFile,
    is_clutter,
    is_image,
    reject_large_file,
    reject_odd_name,
    require_allowed_count,
    shorten_path,
)


class Directory:
    """The files below ``root``, at any depth; implements :class:`ml.data.sources.files.Files`.

    A link to a file counts as that file if it lies below the root too. Links that lead out of it, dangle or point to
    folders are skipped, so that a source does not depend on other folders and no loop can arise. A file called
    ``a\\b.png``, which some programs make of what Windows packed, is ``a/b.png``.

    Raises:
        SourceError: the folder is missing, a folder below it cannot be listed, or there are more files and folders than
            the settings allow.
        TryAgain: a folder or file disappeared meanwhile.
    """

    def __init__(self, root: Path, settings: Settings, is_wanted: PathFilter = is_image) -> None:
        self.skipped: list[str] = []
        self.rejected: list[RejectedFile] = []
        self._files: dict[str, Path] = {}
        try:
            is_folder = stat.S_ISDIR(root.stat().st_mode)
        except (FileNotFoundError, NotADirectoryError):
            raise SourceError(f"{root}: no such folder; create it, or correct 'path'") from None
        except OSError as error:
            raise SourceError(
                f"{root}: cannot be read ({error.strerror}); make it readable, or correct 'path'"
            ) from None
        if not is_folder:
            raise SourceError(f"{root}: not a folder; 'path' must be the folder that the images lie in (unpacked)")
        self._root = root.resolve()
        for count, (path, is_folder) in enumerate(_walk(self._root), 1):
            require_allowed_count(count, settings.archive_entries, str(root))
            self._add(path, is_folder, is_wanted)
        self.images = sorted(self._files)
        self.skipped.sort()

    def _add(self, path: Path, is_folder: bool, is_wanted: PathFilter) -> None:
        """Takes what was found at a path, or leaves it aside."""
        relative = shorten_path(path.relative_to(self._root).as_posix())
        odd = reject_odd_name(relative)
        shown = odd.path if odd else relative
        if is_folder:
            if path.is_symlink():
                self.skipped.append(f"{shown}/")
            return
        try:
            if not (is_wanted(shown) and self._is_file_below_root(path)):
                self.skipped.append(shown)
                return
        except OSError as error:
            self.rejected.append(_reject_unreadable(path, relative, error))
            return
        if odd:
            self.rejected.append(odd)
            return
        first = self._files.setdefault(relative, path)
        if first != path:
            self._files[relative] = min(first, path, key=str)  # that with / sorts before that with \
            detail = "is there with / and with \\ in its name, and the latter is not taken; rename one of them"
            self.rejected.append(RejectedFile(relative, "name", detail))

    def items(self) -> Iterator[FileReader]:
        """See :meth:`ml.data.sources.files.Files.items`."""
        return ((name, partial(self.read, name)) for name in self.images)

    def read(self, name: str) -> bytes:
        """Reads the bytes of one image."""
        path = self._files[name]
        try:
            size = path.stat().st_size
            if size > MAX_FILE_BYTES:
                raise FileRejected(reject_large_file(name, size))
            return path.read_bytes()
        except OSError as error:
            raise FileRejected(_reject_unreadable(path, name, error)) from None

    def _is_file_below_root(self, path: Path) -> bool:
        """Says whether a path is a regular file below the root, or a link to one.

        Raises:
            OSError: it is no link, and it cannot be told.
        """
        target = Path(os.path.realpath(path)) if path.is_symlink() else path
        try:
            # A pipe with an image's name would block its reader forever.
            return stat.S_ISREG(target.stat().st_mode) and target.is_relative_to(self._root)
        except OSError:
            if path.is_symlink():  # it dangles, or points to itself
                return False
            raise


def _reject_unreadable(path: Path, name: str, error: OSError) -> RejectedFile:
    """Returns a file that cannot be read as one that cannot be taken.

    Raises:
        BreakhisError: not the file is at fault: there are too many open files, or what lies there is changing.
    """
    if limit := explain_file_limit(error, path.parent):
        raise limit from None
    if error.errno == errno.ENOENT:
        raise TryAgain(f"{path}: disappeared meanwhile; fetch again once the folder is at rest") from None
    if error.errno == errno.ESTALE and (stale := explain_os_error(error, path)):
        raise stale from None
    return RejectedFile(name, "unreadable", f"cannot be read ({error.strerror}); make it readable, or remove it")


def _walk(root: Path) -> Iterator[tuple[Path, bool]]:
    """Yields the path of everything below a folder as it is found, and whether it is a folder or a link to one.

    No folder is listed whole first, as ``os.walk`` does: one of millions of files is told before they fill the memory.
    """
    folders = [root]
    while folders:
        folder = folders.pop()
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    is_folder = _is_folder(entry)
                    if is_folder and not entry.is_symlink():
                        folders.append(Path(entry.path))
                    yield Path(entry.path), is_folder
        except FileNotFoundError:
            raise TryAgain(f"{folder}: disappeared meanwhile; fetch again once the folder is at rest") from None
        except OSError as error:
            if limit := explain_file_limit(error, folder):
                raise limit from None
            if any(map(is_clutter, folder.relative_to(root).parts)):  # such as lost+found, which is the system's alone
                continue
            # Unlike with a file, it cannot be told what would be missing.
            raise SourceError(
                f"{folder}: cannot be listed ({error.strerror}); make it readable, or move it away"
            ) from None


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False
