"""Promotion: carries out what a reviewer decided, after checking for itself that it was decided.

Neither an XCom nor the state of a task proves anything, since users may write the one and set the other. What counts is
Airflow's own record of the answer, read under a service account, and gates that pass on exactly the evidence reviewed.
"""

from datetime import UTC, datetime
from urllib.parse import quote

from ml.airflow_api import AirflowApi
from ml.errors import ConfigError, Refused
from ml.progress import say
from ml.registry import champion_number, crown, judge, withdraw
from ml.reviews import APPROVE, DAG, REJECT, TASK, given_reason
from ml.settings import Settings
from ml.store import Json, Store, digest


def promote_version(
    model: str, number: str, dag_run: str, store: Store, settings: Settings, *, evidence: str | None = None
) -> Json:
    """Carry out a reviewer's decision on a model version (the ``promote`` stage). Doing it again changes nothing.

    Returns:
        ``{model, version, decision, reviewer, reason, previous, audit}``; ``decision`` is approved or rejected.

    Raises:
        Refused: nobody entitled decided about this version and this evidence, or the gates do not pass.
        ConfigError: Airflow's address or the service account is not set.
    """
    answer = _read_answer(model, number, dag_run, settings, evidence)
    # One record an answer: a review that was cleared and answered anew, or a run id that came back with a new Airflow
    # database, is another decision.
    key = f"audit/{model}/{quote(dag_run, safe='')}-{digest(answer)[:12]}.json"
    record, tag = store.read(key)
    champion = champion_number(model, settings)
    if record is None:
        verdict = judge(model, number, store, settings, evidence=answer["evidence"])
        if answer["decision"] == "approved" and not verdict["passed"]:
            raise Refused(f"{verdict['summary']}; it was approved by {answer['reviewer']}, but gates come first")
        record = {
            "model": model,
            "version": int(number),
            **answer,
            "bundle": verdict["bundle"],
            "policy": verdict["policy"],
            "previous": champion if champion != int(number) else None,
            "dag_run": dag_run,
            "recorded": datetime.now(UTC).isoformat(timespec="seconds"),
            "carried_out": False,
        }
        # Written before the aliases move: after a crash in between, the retry finds here what was decided.
        store.compare_and_set(key, record, tag)
        record, tag = store.read(key)
    if not record["carried_out"]:
        if record["decision"] == "approved":
            if champion not in (record["previous"], int(number)):
                raise Refused(
                    f"{model} version {number} was approved while version {record['previous']} was champion; since "
                    f"then version {champion} was promoted, so this is not finished; retrain to compare anew"
                )
            crown(model, int(number), record["previous"], settings)
        else:
            withdraw(model, int(number), settings)
        # Marked, so that running an old promotion again cannot bring an old champion back.
        store.compare_and_set(key, {**record, "carried_out": True}, tag)
    say(f"{model} version {number} was {record['decision']} by {record['reviewer']}: {record['reason']}")
    shown = ("model", "version", "decision", "reviewer", "reason", "previous", "evidence")
    return {**{name: record[name] for name in shown}, "audit": store.uri(key)}


def _read_answer(model: str, number: str, dag_run: str, settings: Settings, evidence: str | None) -> Json:
    if not (settings.airflow_url and settings.airflow_user):
        raise ConfigError(
            "promotion reads the reviewer's answer from Airflow: set BREAKHIS_AIRFLOW_URL, BREAKHIS_AIRFLOW_USER and "
            "BREAKHIS_AIRFLOW_PASSWORD (in Airflow: the connection breakhis_airflow)"
        )
    api = AirflowApi(settings.airflow_url, settings.airflow_user, settings.airflow_password.get_secret_value())
    run = api.dag_run(DAG, dag_run)
    where = f"run {dag_run} of the DAG {DAG}"
    conf = run["conf"] or {}
    asked = (str(conf.get("model")), str(conf.get("version")), str(conf.get("evidence")))
    if asked[:2] != (model, str(number)) or (evidence and asked[2] != evidence):
        raise Refused(f"{where} is about {asked[0]} version {asked[1]} ({asked[2]}), not {model} version {number}")
    detail = api.hitl_detail(DAG, dag_run, TASK)
    user = detail.get("responded_by_user")
    if not detail.get("response_received") or not user:
        raise Refused(f"{where}: nobody answered its review, so nothing is promoted")
    if user["id"] not in settings.reviewers:
        raise Refused(f"{where}: {user['name']} answered, but is not one of the reviewers (BREAKHIS_REVIEWERS)")
    if run.get("triggering_user_name") in (user["id"], user["name"]):
        raise Refused(f"{where}: {user['name']} started it and so cannot decide it")
    if asked[2] not in (detail.get("body") or ""):
        raise Refused(f"{where}: the review that {user['name']} read was not about {asked[2]}")
    chosen = detail.get("chosen_options")
    if chosen not in ([APPROVE], [REJECT]):
        raise Refused(f"{where}: its review was answered {chosen}, which decides nothing")
    reason = given_reason(detail.get("params_input"))
    if not reason:
        raise Refused(f"{where}: {user['name']} gave no reason; clear the task {TASK} to be asked again")
    return {
        "decision": "approved" if chosen == [APPROVE] else "rejected",
        "reviewer": user["id"],
        "reason": reason,
        "answered": detail.get("responded_at"),
        "evidence": asked[2],
    }
