"""What every kind of source offers the fetch stage: the image files it has, and what else was lying there."""

from pathlib import PurePosixPath
from typing import Protocol

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

    def read(self, name: str) -> bytes:
        """The bytes of one image.

        Raises:
            SourceError: it cannot be read; names it.
        """


def is_image(name: str) -> bool:
    """Whether a file is taken for an image, by its suffix in any case."""
    return PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES
