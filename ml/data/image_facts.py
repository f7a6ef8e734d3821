"""What is known of an image besides its pixels: by its BreakHis file name, or by its source's table."""

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from ml.core.errors import SourceError
from ml.core.store import Store
from ml.core.taxonomy import label_of, parse_name
from ml.data.sources import SourceSpec
from ml.data.sources.tables import Row, read_table


class SourceFile(NamedTuple):
    """A file of a raw version, by its path and its hash; the hash is empty where the patient was erased."""

    path: str
    sha256: str


class Facts(NamedTuple):
    """What is known of an image besides its pixels, by its file name or by the source's table."""

    key: str
    """Two files with one key are the same image."""
    patient: str
    slide: str
    subtype: str
    label: str
    magnification: int
    seq: int


class Unusable(Exception):
    """A file of which nothing is known that could be used; says why."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail


Describe = Callable[[str], Facts]
"""From a file's path to what is known of it; raises :class:`Unusable`."""


def by_file_name(path: str) -> Facts:
    """What the name of a BreakHis file tells.

    Raises:
        Unusable: it is outside the grammar.
    """
    basename = path.rpartition("/")[2]
    try:
        name = parse_name(basename)
    except ValueError as error:
        raise Unusable("name", str(error)) from None
    return Facts(basename, name.case, name.slide, name.subtype, name.label, name.magnification, name.seq)


def by_table(spec: SourceSpec, files: list[SourceFile], store: Store) -> tuple[list[SourceFile], Describe, list[Row]]:
    """The images without the table, what it tells of each, and its rows without an image."""
    assert spec.table
    table = next((file for file in files if file.path == spec.table.file), None)
    if not table:
        raise SourceError(f"{spec.file}: the source has no file {spec.table.file!r} (table: file)")
    images = [file for file in files if file is not table]
    told = read_table(spec, store.blob(table.sha256), [file.path for file in images])
    # A number for each image of a slide at a magnification, which is what BreakHis' names have.
    numbers: Counter[tuple[str, str, int]] = Counter()
    known: dict[str, Facts] = {}
    for file in images:
        row = told.get(file.path)
        if row and not row.problem:
            place = (row.subtype, row.slide, row.magnification)
            numbers[place] += 1
            label = label_of(row.subtype)
            known[file.path] = Facts(
                file.path, row.patient, row.slide, row.subtype, label, row.magnification, numbers[place]
            )

    def describe(path: str) -> Facts:
        if path in known:
            return known[path]
        row = told.get(path)
        raise Unusable(*(row.problem if row and row.problem else ("not_in_table", f"no row in {table.path}")))

    there = {file.path for file in images}
    return images, describe, [row for path, row in told.items() if path not in there]
