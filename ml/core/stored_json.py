"""Reads JSON of the store. A file of it may be cut off, edited or overwritten, and then the error names it."""

import json
from typing import Any

from ml.core.errors import StoreError
from ml.core.messages import cut_text


def parse_json(data: bytes, uri: str) -> Any:
    """Returns the value of a file of JSON in the store.

    Raises:
        StoreError: it was cut off, edited or overwritten: it is no JSON, is nested too deeply, or has half a character.
    """
    try:
        value = json.loads(data)
        if b"\\ud" in data.lower():  # a lone surrogate is valid JSON, but no text: it cannot be written or hashed
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else cut_text(error)
        raise StoreError(f"{uri} is damaged: {reason}; restore it from a backup of the store") from None


def parse_mapping(data: bytes, uri: str) -> dict[str, Any]:
    """Returns the JSON object of a file in the store.

    Raises:
        StoreError: the file is damaged, or holds another JSON value.
    """
    value = parse_json(data, uri)
    if not isinstance(value, dict):
        raise StoreError(f"{uri} is damaged: it holds no JSON object; restore it from a backup of the store")
    return value
