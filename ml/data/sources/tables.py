"""The layout ``table``: a CSV or Parquet file of a source that describes its images."""

import csv
import io
import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

from ml.core.errors import SourceError
from ml.core.messages import cut_text, list_items, quote_value
from ml.core.taxonomy import SUBTYPES
from ml.core.text_files import decode_text
from ml.data.identifiers import (
    compose_letters,
    explain_unusable_identifier,
    format_value,
    lower_suffix,
    normalize_identifier,
    normalize_path,
)
from ml.data.sources.spec import SourceSpec, TableSpec

if TYPE_CHECKING:
    import pyarrow as pa

_MAGNIFICATION = re.compile(r"([1-9][0-9]{0,3})(?:[.,]0{1,2})?\s*[xX×]?")
_FIRST_ROW = 2  # of a Parquet file, as if it had a header


class TableRow(NamedTuple):
    """What a table says about one image. ``problem`` is the reason why it cannot be used, and its detail."""

    path: str
    patient: str = ""
    slide: str = ""
    subtype: str = ""
    magnification: int = 0
    problem: tuple[str, str] | None = None


def read_table(spec: SourceSpec, data: bytes, paths: Iterable[str]) -> dict[str, TableRow]:
    """Reads a source's table.

    The source's cohort is put before patients and slides, since two hospitals may use the same numbers. A row that
    names a folder means the image at that path alone, and ``./a.png`` the one at the root; a row that gives a file name
    alone, the only image of that name.

    Args:
        spec: the source; it has a table.
        data: the content of the table's file.
        paths: the source's image files.

    Returns:
        the row of each path. Rows that name no image of the source have a problem, and so have images with rows that
        contradict each other.

    Raises:
        SourceError: the table cannot be read, or a column is missing.
    """
    table = spec.table
    assert table
    parsed = [
        (number, _names_folder(cells[table.path]), _parse_row(spec, table, cells, f"{table.file} row {number}"))
        for number, cells in _read_cells(spec, table, data)
    ]
    images = _ImagesByName(paths, (row.path for _, with_folder, row in parsed if with_folder))
    rows: dict[str, TableRow] = {}
    for number, with_folder, row in parsed:
        image, why_none = images.find(row.path, with_folder=with_folder)
        problem = row.problem
        if image is None:
            problem = ("missing_file", f"{table.file} row {number}: {why_none}")
        elif image in rows and rows[image]._replace(path=row.path) != row:
            problem = ("conflicting_rows", f"{table.file} row {number} contradicts an earlier one")
        rows[image or row.path] = row._replace(problem=problem)
    return rows


class _ImagesByName:
    """The images of a source, to be found by what a row of its table calls them. Suffixes may be in any case.

    Args:
        delivered: the paths of the source's images.
        named: the paths of rows that name a folder, as :func:`normalize_path` writes them.
    """

    def __init__(self, delivered: Iterable[str], named: Iterable[str]) -> None:
        self._by_path: dict[str, list[str]] = defaultdict(list)
        for path in delivered:
            self._by_path[normalize_path(path)].append(path)
        self._paths_in_any_case: dict[str, set[str]] = defaultdict(set)
        for path in self._by_path:
            self._paths_in_any_case[lower_suffix(path)].add(path)
        self._paths_by_file_name: dict[str, set[str]] = defaultdict(set)
        for path in (*self._by_path, *named):
            self._paths_by_file_name[lower_suffix(_file_name(path))].update(self._find_paths(path) or [path])

    def find(self, name: str, *, with_folder: bool) -> tuple[str | None, str]:
        """Returns the image that a row means; or None, and why it means none of them.

        A file name alone is the path of an image at the root. Else it is the image's only if no other image has it,
        delivered or named by a row; a row with a folder means its path alone.
        """
        same_name = sorted(self._paths_by_file_name.get(lower_suffix(_file_name(name)), ()))
        meant = self._find_paths(name) if with_folder or name in self._by_path else same_name
        if len(meant) > 1:
            examples = list_items(meant[:2], " and ")
            if with_folder:
                return None, f"several images differ from it in the suffix' case alone: {examples}; write it as one is"
            return None, f"several images have this name, such as {examples}; give the path"
        images = self._by_path.get(meant[0], []) if meant else []
        if len(images) > 1:
            return None, f"{len(images)} images have this name, which differ in how it is encoded; rename them"
        if images:
            return images[0], ""
        elsewhere = [other for other in same_name if other in self._by_path]
        hint = f"; {cut_text(elsewhere[0])} lies in another folder than the row says" if elsewhere else ""
        return None, f"there is no such image in the source{hint}"

    def _find_paths(self, path: str) -> list[str]:
        """Returns the path if an image is delivered there; else those that differ from it in the suffix' case alone."""
        return [path] if path in self._by_path else sorted(self._paths_in_any_case.get(lower_suffix(path), ()))


def _names_folder(written: str) -> bool:
    """Says whether a cell names a folder, were it the root: ``./a.png`` is a path, ``a.png`` a file name alone."""
    return "/" in written.replace("\\", "/")


def _file_name(path: str) -> str:
    return path.rpartition("/")[2]


def _read_cells(spec: SourceSpec, table: TableSpec, data: bytes) -> Iterator[tuple[int, dict[str, str]]]:
    """Yields each row's number and the text of its declared columns, by column; empty cells are empty."""
    import pyarrow as pa

    names = [table.path, table.patient, table.subtype, table.magnification, *([table.slide] if table.slide else [])]
    try:
        if table.file.lower().endswith(".parquet"):
            numbers: Iterable[int] = itertools.count(_FIRST_ROW)
            columns = _read_parquet(data)
        else:
            numbers, columns = _read_csv(data)
        same_name = {name: [text for other, text in columns if other == compose_letters(name)] for name in names}
        if missing := [name for name in names if not same_name[name]]:
            raise SourceError(
                f"{spec.file}: {table.file} has no column {list_items(map(quote_value, missing))}; it has: "
                f"{list_items(name for name, _ in columns)}"
            )
        if twice := [name for name in names if len(same_name[name]) > 1]:
            raise SourceError(f"{spec.file}: {table.file} has the column {quote_value(twice[0])} twice")
        cells = {name: list(same_name[name][0]) for name in names}
    except (ValueError, OSError, pa.ArrowException) as error:
        raise SourceError(f"{spec.file}: {table.file} cannot be read: {cut_text(error)}") from None
    rows = (dict(zip(cells, row, strict=True)) for row in zip(*cells.values(), strict=True))
    return zip(numbers, rows, strict=False)


def _read_csv(data: bytes) -> tuple[list[int], list[tuple[str, Iterable[str]]]]:
    """Returns the line at which each row begins, as an editor counts them, and each column's name and texts.

    What a CSV file holds is text, also where it looks like numbers. Lines without any text are no rows.

    Raises:
        ValueError: it is no UTF-8, a quotation mark is missing, or a row has more cells than the header.
    """
    reader = csv.reader(io.StringIO(decode_text(data), newline=""), strict=True)
    rows: list[tuple[int, list[str]]] = []
    end = 0
    try:
        for row in reader:
            start, end = end + 1, reader.line_num
            if any(cell.strip() for cell in row):
                rows.append((start, row))
    except csv.Error as error:
        raise ValueError(f"line {end + 1}: {error}") from None
    if not rows:
        raise ValueError("it is empty")
    (_, header), *rows = rows
    for number, row in rows:
        if any(row[len(header) :]):
            raise ValueError(f"line {number} has {len(row)} cells and the header {len(header)}")
    columns: list[tuple[str, Iterable[str]]] = [
        (compose_letters(name), [format_value(row[place] if place < len(row) else "") for _, row in rows])
        for place, name in enumerate(header)
    ]
    return [number for number, _ in rows], columns


def _read_parquet(data: bytes) -> list[tuple[str, Iterable[str]]]:
    """Returns each column's name and texts.

    Read with Arrow: pandas would make numbers with a decimal point of whole numbers among which one is missing.
    """
    from pyarrow import parquet

    table = parquet.read_table(io.BytesIO(data))
    return [
        (compose_letters(name), _format_column(name, column))
        for name, column in zip(table.column_names, table.columns, strict=True)
    ]


def _format_column(name: str, column: "pa.ChunkedArray") -> Iterator[str]:
    """Yields a column's values as text.

    Raises:
        ValueError: it holds lists or other nested values.
    """
    import pyarrow as pa

    kind = column.type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
        column = column.cast(kind)
    if pa.types.is_nested(kind):
        raise ValueError(f"the column {quote_value(name)} holds {cut_text(kind)}, neither text nor numbers")
    if not pa.types.is_floating(kind):
        yield from map(format_value, column.to_pylist())
        return
    # Written and read once more, so that a short type's value is not shown with the digits of a long one.
    values = [float(str(value)) for value in column.to_numpy()]
    exact_below = 2.0 ** {16: 11, 32: 24, 64: 53}[kind.bit_width]
    yield from (format_value(value, exact_below) for value in values)


def _parse_row(spec: SourceSpec, table: TableSpec, cells: Mapping[str, str], where: str) -> TableRow:
    """Returns the row of one image, with its problem if it has one; ``where`` names the row in messages."""
    patient, subtype_cell = cells[table.patient], cells[table.subtype]
    slide = cells[table.slide] if table.slide else patient
    meanings = {normalize_identifier(said): subtype for said, subtype in table.subtypes.items()}
    subtype = meanings.get(subtype_cell, subtype_cell if subtype_cell in SUBTYPES else "")
    magnification = _MAGNIFICATION.fullmatch(cells[table.magnification])
    row = TableRow(
        normalize_path(cells[table.path]) if cells[table.path] else "",
        f"{spec.cohort}:{patient}" if patient else "",
        f"{spec.cohort}:{slide}" if slide else "",
        subtype,
        int(magnification[1]) if magnification else 0,
    )
    unusable = {
        **({} if cells[table.path] else {table.path: "is empty"}),
        **{column: explain_unusable_identifier(cells[column]) for column in (table.patient, table.slide) if column},
    }
    if faults := [f"{quote_value(column)} {fault}" for column, fault in unusable.items() if fault]:
        return row._replace(problem=("row", f"{where}: {', '.join(faults)}"))
    if not subtype:
        return row._replace(
            problem=("subtype", f"{where}: {quote_value(subtype_cell)} is no subtype that 'subtypes' knows")
        )
    if not magnification:
        detail = f"{where}: {quote_value(cells[table.magnification])} is no magnification such as 40 or 40x"
        return row._replace(problem=("magnification", detail))
    return row
