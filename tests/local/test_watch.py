"""Waiting for DAG runs, with an Airflow that follows a script."""

import io
import time
from typing import Any

import pytest
from rich.console import Console

from ml.core.errors import AirflowError, StackError, TryAgain
from ml.local import watch as module
from ml.local.watch import DagRun, RunWatcher

NOW = "2026-01-01T00:00:00+00:00"
LATER = "2026-01-01T00:00:12+00:00"


def task(
    name: str, state: str | None, start: str | None = NOW, end: str | None = None, tried: int = 1
) -> dict[str, Any]:
    return {"task_id": name, "state": state, "start_date": start, "end_date": end, "try_number": tried, "map_index": -1}


class Scripted:
    """Each look gets the next scene: (state of the run, tasks), or an error to raise."""

    def __init__(self, *scenes: Any) -> None:
        self._scenes = list(scenes)

    def dag_run(self, dag: str, run: str) -> dict[str, Any]:
        self._now = self._scenes.pop(0) if len(self._scenes) > 1 else self._scenes[0]
        if isinstance(self._now, Exception):
            raise self._now
        return {"state": self._now[0]}

    def task_instances(self, dag: str, run: str) -> list[dict[str, Any]]:
        return list(self._now[1])

    def task_log(self, dag: str, run: str, name: str, tried: int, map_index: int) -> list[str]:
        return ["hello", f"AirflowException: breakhis {name}: out of luck in try {tried}", "::endgroup::"]


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SECONDS_BETWEEN_LOOKS", 0.0)


def follow(run: DagRun, *scenes: Any) -> None:
    RunWatcher(Scripted(*scenes), time.monotonic()).wait_until(lambda r: r.has_ended, [run], lambda: None)  # type: ignore[arg-type]


def test_a_line_per_change(capsys: pytest.CaptureFixture[str]) -> None:
    run = DagRun("retrain_demo", "r")
    follow(
        run,
        ("queued", [task("split", None, None)]),
        ("running", [task("split", "queued", None)]),
        ("running", [task("split", "running")]),
        ("running", [task("split", "running")]),
        ("success", [task("split", "success", NOW, LATER)]),
    )
    lines = [line.split("] ", 1)[1] for line in capsys.readouterr().err.splitlines()]
    assert lines == ["retrain_demo: split running", "retrain_demo: split success (12 s)"]
    assert run.state == "success"


def test_promotions_are_called_by_their_candidate(capsys: pytest.CaptureFixture[str]) -> None:
    follow(DagRun("promote", "demo-binary-v3"), ("success", [task("review", "awaiting_input")]))
    assert "demo-binary-v3: review awaiting input" in capsys.readouterr().err


def test_a_run_may_start_later() -> None:
    run = DagRun("promote", "m-v1")
    follow(run, AirflowError("no such run", 404), ("running", []), ("failed", [task("gate", "failed", NOW, LATER)]))
    assert [t["task_id"] for t in run.failed_tasks()] == ["gate"]


def test_a_retry_says_why_once(capsys: pytest.CaptureFixture[str]) -> None:
    again = ("running", [task("fetch", "up_for_retry", NOW, LATER)])
    follow(DagRun("ingest_x", "r"), again, again, ("success", [task("fetch", "success", NOW, LATER, tried=2)]))
    assert capsys.readouterr().err.count("fetch failed and will be tried again: AirflowException: breakhis fetch") == 1


def test_a_busy_server_is_waited_for() -> None:
    run = DagRun("d", "r")
    follow(run, TryAgain("busy"), TryAgain("busy"), ("success", []))
    assert run.has_ended


def test_patience_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SECONDS_WITHOUT_ANSWER", 0.0)
    with pytest.raises(TryAgain, match="busy"):
        follow(DagRun("d", "r"), TryAgain("busy"))


def test_other_errors_are_not_waited_out() -> None:
    with pytest.raises(AirflowError, match="rejected"):
        follow(DagRun("d", "r"), AirflowError("rejected", 422))


def test_waiting_ends_with_the_servers() -> None:
    def alive() -> None:
        raise StackError("airflow has ended")

    with pytest.raises(StackError, match="has ended"):
        RunWatcher(Scripted(("running", [])), 0.0).wait_until(lambda r: r.has_ended, [DagRun("d", "r")], alive)  # type: ignore[arg-type]


def test_a_terminal_gets_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(module, "console", Console(file=screen, force_terminal=True, width=100, color_system=None))
    tasks = [task("train_[binary]", "failed", NOW, LATER), task("review", "awaiting_input"), task("next", None, None)]
    follow(DagRun("retrain_demo", "r"), ("running", tasks), ("failed", tasks))
    last = screen.getvalue()
    assert "✘ train_[binary]" in last
    assert "12 s" in last
    assert "awaiting input" in last
    assert last.index("train_[binary]") < last.index("next")
