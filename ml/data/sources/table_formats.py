"""What a table's file is where it is not what its name says, and how to save it so that it is."""

import csv
import io
import re
import zipfile
from collections.abc import Collection

_EXCEL = "in Excel: Save as, 'CSV UTF-8'"
_MAX_HEADER = 2**16
_SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "'|'"}


def name_other_format(data: bytes) -> str:
    """Returns what a file is that is no CSV file by its first bytes, and what to do; empty if none of them is known."""
    if data.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return _name_zip(data)
    if data.startswith(b"\xd0\xcf\x11\xe0"):
        return f"it is an Excel workbook (.xls), only called otherwise; save it as CSV ({_EXCEL})"
    if data.startswith(b"\x1f\x8b"):
        return "it is packed by gzip; unpack it (gunzip)"
    if data.startswith(b"PAR1"):
        return "it is a Parquet file; let its name end in .parquet, here and in the YAML file"
    return ""


def _name_zip(data: bytes) -> str:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        names = []
    if any(name.startswith("xl/") for name in names):
        return f"it is an Excel workbook (.xlsx), only called otherwise; save it as CSV ({_EXCEL})"
    if "content.xml" in names:
        return (
            "it is an OpenDocument spreadsheet (.ods), only called otherwise; save it as CSV (in LibreOffice: Save as, "
            "Text CSV, character set UTF-8, field separated by a comma)"
        )
    return "it is a ZIP archive; unpack it, or save the table as CSV if it is a spreadsheet"


def name_other_separator(text: str, columns: Collection[str]) -> str:
    """Returns what separates the columns of a table's header if that is no comma, and what to do; empty if it is one.

    Args:
        text: the file's text.
        columns: columns that the header should have.
    """
    start = text[:_MAX_HEADER]
    first = next(((number, line) for number, line in enumerate(start.splitlines(), 1) if line.strip()), None)
    if first is None:
        return ""
    number, line = first
    if re.fullmatch(r'"?sep=.?"?,*', line.strip(" "), re.IGNORECASE):
        rest = "" if "sep=," in line.lower() else f", and separate the columns by commas ({_EXCEL})"
        return f"line {number}: {line.strip()!r} is for Excel alone; remove that line{rest}"
    for separator, name in _SEPARATORS.items():
        if separator not in line or set(columns) <= set(_split(line, ",")):
            continue
        if set(columns) <= set(_split(line, separator)) or len(_split(line, ",")) == 1:
            return f"line {number}: the columns are separated by {name}; save it with commas ({_EXCEL})"
    return ""


def _split(line: str, separator: str) -> list[str]:
    try:
        return [cell.strip() for cell in next(csv.reader([line], delimiter=separator), [])]
    except csv.Error:
        return [line]
