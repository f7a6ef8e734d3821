"""Every error that this package raises on purpose, and the exit status of the command line for each.

An error names the file, row or setting at fault and says what to do next. The exit status tells a scheduler whether
a retry can help: 3 and 4 remain until somebody acts, 75 (EX_TEMPFAIL in sysexits.h) may pass by itself.
"""

from ml.core.messages import cut_message

EXIT_BAD_INPUT = 3
EXIT_REFUSED = 4
EXIT_TRY_AGAIN = 75


class BreakhisError(Exception):
    """The user's input is wrong; the message says what is wrong and how to correct it. Exit status 3."""

    exit_code = EXIT_BAD_INPUT

    def __str__(self) -> str:
        return cut_message(super().__str__())


class ConfigError(BreakhisError):
    """A YAML file or a setting is missing or invalid."""


class SourceError(BreakhisError):
    """A data source cannot be read as it was declared."""


class CredentialsError(SourceError):
    """A source or a service refused access, or no credentials were given."""


class ImageError(BreakhisError):
    """A file is not an image that this system can use; ``reason`` is a keyword, ``detail`` says more."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)  # the constructor's own arguments, so that the error can be pickled
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return cut_message(f"{self.reason}: {self.detail}")


class StoreError(BreakhisError):
    """The store does not have an id, or its content is damaged."""


class WeightsError(BreakhisError):
    """Backbone weights are not available or do not fit the network."""


class DeviceError(BreakhisError):
    """This machine cannot do the computation, for example because it lacks memory."""


class NoGpuError(DeviceError):
    """A GPU is required and TensorFlow sees none."""


class DataError(BreakhisError):
    """A dataset cannot be split or trained on as it is."""


class RegistryError(BreakhisError):
    """A run, model or version is missing in MLflow or is not of the expected kind."""


class RunGone(RegistryError):
    """MLflow has no such run, or no longer."""


class AirflowError(BreakhisError):
    """Airflow has no such DAG, run or answer, or rejected the request; ``status`` is its HTTP status."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class StackError(BreakhisError):
    """The local Airflow or MLflow did not start, or a run in it failed."""


class Refused(BreakhisError):
    """The request is valid but refused: validation or gates failed, or a promotion lacks approval. Exit status 4."""

    exit_code = EXIT_REFUSED


class TryAgain(BreakhisError):
    """A network, a server or another writer interfered; the same call may succeed later. Exit status 75."""

    exit_code = EXIT_TRY_AGAIN


class Conflict(TryAgain):
    """Another writer changed the same key in between (a lost compare-and-set)."""
