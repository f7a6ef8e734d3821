"""A home folder that was moved or copied, with a real MLflow database in it."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import mlflow
import pytest

from ml.core.errors import ConfigError
from ml.core.mlflow_client import connect, fetch_artifacts, use_experiment
from ml.core.mlflow_files import check_files, relocate_files
from ml.core.settings import Settings


class Echo(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
    """Returns what it is given."""

    def predict(self, model_input: list[str]) -> list[str]:
        return model_input


def settings_of(home: Path) -> Settings:
    # MLflow's client puts its address into the environment, where the settings of a next home would find it.
    return Settings(home=home, mlflow_uri=f"sqlite:///{home / 'mlflow.db'}")


@pytest.fixture
def home(tmp_path: Path, fresh_database: Path) -> Path:
    """A home folder with a run and a registered model."""
    folder = tmp_path / "home of ours"
    folder.mkdir()
    shutil.copy(fresh_database, folder / "mlflow.db")
    use_experiment("made", settings_of(folder))
    with mlflow.start_run():
        mlflow.log_text("as logged", "evaluation/metrics.json")
        mlflow.pyfunc.log_model(name="model", python_model=Echo(), registered_model_name="made")
    return folder


def read(home: Path) -> tuple[str, list[str]]:
    """Returns a logged text and what the model answers, as MLflow finds them."""
    version = connect(settings_of(home)).get_model_version("made", "1")
    text = (fetch_artifacts(f"runs:/{version.run_id}/evaluation", None) / "metrics.json").read_text()
    answer: list[str] = mlflow.pyfunc.load_model("models:/made/1").predict(["a"])
    return text, answer


def test_moved(home: Path) -> None:
    moved = home.rename(home.with_name("larger disk"))
    with pytest.raises(ConfigError, match=r"was moved or copied to .*larger disk: .* breakhis relocate") as caught:
        read(moved)
    assert str(home / "mlartifacts") in str(caught.value)
    corrected = relocate_files(moved)
    assert list(corrected) == [str(home / "mlartifacts")]
    assert corrected[str(home / "mlartifacts")] >= 4  # the experiment, the run, the model, its version
    assert read(moved) == ("as logged", ["a"])
    assert relocate_files(moved) == {}
    with mlflow.start_run(experiment_id=use_experiment("made", settings_of(moved))) as run:
        assert run.info.artifact_uri.startswith((moved / "mlartifacts").as_uri())
    assert not home.exists()


def test_copied(home: Path) -> None:
    """Without the correction, what is logged with the copy would be written into the original."""
    copy = home.with_name("copy")
    shutil.copytree(home, copy)
    with pytest.raises(ConfigError, match="breakhis relocate"):
        connect(settings_of(copy))
    relocate_files(copy)
    shutil.rmtree(home)
    assert read(copy) == ("as logged", ["a"])


def test_the_same_folder_by_another_name(home: Path) -> None:
    link = home.with_name("link")
    link.symlink_to(home)
    assert read(link) == ("as logged", ["a"])
    moved = home.rename(home.with_name("moved"))
    home.symlink_to(moved)
    assert read(moved) == ("as logged", ["a"])
    assert relocate_files(moved) == {}


def test_an_experiment_that_keeps_its_files_elsewhere_is_left_alone(home: Path) -> None:
    client = connect(settings_of(home))
    client.create_experiment("in a bucket", artifact_location="s3://bucket/mlartifacts")
    client.create_experiment("on a share", artifact_location="file:///mnt/share")
    moved = home.rename(home.with_name("moved"))
    relocate_files(moved)
    client = connect(settings_of(moved))
    places = {one.name: one.artifact_location for one in client.search_experiments()}
    assert places["in a bucket"] == "s3://bucket/mlartifacts"
    assert places["on a share"] == "file:///mnt/share"
    assert places["made"] == (moved / "mlartifacts").as_uri()


def test_a_home_folder_that_is_not_there(tmp_path: Path) -> None:
    """Such as the old name of one that was moved."""
    home = tmp_path / "home"
    with pytest.raises(ConfigError, match=r"mlflow\.db does not exist, .* set BREAKHIS_HOME"):
        relocate_files(home)
    assert not home.exists()


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo], ids=["folder", "pipe"])
def test_what_is_no_file(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "mlflow.db")
    with pytest.raises(ConfigError, match=r"mlflow\.db: MLflow's database has to be a file"):
        relocate_files(tmp_path)
    with pytest.raises(ConfigError, match=r"mlflow\.db: MLflow's database has to be a file"):
        check_files(tmp_path)
