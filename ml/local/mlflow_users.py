"""MLflow's users and what each may do. Both stacks, the local one and compose, set them up at every start.

All stages but those that decide have the credentials of the *trainer*, who writes runs in any experiment and sees
nothing of the registry. MLflow asks for the same right to make a version and to move an alias, so the trainer has
neither; and whoever makes a registered model owns it, so the trainer may not do that either. The *promoter* registers,
judges, promotes and rolls back. People read.

MLflow lets every user make a registered model to whom that is not denied, people too. So the promoter takes the names
in the training sets beforehand: nobody else can come to own one of them. Where somebody was first, since the model was
made before its set was declared, the rights to it are taken away, and a warning says from whom. What was made of it
until then, versions and aliases, has ``breakhis register`` refuse it.
"""

from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import urlsplit

import requests

from ml.core.errors import CredentialsError, RegistryError, TryAgain
from ml.core.messages import cut_text
from ml.core.progress import say

ADMIN, TRAINER, PROMOTER = "admin", "breakhis-trainer", "breakhis-promoter"

GRANTS = {
    TRAINER: {
        "experiment": "EDIT",
        # A training that was killed leaves half a model behind, which the next one deletes.
        "logged_model": "MANAGE",
        # A prompt is a registered model with a tag, and becomes one without it.
        **{"registered_model": "DENY", "prompt": "DENY"},
    },
    PROMOTER: {"experiment": "EDIT", "registered_model": "MANAGE"},
}
"""What the two service accounts may do with all resources of a type. Users that are not named here read."""

_MODEL_KINDS, _HARMLESS = frozenset({"registered_model", "prompt"}), frozenset({"READ", "NO_PERMISSIONS", "DENY"})

_SECONDS = 60.0
_EXISTS, _MISSING = "RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST"


def auth_config_text(database: str) -> str:
    """Returns the text of the file that MLFLOW_AUTH_CONFIG_PATH names. Users without other rights read.

    Args:
        database: the address of the users' own database, such as ``sqlite:////path/users.db``.
    """
    return "\n".join(
        [
            "[mlflow]",
            "default_permission = READ",
            f"database_uri = {database.replace('%', '%%')}",
            f"admin_username = {ADMIN}",
            # To check a password takes some tenths of a second, and a stage asks dozens of times. For so long a worker
            # process still accepts an old password that was changed through another one.
            "auth_cache_ttl_seconds = 60",
            "authorization_function = mlflow.server.auth:authenticate_request_basic_auth",
            "",
        ]
    )


def set_up_mlflow_users(url: str, passwords: Mapping[str, str], models: Iterable[str]) -> None:
    """Makes MLflow's users, gives the service accounts their rights, and makes the registered models as the promoter.

    What is there already stays, but for passwords, which are set anew.

    Args:
        url: MLflow's address.
        passwords: by user, with those of the administrator, the trainer and the promoter.
        models: names of registered models.

    Raises:
        CredentialsError: MLflow's administrator has another password.
        RegistryError: MLflow refused.
        TryAgain: MLflow does not answer.
    """
    admin = _MlflowApi(url, ADMIN, passwords[ADMIN])
    for name, password in passwords.items():
        if name == ADMIN:
            continue
        user = {"username": name, "password": password}
        if admin.ask("GET", "2.0/mlflow/users/get", {"username": name}, none_if=_MISSING) is None:
            admin.ask("POST", "2.0/mlflow/users/create", user)
        else:
            admin.ask("PATCH", "2.0/mlflow/users/update-password", user)
    for name, grants in GRANTS.items():
        for kind, permission in grants.items():
            grant = {"username": name, "resource_type": kind, "resource_id": "*", "permission": permission}
            admin.ask("POST", "3.0/mlflow/users/permissions/grant", grant, none_if=_EXISTS)
    promoter = _MlflowApi(url, PROMOTER, passwords[PROMOTER])
    names = list(models)
    for model in names:
        promoter.ask("POST", "2.0/mlflow/registered-models/create", {"name": model}, none_if=_EXISTS)
    _take_over(set(names), admin)


def _take_over(models: set[str], admin: "_MlflowApi") -> None:
    """Takes away all rights to change these registered models that were given to anybody but the promoter."""
    for user in (entry["username"] for entry in admin.ask("GET", "2.0/mlflow/users/list", {})["users"]):
        if user in {ADMIN, PROMOTER}:
            continue
        held = admin.ask("GET", "3.0/mlflow/users/permissions/list", {"username": user})["permissions"]
        for grant in held:
            kind, model, permission = (grant[key] for key in ("resource_type", "resource_pattern", "permission"))
            # MLflow keeps a user's own grants in a role of this name. Other roles are an administrator's doing.
            is_own = grant["role_name"].startswith("__user_")
            if is_own and kind in _MODEL_KINDS and model in models and permission not in _HARMLESS:
                resource = {"username": user, "resource_type": kind, "resource_id": model}
                admin.ask("POST", "3.0/mlflow/users/permissions/revoke", resource)
                say(
                    f"warning: the registered model {model} was {user}'s (right {permission}) in MLflow; it has been "
                    "taken over by the service account, and that right was withdrawn"
                )


class _MlflowApi:
    """MLflow's REST API as one user. MLflow's own client for users takes seconds to import."""

    def __init__(self, url: str, user: str, password: str) -> None:
        self._url, self._user = url.rstrip("/"), user
        self._session = requests.Session()
        self._session.trust_env = False  # the server belongs to this stack: no proxy
        self._session.auth = (user, password)

    def ask(self, method: str, path: str, body: Mapping[str, Any], *, none_if: str = "") -> Any:
        """Returns the answer; None where it is the error with the code ``none_if``."""
        arguments = {"params": body} if method == "GET" else {"json": body}
        try:
            answer = self._session.request(method, f"{self._url}/api/{path}", timeout=_SECONDS, **arguments)  # type: ignore[arg-type]
        except requests.RequestException as error:
            raise TryAgain(f"MLflow at {self._url} does not answer: {type(error).__name__}") from error
        where = f"MLflow at {urlsplit(self._url).netloc}"
        if answer.status_code == requests.codes.unauthorized:
            raise CredentialsError(f"{where} refuses the password of its user {self._user!r}")
        try:
            content = answer.json()
        except ValueError:
            content = {"message": cut_text(answer.text)}
        if none_if and content.get("error_code") == none_if:
            return None
        if not answer.ok:
            raise RegistryError(
                f"{where} refuses {path} to {self._user!r}: {answer.status_code} {content.get('message')}"
            )
        return content
