"""Options and output that all commands share."""

import functools
import json
import re
import time
from collections.abc import Callable
from typing import Any

import click

from ml.core.errors import Refused
from ml.core.messages import quote_value
from ml.core.result_files import check_result_uri, write_result
from ml.core.settings import read_settings
from ml.core.store import Json, Store

json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object on stdout.")


class _VersionNumber(click.types.StringParamType):
    """The number of a model version, in the one way in which it is written: it is compared as text, too."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Returns the number as it stands; others than plain digits are refused."""
        if not re.fullmatch("[1-9][0-9]{0,17}", str(value)):
            self.fail(f"{quote_value(str(value))} is no number of a version, such as 3", param, ctx)
        return str(value)


version_argument = click.argument("version", type=_VersionNumber())


class RefusedResult(Refused):
    """A refusal that has a result. The result is printed and written as any other; the exit status is 4."""

    def __init__(self, result: Json, message: str) -> None:
        super().__init__(message)
        self.result = result


def stage_command(
    function: Callable[..., Json], show: Callable[[Json, dict[str, Any]], None] | None = None
) -> click.Command:
    """Makes a click command of a function ``(store, settings, …) -> result``, whose docstring becomes the help.

    The command has the options ``--json`` and ``--result``, prints the result, and is named as the function is. The
    result in a :class:`RefusedResult` is printed before the error is raised again.

    Args:
        function: the stage.
        show: prints the result for people, given the result and the command's own options. Default: a line a key.
    """

    @json_option
    @click.option(
        "--result",
        "result_uri",
        metavar="URI",
        type=click.Path(),
        help="Also write the JSON to this path, file:/// or s3://.",
    )
    @functools.wraps(function)
    def run(as_json: bool, result_uri: str | None, **arguments: Any) -> None:
        begin = time.monotonic()
        if result_uri:
            check_result_uri(result_uri)
        configuration = read_settings()

        def add_seconds(result: Json) -> Json:
            return {**result, "seconds": round(time.monotonic() - begin, 1)}

        try:
            result = function(Store(configuration.store), configuration, **arguments)
        except RefusedResult as refusal:
            output_result(add_seconds(refusal.result), as_json, result_uri)
            raise
        output_result(
            add_seconds(result), as_json, result_uri, (lambda shown: show(shown, arguments)) if show else None
        )

    return click.command(name=function.__name__.replace("_", "-"))(run)


def output_result(
    result: Json, as_json: bool, result_uri: str | None, show: "Callable[[Json], None] | None" = None
) -> None:
    """Prints a result, as JSON or for people by ``show``, and writes it to ``result_uri`` if that is given."""
    if result_uri:
        write_result(result_uri, result)
    if as_json:
        click.echo(json.dumps(result, sort_keys=True))
    else:
        (show or print_lines)(result)


def print_lines(result: Json) -> None:
    """Prints a result for people, a line a key. A review's text is left out."""
    width = max(len(key) for key in result)
    for key, value in result.items():
        if key != "review":
            shown = value if isinstance(value, str) else json.dumps(value)
            click.echo(f"{key:<{width}}  {shown}")
