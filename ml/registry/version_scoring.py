"""Runs a logged model in a process of its own, isolated, that has imported nothing of this package.

There are two reasons. A model is code that somebody has logged, and the process that decides about models holds
passwords and the key of the audit log, so it never runs that code itself. And a model brings along the package that it
was logged with: where ``ml`` is imported already, Python would run the model with this release's code in place of its
own, without a warning.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Self, TypeVar

from ml.core.errors import RegistryError, TryAgain
from ml.core.messages import cut_text, hide_access
from ml.core.mlflow_client import fetch_artifacts
from ml.core.progress import warn
from ml.core.store import Json
from ml.registry.sandbox import (
    ISOLATION_TEXTS,
    WEAK_ISOLATION,
    find_isolation,
    isolate_command,
    make_environment,
    share_with_user,
)

if TYPE_CHECKING:
    import pandas as pd

T = TypeVar("T")

_FOLDER = Path(__file__).parent

MAX_PICTURES, MAX_BYTES = 8, 64 * 2**20
"""Limits of a batch: its number of pictures, and the size in bytes beyond which it takes no further picture.

EfficientNetB0, called layer by layer as logged models do, takes 1.7 GB for 8 pictures and 3.9 GB for 32. Several tasks
share a worker's memory.
"""


class ScoringProcess:
    """A process of its own, isolated, that is sent pictures and answers with rows. Use it as a context manager.

    Args:
        given: the folder or file that it works with.
        name: of the model, for error messages.

    Raises:
        RegistryError: the model cannot be loaded, or its process has ended.
    """

    _worker: Path
    """The program, which reads pictures and writes rows as ``model_worker.py`` describes it."""

    def __init__(self, given: Path, name: str) -> None:
        self._given = given
        self._name = name

    def __enter__(self) -> Self:
        isolation = find_isolation()
        with ExitStack() as stack:
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="breakhis-")))
            self._log: IO[str] = stack.enter_context((scratch / "log").open("w+", encoding="utf-8"))
            given = share_with_user(isolation, self._given.resolve(), scratch)
            reading, writing = os.pipe()
            self._answers = stack.enter_context(os.fdopen(reading, encoding="utf-8"))
            try:
                # -P keeps the worker's folder off the path: it has modules that are named like libraries.
                command = [sys.executable, "-P", str(self._worker), str(given), str(writing)]
                self._process = subprocess.Popen(
                    isolate_command(isolation, command, readable=[given], scratch=scratch),
                    cwd=scratch,
                    env=make_environment(scratch) | self._make_settings(scratch),
                    stdin=subprocess.PIPE,
                    stdout=self._log,
                    stderr=subprocess.STDOUT,
                    pass_fds=(writing,),
                )
            finally:
                os.close(writing)
            stack.callback(self._stop)
            if not self._answers.readline():
                raise RegistryError(f"{self._name} cannot be loaded: {self._read_last_line()}")
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _make_settings(self, scratch: Path) -> dict[str, str]:
        """Returns further environment variables of the process."""
        raise NotImplementedError

    def predict(self, pictures: Sequence[bytes]) -> list[Json]:
        """Classify encoded pictures.

        Returns:
            A row a picture, as the worker makes it, or ``{error}`` for a picture that the model refuses.
        """
        stdin = self._process.stdin
        assert stdin
        try:
            stdin.write(json.dumps([len(picture) for picture in pictures]).encode() + b"\n")
            for picture in pictures:
                stdin.write(picture)
            stdin.flush()
            rows = json.loads(self._answers.readline())
        except (OSError, ValueError):
            raise RegistryError(f"{self._name} ended while it classified pictures: {self._read_last_line()}") from None
        if not isinstance(rows, list) or len(rows) != len(pictures) or not all(isinstance(row, dict) for row in rows):
            raise RegistryError(f"{self._name} does not answer with one row for each picture")
        return rows

    def _read_last_line(self) -> str:
        """Returns the last line of the process's log, once the process has ended."""
        status = self._process.wait()
        self._log.seek(0)
        lines = self._log.read().strip().splitlines()
        return lines[-1] if lines else f"its process ended with status {status}"

    def _stop(self) -> None:
        self._process.kill()
        if self._process.stdin:
            with suppress(OSError):  # the rest of the input has no reader
                self._process.stdin.close()
        self._process.wait()


class ModelProcess(ScoringProcess):
    """A logged model, given by its folder, with the code that it was logged with.

    A row has the columns of :class:`ml.registry.pyfunc.ImageClassifier`.
    """

    _worker = _FOLDER / "model_worker.py"

    def __enter__(self) -> Self:
        if (isolation := find_isolation()) in WEAK_ISOLATION:
            warn(f"{self._name}: its logged code runs {ISOLATION_TEXTS[isolation]}")
        return super().__enter__()

    def _make_settings(self, scratch: Path) -> dict[str, str]:
        return {"MLFLOW_TRACKING_URI": f"sqlite:///{scratch}/none.db"}


class NetworkProcess(ScoringProcess):
    """A trained network, given by its file ``network.keras``, with this release's code and on the CPU.

    A row has ``probabilities``, the network's outputs. The file has to be checked before, by
    :func:`ml.registry.network_archive.check_network_archive`.
    """

    _worker = _FOLDER / "network_worker.py"

    def _make_settings(self, scratch: Path) -> dict[str, str]:  # noqa: ARG002
        return {"CUDA_VISIBLE_DEVICES": "-1"}


def classify_pictures(model: str, number: int, pictures: Iterable[bytes]) -> "pd.DataFrame":
    """Classify encoded pictures with a model version.

    Returns:
        A row a picture, with the columns of :class:`ml.registry.pyfunc.ImageClassifier`.

    Raises:
        TryAgain: the version's files cannot be read.
        RegistryError: the version cannot classify the pictures.
    """
    import pandas as pd
    from mlflow.exceptions import MlflowException

    name = f"{model} version {number}"
    with tempfile.TemporaryDirectory(prefix="breakhis-") as scratch:
        try:
            folder = fetch_artifacts(f"models:/{model}/{number}", Path(scratch))
        except (MlflowException, OSError) as error:
            raise TryAgain(f"{name}: its files cannot be read: {cut_text(hide_access(error))}") from None
        rows: list[Json] = []
        try:
            with ModelProcess(folder, name) as process:
                for batch in batches(pictures, len):
                    rows += process.predict(batch)
        except RegistryError as error:
            raise RegistryError(f"{name} cannot classify the test images that came after it: {error}") from None
    refused = next((row["error"] for row in rows if "error" in row), None)
    if refused is not None:
        raise RegistryError(f"{name} cannot classify the test images that came after it: {refused}")
    return pd.DataFrame(rows)


def batches(items: Iterable[T], size_of: Callable[[T], int]) -> Iterator[list[T]]:
    """Yields items in batches that fit into memory; ``size_of`` says how many bytes one takes."""
    batch: list[T] = []
    for item in items:
        batch.append(item)
        if len(batch) == MAX_PICTURES or sum(map(size_of, batch)) > MAX_BYTES:
            yield batch
            batch = []
    if batch:
        yield batch
