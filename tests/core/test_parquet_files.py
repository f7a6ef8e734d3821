import io

import pandas as pd
import pyarrow as pa
import pytest
from pyarrow import parquet

from ml.core.parquet_files import read_parquet


def test_a_table_is_read_as_pandas_reads_it(tmp_path):
    table = pd.DataFrame({"path": ["a.png", None], "bytes": [1, 2], "share": [0.5, None], "is_used": [True, None]})
    table.to_parquet(tmp_path / "a.parquet", index=False)
    pd.testing.assert_frame_equal(read_parquet(tmp_path / "a.parquet"), pd.read_parquet(tmp_path / "a.parquet"))


@pytest.mark.parametrize("compression", ["none", "snappy"])
def test_any_byte_of_a_table_may_be_inverted(compression):
    """Either the table is refused in words, or what is read can be used as text and numbers."""
    written = io.BytesIO()
    rows = {"path": [f"{n}.png" for n in range(20)], "sha256": ["0f" * 32] * 20, "bytes": list(range(20))}
    parquet.write_table(pa.table(rows), written, compression=compression)
    is_refused = []
    for place in range(len(written.getvalue())):
        data = bytearray(written.getvalue())
        data[place] ^= 0xFF
        is_refused.append(refuses(data))
    assert sum(is_refused) > 100


def refuses(data: bytes) -> bool:
    try:
        table = read_parquet(io.BytesIO(data))
    except ValueError:
        return True
    table.to_csv()
    return False


@pytest.mark.parametrize("column", [[[1]], [{"a": 1}], [b"bytes"]])
def test_a_column_of_lists_objects_or_bytes_is_named(column):
    written = io.BytesIO()
    parquet.write_table(pa.table({"odd one": column}), written)
    with pytest.raises(ValueError, match="its column odd one holds"):
        read_parquet(written)
