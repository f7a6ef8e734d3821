"""Options and output that all commands share, defined once."""

import functools
import json
import time
from collections.abc import Callable
from typing import Any

import click

from ml.core.errors import Refused
from ml.core.settings import read_settings
from ml.core.store import Json, Store, write_result

json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object on stdout.")


class Outcome(Refused):
    """A stage's result that is a refusal: it is printed and written like any other, then exits with status 4."""

    def __init__(self, result: Json, message: str) -> None:
        super().__init__(message)
        self.result = result


def stage(function: Callable[..., Json], show: Callable[[Json, dict[str, Any]], None] | None = None) -> click.Command:
    """Make a click command of a function ``(store, settings, …) -> result``; its docstring becomes the help.

    Adds ``--json`` and ``--result``; prints the result; a raised :class:`Outcome` is printed before it is raised on.

    Args:
        function: the stage.
        show: prints the result for people; it is given the command's own options, too. Default: a line a key.
    """

    @json_option
    @click.option("--result", "result_uri", metavar="URI", help="Also write the JSON to this path, file:/// or s3://.")
    @functools.wraps(function)
    def run(as_json: bool, result_uri: str | None, **arguments: Any) -> None:
        begin = time.monotonic()
        configuration = read_settings()

        def timed(result: Json) -> Json:
            return {**result, "seconds": round(time.monotonic() - begin, 1)}

        try:
            result = function(Store(configuration.store), configuration, **arguments)
        except Outcome as refusal:
            deliver(timed(refusal.result), as_json, result_uri)
            raise
        deliver(timed(result), as_json, result_uri, (lambda shown: show(shown, arguments)) if show else None)

    # A stage is called what its function is called.
    return click.command(name=function.__name__.replace("_", "-"))(run)


def deliver(result: Json, as_json: bool, result_uri: str | None, show: "Callable[[Json], None] | None" = None) -> None:
    """Print a result, as JSON or for people by ``show``, and write it to ``result_uri`` if one is given."""
    if result_uri:
        write_result(result_uri, result)
    if as_json:
        click.echo(json.dumps(result, sort_keys=True))
    else:
        (show or show_lines)(result)


def show_lines(result: Json) -> None:
    """Print a result for people, a line a key."""
    width = max(len(key) for key in result)
    for key, value in result.items():
        if key != "review":
            shown = value if isinstance(value, str) else json.dumps(value)
            click.echo(f"{key:<{width}}  {shown}")
