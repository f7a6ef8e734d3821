"""Processes that are recognised again, and those that are not."""

import os
import signal
import subprocess
import time

import psutil

from ml.local.processes import Process
from tests.helpers.sleepers import sleeper


def test_a_process_is_known_by_more_than_its_pid(children: list[subprocess.Popen[bytes]]) -> None:
    child = sleeper(children)
    process = Process.of(child.pid)
    assert process.is_alive()
    assert not Process(pid=process.pid, birth=process.birth + "1").is_alive()


def test_a_dead_process_and_a_zombie_are_not_alive(children: list[subprocess.Popen[bytes]]) -> None:
    child = sleeper(children)
    process = Process.of(child.pid)
    os.killpg(child.pid, signal.SIGKILL)
    while psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    assert not process.is_alive()
    child.wait()
    assert not process.is_alive()
