"""JSON that others wrote: of a file in the store, or of a server. What is missing or of another type is our error."""

import json
from collections.abc import Callable
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from ml.core.errors import BreakhisError
from ml.core.messages import cut_text, quote_value

Fail = Callable[[str], BreakhisError]
"""Makes the error about JSON that cannot be used. It takes the reason, and is pickled with the JSON."""


class Shape(BaseModel):
    """The fields of a JSON object that are read, with their types. Other fields are not looked at.

    Subclasses declare them. One with a default may be missing, as in what an earlier release wrote; where it is needed
    all the same, :class:`StrictMapping` says so.
    """

    model_config = ConfigDict(strict=True)


class StrictMapping(dict[str, Any]):
    """A JSON object. Reading a key that it lacks raises ``fail``'s error."""

    def __init__(self, content: dict[str, Any], fail: Fail) -> None:
        super().__init__(content)
        self._fail = fail

    def __missing__(self, key: str) -> Any:
        raise self._fail(f"it has no {quote_value(key)}")


def read_json(data: bytes, fail: Fail) -> Any:
    """Returns the value of JSON; the JSON objects in it are :class:`StrictMapping`.

    Raises:
        BreakhisError: ``fail``'s: it is no JSON, is nested too deeply, or has half a character.
    """
    try:
        value = json.loads(data, object_hook=lambda content: StrictMapping(content, fail))
        if b"\\ud" in data.lower():  # a lone surrogate is valid JSON, but no text: it cannot be written or hashed
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except (ValueError, RecursionError) as error:
        raise fail("it is nested too deeply" if isinstance(error, RecursionError) else cut_text(error)) from None


def check_shape(value: object, shape: type[BaseModel], fail: Fail) -> None:
    """Check that JSON is what is read there.

    Raises:
        BreakhisError: ``fail``'s: a field is missing or has another type; names the field.
    """
    try:
        shape.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = cut_text(".".join(map(str, first["loc"])), 100) or "its content"
        # Pydantic would name our class.
        wanted = "Input should be a JSON object" if first["type"] == "model_type" else cut_text(first["msg"])
        is_told = first["type"] in {"missing", "value_error"}  # its input is the whole object
        found = "" if is_told else f", not {quote_value(first['input'], 60)}"
        raise fail(f"{where}: {wanted.removeprefix('Value error, ')}{found}") from None
