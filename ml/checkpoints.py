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
from typing import TypeGuard

import numpy as np
from numpy.typing import NDArray

from ml.errors import Conflict, StoreError, TryAgain
from ml.progress import say
from ml.store import Json, Store

Arrays = list[NDArray[np.generic]]

_SECONDS_BETWEEN_BEATS = 15.0
_SECONDS_UNTIL_DEAD = 60.0
_SECONDS_BETWEEN_SAVES = 2.0
_SECONDS_BETWEEN_LOOKS = 5.0
_SECONDS_BETWEEN_WORDS = 60.0
_SECONDS_UNTIL_GIVEN_UP = 30 * 24 * 3600.0

_FOLDER = "jobs/training"


def wait_for_others(store: Store, job: str) -> None:
    """Wait until no living process is at a training.

    Where a worker dies, its container trains on; a retry on another host cannot see that container, only this.
    """
    said = float("-inf")
    while True:
        state, _ = store.read(f"{_FOLDER}/{job}/state.json")
        if not _lives(state):
            return
        if time.monotonic() - said >= _SECONDS_BETWEEN_WORDS:
            run = f"MLflow run {state['run_id']}, after epoch {state['epoch']}" if state["run_id"] else "not begun"
            say(f"this is being trained by another process already ({run}); waiting for its end")
            said = time.monotonic()
        time.sleep(_SECONDS_BETWEEN_LOOKS)


def _lives(state: Json | None) -> TypeGuard[Json]:
    """Whether a process is at the training with this state."""
    return state is not None and time.time() - state["beat"] < _SECONDS_UNTIL_DEAD


def sweep(store: Store) -> None:
    """Remove the checkpoints of trainings that nobody has taken up again for 30 days."""
    for job in store.keys(_FOLDER):
        folder = f"{_FOLDER}/{job}"
        state, _ = store.read(f"{folder}/state.json")
        if state and time.time() - max(state["beat"], state["touched"]) > _SECONDS_UNTIL_GIVEN_UP:
            say(f"removing {store.uri(folder)}, a training given up after epoch {state['epoch']}")
            for name in store.keys(folder):
                store.remove(f"{folder}/{name}")


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
        fresh: Json = {"run_id": None, "epoch": 0, "history": {}, "arrays": None}
        self._state: Json = {**(left or fresh), "owner": uuid.uuid4().hex, "touched": time.time()}
        self._state["beat"] = self._state["touched"]
        store.compare_and_set(self._key, self._state, tag)

    @property
    def run_id(self) -> str | None:
        """The MLflow run, once there is one."""
        found: str | None = self._state["run_id"]
        return found

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return int(self._state["epoch"])

    @property
    def history(self) -> dict[str, list[float]]:
        """Metrics of the epochs done."""
        return {name: list(values) for name, values in self._state["history"].items()}

    def arrays(self) -> Arrays:
        """What was saved after the last of these epochs; [] if none was.

        Raises:
            StoreError: it was removed or damaged.
        """
        key = self._state["arrays"]
        if not key:
            return []
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

    def save(self, epoch: int, history: dict[str, list[float]], arrays: Arrays) -> None:
        """Keep what was reached after ``epoch`` epochs. Killed at any point, this leaves the one before or this one.

        Raises:
            Conflict: another process took the training over.
        """
        key, before = f"{self._folder}/{epoch}-{self._state['owner']}.npz", self._state["arrays"]
        with self._store.staging() as folder:
            file = folder / "arrays.npz"
            np.savez(file, **{f"{i:04d}": array for i, array in enumerate(arrays)})  # type: ignore[arg-type]
            self._store.put_file(key, file)
        with self._lock:
            # A copy: signs of life write it too, while the caller is at the next epoch.
            kept = {name: list(values) for name, values in history.items()}
            self._state |= {"epoch": epoch, "history": kept, "arrays": key, "touched": time.time()}
            self._write(time.time())
        if before and before != key:
            self._store.remove(before)
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
