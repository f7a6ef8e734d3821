"""The interface of every kind of source to the fetch stage: its image files, and the names of its other files."""

from collections.abc import Callable, Iterator
from pathlib import PurePosixPath
from typing import NamedTuple, Protocol

from ml.core.errors import SourceError

FileReader = tuple[str, Callable[[], bytes]]
"""A file's path and the function that reads its bytes; several of these functions may be called at once."""

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff")
"""Suffixes of the files that count as images. The manifest finds out whether they are images of BreakHis."""

MAX_FILE_BYTES = 256 * 2**20
"""The largest file that is read. Microscopy images of this kind are far smaller; each thread holds one in memory."""


class RejectedFile(NamedTuple):
    """A file that counts as an image and cannot be taken; it becomes a row of the quarantine."""

    path: str
    reason: str
    detail: str


class FileRejected(SourceError):
    """Raised by a file's reader: this one cannot be taken, and the others can."""

    def __init__(self, rejected: RejectedFile) -> None:
        super().__init__(f"{rejected.path}: {rejected.detail}")
        self.rejected = rejected


class Files(Protocol):
    """The files below a source's root.

    ``images`` and ``skipped`` hold POSIX paths relative to that root, sorted; ``skipped`` are the files that do not
    count as images, and links that lead elsewhere. ``rejected`` are the images that cannot be taken, as far as the
    listing tells.
    """

    images: list[str]
    skipped: list[str]
    rejected: list[RejectedFile]

    def items(self) -> Iterator[FileReader]:
        """Yields each image with its reader.

        The reader raises FileRejected if this file cannot be taken, and SourceError with the file's name if it cannot
        be told what is wrong with the others.
        """


PathFilter = Callable[[str], bool]
"""Says whether the file at a path belongs to the source."""


_CLUTTER = frozenset(
    {"__MACOSX", ".AppleDouble", ".ipynb_checkpoints", "@eaDir", "$RECYCLE.BIN", "#recycle", ".thumbnails"}
    | {"lost+found", "System Volume Information", ".Spotlight-V100", ".fseventsd", ".DocumentRevisions-V100"}
)
"""Folders in which operating systems, disk stations and notebooks keep copies and thumbnails of files, or their own."""


def is_image(path: str) -> bool:
    """Says whether a file counts as an image, by its path below the root and its suffix in upper or lower case.

    Copies that nobody made on purpose do not: files called ``._NAME``, of which macOS puts one beside each file on a
    disk that cannot hold a Mac's own attributes (AppleDouble), and what lies in the trash, in ``__MACOSX``,
    ``.ipynb_checkpoints`` and their like.
    """
    *folders, name = PurePosixPath(path).parts or ("",)
    if name.startswith("._") or any(map(is_clutter, folders)):
        return False
    return PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES


def is_clutter(folder: str) -> bool:
    """Says whether a folder of this name holds nothing that anybody made on purpose."""
    return folder in _CLUTTER or folder.startswith(".Trash")


def reject_large_file(path: str, size: int) -> RejectedFile:
    """Returns a file of more than :data:`MAX_FILE_BYTES` as one that cannot be taken."""
    advice = "no picture of a microscope's camera is so large; export the part that is meant as a file of its own"
    return RejectedFile(path, "size", f"{size:,} bytes, more than the {MAX_FILE_BYTES:,} allowed; {advice}")


def reject_odd_name(path: str) -> RejectedFile | None:
    """Returns a file whose path is not UTF-8 as one that cannot be taken, with those bytes as ``\\xe9``; else None."""
    shown = path.encode("utf-8", "surrogateescape").decode(errors="backslashreplace")
    detail = "the name is not UTF-8, so no table can hold it; rename the file"
    return None if shown == path else RejectedFile(shown, "name", detail)


def require_allowed_count(count: int, limit: int, place: str) -> None:
    """Checks the number of files and folders that a source has, as far as it is known.

    Raises:
        SourceError: there are more than ``limit``; names ``place``, where they are.
    """
    if count > limit:
        raise SourceError(
            f"{place}: more than the {limit:,} files and folders allowed; leave out what is not needed, divide it into "
            "several sources, or raise BREAKHIS_ARCHIVE_ENTRIES"
        )


def shorten_path(path: str) -> str:
    """Returns a file's path as a source names it: ``./a//b.png``, and ``a\\b.png`` as of Windows, are ``a/b.png``."""
    return str(PurePosixPath(path.replace("\\", "/").lstrip("/"))) if path else ""
