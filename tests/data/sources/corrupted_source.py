"""A source of a test, and what it takes to corrupt its files, its archive or its table."""

import contextlib
import csv
import hashlib
import io
import json
import sys
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from ml import cli
from ml.core.store import Json, Store
from ml.core.taxonomy import SUBTYPES, label_of
from tests.helpers.made_up import name, png, write_tree

# Four of each subtype, of two slides: one that is lost is more than a tenth.
IMAGES = {
    f"{label_of(subtype)}/{name(subtype, f'14-{1000 + 10 * k + slide}', 40, seq)}": png(100 * k + 10 * slide + seq)
    for k, subtype in enumerate(SUBTYPES)
    for slide in (1, 2)
    for seq in (1, 2)
}
PATHS = list(IMAGES)
DC = [path for path in PATHS if "_DC-" in path]
NEW = f"more/{name('DC', '14-9001')}"  # a file that was not there before
COLUMNS = {"path": "Image", "patient": "PatientID", "slide": "SlideNo", "subtype": "Diagnosis", "magnification": "Zoom"}
ROWS = [
    {"Image": f"scans/{k}.png", "PatientID": f"p{k // 2}", "SlideNo": f"s{k // 2}", "Diagnosis": "DC", "Zoom": "20x"}
    for k in range(12)
]


@dataclass
class Source:
    """A source of one of three kinds, with a version of it published."""

    root: Path
    kind: str
    url: str
    status: list[int | str]
    """What the server answers next instead of the archive; ``cut`` breaks off in the middle of it."""

    @property
    def name(self) -> str:
        return f"my-{self.kind}"

    @property
    def yaml(self) -> Path:
        return self.root / "conf" / "sources" / f"{self.name}.yaml"

    @property
    def images(self) -> Path:
        return self.root / "images"

    @property
    def store(self) -> Store:
        return Store((self.root / "home" / "store").as_uri())

    def declare(self, **changes: Any) -> None:
        """Change keys of the YAML file."""
        self.yaml.write_text(yaml.safe_dump({**yaml.safe_load(self.yaml.read_text()), **changes}))

    def put(self, path: str, data: bytes) -> None:
        write_tree(self.images, {path: data})

    def pack(self, data: bytes, **changes: Any) -> None:
        """Publish another archive, and its hash in the YAML file."""
        (self.root / "site" / "all.zip").write_bytes(data)
        self.declare(sha256=hashlib.sha256(data).hexdigest(), **changes)

    def write_table(self, *rows: Json, encoding: str = "utf-8", columns: dict[str, str] | None = None) -> None:
        """Write another table."""
        text = io.StringIO()
        names = list(COLUMNS.values())
        writer = csv.DictWriter(text, names)
        writer.writerow(columns or dict(zip(names, names, strict=True)))
        writer.writerows(rows or ROWS)
        (self.images / "cases.csv").write_text(text.getvalue(), encoding=encoding)

    def ingest(self) -> tuple[int, Json, str]:
        """``breakhis ingest``: its exit status, its result and the lines it says."""
        out, err = io.StringIO(), io.StringIO()
        code = 0
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            patch.setenv("BREAKHIS_HOME", str(self.root / "home"))
            patch.setenv("BREAKHIS_CONF", str(self.root / "conf"))
            patch.setattr("ml.core.settings.Settings.worker_count", 0)  # decode here: a process starts in seconds
            patch.setenv("NO_PROXY", "127.0.0.1")
            patch.setattr(sys, "argv", ["breakhis", "ingest", self.name, "--json"])
            try:
                cli.main()
            except SystemExit as end:
                code = int(end.code or 0)
        lines = out.getvalue().splitlines()
        return code, json.loads(lines[-1]) if lines else {}, err.getvalue()

    def published(self) -> Json:
        value, _ = self.store.read(f"refs/sources/{self.name}.json")
        assert isinstance(value, dict)
        return value

    def leftovers(self) -> list[str]:
        """What lies in scratch folders; locks are to stay."""
        places = [self.root / "home" / "store" / "tmp", self.root / "home" / "cache" / "http"]
        files = [path for place in places for path in place.rglob("*")]
        return [path.name for path in files if path.is_file() and path.suffix != ".lock" and path.name != "lock"]


def zipped(files: dict[str, bytes], **how: Any) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", **how) as archive:
        for path, data in files.items():
            archive.writestr(path, data)
    return packed.getvalue()


def zipped_with(path: str, data: bytes, mode: int = 0o644) -> bytes:
    """All the images and one thing more."""
    packed = io.BytesIO(zipped(IMAGES))
    with zipfile.ZipFile(packed, "a") as archive:
        entry = zipfile.ZipInfo(path)
        entry.external_attr = mode << 16
        with warnings.catch_warnings(action="ignore"):  # of a name that is there already
            archive.writestr(entry, data)
    return packed.getvalue()


def encrypted() -> bytes:
    """The images in an archive of which each entry says that it is encrypted."""
    data = bytearray(zipped(IMAGES))
    for signature, flags in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        at = data.find(signature)
        while at >= 0:
            data[at + flags] |= 1
            at = data.find(signature, at + 4)
    return bytes(data)


def tarred(entry: tarfile.TarInfo | None = None, mode: Any = "w") -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode=mode) as archive:
        for path, data in IMAGES.items():
            member = tarfile.TarInfo(path)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        if entry:
            archive.addfile(entry)
    return packed.getvalue()


def device() -> tarfile.TarInfo:
    entry = tarfile.TarInfo("dev/null.png")
    entry.type = tarfile.CHRTYPE
    return entry


def link() -> tarfile.TarInfo:
    entry = tarfile.TarInfo("passwords.png")
    entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/passwd"
    return entry


def picture(mode: str, size: tuple[int, int] = (70, 46), form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, form)
    return buffer.getvalue()


def jpeg(mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(png(5))).convert(mode).save(buffer, "JPEG")
    return buffer.getvalue()


def replace_file(source: Source, path: str, make: Callable[[Path], Any]) -> None:
    """Put something else where an image was."""
    (source.images / path).unlink()
    make(source.images / path)


def row(k: int, **changes: str) -> Json:
    return {**ROWS[k], **changes}


def new_row(**changes: str) -> Json:
    return {**ROWS[0], "Image": "scans/new.png", **changes}
