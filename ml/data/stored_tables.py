"""Reads the tables of stored objects. A file of them may be cut off or overwritten, and then the error names it."""

from typing import TYPE_CHECKING, Any

from ml.core.errors import ConfigError
from ml.core.messages import cut_text
from ml.core.store import Store
from ml.core.stored_json import describe_damage

if TYPE_CHECKING:
    import pandas as pd

_WITHOUT_THREADS: Any = {"use_threads": False, "pre_buffer": False, "to_pandas_kwargs": {"use_threads": False}}
"""How a table is read: Arrow ends the process without an error where a limit on memory lets no thread of it start."""


def read_stored_table(oid: str, name: str, store: Store) -> "pd.DataFrame":
    """Returns a table of an object, such as the dataset.parquet of a dataset.

    Raises:
        ConfigError: there is not enough memory.
        StoreError: there is no such object or file, the file is damaged, or a column holds lists, objects or bytes.
    """
    import pandas as pd
    import pyarrow as pa
    from pyarrow import parquet

    file, uri = store.file(oid, name), store.uri(f"{store.object_key(oid)}/{name}")
    try:
        for field in parquet.read_schema(file):
            if pa.types.is_nested(field.type) or pa.types.is_binary(field.type):
                raise ValueError(f"its column {field.name} holds {field.type}")
        return pd.read_parquet(file, **_WITHOUT_THREADS)
    except MemoryError:  # Arrow's is one, too
        raise ConfigError(f"there is not enough memory to read {uri}; give this process more") from None
    except (ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise describe_damage(uri, cut_text(error)) from None
    except OSError as error:
        if error.errno is not None:  # of a disk, and not of the file's content
            raise
        raise describe_damage(uri, cut_text(error)) from None
