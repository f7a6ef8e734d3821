"""Watching DAG runs: a live table on a terminal, else a line per change, until something has happened."""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from rich.live import Live
from rich.markup import escape
from rich.table import Table

from ml.core.airflow_api import AirflowApi
from ml.core.errors import AirflowError, TryAgain
from ml.core.progress import console, say
from ml.promotion.reviews import PROMOTE

Json = dict[str, Any]

FINAL_STATES = {"success", "failed"}
"""States of a DAG run that has come to its end."""
WAITING_STATES = {"awaiting_input", "deferred"}
"""States of a task that waits for a person."""

_SECONDS_BETWEEN_LOOKS = 1.5
_SECONDS_OF_PATIENCE = 300.0
_WORTH_A_LINE = {"running", "success", "failed", "skipped", "up_for_retry", "removed", *WAITING_STATES}
_SIGNS = {
    "success": "[green]✔[/] ",
    "failed": "[red]✘[/] ",
    "upstream_failed": "[red]-[/] ",
    "skipped": "[dim]-[/] ",
    "running": "[cyan]▶[/] ",
    "up_for_retry": "[yellow]↻[/] ",
    "awaiting_input": "[yellow]☝[/] ",
    "deferred": "[yellow]☝[/] ",
}


@dataclass
class DagRun:
    """A DAG run as it was when last looked at."""

    dag: str
    id: str
    state: str = "not started yet"
    tasks: list[Json] = field(default_factory=list)

    def task(self, name: str) -> Json:
        """One task instance of the run; empty if there is none (yet)."""
        return next((task for task in self.tasks if task["task_id"] == name), {})

    def failed_tasks(self) -> list[Json]:
        """The tasks that failed themselves."""
        return [task for task in self.tasks if task["state"] == "failed"]

    @property
    def has_ended(self) -> bool:
        """Whether the run has come to its end."""
        return self.state in FINAL_STATES

    def refresh(self, api: AirflowApi) -> None:
        """See how the run is doing now. A run that was not started yet stays so."""
        try:
            # State first: when it says that the run has ended, the tasks read after it are final.
            self.state = api.dag_run(self.dag, self.id)["state"]
            self.tasks = api.task_instances(self.dag, self.id)
        except AirflowError as error:
            if error.status != 404:
                raise
            return
        # Those that began in the order they began; the others as Airflow has them.
        self.tasks.sort(key=lambda task: task["start_date"] or "9")


class RunWatcher:
    """Shows DAG runs while waiting for them. ``start`` (of time.monotonic) is when the seconds shown began."""

    def __init__(self, api: AirflowApi, start: float) -> None:
        self._api = api
        self._start = start
        self._seen: set[tuple[str, ...]] = set()

    def wait_until(self, done: Callable[[DagRun], bool], runs: Sequence[DagRun], alive: Callable[[], None]) -> None:
        """Wait until ``done`` says so of every run.

        Args:
            done: judges one run as it is now.
            runs: the runs; they are brought up to date.
            alive: called at each look; raises if waiting has become pointless.

        Raises:
            TryAgain: Airflow has not answered for five minutes.
        """
        answered = time.monotonic()
        with Live(console=console, auto_refresh=False, transient=True) as live:
            while True:
                alive()
                try:
                    for run in runs:
                        run.refresh(self._api)
                    answered = time.monotonic()
                except TryAgain:  # a busy machine may keep us waiting
                    if time.monotonic() - answered > _SECONDS_OF_PATIENCE:
                        raise
                finished = all(done(run) for run in runs)
                self._explain_retries(runs)
                if console.is_terminal:
                    live.update(self._table(runs), refresh=True)
                else:
                    self._lines(runs)
                if finished:
                    break
                time.sleep(_SECONDS_BETWEEN_LOOKS)
        if console.is_terminal:
            console.print(self._table(runs))  # what was live stays on the screen as it ended

    def _explain_retries(self, runs: Sequence[DagRun]) -> None:
        """A try that failed is about to be repeated, perhaps in a quarter of an hour: say why at once."""
        for run in runs:
            for task in run.tasks:
                if task["state"] == "up_for_retry" and self._new(run, task, "explained"):
                    with suppress(AirflowError, TryAgain):  # a missing log is no reason to stop waiting
                        lines = self._api.task_log(
                            run.dag, run.id, task["task_id"], task["try_number"], task["map_index"]
                        )
                        why = [line for line in lines if "error" in line.lower() or "exception" in line.lower()]
                        say(
                            f"{task_label(task)} failed and will be tried again: "
                            f"{why[-1] if why else 'no reason given'}"
                        )

    def _lines(self, runs: Sequence[DagRun]) -> None:
        now = time.monotonic() - self._start
        for run in runs:
            for task in run.tasks:
                state = str(task["state"])
                if state in _WORTH_A_LINE and self._new(run, task, state):
                    name = run.id if run.dag == PROMOTE else run.dag
                    took = f" ({_seconds(task)})" if task["end_date"] else ""
                    say(f"[{now:5.0f} s] {name}: {task_label(task)} {state.replace('_', ' ')}{took}")

    def _new(self, run: DagRun, task: Json, what: str) -> bool:
        """Whether this has not been said yet of this try of the task."""
        key = (run.dag, run.id, task_label(task), str(task["try_number"]), what)
        fresh = key not in self._seen
        self._seen.add(key)
        return fresh

    def _table(self, runs: Sequence[DagRun]) -> Table:
        table = Table(box=None, show_header=False, padding=(0, 1), pad_edge=False)
        for run in runs:
            name = run.id if run.dag == PROMOTE else run.dag
            table.add_row(f"[bold]{escape(name)}[/]", run.state, f"[dim]{time.monotonic() - self._start:.0f} s[/]")
            for task in run.tasks:
                state = task["state"] or ""
                sign = _SIGNS.get(state, "  ")
                table.add_row(f"  {sign}{escape(task_label(task))}", state.replace("_", " "), _seconds(task))
        return table


def task_label(task: Json) -> str:
    """A task as people know it: its id, and of a mapped one which it is."""
    return task["task_id"] if task["map_index"] < 0 else f"{task['task_id']}[{task['map_index']}]"


def _seconds(task: Json) -> str:
    if not task["start_date"] or task["state"] in WAITING_STATES:
        return ""
    begin = datetime.fromisoformat(task["start_date"])
    end = datetime.fromisoformat(task["end_date"]) if task["end_date"] else datetime.now(UTC)
    return f"{max((end - begin).total_seconds(), 0):.0f} s"
