"""Processes that do nothing, as stand-ins for servers."""

import subprocess
import sys
import time

import psutil

SLEEPERS = "import subprocess, sys, time; p = [subprocess.Popen(['sleep', '300']) for _ in range(2)]; time.sleep(300)"


def sleeper(children: list[subprocess.Popen[bytes]]) -> subprocess.Popen[bytes]:
    """Starts a process with two children in its own session, like a server, and appends it to ``children``."""
    child = subprocess.Popen([sys.executable, "-c", SLEEPERS], start_new_session=True)
    children.append(child)
    deadline = time.monotonic() + 20
    while len(psutil.Process(child.pid).children()) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return child
