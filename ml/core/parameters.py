"""Types of the command line's parameters."""

import os
from typing import Any

import click


class FilledPath(click.Path[Any]):
    """A path, or the name or address of a file, that is not empty; otherwise as :class:`click.Path`.

    An empty one comes of a variable that is not set. As a path it would be the current folder.
    """

    def convert(self, value: str | os.PathLike[str], param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Returns the path; refuses an empty one as wrong usage."""
        if not os.fspath(value):
            self.fail("it is empty; say a name or a path (the current folder is '.')", param, ctx)
        return super().convert(value, param, ctx)
