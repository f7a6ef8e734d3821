"""Promotion, rollback and withdrawal: carries out what people decided, after checking for itself that they did.

Neither an XCom nor the state of a task proves anything, since users may write the one and set the other. What counts is
Airflow's own record of the answers, read under a service account, and gates that pass on exactly what was reviewed.

A decision is first written to the audit log and then carried out. What the aliases have to be follows from the log
alone, so whoever comes after a crash brings them there, and what is done twice or late is put right: there is one
champion, and the log says how it came about.
"""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from ml.core.airflow_api import AirflowApi
from ml.core.errors import AirflowError, BreakhisError, ConfigError, Refused, RegistryError, StoreError, TryAgain
from ml.core.leases import exclusively
from ml.core.mlflow_client import connect
from ml.core.progress import say
from ml.core.settings import Settings
from ml.core.store import Json, Store, digest
from ml.evaluation.comparison import is_alike
from ml.promotion.alias_history import (
    APPROVED,
    CARRIED_OUT,
    REJECTED,
    ROLLED_BACK,
    WITHDRAWN,
    Aliases,
    evidence_behind,
    former_champions,
    standing,
    unfinished,
)
from ml.promotion.audit_log import AuditLog, SealedMemos, anchor, last_of
from ml.promotion.evidence import (
    aliases_of,
    anchor_audit,
    anchored,
    anchors,
    evidence_of,
    find_version,
    judge,
    moved,
    our_models,
    read_content,
    set_aliases,
    verified_evidence,
)
from ml.promotion.reviews import (
    APPROVE,
    PROMOTE,
    REJECT,
    ROLLBACK,
    SHORTEST_REASON,
    WITHDRAW,
    bundle_of,
    given_reason,
    review_tasks,
    rollback_body,
    rollback_title,
)

DEADLINE = "(nobody, by the deadline)"
"""Who rejects what nobody answered in time."""

_LONG = timedelta(minutes=10)
"""What is not carried out by then was left by a process that died, and that nobody came after."""


def promote_version(
    model: str, number: str, dag_run: str, store: Store, settings: Settings, *, evidence: str | None = None
) -> Json:
    """Carry out the reviewers' decision on a model version (the ``promote`` stage). Doing it again changes nothing.

    Returns:
        ``{model, version, decision, reviewers, reason, previous, audit}``; ``decision`` is approved or rejected.

    Raises:
        Refused: nobody entitled decided about this version and this evidence, what was reviewed is not what there is
            now, or the gates do not pass.
        ConfigError: Airflow's address, the service account or the audit log's key is not set.
    """
    log, airflow = AuditLog(store, settings), _Airflow(settings, PROMOTE, dag_run)
    answers = airflow.answers(model, number, evidence)

    def decide(records: Sequence[Json]) -> tuple[str, Json]:
        facts = {"evidence": answers.evidence, "champion": standing(records).champion}
        if answers.decision == REJECTED:
            return REJECTED, facts
        airflow.check_not_rejected(records)
        if withdrawn := next((r for r in records if r["event"] == WITHDRAWN and r["version"] == int(number)), None):
            raise Refused(f"{model} version {number} was withdrawn by {withdrawn['by']}: {withdrawn['reason']}")
        # What the gate task has simulated, it has kept where others may write: here it is simulated again.
        memos = SealedMemos(store, settings, is_alike)
        judged = judge(model, number, store, settings, evidence=answers.evidence, records=records, memos=memos)
        if any(body != judged["review"] for body in answers.bodies):
            raise Refused(_what_changed(answers.bodies, judged, store, f"{airflow.where}, {model} version {number}"))
        airflow.check_not_theirs(answers, judged["dag_runs"])
        if not judged["passed"]:
            raise Refused(f"{judged['summary']}; it was approved, but gates come first")
        if len(answers.given) < judged["approvals"]:
            raise Refused(
                f"{airflow.where}: the policy {judged['policy']} asks for {judged['approvals']} reviewers to approve, "
                f"and {len(answers.given)} did"
            )
        return APPROVED, facts | {key: judged[key] for key in ("evidence", "bundle", "bundle_sha256", "policy")}

    return _carry_out(model, int(number), answers, decide, log, store, settings)


def propose_rollback(model: str, number: str, reason: str, store: Store, settings: Settings) -> Json:
    """What a rollback would do, for its review (the ``rollback`` stage with ``--dry-run``).

    Returns:
        ``{model, version, replaces, evidence, bundle, title, review}``; ``bundle`` is what the version was approved on.

    Raises:
        Refused: the version never was champion, or is it now; it is not any more what it was then; or no reason is
            given.
        RegistryError: there is no such version.
    """
    if not given_reason({"reason": reason}):
        raise Refused(f"rollback to {model} version {number}: say why, in at least {SHORTEST_REASON} letters")
    found = aliases_of(model, settings)
    records = AuditLog(store, settings).of(model)
    check_former(model, int(number), records, found)
    evidence = verified_evidence(model, int(number), records, store, settings)
    bundles = {record["version"]: record["bundle"] for record in records if record["event"] == APPROVED}
    return {
        "model": model,
        "version": int(number),
        "replaces": found.champion,
        "evidence": (known := evidence_behind(int(number), records)),
        "bundle": bundles.get(int(number)),
        "title": rollback_title(model, int(number), found.champion),
        "review": rollback_body(evidence, str(known), _shown(model, found.champion, store, settings), reason, bundles),
    }


def roll_back(model: str, number: str, dag_run: str, store: Store, settings: Settings) -> Json:
    """Make a former champion the champion again (the ``rollback`` stage), once a reviewer has confirmed it.

    Returns and raises as :func:`promote_version`; ``decision`` is rolled back or rejected.

    Raises:
        Refused: the version never was champion, or is it now.
    """
    log, airflow = AuditLog(store, settings), _Airflow(settings, ROLLBACK, dag_run)
    answers = airflow.answers(model, number, None)

    def decide(records: Sequence[Json]) -> tuple[str, Json]:
        found = aliases_of(model, settings)
        now = standing(records)
        facts: Json = {"champion": now.champion, "asked": airflow.reason}
        if found.champion != now.champion:
            facts["found"] = found.champion  # moved behind the log's back; this puts it right
        if answers.decision == REJECTED:
            return REJECTED, facts
        airflow.check_not_rejected(records)
        proposed = propose_rollback(model, number, airflow.reason, store, settings)
        if any(body != proposed["review"] for body in answers.bodies):
            raise Refused(
                f"{airflow.where}: what was confirmed is not what there is now: {proposed['title']} Start a new run of "
                f"the DAG {ROLLBACK} with the same conf, to have it confirmed anew"
            )
        return ROLLED_BACK, facts | {"evidence": proposed["evidence"]}

    return _carry_out(model, int(number), answers, decide, log, store, settings)


def withdraw_version(model: str, number: str, dag_run: str, store: Store, settings: Settings) -> Json:
    """Take a waiting candidate back (the ``withdraw`` stage): it can be approved no more.

    Returns and raises as :func:`promote_version`; ``decision`` is withdrawn.

    Raises:
        Refused: the version is the champion.
        RegistryError: there is no such version.
    """
    log, airflow = AuditLog(store, settings), _Airflow(settings, WITHDRAW, dag_run)
    by, reason = airflow.started_by, airflow.reason
    airflow.check_subject(model, number)
    find_version(connect(settings), model, number)
    if not by or not reason:
        raise Refused(f"{airflow.where}: a withdrawal is started by a person, and with a reason")
    key = digest([WITHDRAW, dag_run, by, reason])
    own = Answers(WITHDRAWN, (Answer(by, reason, None),), (), None, frozenset({by}), by, airflow.name, key)

    def decide(records: Sequence[Json]) -> tuple[str, Json]:
        champion = standing(records).champion
        if champion == int(number):
            raise Refused(f"{model} version {number} is the champion; put another one in its place with a rollback")
        return WITHDRAWN, {"champion": champion}

    return _carry_out(model, int(number), own, decide, log, store, settings)


def _shown(model: str, champion: int | None, store: Store, settings: Settings) -> Json | None:
    """What to show of the champion that would go; if it was tampered with, that is a reason to let it go."""
    if champion is None:
        return None
    try:
        evidence = evidence_of(model, champion, store, settings)
    except BreakhisError:
        evidence = None
    return evidence or {"version": champion, "metrics": {}}


def check_former(model: str, number: int, records: Sequence[Json], found: Aliases) -> None:
    """Check that a version can be rolled back to.

    Raises:
        Refused: it never was champion, or is it now.
    """
    now, former = standing(records), former_champions(records)
    if number == now.champion == found.champion:
        raise Refused(f"{model} version {number} is the champion already")
    if number not in former:
        there = ", ".join(map(str, sorted(former - {now.champion}))) or "none"
        raise Refused(f"{model} version {number} never was champion; versions that were: {there}")


def check_aliases(model: str, log: AuditLog, settings: Settings) -> str:
    """What the registry's champion or the one before is that by the audit log it should not be, or nothing."""
    found, records = aliases_of(model, settings), log.of(model)
    expected = standing(records)
    if unfinished(records):
        return ""
    names = ("champion", "previous")
    wrong = [name for name in names if getattr(found, name) != getattr(expected, name)]
    return "; ".join(moved(model, name, getattr(found, name), getattr(expected, name)) for name in wrong)


def audit(store: Store, settings: Settings) -> Json:
    """Check the whole log, and each of our models against it, down to the champions' files.

    Returns:
        ``{passed, records, decisions, models, faults}``.
    """
    log = AuditLog(store, settings)
    known = anchors(settings)
    faults = log.verify(known)
    records = [] if faults else log.records()
    models = sorted({record["model"] for record in records} | known.keys() | set(our_models(settings)))
    if not faults:
        faults = [fault for model in models for fault in _faults_of(model, log, store, settings)]
    return {
        "passed": not faults,
        "records": len(records),
        "decisions": sum(record["event"] != CARRIED_OUT for record in records),
        "models": models,
        "faults": faults,
    }


def _faults_of(model: str, log: AuditLog, store: Store, settings: Settings) -> list[str]:
    records = log.of(model)
    faults = [
        f"{model}: record {one['sequence']} ({one['event']}, version {one['version']}) has not been carried out since "
        f"{one['at'][:16]}: what decided it died, or the end of the log was cut off; any further decision about the "
        "model carries it out"
        for one in unfinished(records)
        if datetime.now(UTC) - datetime.fromisoformat(one["at"]) > _LONG
    ]
    if wrong := check_aliases(model, log, settings):
        faults.append(wrong)
    now = standing(records)
    for number in [one for one in (now.champion, now.previous) if one]:
        try:
            verified_evidence(model, number, records, store, settings)
        except (Refused, RegistryError, StoreError) as fault:
            faults.append(str(fault))
    return faults


# --- what was answered ------------------------------------------------------------------------------------------------


class Answer(NamedTuple):
    """One person's."""

    reviewer: str
    reason: str
    answered: str | None


class Answers(NamedTuple):
    """What the people asked have decided."""

    decision: str
    given: tuple[Answer, ...]
    bodies: tuple[str, ...]
    """What each of them read."""
    evidence: str | None
    names: frozenset[str]
    """Ids and names of those who did."""
    started_by: str | None
    run: str
    """The run of the DAG, as ``dag/run``."""
    key: str
    """The same for the same answers: a review that was cleared and answered anew is another decision."""


class _Airflow:
    """Airflow's record of one run of a DAG."""

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
        return given_reason(self._conf)

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
            if starter in answers.names:
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
            return Answer(DEADLINE, "nobody answered in time", detail.get("responded_at")), True
        # By the login name: an id is a number where Airflow's users are in its database.
        if user["name"] not in self._reviewers:
            raise Refused(
                f"{self.where}: {user['name']} answered, but is not one of the reviewers (BREAKHIS_REVIEWERS)"
            )
        if self.started_by == user["name"]:
            raise Refused(f"{self.where}: {user['name']} started it and so cannot decide it")
        if chosen not in ([APPROVE], [REJECT]):
            raise Refused(f"{self.where}: its {task} was answered {chosen}, which decides nothing")
        reason = given_reason(detail.get("params_input"))
        if not reason:
            raise Refused(f"{self.where}: {user['name']} gave no reason; clear the task {task} to be asked again")
        return Answer(user["name"], reason, detail.get("responded_at")), chosen == [REJECT]


def _origin(conf: Json | None) -> list[tuple[str, str]]:
    """DAG and run that a run was handed over by, as its conf says."""
    said = (conf or {}).get("origin")
    return [(str(said.get("dag")), str(said.get("run")))] if isinstance(said, dict) else []


def _what_changed(bodies: Sequence[str], judged: Json, store: Store, where: str) -> str:
    """Why what was reviewed is not what there is now."""
    seen = {bundle_of(body) for body in bodies}
    # Not by clearing tasks: Airflow keeps a question as it was put first, and its reviewer would read what was before.
    again = f"start a new run of the DAG {PROMOTE} with the same conf, to have it judged and reviewed anew"
    if seen != {judged["bundle"]}:
        for oid in [one for one in seen if one and store.exists(one)]:
            old, new = read_content(oid, store), read_content(judged["bundle"], store)
            if old["policy_hash"] != new["policy_hash"]:
                return f"{where}: the policy {old['policy']} was changed after it was reviewed; {again}"
            versions = [one["champion"] and one["champion"]["version"] for one in (old, new)]
            if versions[0] != versions[1]:
                return f"{where}: since it was reviewed, version {versions[1]} has become champion; {again}"
    return f"{where}: what the reviewer read is not what there is now ({judged['bundle']}); {again}"


# --- carrying out -----------------------------------------------------------------------------------------------------


def _carry_out(
    model: str,
    number: int,
    answers: Answers,
    decide: Callable[[Sequence[Json]], tuple[str, Json]],
    log: AuditLog,
    store: Store,
    settings: Settings,
) -> Json:
    with exclusively(store, f"registry-{model}"):
        settle(model, log, settings)
        records = log.of(model)
        record = next((one for one in records if one.get("answer") == answers.key), None)
        if record is None:
            event, facts = decide(records)
            record = log.append(
                event,
                model,
                after=last_of(records),
                version=number,
                by=", ".join(one.reviewer for one in answers.given),
                reason="; ".join(one.reason for one in answers.given),
                answers=[one._asdict() for one in answers.given],
                started_by=answers.started_by,
                run=answers.run,
                answer=answers.key,
                previous=standing(records).previous,
                **facts,
            )
            settle(model, log, settings)
    say(f"{model} version {number} was {record['event']} by {record['by']}: {record['reason']}")
    return {
        "model": model,
        "version": record["version"],
        "decision": record["event"].replace(" ", "_"),
        "reviewers": [one["reviewer"] for one in record["answers"]],
        "reason": record["reason"],
        "previous": record["champion"] if record["champion"] != number else None,
        "evidence": record.get("evidence"),
        "audit": log.uri(record),
    }


def settle(model: str, log: AuditLog, settings: Settings) -> None:
    """Bring the aliases to where the audit log says they belong, if a decision was left half carried out.

    Raises:
        Refused: the registry knows of records that the log has not: its end was cut off.
    """
    told = anchored(model, settings)
    if faults := log.verify({model: told} if told else {}, model):
        raise Refused(f"{faults[0]}; nothing is decided about {model} before that is understood")
    late = False
    while True:
        records, found = log.of(model), aliases_of(model, settings)
        waiting = unfinished(records)
        if not waiting and not late:
            if records:  # who was killed after the last record did not tell the registry of it
                anchor_audit(model, anchor(records[-1]), settings)
            return
        wanted = standing(records, found.candidate)
        set_aliases(model, wanted, settings, over=found.candidate if wanted.candidate is None else None)
        anchor_audit(model, anchor(records[-1]), settings)
        # If this process was stopped and another went on, the aliases were just set to what was right before.
        late = log.of(model)[-1] != records[-1]
        if waiting and not late:
            numbers = [record["sequence"] for record in waiting]
            shown = {"champion": wanted.champion, "previous": wanted.previous}
            try:
                log.append(CARRIED_OUT, model, after=last_of(records), of=numbers, **shown)
            except TryAgain:
                late = True  # likewise; where it is the store that fails, reading it says so
