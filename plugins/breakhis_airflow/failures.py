"""What Airflow makes of our errors where a task runs our code itself, in the worker, and not as a stage."""

from collections.abc import Iterator
from contextlib import contextmanager

from airflow.sdk.exceptions import AirflowException, AirflowFailException

from ml.core.disks import explain_os_error
from ml.core.errors import EXIT_BAD_INPUT, EXIT_REFUSED, BreakhisError

_EXIT_USAGE = 2

FINAL_STATUSES = frozenset({_EXIT_USAGE, EXIT_BAD_INPUT, EXIT_REFUSED})
"""Exit statuses after which a retry cannot help."""


@contextmanager
def explained_failures(what: str) -> Iterator[None]:
    """Fails the task with our own words where the worker itself, not a stage, met an error of ours or of a disk.

    Args:
        what: what the worker was about, which the message begins with.

    Raises:
        AirflowFailException: a retry cannot help, as with a store that is damaged or a disk that is full or forbidden.
        AirflowException: what is in the way may pass.
    """
    try:
        yield
    except (BreakhisError, OSError) as error:
        cause = error if isinstance(error, BreakhisError) else explain_os_error(error)
        if cause is None:
            raise
        is_final = cause.exit_code in FINAL_STATUSES
        raise (AirflowFailException if is_final else AirflowException)(f"{what}, on the worker: {cause}") from error
