"""Ways in which a delivery goes wrong, and what is said about each."""

import os
import shutil
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ml.core.errors import EXIT_BAD_INPUT, EXIT_REFUSED, EXIT_TRY_AGAIN
from ml.core.store import Json
from tests.data.sources.corrupted_source import (
    COLUMNS,
    DC,
    IMAGES,
    NEW,
    PATHS,
    ROWS,
    Source,
    device,
    encrypted,
    jpeg,
    link,
    new_row,
    picture,
    replace_file,
    row,
    tarred,
    zipped,
    zipped_with,
)
from tests.helpers.made_up import name, png


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


def reported(says: str, corrupt: Callable[[Source], Any], kind: str = "folder", status: int = EXIT_BAD_INPUT) -> Case:
    return Case(kind, corrupt, status, says)


def bad_archive(says: str, data: Callable[[], bytes]) -> Case:
    return reported(says, lambda source: source.pack(data()), "archive")


def bad_answer(says: str, answer: int | str, status: int) -> Case:
    """The publisher names a new archive, and the server does not give it out."""

    def corrupt(source: Source) -> None:
        source.pack(zipped({**IMAGES, NEW: png(1)}))
        source.status.append(answer)

    return reported(says, corrupt, "archive", status)


def rows(*rows: Json, reason: str, path: str = "scans/new.png", gained: int = 0) -> Case:
    """A new picture with these rows, beside good ones."""

    def corrupt(source: Source) -> None:
        source.put("scans/new.png", png(99))
        source.write_table(*ROWS, *rows)

    return Case("table", corrupt, 0, quarantined={path: reason}, gained=gained)


def bad_table(says: str, corrupt: Callable[[Source], Any]) -> Case:
    return reported(says, corrupt, "table")


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
    "a class is missing": reported(
        "images_lost", lambda source: [(source.images / path).unlink() for path in DC], status=EXIT_REFUSED
    ),
    "an image is a dangling link": reported(
        "images_lost",
        lambda source: replace_file(source, DC[0], lambda path: path.symlink_to("gone")),
        status=EXIT_REFUSED,
    ),
    "an image is a link out of the folder": reported(
        "images_lost",
        lambda source: replace_file(source, DC[0], lambda path: path.symlink_to("/etc/hostname")),
        status=EXIT_REFUSED,
    ),
    "an image is a folder": reported(
        "images_lost", lambda source: replace_file(source, DC[0], Path.mkdir), status=EXIT_REFUSED
    ),
    "an image is a pipe": reported(
        "images_lost", lambda source: replace_file(source, DC[0], os.mkfifo), status=EXIT_REFUSED
    ),
    "a name that is not UTF-8": Case(
        "folder",
        lambda source: Path(os.fsdecode(os.fsencode(source.images) + b"/bad\xff.png")).write_bytes(png(1)),
        0,
        quarantined={"bad\\xff.png": "name"},
    ),
    "a file beyond any size": Case(
        "folder",
        lambda source: (source.put(NEW, b""), os.truncate(source.images / NEW, 2**28 + 1)),
        0,
        quarantined={NEW: "size"},
    ),
    "a file beyond any size in an archive": Case(
        "archive",
        lambda source: source.pack(zipped({**IMAGES, NEW: bytes(2**28 + 1)}, compression=zipfile.ZIP_DEFLATED)),
        0,
        quarantined={NEW: "size"},
    ),
    "a table beyond any size": bad_table(
        r"my-table\.yaml: its table cases\.csv: .* bytes, more than the .* allowed",
        lambda source: (source.put("cases.csv", b""), os.truncate(source.images / "cases.csv", 2**28 + 1)),
    ),
    "a link to itself that is called like an image": Case(
        "folder", lambda source: (source.images / "loop.png").symlink_to("loop.png"), 0
    ),
    "another file with a name that is not UTF-8": Case(
        "folder",
        lambda source: Path(os.fsdecode(os.fsencode(source.images) + b"/bad\xff.txt")).write_bytes(b"notes"),
        0,
    ),
    "names with line breaks, tabs, an apostrophe and as many bytes as may be": Case(
        "folder",
        lambda source: [source.put(f"{odd}.png", png(1)) for odd in ("a\nb", "c\td", "e'f", "h" * 251)],
        EXIT_REFUSED,
        "quarantine_rate",
        dict.fromkeys(("a\nb.png", "c\td.png", "e'f.png", "h" * 251 + ".png"), "name"),
    ),
    "all images are gone": reported(
        r"my-folder\.yaml: no image files below .*/images; looked for .bmp",
        lambda source: [(source.images / path).unlink() for path in PATHS],
    ),
    "no image can be used": reported(
        r"none of its 32 image file\(s\) can be used: {'undecodable': 32}; first: benign/SOB_B_A-14-1001-40-001.png",
        lambda source: [(source.images / path).write_bytes(b"x") for path in PATHS],
    ),
    "the folder is gone": reported(
        "/images: no such folder; create it, or correct 'path'", lambda source: shutil.rmtree(source.images)
    ),
    "the folder is a file": reported(
        "/images: not a folder; 'path' must be the folder",
        lambda source: (shutil.rmtree(source.images), source.images.write_bytes(b"x")),
    ),
    # --- an archive -----------------------------------------------------------------------------------------------
    "a zip that is cut": bad_archive("not a whole zip archive .*was removed", lambda: zipped(IMAGES)[:-100]),
    "a zip with a damaged image": bad_archive(
        rf"{PATHS[0]} in it is damaged or cannot be unpacked",
        lambda: zipped(IMAGES).replace(IMAGES[PATHS[0]][99:199], b"\0" * 100),
    ),
    "a zip that leads out": bad_archive(
        "'../../cron.png' leads out of the archive; it is not to be trusted",
        lambda: zipped_with("../../cron.png", b"x"),
    ),
    "a zip with an absolute name": bad_archive(
        "'/cron.png' leads out of the archive", lambda: zipped_with("/cron.png", b"x")
    ),
    "a zip with a link": bad_archive(
        "'passwords.png' is a link; an archive of images has no need of links",
        lambda: zipped_with("passwords.png", b"/etc/passwd", stat.S_IFLNK | 0o777),
    ),
    "a zip bomb": bad_archive(
        "would unpack to .* more than 100 times as many",
        lambda: zipped({f"{k}.png": bytes(5 * 10**6) for k in range(3)}, compression=zipfile.ZIP_DEFLATED),
    ),
    "a zip with one name twice": bad_archive(f"'{PATHS[0]}' is in it twice", lambda: zipped_with(PATHS[0], b"x")),
    "an encrypted zip": bad_archive("is encrypted, password required", encrypted),
    "an archive in an archive": bad_archive(
        r"no image files below http.* \(1 other files, such as images.zip\)",
        lambda: zipped({"images.zip": zipped(IMAGES)}),
    ),
    "a tar with a device": bad_archive("'dev/null.png' is a device", lambda: tarred(device())),
    "a tar with a link": bad_archive("'passwords.png' is a link", lambda: tarred(link())),
    "a tar.gz that is cut": bad_archive(
        "not a whole zip or tar archive, or damaged", lambda: tarred(mode="w:gz")[:-2000]
    ),
    "a web page": bad_archive("not a whole zip or tar archive, or damaged", lambda: b"<html>Please log in</html>" * 50),
    "no bytes of an archive": bad_archive("not a whole zip or tar archive, or damaged", lambda: b""),
    "another archive than was named": reported(
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
    "an archive that is gone": bad_answer(r"there is nothing at .*all.zip \(404\)", 404, EXIT_BAD_INPUT),
    "an archive behind a login": bad_answer("answers 403: it is not for everybody to read", 403, EXIT_BAD_INPUT),
    "a server with a fault": bad_answer("answers 503; try again later", 503, EXIT_TRY_AGAIN),
    "a server that is busy": bad_answer("answers 429; try again later", 429, EXIT_TRY_AGAIN),
    "a connection that breaks": bad_answer("cannot be reached or broke off", "cut", EXIT_TRY_AGAIN),
    # --- a table --------------------------------------------------------------------------------------------------
    "a table without a column": bad_table(
        r"my-table.yaml: cases.csv has no column 'Diagnosis'; it has: Image, PatientID, SlideNo, Dx, Zoom",
        lambda source: source.write_table(columns={**{c: c for c in COLUMNS.values()}, "Diagnosis": "Dx"}),
    ),
    "a table with a column twice": bad_table(
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
        lambda source: source.write_table(row(0, PatientID="p9"), *ROWS[1:]),
        EXIT_REFUSED,
        "patient_per_slide",
    ),
    "a table that is not UTF-8": bad_table(
        "my-table.yaml: cases.csv cannot be read: line 2: the byte 0x.. is no UTF-8",
        lambda source: source.write_table(row(0, PatientID="Müller"), encoding="latin-1"),
    ),
    "a row with too many cells": bad_table(
        "cases.csv cannot be read: .*line 14",
        lambda source: (source.images / "cases.csv").open("a").write("a,b,c,d,e,f,g\n"),
    ),
    "a Parquet file that is none": bad_table(
        "my-table.yaml: cases.parquet cannot be read",
        lambda source: (
            source.put("cases.parquet", b"PAR1 garbage PAR1"),
            source.declare(table={"file": "cases.parquet", **COLUMNS}),
        ),
    ),
    "an empty table": bad_table("cases.csv cannot be read: it is empty", lambda source: source.put("cases.csv", b"")),
    "a table of no rows": bad_table(
        r"none of its 12 image file\(s\) can be used: {'not_in_table': 12}",
        lambda source: source.put("cases.csv", ",".join(COLUMNS.values()).encode()),
    ),
    "the table is gone": bad_table(
        r"my-table.yaml: the source has no file 'cases.csv' \(table: file\)",
        lambda source: (source.images / "cases.csv").unlink(),
    ),
    # --- its YAML -------------------------------------------------------------------------------------------------
    "an unknown key": reported(
        r"my-folder.yaml: line \d+: unknown key 'colour' \(known: ", lambda source: source.declare(colour=1)
    ),
    "a kind that is none": reported(
        r"unknown kind 'ftp' \(known: directory, kaggle", lambda source: source.declare(kind="ftp")
    ),
    "a key to be filled in": reported(
        "my-folder.yaml: still to be filled in: path", lambda source: source.declare(path="TO FILL IN")
    ),
    "YAML that is none": reported(
        r"my-folder.yaml: line \d+: is not valid YAML", lambda source: source.yaml.write_text("name: [a\n")
    ),
    "another name": reported(
        "my-folder.yaml: 'name' is 'b', .* make them agree", lambda source: source.declare(name="b")
    ),
    "a hash that is none": reported(
        r"my-archive.yaml: line \d+: 'sha256'", lambda source: source.declare(sha256="unknown"), "archive"
    ),
    "a claim to be all of BreakHis": reported(
        "inventory", lambda source: source.declare(inventory=True), status=EXIT_REFUSED
    ),
}
