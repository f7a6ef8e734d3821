"""Doing something one at a time, over processes and hosts that share a store.

A lease is a small file with its owner's last sign of life. Who dies leaves it, and others take it over after a while. A
process that was only stopped may wake up and believe that it still has its lease, so what is done under one has to be
harmless when done late: see :mod:`ml.promotion.decisions`.
"""

import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from ml.core.errors import Conflict, TryAgain
from ml.core.store import Store

_SECONDS_BETWEEN_BEATS = 2.0
_SECONDS_UNTIL_DEAD = 10.0
_SECONDS_BETWEEN_LOOKS = 0.2


@contextmanager
def hold_lease(store: Store, name: str, *, patience: float = 300.0) -> Iterator[None]:
    """Hold the lease ``name``; waits for whoever holds it.

    Raises:
        TryAgain: it was not free for ``patience`` seconds.
    """
    key, owner = f"jobs/leases/{name}.json", uuid.uuid4().hex
    deadline = time.monotonic() + patience
    while not _take(store, key, owner):
        if time.monotonic() > deadline:
            raise TryAgain(f"another process has been at {name} for {patience:.0f} s; try again")
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    stop = threading.Event()
    beating = threading.Thread(target=_beat, args=(store, key, owner, stop), daemon=True)
    beating.start()
    try:
        yield
    finally:
        stop.set()
        beating.join()
        with suppress(Conflict):
            state, tag = store.read(key)
            if state and state["owner"] == owner:
                store.compare_and_set(key, {"owner": owner, "beat": 0.0}, tag)


def _take(store: Store, key: str, owner: str) -> bool:
    state, tag = store.read(key)
    if state and time.time() - state["beat"] < _SECONDS_UNTIL_DEAD:
        return False
    try:
        store.compare_and_set(key, {"owner": owner, "beat": time.time()}, tag)
    except Conflict:
        return False
    return True


def _beat(store: Store, key: str, owner: str, stop: threading.Event) -> None:
    while not stop.wait(_SECONDS_BETWEEN_BEATS):
        # Whatever a store may answer once: with no more beats, others would take over from one that lives.
        with suppress(Exception):
            state, tag = store.read(key)
            if not state or state["owner"] != owner:
                return  # taken over: the process was stopped for too long
            store.compare_and_set(key, {"owner": owner, "beat": time.time()}, tag)
