"""Puts what people, files and servers supply into messages, cut: a message does not grow with the input it is about.

A name of a hundred thousand letters, or a table of a thousand columns, would otherwise fill the terminal, Airflow's log
and its database, and what to do next would stand where nobody reads.
"""

import re
from collections.abc import Iterable

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]")
"""All but tabs and the ends of lines, of which our own messages have some."""

MAX_TEXT = 200
"""Characters of one value in a message."""

MAX_ITEMS = 10
"""Items of one list in a message."""

MAX_ITEM = 100
"""Characters of an item of a list in a message."""

MAX_FAULT = 400
"""Characters of one fault in a list of them: it quotes a value, and says what would be right."""

MAX_MESSAGE = 8_000
"""Characters of a whole message: the reasons of all gates of a policy fit."""


def cut_text(text: object, limit: int = MAX_TEXT) -> str:
    """Returns a text for a message, or a value as ``str`` shows it: on one line, its end cut off beyond ``limit``."""
    # Cut before, too: where a text is long, most of it is never looked at.
    shown = _escape_halves(" ".join(str(text)[: 10 * limit].split()))
    return shown if len(shown) <= limit else f"{shown[: limit - 1]}…"


def quote_value(value: object, limit: int = MAX_TEXT) -> str:
    """Returns a value as ``repr`` shows it, with quotes around a text; the end of a long one is cut off."""
    if isinstance(value, str):
        return repr(value if len(value) <= limit else f"{value[: limit - 1]}…")
    return cut_text(repr(value), limit)


def list_items(items: Iterable[object], separator: str = ", ", limit: int = MAX_ITEM) -> str:
    """Returns the first ten items, each cut, and how many more there are: ``a, b and 3 more``."""
    shown = list(items)
    text = separator.join(cut_text(item, limit) for item in shown[:MAX_ITEMS])
    return text if len(shown) <= MAX_ITEMS else f"{text} and {len(shown) - MAX_ITEMS:,} more"


def hide_access(text: object) -> str:
    """Returns a text whose addresses show no password, query, parameter or fragment, any of which may grant access."""
    shown = re.sub(r"//[^/\s]*@", "//…@", str(text))
    shown = re.sub(r"(\S*/[^\s?#;]*)([#;])[^\s'\")]\S*?(?=[)'\",.]*(?:\s|$))", r"\1\2…", shown)
    return re.sub(r"\?[^\s'\")]\S*?(?=[)'\",.]*(?:\s|$))", "?…", shown)


def cut_message(message: str, limit: int = MAX_MESSAGE) -> str:
    """Returns a message without its middle where it is too long. What is wrong stands first, what to do next last."""
    message = _escape_halves(message)
    if len(message) <= limit:
        return message
    kept = limit // 2 - 1
    return f"{message[:kept]} … {message[-kept + 1 :]}"


def _escape_halves(text: str) -> str:
    """Returns a text that can be printed and stored: a file's name that is no UTF-8 brings halves of characters."""
    return text.encode("utf-8", "backslashreplace").decode()


def show_controls(text: str) -> str:
    """Returns a text whose control characters are written out: on a terminal they would act, and in a log add lines."""
    return _CONTROLS.sub(lambda found: ascii(found[0])[1:-1], text)
