"""Reads the tables of stored objects. A file of them may be cut off or overwritten, and then the error names it."""

from typing import TYPE_CHECKING

from ml.core.messages import cut_text
from ml.core.parquet_files import read_parquet
from ml.core.store import Store
from ml.core.stored_json import describe_damage

if TYPE_CHECKING:
    import pandas as pd


def read_stored_table(oid: str, name: str, store: Store) -> "pd.DataFrame":
    """Returns a table of an object, such as the dataset.parquet of a dataset.

    Raises:
        StoreError: there is no such object or file, or the file is damaged; see :func:`read_parquet`.
        TryAgain: there is not enough memory.
    """
    file = store.file(oid, name)
    try:
        return read_parquet(file)
    except ValueError as error:
        raise describe_damage(store.uri(f"{store.object_key(oid)}/{name}"), cut_text(error)) from None
