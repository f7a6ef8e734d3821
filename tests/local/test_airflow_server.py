"""What the local Airflow finds in its environment, and the DAGs that are looked for. There is no Airflow here."""

import json
import os
import stat
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from ml.core.settings import Settings
from ml.local import airflow_server as module
from ml.local.accounts import read_passwords
from ml.local.airflow_server import check_dags, find_expected_dags, make_airflow_environment

# --- environment ------------------------------------------------------------------------------------------------------


def environment(settings: Settings) -> dict[str, str]:
    settings.home.mkdir(exist_ok=True)
    return make_airflow_environment(settings, "http://127.0.0.1:8080", "http://127.0.0.1:5000", [1, 2])


def test_the_environment_of_another_airflow_stays_out(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIRFLOW__DATABASE__SQL_ALCHEMY_CONN", "postgresql://production")
    monkeypatch.setenv("AIRFLOW_CONN_PROD", "http://production")
    monkeypatch.setenv("BREAKHIS_AIRFLOW_PASSWORD", "somebody's")
    monkeypatch.setenv("KAGGLE_API_TOKEN", "token")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://s3")
    monkeypatch.setenv("BREAKHIS_WORKERS", "3")
    found = environment(settings)
    assert not {"AIRFLOW_CONN_PROD", "BREAKHIS_AIRFLOW_PASSWORD"} & found.keys()
    assert found["AIRFLOW__DATABASE__SQL_ALCHEMY_CONN"] == f"sqlite:///{settings.home}/airflow/airflow.db"
    assert (found["KAGGLE_API_TOKEN"], found["AWS_ENDPOINT_URL"], found["BREAKHIS_WORKERS"]) == (
        "token",
        "http://s3",
        "3",
    )


def test_stages_find_the_store_mlflow_and_themselves(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(settings.conf)
    found = environment(settings.model_copy(update={"weights": "b0.h5", "gpus": 1}))
    assert found["BREAKHIS_STORE"] == settings.store
    assert found["BREAKHIS_MLFLOW_URI"] == found["MLFLOW_TRACKING_URI"] == "http://127.0.0.1:5000"
    assert found["BREAKHIS_WEIGHTS"] == str(settings.conf / "b0.h5")
    assert found["BREAKHIS_GPUS"] == "1"
    assert found["PATH"].split(os.pathsep)[0] == str(Path(sys.prefix) / "bin")
    assert {"127.0.0.1", "localhost"} <= set(found["NO_PROXY"].split(","))


def test_keys_stay_the_same_over_restarts(settings: Settings) -> None:
    keys = ("AIRFLOW__API_AUTH__JWT_SECRET", "AIRFLOW__CORE__FERNET_KEY", "AIRFLOW__API__SECRET_KEY")
    first, second = environment(settings), environment(settings)
    assert [first[key] for key in keys] == [second[key] for key in keys]
    assert len({first[key] for key in keys}) == 3
    assert stat.S_IMODE((settings.home / "secrets.json").stat().st_mode) == 0o600


def test_promotion_reads_under_a_service_account(settings: Settings) -> None:
    found = environment(settings)
    connection = json.loads(found["AIRFLOW_CONN_BREAKHIS_AIRFLOW"])
    assert connection["host"] == "http://127.0.0.1:8080"
    assert connection["login"] == "breakhis-service"
    assert connection["password"] == read_passwords(settings)["breakhis-service"]
    assert "breakhis-service:viewer" in found["AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_USERS"].split(",")


def test_stages_are_the_trainer_in_mlflow_unless_they_decide(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "somebody")
    found = environment(settings.model_copy(update={"connections": ("lab_store",)}))
    assert found["BREAKHIS_CONNECTIONS"] == "lab_store,breakhis_mlflow"
    trainer, promoter = (json.loads(found[f"AIRFLOW_CONN_BREAKHIS_MLFLOW{name}"]) for name in ("", "_PROMOTER"))
    assert (trainer["login"], promoter["login"]) == ("breakhis-trainer", "breakhis-promoter")
    assert len({trainer["password"], promoter["password"], *read_passwords(settings).values()}) == 7
    assert "MLFLOW_TRACKING_USERNAME" not in found


# --- DAGs -------------------------------------------------------------------------------------------------------------

SOURCE = "name: {name}\nkind: demo\n"
TRAINING_SET = "name: {name}\nsources: [{source}]\nledger: {name}\npolicy: demo\npreset: demo\n"


def test_expected_dags_come_from_the_yaml_files(settings: Settings, tmp_path: Path) -> None:
    (settings.conf / "sources" / "one.yaml").write_text(SOURCE.format(name="one"))
    (settings.conf / "sources" / "bad.yaml").write_text("name: bad\nkind: demo\ncolour: red\n")
    (settings.conf / "training_sets" / "one.yaml").write_text(TRAINING_SET.format(name="one", source="one"))
    (tmp_path / "two.yaml").write_text(SOURCE.format(name="two"))
    extra = tmp_path / "extra.yaml"
    extra.write_text(TRAINING_SET.format(name="extra", source="./two.yaml"))
    ids, problems = find_expected_dags(settings.model_copy(update={"training_sets": (extra,)}))
    of_no_file = {"promote", "rollback", "withdraw", "audit", "remind"}
    assert ids == {*of_no_file, "ingest_one", "ingest_two", "retrain_one", "retrain_extra"}
    assert len(problems) == 1
    assert "bad.yaml" in problems[0]
    assert "colour" in problems[0]


class Dags:
    """As much of the API as check_dags asks."""

    def __init__(self, dags: list[dict[str, Any]], errors: list[dict[str, Any]]) -> None:
        self._dags, self._errors = dags, errors

    def dags(self) -> list[dict[str, Any]]:
        return self._dags

    def import_errors(self) -> list[dict[str, Any]]:
        return self._errors


def dag(name: str, at: str = "2026-01-02T00:00:00Z", **more: Any) -> dict[str, Any]:
    return {"dag_id": name, "last_parsed_time": at, "tags": [], "description": "", **more}


@pytest.fixture
def check(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Checks the given DAGs and import errors, of a stack that was started on 1 January 2026."""
    (settings.conf / "sources" / "one.yaml").write_text(SOURCE.format(name="one"))
    ticks = iter(range(0, 100_000, 5))
    monkeypatch.setattr(module.time, "monotonic", lambda: float(next(ticks)))
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)

    def run(dags: list[dict[str, Any]], errors: list[dict[str, Any]]) -> list[str]:
        always = [dag(name) for name in ("rollback", "withdraw", "audit", "remind")]
        started = datetime(2026, 1, 1, tzinfo=UTC)
        return check_dags(settings, Dags([*dags, *always], errors), started)  # type: ignore[arg-type]

    return run


def test_all_dags_are_there(check: Any) -> None:
    assert check([dag("promote"), dag("ingest_one")], []) == []


def test_dags_of_an_earlier_start_do_not_count(check: Any) -> None:
    old = "2025-12-31T00:00:00Z"
    problems = check([dag("promote"), dag("ingest_one", at=old)], [])
    assert problems == ["these DAGs are missing: ingest_one"]


def test_import_errors_are_shown(check: Any) -> None:
    error = {"filename": "ingest.py", "stack_trace": "ImportError: no", "timestamp": "2026-01-02T00:00:00Z"}
    problems = check([dag("promote")], [error, {**error, "filename": "old", "timestamp": "2025-01-01T00:00:00Z"}])
    assert problems == ["ingest.py does not import: ImportError: no", "these DAGs are missing: ingest_one"]


def test_dags_of_unusable_files_say_why(check: Any) -> None:
    invalid = dag("retrain_x", tags=[{"name": "invalid"}], description="x.yaml: 'sources' is missing")
    assert check([dag("promote"), dag("ingest_one"), invalid], []) == ["x.yaml: 'sources' is missing"]


@pytest.mark.parametrize(
    ("text", "there"), [("", False), ("on_failure: []", False), ("on_failure: [{notifier: some.Notifier}]", True)]
)
def test_a_notifier_brings_a_dag_to_try_it(settings: Settings, text: str, there: bool) -> None:
    settings.conf.mkdir(parents=True, exist_ok=True)
    (settings.conf / "notifications.yaml").write_text(text)
    ids, _ = find_expected_dags(settings)
    assert ("try_notifications" in ids) is there
