"""The whole product, started as its user starts it: from a source to a reviewed champion, in real Airflow and MLflow.

On pictures drawn here with two training sets, answered step by step. Where BREAKHIS_REAL_SAMPLE names a folder, once
more on real images in one go, by ``breakhis demo``.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ml.core.airflow_api import AirflowApi
from ml.core.errors import AirflowError, CredentialsError
from ml.core.mlflow_client import connect
from ml.core.settings import Settings
from ml.core.store import Store
from ml.core.taxonomy import DUPLICATED_SLIDE
from ml.local.stack import Stack
from ml.promotion.audit_log import read_decisions

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

BREAKHIS = Path(sys.prefix) / "bin" / "breakhis"
TASKS = ("binary", "subtype")


def write_conf(folder: Path, source: str) -> None:
    """One source, and two training sets of it: one with floors nothing reaches, one with none to speak of."""
    (folder / "pictures.yaml").write_text(source)
    floors = {"strict": 0.999, "easy": 0.001}
    for name, floor in floors.items():
        (folder / f"{name}-policy.yaml").write_text(
            f"name: {name}-policy\n"
            f"binary: {{roc_auc: {floor}, macro_f1: {floor}}}\n"
            f"subtype: {{roc_auc_ovr: {floor}, macro_f1: {floor}}}\n"
            "require: [report, model_card, validated_dataset]\nzero_recall: allow\nabsent_classes: allow\n"
        )
        (folder / f"{name}.yaml").write_text(
            f"name: {name}\nsources: [./pictures.yaml]\nledger: pictures\npolicy: ./{name}-policy.yaml\n"
            "preset: demo\nschedule: null\n"
        )


@contextmanager
def installed(folder: Path, source: str) -> Iterator[SimpleNamespace]:
    """The product in a home folder of its own, with the sets of ``write_conf``; it is stopped at the end."""
    write_conf(folder, source)
    sets = os.pathsep.join(str(folder / f"{name}.yaml") for name in ("strict", "easy"))
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("AIRFLOW", "BREAKHIS_", "MLFLOW_"))}
    environment = {
        **inherited,
        "BREAKHIS_HOME": str(folder / "home"),
        "BREAKHIS_TRAINING_SETS": sets,
        "BREAKHIS_WEIGHTS": "random",
    }

    def breakhis(*arguments: str, exit_status: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run([BREAKHIS, *arguments], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == exit_status, f"{arguments}:\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
        return done

    # Named, since MLflow keeps the address of an earlier product in this process's environment.
    settings = Settings(home=folder / "home", mlflow_uri=f"sqlite:///{folder / 'home' / 'mlflow.db'}")
    made = SimpleNamespace(
        folder=folder,
        breakhis=breakhis,
        settings=settings,
        store=Store(settings.store),
        api=Stack(settings).api,
    )
    try:
        yield made
    finally:
        breakhis("down")


@pytest.fixture(scope="module")
def product(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    source = "name: pictures\nkind: demo\nimages: 164\nseed: 3\n"
    with installed(tmp_path_factory.mktemp("product"), source) as made:
        yield made


@pytest.fixture(scope="module")
def blocked(product: SimpleNamespace) -> SimpleNamespace:
    """After a run whose policy cannot be met."""
    done = product.breakhis("run", str(product.folder / "strict.yaml"), exit_status=4)
    product.first_run = done.stdout + done.stderr
    return product


@pytest.fixture(scope="module")
def waiting(blocked: SimpleNamespace) -> SimpleNamespace:
    """After a second run, of the other set: two promotions wait for their reviewer."""
    done = blocked.breakhis("run", str(blocked.folder / "easy.yaml"))
    blocked.second_run = done.stdout + done.stderr
    return blocked


def aliases(product: SimpleNamespace, model: str) -> dict[str, int]:
    client = connect(product.settings)
    return {a: int(v) for a, v in client.get_registered_model(model).aliases.items()}


def until(condition: Callable[[], Any], what: str, seconds: float = 90) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.5)
    return found


def approve(api: AirflowApi, run: str, reason: str) -> None:
    """Approve and see the run through. A busy Airflow loses an answer to a review that it is still parking."""

    def ended() -> bool:
        return bool(api.dag_run("promote", run)["state"] == "success")

    for _ in range(4):
        with suppress(AirflowError):  # 409: it was taken, and is being acted upon
            api.answer("promote", run, "review", "Approve", {"reason": reason})
        with suppress(AssertionError):
            until(ended, "the promotion", 45)
            return
    until(ended, "the promotion")


def state(api: AirflowApi, run: str, task: str) -> str | None:
    return next(t["state"] for t in api.task_instances("promote", run) if t["task_id"] == task)


def test_floors_of_0999_block_and_nothing_is_promoted(blocked):
    assert "short of 0.999" in blocked.first_run
    api = blocked.api("engineer")
    for task in TASKS:
        model, run = f"strict-{task}", f"strict-{task}-v1"
        assert api.dag_run("promote", run)["state"] == "failed"
        verdict = api.xcom("promote", run, "gate")
        assert not verdict["passed"]
        failing = [gate for gate in verdict["gates"] if not gate["passed"]]
        assert all(gate["distance"] < 0 and gate["limit"] == 0.999 for gate in failing)
        assert failing
        assert aliases(blocked, model) == {"candidate": 1}
        assert state(api, run, "review") == "upstream_failed"
    assert read_decisions(blocked.store) == []


def test_the_slide_under_two_labels_is_quarantined(blocked):
    api = blocked.api("viewer")
    version = blocked.store.read("refs/sources/pictures.json")[0]
    manifest = blocked.store.meta(version["manifest"])
    assert manifest["quarantined"]["slide_with_two_subtypes"] >= 2
    import pandas as pd

    quarantine = pd.read_parquet(blocked.store.file(version["manifest"], "quarantine.parquet"))
    assert set(quarantine["slide"]) == {DUPLICATED_SLIDE}
    assert api.import_errors() == []


def test_the_second_run_extracts_nothing_again(waiting):
    # Both sets take the same pictures, so everything the second needs is cached.
    run = waiting.api("engineer")._all("/api/v2/dags/retrain_easy/dagRuns", "dag_runs")[0]["dag_run_id"]
    features = waiting.api("engineer").xcom("retrain_easy", run, "features", map_index=0)
    assert features["extracted"] == 0
    assert features["decoded"] == 0
    assert features["cached"] == features["images"] > 80
    assert features["weights_kind"] == "random"


def test_the_review_shows_the_evidence_to_the_reviewer_alone(waiting):
    for task in TASKS:
        detail = waiting.api("viewer").hitl_detail("promote", f"easy-{task}-v1", "review")
        assert not detail["response_received"]
        evidence = waiting.api("viewer").dag_run("promote", f"easy-{task}-v1")["conf"]["evidence"]
        for text in (evidence, "### Gates", "### Data", "### Test metrics", "Random backbone weights", "#/models/"):
            assert text in detail["body"]
        with pytest.raises(CredentialsError):
            waiting.api("engineer").answer("promote", f"easy-{task}-v1", "review", "Approve", {"reason": "mine"})
    printed = waiting.second_run
    assert "reviewer" in printed
    assert "easy-binary-v1" in printed


def test_marking_the_review_as_success_promotes_nothing(waiting):
    engineer, run = waiting.api("engineer"), "easy-binary-v1"
    engineer._call("PATCH", f"/api/v2/dags/promote/dagRuns/{run}/taskInstances/review", body={"new_state": "success"})
    until(lambda: engineer.dag_run("promote", run)["state"] == "failed", "the promote task to refuse")
    assert state(engineer, run, "promote") == "failed"
    log = "\n".join(engineer.task_log("promote", run, "promote"))
    assert "nobody answered its review" in log
    assert "champion" not in aliases(waiting, "easy-binary")


def test_an_approval_by_the_reviewer_makes_the_champion(waiting):
    run, reviewer = "easy-subtype-v1", waiting.api("reviewer")
    approve(reviewer, run, "seen and good")
    assert aliases(waiting, "easy-subtype") == {"champion": 1}
    result = reviewer.xcom("promote", run, "promote")
    assert (result["decision"], result["reviewers"], result["reason"]) == ("approved", ["reviewer"], "seen and good")
    told = json.loads(waiting.breakhis("history", "easy-subtype", "--json").stdout)
    (record,) = told["decisions"]
    assert (record["event"], record["version"], record["by"]) == ("approved", 1, "reviewer")
    assert record["evidence"] == reviewer.dag_run("promote", run)["conf"]["evidence"]
    assert record["bundle"] in reviewer.hitl_detail("promote", run, "review")["body"]
    assert json.loads(waiting.breakhis("audit", "verify", "--json").stdout)["passed"]
    assert state(reviewer, run, "approved") == "success"


def test_secrets_are_in_no_log_and_no_xcom(waiting):
    passwords = json.loads((waiting.folder / "home" / "passwords.json").read_text())
    logs = [p for p in (waiting.folder / "home").rglob("*") if p.is_file() and p.suffix in {".log", ".json"}]
    assert logs
    for file in logs:
        if file.name in {"passwords.json", "secrets.json"}:
            assert file.stat().st_mode & 0o077 == 0
            continue
        text = file.read_text(errors="replace")
        assert not any(password in text for password in passwords.values()), file


def test_models_predict_with_the_servers_stopped(waiting):
    waiting.breakhis("down")
    status = json.loads(waiting.breakhis("status", "--json").stdout)
    assert status["services"] == {}

    (waiting.folder / "no-picture.png").write_text("text")
    for model, column in (("easy-binary@candidate", "p_malignant"), ("easy-subtype@champion", "p_DC")):
        predict_first_picture(waiting, model, column)
    failed = waiting.breakhis(
        "predict", str(waiting.folder / "no-picture.png"), "--model", "models:/easy-subtype@champion", exit_status=3
    )
    assert "no-picture.png: not an image file" in failed.stderr


def predict_first_picture(product: SimpleNamespace, model: str, column: str) -> None:
    """Have a registered model classify the first picture of the source."""
    import pandas as pd

    raw = product.store.read("refs/raw/pictures.json")[0]["raw"]
    listed = pd.read_parquet(product.store.file(raw, "files.parquet")).iloc[0]
    picture = product.folder / Path(listed["path"]).name
    picture.write_bytes(product.store.blob(listed["sha256"]))
    told = product.breakhis("predict", str(picture), "--model", f"models:/{model}", "--json")
    (row,) = json.loads(told.stdout)["predictions"]
    assert 0 <= row[column] <= 1


@pytest.mark.real
def test_real_images_become_champions_in_one_go(tmp_path):
    source = f"name: pictures\nkind: directory\npath: {os.environ['BREAKHIS_REAL_SAMPLE']}\n"
    with installed(tmp_path, source) as product:
        told = json.loads(product.breakhis("demo", str(tmp_path / "easy.yaml"), "--json").stdout)
        assert told["ok"]
        assert [model["decision"] for model in told["models"]] == ["Approve", "Approve"]
        version = product.store.read("refs/sources/pictures.json")[0]
        manifest = product.store.meta(version["manifest"])
        assert (manifest["images"], manifest["quarantined"]) == (101, {"slide_with_two_subtypes": 4})
        for task, column in (("binary", "p_malignant"), ("subtype", "p_DC")):
            assert aliases(product, f"easy-{task}") == {"champion": 1}
            predict_first_picture(product, f"easy-{task}@champion", column)
