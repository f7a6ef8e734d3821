"""Ways in which a delivery goes wrong, each after a good one was published, and what becomes of it.

Whatever happens: the last good version stays published unless a better one is, nothing half-made is left, what could
not be used is named in the Data Docs, and once the source is mended the next run is as if nothing had been.
"""

import contextlib
import csv
import hashlib
import io
import json
import os
import re
import shutil
import stat
import sys
import tarfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

import pandas as pd
import pytest
import yaml
from PIL import Image

from ml import cli
from ml.core.errors import EXIT_BAD_INPUT, EXIT_REFUSED, EXIT_TRY_AGAIN
from ml.core.store import Json, Store
from ml.core.taxonomy import SUBTYPES, label_of
from tests.data.sources.kaggle_server import all_names, noise_png
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

    def tell(self, *rows: Json, encoding: str = "utf-8", columns: dict[str, str] | None = None) -> None:
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
            patch.setenv("BREAKHIS_WORKERS", "1")
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


class Site(NamedTuple):
    url: str
    folder: list[Path]
    status: list[int | str]


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    """A web server of whatever folder it is told."""
    folder: list[Path] = []
    status: list[int | str] = []

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            data = (folder[0] / "all.zip").read_bytes()
            answer = status.pop(0) if status else 200
            if isinstance(answer, int) and answer != 200:
                self.send_error(answer)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2] if answer == "cut" else data)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield Site(f"http://127.0.0.1:{server.server_port}/all.zip", folder, status)
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def good(site: Site, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """For each kind a folder with its source, ingested and published."""
    roots = {}
    for kind in ("folder", "archive", "table"):
        root = roots[kind] = tmp_path_factory.mktemp(kind)
        source = Source(root, kind, site.url, site.status)
        for folder in (source.yaml.parent, source.images, root / "site"):
            folder.mkdir(parents=True)
        declared: Json = {"name": source.name, "kind": "directory", "path": str(source.images)}
        if kind == "archive":
            source.yaml.write_text(yaml.safe_dump({"name": source.name, "kind": "http", "url": site.url}))
            source.pack(zipped(IMAGES))
        elif kind == "table":
            write_tree(source.images, {f"scans/{k}.png": png(k) for k in range(len(ROWS))})
            source.tell()
            declared |= {"layout": "table", "table": {"file": "cases.csv", **COLUMNS}}
            source.yaml.write_text(yaml.safe_dump(declared))
        else:
            write_tree(source.images, IMAGES)
            source.yaml.write_text(yaml.safe_dump(declared))
        site.folder[:] = [root / "site"]
        code, result, err = source.ingest()
        assert (code, result["changed"], result["quarantined"]) == (0, True, {}), err
    return roots


@pytest.fixture
def source(request: pytest.FixtureRequest, good: dict[str, Path], site: Site, tmp_path: Path) -> Source:
    """A copy of a published source, to be corrupted."""
    kind = request.param
    root = tmp_path / "source"
    shutil.copytree(good[kind], root)
    site.folder[:] = [root / "site"]
    site.status.clear()
    made = Source(root, kind, site.url, site.status)
    if kind != "archive":
        made.declare(path=str(made.images))
    return made


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


def instead(source: Source, path: str, make: Callable[[Path], Any]) -> None:
    """Put something else where an image was."""
    (source.images / path).unlink()
    make(source.images / path)


def row(k: int, **changes: str) -> Json:
    return {**ROWS[k], **changes}


def new_row(**changes: str) -> Json:
    return {**ROWS[0], "Image": "scans/new.png", **changes}


class Case(NamedTuple):
    """One way to corrupt a source."""

    kind: str
    corrupt: Callable[[Source], Any]
    status: int
    says: str = ""
    """What the last line says of it, or of a failed check (status 4) its name."""
    quarantined: dict[str, str] = {}  # noqa: RUF012 - not changed
    """Reason by path."""
    gained: int = 0
    """Images that can be used and were not there before."""


def added(path: str, data: bytes, reason: str) -> Case:
    """A file that was not there before, beside good ones: only it is set aside."""
    return Case("folder", lambda source: source.put(path, data), 0, quarantined={path: reason})


def spoilt(data: bytes, reason: str) -> Case:
    """An image that was good: a quarter of its class is lost, which is too much."""
    return Case("folder", lambda source: source.put(DC[0], data), EXIT_REFUSED, "images_lost", {DC[0]: reason})


def told(says: str, corrupt: Callable[[Source], Any], kind: str = "folder", status: int = EXIT_BAD_INPUT) -> Case:
    return Case(kind, corrupt, status, says)


def packed(says: str, data: Callable[[], bytes]) -> Case:
    return told(says, lambda source: source.pack(data()), "archive")


def answered(says: str, answer: int | str, status: int) -> Case:
    """The publisher names a new archive, and the server does not give it out."""

    def corrupt(source: Source) -> None:
        source.pack(zipped({**IMAGES, NEW: png(1)}))
        source.status.append(answer)

    return told(says, corrupt, "archive", status)


def rows(*rows: Json, reason: str, path: str = "scans/new.png", gained: int = 0) -> Case:
    """A new picture with these rows, beside good ones."""

    def corrupt(source: Source) -> None:
        source.put("scans/new.png", png(99))
        source.tell(*ROWS, *rows)

    return Case("table", corrupt, 0, quarantined={path: reason}, gained=gained)


def tabled(says: str, corrupt: Callable[[Source], Any]) -> Case:
    return told(says, corrupt, "table")


TWO_CLASSES = dict.fromkeys((*DC[:2], f"more/{name('LC', '14-1041')}"), "slide_with_two_subtypes")

CASES = {
    # --- a file ---------------------------------------------------------------------------------------------------
    "a cut PNG": added(NEW, png(1)[:700], "truncated"),
    "a PNG that was good and is cut": spoilt(IMAGES[DC[0]][:700], "truncated"),
    "a header alone": added(NEW, png(1)[:33], "undecodable"),
    "no bytes": added(NEW, b"", "undecodable"),
    "no bytes where a picture was": spoilt(b"", "undecodable"),
    "a text named .png": added(NEW, b"to be delivered", "undecodable"),
    "bytes changed in the middle": added(NEW, png(1)[:400] + b"\xff" * 50 + png(1)[450:], "undecodable"),
    "16 bits": added(NEW, picture("I;16"), "mode"),
    "greyscale": added(NEW, png(1, mode="L"), "mode"),
    "a CMYK JPEG": added(NEW, jpeg("CMYK"), "mode"),
    "one pixel": added(NEW, picture("RGB", (1, 1)), "size"),
    "a header of 120 megapixels": added(NEW, picture("1", (20_000, 6_000)), "size"),
    "a header of 400 megapixels, more than Pillow opens": added(NEW, picture("1", (20_000, 20_000)), "size"),
    "a name outside the grammar": added("more/holiday.png", png(1), "name"),
    "a magnification that BreakHis has not": added("more/SOB_M_DC-14-9001-50-001.png", png(1), "name"),
    "a suffix in capitals": added(NEW.replace(".png", ".PNG"), png(1), "name"),
    "another image format": added(NEW.replace(".png", ".jpg"), jpeg(), "name"),
    "names that differ in case alone": added(PATHS[0].replace("SOB", "sob"), png(1), "name"),
    "a letter that contradicts its subtype": added("more/SOB_M_F-14-9001-40-001.png", png(1), "label"),
    "a folder that contradicts the name": added(f"benign/{Path(NEW).name}", png(1), "folder"),
    # --- a folder -------------------------------------------------------------------------------------------------
    "a slide under two subtypes": Case(
        "folder",
        lambda source: source.put(f"more/{name('LC', '14-1041')}", png(1)),
        EXIT_REFUSED,
        "images_lost",
        TWO_CLASSES,
    ),
    "the same pixels under two subtypes": Case(
        "folder",
        lambda source: source.put(f"more/{name('LC', '14-9002')}", IMAGES[DC[0]]),
        EXIT_REFUSED,
        "images_lost",
        {DC[0]: "conflicting_labels", f"more/{name('LC', '14-9002')}": "conflicting_labels"},
    ),
    "much that cannot be used": Case(
        "folder",
        lambda source: [source.put(f"more/{k}.png", png(k)) for k in range(5)],
        EXIT_REFUSED,
        "quarantine_rate",
        {f"more/{k}.png": "name" for k in range(5)},
    ),
    "a class is missing": told(
        "images_lost", lambda source: [(source.images / path).unlink() for path in DC], status=EXIT_REFUSED
    ),
    "an image is a dangling link": told(
        "images_lost", lambda source: instead(source, DC[0], lambda path: path.symlink_to("gone")), status=EXIT_REFUSED
    ),
    "an image is a link out of the folder": told(
        "images_lost",
        lambda source: instead(source, DC[0], lambda path: path.symlink_to("/etc/hostname")),
        status=EXIT_REFUSED,
    ),
    "an image is a folder": told("images_lost", lambda source: instead(source, DC[0], Path.mkdir), status=EXIT_REFUSED),
    "an image is a pipe": told("images_lost", lambda source: instead(source, DC[0], os.mkfifo), status=EXIT_REFUSED),
    "a name that is not UTF-8": told(
        r"bad\\xff.png: the name is not UTF-8, .* rename the file",
        lambda source: Path(os.fsdecode(os.fsencode(source.images) + b"/bad\xff.png")).write_bytes(png(1)),
    ),
    "a file beyond any size": told(
        rf"{NEW}: .* bytes, more than the .* allowed; remove the file",
        lambda source: (source.put(NEW, b""), os.truncate(source.images / NEW, 2**28 + 1)),
    ),
    "all images are gone": told(
        r"my-folder\.yaml: no image files below .*/images; looked for .bmp",
        lambda source: [(source.images / path).unlink() for path in PATHS],
    ),
    "no image can be used": told(
        r"none of its 32 image file\(s\) can be used: {'undecodable': 32}; first: benign/SOB_B_A-14-1001-40-001.png",
        lambda source: [(source.images / path).write_bytes(b"x") for path in PATHS],
    ),
    "the folder is gone": told(
        "/images: no such folder; create it, or correct 'path'", lambda source: shutil.rmtree(source.images)
    ),
    "the folder is a file": told(
        "/images: not a folder; 'path' must be the folder",
        lambda source: (shutil.rmtree(source.images), source.images.write_bytes(b"x")),
    ),
    # --- an archive -----------------------------------------------------------------------------------------------
    "a zip that is cut": packed("not a whole zip archive .*was removed", lambda: zipped(IMAGES)[:-100]),
    "a zip with a damaged image": packed(
        rf"{PATHS[0]} in it is damaged or cannot be unpacked",
        lambda: zipped(IMAGES).replace(IMAGES[PATHS[0]][99:199], b"\0" * 100),
    ),
    "a zip that leads out": packed(
        "'../../cron.png' leads out of the archive; it is not to be trusted",
        lambda: zipped_with("../../cron.png", b"x"),
    ),
    "a zip with an absolute name": packed(
        "'/cron.png' leads out of the archive", lambda: zipped_with("/cron.png", b"x")
    ),
    "a zip with a link": packed(
        "'passwords.png' is a link; an archive of images has no need of links",
        lambda: zipped_with("passwords.png", b"/etc/passwd", stat.S_IFLNK | 0o777),
    ),
    "a zip bomb": packed(
        "would unpack to .* more than 100 times as many",
        lambda: zipped({f"{k}.png": bytes(5 * 10**6) for k in range(3)}, compression=zipfile.ZIP_DEFLATED),
    ),
    "a zip with one name twice": packed(f"'{PATHS[0]}' is in it twice", lambda: zipped_with(PATHS[0], b"x")),
    "an encrypted zip": packed("is encrypted, password required", encrypted),
    "an archive in an archive": packed(
        r"no image files below http.* \(1 other files, such as images.zip\)",
        lambda: zipped({"images.zip": zipped(IMAGES)}),
    ),
    "a tar with a device": packed("'dev/null.png' is a device", lambda: tarred(device())),
    "a tar with a link": packed("'passwords.png' is a link", lambda: tarred(link())),
    "a tar.gz that is cut": packed("not a whole zip or tar archive, or damaged", lambda: tarred(mode="w:gz")[:-2000]),
    "a web page": packed("not a whole zip or tar archive, or damaged", lambda: b"<html>Please log in</html>" * 50),
    "no bytes of an archive": packed("not a whole zip or tar archive, or damaged", lambda: b""),
    "another archive than was named": told(
        "my-archive.yaml: what lies at .*all.zip has the SHA-256 .* It was removed",
        lambda source: source.declare(sha256="0" * 64),
        "archive",
    ),
    "an archive with a cut image": Case(
        "archive",
        lambda source: source.pack(zipped_with(NEW, png(1)[:700])),
        0,
        quarantined={NEW: "truncated"},
    ),
    "an archive that is gone": answered(r"there is nothing at .*all.zip \(404\)", 404, EXIT_BAD_INPUT),
    "an archive behind a login": answered("answers 403: it is not for everybody to read", 403, EXIT_BAD_INPUT),
    "a server with a fault": answered("answers 503; try again later", 503, EXIT_TRY_AGAIN),
    "a server that is busy": answered("answers 429; try again later", 429, EXIT_TRY_AGAIN),
    "a connection that breaks": answered("cannot be reached or broke off", "cut", EXIT_TRY_AGAIN),
    # --- a table --------------------------------------------------------------------------------------------------
    "a table without a column": tabled(
        r"my-table.yaml: cases.csv has no column 'Diagnosis'; it has: Image, PatientID, SlideNo, Dx, Zoom",
        lambda source: source.tell(columns={**{c: c for c in COLUMNS.values()}, "Diagnosis": "Dx"}),
    ),
    "a table with a column twice": tabled(
        "cases.csv has the column 'PatientID' twice",
        lambda source: source.put(
            "cases.csv", (source.images / "cases.csv").read_bytes().replace(b"Zoom", b"Zoom,PatientID")
        ),
    ),
    "rows that contradict": rows(new_row(), new_row(Diagnosis="LC", SlideNo="s9"), reason="conflicting_rows"),
    "a row without an image": rows(
        new_row(), new_row(Image="scans/none.png"), reason="missing_file", path="scans/none.png", gained=1
    ),
    "an image without a row": rows(reason="not_in_table"),
    "a subtype that nobody knows": rows(new_row(Diagnosis="carcinoma?"), reason="subtype"),
    "a magnification that is none": rows(new_row(Zoom="large"), reason="magnification"),
    "no patient": rows(new_row(PatientID=" "), reason="row"),
    "a slide of two patients": Case(
        "table",
        lambda source: source.tell(row(0, PatientID="p9"), *ROWS[1:]),
        EXIT_REFUSED,
        "patient_per_slide",
    ),
    "a table that is not UTF-8": tabled(
        "my-table.yaml: cases.csv cannot be read: .*utf-8",
        lambda source: source.tell(row(0, PatientID="Müller"), encoding="latin-1"),
    ),
    "a row with too many cells": tabled(
        "cases.csv cannot be read: .*line 14",
        lambda source: (source.images / "cases.csv").open("a").write("a,b,c,d,e,f,g\n"),
    ),
    "a Parquet file that is none": tabled(
        "my-table.yaml: cases.parquet cannot be read",
        lambda source: (
            source.put("cases.parquet", b"PAR1 garbage PAR1"),
            source.declare(table={"file": "cases.parquet", **COLUMNS}),
        ),
    ),
    "an empty table": tabled("cases.csv cannot be read: No columns", lambda source: source.put("cases.csv", b"")),
    "a table of no rows": tabled(
        r"none of its 12 image file\(s\) can be used: {'not_in_table': 12}",
        lambda source: source.put("cases.csv", ",".join(COLUMNS.values()).encode()),
    ),
    "the table is gone": tabled(
        r"my-table.yaml: the source has no file 'cases.csv' \(table: file\)",
        lambda source: (source.images / "cases.csv").unlink(),
    ),
    # --- its YAML -------------------------------------------------------------------------------------------------
    "an unknown key": told(r"my-folder.yaml: unknown key 'colour' \(known: ", lambda source: source.declare(colour=1)),
    "a kind that is none": told(
        r"unknown kind 'ftp' \(known: directory, kaggle", lambda source: source.declare(kind="ftp")
    ),
    "a key to be filled in": told(
        "my-folder.yaml: still to be filled in: path", lambda source: source.declare(path="TO FILL IN")
    ),
    "YAML that is none": told("my-folder.yaml: is not valid YAML", lambda source: source.yaml.write_text("name: [a\n")),
    "another name": told("my-folder.yaml: 'name' is 'b', .* make them agree", lambda source: source.declare(name="b")),
    "a hash that is none": told(
        "my-archive.yaml: 'sha256'", lambda source: source.declare(sha256="unknown"), "archive"
    ),
    "a claim to be all of BreakHis": told(
        "inventory", lambda source: source.declare(inventory=True), status=EXIT_REFUSED
    ),
}


@pytest.mark.parametrize(
    ("source", "case"), [pytest.param(case.kind, case, id=name) for name, case in CASES.items()], indirect=["source"]
)
def test_a_corrupted_source(source: Source, case: Case) -> None:
    before = source.published()
    sound = source.root.with_name("sound")
    parts = ("conf", "images", "site")
    for part in parts:
        shutil.copytree(source.root / part, sound / part)
    case.corrupt(source)

    code, result, err = source.ingest()

    assert code == case.status, err
    assert "Traceback" not in err
    assert source.leftovers() == (["archive.part"] if "broke off" in case.says else [])
    last = err.splitlines()[-1]
    if code in (EXIT_BAD_INPUT, EXIT_TRY_AGAIN):
        assert result == {}
        assert re.search(f"^error: .*{case.says}", last), last
    else:
        if code == EXIT_REFUSED:
            assert case.says in [check["name"] for check in result["failed"]]
            assert "did not pass validation" in last
        assert_quarantined(source, result, case)
    if code == 0 and case.gained:
        assert result["changed"]
        assert source.published()["images"] == result["images"] == before["images"] + case.gained
        return
    assert source.published() == before
    if case.status == EXIT_TRY_AGAIN:
        code, result, err = source.ingest()
        assert (code, result["images"]) == (0, before["images"] + 1), err
        assert source.leftovers() == []
        return

    for part in parts:
        shutil.rmtree(source.root / part, ignore_errors=True)
        (source.root / part).unlink(missing_ok=True)
        shutil.copytree(sound / part, source.root / part)
    code, result, err = source.ingest()
    assert (code, result["changed"], result["version"]) == (0, False, before["version"]), err
    assert source.leftovers() == []


def assert_quarantined(source: Source, result: Json, case: Case) -> None:
    """The table and the Data Docs name each file with its reason, and no other."""
    quarantine = pd.read_parquet(source.store.file(result["manifest"], "quarantine.parquet"))
    assert dict(zip(quarantine["path"], quarantine["reason"], strict=True)) == case.quarantined
    assert quarantine["detail"].str.len().gt(0).all()
    docs = Path(result["docs"].removeprefix("file://")).parent
    page = (docs / "quarantine.html").read_text()
    assert page.count("<tr>") == 1 + len(case.quarantined)
    for path, reason in case.quarantined.items():
        assert f"<td>{path}</td><td>{reason}</td>" in page
    if case.status == EXIT_REFUSED:
        assert re.search(rf"did not pass: [^<]*{case.says} failed", (docs / "index.html").read_text())


def test_a_source_that_claims_to_be_all_of_breakhis(site: Site, tmp_path: Path) -> None:
    """With as many names as BreakHis has; the pictures are specks."""
    source = Source(tmp_path, "folder", site.url, site.status)
    source.yaml.parent.mkdir(parents=True)
    write_tree(
        source.images, {str(one): noise_png(f"{one.slide}-{one.magnification}-{one.seq}", 8) for one in all_names()}
    )
    declared = {"name": source.name, "kind": "directory", "path": str(source.images), "inventory": True}
    source.yaml.write_text(yaml.safe_dump(declared))
    code, result, err = source.ingest()
    assert (code, result["images"], result["quarantined"]) == (0, 7909 - 246, {"slide_with_two_subtypes": 246}), err
    before = source.published()

    source.put(name("A", "14-22549AB", 40, 999), png(1))
    for path in source.images.glob("SOB_M_PC-14-*"):
        path.unlink()
    code, result, err = source.ingest()
    assert code == EXIT_REFUSED, err
    assert {check["name"] for check in result["failed"]} == {"inventory", "images_lost"}
    [found] = [check["observed"] for check in result["failed"] if check["name"] == "inventory"]
    assert "A at 40X: expected 114, found 115 (slide 14-22549AB: 30 of 29)" in found
    assert re.search(r"PC at 400X: expected 138, found \d+ ", found)
    assert source.published() == before


@pytest.mark.parametrize(
    ("source", "path", "data", "images", "duplicates"),
    [
        pytest.param("folder", NEW, jpeg(), 33, 0, id="a JPEG named .png"),
        pytest.param("folder", NEW, png(1, mode="RGBA"), 33, 0, id="a channel for transparency"),
        pytest.param("folder", NEW, png(1, mode="P"), 33, 0, id="a palette"),
        pytest.param("folder", f"more/{Path(DC[0]).name}", png(1), 32, 1, id="the same name with other bytes"),
        pytest.param("folder", f"more/{name('DC', '14-1041', 100)}", IMAGES[DC[0]], 32, 1, id="the same pixels again"),
        pytest.param("folder", "Thumbs.db", b"x", 32, 0, id="a file of no concern"),
    ],
    indirect=["source"],
)
def test_what_looks_odd_and_is_no_fault(source: Source, path: str, data: bytes, images: int, duplicates: int) -> None:
    source.put(path, data)
    code, result, err = source.ingest()
    assert (code, result["images"], result["duplicates"], result["quarantined"]) == (0, images, duplicates, {}), err
