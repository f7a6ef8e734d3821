"""Processes that one command starts and a later one finds again, and stops with all that they have started."""

import os
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
from pydantic import BaseModel

from ml.core.errors import StackError

_SECONDS_TO_STOP = 15.0


class Process(BaseModel):
    """A process by its pid and its birth, which tells it from a later process that got the same pid."""

    pid: int
    birth: str

    @classmethod
    def of(cls, pid: int) -> "Process":
        """The process that has this pid now.

        Raises:
            psutil.NoSuchProcess: none has.
        """
        return cls(pid=pid, birth=_birth(pid))

    def is_alive(self) -> bool:
        """Whether this very process still runs (a zombie does not)."""
        try:
            return _birth(self.pid) == self.birth and psutil.Process(self.pid).status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False


def find_family(recorded: Sequence[Process]) -> list[psutil.Process]:
    """Every living process of a family: those recorded, their descendants, and whoever shares a session with one.

    A server is started in a session of its own, and a session's number cannot be used again while one of its members
    lives; so whoever is in the session of a recorded process was started by it.
    """
    found: dict[int, psutil.Process] = {}
    sessions = set()
    for process in recorded:
        try:
            if not process.is_alive():
                continue
            root = psutil.Process(process.pid)
            sessions.add(os.getsid(process.pid))
            found |= {p.pid: p for p in (root, *root.children(recursive=True))}
        except (psutil.NoSuchProcess, ProcessLookupError):
            continue
    sessions.discard(os.getsid(0))
    for other in psutil.process_iter():
        try:
            if os.getsid(other.pid) in sessions:
                found.setdefault(other.pid, other)
        except (ProcessLookupError, PermissionError):
            continue
    return [p for p in found.values() if p.pid != os.getpid() and _runs(p)]


def stop_family(recorded: Sequence[Process]) -> bool:
    """Stop recorded processes and all that belongs to them; returns whether there were any.

    Raises:
        StackError: one belongs to another user.
    """
    processes = find_family(recorded)
    ran = bool(processes)
    for send in (psutil.Process.terminate, psutil.Process.kill):
        for process in processes:
            try:
                send(process)
            except psutil.NoSuchProcess:
                pass
            except psutil.AccessDenied:
                raise StackError(f"process {process.pid} belongs to another user; stop it as that user") from None
        processes = _outliving(processes, _SECONDS_TO_STOP)
        # Whoever was started while we were stopping goes with the second signal.
        known = {process.pid for process in processes}
        processes += [process for process in find_family(recorded) if process.pid not in known]
        if not processes:
            break
    return ran


def has_lost_child(process: Process, zombies: dict[int, float]) -> bool:
    """Whether a component of ``airflow standalone`` has ended: it does not mind, and leaves a zombie that stays.

    ``zombies`` remembers from call to call since when each zombie has been one, since passing ones are harmless.
    """
    now = time.monotonic()
    try:
        for child in psutil.Process(process.pid).children():
            if child.status() == psutil.STATUS_ZOMBIE and now - zombies.setdefault(child.pid, now) > 5:
                return True
    except psutil.NoSuchProcess:
        pass
    return False


def _birth(pid: int) -> str:
    """Boot and the clock tick within it when a process began: unlike a time of day, no change of the clock moves it."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        raise psutil.NoSuchProcess(pid) from None
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}:{stat.rpartition(')')[2].split()[19]}"


def _outliving(processes: list[psutil.Process], seconds: float) -> list[psutil.Process]:
    """Those that still run after so many seconds. A zombie does not: whether its parent looks is not our matter."""
    deadline = time.monotonic() + seconds
    while True:
        processes = [process for process in processes if _runs(process)]
        if not processes or time.monotonic() > deadline:
            return processes
        time.sleep(0.1)


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
