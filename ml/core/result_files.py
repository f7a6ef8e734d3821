"""Writes a stage's result to the place that ``--result URI`` names."""

import json
import re
import sys
from pathlib import Path
from urllib.parse import unquote

from ml.core.disks import explained_os_errors, write_in_one_step
from ml.core.errors import ConfigError
from ml.core.messages import hide_access, quote_value
from ml.core.store import Json, Store


def check_result_uri(uri: str) -> None:
    """Checks that a result can be written to a place, as far as can be told before the stage's work.

    Raises:
        ConfigError: it is an address of another kind, names no file, or is a folder or a socket.
    """
    if uri.startswith("s3://"):
        if not re.fullmatch(r"s3://[^/]+/(.*[^/])", uri, re.DOTALL):
            raise _refuse(uri, "it names no bucket and file")
        return
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:/", uri) and not uri.startswith("file:///"):
        raise _refuse(uri, "results are not written to such an address")
    path = _find_path(uri)
    if uri.endswith("/") or path.is_dir():
        raise _refuse(uri, "it is a folder")
    if path.is_socket() and not _find_stream(path):
        raise _refuse(uri, "it is a socket")


def write_result(uri: str, result: Json) -> None:
    """Writes a stage's JSON result to a path or URI: a file in one step, a device or a pipe as it comes.

    Raises:
        ConfigError: it cannot be written there.
    """
    check_result_uri(uri)
    if uri.startswith("s3://"):
        root, _, name = uri.rpartition("/")
        Store(root).put_json(name, result)
        return
    path, data = _find_path(uri), json.dumps(result, indent=1, sort_keys=True).encode()
    stream = _find_stream(path)
    if stream is None and (path.is_file() or not path.exists()):
        write_in_one_step(path, data)
        return
    try:
        # A stream of this process is not opened by its name: a second position in its file would overwrite the output.
        with explained_os_errors(path), open(path if stream is None else stream, "wb", closefd=stream is None) as file:
            sys.stdout.flush()
            file.write(data + b"\n")
    except BrokenPipeError:
        raise ConfigError(f"{path}: whoever read from it has gone, so the result is not written there") from None


def _find_path(uri: str) -> Path:
    return Path(unquote(uri.removeprefix("file://"))) if uri.startswith("file://") else Path(uri)


def _find_stream(path: Path) -> int | None:
    """Returns the number of the open file of this process that a path such as ``/dev/stdout`` stands for."""
    named = re.fullmatch(r"/dev/(stdout|stderr)|(?:/dev|/proc/self)/fd/([0-9]{1,6})", str(path))
    if not named:
        return None
    return int(named[2]) if named[2] else {"stdout": 1, "stderr": 2}[named[1]]


def _refuse(uri: str, fault: str) -> ConfigError:
    return ConfigError(
        f"--result {quote_value(hide_access(uri))}: {fault}; give the path of a file, file:///PATH or s3://BUCKET/NAME"
    )
