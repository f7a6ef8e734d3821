"""Mistyped names."""

from pathlib import Path

import pytest

from ml.core.names import expand_home, suggest_name


def test_the_nearest_name_is_suggested_and_nothing_far() -> None:
    known = ["demo-binary", "demo-subtype", "breakhis-binary"]
    assert suggest_name("demo-binry", known) == "; did you mean demo-binary?"
    assert suggest_name("BreakHis-Binary", known) == "; did you mean breakhis-binary?"
    assert suggest_name("xyz", known) == suggest_name("", known) == suggest_name("demo", []) == ""


def test_a_home_folder_is_filled_in() -> None:
    with pytest.raises(ValueError, match=r"^~no-such-user/x\.yaml: "):
        expand_home("~no-such-user/x.yaml")
    assert expand_home("~/x.yaml") == Path.home() / "x.yaml"
    assert expand_home("x~y") == Path("x~y")
