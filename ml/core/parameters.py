"""What the command line's parameters have in common."""

import os
from typing import Any

import click


def refuse_empty_texts(command: click.Command) -> None:
    """Has a command, and all commands of a group, refuse an empty text as wrong usage, wherever they take a value.

    An empty text comes of a variable that is not set. As a path it would be the current folder, and as an option it
    would be taken for the default. Numbers and choices refuse it by themselves.
    """
    if isinstance(command, click.Group):
        for inner in command.commands.values():
            refuse_empty_texts(inner)
    for parameter in command.params:
        takes_value = not (isinstance(parameter, click.Option) and (parameter.is_flag or parameter.count))
        if takes_value and isinstance(
            parameter.type, click.Path | click.types.StringParamType | click.types.BoolParamType
        ):
            parameter.type = _FilledText(parameter.type)


class _FilledText(click.ParamType[Any]):
    """Another type's values, but for an empty text or one of blanks alone."""

    def __init__(self, wrapped: click.ParamType[Any]) -> None:
        self.wrapped, self.name = wrapped, wrapped.name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Returns the value as the other type has it; refuses an empty one as wrong usage."""
        if isinstance(value, str | os.PathLike) and not os.fspath(value).strip():
            remedy = "give it a value" if param is None or param.required else "give it a value, or leave it out"
            if isinstance(self.wrapped, click.Path):
                remedy = "say a name or a path (the current folder is '.')"
            self.fail(f"it is empty; {remedy}", param, ctx)
        return self.wrapped.convert(value, param, ctx)
