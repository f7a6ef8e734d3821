"""What every kind of source offers the fetch stage: the image files it has, and what else was lying there."""

from collections.abc import Callable, Iterator
from pathlib import PurePosixPath
from typing import Protocol

Item = tuple[str, Callable[[], bytes]]
"""A file's path, and what reads it; readers of several items may be called at once."""

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff")
"""What is taken for an image. Whether it is one, and one of ours, is for the manifest to find out."""

MAX_FILE_BYTES = 256 * 2**20
"""No microscopy image of this kind comes near; one file is held in memory at a time per thread."""


class Files(Protocol):
    """The files below a source's root.

    ``images`` and ``skipped`` hold POSIX paths relative to that root, sorted; ``skipped`` is everything that is no
    image by its suffix, or a link that leads elsewhere.
    """

    images: list[str]
    skipped: list[str]

    def items(self) -> Iterator[Item]:
        """Each image with what reads it. A reader raises SourceError, naming the file, where that cannot be done."""


Taken = Callable[[str], bool]
"""Whether a file with this path belongs to the source."""


def is_image(name: str) -> bool:
    """Whether a file is taken for an image, by its suffix in any case."""
    return PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES
