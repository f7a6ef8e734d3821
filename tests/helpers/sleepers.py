"""Processes that do nothing, as stand-ins for servers."""

import subprocess
import sys
import time

import psutil

SLEEPERS = "import subprocess, sys, time; p = [subprocess.Popen(['sleep', '300']) for _ in range(2)]; time.sleep(300)"


def sleeper(children: list[subprocess.Popen[bytes]]) -> subprocess.Popen[bytes]:
    """A process with two children, in a session of its own, as a server is started."""
    child = subprocess.Popen([sys.executable, "-c", SLEEPERS], start_new_session=True)
    children.append(child)
    deadline = time.monotonic() + 20
    while len(psutil.Process(child.pid).children()) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return child
