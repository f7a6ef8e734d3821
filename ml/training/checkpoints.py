"""What a training has come to, kept in the store, so that a process that is killed need not begin again.

Under jobs/training/<job>/ lie ``state.json``, which moves by compare-and-set, and the arrays it names. The state also
says who is at it and when that process last gave a sign of life: of two that train the same, the second is sent away.
"""

import io
import threading
import time
import uuid
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple, TypeGuard

import numpy as np
from numpy.typing import NDArray

from ml.core.errors import Conflict, StoreError, TryAgain
from ml.core.progress import say
from ml.core.store import Json, Store

Arrays = list[NDArray[np.generic]]

_SECONDS_BETWEEN_BEATS = 15.0
_SECONDS_UNTIL_DEAD = 60.0
_SECONDS_BETWEEN_SAVES = 2.0
_SECONDS_BETWEEN_LOOKS = 5.0
_SECONDS_BETWEEN_WORDS = 60.0
_SECONDS_UNTIL_GIVEN_UP = 30 * 24 * 3600.0

_FOLDER = "jobs/training"


def wait_for_concurrent_training(store: Store, job: str) -> None:
    """Wait until no living process is at a training.

    Where a worker dies, its container trains on; a retry on another host cannot see that container, only this.
    """
    said = float("-inf")
    while True:
        state, _ = store.read(f"{_FOLDER}/{job}/state.json")
        if not _lives(state):
            return
        if time.monotonic() - said >= _SECONDS_BETWEEN_WORDS:
            run = f"MLflow run {state['run_id']}{_reached(state)}" if state["run_id"] else "not begun"
            say(f"this is being trained by another process already ({run}); waiting for its end")
            said = time.monotonic()
        time.sleep(_SECONDS_BETWEEN_LOOKS)


def _lives(state: Json | None) -> TypeGuard[Json]:
    """Whether a process is at the training with this state."""
    return state is not None and time.time() - state["beat"] < _SECONDS_UNTIL_DEAD


def remove_abandoned(store: Store) -> None:
    """Remove the checkpoints of trainings that nobody has taken up again for 30 days."""
    for job in store.keys(_FOLDER):
        folder = f"{_FOLDER}/{job}"
        state, _ = store.read(f"{folder}/state.json")
        if state and time.time() - max(state["beat"], state["touched"]) > _SECONDS_UNTIL_GIVEN_UP:
            say(f"removing {store.uri(folder)}, a training given up{_reached(state)}")
            for name in store.keys(folder):
                store.remove(f"{folder}/{name}")


def _reached(state: Json) -> str:
    # By get: what an older version of this package left is still to be swept away.
    told = [f"{n} parts finished"] if (n := len(state.get("finished", {}))) else []
    if current := state.get("current"):
        told.append(f"{current['part']} after epoch {current['epoch']}")
    return f" ({', '.join(told)})" if told else ""


def _copy(history: dict[str, list[float]]) -> dict[str, list[float]]:
    return {name: list(values) for name, values in history.items()}


class SavedPart(NamedTuple):
    """What was kept of one part of a training, such as a fold."""

    epoch: int
    """Epochs done."""
    history: dict[str, list[float]]
    """Metrics of these epochs."""
    arrays: Arrays


class Checkpoint:
    """The checkpoint of one training, taken over from whoever was at it before.

    Args:
        store: where it lies.
        job: identifies the training by all that its result depends on.

    Raises:
        TryAgain: a process that still lives is at it.
    """

    def __init__(self, store: Store, job: str) -> None:
        self._store = store
        self._folder = f"{_FOLDER}/{job}"
        self._key = f"{self._folder}/state.json"
        self._lock = threading.Lock()
        self._saved = time.monotonic()
        left, tag = store.read(self._key)
        if _lives(left):
            raise TryAgain(
                f"this is being trained already, in MLflow run {left['run_id'] or '(not begun)'}; if that process is "
                f"dead, it counts as such in a minute"
            )
        fresh: Json = {"run_id": None, "current": None, "finished": {}}
        self._state: Json = {**(left or fresh), "owner": uuid.uuid4().hex, "touched": time.time()}
        self._state["beat"] = self._state["touched"]
        store.compare_and_set(self._key, self._state, tag)

    @property
    def run_id(self) -> str | None:
        """The MLflow run, once there is one."""
        found: str | None = self._state["run_id"]
        return found

    def finished(self, part: str) -> "SavedPart | None":
        """What a part of the training came to, or None if it was not brought to its end.

        Raises:
            StoreError: it was removed or damaged.
        """
        found = self._state["finished"].get(part)
        return SavedPart(found["epoch"], found["history"], self._load(found["arrays"])) if found else None

    def unfinished(self, part: str) -> "SavedPart":
        """What was saved last of a part: nothing, if another part was at work or none.

        Raises:
            StoreError: it was removed or damaged.
        """
        found = self._state["current"]
        if not found or found["part"] != part:
            return SavedPart(0, {}, [])
        return SavedPart(found["epoch"], _copy(found["history"]), self._load(found["arrays"]))

    @property
    def reached(self) -> str:
        """Where the training is, in words; empty before anything was kept."""
        return _reached(self._state)

    def _load(self, key: str) -> Arrays:
        try:
            with np.load(io.BytesIO(self._store.path(key).read_bytes())) as kept:
                return [kept[name] for name in sorted(kept.files)]
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise StoreError(
                f"{self._store.uri(key)} cannot be read ({type(error).__name__}); remove "
                f"{self._store.uri(self._folder)} to train from the start"
            ) from None

    def begin(self, run_id: str) -> None:
        """Note the MLflow run.

        Raises:
            Conflict: another process took the training over.
        """
        with self._lock:
            self._state["run_id"] = run_id
            self._write(time.time())

    def due(self) -> bool:
        """Whether it is time to save: not after each epoch, which may take milliseconds."""
        return time.monotonic() - self._saved >= _SECONDS_BETWEEN_SAVES

    def save(self, part: str, epoch: int, history: dict[str, list[float]], arrays: Arrays) -> None:
        """Keep what a part reached after ``epoch`` epochs. Killed at any point, this leaves the one before or this one.

        Raises:
            Conflict: another process took the training over.
        """
        self._keep(part, epoch, history, arrays, last=False)

    def finish(self, part: str, history: dict[str, list[float]], arrays: Arrays) -> None:
        """Keep what a part came to; it will not be done again.

        Raises:
            Conflict: another process took the training over.
        """
        self._keep(part, max(map(len, history.values()), default=0), history, arrays, last=True)

    def _keep(self, part: str, epoch: int, history: dict[str, list[float]], arrays: Arrays, *, last: bool) -> None:
        key = f"{self._folder}/{uuid.uuid4().hex}.npz"
        before = self._state["current"]
        with self._store.staging() as folder:
            file = folder / "arrays.npz"
            np.savez(file, **{f"{i:04d}": array for i, array in enumerate(arrays)})  # type: ignore[arg-type]
            self._store.put_file(key, file)
        with self._lock:
            # A copy: signs of life write it too, while the caller is at the next epoch.
            kept = {"part": part, "epoch": epoch, "history": _copy(history), "arrays": key}
            if last:
                self._state["finished"][part] = kept
            self._state |= {"current": None if last else kept, "touched": time.time()}
            self._write(time.time())
        if before:
            self._store.remove(before["arrays"])
        self._saved = time.monotonic()

    @contextmanager
    def alive(self) -> Iterator[None]:
        """Give signs of life within the block. Left by an error, what was reached is kept for another to take over."""
        stop = threading.Event()

        def beat() -> None:
            while not stop.wait(_SECONDS_BETWEEN_BEATS):
                try:
                    with self._lock:
                        self._write(time.time())
                except Conflict:  # the next save will say so
                    return
                except Exception as error:  # the next one may reach the store
                    say(f"the store takes no sign of life of this training: {error}")

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            # Where this fails the next one waits for a minute; what ended the block matters more.
            with self._lock, suppress(Exception):
                self._write(0.0)

    def forget(self) -> None:
        """Remove it: the training is done, and doing it again is meant.

        Raises:
            Conflict: another process took the training over.
        """
        with self._lock:
            self._tag_if_ours()
            files = self._store.keys(self._folder)  # before another can begin and save its own
            self._store.remove(self._key)
        for name in files:
            self._store.remove(f"{self._folder}/{name}")

    def _write(self, beat: float) -> None:
        state = {**self._state, "beat": beat}
        try:
            self._store.compare_and_set(self._key, state, self._tag_if_ours())
        except Conflict:  # a client whose answer was lost writes again, and then finds what it wrote first
            self._store.compare_and_set(self._key, state, self._tag_if_ours())

    def _tag_if_ours(self) -> str | None:
        found, tag = self._store.read(self._key)
        if not found or found["owner"] != self._state["owner"]:
            raise Conflict("another process has taken this training over, as this one gave no sign of life")
        return tag
