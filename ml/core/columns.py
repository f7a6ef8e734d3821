"""Columns of tables as arrays."""

from typing import TYPE_CHECKING

from ml.core.errors import DataError
from ml.core.messages import cut_text, quote_value

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray


def read_texts(rows: "pd.DataFrame", column: str) -> "NDArray[np.str_]":
    """Returns a column's values as texts, (n,); numbers are written out.

    pandas would make texts of missing values too, and with a single one cut all others to their first letter, so that
    patients become one group.

    Raises:
        DataError: a value is missing.
    """
    values = rows[column]
    if values.isna().any():
        first = rows[values.isna()].iloc[0]
        where = f", such as that of {cut_text(first['path'])}" if "path" in rows else ""
        raise DataError(
            f"the column {quote_value(column)} has no value in {int(values.isna().sum())} of {len(rows)} rows{where}; "
            "every image needs one: ingest its source again"
        )
    return values.astype(str).to_numpy(dtype=str)
