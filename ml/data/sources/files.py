"""The interface of every kind of source to the fetch stage: its image files, and the names of its other files."""

from collections.abc import Callable, Iterator
from pathlib import PurePosixPath
from typing import Protocol

FileReader = tuple[str, Callable[[], bytes]]
"""A file's path and the function that reads its bytes; several of these functions may be called at once."""

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff")
"""Suffixes of the files that count as images. The manifest finds out whether they are images of BreakHis."""

MAX_FILE_BYTES = 256 * 2**20
"""The largest file that is read. Microscopy images of this kind are far smaller; each thread holds one in memory."""


class Files(Protocol):
    """The files below a source's root.

    ``images`` and ``skipped`` hold POSIX paths relative to that root, sorted; ``skipped`` are the files without
    an image's suffix, AppleDouble files, and links that lead elsewhere.
    """

    images: list[str]
    skipped: list[str]

    def items(self) -> Iterator[FileReader]:
        """Yields each image with its reader, which raises SourceError with the file's name if it cannot be read."""


PathFilter = Callable[[str], bool]
"""Says whether the file at a path belongs to the source."""


def is_image(name: str) -> bool:
    """Says whether a file counts as an image, by its suffix in upper or lower case.

    Files called ``._NAME`` do not: macOS puts one beside each file on a disk that cannot hold a Mac's own attributes
    (AppleDouble), with the same suffix.
    """
    path = PurePosixPath(name)
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith("._")


def shorten_path(path: str) -> str:
    """Returns a POSIX path without what means nothing: ``./a//b.png`` is ``a/b.png``."""
    return str(PurePosixPath(path)) if path else ""
