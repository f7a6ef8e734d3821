"""Our error for a process that may have no more memory or no more threads."""

import errno
import re

from ml.core.errors import TryAgain
from ml.core.messages import cut_text

_WORDS = re.compile(r"can't start new thread|cannot allocate memory|failed to map segment", re.IGNORECASE)
"""What Python and the loader of libraries say. An ImportError quotes the loader, whatever error it came from."""


def explain_shortage(error: BaseException) -> TryAgain | None:
    """Returns our error where memory or threads ran out, also as the cause of another error; None for any other."""
    cause: BaseException | None = error
    while cause is not None:
        is_refused = isinstance(cause, OSError) and cause.errno in {errno.ENOMEM, errno.EAGAIN}
        if is_refused or isinstance(cause, MemoryError) or _WORDS.search(str(cause)):
            return describe_shortage(cut_text(cause) or type(cause).__name__)
        cause = cause.__cause__
    return None


def describe_shortage(said: str) -> TryAgain:
    """Returns the error, given what was said about it."""
    return TryAgain(
        f"memory or threads ran out ({said}); use fewer processes, such as BREAKHIS_WORKERS=1, free memory, or raise "
        "the limit on it ('ulimit -v', 'ulimit -u', or the container's)"
    )
