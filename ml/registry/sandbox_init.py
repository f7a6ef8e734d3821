"""Starts a program isolated, by calls of the Linux kernel: ``sandbox_init.py SPEC PROGRAM [ARGUMENT …]``.

:mod:`ml.registry.sandbox` starts this file with the standard library alone, and nothing imports it. SPEC is a JSON
object. With ``user`` it becomes that user and runs the program. Otherwise the program runs in new namespaces of users,
mounts, processes, networks and IPC, under ``scratch`` as its working folder. It sees ``mounts``, pairs of a mode (read,
hide, write) and a path, ``links`` at the top of the disk, and ``devices``; see user_namespaces(7) and
pivot_root(2). Its exit status becomes that of this process.
"""

import ctypes
import json
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

_CLONE_NEWNS, _CLONE_NEWUTS, _CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
_CLONE_NEWUSER, _CLONE_NEWPID, _CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REMOUNT = 1, 2, 4, 8, 32
_MS_NOATIME, _MS_NODIRATIME, _MS_BIND, _MS_REC, _MS_PRIVATE = 1024, 2048, 4096, 16384, 1 << 18
_LOCKED_FLAGS = _MS_RDONLY | _MS_NOSUID | _MS_NODEV | _MS_NOEXEC | _MS_NOATIME | _MS_NODIRATIME
"""Flags of a mount that a user namespace may not take away; statvfs has them under the same numbers."""
_MNT_DETACH = 2
_CAPABILITY_VERSION = 0x20080522  # the third, of linux/capability.h
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38
_NOBODY = 65534
_DEVICES = ("null", "zero", "full", "random", "urandom")

_libc = ctypes.CDLL(None, use_errno=True)


def main(spec: dict[str, Any], program: list[str]) -> None:
    """Run the program as SPEC says; does not return."""
    if spec["user"] is not None:
        _become_user(spec["user"], spec["scratch"])
        os.execvp(program[0], program)  # noqa: S606  # by its arguments
    owner = os.geteuid(), os.getegid()
    _call(_libc.unshare, _CLONE_NEWUSER | _CLONE_NEWNS | _CLONE_NEWPID | _CLONE_NEWNET | _CLONE_NEWIPC | _CLONE_NEWUTS)
    Path("/proc/self/setgroups").write_text("deny")
    # Not root within: so the program loses all capabilities in the namespaces when it is executed.
    Path("/proc/self/uid_map").write_text(f"{_NOBODY} {owner[0]} 1")
    Path("/proc/self/gid_map").write_text(f"{_NOBODY} {owner[1]} 1")
    first = os.fork()  # the first process in the new namespace of processes: with it all others end
    if first == 0:
        _call(_libc.prctl, _PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        _mount_view(spec)
        _call(_libc.prctl, _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        # The program is the second one, since signals do not end the first.
        second = os.fork()
        if second == 0:
            os.execvp(program[0], program)  # noqa: S606
        _drop_capabilities()
        _exit_as(second)
    _exit_as(first)


def _exit_as(child: int) -> None:
    """Wait for a child, and end as it ended."""
    while True:
        ended, status = os.wait()  # of the first process all that lost their parents are children, too
        if ended == child:
            code = os.waitstatus_to_exitcode(status)
            os._exit(code if code >= 0 else 128 - code)


def _drop_capabilities() -> None:
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0)
    _call(_libc.capset, header, (ctypes.c_uint32 * 6)())


def _become_user(user: int, scratch: str) -> None:
    os.chown(scratch, user, user)
    for path in Path(scratch).rglob("*"):
        os.chown(path, user, user)
    os.setgroups([])
    os.setgid(user)
    os.setuid(user)
    _call(_libc.prctl, _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def _mount_view(spec: dict[str, Any]) -> None:
    """Make what the program sees of the disk, in memory, and make it the root."""
    _mount("none", "/", "", _MS_REC | _MS_PRIVATE)
    root = f"{spec['scratch']}/root"
    Path(root).mkdir(exist_ok=True)
    _mount("tmpfs", root, "tmpfs", _MS_NOSUID | _MS_NODEV, "mode=0755")
    for path, target in spec["links"].items():
        Path(root + path).symlink_to(target)
    _mount_temporary(f"{root}/tmp")  # noqa: S108  # the program's own
    for mode, path in spec["mounts"]:
        if mode == "hide":
            _mount_temporary(root + path)
        else:
            _bind(path, root + path, writable=mode == "write")
    _mount_devices(root, spec["devices"])
    Path(f"{root}/proc").mkdir()
    _mount("proc", f"{root}/proc", "proc", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC)
    _mount("none", root, "", _MS_REMOUNT | _MS_BIND | _MS_RDONLY | _MS_NOSUID | _MS_NODEV)
    os.chdir(root)
    _call(_libc.pivot_root, b".", b".")
    _call(_libc.umount2, b".", _MNT_DETACH)
    os.chdir(spec["scratch"])


def _mount_devices(root: str, further: list[str]) -> None:
    _mount_temporary(f"{root}/dev")
    for device in (*(f"/dev/{name}" for name in _DEVICES), *further):
        _bind(device, root + device, writable=True, flags=_MS_NOSUID)
    _mount_temporary(f"{root}/dev/shm")  # noqa: S108
    for name, target in (("fd", "fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")):
        Path(f"{root}/dev/{name}").symlink_to(f"/proc/self/{target}")


def _mount_temporary(path: str) -> None:
    """Mount an empty folder in memory."""
    Path(path).mkdir(parents=True, exist_ok=True)
    _mount("tmpfs", path, "tmpfs", _MS_NOSUID | _MS_NODEV, "mode=0777")


def _bind(source: str, target: str, *, writable: bool, flags: int = _MS_NOSUID | _MS_NODEV) -> None:
    """Show a folder or file of the disk, with what is mounted below it; without ``writable`` nobody can change it."""
    place = Path(target)
    if Path(source).is_dir():
        place.mkdir(parents=True, exist_ok=True)
    elif not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        place.touch()
    # The view itself lies in the scratch folder, and is not shown within itself.
    _mount(source, target, "", _MS_BIND | (0 if writable else _MS_REC))
    wanted = flags | (0 if writable else _MS_RDONLY)
    _remount(target, wanted)
    for below in _list_mounts_below(target):
        with suppress(OSError):  # such as another user's: it stays as it is, and the program has no rights there
            _remount(below, wanted)


def _remount(path: str, flags: int) -> None:
    kept = os.statvfs(path).f_flag & _LOCKED_FLAGS
    _mount("none", path, "", _MS_REMOUNT | _MS_BIND | flags | kept)


def _list_mounts_below(path: str) -> list[str]:
    lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    places = [line.split(" ")[4].encode().decode("unicode_escape") for line in lines]
    return [place for place in places if place.startswith(f"{path}/")]


def _mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    _call(_libc.mount, source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), options.encode() or None)


def _call(function: object, *arguments: object) -> None:
    """Call a function of the C library.

    Raises:
        OSError: it failed.
    """
    if function(*arguments) != 0:  # type: ignore[operator]
        number = ctypes.get_errno()
        raise OSError(number, f"{function.__name__}: {os.strerror(number)}")  # type: ignore[attr-defined]


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), sys.argv[2:])
