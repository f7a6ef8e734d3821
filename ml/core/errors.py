"""Every error this package raises on purpose, and the exit status the command line gives it.

An error names the file, row or setting at fault and says what to do next. The exit status tells a scheduler whether
trying again can help: 3 and 4 never get better by themselves, 75 (EX_TEMPFAIL in sysexits.h) may.
"""

EXIT_BAD_INPUT = 3
EXIT_REFUSED = 4
EXIT_TRY_AGAIN = 75


class BreakhisError(Exception):
    """Something the user gave is wrong; the message says what and how to mend it. Exit status 3."""

    exit_code = EXIT_BAD_INPUT


class ConfigError(BreakhisError):
    """A YAML file or a setting is missing or invalid."""


class SourceError(BreakhisError):
    """A data source cannot be read as it was declared."""


class CredentialsError(SourceError):
    """A source or a service refused us, or no credentials were given."""


class ImageError(BreakhisError):
    """A file is not a picture this system can use."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)  # the arguments as they came, so that it can pass between processes
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


class StoreError(BreakhisError):
    """An id is unknown to the store, or what lies there is damaged."""


class WeightsError(BreakhisError):
    """Backbone weights cannot be had or do not fit the network."""


class DeviceError(BreakhisError):
    """This machine cannot compute what was asked for, such as for want of memory."""


class NoGpuError(DeviceError):
    """A GPU was asked for and TensorFlow sees none."""


class DataError(BreakhisError):
    """A data set cannot be split or trained on as it is."""


class RegistryError(BreakhisError):
    """A run, model or version is missing in MLflow or not what it should be."""


class AirflowError(BreakhisError):
    """Airflow has no such DAG, run or answer, or would not do what was asked; ``status`` is its HTTP status."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class StackError(BreakhisError):
    """The local Airflow or MLflow did not start, or a run in it failed."""


class Refused(BreakhisError):
    """Understood and judged: validation or gates failed, or a promotion is not entitled. Exit status 4."""

    exit_code = EXIT_REFUSED


class TryAgain(BreakhisError):
    """A network, a server or another writer got in the way; the same call may succeed later. Exit status 75."""

    exit_code = EXIT_TRY_AGAIN


class Conflict(TryAgain):
    """Somebody else moved the same reference in between (a lost compare-and-set)."""
