"""The reviewers' answers, read from Airflow's own record under a service account.

Neither an XCom nor the state of a task proves an answer, since users may write the one and set the other.
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
"""The reviewer in a record of a rejection by the deadline."""


class Answer(NamedTuple):
    """The answer of one reviewer. Its fields are written to the audit log."""

    reviewer: str
    """Login name."""
    reason: str
    answered: str | None
    """Time of the answer, as Airflow gives it."""


class Answers(NamedTuple):
    """The decision that the reviewers of one run have come to."""

    decision: str
    """An event of :mod:`ml.promotion.alias_history`."""
    answers: tuple[Answer, ...]
    bodies: tuple[str, ...]
    """The review body that each reviewer read."""
    evidence: str | None
    """Id of the evidence that the run is about."""
    user_ids_and_names: frozenset[str]
    """Ids and login names of those who approved."""
    started_by: str | None
    """Login name of the user who started the run."""
    run: str
    """The DAG run, as ``dag/run``."""
    key: str
    """Hash of the answers: a review that was cleared and answered anew is another decision."""


class ReviewRun:
    """One run of a DAG with a review, as Airflow has recorded it.

    Args:
        settings: have Airflow's address, the service account and the reviewers.
        dag: id of the DAG.
        run: id of the run.

    Raises:
        ConfigError: Airflow's address or the service account is not set.
        AirflowError: Airflow has no such run, or cannot be asked.
    """

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
        self.title = f"run {run} of the DAG {dag}"
        self.name = f"{dag}/{run}"
        record = self._api.dag_run(dag, run)
        self._conf = record["conf"] or {}
        self.started_by: str | None = record.get("triggering_user_name")

    @property
    def reason(self) -> str:
        """Returns the reason that the run was started with, empty if it gives none."""
        return parse_reason(self._conf)

    def check_subject(self, model: str, number: str) -> None:
        """Check that the run is about this version.

        Raises:
            Refused: it is about another one.
        """
        subject = (str(self._conf.get("model")), str(self._conf.get("version")))
        if subject != (model, str(number)):
            raise Refused(f"{self.title} is about {subject[0]} version {subject[1]}, not {model} version {number}")

    def check_not_rejected(self, records: Sequence[Json]) -> None:
        """Check that this run was not ended by a rejection. A cleared review asks again, but the rejection stands.

        Args:
            records: audit records of the model.

        Raises:
            Refused: a reviewer has rejected in this run.
        """
        rejections = (record for record in records if record["event"] == REJECTED and record.get("run") == self.name)
        if rejected := next(rejections, None):
            raise Refused(
                f"{self.title} was ended by {rejected['by']}, who rejected: {rejected['reason']}; start a new run of "
                f"the DAG {self._dag} with the same conf, to have it judged and reviewed anew"
            )

    def check_approvers_independent(self, answers: Answers, training_runs: Sequence[Sequence[str]]) -> None:
        """Check that no approver has started a run that led to the model: a training, or a run that triggered one.

        Args:
            answers: the answers of this run.
            training_runs: DAG and run of each training of the version.

        Raises:
            Refused: an approver has started such a run, or Airflow cannot tell who started one.
        """
        to_check = [(str(dag), str(run)) for dag, run in training_runs] + _parse_origin(self._conf)
        checked: set[tuple[str, str]] = set()
        while to_check:
            dag, run = to_check.pop()
            if (dag, run) in checked:
                continue
            checked.add((dag, run))
            try:
                record = self._api.dag_run(dag, run)
                is_asset_triggered = record.get("run_type") == "asset_triggered"
                events = self._api.upstream_events(dag, run) if is_asset_triggered else []
            except AirflowError as error:
                if error.status != 404:
                    raise
                raise Refused(
                    f"{self.title}: its model was made by run {run} of the DAG {dag}, which Airflow has no more, so it "
                    "cannot be told whose work it is; train it again, with another seed"
                ) from None
            starter = record.get("triggering_user_name")
            if starter in answers.user_ids_and_names:
                raise Refused(
                    f"{self.title}: {starter} started run {run} of the DAG {dag}, which led to this model, and so "
                    "cannot decide about it"
                )
            if any(not event.get("source_run_id") for event in events):
                raise Refused(
                    f"{self.title}: run {run} of the DAG {dag} was begun by an asset event that no run made, so it "
                    "cannot be told whose work it is"
                )
            to_check += [(str(event["source_dag_id"]), str(event["source_run_id"])) for event in events]
            to_check += _parse_origin(record.get("conf"))

    def read_answers(self, model: str, number: str, evidence: str | None) -> Answers:
        """Returns the reviewers' answers in this run.

        Args:
            model: the registered model that the run must be about.
            number: its version, likewise.
            evidence: id of the evidence, likewise; None accepts any.

        Raises:
            Refused: the run is about something else, a review is unanswered, or an answer does not count: it is not a
                reviewer's, it is of the user who started the run, or it has no reason.
        """
        self.check_subject(model, number)
        conf_evidence = str(self._conf["evidence"]) if "evidence" in self._conf else None
        if evidence and evidence != conf_evidence:
            raise Refused(f"{self.title} is about {conf_evidence}, not {evidence}")
        answers: list[Answer] = []
        bodies: list[str] = []
        names: set[str] = set()
        for task in review_tasks(self._dag):
            detail = self._read_review(task)
            if detail is None:
                break
            answer, is_rejection = self._parse_answer(task, detail)
            if is_rejection:
                return self._make_answers(REJECTED, [answer], [], conf_evidence, set())
            if answer.reviewer in (earlier.reviewer for earlier in answers):
                raise Refused(f"{self.title}: {answer.reviewer} approved twice; the second has to be somebody else")
            answers.append(answer)
            bodies.append(detail.get("body") or "")
            names |= {detail["responded_by_user"]["id"], detail["responded_by_user"]["name"]}
        return self._make_answers(APPROVED, answers, bodies, conf_evidence, names)

    def _make_answers(
        self, decision: str, answers: list[Answer], bodies: list[str], evidence: str | None, names: set[str]
    ) -> Answers:
        key = digest([self._dag, self._run, decision, [list(answer) for answer in answers], evidence])
        return Answers(
            decision, tuple(answers), tuple(bodies), evidence, frozenset(names), self.started_by, self.name, key
        )

    def _read_review(self, task: str) -> Json | None:
        """Returns Airflow's record of one review, or None where a second or third review was not asked for."""
        is_first = task == review_tasks(self._dag)[0]
        try:
            detail = self._api.hitl_detail(self._dag, self._run, task)
        except AirflowError as error:
            if error.status == 404 and not is_first:
                return None
            raise
        if not detail.get("response_received"):
            raise Refused(f"{self.title}: nobody answered its {task}, so nothing is promoted")
        return detail

    def _parse_answer(self, task: str, detail: Json) -> tuple[Answer, bool]:
        """Returns the answer in a review's record, and whether it rejects.

        Raises:
            Refused: the answer does not count.
        """
        user, chosen = detail.get("responded_by_user"), detail.get("chosen_options")
        if not user:
            if chosen != [REJECT]:
                raise Refused(f"{self.title}: nobody answered its {task}, so nothing is promoted")
            return Answer(NOBODY_IN_TIME, "nobody answered in time", detail.get("responded_at")), True
        # Reviewers are known by login name: an id is a number where Airflow keeps its users in its database.
        if user["name"] not in self._reviewers:
            raise Refused(
                f"{self.title}: {user['name']} answered, but is not one of the reviewers (BREAKHIS_REVIEWERS)"
            )
        if self.started_by == user["name"]:
            raise Refused(f"{self.title}: {user['name']} started it and so cannot decide it")
        if chosen not in ([APPROVE], [REJECT]):
            raise Refused(f"{self.title}: its {task} was answered {chosen}, which decides nothing")
        reason = parse_reason(detail.get("params_input"))
        if not reason:
            raise Refused(f"{self.title}: {user['name']} gave no reason; clear the task {task} to be asked again")
        return Answer(user["name"], reason, detail.get("responded_at")), chosen == [REJECT]


def _parse_origin(conf: Json | None) -> list[tuple[str, str]]:
    """Returns DAG and run that a run was triggered by, as its conf says; empty where the conf names none."""
    origin = (conf or {}).get("origin")
    return [(str(origin.get("dag")), str(origin.get("run")))] if isinstance(origin, dict) else []
