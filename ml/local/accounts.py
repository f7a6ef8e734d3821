"""Who logs in to the local Airflow and MLflow, their passwords, and the keys that the servers sign and encrypt with."""

import json
import os
import secrets
from base64 import urlsafe_b64encode
from collections.abc import Callable
from pathlib import Path

from ml.core.errors import StackError
from ml.core.settings import SECRETS_FILE, Settings
from ml.local.mlflow_users import PROMOTER, TRAINER

SERVICE_USER = "breakhis-service"
ROLES = {"admin": "admin", "engineer": "user", "reviewer": "user", "viewer": "viewer", SERVICE_USER: "viewer"}
"""Users and their roles in Airflow's SimpleAuthManager. The service account only reads runs and answered reviews.

The people are users of MLflow too, where all but the administrator read."""

PASSWORDS_FILE = "passwords.json"
"""File in the home folder with the users' passwords."""


def list_users(settings: Settings) -> dict[str, str]:
    """Returns people and Airflow's service account, with their roles in Airflow; with those in BREAKHIS_REVIEWERS."""
    return {**ROLES, **{name: ROLES.get(name, "user") for name in settings.reviewers}}


def read_passwords(settings: Settings) -> dict[str, str]:
    """Returns the users' passwords, which are made at random the first time and then kept.

    Raises:
        StackError: the file is damaged.
    """
    return _read_secrets(settings.home / PASSWORDS_FILE, dict.fromkeys(list_users(settings), _make_password))


def read_keys(settings: Settings) -> dict[str, str]:
    """Returns the servers' keys and the passwords of MLflow's service accounts, made as passwords are.

    Raises:
        StackError: the file is damaged.
    """
    names = ("jwt", "api", "audit", "mlflow", TRAINER, PROMOTER)
    makers = {"fernet": lambda: urlsafe_b64encode(os.urandom(32)).decode(), **dict.fromkeys(names, _make_token)}
    return _read_secrets(settings.home / SECRETS_FILE, makers)


def _read_secrets(path: Path, makers: dict[str, Callable[[], str]]) -> dict[str, str]:
    """Returns the secrets in a file that only its owner can read; makes those that are missing, and writes them there.

    Args:
        path: a JSON file of secrets by name.
        makers: what makes each secret that has to be there.
    """
    try:
        kept = json.loads(path.read_text())
    except FileNotFoundError:
        kept = {}
    except ValueError:
        raise StackError(f"{path} is damaged; remove it, and new passwords will be made") from None
    missing = {name: make() for name, make in makers.items() if name not in kept}
    if missing:
        kept |= missing
        scratch = path.with_suffix(".new")
        scratch.unlink(missing_ok=True)
        with os.fdopen(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            json.dump(kept, file, indent=1)
        scratch.replace(path)
    return {name: str(value) for name, value in kept.items()}


def _make_password() -> str:
    alphabet = "abcdefghkmnpqrstuvwxyzABCDEFGHKMNPQRSTUVWXYZ23456789"  # without letters that look alike
    return "".join(secrets.choice(alphabet) for _ in range(16))


def _make_token() -> str:
    return secrets.token_urlsafe(48)
