"""Reads JSON of the store. A file of it may be cut off, edited or overwritten, and then the error names it."""

from functools import partial
from typing import Any

from ml.core.errors import StoreError
from ml.core.stored_objects import find_shape
from ml.core.strict_json import check_shape, read_json


def parse_stored(data: bytes, key: str, uri: str) -> Any:
    """Returns the value of a file of JSON in the store.

    Args:
        data: the file's content.
        key: its key, which says what it has to hold: see :mod:`ml.core.stored_objects`.
        uri: its address, for the error.

    Raises:
        StoreError: it is no JSON, or not what is kept at such a key. So is reading a key that a JSON object lacks.
    """
    fail = partial(describe_damage, uri)
    value = read_json(data, fail)
    if value is None:  # nothing that is kept is null, and readers take None for a file that is not there
        raise fail("it holds null")
    if shape := find_shape(key):
        check_shape(value, shape, fail)
    return value


def describe_damage(uri: str, reason: str) -> StoreError:
    """Returns the error about a file of the store that is not what was written there, with what to do."""
    remedies = (remedy for folder, remedy in _REMEDIES.items() if folder in uri)
    return StoreError(f"{uri} is damaged: {reason}; {next(remedies, 'restore it from a backup of the store')}")


_REMEDIES = {
    "/objects/caches/": "remove the file, it is made again",
    "/objects/memos/": "remove the file, it is made again",
    **{
        f"/objects/{kind}/": f"restore it from a backup of the store, or move its folder away and run '{command}' again"
        for kind, command in {
            "raw": "breakhis fetch",
            "manifest": "breakhis manifest",
            "validation": "breakhis validate",
            "split": "breakhis split",
            "dataset": "breakhis assemble",
            "weights": "breakhis weights",
        }.items()
    },
    "/jobs/training/": "remove its folder, to train from the start",
    "/jobs/leases/": "remove the file while nothing runs",
}
"""Part of an address -> what to do about a damaged file there."""
