"""The local MLflow server: its command, its environment, whether it is healthy, and its users."""

import sys
from collections.abc import Mapping

import requests

from ml.core.settings import Settings
from ml.local.accounts import SERVICE_USER, read_keys, read_passwords
from ml.local.mlflow_users import PROMOTER, TRAINER, auth_config_text, registered_model_names, set_up_mlflow_users
from ml.local.ports import HOST


def mlflow_command(settings: Settings, port: int) -> list[str]:
    """The command that starts the server on this port, with its files in the home folder."""
    artifacts = settings.home / "mlartifacts"
    artifacts.mkdir(exist_ok=True)
    return [
        *(sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(port), "--workers", "1"),
        *("--app-name", "basic-auth"),
        *("--backend-store-uri", f"sqlite:///{settings.home / 'mlflow.db'}"),
        *("--no-serve-artifacts", "--default-artifact-root", artifacts.as_uri()),
    ]


def mlflow_environment(settings: Settings, airflows: Mapping[str, str]) -> dict[str, str]:
    """What MLflow finds in its environment: of Airflow's, what is not Airflow's own."""
    users = settings.home / "mlflow_users.db"
    # Anew at each start: whoever has deleted passwords.json has an administrator with a new password.
    users.unlink(missing_ok=True)
    config = settings.home / "mlflow_users.ini"
    config.write_text(auth_config_text(f"sqlite:///{users}"))
    return {
        **{name: value for name, value in airflows.items() if not name.startswith("AIRFLOW")},
        "MLFLOW_AUTH_CONFIG_PATH": str(config),
        "MLFLOW_AUTH_ADMIN_PASSWORD": read_passwords(settings)["admin"],
        "MLFLOW_FLASK_SERVER_SECRET_KEY": read_keys(settings)["mlflow"],
    }


def set_up_mlflow(settings: Settings, url: str) -> None:
    """Give MLflow, once it answers at ``url``, its users, their rights and the names of registered models."""
    people = {name: word for name, word in read_passwords(settings).items() if name != SERVICE_USER}
    services = {name: read_keys(settings)[name] for name in (TRAINER, PROMOTER)}
    set_up_mlflow_users(url, people | services, registered_model_names(settings))


def mlflow_trouble(url: str) -> str:
    """What is wrong with the server at this address; empty if it is healthy."""
    try:
        with requests.Session() as session:
            session.trust_env = False  # no proxy between us and ourselves
            answer = session.get(f"{url}/health", timeout=10)
    except requests.RequestException as error:
        return f"{url} does not answer: {type(error).__name__}"
    return "" if answer.status_code == 200 else f"{url}/health answered {answer.status_code}"
