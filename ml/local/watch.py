"""Shows how DAG runs go on while waiting for them: a live table on a terminal, else a line per change."""

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
"""States of a DAG run that has ended."""
WAITING_STATES = {"awaiting_input", "deferred"}
"""States of a task that waits for a person."""

_SECONDS_BETWEEN_LOOKS = 1.5
_SECONDS_WITHOUT_ANSWER = 300.0
_SHOWN_STATES = {"running", "success", "failed", "skipped", "up_for_retry", "removed", *WAITING_STATES}
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
    """A DAG run, as it was when it was last read from Airflow."""

    dag: str
    id: str
    state: str = "not started yet"
    tasks: list[Json] = field(default_factory=list)

    def task(self, name: str) -> Json:
        """Returns one task instance of the run; an empty one if there is none yet."""
        return next((task for task in self.tasks if task["task_id"] == name), {})

    def failed_tasks(self) -> list[Json]:
        """Returns the tasks that failed themselves, without those that were not run in consequence."""
        return [task for task in self.tasks if task["state"] == "failed"]

    @property
    def has_ended(self) -> bool:
        """Whether the run has ended."""
        return self.state in FINAL_STATES

    def refresh(self, api: AirflowApi) -> None:
        """Reads the run's state and tasks from Airflow. A run that was not started yet stays as it is."""
        try:
            # State first: when it says that the run has ended, the tasks read after it are final.
            self.state = api.dag_run(self.dag, self.id)["state"]
            self.tasks = api.task_instances(self.dag, self.id)
        except AirflowError as error:
            if error.status != 404:
                raise
            return
        # Tasks that began stand in that order; the others follow as Airflow has them.
        self.tasks.sort(key=lambda task: task["start_date"] or "9")


class RunWatcher:
    """Shows DAG runs while waiting for them.

    Args:
        api: Airflow's.
        start: the moment (time.monotonic) from which the seconds shown are counted.
    """

    def __init__(self, api: AirflowApi, start: float) -> None:
        self._api = api
        self._start = start
        self._said: set[tuple[str, ...]] = set()

    def wait_until(
        self, is_done: Callable[[DagRun], bool], runs: Sequence[DagRun], check_servers: Callable[[], None]
    ) -> None:
        """Waits until every run is done.

        Args:
            is_done: returns whether a run is, as it is now.
            runs: the runs; each is read anew every 1.5 seconds.
            check_servers: called each time; raises if waiting has become pointless.

        Raises:
            TryAgain: Airflow has not answered for five minutes.
        """
        answered = time.monotonic()
        with Live(console=console, auto_refresh=False, transient=True) as live:
            while True:
                check_servers()
                try:
                    for run in runs:
                        run.refresh(self._api)
                    answered = time.monotonic()
                except TryAgain:  # on a busy machine Airflow may be slow to answer
                    if time.monotonic() - answered > _SECONDS_WITHOUT_ANSWER:
                        raise
                all_done = all(is_done(run) for run in runs)
                self._say_why_tasks_are_retried(runs)
                if console.is_terminal:
                    live.update(self._make_table(runs), refresh=True)
                else:
                    self._print_changes(runs)
                if all_done:
                    break
                time.sleep(_SECONDS_BETWEEN_LOOKS)
        if console.is_terminal:
            console.print(self._make_table(runs))  # the last state of the live table stays on the screen

    def _say_why_tasks_are_retried(self, runs: Sequence[DagRun]) -> None:
        """Says at once why a try has failed: the next one may begin in a quarter of an hour."""
        for run in runs:
            for task in run.tasks:
                if task["state"] == "up_for_retry" and self._is_first_time(run, task, "explained"):
                    with suppress(AirflowError, TryAgain):  # a missing log is no reason to stop waiting
                        lines = self._api.task_log(
                            run.dag, run.id, task["task_id"], task["try_number"], task["map_index"]
                        )
                        reasons = [line for line in lines if "error" in line.lower() or "exception" in line.lower()]
                        say(
                            f"{task_label(task)} failed and will be tried again: "
                            f"{reasons[-1] if reasons else 'no reason given'}"
                        )

    def _print_changes(self, runs: Sequence[DagRun]) -> None:
        seconds = time.monotonic() - self._start
        for run in runs:
            for task in run.tasks:
                state = str(task["state"])
                if state in _SHOWN_STATES and self._is_first_time(run, task, state):
                    name = run.id if run.dag == PROMOTE else run.dag
                    took = f" ({_format_duration(task)})" if task["end_date"] else ""
                    say(f"[{seconds:5.0f} s] {name}: {task_label(task)} {state.replace('_', ' ')}{took}")

    def _is_first_time(self, run: DagRun, task: Json, news: str) -> bool:
        """Returns whether this was not said yet of this try of the task, and remembers that it was."""
        key = (run.dag, run.id, task_label(task), str(task["try_number"]), news)
        is_first = key not in self._said
        self._said.add(key)
        return is_first

    def _make_table(self, runs: Sequence[DagRun]) -> Table:
        table = Table(box=None, show_header=False, padding=(0, 1), pad_edge=False)
        for run in runs:
            name = run.id if run.dag == PROMOTE else run.dag
            table.add_row(f"[bold]{escape(name)}[/]", run.state, f"[dim]{time.monotonic() - self._start:.0f} s[/]")
            for task in run.tasks:
                state = task["state"] or ""
                sign = _SIGNS.get(state, "  ")
                table.add_row(f"  {sign}{escape(task_label(task))}", state.replace("_", " "), _format_duration(task))
        return table


def task_label(task: Json) -> str:
    """Returns how a task is named to people: by its id, with its number if it is mapped."""
    return task["task_id"] if task["map_index"] < 0 else f"{task['task_id']}[{task['map_index']}]"


def _format_duration(task: Json) -> str:
    if not task["start_date"] or task["state"] in WAITING_STATES:
        return ""
    begin = datetime.fromisoformat(task["start_date"])
    end = datetime.fromisoformat(task["end_date"]) if task["end_date"] else datetime.now(UTC)
    return f"{max((end - begin).total_seconds(), 0):.0f} s"
