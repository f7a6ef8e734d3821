"""Names that people type, and what they may have meant by one that does not exist."""

import difflib
from collections.abc import Iterable


def suggest_name(name: str, known: Iterable[str]) -> str:
    """Returns ``; did you mean NAME?`` with the nearest known name, to end an error; empty where none is near."""
    by_letters = {other.casefold(): other for other in sorted(known)}
    nearest = difflib.get_close_matches(name.casefold(), by_letters, n=1)
    return f"; did you mean {by_letters[nearest[0]]}?" if nearest else ""
