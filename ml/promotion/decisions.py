"""Promotion, rollback and withdrawal: carries out what people decided, after checking for itself that they did.

Neither an XCom nor the state of a task proves anything, since users may write the one and set the other. What counts is
Airflow's own record of the answers, read under a service account, and gates that pass on exactly what was reviewed.

A decision is first written to the audit log and then carried out. What the aliases have to be follows from the log
alone, so whoever comes after a crash brings them there, and what is done twice or late is put right: there is one
champion, and the log says how it came about.
"""

from collections.abc import Callable, Sequence

from ml.core.errors import BreakhisError, Refused
from ml.core.leases import hold_lease
from ml.core.progress import say
from ml.core.settings import Settings
from ml.core.store import Json, Store, digest
from ml.evaluation.comparison_simulation import have_equal_results
from ml.promotion.alias_history import (
    APPROVED,
    REJECTED,
    ROLLED_BACK,
    WITHDRAWN,
    derive_aliases,
    find_champion_evidence_id,
    list_all_champions,
)
from ml.promotion.answers import Answer, Answers, ReviewRun
from ml.promotion.audit_log import AuditLog, SealedMemos, find_last_sequence
from ml.promotion.champion import reconcile_aliases
from ml.promotion.evidence import read_evidence, read_verified_evidence, read_verified_object
from ml.promotion.judging import judge_version
from ml.promotion.reviews import (
    MIN_REASON_LENGTH,
    PROMOTE,
    ROLLBACK,
    WITHDRAW,
    format_rollback_body,
    format_rollback_title,
    parse_bundle_id,
    parse_reason,
)
from ml.registry.registered_model import Aliases, RegisteredModel


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
    log, airflow = AuditLog(store, settings), ReviewRun(settings, PROMOTE, dag_run)
    answers = airflow.answers(model, number, evidence)

    def decide(records: Sequence[Json]) -> tuple[str, Json]:
        facts = {"evidence": answers.evidence, "champion": derive_aliases(records).champion}
        if answers.decision == REJECTED:
            return REJECTED, facts
        airflow.check_not_rejected(records)
        if withdrawn := next((r for r in records if r["event"] == WITHDRAWN and r["version"] == int(number)), None):
            raise Refused(f"{model} version {number} was withdrawn by {withdrawn['by']}: {withdrawn['reason']}")
        # What the gate task has simulated, it has kept where others may write: here it is simulated again.
        memos = SealedMemos(store, settings, have_equal_results)
        judged = judge_version(model, number, store, settings, evidence=answers.evidence, records=records, memos=memos)
        if any(body != judged["review"] for body in answers.bodies):
            raise Refused(_what_changed(answers.bodies, judged, store, f"{airflow.where}, {model} version {number}"))
        airflow.check_not_theirs(answers, judged["dag_runs"])
        if not judged["passed"]:
            raise Refused(f"{judged['summary']}; it was approved, but gates come first")
        if len(answers.answers) < judged["approvals"]:
            raise Refused(
                f"{airflow.where}: the policy {judged['policy']} asks for {judged['approvals']} reviewers to approve, "
                f"and {len(answers.answers)} did"
            )
        return APPROVED, facts | {key: judged[key] for key in ("evidence", "bundle", "bundle_sha256", "policy")}

    return _decide(model, int(number), answers, decide, log, store, settings)


def propose_rollback(model: str, number: str, reason: str, store: Store, settings: Settings) -> Json:
    """What a rollback would do, for its review (the ``rollback`` stage with ``--dry-run``).

    Returns:
        ``{model, version, replaces, evidence, bundle, title, review}``; ``bundle`` is what the version was approved on.

    Raises:
        Refused: the version never was champion, or is it now; it is not any more what it was then; or no reason is
            given.
        RegistryError: there is no such version.
    """
    if not parse_reason({"reason": reason}):
        raise Refused(f"rollback to {model} version {number}: say why, in at least {MIN_REASON_LENGTH} letters")
    found = RegisteredModel(model, settings).aliases()
    records = AuditLog(store, settings).of(model)
    check_rollback_target(model, int(number), records, found)
    evidence = read_verified_evidence(model, int(number), records, store, settings)
    bundles = {record["version"]: record["bundle"] for record in records if record["event"] == APPROVED}
    return {
        "model": model,
        "version": int(number),
        "replaces": found.champion,
        "evidence": (known := find_champion_evidence_id(int(number), records)),
        "bundle": bundles.get(int(number)),
        "title": format_rollback_title(model, int(number), found.champion),
        "review": format_rollback_body(
            evidence, str(known), _shown(model, found.champion, store, settings), reason, bundles
        ),
    }


def roll_back(model: str, number: str, dag_run: str, store: Store, settings: Settings) -> Json:
    """Make a former champion the champion again (the ``rollback`` stage), once a reviewer has confirmed it.

    Returns and raises as :func:`promote_version`; ``decision`` is rolled back or rejected.

    Raises:
        Refused: the version never was champion, or is it now.
    """
    log, airflow = AuditLog(store, settings), ReviewRun(settings, ROLLBACK, dag_run)
    answers = airflow.answers(model, number, None)

    def decide(records: Sequence[Json]) -> tuple[str, Json]:
        found = RegisteredModel(model, settings).aliases()
        now = derive_aliases(records)
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

    return _decide(model, int(number), answers, decide, log, store, settings)


def withdraw_version(model: str, number: str, dag_run: str, store: Store, settings: Settings) -> Json:
    """Take a waiting candidate back (the ``withdraw`` stage): it can be approved no more.

    Returns and raises as :func:`promote_version`; ``decision`` is withdrawn.

    Raises:
        Refused: the version is the champion.
        RegistryError: there is no such version.
    """
    log, airflow = AuditLog(store, settings), ReviewRun(settings, WITHDRAW, dag_run)
    by, reason = airflow.started_by, airflow.reason
    airflow.check_subject(model, number)
    RegisteredModel(model, settings).find_version(number)
    if not by or not reason:
        raise Refused(f"{airflow.where}: a withdrawal is started by a person, and with a reason")
    key = digest([WITHDRAW, dag_run, by, reason])
    own = Answers(WITHDRAWN, (Answer(by, reason, None),), (), None, frozenset({by}), by, airflow.name, key)

    def decide(records: Sequence[Json]) -> tuple[str, Json]:
        champion = derive_aliases(records).champion
        if champion == int(number):
            raise Refused(f"{model} version {number} is the champion; put another one in its place with a rollback")
        return WITHDRAWN, {"champion": champion}

    return _decide(model, int(number), own, decide, log, store, settings)


def _shown(model: str, champion: int | None, store: Store, settings: Settings) -> Json | None:
    """What to show of the champion that would go; if it was tampered with, that is a reason to let it go."""
    if champion is None:
        return None
    try:
        evidence = read_evidence(model, champion, store, settings)
    except BreakhisError:
        evidence = None
    return evidence or {"version": champion, "metrics": {}}


def check_rollback_target(model: str, number: int, records: Sequence[Json], found: Aliases) -> None:
    """Check that a version can be rolled back to.

    Raises:
        Refused: it never was champion, or is it now.
    """
    now, former = derive_aliases(records), list_all_champions(records)
    if number == now.champion == found.champion:
        raise Refused(f"{model} version {number} is the champion already")
    if number not in former:
        there = ", ".join(map(str, sorted(former - {now.champion}))) or "none"
        raise Refused(f"{model} version {number} never was champion; versions that were: {there}")


def _what_changed(bodies: Sequence[str], judged: Json, store: Store, where: str) -> str:
    """Why what was reviewed is not what there is now."""
    seen = {parse_bundle_id(body) for body in bodies}
    # Not by clearing tasks: Airflow keeps a question as it was put first, and its reviewer would read what was before.
    again = f"start a new run of the DAG {PROMOTE} with the same conf, to have it judged and reviewed anew"
    if seen != {judged["bundle"]}:
        for oid in [one for one in seen if one and store.exists(one)]:
            old, new = read_verified_object(oid, store), read_verified_object(judged["bundle"], store)
            if old["policy_hash"] != new["policy_hash"]:
                return f"{where}: the policy {old['policy']} was changed after it was reviewed; {again}"
            versions = [one["champion"] and one["champion"]["version"] for one in (old, new)]
            if versions[0] != versions[1]:
                return f"{where}: since it was reviewed, version {versions[1]} has become champion; {again}"
    return f"{where}: what the reviewer read is not what there is now ({judged['bundle']}); {again}"


def _decide(
    model: str,
    number: int,
    answers: Answers,
    decide: Callable[[Sequence[Json]], tuple[str, Json]],
    log: AuditLog,
    store: Store,
    settings: Settings,
) -> Json:
    with hold_lease(store, f"registry-{model}"):
        reconcile_aliases(model, log, settings)
        records = log.of(model)
        record = next((one for one in records if one.get("answer") == answers.key), None)
        if record is None:
            event, facts = decide(records)
            record = log.append(
                event,
                model,
                after=find_last_sequence(records),
                version=number,
                by=", ".join(one.reviewer for one in answers.answers),
                reason="; ".join(one.reason for one in answers.answers),
                answers=[one._asdict() for one in answers.answers],
                started_by=answers.started_by,
                run=answers.run,
                answer=answers.key,
                previous=derive_aliases(records).previous,
                **facts,
            )
            reconcile_aliases(model, log, settings)
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
