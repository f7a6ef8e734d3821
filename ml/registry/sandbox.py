"""Isolation of a process that runs logged code: what the machine allows of it, best first.

==============  =====================================================================================================
``bubblewrap``  namespaces made by ``bwrap``: no network, no other process, and of the disk only Python, the model and
                a scratch folder
``unshare``     the same namespaces, made by ``sandbox_init.py`` beside this file
``user``        another user id, where this process is root: what that user may not read or change is out of reach;
                the network is not
``none``        a process of the same user, with an environment of its own and nothing else
==============  =====================================================================================================

Which of them a machine allows is tried once. Containers mostly allow no namespaces.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Literal, get_args
from urllib.parse import unquote, urlsplit

import ml
from ml.core.settings import read_settings

Isolation = Literal["bubblewrap", "unshare", "user", "none"]

ISOLATION_TEXTS: dict[Isolation, str] = {
    "bubblewrap": "in namespaces of its own, by bubblewrap: without network, files or processes of others",
    "unshare": "in namespaces of its own: without network, files or processes of others",
    "user": "under another user id; the network was not cut off",
    "none": "as the same user, with network and that user's files: this machine allows no isolation",
}
"""How logged code ran, in words that follow "ran"."""

WEAK_ISOLATION: frozenset[Isolation] = frozenset({"user", "none"})
"""Where people have to be told: logged code can use the network, or more."""

KEPT_VARIABLES = (
    *("PATH", "LANG", "LC_ALL", "TZ", "PYTHONPATH", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "CUDA_VISIBLE_DEVICES"),
    *("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS"),
)
"""Environment variables that the process gets. They locate Python, its packages and the GPU, and limit threads; none is
an address or a secret."""

_INIT = Path(__file__).with_name("sandbox_init.py")
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64")
_CONFIGURATION = ("ld.so.cache", "ld.so.conf", "ld.so.conf.d", "alternatives", "localtime")
_NOBODY = 65534
_SECONDS_TO_TRY = 60.0
_TRIAL = "import sys, numpy; open(sys.argv[1]).close()"
"""What has to work in an isolation: Python, its compiled packages, and reading our own files."""


def make_environment(scratch: Path) -> dict[str, str]:
    """Returns the environment of an isolated process, whose home is ``scratch``."""
    kept = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
    own = {"HOME": str(scratch), "TMPDIR": str(scratch), "USER": "nobody", "LOGNAME": "nobody"}
    return kept | own | {"PYTHONDONTWRITEBYTECODE": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}


@cache
def find_isolation() -> Isolation:
    """Returns the best isolation that this machine allows, found by starting a process in each until one works."""
    isolations: tuple[Isolation, ...] = get_args(Isolation)
    for isolation in isolations[:-1]:
        with tempfile.TemporaryDirectory(prefix="breakhis-") as name:
            scratch = Path(name)
            command = [sys.executable, "-P", "-c", _TRIAL, str(_INIT)]
            try:
                done = subprocess.run(
                    isolate_command(isolation, command, readable=[], scratch=scratch),
                    env=make_environment(scratch),
                    stdin=subprocess.DEVNULL,
                    capture_output=True,
                    timeout=_SECONDS_TO_TRY,
                    check=False,
                )
            except (OSError, subprocess.TimeoutExpired):
                continue
            if done.returncode == 0:
                return isolation
    return "none"


def isolate_command(
    isolation: Isolation, command: Sequence[str], *, readable: Sequence[Path], scratch: Path
) -> list[str]:
    """Returns the command that runs ``command`` isolated, in the folder ``scratch``.

    Args:
        isolation: the way of it.
        command: program and arguments.
        readable: folders and files that it may read, besides Python and its packages.
        scratch: an empty folder of its own, the only one that it may write to. As another user it becomes that user's.
    """
    if isolation == "none":
        return list(command)
    if isolation == "user":
        return _make_init_command({"user": _NOBODY, "scratch": str(scratch)}, command)
    links, mounts = _list_mounts(readable, scratch.resolve())
    devices = sorted(map(str, Path("/dev").glob("nvidia*")))
    if isolation == "unshare":
        spec = {"user": None, "scratch": str(scratch.resolve()), "links": links, "mounts": mounts, "devices": devices}
        return _make_init_command(spec, command)
    arguments = ["--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
    arguments += ["--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp"]  # noqa: S108  # the sandbox's own
    for path, target in links.items():
        arguments += ["--symlink", target, path]
    for mode, path in mounts:
        arguments += {"read": ["--ro-bind", path, path], "write": ["--bind", path, path], "hide": ["--tmpfs", path]}[
            mode
        ]
    for device in devices:
        arguments += ["--dev-bind", device, device]
    arguments += ["--remount-ro", "/", "--chdir", str(scratch.resolve())]
    return [shutil.which("bwrap") or "bwrap", *arguments, "--", *command]


def share_with_user(isolation: Isolation, folder: Path, scratch: Path) -> Path:
    """Returns where the isolated process finds a folder: for another user a copy, as that one may not come to ours."""
    if isolation != "user":
        return folder
    copy = scratch / "given" / folder.name
    copy.parent.mkdir()
    shutil.copytree(folder, copy) if folder.is_dir() else shutil.copyfile(folder, copy)
    return copy


def _make_init_command(spec: Mapping[str, object], command: Sequence[str]) -> list[str]:
    return [sys.executable, "-I", "-S", str(_INIT), json.dumps(spec), *command]


def _list_mounts(readable: Sequence[Path], scratch: Path) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """Returns what the process sees of the disk.

    Returns:
        The links at the top of the disk (path -> target), and ``(mode, path)`` in the order of mounting: ``read``,
        ``hide`` (an empty folder in place of what lies there) or ``write``.
    """
    links = {path: str(Path(path).readlink()) for path in _SYSTEM if Path(path).is_symlink()}
    system = [Path(path) for path in _SYSTEM if path not in links]
    system += [Path("/etc") / name for name in _CONFIGURATION]
    prefixes = (sys.prefix, sys.exec_prefix, sys.base_prefix, sys.base_exec_prefix)
    python = [*map(Path, prefixes), Path(sys.executable).resolve().parent, Path(ml.__file__).parent]
    for variable in ("PYTHONPATH", "LD_LIBRARY_PATH"):
        python += [Path(entry) for entry in os.environ.get(variable, "").split(os.pathsep) if entry]
    if any(Path("/dev").glob("nvidia*")):
        python.append(Path("/sys"))
    found = [path.absolute() for path in (*system, *python) if path.exists()]
    mounts = [("read", str(path)) for path in _drop_nested(found)]
    # Where Python lies in a folder that holds data, too, the data is hidden, but not Python once more below it.
    for data in _find_data():
        if any(data.is_relative_to(path) for path in found):
            mounts.append(("hide", str(data)))
            mounts += [("read", str(path)) for path in _drop_nested(path for path in found if data in path.parents)]
    mounts += [("read", str(path.resolve())) for path in readable]
    return links, [*mounts, ("write", str(scratch))]


def _find_data() -> list[Path]:
    """Returns the folders on this machine's disk that hold the system's data and keys."""
    settings = read_settings()
    store = urlsplit(settings.store)
    data = [settings.home, *([Path(unquote(store.path))] if store.scheme in {"", "file"} else [])]
    return [path.resolve() for path in data if path.is_dir()]


def _drop_nested(paths: Iterable[Path]) -> list[Path]:
    """Returns the paths, sorted, without those that lie below another one."""
    outer: list[Path] = []
    for path in sorted(set(paths)):
        if path == Path("/") or any(path.is_relative_to(other) for other in outer):
            continue
        outer.append(path)
    return outer
