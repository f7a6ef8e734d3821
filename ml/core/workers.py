"""Work spread over processes, or done ahead in a thread: in order, with only so much of it waiting."""

import ctypes
import os
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from itertools import islice
from multiprocessing import get_context, parent_process
from threading import Lock, Thread
from typing import Any, TypeVar

from ml.core.errors import TryAgain

J = TypeVar("J")
R = TypeVar("R")

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_KEPT_BYTES = 32 * 2**20

_NICE = 5

_UNNAMED = Lock()

_CHUNK = 8
"""Jobs handed over at once: fewer messages between the processes."""


def map_in_processes(function: Callable[[J], R], jobs: Iterable[J], workers: int) -> Generator[R, None, None]:
    """The result of each job, in order. Only a few chunks wait to be taken, however many jobs there are.

    Args:
        function: a module's function; it and the jobs are pickled.
        jobs: taken as they are needed.
        workers: processes; with one, the work is done in this one.

    Raises:
        TryAgain: a process was killed, most likely for want of memory.
        Exception: whatever ``function`` raises.
    """
    if workers <= 1:
        yield from map(function, jobs)
        return
    left = iter(jobs)
    # Spawned, not forked: the caller may hold TensorFlow or threads, which do not survive a fork.
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_begin)
    waiting: deque[Future[list[R]]] = deque()
    try:
        while True:
            while len(waiting) <= 2 * workers and (chunk := list(islice(left, _CHUNK))):
                with _main_unnamed():
                    waiting.append(pool.submit(_work_off, function, chunk))
            if not waiting:
                break
            yield from waiting.popleft().result()
    except BrokenProcessPool:
        raise TryAgain(
            "a worker process was killed (out of memory?): try again with fewer, such as BREAKHIS_WORKERS=1"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _main_unnamed() -> Iterator[None]:
    """Have processes that are started now leave out the program that started them.

    A spawned process runs it again, for functions that are defined there; of the command line that is a second and a
    half each, and nothing here is defined there.
    """
    main = sys.modules["__main__"].__dict__
    with _UNNAMED:
        kept: dict[str, Any] = {name: main.pop(name) for name in ("__spec__", "__file__") if name in main}
        main["__spec__"] = None
        try:
            yield
        finally:
            main.update(kept)


@contextmanager
def prefetch(items: Generator[R, None, None], count: int) -> Iterator[Iterator[R]]:
    """The same items, made by a thread while something else is done: it begins at once and is ``count`` of them ahead.

    Args:
        items: closed in the end, in that thread, whether all were taken or not.
        count: how many may wait to be taken.

    Raises:
        Exception: whatever making an item raises, when it would have been that item's turn.
    """
    end = object()
    thread = ThreadPoolExecutor(1)
    waiting = deque(thread.submit(next, items, end) for _ in range(count))

    def taken() -> Iterator[R]:
        while (item := waiting.popleft().result()) is not end:
            waiting.append(thread.submit(next, items, end))
            yield item  # type: ignore[misc]

    try:
        yield taken()
    finally:
        for one in waiting:
            one.cancel()
        thread.submit(items.close)
        thread.shutdown()


def _begin() -> None:
    # What takes the results is to be kept from waiting for a core: OpenVINO's threads wait for each other, spinning.
    os.nice(_NICE)
    _keep_memory()
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process when the one that started it was killed: by itself it would wait for work forever."""
    parent = parent_process()
    if parent:
        parent.join()
        os._exit(1)


def _keep_memory() -> None:
    """Have this process keep the memory of a picture for the next one.

    glibc gives large blocks back to the kernel, which clears them before it hands them out again: a fifth of the time
    that decoding takes. Other C libraries have no such call.
    """
    with suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def _work_off(function: Callable[[J], R], chunk: list[J]) -> list[R]:
    return [function(job) for job in chunk]
