"""Checkpoints of trainings in the store, so that a training that was killed resumes where it was.

The folder jobs/training/<job>/ holds ``state.json``, which changes by compare-and-set, and the arrays that it names.
The state also has a mark that the process which trains changes every few seconds: of two processes that train the
same, the second waits until the mark no longer changes (:class:`ml.core.leases.OwnerWatch`).
"""

import io
import threading
import time
import uuid
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ml.core.errors import Conflict, StoreError, TryAgain
from ml.core.leases import OwnerWatch, is_released, mark_beat
from ml.core.progress import say, warn
from ml.core.store import Json, Store

Arrays = list[NDArray[np.generic]]

_SECONDS_BETWEEN_HEARTBEATS = 15.0
_SECONDS_UNTIL_DEAD = 60.0
_SECONDS_BETWEEN_SAVES = 2.0
_SECONDS_BETWEEN_CHECKS = 5.0
_SECONDS_BETWEEN_MESSAGES = 60.0
_SECONDS_UNTIL_ABANDONED = 30 * 24 * 3600.0

_JOBS_FOLDER = "jobs/training"


def wait_for_concurrent_training(store: Store, job: str) -> str | None:
    """Wait until no living process works on the training ``job``.

    When a worker dies, its container trains on. A retry on another host cannot see that container, only that its mark
    in the store changes.

    Returns:
        the version tag of the state that the last process left, for :class:`Checkpoint`; None if there is none.
    """
    last_message = float("-inf")
    watch = OwnerWatch(store, _state_key(job), _SECONDS_UNTIL_DEAD)
    while True:
        state, tag, is_free = watch.look()
        if is_free:
            return tag
        if state and time.monotonic() - last_message >= _SECONDS_BETWEEN_MESSAGES:
            run = f"MLflow run {state['run_id']}{_describe_progress(state)}" if state["run_id"] else "not begun"
            say(
                f"another process trains the same already, or died a moment ago ({run}); waiting for its end, or until "
                f"it has given no heartbeat for {_SECONDS_UNTIL_DEAD:.0f} s"
            )
            last_message = time.monotonic()
        time.sleep(_SECONDS_BETWEEN_CHECKS)


def remove_abandoned(store: Store) -> None:
    """Remove the checkpoints of trainings that nobody has resumed for 30 days, by the store's own clock."""
    for job in store.keys(_JOBS_FOLDER):
        folder = f"{_JOBS_FOLDER}/{job}"
        age = store.age(_state_key(job))
        if age is not None and age > _SECONDS_UNTIL_ABANDONED:
            try:
                state, _ = store.read(_state_key(job))
            except StoreError:  # it is damaged, or of an earlier release, and nobody resumes it
                state = None
            say(f"removing {store.uri(folder)}, a training that nobody resumed{_describe_progress(state or {})}")
            for name in store.keys(folder):
                store.remove(f"{folder}/{name}")


def _state_key(job: str) -> str:
    return f"{_JOBS_FOLDER}/{job}/state.json"


def _describe_progress(state: Json) -> str:
    """Returns the progress in words, such as `` (2 parts finished, fold 3 after epoch 4)``, or an empty string."""
    # By get: a checkpoint that an older version of this package left must still be removed.
    progress = [f"{n} parts finished"] if (n := len(state.get("finished", {}))) else []
    if current := state.get("current"):
        progress.append(f"{current['part']} after epoch {current['epoch']}")
    return f" ({', '.join(progress)})" if progress else ""


def _copy_history(history: dict[str, list[float]]) -> dict[str, list[float]]:
    return {name: list(values) for name, values in history.items()}


class SavedPart(NamedTuple):
    """The saved state of one part of a training, such as a fold."""

    epoch: int
    """Epochs that are done."""
    history: dict[str, list[float]]
    """Metric -> its value after each of these epochs."""
    arrays: Arrays
    """The caller's own arrays, in the order in which they were saved."""


class Checkpoint:
    """The checkpoint of one training. Making one takes the training over from the process that left it.

    Args:
        store: the store that holds the checkpoint.
        job: digest of everything that the training's result depends on.
        left: the tag of a dead process's state, as :func:`wait_for_concurrent_training` returns it. Without it, only a
            training that no process has, or that its process has released, is taken over.

    Raises:
        TryAgain: another process works on this training.
    """

    def __init__(self, store: Store, job: str, left: str | None = None) -> None:
        self._store = store
        self._folder = f"{_JOBS_FOLDER}/{job}"
        self._key = _state_key(job)
        self._lock = threading.Lock()
        self._last_save = time.monotonic()
        previous, tag = store.read(self._key)
        if previous and not is_released(previous) and tag != left:
            raise TryAgain(
                f"{store.uri(self._key)}: this is being trained already, in MLflow run "
                f"{previous['run_id'] or '(not begun)'}; if that process is dead, try again in a minute"
            )
        fresh: Json = {"run_id": None, "current": None, "finished": {}}
        # Processes of earlier releases remove what was not touched for long.
        self._state: Json = {**(previous or fresh), "owner": uuid.uuid4().hex, "touched": time.time()}
        store.compare_and_set(self._key, mark_beat(self._state), tag)

    @property
    def run_id(self) -> str | None:
        """The id of the MLflow run, or None before :meth:`record_run`."""
        run_id: str | None = self._state["run_id"]
        return run_id

    def read_finished(self, part: str) -> "SavedPart | None":
        """Returns the result of a part of the training, or None if that part did not finish.

        Raises:
            StoreError: its arrays were removed or damaged.
        """
        kept = self._state["finished"].get(part)
        return SavedPart(kept["epoch"], kept["history"], self._load(kept["arrays"])) if kept else None

    def read_unfinished(self, part: str) -> "SavedPart":
        """Returns the last saved state of a part: epoch 0 and no arrays unless this part was the one in progress.

        Raises:
            StoreError: its arrays were removed or damaged.
        """
        kept = self._state["current"]
        if not kept or kept["part"] != part:
            return SavedPart(0, {}, [])
        return SavedPart(kept["epoch"], _copy_history(kept["history"]), self._load(kept["arrays"]))

    @property
    def progress(self) -> str:
        """How far the training is, in words; empty before anything was saved."""
        return _describe_progress(self._state)

    def _load(self, key: str) -> Arrays:
        try:
            with np.load(io.BytesIO(self._store.path(key).read_bytes())) as arrays:
                return [arrays[name] for name in sorted(arrays.files)]
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise StoreError(
                f"{self._store.uri(key)} cannot be read ({type(error).__name__}); remove "
                f"{self._store.uri(self._folder)} to train from the start"
            ) from None

    def record_run(self, run_id: str) -> None:
        """Record the id of the MLflow run.

        Raises:
            Conflict: another process has taken the training over.
        """
        with self._lock:
            self._state["run_id"] = run_id
            self._write()

    def is_due(self) -> bool:
        """Whether it is time to save again. An epoch may take milliseconds, so not each of them is saved."""
        return time.monotonic() - self._last_save >= _SECONDS_BETWEEN_SAVES

    def save(self, part: str, epoch: int, history: dict[str, list[float]], arrays: Arrays) -> None:
        """Save a part's state after ``epoch`` epochs. Killed at any point, this leaves the former state or this one.

        Raises:
            Conflict: another process has taken the training over.
        """
        self._put_part(part, epoch, history, arrays, last=False)

    def finish(self, part: str, history: dict[str, list[float]], arrays: Arrays) -> None:
        """Save the result of a part, which will then not be trained again.

        Raises:
            Conflict: another process has taken the training over.
        """
        self._put_part(part, max(map(len, history.values()), default=0), history, arrays, last=True)

    def _put_part(self, part: str, epoch: int, history: dict[str, list[float]], arrays: Arrays, *, last: bool) -> None:
        key = f"{self._folder}/{uuid.uuid4().hex}.npz"
        before = self._state["current"]
        with self._store.staging() as folder:
            file = folder / "arrays.npz"
            np.savez(file, **{f"{i:04d}": array for i, array in enumerate(arrays)})  # type: ignore[arg-type]
            self._store.put_file(key, file)
        with self._lock:
            # A copy: heartbeats write the state as well, while the caller adds the next epoch to its history.
            kept = {"part": part, "epoch": epoch, "history": _copy_history(history), "arrays": key}
            if last:
                self._state["finished"][part] = kept
            self._state |= {"current": None if last else kept, "touched": time.time()}
            self._write()
        if before:
            self._store.remove(before["arrays"])
        self._last_save = time.monotonic()

    @contextmanager
    def alive(self) -> Iterator[None]:
        """Write heartbeats within the block. If an error ends it, another process can resume the training at once."""
        stop = threading.Event()

        def write_heartbeats() -> None:
            while not stop.wait(_SECONDS_BETWEEN_HEARTBEATS):
                try:
                    with self._lock:
                        self._write()
                except Conflict:  # the next save will raise it
                    return
                except Exception as error:  # the next heartbeat may reach the store
                    warn(f"this training cannot write its heartbeat to the store, and tries again: {error}")

        thread = threading.Thread(target=write_heartbeats, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            # If this fails, the next process waits for a minute. What ended the block matters more.
            with self._lock, suppress(Exception):
                self._write(released=True)

    def forget(self) -> None:
        """Remove the checkpoint of a training that is done. The next training of the same job starts from nothing.

        Raises:
            Conflict: another process has taken the training over.
        """
        with self._lock:
            self._read_own_tag()
            files = self._store.keys(self._folder)  # listed before another process can start and save its own
            self._store.remove(self._key)
        for name in files:
            self._store.remove(f"{self._folder}/{name}")

    def _write(self, *, released: bool = False) -> None:
        state = mark_beat(self._state, released=released)
        try:
            self._store.compare_and_set(self._key, state, self._read_own_tag())
        except Conflict:  # a client that lost the answer writes again and then finds its own first write
            self._store.compare_and_set(self._key, state, self._read_own_tag())

    def _read_own_tag(self) -> str | None:
        state, tag = self._store.read(self._key)
        if not state or state["owner"] != self._state["owner"]:
            raise Conflict("another process has taken this training over, as this one gave no heartbeat for a minute")
        return tag
