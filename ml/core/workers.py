"""Ordered, bounded parallelism: a map over processes, and a thread that prefetches items."""

import ctypes
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from functools import partial
from itertools import islice
from multiprocessing import active_children, get_context, parent_process
from multiprocessing.process import BaseProcess
from threading import Lock, Thread
from typing import Any, Literal, TypeVar

from ml.core.errors import TryAgain
from ml.core.shortages import describe_shortage, explain_shortage

Job = TypeVar("Job")
Result = TypeVar("Result")

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_RETAINED_BYTES = 32 * 2**20

Death = Literal["crashed", "time"]
"""Why a job's process ended: ``time`` if it had used up its CPU time, ``crashed`` for whatever else killed it."""

_NICENESS = 5

_MAIN_MODULE_LOCK = Lock()

_CHECK_SECONDS = 1.0
"""How often it is looked whether somebody still cares for the jobs that are waited for."""

_CHUNK_SIZE = 8
"""Number of jobs sent to a process at once; larger chunks need fewer messages."""


def map_in_processes(
    function: Callable[[Job], Result], jobs: Iterable[Job], workers: int
) -> Generator[Result, None, None]:
    """Yields the result of each job, in order. At most a few chunks are pending, however many jobs there are.

    Args:
        function: a module-level function; it and the jobs are pickled.
        jobs: consumed as they are needed.
        workers: number of processes; with one or none, this process does the work.

    Raises:
        TryAgain: a process was killed, most likely because memory ran out; or memory or threads ran out here.
        Exception: whatever ``function`` raises.
    """
    if workers <= 1:
        yield from map(function, jobs)
        return
    pending: deque[_Chunk[Job, Result]] = deque()
    try:
        yield from _map_chunks(function, iter(jobs), workers, pending)
    except BrokenProcessPool:
        raise TryAgain(
            "a worker process was killed (out of memory?); try again with fewer processes, such as BREAKHIS_WORKERS=1"
        ) from None


def map_surviving_crashes(
    function: Callable[[Job], Result],
    jobs: Iterable[Job],
    workers: int,
    on_crash: Callable[[Job, Death], Result],
    cpu_seconds: float | None = None,
) -> Generator[Result, None, None]:
    """Does what :func:`map_in_processes` does, and goes on after a job has killed the process that does it.

    Which of the pending jobs killed its process is not known. So each of them is done again alone, in a fresh process
    that has the machine's memory to itself; the one that kills this as well is at fault. A process that was killed
    because several large jobs met therefore costs no job.

    Args:
        function: a module-level function; it and the jobs are pickled.
        jobs: consumed as they are needed.
        workers: number of processes; with none, this process does the work without a limit, and a crash ends it.
        on_crash: returns the result of a job that killed its process, given why.
        cpu_seconds: CPU time that a job may take, of all threads of its process, which the kernel kills then; None: as
            much as it wants. Another process' work does not count, so that a busy machine costs no job.

    Raises:
        TryAgain: not even an idle process stays alive; or memory or threads ran out here.
        Exception: whatever ``function`` raises.
    """
    if workers < 1:
        yield from map(function, jobs)
        return
    if cpu_seconds is not None:
        function = partial(_run_limited, function, cpu_seconds)
    remaining = iter(jobs)
    while True:
        pending: deque[_Chunk[Job, Result]] = deque()
        try:
            yield from _map_chunks(function, remaining, workers, pending)
            return
        except BrokenProcessPool:
            pass
        with _LonelyProcess() as process:
            for chunk, future in pending:
                if future.done() and not future.cancelled() and future.exception() is None:
                    yield from future.result()
                    continue
                for job in chunk:
                    yield process.run(function, job, on_crash)


def map_one_by_one(
    function: Callable[[Job], Result], jobs: Iterable[Job], on_crash: Callable[[Job, Death], Result], cpu_seconds: float
) -> Generator[Result, None, None]:
    """Does what :func:`map_surviving_crashes` does in one process, and no job before its result is asked for.

    Args:
        function: a module-level function; it and the jobs are pickled.
        jobs: consumed as they are needed.
        on_crash: returns the result of a job that killed its process, given why.
        cpu_seconds: CPU time that a job may take.

    Raises:
        TryAgain: not even an idle process stays alive; or memory or threads ran out here.
        Exception: whatever ``function`` raises.
    """
    with _LonelyProcess() as process:
        for job in jobs:
            yield process.run(partial(_run_limited, function, cpu_seconds), job, on_crash)


_Chunk = tuple[list[Job], "Future[list[Result]]"]


def _map_chunks(
    function: Callable[[Job], Result], remaining: Iterator[Job], workers: int, pending: "deque[_Chunk[Job, Result]]"
) -> Generator[Result, None, None]:
    """Yields the result of each job, in order; ``pending`` holds the chunks whose results were not yielded."""
    pool = _Pool(workers)
    try:
        while True:
            while len(pending) <= 2 * workers and (chunk := list(islice(remaining, _CHUNK_SIZE))):
                future: Future[list[Result]] = Future()
                pending.append((chunk, future))  # before it is submitted, which a broken pool refuses
                pending[-1] = (chunk, pool.submit(_run_jobs, function, chunk))
            if not pending:
                break
            results = pool.wait_for(pending[0][1])
            pending.popleft()
            yield from results
    finally:
        pool.close()


class _Pool:
    """Worker processes. Where memory or threads run out here, there is an error; Python's own pool waits for ever."""

    def __init__(self, workers: int) -> None:
        # Processes are spawned, not forked: TensorFlow and threads of the caller do not survive a fork.
        self._executor = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_initialize_worker)

    def submit(self, function: Callable[..., Result], *arguments: Any) -> "Future[Result]":
        """Gives a job to the processes, the first of which are started by that.

        Raises:
            BrokenProcessPool: a process was killed.
            TryAgain: no process or thread can be started.
        """
        try:
            with _hide_main_module():
                return self._executor.submit(function, *arguments)
        except BrokenProcessPool:
            raise
        except (RuntimeError, OSError, MemoryError) as error:
            raise explain_shortage(error) or error from None

    def wait_for(self, future: "Future[Result]") -> Result:
        """Returns the result of a job.

        Raises:
            BrokenProcessPool: a process was killed.
            TryAgain: the thread that hands jobs over has died, as it does where it can start no other.
            Exception: whatever the job raises.
        """
        while not wait([future], _CHECK_SECONDS).done:
            if not self._is_managed() and not future.done():
                raise describe_shortage("worker processes get no more jobs")
        return future.result()

    def close(self) -> None:
        """Ends the processes, which first do what they have begun."""
        processes = list((self._executor._processes or {}).values())
        is_managed = self._is_managed()
        self._executor.shutdown(wait=is_managed, cancel_futures=True)
        if not is_managed:  # nobody tells them, and this process would wait for them at its end
            for process in processes:
                process.kill()
                process.join()

    def _is_managed(self) -> bool:
        manager: Any = self._executor._executor_manager_thread
        return manager is not None and bool(manager.is_alive())


class _LonelyProcess:
    """Does jobs one by one in one process, which is replaced after a job has killed it. Used in a ``with`` block."""

    def __init__(self) -> None:
        self._pool: _Pool | None = None
        self._process: BaseProcess | None = None  # the pool's only one

    def __enter__(self) -> "_LonelyProcess":
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool:
            self._pool.close()

    def run(self, function: Callable[[Job], Result], job: Job, on_crash: Callable[[Job, Death], Result]) -> Result:
        """Returns the job's result, or ``on_crash``'s where it killed the process.

        Raises:
            TryAgain: the process does not even live before it gets the job, which is then not at fault.
        """
        if self._pool is None:
            self._pool = self._start()
        future = self._pool.submit(function, job)
        try:
            return self._pool.wait_for(future)
        except BrokenProcessPool:
            self._pool.close()
            self._pool = None
            is_slow = self._process is not None and self._process.exitcode == -signal.SIGPROF
            return on_crash(job, "time" if is_slow else "crashed")

    def _start(self) -> _Pool:
        pool = _Pool(1)
        try:
            pid = pool.wait_for(pool.submit(os.getpid))
            self._process = next((process for process in active_children() if process.pid == pid), None)
        except TryAgain:
            pool.close()
            raise
        except BrokenProcessPool:
            pool.close()
            raise TryAgain(
                "worker processes are killed before they do anything; look for what kills them, such as a limit on "
                "this machine's memory, and try again"
            ) from None
        return pool


@contextmanager
def _hide_main_module() -> Iterator[None]:
    """Context manager in which spawned processes do not run the main module again.

    A spawned process imports the main module for the functions defined in it. For the command line that takes a second
    and a half per process, and no job here is defined there.
    """
    main = sys.modules["__main__"].__dict__
    with _MAIN_MODULE_LOCK:
        hidden: dict[str, Any] = {name: main.pop(name) for name in ("__spec__", "__file__") if name in main}
        main["__spec__"] = None
        try:
            yield
        finally:
            main.update(hidden)


@contextmanager
def prefetch(items: Generator[Result, None, None], count: int) -> Iterator[Iterator[Result]]:
    """Context manager that makes items in a thread, ``count`` of them ahead, and yields an iterator over them.

    The thread begins at once.

    Args:
        items: closed at the end, in that thread, whether or not all items were consumed.
        count: number of items that may wait to be consumed.

    Raises:
        Exception: whatever making an item raises; it is raised at that item's turn.
    """
    end = object()
    thread = ThreadPoolExecutor(1)
    pending = deque(thread.submit(next, items, end) for _ in range(count))

    def deliver() -> Iterator[Result]:
        while (item := pending.popleft().result()) is not end:
            pending.append(thread.submit(next, items, end))
            yield item  # type: ignore[misc]

    try:
        yield deliver()
    finally:
        for future in pending:
            future.cancel()
        thread.submit(items.close)
        thread.shutdown()


def _initialize_worker() -> None:
    # The process that consumes the results must not wait for a core: OpenVINO's threads spin until all have one.
    os.nice(_NICENESS)
    _retain_freed_memory()
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Ends this process when its parent was killed; otherwise it would wait for work forever."""
    parent = parent_process()
    if parent:
        parent.join()
        os._exit(1)


def _retain_freed_memory() -> None:
    """Makes this process reuse the memory of one image for the next.

    glibc returns large blocks to the kernel, which clears them before it hands them out again: that is a fifth of the
    time that decoding takes. Other C libraries have no such call.
    """
    with suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, _RETAINED_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, _RETAINED_BYTES)


def _run_limited(function: Callable[[Job], Result], cpu_seconds: float, job: Job) -> Result:
    """Does a job; the kernel ends this process by SIGPROF once that has taken so much CPU time.

    A decoder's loop in C sees no exception of Python's, and a signal without a handler ends it all the same.
    """
    signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
    try:
        return function(job)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _run_jobs(function: Callable[[Job], Result], chunk: list[Job]) -> list[Result]:
    return [function(job) for job in chunk]
