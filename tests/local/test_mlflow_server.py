"""What the local MLflow server finds in its environment."""

from pathlib import Path

from ml.core.settings import Settings
from ml.local.accounts import read_passwords
from ml.local.airflow_server import make_airflow_environment
from ml.local.mlflow_server import make_mlflow_environment


def test_mlflow_has_its_own_secrets_and_none_of_airflows(settings: Settings) -> None:
    settings.home.mkdir()
    airflow_environment = make_airflow_environment(settings, "http://127.0.0.1:8080", "http://127.0.0.1:5000", [1, 2])
    users = settings.home / "mlflow_users.db"
    users.write_text("of another administrator")
    environment = make_mlflow_environment(settings, airflow_environment)
    assert not users.exists()
    assert not [name for name in environment if name.startswith("AIRFLOW")]
    own_names = {name for name in environment if name not in airflow_environment}
    assert own_names == {"MLFLOW_AUTH_CONFIG_PATH", "MLFLOW_AUTH_ADMIN_PASSWORD", "MLFLOW_FLASK_SERVER_SECRET_KEY"}
    assert environment["MLFLOW_AUTH_ADMIN_PASSWORD"] == read_passwords(settings)["admin"]
    config = Path(environment["MLFLOW_AUTH_CONFIG_PATH"]).read_text()
    assert f"database_uri = sqlite:///{users}" in config
    assert not [name for name in own_names - {"MLFLOW_AUTH_CONFIG_PATH"} if environment[name] in config]
