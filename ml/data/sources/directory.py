"""Image files in a folder of this machine."""

import os
import stat
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from ml.core.disks import explain_file_limit
from ml.core.errors import SourceError
from ml.core.messages import quote_value
from ml.core.settings import Settings
from ml.data.sources.files import (
    MAX_FILE_BYTES,
    FileReader,
    PathFilter,
    is_image,
    require_allowed_count,
    shorten_path,
)


class Directory:
    """The files below ``root``, at any depth; implements :class:`ml.data.sources.files.Files`.

    A link to a file counts as that file if it lies below the root too. Links that lead out of it, dangle or point to
    folders are skipped, so that a source does not depend on other folders and no loop can arise. A file called
    ``a\\b.png``, which some programs make of what Windows packed, is ``a/b.png``.

    Raises:
        SourceError: the folder is missing, a folder below it cannot be listed, two files have one name, or there are
            more files and folders than the settings allow.
    """

    def __init__(self, root: Path, settings: Settings, is_wanted: PathFilter = is_image) -> None:
        self.skipped: list[str] = []
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
            if is_folder:
                if path.is_symlink():
                    self.skipped.append(f"{self._relative_path(path)}/")
                continue
            relative = shorten_path(self._relative_path(path))
            if not (is_wanted(relative) and self._is_file_below_root(path)):
                self.skipped.append(relative)
                continue
            if relative in self._files:
                raise SourceError(f"{root}: {quote_value(relative)} is there with / and with \\; rename one of them")
            self._files[relative] = path
        self.images = sorted(self._files)
        self.skipped.sort()

    def items(self) -> Iterator[FileReader]:
        """See :meth:`ml.data.sources.files.Files.items`."""
        return ((name, partial(self.read, name)) for name in self.images)

    def read(self, name: str) -> bytes:
        """Reads the bytes of one image."""
        path = self._files[name]
        try:
            size = path.stat().st_size
            if size > MAX_FILE_BYTES:
                raise SourceError(f"{path}: {size:,} bytes, more than the {MAX_FILE_BYTES:,} allowed; remove the file")
            return path.read_bytes()
        except FileNotFoundError:
            raise SourceError(f"{path}: disappeared meanwhile; fetch again once the folder is at rest") from None
        except OSError as error:
            raise explain_file_limit(error) or SourceError(
                f"{path}: cannot be read ({error.strerror}); make it readable, or remove it"
            ) from None

    def _is_file_below_root(self, path: Path) -> bool:
        """Says whether a path is a regular file below the root, or a link to one."""
        target = Path(os.path.realpath(path)) if path.is_symlink() else path
        try:
            # A pipe with an image's name would block its reader forever.
            return stat.S_ISREG(target.stat().st_mode) and target.is_relative_to(self._root)
        except OSError as error:
            if path.is_symlink():  # it dangles, or points to itself
                return False
            raise SourceError(f"{path}: cannot be read ({error.strerror}); make it readable, or remove it") from None

    def _relative_path(self, path: Path) -> str:
        """Returns the POSIX path relative to the root; raises SourceError if its name is not UTF-8."""
        name = path.relative_to(self._root).as_posix()
        try:
            name.encode()
        except UnicodeEncodeError:
            shown = os.fsencode(path).decode(errors="backslashreplace")
            raise SourceError(f"{shown}: the name is not UTF-8, so no table can hold it; rename the file") from None
        return name


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
        except OSError as error:
            raise explain_file_limit(error) or SourceError(
                f"{folder}: cannot be listed ({error.strerror}); make it readable, or move it away"
            ) from None


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False
