"""Names and paths that people type, and what they may have meant by a name that does not exist."""

import difflib
import os
from collections.abc import Iterable
from pathlib import Path

from ml.core.messages import cut_text


def suggest_name(name: str, known: Iterable[str]) -> str:
    """Returns ``; did you mean NAME?`` with the nearest known name, to end an error; empty where none is near."""
    by_letters = {other.casefold(): other for other in sorted(known)}
    nearest = difflib.get_close_matches(name.casefold(), by_letters, n=1)
    return f"; did you mean {by_letters[nearest[0]]}?" if nearest else ""


def expand_home(path: str | Path) -> Path:
    """Returns a path with ``~`` and ``~user`` filled in.

    Raises:
        ValueError: there is no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{cut_text(path)}: {cut_text(error)}") from None


def resolve_links(path: Path) -> Path:
    """Returns the absolute path without links; a link that leads to itself stays, which ``Path.resolve`` raises on."""
    return Path(os.path.realpath(path))
