"""The whole workflow, driven through the local Airflow as a person would drive it.

:func:`run` goes up to where a person is needed: promotions wait for their review. :func:`demo` goes on without one: a
reviewer's account answers over Airflow's REST API, and the promotions that follow are checked in MLflow's registry.
"""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import requests

from ml.core.airflow_api import AirflowApi
from ml.core.errors import AirflowError, BreakhisError, Refused, StackError, TryAgain
from ml.core.progress import say
from ml.core.settings import Settings
from ml.data.sources import load_source
from ml.data.training_sets import TrainingSet, load_training_set
from ml.local.stack import Stack
from ml.local.watch import WAITING_STATES, DagRun, RunWatcher, task_label
from ml.promotion.reviews import APPROVE, PROMOTE, REVIEW_TASK

Json = dict[str, Any]

ENGINEER = "engineer"
REASON = "Approved by a script (breakhis demo): all gates passed. No person has looked at the evidence."

_SECONDS_BEFORE_ANSWERING = 5.0
_SECONDS_TO_TAKE_AN_ANSWER = 30.0
_ANSWERS = 4
"""A review answered within a second of its parking can fail, since its task may still be on its way there."""
_LINES_OF_LOG = 25


@dataclass
class Candidate:
    """A model version on its way to being the champion."""

    task: str
    model: str
    version: str
    run_id: str
    metrics: Json
    promote: DagRun
    gates: list[Json] = field(default_factory=list)
    passed: bool | None = None
    decision: str = ""
    reviewer: str = ""
    reason: str = ""
    champion: str = ""

    @property
    def is_waiting(self) -> bool:
        """Whether a reviewer is being asked."""
        return self.promote.task(REVIEW_TASK).get("state") in WAITING_STATES

    @property
    def is_settled(self) -> bool:
        """Whether nothing more happens without a person."""
        return self.is_waiting or self.promote.has_ended

    @property
    def failing(self) -> str:
        """Which gates block it, and by how much."""
        return "; ".join(gate["reason"] for gate in self.gates if not gate["passed"])

    def summary(self) -> Json:
        """What became of it."""
        own = ("task", "model", "version", "run_id", "metrics", "gates", "passed", "decision", "reviewer", "reason")
        return {**{name: getattr(self, name) for name in own}, "champion": self.champion, "state": self.promote.state}


class Workflow:
    """One training set's way from its sources to the reviews, on the local stack.

    Args:
        set_reference: name of a training set, or the path of its YAML.
        settings: where all is.

    Raises:
        ConfigError: there is no such training set, or it is invalid.
    """

    def __init__(self, set_reference: str, settings: Settings) -> None:
        self.stack = Stack(settings)
        self.training_set: TrainingSet = load_training_set(set_reference, settings.conf)
        self.sources = [
            load_source(reference, settings.conf, relative_to=self.training_set.file.parent).name
            for reference in self.training_set.sources
        ]
        self.started = time.monotonic()
        self.retrain = DagRun(f"retrain_{self.training_set.name}", "")
        self.split: Json = {}
        self.features: Json = {}
        self.candidates: list[Candidate] = []

    # --- the way ------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Start the stack, and see that the DAGs this needs are there.

        Raises:
            StackError: a server does not start, or a needed DAG is missing; says why.
        """
        state = self.stack.up(extra_set=self.training_set.file)
        problems = self.stack.check_dags(state)
        for problem in problems:
            say(f"warning: {problem}")
        self.airflow = state.services["airflow"].url
        self.mlflow = state.services["mlflow"].url
        api = self.stack.api(ENGINEER)
        self.watch = RunWatcher(api, self.started)
        there = {dag["dag_id"] for dag in api.dags()}
        needed = [*(f"ingest_{name}" for name in self.sources), self.retrain.dag, PROMOTE]
        missing = [dag for dag in needed if dag not in there]
        if missing:
            raise StackError(f"Airflow has no DAG {', '.join(missing)}; see the warnings above")
        for dag in needed:
            if dag != self.retrain.dag:  # that one waits for the sources, or their first news would start it as well
                api.unpause(dag)

    def run_until_review(self) -> None:
        """Ingest, retrain, and follow both candidates until each waits for its review, was blocked or is decided.

        Raises:
            StackError: a task failed; the end of its log has been shown.
        """
        api, watch = self.stack.api(ENGINEER), self.watch
        ingests = [DagRun(dag, api.trigger(dag)["dag_run_id"]) for dag in (f"ingest_{name}" for name in self.sources)]
        watch.wait_until(lambda run: run.has_ended, ingests, self._check_alive)
        for run in ingests:
            self._demand_success(run)
        api.unpause(self.retrain.dag)
        self.retrain.id = api.trigger(self.retrain.dag)["dag_run_id"]
        watch.wait_until(lambda run: run.has_ended, [self.retrain], self._check_alive)
        self._demand_success(self.retrain)
        self.split = self._result(self.retrain, "split")
        shards = [task for task in self.retrain.tasks if task["task_id"] == "features"]
        parts = [self._result(self.retrain, "features", shard["map_index"]) for shard in shards]
        self.features = {what: sum(part[what] for part in parts) for what in ("images", "extracted", "cached")}
        for task in self.training_set.models:
            trained = self._result(self.retrain, f"train_{task}")
            registered = self._result(self.retrain, f"register_{task}")
            model, version = registered["model"], str(registered["version"])
            promote = DagRun(PROMOTE, f"{model}-v{version}")
            self.candidates.append(Candidate(task, model, version, trained["run_id"], trained["metrics"], promote))
        self._follow_candidates(lambda candidate: candidate.is_settled)
        for candidate in self.candidates:
            self._read_gates(candidate)
            # A blocking gate is an outcome like any other; whatever else fails is not.
            if candidate.passed is not False and candidate.promote.state == "failed":
                self._demand_success(candidate.promote)

    def answer_as_reviewer(self) -> None:
        """Approve, as the first of the reviewers, every candidate whose review waits, and see it through.

        Raises:
            StackError: what follows the answer failed.
        """
        reviewer = self.stack.settings.reviewers[0]
        api = self.stack.api(reviewer)
        approved: list[Candidate] = []
        for _ in range(_ANSWERS):
            # A review that Airflow was still parking loses its answer, and is asked again.
            asked = [candidate for candidate in self.candidates if candidate.is_waiting]
            if not asked:
                break
            time.sleep(_SECONDS_BEFORE_ANSWERING)
            for candidate in asked:
                if _approve(candidate, api):
                    say(f"{reviewer} approved {candidate.promote.id}")
            approved = approved or asked
            self._follow_candidates(_led_on(since=time.monotonic()))
        for candidate in approved:
            if candidate.is_waiting:
                raise StackError(
                    f"{candidate.promote.id} was approved {_ANSWERS} times and still waits for its review; see "
                    f"{self.review_url(candidate)}"
                )
            self._demand_success(candidate.promote)

    def read_decisions(self) -> None:
        """Read who decided what in Airflow's own record, and each model's champion in MLflow's registry."""
        api = self.stack.api(ENGINEER)
        for candidate in self.candidates:
            candidate.champion = self._champion(candidate.model)
            try:
                detail = api.hitl_detail(PROMOTE, candidate.promote.id, REVIEW_TASK)
            except AirflowError as error:
                if error.status != 404:  # blocked by its gates, nobody was asked
                    raise
                continue
            if detail["response_received"]:
                candidate.decision = ", ".join(detail["chosen_options"] or ())
                candidate.reviewer = (detail["responded_by_user"] or {}).get("name", "")
                candidate.reason = str((detail["params_input"] or {}).get("reason") or "")

    def shortcomings(self) -> list[str]:
        """Why this cannot count as: both models have a champion that the reviewer approved just now. [] if it can."""
        reviewer = self.stack.settings.reviewers[0]
        found = [] if len(self.candidates) == len(self.training_set.models) else ["not every model was trained"]
        for candidate in self.candidates:
            name = f"{candidate.model} version {candidate.version}"
            if candidate.passed is False:
                found.append(f"{name} was blocked by its gates: {candidate.failing}")
            elif (candidate.decision, candidate.reviewer) != (APPROVE, reviewer):
                found.append(f"{name} was not approved by {reviewer} (but: {candidate.decision or 'no answer'})")
            elif candidate.champion != candidate.version:
                found.append(f"{name} is not the champion (which is: {candidate.champion or 'none'})")
        return found

    def summary(self) -> Json:
        """All of the above as JSON."""
        return {
            "set": self.training_set.name,
            "seconds": round(time.monotonic() - self.started, 1),
            "retrain": self.retrain.id,
            "split": self.split,
            "features": self.features,
            "models": [candidate.summary() for candidate in self.candidates],
        }

    # --- steps of it --------------------------------------------------------------------------------------------

    def _follow_candidates(self, done: Callable[[Candidate], bool]) -> None:
        by_run = {candidate.promote.id: candidate for candidate in self.candidates}
        runs = [candidate.promote for candidate in self.candidates]
        self.watch.wait_until(lambda run: done(by_run[run.id]), runs, self._check_alive)

    def _check_alive(self) -> None:
        state = self.stack.state()
        for name, service in state.services.items() if state else ():
            if not service.process.is_alive():
                raise StackError(f"{name} has ended in the meantime; its log is {service.log}")
        if state is None:
            raise StackError("the local stack was stopped in the meantime")

    def _demand_success(self, run: DagRun) -> None:
        if run.state == "success":
            return
        api = self.stack.api(ENGINEER)
        for task in run.failed_tasks():
            tried = max(task["try_number"], 1)
            say(f"\n{run.dag}: {task_label(task)} failed. The end of its log:")
            for line in api.task_log(run.dag, run.id, task["task_id"], tried, task["map_index"])[-_LINES_OF_LOG:]:
                say(f"  {line}")
        where = ", ".join(task_label(task) for task in run.failed_tasks()) or "the run"
        raise StackError(f"{where} failed in {run.dag}; all of it: {self.run_url(run)}")

    def _result(self, run: DagRun, task: str, map_index: int = -1) -> Json:
        try:
            result = self.stack.api(ENGINEER).xcom(run.dag, run.id, task, map_index)
        except AirflowError as error:
            raise StackError(f"{task} in {run.dag} left no result ({error}); see {self.run_url(run)}") from None
        if not isinstance(result, dict):
            raise StackError(f"{task} in {run.dag} returned {result!r}, which is no stage's result")
        return result

    def _read_gates(self, candidate: Candidate) -> None:
        """The verdict, which a blocking gate leaves too; none if the gate itself broke down."""
        try:
            verdict = self.stack.api(ENGINEER).xcom(PROMOTE, candidate.promote.id, "gate")
        except AirflowError as error:
            if error.status != 404:
                raise
            return
        candidate.gates, candidate.passed = verdict["gates"], bool(verdict["passed"])

    def _champion(self, model: str) -> str:
        """The version that MLflow's registry calls the model's champion; empty if none."""
        answer = self._mlflow("registered-models/alias", name=model, alias="champion")
        return str(answer["model_version"]["version"]) if answer else ""

    def _mlflow(self, path: str, **params: str) -> Json | None:
        """Ask MLflow's REST API, which takes milliseconds where importing its client takes seconds."""
        try:
            with requests.Session() as session:
                session.trust_env = False  # no proxy between us and ourselves
                session.auth = (ENGINEER, self.stack.passwords()[ENGINEER])
                answer = session.get(f"{self.mlflow}/api/2.0/mlflow/{path}", params=params, timeout=60)
        except requests.RequestException as error:
            raise TryAgain(f"MLflow at {self.mlflow} does not answer: {type(error).__name__}") from error
        if answer.status_code in {400, 404}:  # a missing alias is an "invalid parameter value"
            return None
        if answer.status_code != 200:
            raise TryAgain(f"MLflow answered {answer.status_code} to {path}: {answer.text[:200]}")
        return dict(answer.json())

    # --- where to look ------------------------------------------------------------------------------------------

    def run_url(self, run: DagRun) -> str:
        """The grid of a run in Airflow."""
        return f"{self.airflow}/dags/{run.dag}/runs/{run.id}"

    def review_url(self, candidate: Candidate) -> str:
        """Where a candidate's review is answered."""
        return f"{self.run_url(candidate.promote)}/tasks/review/required_actions"

    def version_url(self, candidate: Candidate) -> str:
        """A candidate in MLflow's registry."""
        return f"{self.mlflow}/#/models/{candidate.model}/versions/{candidate.version}"

    def training_url(self, candidate: Candidate) -> str:
        """The MLflow run that trained a candidate."""
        found = self._mlflow("runs/get", run_id=candidate.run_id)
        experiment = found["run"]["info"]["experiment_id"] if found else "0"
        return f"{self.mlflow}/#/experiments/{experiment}/runs/{candidate.run_id}"


def run(set_reference: str, settings: Settings) -> Workflow:
    """Run the workflow up to the reviews and leave Airflow and MLflow up.

    Raises:
        StackError: a task failed.
    """
    workflow = Workflow(set_reference, settings)
    workflow.prepare()
    workflow.run_until_review()
    workflow.read_decisions()
    return workflow


def demo(set_reference: str, settings: Settings, report: Callable[[Workflow, Json], None]) -> None:
    """Run the workflow to its end without a person, and stop Airflow and MLflow whatever happens.

    Args:
        report: gets the workflow and its summary with ``ok`` and ``error``, after a failure too.

    Raises:
        Refused: it came to its end, but not to two champions that the reviewer approved.
        StackError: a task failed.
    """
    workflow = Workflow(set_reference, settings)
    error = "stopped"
    try:
        workflow.prepare()
        workflow.run_until_review()
        workflow.answer_as_reviewer()
        workflow.read_decisions()
        error = "; ".join(workflow.shortcomings())
        if error:
            raise Refused(error)
    except BreakhisError as failure:
        error = str(failure)
        raise
    finally:
        try:
            with _undisturbed():
                workflow.stack.down()
        finally:
            report(workflow, {**workflow.summary(), "ok": not error, "error": error or None})


def _approve(candidate: Candidate, api: AirflowApi) -> bool:
    """Approve a candidate; whether that was news to Airflow, which may have an earlier answer and be busy with it."""
    try:
        api.answer(PROMOTE, candidate.promote.id, REVIEW_TASK, APPROVE, {"reason": REASON})
    except AirflowError as error:
        if error.status != 409:
            raise
        return False
    return True


def _led_on(since: float) -> Callable[[Candidate], bool]:
    """Whether an answer given at ``since`` (of time.monotonic) led to an end, or has to be given again."""

    def judge(candidate: Candidate) -> bool:
        late = time.monotonic() - since > _SECONDS_TO_TAKE_AN_ANSWER
        return candidate.promote.has_ended or (candidate.is_waiting and late)

    return judge


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Let no Ctrl-C or kill get in between: servers that are half stopped would stay behind. It takes seconds."""
    kinds = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(kind, signal.SIG_IGN) for kind in kinds]
    try:
        yield
    finally:
        for kind, handler in zip(kinds, before, strict=True):
            signal.signal(kind, handler)
