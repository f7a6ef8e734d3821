import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote, unquote

import pytest

from ml.core.errors import BreakhisError, ConfigError, CredentialsError, RegistryError, RunGone, TryAgain
from ml.core.mlflow_client import connect, find_outage, use_experiment
from ml.core.mlflow_files import relocate_files
from ml.core.settings import Settings
from ml.registry.registered_model import RegisteredModel, find_training_run
from tests.helpers.command_line import command  # noqa: F401  # a fixture


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


class _Answers(BaseHTTPRequestHandler):
    """Gives every request the status of the address, such as ``/503``, and a page; with more behind it, as JSON."""

    def do_GET(self):
        status, _, content = self.path.split("/")[1].partition(",")
        page = unquote(content).encode() or b"<html>a page</html>"
        self.send_response(int(status))
        if status == "302":
            self.send_header("Location", self.path)
        self.send_header("Content-Length", str(len(page)))
        self.end_headers()
        if status != "204":
            self.wfile.write(page)

    do_POST = do_GET  # noqa: N815 - the name that http.server looks for

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    with ThreadingHTTPServer(("127.0.0.1", 0), _Answers) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


@pytest.fixture
def closed_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


@pytest.mark.parametrize(
    ("status", "kind", "words"),
    [
        (429, TryAgain, "cannot be reached or answers errors"),
        (500, TryAgain, "cannot be reached or answers errors"),
        (503, TryAgain, "too many 503 error responses"),
        (401, CredentialsError, "refuses the login"),
        (403, CredentialsError, "refuses the login"),
        (404, ConfigError, "does not answer as MLflow does"),
        (200, ConfigError, "does not answer as MLflow does"),
        ('401,{"message":"Unauthorized"}', TryAgain, "answers with an error: .*Unauthorized; see what stands before"),
        ('403,{"detail":"Not authenticated"}', TryAgain, "answers with an error: .*Not authenticated"),
        ('400,{"error_code":"X","message":"m"}', TryAgain, "answers with an error: X: m"),
        (501, TryAgain, "answers with an error: .*501"),
        (520, TryAgain, "answers with an error: .*520"),
        ("530,error code: 1033", TryAgain, "answers with an error: .*530 != 200.*1033"),
        (599, TryAgain, "answers with an error: .*599"),
        ('501,{"error_code":"NOT_IMPLEMENTED"}', TryAgain, "answers with an error: .*NOT_IMPLEMENTED"),
        ('400,{"error_code":"BAD_REQUEST","message":"database is locked"}', TryAgain, "database is locked"),
        ('400,{"error_code":"INTERNAL_ERROR","message":"database is locked"}', TryAgain, "database is locked"),
        (400, ConfigError, "does not answer as MLflow does"),
        (407, CredentialsError, "wants a login"),
        (418, ConfigError, "does not answer as MLflow does"),
        ("200,[]", ConfigError, "does not answer as MLflow does"),
        ("200,null", ConfigError, "does not answer as MLflow does"),
        ("200,{}", ConfigError, "does not answer as MLflow does"),
        ("200, ", ConfigError, "does not answer as MLflow does"),
        (204, ConfigError, "does not answer as MLflow does"),
        (302, ConfigError, "does not answer as MLflow does"),
    ],
)
def test_an_outage_is_not_told_as_something_missing(server, tmp_path, status, kind, words):
    place = quote(str(status), safe=",")
    settings = Settings(home=tmp_path, mlflow_uri=f"{server}/{place}")
    model = RegisteredModel("made-binary", settings)
    for ask in (
        lambda: find_training_run("0" * 32, settings),
        lambda: model.find_version(1),
        lambda: model.alias("champion"),
    ):
        with pytest.raises(kind, match=f"{server}/{re.escape(place)}.*{words}"):
            ask()


@pytest.mark.parametrize("code", ["BAD_REQUEST", "INVALID_STATE", "RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST"])
def test_only_mlflow_says_what_is_missing(server, tmp_path, code):
    answer = json.dumps({"error_code": code})
    settings = Settings(home=tmp_path, mlflow_uri=f"{server}/{quote(f'404,{answer}', safe=',')}")
    with pytest.raises(BreakhisError) as error:
        find_training_run("0" * 32, settings)
    assert (type(error.value) is RunGone) == (code == "RESOURCE_DOES_NOT_EXIST"), error.value


@pytest.mark.parametrize(("place", "code"), [("530", 75), ("404", 3), ("200,{}", 3), ('200,{"model_version":5}', 3)])
def test_predict_tells_what_answers(server, tmp_path, monkeypatch, command, place, code):  # noqa: F811
    """The model's name is looked up for a suggestion, so MLflow is asked again while its first error is handled."""
    (tmp_path / "a.png").write_bytes(b"")
    uri = f"{server.replace('//', '//me:s3cret@')}/{quote(place, safe=',')}"
    monkeypatch.setenv("BREAKHIS_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("BREAKHIS_MLFLOW_URI", uri)
    ended, _, err = command("predict", str(tmp_path / "a.png"), "--model", "models:/made-binary/1")
    assert (ended, "Traceback" in err, "s3cret" in err) == (code, False, False), err
    assert len(err) < 1000


def test_answers_of_another_kind(server, tmp_path):
    odd = quote('200,{"run":5}', safe=",")
    with pytest.raises(Exception, match="Failed to parse run") as error:
        find_training_run("0" * 32, Settings(home=tmp_path, mlflow_uri=f"{server}/{odd}"))
    assert "does not answer as MLflow does" in str(find_outage(error.value))


def test_a_password_in_the_address_is_not_shown(server, tmp_path):
    for status in (500, 401, 404, 530, "400,database or disk is full"):
        uri = f"{server}/{quote(str(status), safe=',')}".replace("//", "//user:s3cret@")
        with pytest.raises(BreakhisError) as error:
            find_training_run("0" * 32, Settings(home=tmp_path, mlflow_uri=uri))
        assert "s3cret" not in str(error.value)


def test_a_server_that_does_not_listen_is_named(closed_port, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    settings = Settings(home=tmp_path, mlflow_uri=f"http://127.0.0.1:{closed_port}")
    with pytest.raises(TryAgain, match=f":{closed_port} cannot be reached.*refused"):
        find_training_run("0" * 32, settings)


@pytest.fixture
def silent_server():
    """Accepts connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def test_a_server_that_says_nothing_is_named(silent_server, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    settings = Settings(home=tmp_path, mlflow_uri=silent_server)
    with pytest.raises(TryAgain, match=rf"MLflow at {silent_server} cannot be reached.*timed out.*is it running\?"):
        find_training_run("0" * 32, settings)


def test_silence_is_told_after_minutes_and_a_restart_is_waited_for(tmp_path, monkeypatch):
    """What MLflow's client is told, and what it makes of that."""
    from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_TIMEOUT
    from urllib3 import Retry

    names = ("TIMEOUT", "MAX_RETRIES", "BACKOFF_FACTOR")
    for name in names:
        monkeypatch.delenv(f"MLFLOW_HTTP_REQUEST_{name}", raising=False)
    connect(Settings(home=tmp_path, mlflow_uri=f"sqlite:///{tmp_path / 'mlflow.db'}"))
    timeout, retries, factor = (int(os.environ[f"MLFLOW_HTTP_REQUEST_{name}"]) for name in names)
    assert MLFLOW_HTTP_REQUEST_TIMEOUT.get() == timeout
    pauses, retry = [], Retry(retries, backoff_factor=factor)
    for _ in range(retries):
        retry = retry.increment("GET", "/", error=ConnectionError())
        pauses.append(retry.get_backoff_time())
    assert 10 <= sum(pauses) <= 20
    assert timeout * (retries + 1) + sum(pauses) <= 200


def damage_header(data):
    return b"no database at all" + data[18:]


def damage_schema(data):
    return data[:100] + b"\xff" * 4000 + data[4100:]


@pytest.mark.parametrize("damage", [damage_header, damage_schema, lambda _: b"text\n" * 1000])
def test_a_damaged_database_is_told_at_once(fresh_database, tmp_path, monkeypatch, damage):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)  # where MLflow's client puts its address
    database = tmp_path / "mlflow.db"
    database.write_bytes(damage(fresh_database.read_bytes()))
    begin = time.monotonic()
    told = rf"^{database}: MLflow's database is damaged \(.+\); .* restore the file from a backup, or .*\.recover$"
    for uri in ("", f"sqlite:///{database}"):
        with pytest.raises(ConfigError, match=told):
            find_training_run("0" * 32, Settings(home=tmp_path, mlflow_uri=uri))
    with pytest.raises(ConfigError, match=told):
        relocate_files(tmp_path)
    assert time.monotonic() - begin < 10


def test_damage_that_shows_later_is_no_outage(fresh_database, tmp_path):
    """Pages behind the first are damaged: only who reads them is told."""
    import sqlalchemy
    from mlflow.exceptions import MlflowException

    database, data = tmp_path / "mlflow.db", fresh_database.read_bytes()
    client = connect(Settings(home=tmp_path, mlflow_uri=f"sqlite:///{database}"))
    database.write_bytes(data)
    client.search_experiments()
    database.write_bytes(data[:4096] + b"\xff" * (len(data) - 4096))
    with pytest.raises((MlflowException, sqlalchemy.exc.SQLAlchemyError)) as caught:
        client.search_experiments()
    explained = find_outage(caught.value)
    assert type(explained) is ConfigError
    assert str(explained).startswith(f"{database}: MLflow's database is damaged (")


def test_what_mlflow_lacks_is_no_outage(fresh_database, tmp_path):
    settings = Settings(home=tmp_path, mlflow_uri=f"sqlite:///{fresh_database}")
    with pytest.raises(RegistryError, match="no run"):
        find_training_run("0" * 32, settings)


def test_an_outage_anywhere_in_a_stage_asks_for_another_try(server, tmp_path):
    """The stage that lists models meets the outage where nothing expects one."""
    environment = {
        **os.environ,
        "BREAKHIS_HOME": str(tmp_path),
        "BREAKHIS_MLFLOW_URI": f"{server}/503",
        "BREAKHIS_AUDIT_KEY": "key",
    }
    audit = [Path(sys.executable).parent / "breakhis", "audit", "verify"]
    ended = subprocess.run(audit, env=environment, capture_output=True, text=True, check=False)
    assert (ended.returncode, "Traceback" in ended.stderr) == (75, False), ended.stderr
    assert f"error: MLflow at {server}/503 cannot be reached" in ended.stderr


def test_a_database_that_cannot_be_written_is_no_outage(fresh_database, tmp_path, monkeypatch):
    import sqlalchemy
    from mlflow.exceptions import MlflowException
    from mlflow.store.db import utils

    database = tmp_path / "mlflow.db"
    database.write_bytes(fresh_database.read_bytes())
    monkeypatch.setattr(utils, "MAX_RETRY_COUNT", 1)
    errors = (MlflowException, sqlalchemy.exc.OperationalError)

    def allow_no_growth(connection, _):
        connection.execute("PRAGMA max_page_count = 1")

    def fill_up():
        client = connect(Settings(home=tmp_path, mlflow_uri=f"sqlite:///{database}"))
        client.create_experiment("many", tags={f"{number}": "x" * 5_000 for number in range(20)})

    sqlalchemy.event.listen(sqlalchemy.Engine, "connect", allow_no_growth)
    try:
        with pytest.raises(errors) as caught:
            fill_up()
    finally:
        sqlalchemy.event.remove(sqlalchemy.Engine, "connect", allow_no_growth)
    explained = find_outage(caught.value)
    assert type(explained) is ConfigError
    assert f"MLflow at sqlite:///{database}: database or disk is full; see to the disk" in str(explained)
