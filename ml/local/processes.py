"""Recognises processes that an earlier command has started, and stops them with everything they have started."""

import os
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
from pydantic import BaseModel

from ml.core.errors import StackError

_SECONDS_TO_STOP = 15.0


class Process(BaseModel):
    """A process, known by its pid and by when it began, which tells it from a later process with the same pid."""

    pid: int
    birth: str

    @classmethod
    def of(cls, pid: int) -> "Process":
        """Returns the process that has this pid now.

        Raises:
            psutil.NoSuchProcess: no process has it.
        """
        return cls(pid=pid, birth=_read_birth(pid))

    def is_alive(self) -> bool:
        """Returns whether this very process still runs. A zombie does not."""
        try:
            return _read_birth(self.pid) == self.birth and psutil.Process(self.pid).status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False


def find_family(recorded: Sequence[Process]) -> list[psutil.Process]:
    """Returns all living processes that belong to the recorded ones: these, their descendants and their sessions.

    A server is started in a session of its own, and a session's number is not used again while one of its members
    lives. So every process in the session of a recorded one was started by it.
    """
    family: dict[int, psutil.Process] = {}
    sessions = set()
    for process in recorded:
        try:
            if not process.is_alive():
                continue
            root = psutil.Process(process.pid)
            sessions.add(os.getsid(process.pid))
            family |= {member.pid: member for member in (root, *root.children(recursive=True))}
        except (psutil.NoSuchProcess, ProcessLookupError):
            continue
    sessions.discard(os.getsid(0))
    for other in psutil.process_iter():
        try:
            if os.getsid(other.pid) in sessions:
                family.setdefault(other.pid, other)
        except (ProcessLookupError, PermissionError):
            continue
    return [member for member in family.values() if member.pid != os.getpid() and _is_running(member)]


def stop_family(recorded: Sequence[Process]) -> bool:
    """Stops the recorded processes and all that belong to them; returns whether any of them ran.

    Raises:
        StackError: a process belongs to another user.
    """
    processes = find_family(recorded)
    any_ran = bool(processes)
    for send_signal in (psutil.Process.terminate, psutil.Process.kill):
        for process in processes:
            try:
                send_signal(process)
            except psutil.NoSuchProcess:
                pass
            except psutil.AccessDenied:
                raise StackError(f"process {process.pid} belongs to another user; stop it as that user") from None
        processes = _wait_for_end(processes, _SECONDS_TO_STOP)
        # Processes that were started in the meantime get the second signal.
        known = {process.pid for process in processes}
        processes += [process for process in find_family(recorded) if process.pid not in known]
        if not processes:
            break
    return any_ran


def has_lost_child(process: Process, zombies: dict[int, float]) -> bool:
    """Returns whether a component of ``airflow standalone`` has ended, which goes on without it and leaves a zombie.

    Args:
        process: the first process of ``airflow standalone``.
        zombies: when each zombie was first seen (time.monotonic), by pid. The caller keeps it from call to call: only a
            zombie that stays for more than five seconds counts, since those that pass are harmless.
    """
    now = time.monotonic()
    try:
        for child in psutil.Process(process.pid).children():
            if child.status() == psutil.STATUS_ZOMBIE and now - zombies.setdefault(child.pid, now) > 5:
                return True
    except psutil.NoSuchProcess:
        pass
    return False


def _read_birth(pid: int) -> str:
    """Returns the boot and the clock tick in it at which a process began, which no change of the clock moves."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        raise psutil.NoSuchProcess(pid) from None
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}:{stat.rpartition(')')[2].split()[19]}"


def _wait_for_end(processes: list[psutil.Process], seconds: float) -> list[psutil.Process]:
    """Waits until the processes have ended; returns those that still run after so many seconds. A zombie has ended."""
    deadline = time.monotonic() + seconds
    while True:
        processes = [process for process in processes if _is_running(process)]
        if not processes or time.monotonic() > deadline:
            return processes
        time.sleep(0.1)


def _is_running(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
