"""Image files inside a zip or tar archive, read without unpacking it to disk.

Both kinds are checked whole before any image is read, and refused if no honest publisher would make such an archive.
"""

import bz2
import gzip
import io
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
from typing import Any, BinaryIO

from ml.core.errors import SourceError
from ml.core.messages import cut_text, quote_value
from ml.core.settings import Settings
from ml.data.sources.files import (
    MAX_FILE_BYTES,
    FileReader,
    PathFilter,
    RejectedFile,
    is_image,
    reject_large_file,
    reject_odd_name,
    require_allowed_count,
    shorten_path,
)
from ml.data.sources.tar_members import MAX_NAME, read_members

MAX_RATIO = 100
"""Largest allowed ratio of unpacked to packed bytes. Images are compressed already, so an archive that grows more is
made to fill a disk."""

# zipfile and the decompressors raise these on damaged, encrypted or foreign archives.
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
_OPENERS: dict[bytes, Callable[..., Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}
_METHODS = {9: "Deflate64", 12: "bzip2", 14: "LZMA", 93: "Zstandard", 95: "xz", 98: "PPMd"}  # APPNOTE.TXT, 4.4.5
_MAX_ENTRY = 300  # bytes of a file's entry in a zip's directory on average: 46, its path and its times
_SMALL = 2**20  # below this size no ratio does harm, and honest tiny archives may have a high one


def open_archive(path: Path, settings: Settings, is_wanted: PathFilter = is_image) -> "ZipArchive | TarArchive":
    """Opens the archive at ``path``, as zip or tar by its first bytes, within the limits of the settings.

    Raises:
        SourceError: it is neither, is not whole, or cannot be trusted.
    """
    with path.open("rb") as file:
        magic = file.read(4)
    kind = ZipArchive if magic.startswith(b"PK") else TarArchive
    return kind(path, settings, is_wanted)


class ZipArchive:
    """The files in the zip archive at ``path``, to be used in a ``with`` block.

    Implements :class:`ml.data.sources.files.Files`.

    Raises:
        SourceError: it is no whole zip archive, or one that an honest publisher would not make (names that lead out
            of it, links, names met twice, too many or too large files).
    """

    def __init__(self, path: Path, settings: Settings, is_wanted: PathFilter = is_image) -> None:
        self._path = path
        listing = _Listing(path, settings, is_wanted)
        self._file = _ZipFile(io.FileIO(path))
        self._file.listing = listing
        try:
            self._zip = zipfile.ZipFile(self._file)
            self._file.is_opening = False
            self._members = self._list_images(listing)
        except BaseException as error:
            self._file.close()
            if isinstance(error, _DAMAGE):
                raise SourceError(f"{path}: not a whole zip archive ({cut_text(error)})") from None
            raise

    def __enter__(self) -> "ZipArchive":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def items(self) -> Iterator[FileReader]:
        """See :meth:`ml.data.sources.files.Files.items`."""
        return ((name, partial(self.read, name)) for name in self.images)

    def read(self, name: str) -> bytes:
        """Reads the bytes of one image. May be called from several threads."""
        member = self._members[name]
        try:
            # zipfile reads no more than the declared size, which was checked, and verifies the checksum at the end.
            return self._zip.read(member)
        except _DAMAGE as error:
            raise SourceError(
                f"{self._path}: {name} in it is damaged or cannot be unpacked ({cut_text(error)})"
            ) from None

    def _list_images(self, listing: "_Listing") -> dict[str, zipfile.ZipInfo]:
        """Checks all members; returns those that are images, by name."""
        images: dict[str, zipfile.ZipInfo] = {}
        for member in self._zip.infolist():
            link = stat.S_ISLNK(member.external_attr >> 16)
            is_folder = member.filename.endswith(("/", "\\"))
            if name := listing.add_member(member.filename, member.file_size, is_link=link, is_folder=is_folder):
                images[name] = member
                self._check_method(member)
        self.images, self.skipped, self.rejected, self.unpacked_bytes = listing.finish()
        return images

    def _check_method(self, member: zipfile.ZipInfo) -> None:
        """Checks that an image is packed as every program can unpack it, and Python within bounds of memory."""
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            method = _METHODS.get(member.compress_type, f"method {member.compress_type}")
            raise SourceError(
                f"{self._path}: {quote_value(member.filename)} is packed by {method}, and only deflate is read; pack "
                "the files again, by 'zip -r' or '7z a -tzip -mm=Deflate', or as a .tar"
            )


class TarArchive:
    """The files in the tar archive at ``path``, packed by gzip, bzip2, xz or not at all; see :class:`ZipArchive`.

    A packed tar can only be read from front to back: once to check it, once for its images.

    Raises:
        SourceError: as for :class:`ZipArchive`.
    """

    def __init__(self, path: Path, settings: Settings, is_wanted: PathFilter = is_image) -> None:
        self._path = path
        self._settings = settings
        listing = _Listing(path, settings, is_wanted)
        with self._open() as file:
            for member in read_members(file):
                if member.kind not in ("file", "folder", "a link"):
                    raise SourceError(
                        f"{path}: {quote_value(member.name)} is {member.kind}; an archive of images has no need of any"
                    )
                listing.add_member(
                    member.name, member.size, is_link=member.kind == "a link", is_folder=member.kind == "folder"
                )
        self.images, self.skipped, self.rejected, self.unpacked_bytes = listing.finish()

    def __enter__(self) -> "TarArchive":
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is held open."""

    def items(self) -> Iterator[FileReader]:
        """See :meth:`ml.data.sources.files.Files.items`; in the archive's order."""
        wanted = set(self.images)
        with self._open() as file:
            for member in read_members(file):
                if member.kind == "file" and (name := shorten_path(member.name)) in wanted:
                    yield name, partial(bytes, member.content.read(member.size))

    @contextmanager
    def _open(self) -> Iterator[BinaryIO]:
        """Opens the archive for one pass from front to back; translates all errors of a damaged one."""
        with self._path.open("rb") as packed:
            first_bytes = packed.read(6)
        open_unpacked = next((opener for magic, opener in _OPENERS.items() if first_bytes.startswith(magic)), open)
        try:
            with open_unpacked(self._path, "rb") as unpacked:
                file: Any = _LimitedFile(unpacked, self._path, self._settings)
                yield file
                while file.read(1 << 20):  # read to the checksum at the end, which a cut or damaged file does not reach
                    pass
        except (tarfile.TarError, *_DAMAGE) as error:
            raise SourceError(
                f"{self._path}: not a whole zip or tar archive, or damaged ({type(error).__name__}: {cut_text(error)})"
            ) from None


class _ZipFile(io.BufferedReader):
    """A zip archive's file. A directory of too many entries is not given to zipfile, which would hold all of them."""

    listing: "_Listing"
    is_opening = True

    def read(self, size: int | None = -1) -> bytes:
        """Reads as many bytes, or what is left; zipfile reads the directory at once."""
        if self.is_opening:
            self.listing.check_directory(size or 0)
        data = super().read(size)
        self.listing.check_count(data.count(b"PK\1\2"))
        return data


class _LimitedFile:
    """A file of which no more than an archive may unpack to is read; raises SourceError if there is more."""

    def __init__(self, file: BinaryIO, path: Path, settings: Settings) -> None:
        self._file, self._path, self._settings = file, path, settings
        self._count = 0

    def read(self, size: int) -> bytes:
        """Reads as many bytes, or what is left."""
        data = self._file.read(size)
        self._count += len(data)
        _check_unpacked_size(self._count, self._path, self._settings)
        return data


def _check_unpacked_size(size: int, path: Path, settings: Settings) -> None:
    if size > settings.archive_bytes:
        raise SourceError(
            f"{path}: unpacks to more than the {settings.archive_size:,} MB allowed; pack less, or raise "
            "BREAKHIS_ARCHIVE_SIZE"
        )


class _Listing:
    """The members of an archive, checked one by one and separated into images and other files.

    Raises:
        SourceError: the archive cannot be trusted; names it and the member.
    """

    def __init__(self, path: Path, settings: Settings, is_wanted: PathFilter) -> None:
        self._path = path
        self._settings = settings
        self._is_wanted = is_wanted
        self._images: dict[str, int] = {}
        self._skipped: list[str] = []
        self._rejected: list[RejectedFile] = []
        self._count = 0
        self._bytes = 0

    def add_member(self, name: str, size: int, *, is_link: bool, is_folder: bool) -> str | None:
        """Checks a member; returns its path, as :func:`shorten_path` writes it, if it is one of the images."""
        self._count += 1
        self.check_count(self._count)
        self._bytes += size
        _check_unpacked_size(self._bytes, self._path, self._settings)
        if (size_of_name := len(name.encode("utf-8", "surrogateescape"))) > MAX_NAME:
            raise SourceError(f"{self._path}: a name of {size_of_name:,} bytes, more than {MAX_NAME:,}")
        if _LEADS_OUT.search(name):
            raise SourceError(
                f"{self._path}: the name {quote_value(name)} leads out of the archive; it is not to be trusted"
            )
        if is_link:
            raise SourceError(f"{self._path}: {quote_value(name)} is a link; an archive of images has no need of links")
        if is_folder:
            return None
        odd = reject_odd_name(shorten_path(name))
        name = odd.path if odd else shorten_path(name)
        if not self._is_wanted(name):
            self._skipped.append(name)
            return None
        if name in self._images:
            raise SourceError(f"{self._path}: {quote_value(name)} is in it twice; which one is meant cannot be told")
        if odd or size > MAX_FILE_BYTES:
            self._rejected.append(odd or reject_large_file(name, size))
            return None
        self._images[name] = size
        return name

    def check_count(self, count: int) -> None:
        """Checks the number of an archive's members, as far as it is known."""
        require_allowed_count(count, self._settings.archive_entries, str(self._path))

    def check_directory(self, size: int) -> None:
        """Checks the size of a zip archive's directory, which zipfile holds twice, before any of it is read."""
        limit = _SMALL + _MAX_ENTRY * self._settings.archive_entries
        if size > limit:
            raise SourceError(
                f"{self._path}: its directory is {size:,} bytes, more than the {limit:,} allowed; pack it again "
                "without comments and further fields, divide it into several sources, or raise BREAKHIS_ARCHIVE_ENTRIES"
            )

    def finish(self) -> tuple[list[str], list[str], list[RejectedFile], int]:
        """Returns the names of the images and of the other files, what is rejected, and the images' unpacked bytes."""
        unpacked, packed = sum(self._images.values()), self._path.stat().st_size
        if unpacked > max(_SMALL, MAX_RATIO * packed):
            raise SourceError(
                f"{self._path}: {packed:,} bytes would unpack to {unpacked:,}, more than {MAX_RATIO} times as many; "
                "images do not shrink like that"
            )
        return sorted(self._images), sorted(self._skipped), self._rejected, unpacked
