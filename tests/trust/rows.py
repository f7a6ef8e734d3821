"""A row of the table that ``make trust`` prints."""

from typing import NamedTuple


class Row(NamedTuple):
    """An attempt or a simulation, what came of it, and whether that is right."""

    what: str
    happened: str
    right: bool
