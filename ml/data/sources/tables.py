"""The layout ``table``: a CSV or Parquet file of a source that describes its images."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from ml.core.messages import cut_text, list_items, quote_value
from ml.core.taxonomy import SUBTYPES
from ml.data.identifiers import explain_unusable_identifier, lower_suffix, normalize_identifier, normalize_path
from ml.data.sources.spec import SourceSpec, TableSpec
from ml.data.sources.table_cells import MAX_ROWS, read_cells

_MAGNIFICATION = re.compile(r"([1-9][0-9]{0,3})(?:[.,]0{1,2})?\s*[xX×]?")


class TableRow(NamedTuple):
    """What a table says about one image. ``problem`` is the reason why it cannot be used, and its detail."""

    path: str
    patient: str = ""
    slide: str = ""
    subtype: str = ""
    magnification: int = 0
    problem: tuple[str, str] | None = None


def read_table(spec: SourceSpec, data: bytes, paths: Iterable[str], max_rows: int = MAX_ROWS) -> dict[str, TableRow]:
    """Reads a source's table.

    The source's cohort is put before patients and slides, since two hospitals may use the same numbers. A row that
    names a folder means the image at that path alone, and ``./a.png`` the one at the root; a row that gives a file name
    alone, the only image of that name.

    Args:
        spec: the source; it has a table.
        data: the content of the table's file.
        paths: the source's image files.
        max_rows: rows that the table may have.

    Returns:
        the row of each path. Rows that name no image of the source have a problem, and so have images with rows that
        contradict each other.

    Raises:
        SourceError: the table cannot be read, has too many rows, or a column is missing.
    """
    table = spec.table
    assert table
    columns = [table.path, table.patient, table.subtype, table.magnification, *([table.slide] if table.slide else [])]
    is_parquet = table.file.lower().endswith(".parquet")
    where = f"{spec.file}: {table.file}"
    images = _ImagesByName(paths)
    parsed: list[tuple[int, bool, TableRow]] = []
    for number, written in read_cells(where, data, columns, is_parquet=is_parquet, max_rows=max_rows):
        path = images.spell(written[table.path])
        cells = {column: normalize_identifier(cell) for column, cell in written.items()}
        row = _parse_row(spec, table, path, cells, f"{table.file} row {number}")
        parsed.append((number, _names_folder(path), row))
    images.add_named(row.path for _, with_folder, row in parsed if with_folder)
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
    """

    def __init__(self, delivered: Iterable[str]) -> None:
        self._by_path: dict[str, list[str]] = defaultdict(list)
        for path in delivered:
            self._by_path[normalize_path(path)].append(path)
        self._paths_in_any_case: dict[str, set[str]] = defaultdict(set)
        self._spellings: dict[str, set[str]] = defaultdict(set)
        for path in self._by_path:
            self._paths_in_any_case[lower_suffix(path)].add(path)
            for name in map(lower_suffix, (path, _file_name(path))):
                self._spellings[_bare(name)].add(name)
        self._paths_by_file_name: dict[str, set[str]] = defaultdict(set)
        self.add_named(self._by_path)

    def add_named(self, paths: Iterable[str]) -> None:
        """Adds the paths of rows that name a folder, as :func:`normalize_path` writes them."""
        for path in paths:
            self._paths_by_file_name[lower_suffix(_file_name(path))].update(self._find_paths(path) or [path])

    def spell(self, written: str) -> str:
        """Returns the path or file name that a cell means: what is written, if an image is called so.

        Else it is what remains without blanks and the like, unless several images differ in these alone.
        """
        bare = normalize_identifier(written)
        name = normalize_path(written) if bare else ""
        is_known = self._find_paths(name) or (not _names_folder(written) and self._has_file_name(name))
        return written if bare and (is_known or len(self._spellings.get(_bare(bare), ())) > 1) else bare

    def _has_file_name(self, name: str) -> bool:
        return lower_suffix(name) in self._paths_by_file_name

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


def _bare(path: str) -> str:
    return lower_suffix(normalize_path(normalize_identifier(path)))


def _file_name(path: str) -> str:
    return path.rpartition("/")[2]


def _parse_row(spec: SourceSpec, table: TableSpec, path: str, cells: Mapping[str, str], where: str) -> TableRow:
    """Returns the row of one image, with its problem if it has one; ``where`` names the row in messages."""
    patient, subtype_cell = cells[table.patient], cells[table.subtype]
    slide = cells[table.slide] if table.slide else patient
    meanings = {normalize_identifier(said): subtype for said, subtype in table.subtypes.items()}
    subtype = meanings.get(subtype_cell, subtype_cell if subtype_cell in SUBTYPES else "")
    magnification = _MAGNIFICATION.fullmatch(cells[table.magnification])
    row = TableRow(
        normalize_path(path) if path else "",
        f"{spec.cohort}:{patient}" if patient else "",
        f"{spec.cohort}:{slide}" if slide else "",
        subtype,
        int(magnification[1]) if magnification else 0,
    )
    unusable = {
        **({} if path else {table.path: "is empty"}),
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
