"""Leases: mutual exclusion among processes and hosts that share a store.

A lease is a small file with the time of its owner's last heartbeat. When an owner dies, others take its lease over once
the heartbeat is too old. A suspended process may wake up and believe that it still holds its lease, so whatever is done
under one has to be harmless when it is done late: see :mod:`ml.promotion.decisions`.
"""

import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from ml.core.errors import Conflict, TryAgain
from ml.core.store import Store

_SECONDS_BETWEEN_HEARTBEATS = 2.0
_SECONDS_UNTIL_EXPIRED = 10.0
_SECONDS_BETWEEN_ATTEMPTS = 0.2


@contextmanager
def hold_lease(store: Store, name: str, *, timeout: float = 300.0) -> Iterator[None]:
    """Context manager that holds the lease ``name``; waits while another process holds it.

    Raises:
        TryAgain: the lease was not free for ``timeout`` seconds.
    """
    key, owner = f"jobs/leases/{name}.json", uuid.uuid4().hex
    deadline = time.monotonic() + timeout
    while not _acquire(store, key, owner):
        if time.monotonic() > deadline:
            raise TryAgain(f"another process has held the lease {name} for {timeout:.0f} s; try again")
        time.sleep(_SECONDS_BETWEEN_ATTEMPTS)
    stop = threading.Event()
    heartbeat = threading.Thread(target=_send_heartbeats, args=(store, key, owner, stop), daemon=True)
    heartbeat.start()
    try:
        yield
    finally:
        stop.set()
        heartbeat.join()
        with suppress(Conflict):
            state, tag = store.read(key)
            if state and state["owner"] == owner:
                store.compare_and_set(key, {"owner": owner, "beat": 0.0}, tag)


def _acquire(store: Store, key: str, owner: str) -> bool:
    state, tag = store.read(key)
    if state and time.time() - state["beat"] < _SECONDS_UNTIL_EXPIRED:
        return False
    try:
        store.compare_and_set(key, {"owner": owner, "beat": time.time()}, tag)
    except Conflict:
        return False
    return True


def _send_heartbeats(store: Store, key: str, owner: str, stop: threading.Event) -> None:
    while not stop.wait(_SECONDS_BETWEEN_HEARTBEATS):
        # Any error of the store may pass: without further heartbeats others would take over from a live owner.
        with suppress(Exception):
            state, tag = store.read(key)
            if not state or state["owner"] != owner:
                return  # another process took over: this one was suspended for too long
            store.compare_and_set(key, {"owner": owner, "beat": time.time()}, tag)
