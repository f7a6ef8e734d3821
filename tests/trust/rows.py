"""A row of what ``make trust`` prints."""

from typing import NamedTuple


class Row(NamedTuple):
    """An attempt or a draw, what came of it, and whether that is as it has to be."""

    what: str
    happened: str
    right: bool
