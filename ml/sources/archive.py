"""Image files inside a zip archive, read without unpacking it to disk."""

import lzma
import re
import stat
import struct
import zipfile
import zlib
from pathlib import Path

from ml.errors import SourceError
from ml.sources.files import MAX_FILE_BYTES, is_image

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
_SMALL = 2**20  # up to here no ratio can do harm, and tiny archives reach high ones honestly


class Archive:
    """The files in the zip archive at ``path``; implements :class:`ml.sources.files.Files`. Close it, or use ``with``.

    Raises:
        SourceError: it is no whole zip archive, or one that an honest publisher would not make (names that lead out
            of it, links, names met twice, too many or too large files).
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.images: list[str] = []
        self.skipped: list[str] = []
        self.unpacked_bytes = 0
        try:
            self._zip = zipfile.ZipFile(path)
        except _DAMAGE as error:
            raise SourceError(f"{path}: not a whole zip archive ({error})") from None
        try:
            self._members = self._checked(self._zip.infolist())
        except BaseException:
            self._zip.close()
            raise
        self.images.sort()
        self.skipped.sort()

    def __enter__(self) -> "Archive":
        return self

    def __exit__(self, *_: object) -> None:
        self._zip.close()

    def read(self, name: str) -> bytes:
        """The bytes of one image; see :meth:`ml.sources.files.Files.read`. May be called from several threads."""
        member = self._members[name]
        try:
            # zipfile gives no more than the size declared, which was checked, and compares the checksum at the end.
            return self._zip.read(member)
        except _DAMAGE as error:
            raise SourceError(f"{self._path}: {name} in it is damaged or cannot be unpacked ({error})") from None

    def _checked(self, members: list[zipfile.ZipInfo]) -> dict[str, zipfile.ZipInfo]:
        if len(members) > MAX_FILES:
            raise SourceError(f"{self._path}: {len(members):,} files, more than the {MAX_FILES:,} allowed")
        images: dict[str, zipfile.ZipInfo] = {}
        for member in members:
            name = member.filename
            if _LEADS_OUT.search(name):
                raise SourceError(f"{self._path}: the name {name!r} leads out of the archive; it is not to be trusted")
            if stat.S_ISLNK(member.external_attr >> 16):
                raise SourceError(f"{self._path}: {name!r} is a link; an archive of images has no need of links")
            if member.is_dir():
                continue
            if not is_image(name):
                self.skipped.append(name)
                continue
            if name in images:
                raise SourceError(f"{self._path}: {name!r} is in it twice; which one is meant cannot be told")
            if member.file_size > MAX_FILE_BYTES:
                raise SourceError(
                    f"{self._path}: {name!r} unpacks to {member.file_size:,} bytes, more than {MAX_FILE_BYTES:,}"
                )
            images[name] = member
            self.images.append(name)
            self.unpacked_bytes += member.file_size
        packed = self._path.stat().st_size
        if self.unpacked_bytes > max(_SMALL, MAX_RATIO * packed):
            raise SourceError(
                f"{self._path}: {packed:,} bytes would unpack to {self.unpacked_bytes:,}, more than {MAX_RATIO} times "
                "as many; images do not shrink like that"
            )
        return images
