import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import psutil
import pytest

from ml.core import workers as workers_module
from ml.core.errors import ImageError, TryAgain
from ml.core.workers import _CHUNK_SIZE, map_in_processes, map_one_by_one, map_surviving_crashes


def square(n: int) -> int:
    if n < 0:
        raise ImageError("truncated", f"no square of {n}")
    return n * n


def exit_at_40(n: int) -> int:
    if n == 40:
        os._exit(1)
    return n


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_results_come_in_order(workers: int) -> None:
    assert list(map_in_processes(square, range(50), workers)) == [n * n for n in range(50)]
    assert list(map_in_processes(square, [], workers)) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_in_a_job_reaches_the_caller(workers: int) -> None:
    with pytest.raises(ImageError, match="no square of -1"):
        list(map_in_processes(square, [1, -1], workers))


@pytest.mark.parametrize("as_module", [True, False])
def test_processes_do_not_run_the_program_that_starts_them(as_module: bool, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(
        "import operator, sys\n"
        "from ml.core.workers import map_in_processes\n"
        "print('ran')\n"
        "if __name__ == '__main__':\n"
        "    assert list(map_in_processes(operator.neg, range(40), 2)) == [-n for n in range(40)]\n"
        "    assert __file__.endswith('program.py')\n"
    )
    program = ["-m", "program"] if as_module else ["program.py"]
    path = {"PYTHONPATH": f"{tmp_path}:{Path.cwd()}"}
    done = subprocess.run(
        [sys.executable, *program], cwd=tmp_path, env={**os.environ, **path}, capture_output=True, text=True, check=True
    )
    assert done.stdout == "ran\n"


def test_a_killed_worker_may_be_tried_again() -> None:
    with pytest.raises(TryAgain, match="BREAKHIS_WORKERS=1") as caught:
        list(map_in_processes(exit_at_40, range(100), 2))
    assert not isinstance(caught.value.__context__, BrokenProcessPool) or caught.value.__suppress_context__


def test_only_a_few_chunks_are_consumed_ahead() -> None:
    consumed = 0

    def jobs() -> Iterator[int]:
        nonlocal consumed
        for n in range(10_000):
            consumed += 1
            yield n

    results = map_in_processes(square, jobs(), 2)
    for done in range(1, 200):
        next(results)
        assert consumed - done <= 6 * _CHUNK_SIZE
    results.close()  # type: ignore[attr-defined]


def test_closing_the_results_early_ends_the_processes() -> None:
    before = set(multiprocessing.active_children())
    results = map_in_processes(square, range(10_000), 2)
    next(results)
    assert len(set(multiprocessing.active_children()) - before) == 2
    results.close()  # type: ignore[attr-defined]
    assert set(multiprocessing.active_children()) <= before


def kill_itself_for_multiples_of_13(n: int) -> int:
    if n % 13 == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return n


def kill_itself_beside_others(n: int) -> int:
    """Dies in a pool of several, as a process does whose neighbours use up the memory."""
    if n == 40 and len(psutil.Process(os.getppid()).children()) > 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return n


def say_that_it_crashed(n: int, why: str) -> int:
    assert why == "crashed"
    return -n


@pytest.mark.parametrize("workers", [1, 2])
def test_jobs_that_kill_their_process_cost_no_other(workers: int) -> None:
    found = list(map_surviving_crashes(kill_itself_for_multiples_of_13, range(60), workers, say_that_it_crashed))
    assert found == [-n if n % 13 == 5 else n for n in range(60)]


def compute_at_40(n: int) -> int:
    while n == 40:
        pass
    return n


@pytest.mark.parametrize("workers", [1, 2])
def test_a_job_that_takes_too_much_cpu_time_costs_no_other(workers: int) -> None:
    ended: list[tuple[int, str]] = []
    found = map_surviving_crashes(
        compute_at_40, range(60), workers, lambda n, why: ended.append((n, why)) or -n, cpu_seconds=0.5
    )
    assert list(found) == [-n if n == 40 else n for n in range(60)]
    assert ended == [(40, "time")]


def test_jobs_are_done_one_by_one_and_only_when_they_are_asked_for() -> None:
    taken: list[int] = []
    jobs = (taken.append(n) or n for n in (39, 40, 41, 42))
    found = map_one_by_one(compute_at_40, jobs, lambda n, why: f"{n}: {why}", 0.5)
    assert [next(found), next(found), next(found)] == [39, "40: time", 41]
    assert taken == [39, 40, 41]
    found.close()
    assert not multiprocessing.active_children()


def take_a_fifth_of_a_second(n: int) -> int:
    begin = time.process_time()
    while time.process_time() < begin + 0.2:
        pass
    return n


def test_each_job_has_cpu_time_of_its_own() -> None:
    found = map_surviving_crashes(take_a_fifth_of_a_second, range(6), 1, say_that_it_crashed, cpu_seconds=0.8)
    assert list(found) == list(range(6))


def test_a_job_that_succeeds_alone_is_not_at_fault() -> None:
    assert list(map_surviving_crashes(kill_itself_beside_others, range(60), 2, say_that_it_crashed)) == list(range(60))


def test_errors_in_jobs_are_no_crashes() -> None:
    with pytest.raises(ImageError, match="no square of -1"):
        list(map_surviving_crashes(square, [1, -1], 2, say_that_it_crashed))
    assert list(map_surviving_crashes(square, [], 2, say_that_it_crashed)) == []
    assert list(map_surviving_crashes(square, range(9), 0, say_that_it_crashed)) == [n * n for n in range(9)]


def test_no_job_is_blamed_where_no_process_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers_module, "_initialize_worker", end_at_once)
    with pytest.raises(TryAgain, match="killed before they do anything"):
        list(map_surviving_crashes(square, range(9), 2, say_that_it_crashed))


@pytest.mark.parametrize("blocked", ["multiprocessing.queues.Queue._start_thread", "threading.Thread.start"])
@pytest.mark.parametrize("survive", [False, True])
def test_no_thread_for_the_jobs_is_an_error_and_no_wait(
    blocked: str, survive: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    before = set(multiprocessing.active_children())
    monkeypatch.setattr(workers_module, "_CHECK_SECONDS", 0.05)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    monkeypatch.setattr(blocked, refuse)
    results = (
        map_surviving_crashes(square, range(9), 2, say_that_it_crashed)
        if survive
        else map_in_processes(square, range(9), 2)
    )
    with pytest.raises(TryAgain, match=r"memory or threads ran out .*BREAKHIS_WORKERS=1"):
        list(results)
    assert set(multiprocessing.active_children()) <= before


@pytest.mark.parametrize("free_mb", [2, 10, 20, 40])
def test_a_limit_on_memory_ends_in_words(free_mb: int) -> None:
    """Some of these limits let the first thread start, and some none; the processes inherit each."""
    program = (
        "import operator, resource, psutil\n"
        "from ml.core.errors import TryAgain\n"
        "from ml.core.workers import map_in_processes\n"
        f"limit = psutil.Process().memory_info().vms + {free_mb} * 2**20\n"
        "resource.setrlimit(resource.RLIMIT_AS, (limit, limit))\n"
        "try:\n"
        "    print(sum(map_in_processes(operator.neg, range(40), 2)))\n"
        "except TryAgain as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == str(-sum(range(40))) or "BREAKHIS_WORKERS=1" in done.stdout, done.stderr


def end_at_once() -> None:
    os._exit(1)
