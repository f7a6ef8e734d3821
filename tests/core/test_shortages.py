import errno
import os

import pytest

from ml.core.shortages import explain_shortage


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("can't start new thread"),
        OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
        BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN)),
        ImportError("numpy: libopenblas.so: failed to map segment from shared object"),
    ],
)
def test_what_a_lack_of_memory_or_threads_is_called(error: Exception) -> None:
    outer = ValueError("no picture")
    outer.__cause__ = error
    for raised in (error, outer):
        explained = explain_shortage(raised)
        assert explained
        assert explained.exit_code == 75
        for words in ("memory or threads ran out", "BREAKHIS_WORKERS=1", "ulimit"):
            assert words in str(explained)


def test_other_errors_are_not_about_memory() -> None:
    for error in (RuntimeError("no such thing"), FileNotFoundError(errno.ENOENT, "x"), ImportError("no module")):
        assert explain_shortage(error) is None
