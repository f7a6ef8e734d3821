"""What the people who were asked have answered, read from Airflow's own record under a service account.

Neither an XCom nor the state of a task proves anything, since users may write the one and set the other.
"""

from collections.abc import Sequence
from typing import NamedTuple

from ml.core.airflow_api import AirflowApi
from ml.core.errors import AirflowError, ConfigError, Refused
from ml.core.settings import Settings
from ml.core.store import Json, digest
from ml.promotion.alias_history import APPROVED, REJECTED
from ml.promotion.reviews import APPROVE, REJECT, parse_reason, review_tasks

NOBODY_IN_TIME = "(nobody, by the deadline)"
"""Who rejects what nobody answered in time."""


class Answer(NamedTuple):
    """One person's."""

    reviewer: str
    reason: str
    answered: str | None


class Answers(NamedTuple):
    """What the people asked have decided."""

    decision: str
    answers: tuple[Answer, ...]
    bodies: tuple[str, ...]
    """What each of them read."""
    evidence: str | None
    user_ids_and_names: frozenset[str]
    """Ids and names of those who did."""
    started_by: str | None
    run: str
    """The run of the DAG, as ``dag/run``."""
    key: str
    """The same for the same answers: a review that was cleared and answered anew is another decision."""


class ReviewRun:
    """One run of a DAG in which something is decided, as Airflow has recorded it."""

    def __init__(self, settings: Settings, dag: str, run: str) -> None:
        if not (settings.airflow_url and settings.airflow_user):
            raise ConfigError(
                "promotion reads the reviewers' answers from Airflow: set BREAKHIS_AIRFLOW_URL, BREAKHIS_AIRFLOW_USER "
                "and BREAKHIS_AIRFLOW_PASSWORD (in Airflow: the connection breakhis_airflow)"
            )
        self._api = AirflowApi(
            settings.airflow_url, settings.airflow_user, settings.airflow_password.get_secret_value()
        )
        self._reviewers = settings.reviewers
        self._dag, self._run = dag, run
        self.where = f"run {run} of the DAG {dag}"
        self.name = f"{dag}/{run}"
        told = self._api.dag_run(dag, run)
        self._conf = told["conf"] or {}
        self.started_by: str | None = told.get("triggering_user_name")

    @property
    def reason(self) -> str:
        """The reason that the run was started with."""
        return parse_reason(self._conf)

    def check_subject(self, model: str, number: str) -> None:
        """Check that the run is about this version."""
        about = (str(self._conf.get("model")), str(self._conf.get("version")))
        if about != (model, str(number)):
            raise Refused(f"{self.where} is about {about[0]} version {about[1]}, not {model} version {number}")

    def check_not_rejected(self, records: Sequence[Json]) -> None:
        """Check that nobody has rejected in this run: a review that is cleared asks again, but its end was decided."""
        own = (one for one in records if one["event"] == REJECTED and one.get("run") == self.name)
        if rejected := next(own, None):
            raise Refused(
                f"{self.where} was ended by {rejected['by']}, who rejected: {rejected['reason']}; start a new run of "
                f"the DAG {self._dag} with the same conf, to have it judged and reviewed anew"
            )

    def check_not_theirs(self, answers: Answers, trained_in: Sequence[Sequence[str]]) -> None:
        """Check that none who approved has started any of the runs on the way: of training, or of what these began by.

        Args:
            answers: of the run.
            trained_in: DAG and run of each training of the version.

        Raises:
            Refused: one of them did, or it cannot be told who started a run.
        """
        ahead = [(str(dag), str(run)) for dag, run in trained_in] + _origin(self._conf)
        seen: set[tuple[str, str]] = set()
        while ahead:
            dag, run = one = ahead.pop()
            if one in seen:
                continue
            seen.add(one)
            try:
                told = self._api.dag_run(dag, run)
                asset = told.get("run_type") == "asset_triggered"
                events = self._api.upstream_events(dag, run) if asset else []
            except AirflowError as error:
                if error.status != 404:
                    raise
                raise Refused(
                    f"{self.where}: its model was made by run {run} of the DAG {dag}, which Airflow has no more, so it "
                    "cannot be told whose work it is; train it again, with another seed"
                ) from None
            starter = told.get("triggering_user_name")
            if starter in answers.user_ids_and_names:
                raise Refused(
                    f"{self.where}: {starter} started run {run} of the DAG {dag}, which led to this model, and so "
                    "cannot decide about it"
                )
            if any(not event.get("source_run_id") for event in events):
                raise Refused(
                    f"{self.where}: run {run} of the DAG {dag} was begun by an asset event that no run made, so it "
                    "cannot be told whose work it is"
                )
            ahead += [(str(event["source_dag_id"]), str(event["source_run_id"])) for event in events]
            ahead += _origin(told.get("conf"))

    def answers(self, model: str, number: str, evidence: str | None) -> Answers:
        """What was answered in the run, by people who may.

        Raises:
            Refused: it does not count as an answer.
        """
        self.check_subject(model, number)
        asked = str(self._conf["evidence"]) if "evidence" in self._conf else None
        if evidence and evidence != asked:
            raise Refused(f"{self.where} is about {asked}, not {evidence}")
        given: list[Answer] = []
        bodies: list[str] = []
        names: set[str] = set()
        for task in review_tasks(self._dag):
            detail = self._detail(task)
            if detail is None:
                break
            answer, rejects = self._read(task, detail)
            if rejects:
                return self._told(REJECTED, [answer], [], asked, set())
            if answer.reviewer in (one.reviewer for one in given):
                raise Refused(f"{self.where}: {answer.reviewer} approved twice; the second has to be somebody else")
            given.append(answer)
            bodies.append(detail.get("body") or "")
            names |= {detail["responded_by_user"]["id"], detail["responded_by_user"]["name"]}
        return self._told(APPROVED, given, bodies, asked, names)

    def _told(
        self, decision: str, given: list[Answer], bodies: list[str], asked: str | None, names: set[str]
    ) -> Answers:
        key = digest([self._dag, self._run, decision, [list(one) for one in given], asked])
        return Answers(decision, tuple(given), tuple(bodies), asked, frozenset(names), self.started_by, self.name, key)

    def _detail(self, task: str) -> Json | None:
        """What Airflow has of one review; None of a further one that was not asked for."""
        first = task == review_tasks(self._dag)[0]
        try:
            detail = self._api.hitl_detail(self._dag, self._run, task)
        except AirflowError as error:
            if error.status == 404 and not first:
                return None
            raise
        if not detail.get("response_received"):
            raise Refused(f"{self.where}: nobody answered its {task}, so nothing is promoted")
        return detail

    def _read(self, task: str, detail: Json) -> tuple[Answer, bool]:
        """One answer, and whether it rejects."""
        user, chosen = detail.get("responded_by_user"), detail.get("chosen_options")
        if not user:
            if chosen != [REJECT]:
                raise Refused(f"{self.where}: nobody answered its {task}, so nothing is promoted")
            return Answer(NOBODY_IN_TIME, "nobody answered in time", detail.get("responded_at")), True
        # By the login name: an id is a number where Airflow's users are in its database.
        if user["name"] not in self._reviewers:
            raise Refused(
                f"{self.where}: {user['name']} answered, but is not one of the reviewers (BREAKHIS_REVIEWERS)"
            )
        if self.started_by == user["name"]:
            raise Refused(f"{self.where}: {user['name']} started it and so cannot decide it")
        if chosen not in ([APPROVE], [REJECT]):
            raise Refused(f"{self.where}: its {task} was answered {chosen}, which decides nothing")
        reason = parse_reason(detail.get("params_input"))
        if not reason:
            raise Refused(f"{self.where}: {user['name']} gave no reason; clear the task {task} to be asked again")
        return Answer(user["name"], reason, detail.get("responded_at")), chosen == [REJECT]


def _origin(conf: Json | None) -> list[tuple[str, str]]:
    """DAG and run that a run was handed over by, as its conf says."""
    said = (conf or {}).get("origin")
    return [(str(said.get("dag")), str(said.get("run")))] if isinstance(said, dict) else []
