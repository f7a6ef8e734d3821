"""The members of a tar archive, read from front to back in linear time and bounded memory.

``tarfile`` holds every header in memory, searches some in quadratic time, and takes a damaged header or a missing end
for the end of the archive. Here it only parses the 512 bytes that each member begins with.
"""

import re
import tarfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

MAX_NAME = 4096
"""The longest name of a member in bytes: as long as a path may be on Linux."""

_BLOCK = tarfile.BLOCKSIZE
_CHUNK = 2**16
_LONG_NAMES = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_PAX = (tarfile.XGLTYPE, tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)

# "LENGTH KEY=VALUE" and a line feed, where the length counts all of it (POSIX.1-2017, pax, extended header).
_RECORD_START = re.compile(rb"([0-9]{1,20}) ([^=]{1,1000})=")
_MAX_RECORD_START = 1022


class TarMember(NamedTuple):
    """A member of an archive; ``content`` can be read until the next member is asked for."""

    name: str
    size: int
    kind: str
    """``file``, ``folder``, or what else it is, for a message."""
    content: "_Section"


def read_members(file: BinaryIO) -> Iterator[TarMember]:
    """Yields the members of an unpacked tar archive.

    Headers of any length are read: of what GNU tar and pax write before a member, only its name, its size and whether
    it has holes are kept, and all else is passed over.

    Raises:
        tarfile.TarError: the archive is damaged, or has a name that is too long.
        EOFError: it ends before the mark of its end.
    """
    common: dict[str, bytes] = {}  # what a global header says of all members behind it
    own: dict[str, bytes] = {}
    while True:
        block = file.read(_BLOCK)
        if len(block) < _BLOCK:
            raise EOFError("it ends before the mark of its end")
        if not block.strip(b"\0"):
            return
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        if header.type in (*_LONG_NAMES, *_PAX):
            section = _Section(file, header.size)
            if header.type == tarfile.GNUTYPE_LONGNAME:
                own["path"] = _read_value(section, b"", header.size).partition(b"\0")[0]
            elif header.type in _PAX:
                (common if header.type == tarfile.XGLTYPE else own).update(_read_pax_records(section))
            section.skip_rest()
            continue
        said, own = common | own, {}
        name = said["path"].decode("utf-8", "surrogateescape") if "path" in said else header.name
        size = _parse_size(said["size"]) if "size" in said else header.size
        # Of the other kinds, none has content behind its header.
        section = _Section(file, size if header.isreg() else 0)
        yield TarMember(name, size, _name_kind(header, name, said), section)
        section.skip_rest()


class _Section:
    """The next bytes of a file, and the padding to a whole block behind them."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        if size < 0:
            raise tarfile.ReadError(f"a member has {size} bytes")
        self._file, self._left, self._padding = file, size, -size % _BLOCK

    def read(self, size: int) -> bytes:
        """Reads as many bytes, or what is left of the section."""
        data = self._file.read(min(size, self._left))
        if len(data) < min(size, self._left):
            raise EOFError("it ends within a member")
        self._left -= len(data)
        return data

    def skip_rest(self) -> None:
        """Moves the file to the block behind the section."""
        self._left, self._padding = self._left + self._padding, 0
        while self.read(_CHUNK):
            pass


def _read_pax_records(section: _Section) -> dict[str, bytes]:
    """Returns what a pax header says of a member's path, size and holes."""
    found: dict[str, bytes] = {}
    ahead = b""
    while True:
        ahead += section.read(_MAX_RECORD_START - len(ahead))
        if not ahead.strip(b"\0"):  # some pad the header
            return found
        start = _RECORD_START.match(ahead)
        length = int(start[1]) if start else 0
        if not start or length <= start.end():
            raise tarfile.ReadError("a damaged pax header")
        key = start[2].decode("utf-8", "replace")
        value_length = length - start.end()
        value, ahead = ahead[start.end() : length], ahead[length:]
        if key in ("path", "size"):
            found[key] = _read_value(section, value, value_length).removesuffix(b"\n")
            continue
        if key.startswith("GNU.sparse."):
            found["holes"] = b""
        left = value_length - len(value)
        while left and (passed := section.read(min(left, _CHUNK))):
            left -= len(passed)
        if left:
            raise tarfile.ReadError("a pax header ends within a record")


def _read_value(section: _Section, begun: bytes, size: int) -> bytes:
    """Reads a name or a number of ``size`` bytes, whose first are read already."""
    if size > MAX_NAME + 1:  # with the line feed or the zero behind it
        raise tarfile.ReadError(f"a name of {size:,} bytes, more than {MAX_NAME:,}")
    value = begun + section.read(size - len(begun))
    if len(value) < size:
        raise tarfile.ReadError("a header ends within a name")
    return value


def _parse_size(digits: bytes) -> int:
    if not re.fullmatch(rb"[0-9]{1,20}", digits):
        raise tarfile.ReadError("a member's size is no number")
    return int(digits)


def _name_kind(header: tarfile.TarInfo, name: str, said: dict[str, bytes]) -> str:
    if header.type == tarfile.GNUTYPE_SPARSE or "holes" in said:
        return "a file with holes (packed with --sparse)"
    if header.isreg():
        # The oldest format has no kind for folders.
        return "folder" if header.type == tarfile.AREGTYPE and name.endswith("/") else "file"
    if header.isdir():
        return "folder"
    return "a link" if header.issym() or header.islnk() else "a device"
