"""Names of patients and files: what is the same gets the same text."""

import unicodedata

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
    ],
)
def test_the_form_of_an_identifier(written: str, same: str) -> None:
    assert normalize_identifier(written) == same
    assert normalize_name(f"clinic:{written}") == f"clinic:{same}"


@given(st.text(alphabet="01.-eE+ :u\u0308\u00fcaT", max_size=12) | st.text(max_size=12))
def test_the_form_of_a_form_is_itself(text: str) -> None:
    once = normalize_identifier(text)
    assert normalize_identifier(once) == once
    assert normalize_name(normalize_name(text)) == normalize_name(text)
    assert normalize_path(normalize_path(text)) == normalize_path(text)


@given(st.integers() | st.from_regex(r"\A[A-Z]{1,2}[0-9]{2,5}\Z"))
def test_different_identifiers_stay_different_and_one_has_one_name(value: object) -> None:
    assert normalize_identifier(f"{value}") == str(value)
    assert normalize_identifier(f"{value}1") != normalize_identifier(f"{value}")


def test_namesakes() -> None:
    assert find_namesakes(["c:1", "c:1.0", "d:1", "c:01"]) == {
        "c:1": {"c:1", "c:1.0"},
        "d:1": {"d:1"},
        "c:01": {"c:01"},
    }


@pytest.mark.parametrize("text", ["", "nan", "<NA>", "NULL", "#N/A", "1.23457E+11", "1E+11", "1e+20", "inf"])
def test_what_names_nobody(text: str) -> None:
    assert explain_unusable_identifier(text)


@pytest.mark.parametrize("text", ["1001", "1e3", "12E5", "22E104", "Nan", "0", "p"])
def test_what_names_somebody(text: str) -> None:
    assert explain_unusable_identifier(text) == ""


@given(st.lists(st.sampled_from(["a", "e\u0301", "\u00e9"]), min_size=1, max_size=4))
def test_the_form_of_a_path(parts: list[str]) -> None:
    path = "/".join(parts)
    same = unicodedata.normalize("NFC", path)
    for written in (path, f"./{path}", path.replace("/", "//"), path.replace("/", "\\"), path.replace("/", "/./")):
        assert normalize_path(written) == same
