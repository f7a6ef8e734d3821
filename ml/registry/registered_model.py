"""Registered models in MLflow: their versions, their aliases, and the anchor of the audit log that each one keeps."""

from typing import TYPE_CHECKING, NamedTuple

from ml.core.errors import ConfigError, DataError, Refused, RegistryError, RunGone
from ml.core.messages import cut_text, hide_access, quote_value
from ml.core.mlflow_client import connect, explain_absence, find_outage, require_answer
from ml.core.names import suggest_name
from ml.core.settings import Settings
from ml.data.training_sets import find_training_set, registered_model_names

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.entities.model_registry import RegisteredModel as MlflowModel
    from mlflow.tracking import MlflowClient

CANDIDATE, CHAMPION, PREVIOUS = "candidate", "champion", "previous"
"""Aliases of a registered model. ``champion`` is the version in use; ``previous`` is the one before, for a rollback."""

_ANCHOR_TAG = "breakhis.audit"


class Aliases(NamedTuple):
    """The version that each alias of a model points to."""

    champion: int | None = None
    previous: int | None = None
    candidate: int | None = None


class RegisteredModel:
    """One registered model, such as ``breakhis-binary``. It need not exist yet.

    Args:
        name: its name in the registry.
        settings: hold the address of MLflow.
    """

    def __init__(self, name: str, settings: Settings) -> None:
        self.name = name
        self.settings = settings
        self._client = connect(settings)

    def find_version(self, number: int | str) -> "ModelVersion":
        """Returns a version of the model.

        Raises:
            RegistryError: there is no such version.
        """
        from mlflow.exceptions import MlflowException

        try:
            version = self._client.get_model_version(self.name, str(number))
        except MlflowException as error:
            missing = f"no version {cut_text(number)} of a registered model {quote_value(self.name)} in MLflow"
            raise explain_absence(error, RegistryError(missing)) from None
        require_answer(version.name)
        return version

    def list_versions(self) -> "list[ModelVersion]":
        """Returns all versions of the model; none where it does not exist."""
        versions: list[ModelVersion] = []
        token = None
        while True:
            page = self._client.search_model_versions(f"name='{self.name}'", max_results=1000, page_token=token)
            versions += page
            token = page.token
            if not token:
                return versions

    def aliases(self) -> Aliases:
        """Returns the model's aliases as the registry has them."""
        return Aliases(*(self.alias(name) for name in Aliases._fields))

    def alias(self, name: str) -> int | None:
        """Returns the version that an alias points to, or None where the alias or the model does not exist."""
        from mlflow.exceptions import MlflowException

        try:
            number = str(self._client.get_model_version_by_alias(self.name, name).version)
        except MlflowException as error:
            # A missing alias is INVALID_PARAMETER_VALUE, a missing model RESOURCE_DOES_NOT_EXIST.
            if error.error_code in {"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST"}:
                return None
            raise find_outage(error) or error from None
        require_answer(number.isdecimal())
        return int(number)

    def set_candidate(self, number: int) -> None:
        """Make a version the candidate."""
        self._client.set_registered_model_alias(self.name, CANDIDATE, str(number))

    def move_aliases(self, wanted: Aliases, *, decided: int | None = None) -> None:
        """Move ``champion`` and ``previous`` to where they belong. Doing it twice changes nothing.

        Args:
            wanted: where the two belong.
            decided: the candidate that was decided about, which loses its alias; a newer candidate keeps it.
        """
        current = self.aliases()
        # The champion moves last: until then only the alias of the former champion has changed.
        for name in (PREVIOUS, CHAMPION):
            number = getattr(wanted, name)
            if number == getattr(current, name):
                continue
            if number is None:
                self._client.delete_registered_model_alias(self.name, name)
            else:
                self._client.set_registered_model_alias(self.name, name, str(number))
        if decided is not None and self.alias(CANDIDATE) == decided:
            self._client.delete_registered_model_alias(self.name, CANDIDATE)

    def delete(self) -> None:
        """Delete the model, if MLflow has it, with its versions and the rights to it that whoever made it was given.

        The models that runs logged stay. What is registered next under the name is its own.
        """
        from mlflow.exceptions import MlflowException

        try:
            self._client.delete_registered_model(self.name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise find_outage(error) or RegistryError(
                    f"{self.name} cannot be made anew: {cut_text(hide_access(error))}"
                ) from None

    def audit_anchor(self) -> str:
        """Returns the anchor of the model's last audit record that the registry keeps, or an empty string."""
        return _read_anchors(self._client).get(self.name, "")

    def set_audit_anchor(self, anchor: str) -> None:
        """Write the anchor of the model's last audit record to the registry, unless it has that or a later one.

        Args:
            anchor: ``<sequence>:<code>``, as :func:`ml.promotion.audit_log.format_anchor` makes it.

        Raises:
            Refused: what the registry has is no anchor.
        """
        current = self.audit_anchor().partition(":")[0]
        if current and not current.isdecimal():
            raise Refused(
                f"the registered model {self.name} has a tag {_ANCHOR_TAG} that breakhis did not write: "
                f"{quote_value(self.audit_anchor(), 80)}; look who changed it, and delete it in MLflow"
            )
        if current and int(current) >= int(anchor.partition(":")[0]):
            return
        self._client.set_registered_model_tag(self.name, _ANCHOR_TAG, anchor)


def audit_anchors(settings: Settings) -> dict[str, str]:
    """Returns the anchor of the last audit record of each model that has one: name -> anchor."""
    return _read_anchors(connect(settings))


def _read_anchors(client: "MlflowClient") -> dict[str, str]:
    models = _list_models(client)
    return {str(model.name): model.tags[_ANCHOR_TAG] for model in models if _ANCHOR_TAG in model.tags}


def suggest_model(name: str, settings: Settings) -> str:
    """Returns ``; did you mean NAME?`` for a name that no registered model has; empty if one has it or none is near."""
    names = [str(model.name) for model in _list_models(connect(settings))]
    return "" if name in names else suggest_name(name, names)


def require_known_model(name: str, settings: Settings) -> None:
    """Checks that a training set declares a model of this name, or that MLflow has one.

    Raises:
        RegistryError: neither; the message ends with the nearest name.
    """
    declared = registered_model_names(settings)
    if name in declared:
        return
    names = [str(model.name) for model in _list_models(connect(settings))]
    if name not in names:
        meant = suggest_name(name, {*names, *declared})
        raise RegistryError(
            f"MLflow has no registered model {quote_value(name)}, and no training set declares it{meant}"
        )


def declared_models(settings: Settings) -> list[str]:
    """Returns the names of the registered models that belong to a declared training set."""
    names = (str(model.name) for model in _list_models(connect(settings)))
    return [name for name in names if _is_declared(name, settings)]


def _list_models(client: "MlflowClient") -> "Iterator[MlflowModel]":
    """Yields every registered model, page by page."""
    token = None
    while True:
        page = client.search_registered_models(max_results=100, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _is_declared(model: str, settings: Settings) -> bool:
    try:
        find_training_set(model, settings)
    except DataError:
        return False
    except ConfigError:  # its set's file is broken
        return True
    return True


def find_training_run(run_id: str, settings: Settings) -> "Run":
    """Returns a finished training run.

    Raises:
        RunGone: there is no such run.
        RegistryError: it is not a training run of breakhis, or it is unfinished.
    """
    from mlflow.exceptions import MlflowException

    try:
        run = connect(settings).get_run(run_id)
    except MlflowException as error:
        raise explain_absence(error, RunGone(f"no run {quote_value(run_id)} in MLflow")) from None
    require_answer(run.info.run_id)
    if "breakhis.task" not in run.data.tags:
        raise RegistryError(f"run {run_id} is not a training run of breakhis (it has no tag breakhis.task)")
    if run.info.status != "FINISHED":
        raise RegistryError(f"run {run_id} is {run.info.status}; only a finished run can become a model version")
    return run
