"""The layout ``table``: a CSV or Parquet file of a source that describes its images."""

import io
import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from ml.core.errors import SourceError
from ml.core.taxonomy import SUBTYPES
from ml.data.sources.spec import SourceSpec, TableSpec

if TYPE_CHECKING:
    import pandas as pd

_MAGNIFICATION = re.compile(r"([1-9][0-9]{0,3})(?:\.0+)?\s*[xX×]?")
_FIRST_ROW = 2  # the first line below a CSV file's header, as an editor counts lines


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

    The source's cohort is put before patients and slides, since two hospitals may use the same numbers.

    Args:
        spec: the source; it has a table.
        data: the content of the table's file.
        paths: the source's image files, which rows may also name by their file name alone.

    Returns:
        the row of each path. Rows that name no image of the source have a problem, and so have images with rows that
        contradict each other.

    Raises:
        SourceError: the table cannot be read, or a column is missing.
    """
    table = spec.table
    assert table
    frame = _read_columns(spec, table, data)
    by_name: dict[str, list[str]] = defaultdict(list)
    for path in paths:
        by_name[path.rpartition("/")[2]].append(path)
    known = {path for same_name in by_name.values() for path in same_name}
    rows: dict[str, TableRow] = {}
    for number, cells in enumerate(frame.to_dict("records"), start=_FIRST_ROW):
        row = _parse_row(spec, table, cells, f"{table.file} row {number}")
        path = row.path
        if path not in known and len(by_name.get(path.rpartition("/")[2], ())) == 1:
            [path] = by_name[path.rpartition("/")[2]]
        if path not in known:
            detail = f"{table.file} row {number}: there is no such image in the source"
            row = row._replace(problem=("missing_file", detail))
        elif path in rows and rows[path]._replace(path=row.path) != row:
            row = row._replace(problem=("conflicting_rows", f"{table.file} row {number} contradicts an earlier one"))
        rows[path] = row
    return rows


def _read_columns(spec: SourceSpec, table: TableSpec, data: bytes) -> "pd.DataFrame":
    """Returns the table's declared columns as strings; empty cells are empty strings."""
    import pandas as pd

    try:
        if table.file.endswith(".parquet"):
            frame = pd.read_parquet(io.BytesIO(data))
        else:
            # The column names are read as a row: in a header, pandas would rename one that occurs twice.
            cells = pd.read_csv(io.BytesIO(data), header=None, dtype=str, keep_default_na=False, encoding="utf-8-sig")
            frame = cells[1:].set_axis(cells.iloc[0], axis=1)
    except (
        ValueError,
        OSError,
        UnicodeDecodeError,
    ) as error:  # the exceptions of pandas and pyarrow are kinds of these
        raise SourceError(f"{spec.file}: {table.file} cannot be read: {' '.join(str(error).split())}") from None
    columns = [table.path, table.patient, table.subtype, table.magnification, *([table.slide] if table.slide else [])]
    if missing := [name for name in columns if name not in frame.columns]:
        raise SourceError(
            f"{spec.file}: {table.file} has no column {', '.join(map(repr, missing))}; it has: "
            + ", ".join(map(str, frame.columns))
        )
    twice = [name for name, count in Counter(frame.columns).items() if count > 1 and name in columns]
    if twice:
        raise SourceError(f"{spec.file}: {table.file} has the column {twice[0]!r} twice")
    return frame[columns].astype(object).where(frame[columns].notna(), "").astype(str)


def _parse_row(spec: SourceSpec, table: TableSpec, cells: Mapping[Hashable, str], where: str) -> TableRow:
    """Returns the row of one image, with its problem if it has one; ``where`` names the row in messages."""

    def cell(column: str) -> str:
        return cells[column].strip()

    path = cell(table.path).replace("\\", "/").removeprefix("./")
    patient, subtype_cell = cell(table.patient), cell(table.subtype)
    slide = cell(table.slide) if table.slide else patient
    subtype = table.subtypes.get(subtype_cell, subtype_cell if subtype_cell in SUBTYPES else "")
    magnification = _MAGNIFICATION.fullmatch(cell(table.magnification))
    row = TableRow(
        path,
        f"{spec.cohort}:{patient}" if patient else "",
        f"{spec.cohort}:{slide}" if slide else "",
        subtype,
        int(magnification[1]) if magnification else 0,
    )
    empty = [column for column in (table.path, table.patient, table.slide) if column and not cell(column)]
    if empty:
        return row._replace(problem=("row", f"{where}: {', '.join(map(repr, empty))} is empty"))
    if not subtype:
        return row._replace(problem=("subtype", f"{where}: {subtype_cell!r} is no subtype that 'subtypes' knows"))
    if not magnification:
        detail = f"{where}: {cell(table.magnification)!r} is no magnification such as 40 or 40x"
        return row._replace(problem=("magnification", detail))
    return row
