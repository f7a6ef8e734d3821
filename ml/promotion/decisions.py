"""Promotion, rollback and withdrawal: checks that the reviewers have decided, and carries their decision out.

Neither an XCom nor the state of a task proves a decision, since users may write the one and set the other. What counts
is Airflow's own record of the answers, read under a service account, and gates that pass on exactly what was reviewed.

A decision is first written to the audit log and then carried out. Where the aliases belong follows from the log alone.
So after a crash the next process moves them there, and it corrects what was done twice or too late: there is one
champion, and the log says how it came about.
"""

from collections.abc import Callable, Sequence

from ml.core.errors import BreakhisError, Refused
from ml.core.hashes import digest
from ml.core.leases import hold_lease
from ml.core.progress import say
from ml.core.settings import Settings
from ml.core.store import Json, Store
from ml.evaluation.comparison_simulation import have_equal_results
from ml.promotion.alias_history import (
    APPROVED,
    NOBODY_IN_TIME,
    REJECTED,
    ROLLED_BACK,
    WITHDRAWN,
    derive_aliases,
    find_champion_evidence_id,
    find_rejection,
    find_withdrawal,
    list_all_champions,
)
from ml.promotion.answers import Answer, Answers, Question, ReviewRun
from ml.promotion.audit_log import AuditLog, SealedMemos, find_last_sequence
from ml.promotion.champion import reconcile_aliases
from ml.promotion.evidence import read_evidence, read_verified_evidence, read_verified_object
from ml.promotion.judging import judge
from ml.promotion.questions import check_registered, check_undecided
from ml.promotion.review_texts import format_rollback_body, format_rollback_title
from ml.promotion.reviews import MIN_REASON_LENGTH, PROMOTE, ROLLBACK, WITHDRAW, parse_bundle_id, parse_reason
from ml.registry.registered_model import Aliases, RegisteredModel


def promote_version(
    model: str, number: str, dag_run: str, store: Store, settings: Settings, *, evidence: str | None = None
) -> Json:
    """Carry out the reviewers' decision on a candidate version (the ``promote`` stage). Doing it again changes nothing.

    A reviewer's rejection is final for the version and its evidence, in whichever run it was given. One that its own
    run has not carried out yet, since somebody paused the DAG or cleared the review, is carried out in its place.

    Args:
        model: name of the registered model.
        number: the version.
        dag_run: the run of the DAG ``promote`` in which the reviewers answered.
        store: holds the audit log and the evidence.
        settings: say where MLflow and Airflow are.
        evidence: id of the evidence that the run must be about; None accepts any.

    Returns:
        ``{model, version, decision, reviewers, reason, previous, evidence, audit}``. ``decision`` is approved or
        rejected, ``previous`` the champion before, ``audit`` the address of the record.

    Raises:
        Refused: no reviewer decided about this version on this evidence, it has changed since, or the gates fail.
        ConfigError: Airflow's address, the service account or the audit log's key is not set.
    """
    log, review_run = AuditLog(store, settings), ReviewRun(settings, PROMOTE, dag_run)
    answers = review_run.read_answers(model, number, evidence)
    registered = RegisteredModel(model, settings)

    def decide(records: Sequence[Json]) -> tuple[str, Json]:
        facts: Json = {"evidence": answers.evidence, "champion": derive_aliases(records).champion}
        is_silence = answers.decision == REJECTED and answers.answers[0].reviewer == NOBODY_IN_TIME
        if answers.decision == REJECTED and not is_silence:
            return REJECTED, facts
        if not is_silence:
            check_undecided(model, int(number), answers.evidence, records)
            review_run.check_not_rejected(records)
        rejected = review_run.find_unrecorded_rejection(model, number)
        if rejected and not find_rejection(records, int(number), answers.evidence, PROMOTE):
            say(f"{rejected.answers[0].reviewer} has rejected it in the run {rejected.run}, which counts")
            return REJECTED, facts | _describe_answers(rejected)
        facts["reviews"] = review_run.list_settled_reviews(int(number), records)
        if is_silence:
            return REJECTED, facts
        review_run.check_questions_are_there(int(number), records)
        # The gate task has stored its simulation where others may write. So it is simulated again here.
        memos = SealedMemos(store, settings, have_equal_results)
        verdict = judge(registered, number, store, evidence=answers.evidence, records=records, memos=memos)
        check_registered(registered.find_version(number), verdict["evidence"], records)
        if any(question != (verdict["title"], verdict["review"]) for question in answers.questions):
            title = f"{review_run.title}, {model} version {number}"
            raise Refused(_explain_outdated_review(answers.questions, verdict, store, title))
        review_run.check_approvers_independent(answers, read_verified_object(verdict["evidence"], store), records)
        if not verdict["passed"]:
            raise Refused(f"{verdict['summary']}; it was approved, but gates come first")
        if (count := len(answers.answers)) < verdict["approvals"]:
            wanted = f"the policy {verdict['policy']} asks for {verdict['approvals']} reviewers to approve"
            raise Refused(f"{review_run.title}: {wanted}, and {count} did")
        return APPROVED, facts | {key: verdict[key] for key in ("evidence", "bundle", "bundle_sha256", "policy")}

    return _carry_out(registered, int(number), answers, decide, log, store)


def propose_rollback(
    model: str, number: str, reason: str, store: Store, settings: Settings, *, although_withdrawn: bool = False
) -> Json:
    """Describe a rollback for its review, changing nothing (the ``rollback`` stage with ``--dry-run``).

    Args:
        model: name of the registered model.
        number: the version that would be champion again.
        reason: why the rollback is asked for.
        store: holds the audit log and the evidence.
        settings: say where MLflow is.
        although_withdrawn: whether a version that was withdrawn is asked for in the knowledge of that.

    Returns:
        ``{model, version, replaces, evidence, bundle, title, review}``; ``bundle`` is the id of the bundle that the
        version was approved on, ``review`` the body of the review as Markdown.

    Raises:
        Refused: the version never was champion, is the champion now, was withdrawn, or was changed since; or no reason
            is given.
        RegistryError: there is no such version.
    """
    if not parse_reason({"reason": reason}):
        raise Refused(f"rollback to {model} version {number}: say why, in at least {MIN_REASON_LENGTH} letters")
    registered = RegisteredModel(model, settings)
    current = registered.aliases()
    records = AuditLog(store, settings).read_model_records(model)
    check_rollback_target(model, int(number), records, current)
    withdrawal = find_withdrawal(records, int(number))
    if withdrawal and not although_withdrawn:
        raise Refused(
            f"{model} version {number} was withdrawn by {withdrawal['by']} on {withdrawal['at'][:10]}: "
            f"{withdrawal['reason']}; to go back to it all the same, start a run of the DAG {ROLLBACK} that says so "
            '("although_withdrawn": true), or choose another version'
        )
    evidence = read_verified_evidence(registered, int(number), records, store)
    bundles = {record["version"]: record["bundle"] for record in records if record["event"] == APPROVED}
    return {
        "model": model,
        "version": int(number),
        "replaces": current.champion,
        "evidence": (evidence_id := find_champion_evidence_id(int(number), records)),
        "bundle": bundles.get(int(number)),
        "title": format_rollback_title(model, int(number), current.champion),
        "review": format_rollback_body(
            evidence,
            str(evidence_id),
            _read_replaced_champion(registered, current.champion, store),
            reason,
            bundles,
            withdrawal,
        ),
    }


def roll_back(model: str, number: str, dag_run: str, store: Store, settings: Settings) -> Json:
    """Make a former champion the champion again, once a reviewer has confirmed it (the ``rollback`` stage).

    Arguments, result and errors are those of :func:`promote_version`; ``decision`` is rolled_back or rejected.

    Raises:
        Refused: also if the version never was champion, is the champion now, or was withdrawn and the run was not
            started in the knowledge of that.
    """
    log, review_run = AuditLog(store, settings), ReviewRun(settings, ROLLBACK, dag_run)
    answers = review_run.read_answers(model, number, None)
    registered = RegisteredModel(model, settings)

    def decide(records: Sequence[Json]) -> tuple[str, Json]:
        current = registered.aliases()
        expected = derive_aliases(records)
        facts: Json = {"champion": expected.champion, "asked": review_run.reason}
        if current.champion != expected.champion:
            facts["found"] = current.champion  # the alias was moved without a decision; the rollback corrects it
        if answers.decision == REJECTED:
            return REJECTED, facts
        review_run.check_not_rejected(records)
        if rejected := review_run.find_unrecorded_rejection(model, number):
            return REJECTED, facts | _describe_answers(rejected)
        proposed = propose_rollback(
            *(model, number, review_run.reason, store, settings), although_withdrawn=review_run.is_although_withdrawn
        )
        if any(question != (proposed["title"], proposed["review"]) for question in answers.questions):
            raise Refused(
                f"{review_run.title}: what was confirmed is not what there is now: {proposed['title']} Start a new run "
                f"of the DAG {ROLLBACK} with the same conf, to have it confirmed anew"
            )
        return ROLLED_BACK, facts | {"evidence": proposed["evidence"]}

    return _carry_out(registered, int(number), answers, decide, log, store)


def withdraw_version(model: str, number: str, dag_run: str, store: Store, settings: Settings) -> Json:
    """Withdraw a waiting candidate, so that it can no longer be approved (the ``withdraw`` stage).

    Arguments, result and errors are those of :func:`promote_version`; ``decision`` is withdrawn. There is no review:
    the user who started the run decides.

    Raises:
        Refused: also if the version is the champion, or the run has no reason or was not started by a user.
        RegistryError: there is no such version.
    """
    log, review_run = AuditLog(store, settings), ReviewRun(settings, WITHDRAW, dag_run)
    by, reason = review_run.started_by, review_run.reason
    review_run.check_subject(model, number)
    registered = RegisteredModel(model, settings)
    registered.find_version(number)
    if not by or not reason:
        raise Refused(f"{review_run.title}: a withdrawal is started by a person, and with a reason")
    key = digest([WITHDRAW, dag_run, by, reason])
    withdrawal = Answers(WITHDRAWN, (Answer(by, reason, None),), (), None, frozenset({by}), by, review_run.name, key)

    def decide(records: Sequence[Json]) -> tuple[str, Json]:
        champion = derive_aliases(records).champion
        if champion == int(number):
            raise Refused(f"{model} version {number} is the champion; put another one in its place with a rollback")
        return WITHDRAWN, {"champion": champion}

    return _carry_out(registered, int(number), withdrawal, decide, log, store)


def _read_replaced_champion(model: RegisteredModel, champion: int | None, store: Store) -> Json | None:
    """Returns what the review shows of the champion that would be replaced; None where there is no champion.

    Evidence that was tampered with does not stop the rollback, since it is a reason for one: no metrics are shown then.
    """
    if champion is None:
        return None
    try:
        evidence = read_evidence(model, champion, store)
    except BreakhisError:
        evidence = None
    return evidence or {"version": champion, "metrics": {}}


def check_rollback_target(model: str, number: int, records: Sequence[Json], current: Aliases) -> None:
    """Check that a version can be rolled back to.

    Args:
        model: name of the registered model.
        number: the version.
        records: audit records of the model.
        current: the model's aliases in the registry.

    Raises:
        Refused: it never was champion, or is the champion now.
    """
    expected, champions = derive_aliases(records), list_all_champions(records)
    if number == expected.champion == current.champion:
        raise Refused(f"{model} version {number} is the champion already")
    if number not in champions:
        former = ", ".join(map(str, sorted(champions - {expected.champion}))) or "none"
        raise Refused(f"{model} version {number} never was champion; versions that were: {former}")


def _explain_outdated_review(questions: Sequence[Question], verdict: Json, store: Store, title: str) -> str:
    """Returns why the bundle that was reviewed differs from the present one, and what to do."""
    reviewed = {parse_bundle_id(question.body) for question in questions}
    # Clearing tasks does not help: Airflow keeps a question as it was first put, so the old one would be read again.
    again = f"start a new run of the DAG {PROMOTE} with the same conf, to have it judged and reviewed anew"
    if reviewed != {verdict["bundle"]}:
        for oid in [bundle for bundle in reviewed if bundle and store.exists(bundle)]:
            old, new = read_verified_object(oid, store), read_verified_object(verdict["bundle"], store)
            if old["policy_hash"] != new["policy_hash"]:
                return f"{title}: the policy {old['policy']} was changed after it was reviewed; {again}"
            versions = [bundle["champion"] and bundle["champion"]["version"] for bundle in (old, new)]
            if versions[0] != versions[1]:
                return f"{title}: since it was reviewed, version {versions[1]} has become champion; {again}"
    return f"{title}: what the reviewer read is not what there is now ({verdict['bundle']}); {again}"


def _carry_out(
    model: RegisteredModel,
    number: int,
    answers: Answers,
    decide: Callable[[Sequence[Json]], tuple[str, Json]],
    log: AuditLog,
    store: Store,
) -> Json:
    """Write a decision to the audit log, unless it is there already, and move the aliases. Returns a stage's result.

    Args:
        model: the registered model.
        number: the version.
        answers: the reviewers' answers.
        decide: takes the model's audit records; returns the event and further fields of the record, or raises Refused.
        log: the audit log.
        store: holds the lease that lets one process decide at a time.
    """
    with hold_lease(store, f"registry-{model.name}"):
        reconcile_aliases(model, log)
        records = log.read_model_records(model.name)
        record = next((earlier for earlier in records if earlier.get("answer") == answers.key), None)
        if record is None:
            event, facts = decide(records)
            record = log.append(
                event,
                model.name,
                after=find_last_sequence(records),
                version=number,
                previous=derive_aliases(records).previous,
                **(_describe_answers(answers) | facts),
            )
            reconcile_aliases(model, log)
    say(f"{model.name} version {number} was {record['event']} by {record['by']}: {record['reason']}")
    return {
        "model": model.name,
        "version": record["version"],
        "decision": record["event"].replace(" ", "_"),
        "reviewers": [answer["reviewer"] for answer in record["answers"]],
        "reason": record["reason"],
        "previous": record["champion"] if record["champion"] != number else None,
        "evidence": record.get("evidence"),
        "audit": log.uri(record),
    }


def _describe_answers(answers: Answers) -> Json:
    """Returns the fields of an audit record that say who decided what, why and where."""
    return {
        "by": ", ".join(answer.reviewer for answer in answers.answers),
        "reason": "; ".join(answer.reason for answer in answers.answers),
        "answers": [answer._asdict() for answer in answers.answers],
        "started_by": answers.started_by,
        "run": answers.run,
        "answer": answers.key,
    }
