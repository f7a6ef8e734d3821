"""Who there is in MLflow, and what each may do there. Both stacks, the local one and compose, set it up at every start.

Every stage but those that decide has the *trainer's* credentials: it writes runs, in any experiment, and sees nothing
of the registry. MLflow asks for the same right to make a version and to move an alias, so the one is not given without
the other; and whoever makes a registered model owns it, which is why the trainer may not do that either. The *promoter*
registers, judges, promotes and rolls back. People read.

MLflow lets any user without a veto make a registered model, people too. So the names that the training sets have are
taken by the promoter beforehand: nobody else can come to own one of them.
"""

from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import urlsplit

import requests

from ml.core.errors import BreakhisError, CredentialsError, RegistryError, TryAgain
from ml.core.settings import Settings
from ml.data.training_sets import load_training_set, training_set_files

ADMIN, TRAINER, PROMOTER = "admin", "breakhis-trainer", "breakhis-promoter"

GRANTS = {
    TRAINER: {
        "experiment": "EDIT",
        # A training that was killed leaves half a model behind, which the next one takes away.
        "logged_model": "MANAGE",
        # A prompt is a registered model with a tag, and becomes one without it.
        **{"registered_model": "DENY", "prompt": "DENY"},
    },
    PROMOTER: {"experiment": "EDIT", "registered_model": "MANAGE"},
}
"""What the two service accounts may do with all of a kind. Whoever is not named here reads."""

_SECONDS = 60.0
_THERE, _NOT_THERE = "RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST"


def auth_config_text(database: str) -> str:
    """The file that MLFLOW_AUTH_CONFIG_PATH names: users in a database of their own, who read unless told otherwise."""
    return "\n".join(
        [
            "[mlflow]",
            "default_permission = READ",
            f"database_uri = {database.replace('%', '%%')}",
            f"admin_username = {ADMIN}",
            # A password is checked by a hash that takes some tenths of a second, and a stage asks dozens of times. One
            # that was changed is taken for so long by a worker process that did not hear of it.
            "auth_cache_ttl_seconds = 60",
            "authorization_function = mlflow.server.auth:authenticate_request_basic_auth",
            "",
        ]
    )


def registered_model_names(settings: Settings) -> list[str]:
    """The registered models of all training sets; a YAML that cannot be used has none."""
    names: list[str] = []
    for file in training_set_files(settings):
        try:
            names += load_training_set(str(file), settings.conf).models.values()
        except BreakhisError:
            continue
    return names


def set_up_mlflow_users(url: str, passwords: Mapping[str, str], models: Iterable[str]) -> None:
    """Give MLflow its users with these passwords, the service accounts their rights, and the promoter its models.

    Doing it again changes nothing but passwords.

    Args:
        url: MLflow's address.
        passwords: of each user, with those of the administrator, the trainer and the promoter.
        models: names of registered models.

    Raises:
        CredentialsError: MLflow's administrator has another password.
        RegistryError: MLflow refused.
        TryAgain: MLflow does not answer.
    """
    admin = _Mlflow(url, ADMIN, passwords[ADMIN])
    for name, password in passwords.items():
        if name == ADMIN:
            continue
        user = {"username": name, "password": password}
        if admin.ask("GET", "2.0/mlflow/users/get", {"username": name}, or_else=_NOT_THERE) is None:
            admin.ask("POST", "2.0/mlflow/users/create", user)
        else:
            admin.ask("PATCH", "2.0/mlflow/users/update-password", user)
    for name, grants in GRANTS.items():
        for kind, permission in grants.items():
            grant = {"username": name, "resource_type": kind, "resource_id": "*", "permission": permission}
            admin.ask("POST", "3.0/mlflow/users/permissions/grant", grant, or_else=_THERE)
    promoter = _Mlflow(url, PROMOTER, passwords[PROMOTER])
    for model in models:
        promoter.ask("POST", "2.0/mlflow/registered-models/create", {"name": model}, or_else=_THERE)


class _Mlflow:
    """MLflow's REST API as one user: its own client for users takes seconds to import."""

    def __init__(self, url: str, user: str, password: str) -> None:
        self._url, self._user = url.rstrip("/"), user
        self._session = requests.Session()
        self._session.trust_env = False  # the server is ours: no proxy in between
        self._session.auth = (user, password)

    def ask(self, method: str, path: str, body: Mapping[str, Any], *, or_else: str = "") -> Any:
        """The answer; None where it is the error ``or_else``."""
        sent = {"params": body} if method == "GET" else {"json": body}
        try:
            answer = self._session.request(method, f"{self._url}/api/{path}", timeout=_SECONDS, **sent)  # type: ignore[arg-type]
        except requests.RequestException as error:
            raise TryAgain(f"MLflow at {self._url} does not answer: {type(error).__name__}") from error
        where = f"MLflow at {urlsplit(self._url).netloc}"
        if answer.status_code == requests.codes.unauthorized:
            raise CredentialsError(f"{where} refuses the password of its user {self._user!r}")
        try:
            told = answer.json()
        except ValueError:
            told = {"message": answer.text.strip()[:200]}
        if or_else and told.get("error_code") == or_else:
            return None
        if not answer.ok:
            raise RegistryError(f"{where} refuses {path} to {self._user!r}: {answer.status_code} {told.get('message')}")
        return told
