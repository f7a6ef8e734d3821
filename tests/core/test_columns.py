"""Columns as arrays: every value whole, and none made up."""

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ml.core.columns import read_texts
from ml.core.errors import DataError

texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=5)


@given(st.lists(texts | st.none(), min_size=1, max_size=6), st.sampled_from(["str", "object", "category", "string"]))
def test_texts_are_whole_and_a_missing_one_is_an_error(values: list[str | None], dtype: str) -> None:
    rows = pd.DataFrame({"patient": pd.Series(values, dtype=dtype), "path": [f"{k}.png" for k in range(len(values))]})
    if None in values:
        with pytest.raises(DataError, match=rf"'patient' has no value in .* such as that of {values.index(None)}\.png"):
            read_texts(rows, "patient")
    else:
        assert read_texts(rows, "patient").tolist() == values


def test_numbers_are_written_out() -> None:
    assert read_texts(pd.DataFrame({"magnification": [40, 400]}), "magnification").tolist() == ["40", "400"]
    assert read_texts(pd.DataFrame({"patient": pd.Series([], dtype="str")}), "patient").tolist() == []
