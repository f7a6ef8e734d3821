"""What a training has come to, kept in the store, so that a process that is killed need not begin again.

Under jobs/training/<job>/ lie ``state.json``, which moves by compare-and-set, and the arrays it names. The state also
says who is at it and when that process last gave a sign of life: of two that train the same, the second is sent away.
"""

import io
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from ml.errors import Conflict, TryAgain
from ml.store import Json, Store

Arrays = list[NDArray[np.generic]]

_SECONDS_BETWEEN_BEATS = 15.0
_SECONDS_UNTIL_DEAD = 60.0
_SECONDS_BETWEEN_SAVES = 2.0


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
        self._folder = f"jobs/training/{job}"
        self._lock = threading.Lock()
        self._saved = time.monotonic()
        left, self._tag = store.read(self._state_key)
        if left and time.time() - left["beat"] < _SECONDS_UNTIL_DEAD:
            raise TryAgain(
                f"this is being trained already, in MLflow run {left['run_id'] or '(not begun)'}; if that process is "
                f"dead, it counts as such in a minute"
            )
        fresh: Json = {"run_id": None, "epoch": 0, "history": {}, "arrays": None}
        self._state: Json = {**(left or fresh), "owner": uuid.uuid4().hex}
        self._write()

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
        """What was saved after the last of these epochs; [] if none was."""
        if not self._state["arrays"]:
            return []
        with np.load(io.BytesIO(self._store.path(self._state["arrays"]).read_bytes())) as kept:
            return [kept[name] for name in sorted(kept.files)]

    def begin(self, run_id: str) -> None:
        """Note the MLflow run."""
        with self._lock:
            self._state["run_id"] = run_id
            self._write()

    def due(self) -> bool:
        """Whether it is time to save: not after each epoch, which may take milliseconds."""
        return time.monotonic() - self._saved >= _SECONDS_BETWEEN_SAVES

    def save(self, epoch: int, history: dict[str, list[float]], arrays: Arrays) -> None:
        """Keep what was reached after ``epoch`` epochs. Killed at any point, this leaves the one before or this one."""
        key, before = f"{self._folder}/{epoch}-{self._state['owner']}.npz", self._state["arrays"]
        with self._store.staging() as folder:
            file = folder / "arrays.npz"
            np.savez(file, **{f"{i:04d}": array for i, array in enumerate(arrays)})  # type: ignore[arg-type]
            self._store.put_file(key, file)
        with self._lock:
            self._state |= {"epoch": epoch, "history": history, "arrays": key}
            self._write()
        if before:
            self._store.remove(before)
        self._saved = time.monotonic()

    @contextmanager
    def alive(self) -> Iterator[None]:
        """Give signs of life within the block. Left by an error, what was reached is kept for another to take over."""
        stop = threading.Event()

        def beat() -> None:
            while not stop.wait(_SECONDS_BETWEEN_BEATS):
                with self._lock:
                    try:
                        self._write()
                    except Conflict:  # somebody took us for dead; the next save will say so
                        return

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            with self._lock:
                self._write(beat=0.0)

    def forget(self) -> None:
        """Remove it: the training is done, and doing it again is meant."""
        self._store.remove(self._state_key)
        if self._state["arrays"]:
            self._store.remove(self._state["arrays"])

    @property
    def _state_key(self) -> str:
        return f"{self._folder}/state.json"

    def _write(self, beat: float | None = None) -> None:
        self._state["beat"] = time.time() if beat is None else beat
        self._store.compare_and_set(self._state_key, self._state, self._tag)
        _, self._tag = self._store.read(self._state_key)
