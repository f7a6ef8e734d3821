import pytest

from ml.promotion.reviews import parse_reason


@pytest.mark.parametrize("params", [None, {}, {"reason": None}, {"reason": "  no "}, {"reason": 12345}])
def test_what_is_no_reason(params: dict[str, object] | None) -> None:
    assert parse_reason(params) == ""


def test_a_reason_is_kept_without_the_blanks_around_it() -> None:
    assert parse_reason({"reason": " ok.\n", "other": 1}) == "ok."
