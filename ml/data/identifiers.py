"""Names of patients, slides and files: what is the same gets the same text, whoever wrote it and into what.

A table's column of numbers changes its type with a single empty cell, and a spreadsheet or pandas writes such a column
out again as ``1001.0``; a spreadsheet that is to keep it as text exports ``="1001"``. A patient must not get another
name by that: an erased one would come back, and one on a side of a split could be put on another.
"""

import math
import re
import unicodedata
from collections.abc import Iterable
from decimal import Decimal
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from ml.core.messages import quote_value

if TYPE_CHECKING:
    import pandas as pd

_WHOLE_NUMBER = re.compile(r"(-?[0-9]+)[.,]0*")
_THOUSANDS = re.compile(r"-?[1-9][0-9]{0,2}[.,]000")
"""1 with three decimals in one language and 1000 in another: neither may be guessed."""

_MIDNIGHT = re.compile(r"([0-9]{4}-[0-9]{2}-[0-9]{2})[ T]00:00:00(\.0+)?")
_ROUNDED = re.compile(r"-?[0-9]{1,3}([.,][0-9]+[eE][+-]?|[eE]\+)[0-9]+")

_QUOTED = re.compile(r'=\s*"+(?P<formula>[^"]*)"+|=\s*(?P<number>-?[0-9]+)|"(?P<text>.*)"', re.DOTALL)
"""How spreadsheets and their exports keep a number as text: ``="1001"``; quotation marks may be doubled, as in CSV."""

_LONGEST = 100
"""Characters of an identifier that may be a number or be wrapped: one of a million quotation marks would take hours."""

_IGNORED = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180d\u180f\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)
"""What Unicode has displays ignore, besides the category Cf."""

_VISIBLE = frozenset("\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u0890\u0891\u08e2\U000110bd\U000110cd")
"""Marks around a number in Arabic, Syriac and Kaithi, which are seen although they are of the category Cf."""

_MISSING = frozenset(
    {"nan", "NaN", "-nan", "-NaN", "NaT", "<NA>", "NA", "na", "None", "none", "NONE", "null", "NULL", "nil", "NIL"}
    | {"inf", "-inf", "Infinity", "-Infinity", "\u221e", "-\u221e"}
)
"""What pandas, R, databases and Java write where a value is missing or could not be computed."""

_PLACEHOLDER = re.compile(
    # Initials with a full stop or slash: not available, not applicable, keine Angabe, no data, sin datos.
    r"n\. ?a\.?|n/a|k\. ?a\.?|k/a|n\. ?d\.?|n/d|s\. ?d\.?|s/d"
    r"|unknown|not known|not available|missing|blank|empty|unbekannt|fehlt|leer|inconnu|desconocido|sconosciuto"
    r"|[(\[<][^\W\d_]{2}[^\d()\[\]<>]*[)\]>]",  # (blank), <null>
    re.IGNORECASE,
)
"""What people and their programs write into a cell about which they know nothing."""

_SENTINEL = re.compile(r"[-\u2212](1|9+|88+|77+)")
"""What statistical software has for a missing number, -999 and its like; no hospital numbers its patients so."""

_ERROR_WORD = re.compile(r"#(?:[^\W\d_]|[\u00a1\u00bf/_ ]|(?<=/)0){2,}[!?]?|#+")
"""What spreadsheets show of a formula without a value, a word in capitals in the user's language: #N/A, #NV, #WERT!.
Of a number that a narrow column does not show, they export ####.
"""

_ERROR_NUMBER = re.compile(
    r"(?:Err|Error|Erreur|Errore|Erro|Fehler|Fout|Fel|Feil|Fejl|Virhe|B\u0142\u0105d|Chyba|Hiba|Hata|"
    r"\u041e\u0448\u0438\u0431\u043a\u0430)\.?:5[0-9]{2}"
)
"""What LibreOffice shows instead, such as Err:502."""


def compose_letters(text: str) -> str:
    """Returns a text with composed letters (Unicode's NFC): ``é`` is one character, not two as macOS has it."""
    return unicodedata.normalize("NFC", text)


def normalize_identifier(text: str) -> str:
    """Returns the one form of an identifier: ``1001.0`` becomes ``1001``, and decomposed letters are composed.

    The rule looks at one identifier alone, so that no other row of a table changes it: blanks around it and the decimal
    point or comma of a whole number go, as does the time of a date at midnight. So does what nobody sees, and what a
    spreadsheet puts around a number that is to stay text: ``="1001"``, ``'1001``. All else stays: ``01001``, ``1e3``
    and ``12.50`` are text, and ``1.000`` names nobody.
    """
    if not (text.isascii() and text.isprintable()):
        text = "".join(character for character in text if not _is_invisible(character))
    text = compose_letters(text.strip())
    while len(text) <= _LONGEST and (bare := compose_letters(_remove_one_wrapping(text).strip())) != text:
        text = bare
    return text


def _is_invisible(character: str) -> bool:
    kind = unicodedata.category(character)
    if kind == "Cc":
        return not character.isspace()
    return (kind == "Cf" and character not in _VISIBLE) or _IGNORED.match(character) is not None


def _remove_one_wrapping(text: str) -> str:
    """Returns a text without one of the things that do not belong to an identifier."""
    if quoted := _QUOTED.fullmatch(text):
        return next(inner for inner in quoted.groups() if inner is not None)
    if text.startswith("'"):
        return text[1:-1] if text.endswith("'") else text[1:]
    if (number := _WHOLE_NUMBER.fullmatch(text)) and not _THOUSANDS.fullmatch(text):
        return number[1]
    if date := _MIDNIGHT.fullmatch(text):
        return date[1]
    return "0" if text == "-0" else text


def normalize_name(name: str) -> str:
    """Returns the one form of a patient's or slide's name: a case of BreakHis, or ``<cohort>:<identifier>``.

    Names in a store may be older than that form.
    """
    cohort, colon, identifier = name.partition(":")
    return f"{cohort}:{normalize_identifier(identifier)}" if colon else normalize_identifier(name)


def normalize_names(names: "pd.Series[str]") -> "pd.Series[str]":
    """Returns the names of a column in their one form; missing ones stay missing."""
    return names.map(normalize_name, na_action="ignore")


def find_namesakes(names: Iterable[str]) -> dict[str, set[str]]:
    """Groups names that have the same form: form -> names as they were given."""
    namesakes: dict[str, set[str]] = {}
    for name in names:
        namesakes.setdefault(normalize_name(name), set()).add(name)
    return namesakes


def explain_unusable_identifier(text: str) -> str:
    """Says why an identifier that :func:`normalize_identifier` returned names nobody; empty if it does."""
    if not text:
        return "is empty"
    fault = ""
    has_letters = any(map(str.isalnum, text))
    if text.startswith("=") and has_letters:
        fault = "a spreadsheet's formula; export the table with its values"
    elif (_ERROR_WORD.fullmatch(text) and text == text.upper()) or _ERROR_NUMBER.fullmatch(text):
        fault = "an error in a spreadsheet; correct the cell and export the table again"
    elif not has_letters or text in _MISSING or _PLACEHOLDER.fullmatch(text) or _SENTINEL.fullmatch(text):
        fault = "which stands for a missing value; fill it in"
    elif _ROUNDED.fullmatch(text):
        fault = "a rounded number that several may share; export the column as text"
    elif _THOUSANDS.fullmatch(text):
        fault = f"which is {text[:-4]} or {text[:-4]}000 by language; export the column as text"
    return f"is {quote_value(text)}, {fault}" if fault else ""


def format_value(value: object, exact_below: float = math.inf) -> str:
    """Returns a table's value as text, before any rule about identifiers; a missing one is empty.

    Args:
        value: as Arrow hands it out: a text, bytes, number, date, or None.
        exact_below: floating-point numbers of the column's type tell whole numbers apart below this. Larger ones are
            written as rounded, in scientific notation.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bytes):
        return value.decode(errors="backslashreplace")
    if isinstance(value, Decimal):
        # A whole number of a column with three decimals is no text that may mean thousands.
        return format(value.to_integral_value() if value == value.to_integral_value() else value, "f")
    if isinstance(value, float) and math.isfinite(value) and abs(value) >= exact_below:
        return f"{value:.9E}"
    return str(value)


def normalize_path(path: str) -> str:
    """Returns the one form of a path within a source, to compare two of them.

    ``./a/b.png``, ``a//b.png`` and ``a\\b.png`` are ``a/b.png``, and decomposed letters are composed.
    """
    return str(PurePosixPath(compose_letters(path).replace("\\", "/")))


def lower_suffix(path: str) -> str:
    """Returns a path with its suffix in small letters."""
    stem, dot, suffix = path.rpartition(".")
    return f"{stem}{dot}{suffix.lower()}" if dot and "/" not in suffix else path
