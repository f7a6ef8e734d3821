"""Leases: mutual exclusion among processes and hosts that share a store.

A lease is a small file that its owner writes anew every few seconds. When an owner dies, others take its lease over.
An owner counts as dead once its file has not changed for a time that the *watcher* has measured on its own monotonic
clock. No time that an owner wrote is ever read: clocks of two hosts may differ, and one may be set at any moment.

A suspended process may wake up and believe that it still holds its lease, so whatever is done under one has to be
harmless when it is done late: see :mod:`ml.promotion.decisions`.

C. Gray, D. Cheriton, "Leases: An Efficient Fault-Tolerant Mechanism for Distributed File Cache Consistency", SOSP 1989.
"""

import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

from ml.core.errors import Conflict, TryAgain
from ml.core.store import Json, Store

_SECONDS_BETWEEN_HEARTBEATS = 2.0
_SECONDS_UNTIL_EXPIRED = 10.0
_SECONDS_BETWEEN_ATTEMPTS = 0.2


class OwnedState(NamedTuple):
    """What a watcher finds in the file that an owner keeps writing."""

    state: Json | None
    """Its content; None where there is no such file."""
    tag: str | None
    """Its version tag for :meth:`ml.core.store.Store.compare_and_set`."""
    is_free: bool
    """Whether nobody lives who owns it: there is no file, its owner has released it, or its owner is dead."""


class OwnerWatch:
    """Watches the file of an owner, which is alive as long as the file goes on changing.

    Whoever takes the file over does so by a compare-and-set with the tag that was found, which fails where the owner
    has written meanwhile.

    Args:
        store: the store that holds the file.
        key: the file's key. Its content is what :func:`mark_beat` returned.
        seconds: for how long it has to stay unchanged, on this process's monotonic clock, until its owner is dead.
    """

    def __init__(self, store: Store, key: str, seconds: float) -> None:
        self._store, self._key, self._seconds = store, key, seconds
        self._tag: str | None = None
        self._seen = 0.0

    def look(self) -> OwnedState:
        """Reads the file once. An owner can only be found dead by several looks."""
        # This process may be suspended before or after the reading, which must not count as the owner's silence. So
        # the time begins after the reading that first saw a tag, and ends before the one that sees it still.
        before = time.monotonic()
        state, tag = self._store.read(self._key)
        if state is None or is_released(state):
            return OwnedState(state, tag, is_free=True)
        if tag != self._tag:
            self._tag, self._seen = tag, time.monotonic()
            return OwnedState(state, tag, is_free=False)
        return OwnedState(state, tag, is_free=before - self._seen >= self._seconds)


def mark_beat(state: Json, *, released: bool = False) -> Json:
    """Returns an owner's state with a new mark, so that the file changes whatever the owner's clock shows.

    ``beat`` is the time for people who look at the file, and 0 once the owner has released it. Processes of earlier
    releases also judge by it.
    """
    return {**state, "beat": 0.0 if released else time.time() or 1.0, "mark": uuid.uuid4().hex}


def is_released(state: Json) -> bool:
    """Returns whether the owner has released what it held."""
    return not state["beat"]


@contextmanager
def hold_lease(store: Store, name: str, *, timeout: float = 300.0) -> Iterator[None]:
    """Context manager that holds the lease ``name``; waits while another process holds it.

    Raises:
        TryAgain: the lease was not free for ``timeout`` seconds.
    """
    key, owner = f"jobs/leases/{name}.json", uuid.uuid4().hex
    watch = OwnerWatch(store, key, _SECONDS_UNTIL_EXPIRED)
    deadline = time.monotonic() + timeout
    while not _acquire(store, key, owner, watch.look()):
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
                store.compare_and_set(key, mark_beat({"owner": owner}, released=True), tag)


def _acquire(store: Store, key: str, owner: str, found: OwnedState) -> bool:
    if not found.is_free:
        return False
    try:
        store.compare_and_set(key, mark_beat({"owner": owner}), found.tag)
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
            store.compare_and_set(key, mark_beat({"owner": owner}), tag)
