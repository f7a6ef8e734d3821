"""ImageFacts about an image besides its pixels, read from its BreakHis file name or from its source's table."""

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from ml.core.errors import SourceError
from ml.core.store import Store
from ml.core.taxonomy import label_of, parse_name
from ml.data.sources import SourceSpec
from ml.data.sources.tables import TableRow, read_table


class SourceFile(NamedTuple):
    """The path and the SHA-256 of a file in a raw version; the hash is empty where the patient was erased."""

    path: str
    sha256: str


class ImageFacts(NamedTuple):
    """The facts about an image that its file name or the source's table states."""

    key: str
    """Identifies the image: two files with the same key are the same image."""
    patient: str
    slide: str
    subtype: str
    label: str
    magnification: int
    seq: int


class UnusableFile(Exception):
    """No usable facts are known about a file; holds the quarantine reason and its detail."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail


ReadFacts = Callable[[str], ImageFacts]
"""Returns the facts about the file at a path; raises :class:`UnusableFile`."""


def read_file_name_facts(path: str) -> ImageFacts:
    """Returns the facts that the name of a BreakHis file states.

    Raises:
        UnusableFile: the name is outside the grammar.
    """
    basename = path.rpartition("/")[2]
    try:
        name = parse_name(basename)
    except ValueError as error:
        raise UnusableFile("name", str(error)) from None
    return ImageFacts(basename, name.case, name.slide, name.subtype, name.label, name.magnification, name.seq)


def read_table_facts(
    spec: SourceSpec, files: list[SourceFile], store: Store, max_rows: int
) -> tuple[list[SourceFile], ReadFacts, list[TableRow]]:
    """Reads the facts about a source's images from its table, which may have ``max_rows``.

    Returns:
        the source's files without the table itself, a reader of the facts about each, and the table's rows without an
        image.

    Raises:
        SourceError: the source has no such table, or it cannot be read.
    """
    assert spec.table
    tables = [file for file in files if spec.table.is_at(file.path)]
    if not tables:
        raise SourceError(f"{spec.file}: the source has no file {spec.table.file!r} (table: file)")
    if len(tables) > 1:
        raise SourceError(f"{spec.file}: the source has {len(tables)} files {spec.table.file!r} (table: file)")
    [table] = tables
    images = [file for file in files if file is not table]
    rows = read_table(spec, store.blob(table.sha256), [file.path for file in images], max_rows)
    # Numbers the images of a slide at a magnification, as BreakHis' file names do.
    numbers: Counter[tuple[str, str, int]] = Counter()
    facts: dict[str, ImageFacts] = {}
    for file in images:
        row = rows.get(file.path)
        if row and not row.problem:
            stratum = (row.subtype, row.slide, row.magnification)
            numbers[stratum] += 1
            label = label_of(row.subtype)
            facts[file.path] = ImageFacts(
                file.path, row.patient, row.slide, row.subtype, label, row.magnification, numbers[stratum]
            )

    def read_facts(path: str) -> ImageFacts:
        if path in facts:
            return facts[path]
        row = rows.get(path)
        raise UnusableFile(*(row.problem if row and row.problem else ("not_in_table", f"no row in {table.path}")))

    paths = {file.path for file in images}
    return images, read_facts, [row for path, row in rows.items() if path not in paths]
