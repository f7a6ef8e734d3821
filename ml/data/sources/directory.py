"""Image files in a folder of this machine."""

import os
import stat
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from ml.core.disks import explain_file_limit
from ml.core.errors import SourceError
from ml.core.messages import quote_value
from ml.data.sources.files import MAX_FILE_BYTES, FileReader, PathFilter, is_image, shorten_path


class Directory:
    """The files below ``root``, at any depth; implements :class:`ml.data.sources.files.Files`.

    A link to a file counts as that file if it lies below the root too. Links that lead out of it, dangle or point to
    folders are skipped, so that a source does not depend on other folders and no loop can arise. A file called
    ``a\\b.png``, which some programs make of what Windows packed, is ``a/b.png``.

    Raises:
        SourceError: the folder is missing, a folder below it cannot be listed, or two files have one name.
    """

    def __init__(self, root: Path, is_wanted: PathFilter = is_image) -> None:
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
        for folder, folders, names in os.walk(self._root, onerror=_raise_cannot_list):
            parent = Path(folder)
            self.skipped += [
                f"{self._relative_path(parent / name)}/" for name in folders if (parent / name).is_symlink()
            ]
            for name in names:
                path = parent / name
                relative = shorten_path(self._relative_path(path))
                if not (is_wanted(relative) and self._is_file_below_root(path)):
                    self.skipped.append(relative)
                    continue
                if relative in self._files:
                    raise SourceError(
                        f"{root}: {quote_value(relative)} is there with / and with \\; rename one of them"
                    )
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


def _raise_cannot_list(error: OSError) -> None:
    raise explain_file_limit(error) or SourceError(
        f"{error.filename}: cannot be listed ({error.strerror}); make it readable, or move it away"
    )
