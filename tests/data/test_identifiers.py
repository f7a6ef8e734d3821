"""Names of patients and files: what is the same gets the same text."""

import unicodedata
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ml.data.identifiers import (
    explain_unusable_identifier,
    find_namesakes,
    normalize_identifier,
    normalize_name,
    normalize_path,
)


@pytest.mark.parametrize(
    ("written", "same"),
    [
        ("1001", "1001"),
        ("1001.0", "1001"),
        (" 1001.00 ", "1001"),
        ("1001.", "1001"),
        ("1001,0", "1001"),
        (" 1001,00 ", "1001"),
        ("1001,", "1001"),
        ("-7,0", "-7"),
        ("1001.000", "1001"),
        ("1.000", "1.000"),
        ("12,000", "12,000"),
        ("12,50", "12,50"),
        ("1,001", "1,001"),
        ("-0.0", "0"),
        ("01001", "01001"),
        ("01001.0", "01001"),
        ("1e3", "1e3"),
        ("12.50", "12.50"),
        ("14-22549AB", "14-22549AB"),
        ("1.0.0", "1.0.0"),
        ("2026-11-23 00:00:00", "2026-11-23"),
        ("2026-11-23 08:30:00", "2026-11-23 08:30:00"),
        ("Mu\u0308ller", "M\u00fcller"),
        ('="1001"', "1001"),
        (' = "1001.0" ', "1001"),
        ('=""1001""', "1001"),
        ('"=""1001"""', "1001"),
        ("=1001", "1001"),
        ('="01001"', "01001"),
        ("=A2&B2", "=A2&B2"),
        ('="A"&"B"', '="A"&"B"'),
        ("'1001", "1001"),
        ("' 1001,0", "1001"),
        ("'1001'", "1001"),
        ('"1001"', "1001"),
        ("'t Hart", "t Hart"),
        ("O'Brien'", "O'Brien'"),
        ("1001\u200b", "1001"),
        ("\ufeff1001", "1001"),
        ("10\u00ad01", "1001"),
        ("\u202a1001\u202c", "1001"),
        ("1001\ufe0f", "1001"),
        ("\x001001", "1001"),
        ("u\u200b\u0308", "\u00fc"),
        ("\u0601\u0661", "\u0601\u0661"),
        ("-999.0", "-999"),
    ],
)
def test_the_form_of_an_identifier(written: str, same: str) -> None:
    assert normalize_identifier(written) == same
    assert normalize_name(f"clinic:{written}") == f"clinic:{same}"


@given(st.text(alphabet="01.,-eE+ :u\u0308\u00fcaT='\"\u200b", max_size=12) | st.text(max_size=12))
def test_the_form_of_a_form_is_itself(text: str) -> None:
    once = normalize_identifier(text)
    assert normalize_identifier(once) == once
    assert normalize_name(normalize_name(text)) == normalize_name(text)
    assert normalize_path(normalize_path(text)) == normalize_path(text)


INVISIBLE = "\ufeff\u200b\u200e\u2060\u00ad\u202a\u2066\u061c\U000e0041\u034f\ufe0f\u3164\x00\x7f"
DISGUISES = ("{}", "'{}", "'{}'", '"{}"', '="{}"', '= "{}"', '"=""{}"""', " {} ", "{}.0", "{},00", "'{}.")


@given(st.integers(0, 10**6), st.sampled_from(DISGUISES), st.sampled_from(INVISIBLE), st.integers(0, 20))
def test_a_number_is_one_name_however_a_spreadsheet_disguises_it(
    number: int, form: str, invisible: str, place: int
) -> None:
    written = form.format(number)
    for text in (written, written[:place] + invisible + written[place:]):
        assert normalize_identifier(text) == str(number)
        assert normalize_name(f"clinic:{text}") == f"clinic:{number}"


@given(st.integers(0) | st.from_regex(r"\A-1[0-8]{4,9}\Z") | st.from_regex(r"\A[A-Z]{1,2}[0-9]{2,5}\Z"))
def test_different_identifiers_stay_different_and_one_has_one_name(value: object) -> None:
    assert normalize_identifier(f"{value}") == str(value)
    assert explain_unusable_identifier(f"{value}") == ""
    assert normalize_identifier(f"{value}1") != normalize_identifier(f"{value}")


def test_an_endless_wrapping_takes_no_time() -> None:
    endless = "'\"" * 500_000
    assert normalize_identifier(endless) == endless


def test_namesakes() -> None:
    assert find_namesakes(["c:1", "c:1.0", "d:1", "c:01"]) == {
        "c:1": {"c:1", "c:1.0"},
        "d:1": {"d:1"},
        "c:01": {"c:01"},
    }


@pytest.mark.parametrize("text", ["", "nan", "<NA>", "NULL", "Infinity", "\u221e", "1E+11", "1e+20", "12E+9", "inf"])
def test_what_names_nobody(text: str) -> None:
    assert explain_unusable_identifier(text)


PLACEHOLDERS = (
    *("-", "--", "---", "\u2013", "\u2014", "?", "???", "\u00bf?", ".", "...", "*", "/", "_", "( )", "[]", "\u2026"),
    *("n.a.", "N.A.", "n.a", "n. a.", "na", "n/a", "k.A.", "k. A.", "n.d.", "n/d", "N/D", "s/d", "nil", "NIL", "none"),
    *("(blank)", "(Leer)", "(vide)", "(en blanco)", "[NULL]", "<null>", "(unknown)", "unknown", "Unbekannt", "missing"),
    *("-1", "-9", "-99", "-999", "-9999", "-99999", "-999.0", "-9999,00", "-88", "-777", "'-999", '="-"', "'-"),
)


@pytest.mark.parametrize("text", PLACEHOLDERS)
def test_a_placeholder_names_nobody(text: str) -> None:
    told = explain_unusable_identifier(normalize_identifier(f" {text}\u200b "))
    assert "stands for a missing value; fill it in" in told


@given(st.text(st.characters(categories=["P", "S"]), min_size=1, max_size=6))
def test_what_has_neither_letter_nor_digit_names_nobody(text: str) -> None:
    assert explain_unusable_identifier(normalize_identifier(text))


def test_nothing_in_quotes_is_empty() -> None:
    assert [explain_unusable_identifier(normalize_identifier(text)) for text in ('=""', "'", "\u200b")] == [
        "is empty"
    ] * 3


@pytest.mark.parametrize("text", ["=A2", '="A"&"B"', "=A2&B2", "=RC[-1]"])
def test_a_formula_names_nobody(text: str) -> None:
    told = explain_unusable_identifier(normalize_identifier(text))
    assert "a spreadsheet's formula; export the table with its values" in told


@pytest.mark.parametrize(
    "text",
    [
        *("1001", "1e3", "12E5", "22E104", "3E-12", "1,001", "12.50", "1E1,5", "Nan", "0", "p"),
        *("#A", "#1001", "#P/17", "#abc", "Case:501", "Err:17", "A!", "A?"),
        *(
            "-2",
            "-7",
            "-1001",
            "-1834729",
            "999",
            "9999",
            "P-999",
            "(A)",
            "(17)",
            "Nil",
            "Na",
            "N.A.1",
            "x",
            "Unknown 7",
        ),
    ],
)
def test_what_names_somebody(text: str) -> None:
    assert explain_unusable_identifier(text) == ""


ERROR_CELLS = (
    # Excel in English, German, French, Spanish, Italian, Portuguese, Dutch
    *("#N/A", "#N/A N/A", "#NA", "#REF!", "#VALUE!", "#NAME?", "#DIV/0!", "#NUM!", "#NULL!", "#SPILL!", "#CALC!"),
    *("#GETTING_DATA", "#ERROR!", "#NV", "#BEZUG!", "#WERT!", "#ZAHL!", "#\u00dcBERLAUF!", "#VALEUR!", "#NOM?"),
    *(
        "#NOMBRE!",
        "#NUL!",
        "#N/D",
        "#\u00a1REF!",
        "#\u00a1VALOR!",
        "#\u00bfNOMBRE?",
        "#\u00a1DIV/0!",
        "#RIF!",
        "#VALORE!",
    ),
    *("#VALOR!", "#NOME?", "#N/DISP", "#N/B", "#VERW!", "#WAARDE!", "#NAAM?", "#DEEL/0!", "#GETAL!"),
    # Danish, Swedish, Finnish, Polish, Czech, Hungarian, Turkish, Russian
    *("#I/T", "#V\u00c6RDI!", "#DIVISION/0!", "#SAKNAS!", "#V\u00c4RDEFEL!", "#PUUTTUU!", "#JAKO/0!", "#N/D!", "#ADR!"),
    *(
        "#DZIEL/0!",
        "#NEN\u00cd_K_DISPOZICI",
        "#D\u011aLEN\u00cd_NULOU!",
        "#HI\u00c1NYZIK",
        "#Z\u00c9R\u00d3OSZT\u00d3!",
        "#YOK",
    ),
    *("#SAYI/0!", "#DE\u011eER!", "#\u041d/\u0414", "#\u0417\u041d\u0410\u0427!", "#\u0414\u0415\u041b/0!"),
    # LibreOffice, and a narrow column
    *("Err:502", "Fehler:504", "Erreur:522", "B\u0142\u0105d:502", "###", "########"),
)


@pytest.mark.parametrize("text", ERROR_CELLS)
@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_a_spreadsheets_error_names_nobody(text: str, form: Literal["NFC", "NFD"]) -> None:
    written = normalize_identifier(f" {unicodedata.normalize(form, text)} ")
    assert "an error in a spreadsheet; correct the cell" in explain_unusable_identifier(written)


_words = st.text(st.characters(categories=["Lu"]), min_size=2, max_size=12).filter(lambda word: word == word.upper())


@given(_words, st.sampled_from(["#{}!", "#{}?", "#{}", "#\u00a1{}!", "#\u00bf{}?", "#{}/0!", "#\u00a1{}/0!", "#N/{}"]))
def test_an_error_in_any_language_names_nobody(word: str, form: str) -> None:
    assert "an error in a spreadsheet" in explain_unusable_identifier(normalize_identifier(form.format(word)))


@given(
    st.floats(min_value=0, exclude_min=True, allow_infinity=False),
    st.integers(1, 9),
    st.sampled_from("eE"),
    st.sampled_from(".,"),
)
def test_scientific_notation_names_nobody_in_any_language(value: float, digits: int, e: str, point: str) -> None:
    """As a spreadsheet shows a long number: some identifiers that differ are the same text then."""
    written = normalize_identifier(f"{value:.{digits}e}".replace("e", e).replace(".", point))
    assert "a rounded number that several may share; export" in explain_unusable_identifier(written)


@given(
    st.integers(0, 10**15) | st.integers(-(10**15), -(10**14)).map(lambda number: 10 * number),
    st.text("0", max_size=6),
    st.sampled_from(".,"),
)
def test_a_whole_number_is_one_name_in_any_language_or_refused(number: int, zeros: str, point: str) -> None:
    name = normalize_identifier(f"{number}{point}{zeros}")
    if len(zeros) == 3 and 0 < abs(number) < 1000:
        assert "by language; export the column as text" in explain_unusable_identifier(name)
    else:
        assert (name, explain_unusable_identifier(name)) == (str(number), "")


@given(st.lists(st.sampled_from(["a", "e\u0301", "\u00e9"]), min_size=1, max_size=4))
def test_the_form_of_a_path(parts: list[str]) -> None:
    path = "/".join(parts)
    same = unicodedata.normalize("NFC", path)
    for written in (path, f"./{path}", path.replace("/", "//"), path.replace("/", "\\"), path.replace("/", "/./")):
        assert normalize_path(written) == same
