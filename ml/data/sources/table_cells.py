"""The cells of a table's declared columns as text, row by row: memory is taken for those columns' rows alone.

CSV and Parquet files are read. A file that is small because it is packed well is refused before it is unpacked.
"""

import csv
import io
import re
from collections.abc import Iterable, Iterator, Sequence

import pyarrow as pa

from ml.core.errors import SourceError
from ml.core.messages import cut_text, list_items, quote_value
from ml.core.text_files import decode_text
from ml.data.identifiers import compose_letters, format_value
from ml.data.sources.files import MAX_FILE_BYTES
from ml.data.sources.table_formats import name_other_format, name_other_separator

MAX_ROWS = 500_000
"""Rows of a table where no setting says otherwise. Each takes up to a kilobyte of memory."""

MAX_ROW_TEXT = 2**20
"""Characters of one row of a CSV file, in all of its columns."""

_FIRST_ROW = 2  # of a Parquet file, as if it had a header
_BATCH = 2**13
_LINE = re.compile(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+")

Row = tuple[int, dict[str, str]]
"""A row's number and its cells, by column; empty cells are empty texts."""


def read_cells(where: str, data: bytes, columns: Sequence[str], *, is_parquet: bool, max_rows: int) -> Iterator[Row]:
    """Yields the rows of a table; lines of a CSV file without any text are no rows.

    Args:
        where: the table, for messages.
        data: its file's content.
        columns: the columns to read, composed or decomposed.
        is_parquet: whether it is a Parquet file, and no CSV.
        max_rows: rows that it may have.

    Raises:
        SourceError: it cannot be read, has too many rows or too much text, or lacks a column or has it twice.
    """
    rows = (_read_parquet if is_parquet else _read_csv)(where, data, columns)
    try:
        for count, row in enumerate(rows):
            if count == max_rows:
                raise SourceError(
                    f"{where} has more than the {max_rows:,} rows allowed; leave out those that are not about this "
                    "source's images, or raise BREAKHIS_TABLE_ROWS"
                )
            yield row
    except (ValueError, OSError, pa.ArrowException) as error:
        raise SourceError(f"{where} cannot be read: {cut_text(error)}") from None


def _find_columns(where: str, header: Iterable[str], columns: Sequence[str]) -> list[int]:
    """Returns the places of columns in a header."""
    names = [compose_letters(name) for name in header]
    if missing := [name for name in columns if compose_letters(name) not in names]:
        raise SourceError(f"{where} has no column {list_items(map(quote_value, missing))}; it has: {list_items(names)}")
    if twice := [name for name in columns if names.count(compose_letters(name)) > 1]:
        raise SourceError(f"{where} has the column {quote_value(twice[0])} twice")
    return [names.index(compose_letters(name)) for name in columns]


# --- CSV --------------------------------------------------------------------------------------------------------------


def _read_csv(where: str, data: bytes, columns: Sequence[str]) -> Iterator[Row]:
    """Yields the line at which each row begins, as an editor counts them, and its cells.

    What a CSV file holds is text, also where it looks like numbers.

    Raises:
        ValueError: it is of another format or no UTF-8, commas do not separate its columns, a quotation mark is
            missing, a cell is too long, or a row has more cells than the header.
    """
    if other := name_other_format(data):
        raise ValueError(other)
    text = decode_text(data)
    if other := name_other_separator(text, columns):
        raise ValueError(other)
    lines = _Lines(text)
    reader = csv.reader(lines, strict=True)
    end = width = 0
    places: list[int] = []
    try:
        for row in reader:
            start, end = end + 1, reader.line_num
            lines.size = 0
            if not any(cell.strip() for cell in row):
                continue
            if not places:
                width, places = len(row), _find_columns(where, row, columns)
                continue
            if any(row[width:]):
                raise ValueError(f"line {start} has {len(row)} cells and the header {width}")
            cells = (format_value(row[place] if place < len(row) else "") for place in places)
            yield start, dict(zip(columns, cells, strict=True))
    except csv.Error as error:
        problem = str(error)
        if "field limit" in problem:
            problem = f"a cell of more than {csv.field_size_limit():,} characters; is a quotation mark missing?"
        raise ValueError(f"line {end + 1}: {problem}") from None
    if not places:
        raise ValueError("it is empty")


class _Lines:
    """The lines of a text, which is not copied; a row that takes too many characters of them is refused.

    ``size`` counts the characters of the row that is being read; its reader sets it to 0 at the end of each.
    """

    def __init__(self, text: str) -> None:
        self._lines = _LINE.finditer(text)
        self.size = 0

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self.size += line.end() - line.start()
        if self.size > MAX_ROW_TEXT:
            raise csv.Error(f"a row of more than {MAX_ROW_TEXT:,} characters")
        return line[0]


# --- Parquet ----------------------------------------------------------------------------------------------------------


def _read_parquet(where: str, data: bytes, columns: Sequence[str]) -> Iterator[Row]:
    """Yields each row's number and cells.

    Read with Arrow: pandas would make numbers with a decimal point of whole numbers among which one is missing.

    Raises:
        ValueError: a column holds lists or other nested values, or unpacks to too much.
        pyarrow.ArrowException, OSError: it is no Parquet file, or damaged.
    """
    from pyarrow import parquet

    if not data.startswith(b"PAR1") and (other := name_other_format(data)):
        raise ValueError(other)
    file = parquet.ParquetFile(io.BytesIO(data), pre_buffer=False)
    schema = file.schema_arrow
    places = _find_columns(where, schema.names, columns)
    names = {column: schema.names[place] for column, place in zip(columns, places, strict=True)}
    fields = [schema.field(name) for name in dict.fromkeys(names.values())]
    for field in fields:
        kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
        if pa.types.is_nested(kind):
            raise ValueError(f"the column {quote_value(field.name)} holds {cut_text(kind)}, neither text nor numbers")
    _check_unpacked_size(file, {field.name for field in fields})
    # A text that many rows repeat is in the file once, and so it is in memory.
    texts = [field.name for field in fields if _is_text(field.type)]
    number = _FIRST_ROW
    for batch in parquet.ParquetFile(io.BytesIO(data), read_dictionary=texts, pre_buffer=False).iter_batches(
        _BATCH, columns=[field.name for field in fields], use_threads=False
    ):
        read = {name: _format_column(batch.column(name)) for name in names.values()}
        for row in zip(*(read[names[column]] for column in columns), strict=True):
            yield number, dict(zip(columns, row, strict=True))
            number += 1


def _check_unpacked_size(file: "pa.parquet.ParquetFile", names: set[str]) -> None:
    places = [place for place in range(len(file.schema)) if file.schema.column(place).path in names]
    groups = (file.metadata.row_group(group) for group in range(file.metadata.num_row_groups))
    if sum(group.column(place).total_uncompressed_size for group in groups for place in places) > MAX_FILE_BYTES:
        raise ValueError(f"its declared columns unpack to more than {MAX_FILE_BYTES:,} bytes")


def _is_text(kind: pa.DataType) -> bool:
    tests = (pa.types.is_string, pa.types.is_binary, pa.types.is_large_string, pa.types.is_large_binary)
    return any(test(kind) for test in tests)


def _format_column(column: pa.Array) -> list[str]:
    """Returns a column's values as text."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        places = column.indices.to_pylist()
        used = sorted({place for place in places if place is not None})
        texts = dict(zip(used, _format_column(column.dictionary.take(pa.array(used, pa.int64()))), strict=True))
        return ["" if place is None else texts[place] for place in places]
    if not pa.types.is_floating(kind):
        try:
            return [format_value(value) for value in column.to_pylist()]
        except (OverflowError, LookupError) as error:  # of dates in a time zone, or so far off, that Python has none
            raise ValueError(f"a column of {cut_text(kind)} holds a value that is none ({cut_text(error)})") from None
    # Written and read once more, so that a short type's value is not shown with the digits of a long one.
    values = (float(str(value)) for value in column.to_numpy(zero_copy_only=False))
    exact_below = 2.0 ** {16: 11, 32: 24, 64: 53}[kind.bit_width]
    return [format_value(value, exact_below) for value in values]
