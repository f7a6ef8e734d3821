"""The local MLflow server: its command, its environment, its health and its users."""

import sys
from collections.abc import Mapping

import requests

from ml.core.mlflow_files import ARTIFACTS, check_files, database_uri
from ml.core.settings import Settings
from ml.data.training_sets import registered_model_names
from ml.local.accounts import SERVICE_USER, read_keys, read_passwords
from ml.local.mlflow_users import PROMOTER, TRAINER, auth_config_text, set_up_mlflow_users
from ml.local.ports import HOST


def make_mlflow_command(settings: Settings, port: int) -> list[str]:
    """Returns the command that starts the server on this port, with its files in the home folder.

    Raises:
        ConfigError: the home folder was moved, so its database names files that are no longer there.
    """
    check_files(settings.home)
    artifacts = settings.home / ARTIFACTS
    artifacts.mkdir(exist_ok=True)
    return [
        *(sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(port), "--workers", "1"),
        *("--app-name", "basic-auth"),
        *("--backend-store-uri", database_uri(settings.home)),
        *("--no-serve-artifacts", "--default-artifact-root", artifacts.as_uri()),
    ]


def make_mlflow_environment(settings: Settings, airflow_environment: Mapping[str, str]) -> dict[str, str]:
    """Makes MLflow's database of users anew; returns the server's environment: Airflow's without its own settings."""
    users = settings.home / "mlflow_users.db"
    # Once passwords.json was deleted, the administrator has a new password, which an old database would not know.
    users.unlink(missing_ok=True)
    config = settings.home / "mlflow_users.ini"
    config.write_text(auth_config_text(f"sqlite:///{users}"))
    return {
        **{name: value for name, value in airflow_environment.items() if not name.startswith("AIRFLOW")},
        "MLFLOW_AUTH_CONFIG_PATH": str(config),
        "MLFLOW_AUTH_ADMIN_PASSWORD": read_passwords(settings)["admin"],
        "MLFLOW_FLASK_SERVER_SECRET_KEY": read_keys(settings)["mlflow"],
    }


def set_up_mlflow(settings: Settings, url: str) -> None:
    """Sets up users, rights and registered models in the server at ``url``, which has to answer; see :func:`set_up`."""
    people = {name: password for name, password in read_passwords(settings).items() if name != SERVICE_USER}
    services = {name: read_keys(settings)[name] for name in (TRAINER, PROMOTER)}
    set_up_mlflow_users(url, people | services, registered_model_names(settings))


def find_mlflow_trouble(url: str) -> str:
    """Returns what is wrong with the server at this address; an empty text if it is healthy."""
    try:
        with requests.Session() as session:
            session.trust_env = False  # the server is on this machine: no proxy
            answer = session.get(f"{url}/health", timeout=10)
    except requests.RequestException as error:
        return f"{url} does not answer: {type(error).__name__}"
    return "" if answer.status_code == 200 else f"{url}/health answered {answer.status_code}"
