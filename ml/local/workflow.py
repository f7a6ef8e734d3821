"""Runs the whole workflow through the local Airflow, as a person would.

:func:`run_workflow` goes up to where a person is needed: promotions wait for their review. :func:`run_demo` goes on
without one: a reviewer's account answers over Airflow's REST API, and the champions that follow are checked in MLflow's
registry.
"""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import requests

from ml.core.airflow_api import AirflowApi
from ml.core.errors import AirflowError, BreakhisError, Refused, StackError, TryAgain
from ml.core.messages import cut_text
from ml.core.mlflow_pages import build_run_url, build_version_url
from ml.core.progress import say
from ml.core.settings import Settings
from ml.data.sources import load_source
from ml.data.training_sets import TrainingSet, load_training_set
from ml.local.candidate import Candidate
from ml.local.stack import Stack
from ml.local.watch import DagRun, RunWatcher, task_label
from ml.promotion.reviews import APPROVE, PROMOTE, REVIEW_TASK

Json = dict[str, Any]

ENGINEER = "engineer"
REASON = "Approved by a script (breakhis demo): all gates passed. No person has looked at the evidence."

_SECONDS_BEFORE_ANSWERING = 5.0
_SECONDS_TO_TAKE_AN_ANSWER = 30.0
_MAX_ANSWERS = 4
"""How often a review is answered. Within a second of the question an answer can be lost, since Airflow may still be
putting the review's task to wait."""
_LINES_OF_LOG = 25


class Workflow:
    """One training set's workflow on the local stack: ingestion, retraining, gates, reviews and champions.

    Args:
        set_reference: the name of a training set, or the path of its YAML file.
        settings: of the stack.

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

    # --- in this order ------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Starts the stack, checks that the DAGs needed are there, and unpauses all but the retraining's.

        Raises:
            StackError: a server does not start, or a DAG is missing.
        """
        state = self.stack.up(extra_set=self.training_set.file)
        problems = self.stack.check_dags(state)
        for problem in problems:
            say(f"warning: {problem}")
        self.airflow = state.services["airflow"].url
        self.mlflow = state.services["mlflow"].url
        api = self.stack.api(ENGINEER)
        self.watch = RunWatcher(api, self.started)
        known = {dag["dag_id"] for dag in api.dags()}
        needed = [*(f"ingest_{name}" for name in self.sources), self.retrain.dag, PROMOTE]
        missing = [dag for dag in needed if dag not in known]
        if missing:
            raise StackError(f"Airflow has no DAG {', '.join(missing)}; see the warnings above")
        for dag in needed:
            if dag != self.retrain.dag:  # else the sources' first versions would start it, too
                api.unpause(dag)

    def run_until_review(self) -> None:
        """Ingests, retrains, and waits until each candidate waits for its review, is blocked or is decided.

        Raises:
            StackError: a task failed; the end of its log has been shown.
        """
        api, watch = self.stack.api(ENGINEER), self.watch
        ingests = [DagRun(dag, api.trigger(dag)["dag_run_id"]) for dag in (f"ingest_{name}" for name in self.sources)]
        watch.wait_until(lambda run: run.has_ended, ingests, self._check_servers)
        for run in ingests:
            self._require_success(run)
        api.unpause(self.retrain.dag)
        self.retrain.id = api.trigger(self.retrain.dag)["dag_run_id"]
        watch.wait_until(lambda run: run.has_ended, [self.retrain], self._check_servers)
        self._require_success(self.retrain)
        self.split = self._read_result(self.retrain, "split")
        shards = [task for task in self.retrain.tasks if task["task_id"] == "features"]
        counts = [self._read_result(self.retrain, "features", shard["map_index"]) for shard in shards]
        self.features = {name: sum(count[name] for count in counts) for name in ("images", "extracted", "cached")}
        for task in self.training_set.models:
            trained = self._read_result(self.retrain, f"train_{task}")
            registered = self._read_result(self.retrain, f"register_{task}")
            model, version = registered["model"], str(registered["version"])
            promote = DagRun(PROMOTE, f"{model}-v{version}")
            self.candidates.append(Candidate(task, model, version, trained["run_id"], trained["metrics"], promote))
        self._follow_candidates(lambda candidate: candidate.is_settled)
        for candidate in self.candidates:
            self._read_gates(candidate)
            # A blocking gate is an outcome like any other; whatever else fails is not.
            if candidate.passed is not False and candidate.promote.state == "failed":
                self._require_success(candidate.promote)

    def answer_as_reviewer(self) -> None:
        """Approves, as the first reviewer, each candidate whose review waits, and waits for its promotion to end.

        Raises:
            StackError: a promotion failed, or the review still waits after four answers.
        """
        reviewer = self.stack.settings.reviewers[0]
        api = self.stack.api(reviewer)
        approved: list[Candidate] = []
        for _ in range(_MAX_ANSWERS):
            # An answer that Airflow lost, since it was still putting the task to wait, is given again.
            waiting = [candidate for candidate in self.candidates if candidate.is_waiting]
            if not waiting:
                break
            time.sleep(_SECONDS_BEFORE_ANSWERING)
            for candidate in waiting:
                if _approve(candidate, api):
                    say(f"{reviewer} approved {candidate.promote.id}")
            approved = approved or waiting
            self._follow_candidates(_has_followed(answered=time.monotonic()))
        for candidate in approved:
            if candidate.is_waiting:
                raise StackError(
                    f"{candidate.promote.id} was approved {_MAX_ANSWERS} times and still waits for its review; see "
                    f"{self.review_url(candidate)}"
                )
            self._require_success(candidate.promote)

    def read_decisions(self) -> None:
        """Reads each candidate's decision in Airflow's own record, and its model's champion in MLflow's registry."""
        api = self.stack.api(ENGINEER)
        for candidate in self.candidates:
            candidate.champion = self._read_champion(candidate.model)
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
        """Returns why not every model has a champion that the first reviewer has just approved; [] if each has."""
        reviewer = self.stack.settings.reviewers[0]
        problems = [] if len(self.candidates) == len(self.training_set.models) else ["not every model was trained"]
        for candidate in self.candidates:
            name = f"{candidate.model} version {candidate.version}"
            if candidate.passed is False:
                problems.append(f"{name} was blocked by its gates: {candidate.failing}")
            elif (candidate.decision, candidate.reviewer) != (APPROVE, reviewer):
                problems.append(f"{name} was not approved by {reviewer} (but: {candidate.decision or 'no answer'})")
            elif candidate.champion != candidate.version:
                problems.append(f"{name} is not the champion (which is: {candidate.champion or 'none'})")
        return problems

    def summary(self) -> Json:
        """Returns the whole workflow as JSON."""
        return {
            "set": self.training_set.name,
            "seconds": round(time.monotonic() - self.started, 1),
            "retrain": self.retrain.id,
            "split": self.split,
            "features": self.features,
            "models": [candidate.summary() for candidate in self.candidates],
        }

    # --- steps --------------------------------------------------------------------------------------------------

    def _follow_candidates(self, is_done: Callable[[Candidate], bool]) -> None:
        by_run = {candidate.promote.id: candidate for candidate in self.candidates}
        runs = [candidate.promote for candidate in self.candidates]
        self.watch.wait_until(lambda run: is_done(by_run[run.id]), runs, self._check_servers)

    def _check_servers(self) -> None:
        state = self.stack.state()
        for name, service in state.services.items() if state else ():
            if not service.process.is_alive():
                raise StackError(f"{name} has ended in the meantime; its log is {service.log}")
        if state is None:
            raise StackError("the local stack was stopped in the meantime")

    def _require_success(self, run: DagRun) -> None:
        if run.state == "success":
            return
        api = self.stack.api(ENGINEER)
        for task in run.failed_tasks():
            tried = max(task["try_number"], 1)
            say(f"\n{run.dag}: {task_label(task)} failed. The end of its log:")
            for line in api.task_log(run.dag, run.id, task["task_id"], tried, task["map_index"])[-_LINES_OF_LOG:]:
                say(f"  {line}")
        where = ", ".join(task_label(task) for task in run.failed_tasks()) or "the run"
        raise StackError(f"{where} failed in {run.dag}; the whole log: {self.run_url(run)}")

    def _read_result(self, run: DagRun, task: str, map_index: int = -1) -> Json:
        try:
            result = self.stack.api(ENGINEER).xcom(run.dag, run.id, task, map_index)
        except AirflowError as error:
            raise StackError(f"{task} in {run.dag} left no result ({error}); see {self.run_url(run)}") from None
        if not isinstance(result, dict):
            raise StackError(f"{task} in {run.dag} returned {result!r}, which is no stage's result")
        return result

    def _read_gates(self, candidate: Candidate) -> None:
        """Reads the gates' verdict, which is there where a gate blocks, too, but not where the stage itself failed."""
        try:
            verdict = self.stack.api(ENGINEER).xcom(PROMOTE, candidate.promote.id, "gate")
        except AirflowError as error:
            if error.status != 404:
                raise
            return
        candidate.gates, candidate.passed = verdict["gates"], bool(verdict["passed"])

    def _read_champion(self, model: str) -> str:
        """Returns the version with the alias ``champion`` in MLflow's registry; an empty text if there is none."""
        answer = self._mlflow("registered-models/alias", name=model, alias="champion")
        return str(answer["model_version"]["version"]) if answer else ""

    def _mlflow(self, path: str, **params: str) -> Json | None:
        """Returns MLflow's answer over its REST API; None if there is no such thing.

        Importing MLflow's client would take seconds.

        Raises:
            TryAgain: MLflow does not answer, or answers otherwise.
        """
        try:
            with requests.Session() as session:
                session.trust_env = False  # the server is on this machine: no proxy
                session.auth = (ENGINEER, self.stack.passwords()[ENGINEER])
                answer = session.get(f"{self.mlflow}/api/2.0/mlflow/{path}", params=params, timeout=60)
        except requests.RequestException as error:
            raise TryAgain(f"MLflow at {self.mlflow} does not answer: {type(error).__name__}") from error
        if answer.status_code in {400, 404}:  # a missing alias is an "invalid parameter value"
            return None
        if answer.status_code != 200:
            raise TryAgain(f"MLflow answered {answer.status_code} to {path}: {cut_text(answer.text)}")
        return dict(answer.json())

    # --- addresses ----------------------------------------------------------------------------------------------

    def run_url(self, run: DagRun) -> str:
        """Returns the address of a run's grid in Airflow."""
        return f"{self.airflow}/dags/{run.dag}/runs/{run.id}"

    def review_url(self, candidate: Candidate) -> str:
        """Returns the address of the form in which a candidate's review is answered."""
        return f"{self.run_url(candidate.promote)}/tasks/review/required_actions"

    def version_url(self, candidate: Candidate) -> str:
        """Returns the address of a candidate in MLflow's registry."""
        return build_version_url(self.mlflow, candidate.model, candidate.version)

    def training_url(self, candidate: Candidate) -> str:
        """Returns the address of the MLflow run that trained a candidate."""
        answer = self._mlflow("runs/get", run_id=candidate.run_id)
        experiment = answer["run"]["info"]["experiment_id"] if answer else "0"
        return build_run_url(self.mlflow, str(experiment), candidate.run_id)


def run_workflow(set_reference: str, settings: Settings) -> Workflow:
    """Runs the workflow up to the reviews, and leaves Airflow and MLflow running.

    Raises:
        StackError: a task failed.
    """
    workflow = Workflow(set_reference, settings)
    workflow.prepare()
    workflow.run_until_review()
    workflow.read_decisions()
    return workflow


def run_demo(set_reference: str, settings: Settings, report: Callable[[Workflow, Json], None]) -> None:
    """Runs the workflow to its end without a person, and stops Airflow and MLflow whatever happens.

    Args:
        set_reference: the name of a training set, or the path of its YAML file.
        settings: of the stack.
        report: called with the workflow and its summary with ``ok`` and ``error``, after a failure, too.

    Raises:
        Refused: not every model has a champion that the reviewer approved.
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
            with _ignore_signals():
                workflow.stack.down()
        finally:
            report(workflow, {**workflow.summary(), "ok": not error, "error": error or None})


def _approve(candidate: Candidate, api: AirflowApi) -> bool:
    """Approves a candidate; returns False if Airflow is still busy with an earlier answer."""
    try:
        api.answer(PROMOTE, candidate.promote.id, REVIEW_TASK, APPROVE, {"reason": REASON})
    except AirflowError as error:
        if error.status != 409:
            raise
        return False
    return True


def _has_followed(answered: float) -> Callable[[Candidate], bool]:
    """Returns a test of whether the promotion has ended after an answer, or the answer has to be given again.

    Args:
        answered: when the answer was given (time.monotonic).
    """

    def is_done(candidate: Candidate) -> bool:
        is_late = time.monotonic() - answered > _SECONDS_TO_TAKE_AN_ANSWER
        return candidate.promote.has_ended or (candidate.is_waiting and is_late)

    return is_done


@contextmanager
def _ignore_signals() -> Iterator[None]:
    """Ignores Ctrl-C and kill within the block, which takes seconds: servers that are half stopped would stay."""
    signals = (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.signal(number, signal.SIG_IGN) for number in signals]
    try:
        yield
    finally:
        for number, handler in zip(signals, handlers, strict=True):
            signal.signal(number, handler)
