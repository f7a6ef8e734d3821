"""Mistyped names."""

from ml.core.names import suggest_name


def test_the_nearest_name_is_suggested_and_nothing_far() -> None:
    known = ["demo-binary", "demo-subtype", "breakhis-binary"]
    assert suggest_name("demo-binry", known) == "; did you mean demo-binary?"
    assert suggest_name("BreakHis-Binary", known) == "; did you mean breakhis-binary?"
    assert suggest_name("xyz", known) == suggest_name("", known) == suggest_name("demo", []) == ""
