from ml.core.mlflow_client import connect, use_experiment
from ml.core.settings import Settings


def test_artifacts_of_a_new_experiment_lie_beside_the_database(fresh_database, tmp_path, monkeypatch):
    import mlflow

    monkeypatch.chdir(tmp_path)
    home = tmp_path / "home"
    home.mkdir()
    (home / "mlflow.db").write_bytes(fresh_database.read_bytes())
    settings = Settings(home=home, mlflow_uri=f"sqlite:///{home / 'mlflow.db'}")
    made = use_experiment("set", settings)
    with mlflow.start_run():
        mlflow.log_text("a", "a.txt")
    assert [file.name for file in tmp_path.iterdir()] == ["home"]
    assert len(list((home / "mlartifacts").rglob("a.txt"))) == 1
    assert use_experiment("set", settings) == made
    assert connect(settings).get_experiment(made).name == "set"


def test_an_experiment_that_another_process_creates_meanwhile_is_the_active_one(tmp_path, monkeypatch):
    """MLflow returns such an experiment without making it the active one (mlflow 3.17.2, set_experiment)."""
    import mlflow
    from mlflow.tracking._tracking_service.client import TrackingServiceClient

    settings = Settings(mlflow_uri=f"sqlite:///{tmp_path / 'mlflow.db'}", home=tmp_path)
    created = connect(settings).create_experiment("set", artifact_location=(tmp_path / "artifacts").as_uri())
    look_up, calls = TrackingServiceClient.get_experiment_by_name, []

    def not_yet(self, name):
        calls.append(name)
        return None if len(calls) <= 2 else look_up(self, name)

    monkeypatch.setattr(TrackingServiceClient, "get_experiment_by_name", not_yet)
    assert use_experiment("set", settings) == created
    with mlflow.start_run() as run:
        assert run.info.experiment_id == created
