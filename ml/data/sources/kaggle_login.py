"""Credentials for Kaggle: where the official package looks for them, whether they can be any, and logging in with them.

The package logs in when it is imported, prints to stdout, and ends the process where credentials are missing; this
module contains all of that. Credentials are never printed.
"""

import contextlib
import io
import os
from pathlib import Path
from typing import Any

from ml.core.errors import BreakhisError, ConfigError, CredentialsError
from ml.core.progress import say
from ml.core.strict_json import Shape, check_shape, read_json

TOKEN_PAGE = "https://www.kaggle.com/settings/api"  # noqa: S105 - an address, no password

_MAX_TOKEN = 255  # characters: the package asks whether there is a file of that name


def find_credentials() -> str | None:
    """Names the place of the credentials that the package will find, or None. Reads no secret and asks no server."""
    environment = os.environ
    if environment.get("KAGGLE_API_TOKEN"):
        return "KAGGLE_API_TOKEN"
    if environment.get("KAGGLE_USERNAME") and environment.get("KAGGLE_KEY"):
        return "KAGGLE_USERNAME and KAGGLE_KEY"
    home = Path.home() / ".kaggle"
    legacy = environment.get("KAGGLE_CONFIG_DIR") or (
        home if home.exists() else Path(environment.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "kaggle"
    )
    files = (home / "access_token", home / "access_token.txt", Path(legacy) / "kaggle.json", home / "credentials.json")
    return next((str(file) for file in files if file.is_file()), None)


def log_in(place: str) -> Any:
    """Returns the package's API, logged in with the credentials at ``place``."""
    _check_credentials(place)
    output = io.StringIO()  # the package prints its help to stdout, which is for results
    try:
        with contextlib.redirect_stdout(output):
            package = _import_package()
            output.seek(0)
            output.truncate()  # the import tries to log in too, and its messages come again
            api = package.KaggleApi()
            api.authenticate()
    except (TypeError, AttributeError) as error:  # the package looks for keys in an answer that is a number, say
        raise ValueError(f"Kaggle's answer about the token cannot be read: {error}") from None
    except SystemExit:
        raise CredentialsError(
            f"Kaggle does not accept the credentials in {place}; make new ones at {TOKEN_PAGE}"
        ) from None
    except PermissionError as error:
        raise ConfigError(
            f"{error.filename}: Kaggle's package wants to make this folder and may not; set KAGGLE_CONFIG_DIR to a "
            "folder that can be written"
        ) from None
    for line in output.getvalue().splitlines():
        say(line)  # such as a warning that other users may read kaggle.json
    return api


class _Credentials(Shape):
    """What the package reads of kaggle.json."""

    username: str
    key: str


def _check_credentials(place: str) -> None:
    """Checks that credentials are such as a request can carry, which the package takes for granted.

    The package takes a token in the environment for a file's name first, so an error of the disk would quote it. No
    message of ours quotes any of it.

    Args:
        place: as :func:`find_credentials` names it.

    Raises:
        CredentialsError: they cannot be read, or are none of Kaggle's.
    """

    def fail(reason: str) -> BreakhisError:
        return CredentialsError(f"{place}: no credentials of Kaggle's: {reason}; make new ones at {TOKEN_PAGE}")

    file = Path(place)
    if file.name == "credentials.json":  # of the package's own login, which checks it
        return
    if file.is_absolute():
        try:
            data = file.read_bytes()
        except OSError as error:
            raise fail(f"it cannot be read ({error.strerror})") from None
        if file.name == "kaggle.json":
            content = read_json(data, lambda _: fail("it is no JSON"))
            check_shape(content, _Credentials, lambda _: fail("it does not have 'username' and 'key'"))
            values = [content["username"], content["key"]]
        else:
            values = [data.decode("latin-1").strip()]
    else:
        values = [os.environ[name] for name in place.split(" and ")]
    if not all(value.isascii() and value.isprintable() and " " not in value for value in values):
        raise fail("there are characters in it that none has, such as a blank or the end of a line")
    if place == "KAGGLE_API_TOKEN" and len(values[0]) > _MAX_TOKEN:
        raise fail(f"it has {len(values[0]):,} characters, and Kaggle's package takes {_MAX_TOKEN} at the most")


def _import_package() -> Any:
    """Imports the package's API without its verbose mode."""
    # With VERBOSE in the environment the package prints every header, with the credentials, and makes every library
    # log its addresses, signed ones included. It reads the variable once, when it is imported.
    verbosity = {name: os.environ.pop(name) for name in ("VERBOSE", "VERBOSE_OUTPUT") if name in os.environ}
    try:
        from kaggle.api import kaggle_api_extended
    finally:
        os.environ.update(verbosity)
    return kaggle_api_extended
