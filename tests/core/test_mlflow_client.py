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
