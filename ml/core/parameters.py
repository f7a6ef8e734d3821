"""Types of the command line's parameters."""

import os
from typing import TypeVar

import click

Made = TypeVar("Made", str, bytes, os.PathLike[str])


class FilledPath(click.Path[Made]):
    """A path, or the name or address of a file, that is not empty.

    An empty one comes from a variable that is not set; taken as a path it would be the current folder.
    """

    def convert(
        self, value: str | os.PathLike[str], param: click.Parameter | None, ctx: click.Context | None
    ) -> Made:
        """Returns the path as :class:`click.Path` does; refuses an empty one."""
        if not os.fspath(value):
            self.fail("it is empty; name a file or folder (the current folder is called .)", param, ctx)
        return super().convert(value, param, ctx)
