"""Archives as people and programs make them, and archives that are damaged or made to do harm."""

import io
import random
import tarfile
import zipfile
from pathlib import Path
from typing import NamedTuple

from ml.core.settings import Settings
from ml.data.sources.archive import open_archive
from tests.fuzz.mutation import ODD_TEXTS, mutate_bytes

_PICTURE = b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 4
_FILES = {f"P{number // 3}/image_{number}.png": _PICTURE for number in range(4)} | {"cases.csv": b"a,b\n1,2\n"}
_FORMATS = (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT)
_MODES = ("w:", "w:gz", "w:bz2", "w:xz")
_EXTENSIONS = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME)
_EXTENSIONS += (tarfile.GNUTYPE_LONGLINK, tarfile.GNUTYPE_SPARSE)
_CLUTTER = ("._", "__MACOSX/._", "__MACOSX/", ".ipynb_checkpoints/", "@eaDir/", ".Trash-1000/files/", ".AppleDouble/")
_RECORDS = (b"19 path=P0/long.png\n", b"11 size=10\n", b"22 GNU.sparse.major=1\n", b"3 a", b"99999999999 path=", b"\n")


class _Archives(NamedTuple):
    path: Path
    whole: list[bytes]


def prepare_archives(scratch: Path) -> _Archives:
    """Returns whole archives of every kind, to be damaged."""
    rng = random.Random(0)
    whole = [pack_zip(_FILES, compression) for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)]
    whole += [pack_tar(_FILES, mode, form, rng) for mode in _MODES for form in _FORMATS]
    return _Archives(scratch / "archive", whole)


def use_archive(archives: _Archives, rng: random.Random) -> None:
    """Reads an archive: damaged, of a folder as people have one, or of headers that no program writes."""
    kind = rng.randrange(3)
    if kind == 0:
        data = mutate_bytes(rng.choice(archives.whole), rng)
    elif kind == 1:
        files = make_folder(rng)
        data = pack_zip(files) if rng.random() < 0.5 else pack_tar(files, rng.choice(_MODES), rng.choice(_FORMATS), rng)
    else:
        data = make_headers(rng)
    archives.path.write_bytes(mutate_bytes(data, rng) if kind and rng.random() < 0.3 else data)
    limits = {"archive_entries": rng.choice((8, 200_000, 200_000)), "archive_size": rng.choice((1, 100_000))}
    with open_archive(archives.path, Settings(**limits)) as archive:
        read = {name: content() for name, content in archive.items()}
    assert sorted(read) == archive.images
    assert not any(name.startswith(("/", "./")) or "\\" in name or "._" in name for name in read)


def make_folder(rng: random.Random) -> dict[str, bytes]:
    """Returns a folder's files as systems, notebooks and other programs leave them, with odd names among them."""
    files: dict[str, bytes] = {}
    for path, data in _FILES.items():
        files[path if rng.random() < 0.8 else path.upper()] = data
        folder, _, name = path.rpartition("/")
        if rng.random() < 0.5:
            files[f"{folder}/{rng.choice(_CLUTTER)}{name}"] = data
        if rng.random() < 0.2:
            files[f"{folder}/{rng.choice(ODD_TEXTS)[:300]}.png"] = data
    files |= {name: b"" for name in (".DS_Store", "P0/Thumbs.db", "P0/.DS_Store") if rng.random() < 0.5}
    write = rng.choice((str, str, lambda path: f"./{path}", lambda path: path.replace("/", "\\")))
    return {write(path.lstrip("/")): data for path, data in files.items()}


def pack_zip(files: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    """Packs files whose names a zip can hold."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(name.encode("utf-8", "replace").decode()[:5000], data)
    return buffer.getvalue()


def pack_tar(files: dict[str, bytes], mode: str, form: int, rng: random.Random) -> bytes:
    """Packs files, in the format pax with attributes of up to 100,000 bytes; leaves out what ustar cannot hold."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode, format=form, errors="surrogateescape") as tar:  # type: ignore[call-overload]
        for name, data in files.items():
            info = tarfile.TarInfo(name.encode("utf-8", "replace").decode())
            info.size, info.pax_headers = len(data), {"SCHILY.xattr.user": "x" * rng.choice((0, 10, 5_000, 100_000))}
            try:
                tar.addfile(info, io.BytesIO(data))
            except ValueError:
                continue
    return buffer.getvalue()


def make_headers(rng: random.Random) -> bytes:
    """Returns a tar archive with headers of any kind, length and content before its members."""
    parts: list[bytes] = []
    for number in range(rng.randint(1, 4)):
        for _ in range(rng.choice((0, 1, 1, 2, 300))):
            unit = rng.choice((*_RECORDS, b"1", b"7 ", b"5 a=\n", rng.randbytes(20)))
            content = b"".join(rng.choices(_RECORDS, k=3)) + unit * rng.choice((0, 1, 1_000, 20_000))
            parts.append(_make_member("@header", rng.choice(_EXTENSIONS), content, len(content)))
        size = rng.choice((len(_PICTURE), len(_PICTURE), 0, 2**33))
        parts.append(_make_member(f"{number}.png", rng.choice((tarfile.REGTYPE, tarfile.AREGTYPE)), _PICTURE, size))
    return b"".join(parts) + bytes(rng.choice((0, tarfile.BLOCKSIZE, 20 * tarfile.BLOCKSIZE)))


def _make_member(name: str, kind: bytes, content: bytes, size: int) -> bytes:
    header = tarfile.TarInfo(name)
    header.type, header.size = kind, size
    return header.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % tarfile.BLOCKSIZE)
