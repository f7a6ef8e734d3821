"""Image files inside a zip or tar archive, read without unpacking it to disk.

Both kinds are read through, and refused if they are not what an honest publisher would make, before any image is taken.
"""

import bz2
import gzip
import lzma
import re
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from ml.core.errors import SourceError
from ml.data.sources.files import MAX_FILE_BYTES, Item, Taken, is_image

MAX_FILES = 200_000
MAX_RATIO = 100
"""Images are compressed already: an archive that grows more than this is made to fill a disk."""

# What zipfile and the decompressors below it raise on damaged, encrypted or foreign archives.
_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    EOFError,
    NotImplementedError,
    OSError,
    OverflowError,
    RuntimeError,
    ValueError,
)
_LEADS_OUT = re.compile(r"^[/\\]|^[A-Za-z]:|(^|[/\\])\.\.($|[/\\])")
_PACKED: dict[bytes, Callable[..., Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}
_SMALL = 2**20  # up to here no ratio can do harm, and tiny archives reach high ones honestly


def open_archive(path: Path, taken: Taken = is_image) -> "Archive | TarArchive":
    """The archive at ``path``, of whichever kind its first bytes say.

    Raises:
        SourceError: it is neither, not whole, or not to be trusted.
    """
    with path.open("rb") as file:
        begins = file.read(4)
    return Archive(path, taken) if begins.startswith(b"PK") else TarArchive(path, taken)


class Archive:
    """The files in the zip archive at ``path``. Close it, or use ``with``.

    Implements :class:`ml.data.sources.files.Files`.

    Raises:
        SourceError: it is no whole zip archive, or one that an honest publisher would not make (names that lead out
            of it, links, names met twice, too many or too large files).
    """

    def __init__(self, path: Path, taken: Taken = is_image) -> None:
        self._path = path
        self._taken = taken
        try:
            self._zip = zipfile.ZipFile(path)
        except _DAMAGE as error:
            raise SourceError(f"{path}: not a whole zip archive ({error})") from None
        try:
            self._members = self._checked(self._zip.infolist())
        except BaseException:
            self._zip.close()
            raise

    def __enter__(self) -> "Archive":
        return self

    def __exit__(self, *_: object) -> None:
        self._zip.close()

    def items(self) -> Iterator[Item]:
        """See :meth:`ml.data.sources.files.Files.items`."""
        return ((name, partial(self.read, name)) for name in self.images)

    def read(self, name: str) -> bytes:
        """The bytes of one image. May be called from several threads."""
        member = self._members[name]
        try:
            # zipfile gives no more than the size declared, which was checked, and compares the checksum at the end.
            return self._zip.read(member)
        except _DAMAGE as error:
            raise SourceError(f"{self._path}: {name} in it is damaged or cannot be unpacked ({error})") from None

    def _checked(self, members: list[zipfile.ZipInfo]) -> dict[str, zipfile.ZipInfo]:
        listing = _Listing(self._path, self._taken)
        images: dict[str, zipfile.ZipInfo] = {}
        for member in members:
            link = stat.S_ISLNK(member.external_attr >> 16)
            if listing.takes(member.filename, member.file_size, link=link, folder=member.filename.endswith("/")):
                images[member.filename] = member
        self.images, self.skipped, self.unpacked_bytes = listing.done()
        return images


class TarArchive:
    """The files in the tar archive at ``path``, packed by gzip, bzip2, xz or not at all; see :class:`Archive`.

    A packed tar can only be read from front to back: once to check it, once for its images.

    Raises:
        SourceError: as for :class:`Archive`.
    """

    def __init__(self, path: Path, taken: Taken = is_image) -> None:
        self._path = path
        listing = _Listing(path, taken)
        with self._opened() as tar:
            for member in tar:
                if not (member.isreg() or member.isdir() or member.issym() or member.islnk()):
                    raise SourceError(f"{path}: {member.name!r} is a device; an archive of images has no need of any")
                link = member.issym() or member.islnk()
                listing.takes(member.name, member.size, link=link, folder=member.isdir())
        self.images, self.skipped, self.unpacked_bytes = listing.done()

    def __enter__(self) -> "TarArchive":
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is held open."""

    def items(self) -> Iterator[Item]:
        """See :meth:`ml.data.sources.files.Files.items`; in the archive's order."""
        wanted = set(self.images)
        with self._opened() as tar:
            for member in tar:
                if member.isreg() and member.name in wanted:
                    file = tar.extractfile(member)
                    assert file
                    yield member.name, partial(bytes, file.read())

    @contextmanager
    def _opened(self) -> Iterator[tarfile.TarFile]:
        with self._path.open("rb") as file:
            begins = file.read(6)
        unpacked = next((opened for magic, opened in _PACKED.items() if begins.startswith(magic)), open)
        try:
            with unpacked(self._path, "rb") as file, tarfile.open(fileobj=file, mode="r|") as tar:
                yield tar
                while file.read(1 << 20):  # to the checksum at the end, which what is cut off or damaged does not reach
                    pass
        except (tarfile.TarError, *_DAMAGE) as error:
            raise SourceError(
                f"{self._path}: not a whole zip or tar archive, or damaged ({type(error).__name__}: {error})"
            ) from None


class _Listing:
    """Goes through the members of an archive and says which to take.

    Raises:
        SourceError: the archive is not to be trusted; names it and the member.
    """

    def __init__(self, path: Path, taken: Taken) -> None:
        self._path = path
        self._taken = taken
        self._images: dict[str, int] = {}
        self._skipped: list[str] = []
        self._count = 0

    def takes(self, name: str, size: int, *, link: bool, folder: bool) -> bool:
        """Whether this member is one of the images."""
        self._count += 1
        if self._count > MAX_FILES:
            raise SourceError(f"{self._path}: more files than the {MAX_FILES:,} allowed")
        if _LEADS_OUT.search(name):
            raise SourceError(f"{self._path}: the name {name!r} leads out of the archive; it is not to be trusted")
        if link:
            raise SourceError(f"{self._path}: {name!r} is a link; an archive of images has no need of links")
        if folder:
            return False
        if not self._taken(name):
            self._skipped.append(name)
            return False
        if name in self._images:
            raise SourceError(f"{self._path}: {name!r} is in it twice; which one is meant cannot be told")
        if size > MAX_FILE_BYTES:
            raise SourceError(f"{self._path}: {name!r} unpacks to {size:,} bytes, more than {MAX_FILE_BYTES:,}")
        self._images[name] = size
        return True

    def done(self) -> tuple[list[str], list[str], int]:
        """The images, the other files, and the images' size in bytes."""
        unpacked, packed = sum(self._images.values()), self._path.stat().st_size
        if unpacked > max(_SMALL, MAX_RATIO * packed):
            raise SourceError(
                f"{self._path}: {packed:,} bytes would unpack to {unpacked:,}, more than {MAX_RATIO} times as many; "
                "images do not shrink like that"
            )
        return sorted(self._images), sorted(self._skipped), unpacked
