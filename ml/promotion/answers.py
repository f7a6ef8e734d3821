"""The reviewers' answers, read from Airflow's own record under a service account.

Neither an XCom nor the state of a task proves an answer, since users may write the one and set the other.
"""

from collections.abc import Sequence
from typing import NamedTuple

from ml.core.airflow_api import connect_airflow
from ml.core.errors import AirflowError, Refused
from ml.core.hashes import digest
from ml.core.messages import cut_text
from ml.core.settings import Settings
from ml.core.store import Json
from ml.promotion.alias_history import APPROVED, ASKED, DECISION_EVENTS, NOBODY_IN_TIME, REJECTED
from ml.promotion.reviews import APPROVE, PROMOTE, REJECT, parse_reason, review_tasks
from ml.promotion.starters import Starters, parse_origin, trace_starters


class Answer(NamedTuple):
    """The answer of one reviewer. Its fields are written to the audit log."""

    reviewer: str
    """Login name."""
    reason: str
    answered: str | None
    """Time of the answer, as Airflow gives it."""


class Question(NamedTuple):
    """What a reviewer read. Whoever may write XComs can have had Airflow ask something else."""

    title: str
    body: str


class Answers(NamedTuple):
    """The decision that the reviewers of one run have come to."""

    decision: str
    """An event of :mod:`ml.promotion.alias_history`."""
    answers: tuple[Answer, ...]
    questions: tuple["Question", ...]
    """What each reviewer read."""
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
        self._api = connect_airflow(settings)
        self._reviewers = settings.reviewers
        self._dag, self._run = dag, run
        self.title = f"run {run} of the DAG {dag}"
        self.name = f"{dag}/{run}"
        record = self._api.dag_run(dag, run)
        self._conf = record["conf"] or {}
        self.started_by: str | None = record.get("triggering_user_name")
        self._run_after = str(record.get("run_after"))

    @property
    def _evidence(self) -> str | None:
        return _parse_evidence(self._conf)

    @property
    def is_although_withdrawn(self) -> bool:
        """Returns whether the run was started in the knowledge that its version was withdrawn."""
        return self._conf.get("although_withdrawn") is True

    @property
    def reason(self) -> str:
        """Returns the reason that the run was started with, empty if it gives none."""
        return parse_reason(self._conf)

    def check_subject(self, model: str, number: str) -> None:
        """Check that the run is about this version.

        Raises:
            Refused: it is about another one.
        """
        if _parse_subject(self._conf) != (model, int(number)):
            subject = f"{self._conf.get('model')} version {self._conf.get('version')}"
            raise Refused(f"{self.title} is about {cut_text(subject)}, not {model} version {number}")

    def check_not_rejected(self, records: Sequence[Json]) -> None:
        """Check that this run was not ended by a rejection. A cleared review asks again, but the rejection stands.

        Args:
            records: audit records of the model.

        Raises:
            Refused: it was rejected in this run, by a reviewer or by the deadline.
        """
        rejections = (record for record in records if record["event"] == REJECTED and record.get("run") == self.name)
        if rejected := next(rejections, None):
            raise Refused(
                f"{self.title} was ended by {rejected['by']}, who rejected: {rejected['reason']}; start a new run of "
                f"the DAG {self._dag} with the same conf, to have it judged and reviewed anew"
            )

    def check_approvers_independent(self, answers: Answers, evidence: Json, records: Sequence[Json]) -> None:
        """Check that no approver has started a run that led to the model: a training, or a run that triggered one.

        Args:
            answers: the answers of this run.
            evidence: evidence of the version. That of earlier releases names its training runs, but not who started
                them: Airflow is asked then.
            records: audit records of the model.

        Raises:
            Refused: an approver has started such a run, or it cannot be told who started one.
        """
        runs = parse_origin(self._conf)
        if "starters" in evidence:
            known = Starters.of_json(evidence["starters"])
        else:
            runs += [(str(dag), str(run)) for dag, run in evidence.get("dag_runs", [])]
            says_nothing = "its MLflow run does not say which run of a DAG trained it"
            known = Starters({}, "" if evidence.get("dag_runs") else says_nothing)
        for starters in (known, trace_starters(runs, self._api, records)):
            for user, run in starters.users.items():
                if user in answers.user_ids_and_names:
                    dag, _, name = run.partition("/")
                    raise Refused(
                        f"{self.title}: {user} started run {cut_text(name)} of the DAG {cut_text(dag)}, which led to "
                        "this model, and so cannot decide about it"
                    )
            if starters.unknown:
                raise Refused(f"{self.title}: {explain_unknown_starters(starters.unknown)}")

    def find_unrecorded_rejection(self, model: str, number: str) -> Answers | None:
        """Returns a reviewer's rejection that Airflow has and the audit log has not, or None if there is none.

        It may have been answered in this run before or after its review was cleared or, of a promotion, in another run
        about the same version and evidence whose DAG was paused before it could carry the answer out.

        Args:
            model: the registered model.
            number: its version.
        """
        evidence, runs = self._evidence, {self._run: self.started_by}
        if self._dag == PROMOTE:
            for other in self._api.dag_runs(PROMOTE):
                conf = other.get("conf") or {}
                if (*_parse_subject(conf), _parse_evidence(conf)) == (model, int(number), evidence):
                    runs[other["dag_run_id"]] = other.get("triggering_user_name")
        for run, started_by in runs.items():
            for task in review_tasks(self._dag):
                for detail in self._api.list_hitl_details(self._dag, run, task):
                    # Airflow takes answers of the users whom the task asked. A reviewer in the setting may be one no
                    # more, which does not undo what was answered.
                    if is_rejection(detail, started_by):
                        reviewer, reason = detail["responded_by_user"]["name"], parse_reason(detail["params_input"])
                        answer = Answer(reviewer, reason, detail.get("responded_at"))
                        key = _digest_answers(self._dag, run, REJECTED, [answer], evidence)
                        name = f"{self._dag}/{run}"
                        return Answers(REJECTED, (answer,), (), evidence, frozenset(), started_by, name, key)
        return None

    def check_questions_are_there(self, number: int, records: Sequence[Json]) -> None:
        """Check that Airflow still has each review in which reviewers were asked, unless a decision settled it.

        Args:
            number: the version.
            records: audit records of the model.

        Raises:
            Refused: it has one no more, and nothing says what was answered there.
        """
        for asked in self._list_open_questions(number, records):
            run = asked["run"].partition("/")[2]
            is_there = asked["review"] in self._reviews_of(run) if "review" in asked else self._is_begun(run, asked)
            if not is_there:
                raise Refused(
                    f"{self.title}: reviewers were asked about this version in run {run} as well, where the review was "
                    "deleted from Airflow before a decision was recorded; so it is not known whether one has rejected "
                    "it; train it again, with another seed"
                )

    def list_settled_reviews(self, number: int, records: Sequence[Json]) -> list[str]:
        """Returns the ids of this run's reviews that a decision of it settles: those that Airflow still has."""
        asked = [record for record in self._list_open_questions(number, records) if record["run"] == self.name]
        own = [record["review"] for record in asked if "review" in record]
        there = self._reviews_of(self._run) if own else frozenset()
        return [review for review in own if review in there]

    def _list_open_questions(self, number: int, records: Sequence[Json]) -> list[Json]:
        """Returns the records of questions about the version and this run's evidence that no decision has settled."""
        decisions = [record for record in records if record["event"] in DECISION_EVENTS]
        settled = {review for record in decisions for review in record.get("reviews", ())}
        # Questions of earlier releases have no id: a later decision of the run settles them.
        decided = {record.get("run"): record["sequence"] for record in decisions}
        return [
            record
            for record in records
            if (record["event"], record.get("version"), record.get("evidence")) == (ASKED, number, self._evidence)
            and record.get("review") not in settled
            and ("review" in record or decided.get(record["run"], 0) <= record["sequence"])
        ]

    def _reviews_of(self, run: str) -> frozenset[str]:
        """Returns the ids of the reviews of a promotion that Airflow has, of all tries."""
        return frozenset(self._api.list_asked_reviews(run))

    def _is_begun(self, run: str, asked: Json) -> bool:
        """Returns whether Airflow has the run in which an earlier release has asked, by the time of its start."""
        try:
            run_after = self._run_after if run == self._run else str(self._api.dag_run(PROMOTE, run).get("run_after"))
        except AirflowError as error:
            if error.status != 404:
                raise
            return False
        return run_after == str(asked["begun"])

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
        conf_evidence = self._evidence
        if evidence and evidence != conf_evidence:
            raise Refused(f"{self.title} is about {cut_text(conf_evidence)}, not {evidence}")
        answers: list[Answer] = []
        questions: list[Question] = []
        names: set[str] = set()
        for task in review_tasks(self._dag):
            detail = self._read_review(task)
            if detail is None:
                break
            answer, rejects = self._parse_answer(task, detail)
            if rejects:
                return self._make_answers(REJECTED, [answer], [], conf_evidence, set())
            if answer.reviewer in (earlier.reviewer for earlier in answers):
                raise Refused(f"{self.title}: {answer.reviewer} approved twice; the second has to be somebody else")
            answers.append(answer)
            questions.append(Question(detail.get("subject") or "", detail.get("body") or ""))
            names |= {detail["responded_by_user"]["id"], detail["responded_by_user"]["name"]}
        return self._make_answers(APPROVED, answers, questions, conf_evidence, names)

    def _make_answers(
        self, decision: str, answers: list[Answer], questions: list[Question], evidence: str | None, names: set[str]
    ) -> Answers:
        key = _digest_answers(self._dag, self._run, decision, answers, evidence)
        return Answers(
            decision, tuple(answers), tuple(questions), evidence, frozenset(names), self.started_by, self.name, key
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
            raise Refused(f"{self.title}: its {task} was answered {cut_text(chosen)}, which decides nothing")
        reason = parse_reason(detail.get("params_input"))
        if not reason:
            raise Refused(f"{self.title}: {user['name']} gave no reason; clear the task {task} to be asked again")
        return Answer(user["name"], reason, detail.get("responded_at")), chosen == [REJECT]


def is_rejection(detail: Json, started_by: str | None) -> bool:
    """Returns whether a reviewer has rejected in a review, with a reason and not in a run that they started.

    Args:
        detail: Airflow's record of the review; see :meth:`ml.core.airflow_api.AirflowApi.hitl_detail`.
        started_by: login name of the user who started the run.
    """
    user = detail.get("responded_by_user")
    if not user or detail.get("chosen_options") != [REJECT]:
        return False
    return bool(parse_reason(detail.get("params_input"))) and bool(user["name"] != started_by)


def explain_unknown_starters(unknown: str) -> str:
    """Returns, in words, that nobody may approve a version, and what to do."""
    return (
        f"it cannot be told whose work the model is, so nobody is entitled to approve it: {unknown}; train it again by "
        "its DAG retrain, with another seed"
    )


def _parse_subject(conf: Json) -> tuple[str, int | None]:
    """Returns the model that a run is about, and its version as MLflow reads the number; None if it is none."""
    try:
        version = int(str(conf.get("version")))
    except ValueError:
        version = None
    return str(conf.get("model")), version


def _parse_evidence(conf: Json) -> str | None:
    """Returns the id of the evidence that a run is about, as its conf says."""
    return str(conf["evidence"]) if "evidence" in conf else None


def _digest_answers(dag: str, run: str, decision: str, answers: Sequence[Answer], evidence: str | None) -> str:
    return digest([dag, run, decision, [list(answer) for answer in answers], evidence])
