"""Reads Parquet files that may be cut off, damaged or of another make."""

from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from ml.core.messages import cut_text
from ml.core.shortages import describe_shortage

if TYPE_CHECKING:  # both take half a second to import, which would delay what reads no table
    import pandas as pd


def read_parquet(file: Path | BinaryIO) -> "pd.DataFrame":
    """Returns the table in a Parquet file, read without threads.

    Arrow ends the process without an error where a limit on memory lets no thread of it start.

    Raises:
        ValueError: it is no Parquet file or damaged, or a column holds lists, objects or bytes.
        TryAgain: there is not enough memory.
        OSError: the disk cannot be read.
    """
    import pyarrow as pa
    from pyarrow import parquet

    try:
        table = parquet.read_table(file, use_threads=False, pre_buffer=False)
        table.validate(full=True)  # otherwise text that is not UTF-8 fails where it is used
        for field in table.schema:
            if pa.types.is_nested(field.type) or pa.types.is_binary(field.type) or pa.types.is_large_binary(field.type):
                raise ValueError(f"its column {cut_text(field.name)} holds {cut_text(field.type)}")
        frame: pd.DataFrame = table.to_pandas(use_threads=False)
        return frame
    except MemoryError as error:  # Arrow's is one, too
        raise describe_shortage(cut_text(error)) from None
    except (KeyError, TypeError, OverflowError, pa.ArrowException) as error:
        raise ValueError(cut_text(error)) from None
    except OSError as error:
        if error.errno is not None:  # of a disk, and not of the file's content
            raise
        raise ValueError(cut_text(error)) from None
