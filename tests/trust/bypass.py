"""Attempts to get round the gates and the review, each against a running Airflow and MLflow.

The product's own DAGs run; candidates are made-up training runs in the registry, so that an attempt takes seconds. What
counts is what the registry and the audit log say afterwards: an attempt that promotes something is a vulnerability.

One file, since each attempt is a row of one table, and all of them need the same few helpers.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import mlflow
import requests

from ml.core.airflow_api import AirflowApi
from ml.core.errors import AirflowError, BreakhisError, CredentialsError, TryAgain
from ml.core.settings import PROJECT, SECRETS_FILE, Settings
from ml.local import airflow_server
from ml.local.mlflow_users import TRAINER
from ml.local.stack import Stack
from ml.promotion.alias_history import APPROVED, ROLLED_BACK
from ml.promotion.audit_log import AuditLog
from ml.promotion.evidence import collect_evidence
from ml.promotion.registration import register_run
from tests.helpers.registry_world import NOT_RESCORED, POLICY, RegistryWorld
from tests.helpers.served_models import network
from tests.trust import page_form
from tests.trust.rows import Row

MODEL = "made-binary"
PEOPLE = ("engineer", "reviewer", "viewer")

_AGAIN = """
from airflow.providers.standard.operators.trigger_dagrun import TriggerDagRunOperator
from airflow.sdk import DAG

with DAG("again", schedule=None, is_paused_upon_creation=False):
    TriggerDagRunOperator(
        task_id="start",
        trigger_dag_id="promote",
        trigger_run_id="{{ dag_run.conf['as'] }}",
        conf="{{ dag_run.conf['conf'] | tojson }}",
    )
"""
_RETRAIN = """
from airflow.sdk import DAG

from breakhis_airflow.operators import DEFAULT_ARGS
from breakhis_airflow.places import stage

with DAG("retrain_made", schedule=None, is_paused_upon_creation=False, default_args=DEFAULT_ARGS):
    stage("origin", "made", connections=["breakhis_airflow", "breakhis_audit"])
"""
"""The part of a training set's DAG that writes down who started a run; the training itself is made up."""

_SECONDS = 120.0


class AttackedProduct:
    """A running product, and what an attacker and a careless reviewer can do with it."""

    def __init__(self, world: RegistryWorld, stack: Stack) -> None:
        self.world, self.stack = world, stack
        self.runs = 0

    def api(self, user: str) -> AirflowApi:
        return self.stack.api(user)

    def register_candidate(self, auc: float = 0.9, **tags: str) -> dict[str, Any]:
        """Register a new candidate version."""
        return self.world.register(self.world.log_run(auc, **tags))

    def try_to_register(self, run: str) -> str:
        """Register a run as the stage does; returns what came of it."""
        try:
            made = register_run(run, self.world.store, self.world.settings)
        except BreakhisError as error:
            return f"refused: {error}"
        return f"registered as {made['model']} version {made['version']}"

    def start_promotion(self, candidate: dict[str, Any], user: str = "engineer", **more: Any) -> str:
        """Start a candidate's promotion; returns the run's id."""
        self.runs += 1
        run = f"{MODEL}-v{candidate['version']}-{self.runs}"
        self.api(user).trigger("promote", run, self.make_conf(candidate) | more)
        return run

    def make_conf(self, candidate: dict[str, Any]) -> dict[str, Any]:
        return {"model": MODEL, "version": str(candidate["version"]), "evidence": candidate["evidence"]}

    def read_state(self, run: str, task: str, dag: str = "promote") -> str | None:
        return next((t["state"] for t in self.api("admin").task_instances(dag, run) if t["task_id"] == task), None)

    def wait_for_state(self, run: str, task: str, *states: str, dag: str = "promote") -> str:
        deadline = time.monotonic() + _SECONDS
        while (state := self.read_state(run, task, dag)) not in states:
            if time.monotonic() > deadline:
                raise RuntimeError(f"{run}: {task} is {state}, not {' or '.join(states)}")
            time.sleep(0.5)
        return str(state)

    def wait_for_review(self, run: str) -> None:
        """Wait until the run's review waits for an answer, and the scheduler has noticed."""
        self.wait_for_state(run, "review", "awaiting_input", "deferred")
        time.sleep(6)

    def answer(self, run: str, user: str = "reviewer", option: str = "Approve") -> None:
        """Answer a review, and again where a busy Airflow lost the answer."""
        for _ in range(4):
            with suppress(AirflowError):
                self.api(user).answer("promote", run, "review", option, {"reason": f"{user} says so"})
            for _ in range(40):
                if self.read_state(run, "review") == "success":
                    return
                time.sleep(0.5)
        raise RuntimeError(f"{run}: the answer was lost over and over")

    def wait_for_question(self, dag: str, run: str) -> str:
        """Wait until a review of another DAG waits for an answer; returns which warning its text begins with."""
        self.wait_for_state(run, "review", "awaiting_input", "deferred", dag=dag)
        time.sleep(6)
        body = self.api("admin").hitl_detail(dag, run, "review")["body"]
        return "Withdrawn" if "**Withdrawn.** engineer withdrew this version" in body else "no warning"

    def mark_failed(self, run: str, task: str, user: str = "engineer") -> None:
        path = f"/api/v2/dags/promote/dagRuns/{run}/taskInstances/{task}"
        self.api(user)._call("PATCH", path, body={"new_state": "failed"})

    def delete_run(self, dag: str, run: str, user: str = "engineer") -> None:
        path = f"/api/v2/dags/{dag}/dagRuns/{run}"
        self.api(user)._call("PATCH", path, body={"state": "failed"})  # Airflow deletes no run that is running
        with suppress(AirflowError):  # it answers with nothing, where the client expects JSON
            self.api(user)._call("DELETE", path)
        with suppress(AirflowError):
            self.api(user).dag_run(dag, run)
            raise RuntimeError(f"{user} cannot delete {run}, so this tries nothing")

    def delete_review(self, run: str, user: str = "engineer") -> None:
        path = f"/api/v2/dags/promote/dagRuns/{run}/taskInstances/review"
        with suppress(AirflowError):  # it answers with nothing, where the client expects JSON
            self.api(user)._call("DELETE", path)
        with suppress(AirflowError):
            self.api(user).hitl_detail("promote", run, "review")
            raise RuntimeError(f"{user} cannot delete the review of {run}, so this tries nothing")

    def mark_success(self, run: str, task: str, user: str = "engineer", dag: str = "promote") -> None:
        path = f"/api/v2/dags/{dag}/dagRuns/{run}/taskInstances/{task}"
        self.api(user)._call("PATCH", path, body={"new_state": "success"})

    def pause(self, paused: bool, user: str = "engineer", dag: str = "promote") -> None:
        mask = {"update_mask": ["is_paused"]}
        self.api(user)._call("PATCH", f"/api/v2/dags/{dag}", params=mask, body={"is_paused": paused})

    def clear_tasks(self, run: str, *tasks: str, user: str = "engineer", dag: str = "promote") -> None:
        body = {"dag_run_id": run, "task_ids": list(tasks), "dry_run": False, "only_failed": False}
        body["include_downstream"] = True
        self.api(user)._call("POST", f"/api/v2/dags/{dag}/clearTaskInstances", body=body)

    def start_training(self, run: str, user: str) -> None:
        """Start a run of the DAG that trains, and wait until it is written down who started it."""
        self.api(user).trigger("retrain_made", run, {})
        self.wait_for_state(run, "origin", "success", dag="retrain_made")

    def promote_model_of(self, *trainings: str) -> str:
        """Register a model of these runs and have it approved; returns what came of it."""
        told = json.dumps([["retrain_made", training] for training in trainings])
        run = self.start_promotion(self.register_candidate(**{"breakhis.dag_runs": told}))
        if self.wait_for_state(run, "gate", "success", "failed") == "failed":
            return self.wait_for_end(run, "gate")
        self.wait_for_review(run)
        self.answer(run)
        return self.wait_for_end(run)

    def write_xcom(self, run: str, task: str, value: Any, user: str = "engineer") -> None:
        path = f"/api/v2/dags/promote/dagRuns/{run}/taskInstances/{task}/xcomEntries"
        with suppress(AirflowError):
            self.api(user)._call("DELETE", f"{path}/return_value")
        self.api(user)._call("POST", path, body={"key": "return_value", "value": value})

    def wait_for_end(self, run: str, task: str = "promote", dag: str = "promote") -> str:
        """Wait until a task has ended; returns its state with the last line of its error."""
        state = self.wait_for_state(run, task, "success", "failed", "upstream_failed", "skipped", dag=dag)
        lines = [
            line
            for attempt in range(1, 8)
            for line in _read_task_log(self.api("admin"), run, task, attempt, dag)
            if "error: " in line or "refused" in line.lower()
        ]
        message = lines[-1].split("error: ")[-1].strip() if lines else ""
        return f"{task} {state}: {message}"[:220] if message else f"{task} {state}"

    @contextmanager
    def held_up(self) -> Iterator[None]:
        """Have no decision carried out until the block has ended."""
        self._set_pool(0, "held up")
        try:
            yield
        finally:
            self._set_pool(1, "one at a time")

    def _set_pool(self, slots: int, why: str) -> None:
        # A busy Airflow answers 500 while its database is locked.
        for left in reversed(range(10)):
            try:
                self.api("admin").set_pool("promotion", slots, why)
            except TryAgain:
                if not left:
                    raise
                time.sleep(2)
            else:
                return

    @contextmanager
    def approved_but_not_carried_out(self, candidate: dict[str, Any]) -> Iterator[str]:
        """Have a candidate approved, and hold the promotion up until the block has ended; yields the run's id."""
        with self.held_up():
            run = self.start_promotion(candidate)
            self.wait_for_review(run)
            self.answer(run)
            yield run

    def run_breakhis(self, *arguments: str) -> str:
        """Run ``breakhis`` as somebody on the machine would; returns exit status and last line of its errors."""
        own = self.world.settings
        environment = {
            **os.environ,
            "BREAKHIS_HOME": str(own.home),
            "BREAKHIS_CONF": str(own.conf),
            "BREAKHIS_STORE": own.store,
            "BREAKHIS_MLFLOW_URI": own.mlflow_uri,
            "BREAKHIS_AIRFLOW_URL": self.api("admin").url,
            "BREAKHIS_AIRFLOW_USER": "breakhis-service",
            "BREAKHIS_AIRFLOW_PASSWORD": self.stack.passwords()["breakhis-service"],
        }
        command = [str(Path(sys.prefix) / "bin" / "breakhis"), *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        return f"exit status {done.returncode}: {(done.stderr.strip().splitlines() or [''])[-1]}"[:220]


def _read_task_log(api: AirflowApi, run: str, task: str, attempt: int, dag: str) -> list[str]:
    try:
        return api.task_log(dag, run, task, attempt)
    except BreakhisError:
        return []


# --- the attempts -----------------------------------------------------------------------------------------------------


def mark_the_review(product: AttackedProduct) -> str:
    """marking the review as success"""
    run = product.start_promotion(product.register_candidate())
    product.wait_for_review(run)
    product.mark_success(run, "review")
    return product.wait_for_end(run)


def mark_a_blocked_gate(product: AttackedProduct) -> str:
    """marking a gate that blocked as success, and a careless approval"""
    run = product.start_promotion(product.register_candidate(auc=0.5))
    product.wait_for_state(run, "gate", "failed")
    product.mark_success(run, "gate")
    product.clear_tasks(run, "review")
    product.wait_for_review(run)
    product.answer(run)
    return product.wait_for_end(run)


def mark_the_promotion(product: AttackedProduct) -> str:
    """marking review and promotion as success"""
    run = product.start_promotion(product.register_candidate())
    product.wait_for_review(run)
    product.mark_success(run, "review")
    product.mark_success(run, "promote")
    return product.wait_for_end(run)


def clear_after_a_rejection(product: AttackedProduct) -> str:
    """clearing the promotion after a rejection"""
    run = product.start_promotion(product.register_candidate())
    product.wait_for_review(run)
    product.answer(run, option="Reject")
    product.wait_for_state(run, "promote", "success")
    product.clear_tasks(run, "promote")
    time.sleep(3)
    return product.wait_for_end(run) + ", " + product.wait_for_end(run, "rejected")


def review_again_in_another_run(product: AttackedProduct) -> str:
    """having a rejected version reviewed again, in a new run"""
    candidate = product.register_candidate()
    run = product.start_promotion(candidate)
    product.wait_for_review(run)
    product.answer(run, option="Reject")
    product.wait_for_state(run, "promote", "success")
    again = product.start_promotion(candidate)
    return product.wait_for_end(again, "gate") + ", " + product.wait_for_end(again)


def pause_before_a_rejection_is_carried_out(product: AttackedProduct) -> str:
    """holding up a promotion after a rejection, and an approval in another run"""
    candidate = product.register_candidate()
    run, other = product.start_promotion(candidate), product.start_promotion(candidate)
    product.wait_for_review(run)
    product.wait_for_review(other)
    with product.held_up():
        product.answer(run, option="Reject")
        # Of the first run nothing is left but Airflow's record of the answer.
        product.mark_failed(run, "promote")
        product.answer(other)
    return product.wait_for_end(other) + ", " + product.wait_for_end(other, "rejected")


def clear_a_rejected_review(product: AttackedProduct) -> str:
    """clearing a review that was rejected before it is carried out, so that it asks again"""
    run = product.start_promotion(product.register_candidate())
    product.wait_for_review(run)
    with product.held_up():
        product.answer(run, option="Reject")
        product.clear_tasks(run, "review")
        asked = product.wait_for_state(run, "review", "success", "awaiting_input", "deferred")
    return f"review {asked}, {product.wait_for_end(run)}, {product.wait_for_end(run, 'rejected')}"


def reject_a_cleared_review_before_it_asks_again(product: AttackedProduct) -> str:
    """having a review rejected between its clearing and its asking again, when Airflow loses answers"""
    run = product.start_promotion(product.register_candidate())
    product.wait_for_review(run)
    product.pause(True)
    try:
        product.clear_tasks(run, "review")
        product.api("reviewer").answer("promote", run, "review", "Reject", {"reason": "blurred"})
    finally:
        product.pause(False)
    asked = product.wait_for_state(run, "review", "success", "awaiting_input", "deferred")
    return f"review {asked}, {product.wait_for_end(run)}, {product.wait_for_end(run, 'rejected')}"


def delete_a_rejected_run(product: AttackedProduct) -> str:
    """deleting a run before its rejection is carried out, and a new run of the same name"""
    candidate = product.register_candidate()
    run = product.start_promotion(candidate)
    product.wait_for_review(run)
    with product.held_up():
        product.answer(run, option="Reject")
        product.delete_run("promote", run)
    product.api("engineer").trigger("promote", run, product.make_conf(candidate))
    return product.wait_for_end(run, "gate") + ", " + product.wait_for_end(run)


def copy_a_rejected_run(product: AttackedProduct) -> str:
    """deleting a run before its rejection is carried out, and a new run of the same name, conf and time"""
    candidate = product.register_candidate()
    run = product.start_promotion(candidate)
    product.wait_for_review(run)
    began = product.api("engineer").dag_run("promote", run)["run_after"]
    with product.held_up():
        product.answer(run, option="Reject")
        product.delete_run("promote", run)
    body = {"logical_date": None, "dag_run_id": run, "run_after": began, "conf": product.make_conf(candidate)}
    if product.api("engineer")._call("POST", "/api/v2/dags/promote/dagRuns", body=body)["run_after"] != began:
        raise RuntimeError("Airflow gives the run another time, so this tries nothing")
    return product.wait_for_end(run, "gate") + ", " + product.wait_for_end(run)


def delete_a_rejected_review(product: AttackedProduct) -> str:
    """deleting a rejected review, not its run, before the rejection is carried out, and an approval in another run"""
    candidate = product.register_candidate()
    run, other = product.start_promotion(candidate), product.start_promotion(candidate)
    product.wait_for_review(run)
    product.wait_for_review(other)
    with product.held_up():
        product.answer(run, option="Reject")
        product.mark_failed(run, "promote")
        product.delete_review(run)
        product.answer(other)
    again = product.start_promotion(candidate)
    return f"{product.wait_for_end(other)}; anew: {product.wait_for_end(again, 'gate')}"


def approve_what_nobody_is_known_to_have_started(product: AttackedProduct) -> str:
    """removing the tag that says which run trained a model, naming a run that never was, and marking a run's origin"""
    product.pause(True, dag="retrain_made")
    try:
        product.api("reviewer").trigger("retrain_made", "marked", {})
        product.mark_success("marked", "origin", dag="retrain_made")
    finally:
        product.pause(False, dag="retrain_made")
    return "; ".join(product.promote_model_of(*runs) for runs in ((), ("never-there",), ("marked",)))


def approve_what_one_trained_oneself(product: AttackedProduct) -> str:
    """approving a model whose training one started, as it is; its run cleared; deleted; and started again by another"""
    outcomes = {}
    for how in ("as it is", "cleared", "deleted", "started again"):
        run = f"of-the-reviewer-{how.replace(' ', '-')}"
        product.start_training(run, "reviewer")
        if how == "cleared":
            product.clear_tasks(run, "origin", dag="retrain_made")
            product.wait_for_state(run, "origin", "success", dag="retrain_made")
        elif how != "as it is":
            product.delete_run("retrain_made", run)
        if how == "started again":
            product.start_training(run, "engineer")
        outcomes[how] = product.promote_model_of(run)
    return "; ".join(f"{how}: {outcome.partition(', which led')[0]}" for how, outcome in outcomes.items())


def make_the_model_before_its_set(product: AttackedProduct) -> str:
    """making a registered model with a champion before its training set is declared"""
    client, name = product.world.client, "real-binary"
    stranger = product.world.log_run(0.9)
    version = client.create_model_version(name, f"runs:/{stranger}/model", stranger).version
    client.set_registered_model_alias(name, "champion", version)
    dataset, split = product.world.data["real"]
    tags = {"breakhis.set": "real", "breakhis.dataset": dataset, "breakhis.split": split}
    try:
        register_run(product.world.log_run(0.95, "real", **tags), product.world.store, product.world.settings)
        return "registered beside it"
    except BreakhisError as error:
        return f"refused: {error}"[:160]
    finally:
        client.delete_registered_model_alias(name, "champion")
        client.delete_model_version(name, version)


def make_and_tag_a_version(product: AttackedProduct) -> str:
    """making a version in MLflow, with evidence for it in the store that names a starter, and having it reviewed"""
    world, run = product.world, product.world.log_run(0.95)
    version = world.client.create_model_version(MODEL, f"runs:/{run}/model", run)
    claimed = {"starters": {"users": {"viewer": "retrain_made/r1"}, "unknown": ""}, "rescored": NOT_RESCORED}
    content = collect_evidence(version, world.store, world.settings, recompute=True) | claimed
    evidence = world.store.create("evidence", content, content)
    world.client.set_model_version_tag(MODEL, version.version, "breakhis.evidence", evidence)
    try:
        promotion = product.start_promotion({"version": version.version, "evidence": evidence})
        outcome = product.wait_for_end(promotion, "gate")
        try:
            return f"{outcome}; registered as {world.register(run)}"
        except BreakhisError as error:
            return f"{outcome}; registering it: refused: {error}"
    finally:
        world.client.delete_model_version(MODEL, version.version)


def go_back_to_a_withdrawn_version(product: AttackedProduct) -> str:
    """rolling back to a version that was withdrawn, without saying so, and saying so"""
    conf = {"model": MODEL, "version": "1", "reason": "mislabelled slide"}
    product.api("engineer").trigger("withdraw", "out-1", conf)
    product.wait_for_end("out-1", "withdraw", dag="withdraw")
    outcomes = []
    for run, more in (("back-1", {}), ("back-2", {"although_withdrawn": True})):
        product.api("engineer").trigger("rollback", run, conf | more)
        outcomes.append(product.wait_for_end(run, "propose", dag="rollback"))
    title = product.wait_for_question("rollback", "back-2")
    product.api("reviewer").answer("rollback", "back-2", "review", "Reject", {"reason": "keep it"})
    return f"{outcomes[0]}; saying so: {outcomes[1]}, {title}"


def write_the_reviews_xcom(product: AttackedProduct) -> str:
    """writing the review's XCom over REST, and marking it as success"""
    run = product.start_promotion(product.register_candidate())
    product.wait_for_review(run)
    user = {"id": "reviewer", "name": "reviewer"}
    forged = {"chosen_options": ["Approve"], "params_input": {"reason": "fine"}, "responded_by_user": user}
    product.write_xcom(run, "review", forged)
    product.mark_success(run, "review")
    return product.wait_for_end(run)


def write_the_gates_xcom(product: AttackedProduct) -> str:
    """showing the reviewer nicer figures, by the gate's XCom"""
    return _forge_question(product, "review", "0.8100", "0.9900", "body")


def write_the_title(product: AttackedProduct) -> str:
    """having the reviewer asked another question, by the gate's XCom"""
    return _forge_question(product, "title", "to champion?", "to the archive?", "subject")


def _forge_question(product: AttackedProduct, key: str, words: str, others: str, shown_as: str) -> str:
    """Have a review asked with other words than the gate gave it, and approve it."""
    run = product.start_promotion(product.register_candidate(auc=0.81))
    product.wait_for_state(run, "gate", "queued", "running", "success")
    # Airflow keeps a question as it was first put: the DAG is paused until it is forged.
    product.pause(True)
    try:
        product.wait_for_state(run, "gate", "success")
        verdict = product.api("engineer").xcom("promote", run, "gate")
        product.write_xcom(run, "gate", verdict | {key: verdict[key].replace(words, others)})
    finally:
        product.pause(False)
    product.wait_for_review(run)
    if others not in product.api("admin").hitl_detail("promote", run, "review")[shown_as]:
        raise RuntimeError("the review does not show the forged words, so this tries nothing")
    product.answer(run)
    return product.wait_for_end(run)


def trigger_with_a_forged_conf(product: AttackedProduct) -> str:
    """triggering promote by hand with another version's evidence"""
    good, bad = product.register_candidate(0.95), product.register_candidate(0.5)
    run = product.start_promotion({**bad, "evidence": good["evidence"]})
    return product.wait_for_end(run, "gate") + ", " + product.wait_for_end(run)


def write_the_version_otherwise(product: AttackedProduct) -> str:
    """having a version reviewed under another way to write its number"""
    candidate, outcomes = product.register_candidate(), []
    for version in (f"{candidate['version']}\n", f"0{candidate['version']}", f"+{candidate['version']}"):
        try:
            run = product.start_promotion({**candidate, "version": version})
        except AirflowError as error:
            outcomes.append(str(error.status))
        else:
            outcomes.append(product.wait_for_end(run, "gate"))
    return ", ".join(outcomes)


def trigger_with_settings_of_ones_own(product: AttackedProduct) -> str:
    """triggering promote with params that do not exist (approvals, policy, skip), and editing those of a run"""
    run = product.start_promotion(product.register_candidate(), approvals=0, policy="none", skip=True)
    outcome = product.wait_for_end(run, "gate") + ", " + product.wait_for_end(run)
    good, bad = product.register_candidate(0.95), product.register_candidate(0.5)
    run = product.start_promotion(good)
    product.wait_for_review(run)
    try:
        product.api("engineer")._call(
            "PATCH", f"/api/v2/dags/promote/dagRuns/{run}", body={"conf": product.make_conf(bad)}
        )
        edited = "accepted"
    except AirflowError as error:
        edited = str(error.status)
    conf = product.api("admin").dag_run("promote", run)["conf"]
    if str(conf["version"]) != str(good["version"]):
        raise RuntimeError(f"the run is of version {conf['version']} now")
    product.answer(run, option="Reject")
    return f"{outcome}; editing a run's: {edited}, and it stays of its version"


def approve_ones_own_run(product: AttackedProduct) -> str:
    """approving a run that one started oneself"""
    run = product.start_promotion(product.register_candidate(), user="reviewer")
    product.wait_for_review(run)
    product.answer(run)
    return product.wait_for_end(run)


def approve_ones_own_run_through_a_trigger(product: AttackedProduct) -> str:
    """the same, started through another DAG"""
    candidate = product.register_candidate()
    run = f"{MODEL}-through-{candidate['version']}"
    product.api("reviewer").trigger("again", None, {"as": run, "conf": product.make_conf(candidate)})
    deadline = time.monotonic() + _SECONDS
    while time.monotonic() < deadline:
        with suppress(AirflowError):
            product.api("admin").dag_run("promote", run)
            break
        time.sleep(1)
    product.wait_for_review(run)
    product.answer(run)
    return product.wait_for_end(run)


def approve_as_somebody_else(product: AttackedProduct) -> str:
    """answering as viewer, engineer and administrator"""
    run = product.start_promotion(product.register_candidate())
    product.wait_for_review(run)
    outcomes = []
    for user in ("viewer", "engineer", "admin"):
        try:
            product.api(user).answer("promote", run, "review", "Approve", {"reason": "why not"})
            outcomes.append(f"{user}: accepted")
        except CredentialsError:
            outcomes.append(f"{user}: 403")
    return ", ".join([*outcomes, f"review {product.read_state(run, 'review')}"])


def answer_twice(product: AttackedProduct) -> str:
    """answering a second time, otherwise"""
    run = product.start_promotion(product.register_candidate())
    product.wait_for_review(run)
    product.answer(run, option="Reject")
    try:
        product.api("reviewer").answer("promote", run, "review", "Approve", {"reason": "changed my mind"})
        second = "accepted"
    except AirflowError as error:
        second = str(error.status)
    return f"second answer: {second}; {product.wait_for_end(run)}, {product.wait_for_end(run, 'rejected')}"


def swap_model_files(product: AttackedProduct) -> str:
    """swapping model files after the approval"""
    candidate = product.register_candidate()
    with product.approved_but_not_carried_out(candidate) as run:
        folder = mlflow.artifacts.download_artifacts(artifact_uri=f"models:/{MODEL}/{candidate['version']}")
        victim = next(Path(folder).rglob("*.pkl"))
        victim.write_bytes(victim.read_bytes() + b"\\0")
    return product.wait_for_end(run)


def swap_metrics(product: AttackedProduct) -> str:
    """changing the run's metrics after the approval"""
    candidate = product.register_candidate()
    with product.approved_but_not_carried_out(candidate) as run:
        version = product.world.client.get_model_version(MODEL, str(candidate["version"]))
        product.world.client.log_metric(version.run_id, "test_roc_auc", 0.99)
    return product.wait_for_end(run)


def swap_evidence(product: AttackedProduct) -> str:
    """changing the evidence in the store after the approval"""
    candidate = product.register_candidate()
    with product.approved_but_not_carried_out(candidate) as run:
        key = f"{product.world.store.object_key(candidate['evidence'])}/object.json"
        file = product.world.store.local(key)
        file.write_text(file.read_text().replace("0.9", "0.99"))
    return product.wait_for_end(run)


def change_the_policy(product: AttackedProduct) -> str:
    """changing the policy between gate and promotion"""
    with product.approved_but_not_carried_out(product.register_candidate()) as run:
        product.world.policy.write_text(POLICY.replace("0.8", "0.1"))
    try:
        return product.wait_for_end(run)
    finally:
        product.world.policy.write_text(POLICY)


def promote_a_failed_candidate_by_hand(product: AttackedProduct) -> str:
    """promoting a candidate that its gates blocked, on the command line, without an approval and with a careless one"""
    candidate = product.register_candidate(0.5)
    run = product.start_promotion(candidate)
    product.wait_for_state(run, "gate", "failed")
    command = ("promote", MODEL, str(candidate["version"]), "--dag-run", run)
    outcome = product.run_breakhis(*command)
    product.mark_success(run, "gate")
    product.clear_tasks(run, "review")
    product.wait_for_review(run)
    product.answer(run)
    return f"{outcome}; approved: {product.run_breakhis(*command)}"


def replay_an_old_approval(product: AttackedProduct) -> str:
    """replaying the approval of a former champion, for itself and for a version that nobody has approved"""
    own = product.run_breakhis("promote", MODEL, "1", "--dag-run", "first")
    other = product.run_breakhis(
        "promote", MODEL, str(product.register_candidate(0.95)["version"]), "--dag-run", "first"
    )
    return f"{own}; another version: {other}"


def set_the_alias_as_a_trainer(product: AttackedProduct) -> str:
    """setting the alias in MLflow, and making a version, with a trainer's credentials and with people's"""
    candidate = product.register_candidate()
    state = product.stack.state()
    if state is None:
        raise RuntimeError("the stack does not run")
    url = f"{state.services['mlflow'].url}/api/2.0/mlflow"
    trainer = json.loads((product.stack.home / SECRETS_FILE).read_text())[TRAINER]
    run = product.world.client.get_model_version(MODEL, str(candidate["version"])).run_id
    asked = {
        "registered-models/alias": {"name": MODEL, "alias": "champion", "version": str(candidate["version"])},
        "model-versions/create": {"name": MODEL, "source": f"runs:/{run}/model", "run_id": run},
    }
    outcomes = []
    for user, password in {TRAINER: trainer, **{name: product.stack.passwords()[name] for name in PEOPLE}}.items():
        with requests.Session() as session:
            session.auth = (user, password)
            if not session.get(f"{url}/runs/get", params={"run_id": run}, timeout=60).ok:
                raise RuntimeError(f"{user} cannot log in to MLflow")
            answers = [session.post(f"{url}/{path}", json=body, timeout=60).status_code for path, body in asked.items()]
        if answers != [403, 403]:
            raise RuntimeError(f"MLflow answered {user} {answers}")
        outcomes.append(f"{user}: 403")
    return ", ".join(outcomes)


def swap_the_champions_files(product: AttackedProduct) -> str:
    """swapping the model files of the champion: what the daily audit says"""
    champion = product.world.client.get_model_version_by_alias(MODEL, "champion").version
    folder = mlflow.artifacts.download_artifacts(artifact_uri=f"models:/{MODEL}/{champion}")
    victim = next(Path(folder).rglob("*.pkl"))
    honest = victim.read_bytes()
    before = product.run_breakhis("audit", "verify")
    victim.write_bytes(honest + b"\0")
    try:
        return f"before: {before.partition(':')[0]}; after: {product.run_breakhis('audit', 'verify')}"
    finally:
        victim.write_bytes(honest)


def pass_a_demo_model_off(product: AttackedProduct) -> str:
    """registering a model of the demo set under the real set's name, dataset and split"""
    dataset, split = product.world.data["real"]
    try:
        run = product.world.log_run(0.95, **{"breakhis.set": "real"})
        product.world.register(run)
        return "registered by its set's name alone"
    except BreakhisError as error:
        outcome = f"refused: {error}"[:110]
    tags = {"breakhis.set": "real", "breakhis.dataset": dataset, "breakhis.split": split}
    run = product.world.log_run(0.95, scored_on=product.world.data["made"], **tags)
    try:
        made = product.world.register(run)
    except BreakhisError as error:
        return f"{outcome}; with the dataset's name: refused: {error}"[:240]
    return f"registered as {made['model']} version {made['version']}"


def register_what_the_model_does_not_predict(product: AttackedProduct) -> str:
    """logging predictions that the model does not give, and metrics that follow from them"""
    run = product.world.log_trained_run(network(1), lambda outputs, truth: (outputs + 9 * truth) / 10)
    return product.try_to_register(run)


def register_a_network_with_code(product: AttackedProduct) -> str:
    """logging a network with a Lambda layer, and one with a class of another package"""
    outcomes = []
    for change in (
        lambda text: text.replace('"class_name": "Rescaling"', '"class_name": "Lambda"'),
        lambda text: text.replace('"module": "keras.layers"', '"module": "package.of.ones.own"', 1),
    ):
        run = product.world.log_trained_run(network(1))
        file = product.world.model_folder(run) / "artifacts" / "network.keras"
        with zipfile.ZipFile(file) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        members["config.json"] = change(members["config.json"].decode()).encode()
        with zipfile.ZipFile(file, "w") as archive:
            for name, data in members.items():
                archive.writestr(name, data)
        outcomes.append(product.try_to_register(run))
    return "; ".join(outcomes)


def log_code_of_ones_own(product: AttackedProduct) -> str:
    """logging other code, and another package to install, beside an honest network"""
    outcomes = []
    for name, line in (("pyfunc.py", "# answers otherwise"), ("requirements.txt", "package-of-ones-own==1.0")):
        run = product.world.log_trained_run(network(1))
        file = product.world.model_folder(run) / name
        file.write_text(f"{file.read_text()}\n{line}\n")
        outcomes.append(product.try_to_register(run))
    return "; ".join(outcomes)


def write_markdown_into_a_note(product: AttackedProduct) -> str:
    """logging metrics whose notes are Markdown, for the reviewer's form: a link, a picture, a heading"""
    notes = ("[all is well](https://bad.example)", "![x](https://bad.example/x.png)", "|\n\n# Approved by the board")
    outcomes = []
    for note in notes:
        run = product.world.log_trained_run(network(1))
        with tempfile.TemporaryDirectory() as scratch:
            uri = f"runs:/{run}/evaluation/metrics.json"
            file = Path(mlflow.artifacts.download_artifacts(uri, dst_path=scratch))
            file.write_text(json.dumps(json.loads(file.read_text()) | {"interval_notes": {"roc_auc": note}}))
            product.world.client.log_artifact(run, str(file), "evaluation")
        outcomes.append(product.try_to_register(run))
    return "; ".join(outcomes)


ATTEMPTS: dict[Callable[[AttackedProduct], str], str] = {
    mark_the_review: r"promote failed: .*nobody answered its review",
    mark_a_blocked_gate: r"promote failed: .*gates come first",
    mark_the_promotion: r"promote success",
    clear_after_a_rejection: r"promote success, rejected success",
    review_again_in_another_run: r"gate failed: .*was rejected by reviewer on .*, promote upstream_failed",
    pause_before_a_rejection_is_carried_out: r"promote success.*, rejected success",
    clear_a_rejected_review: r"review success, promote success.*, rejected success",
    reject_a_cleared_review_before_it_asks_again: r"review success, promote success.*, rejected success",
    delete_a_rejected_run: r"gate failed: .*where the review was deleted.*, promote upstream_failed",
    copy_a_rejected_run: r"gate failed: .*where the review was deleted.*, promote upstream_failed",
    delete_a_rejected_review: r"promote failed: .*where the review was.*; anew: gate failed: .*where the review was",
    approve_what_nobody_is_known_to_have_started: r"(gate failed: .*?nobody is entitled.*?){3}",
    approve_what_one_trained_oneself: r"(promote failed: .*?reviewer started run of-the-reviewer-\S+ of.*?){4}",
    make_the_model_before_its_set: r"refused: the registered model real-binary has a version \d+ that breakhis did not",
    make_and_tag_a_version: r"gate failed: .*has no record that.*; registering it: refused: .*starters is not what is",
    go_back_to_a_withdrawn_version: r"propose failed: .*withdrawn by engineer.*; saying so: propose success, Withdrawn",
    write_the_reviews_xcom: r"promote failed: .*nobody answered its review",
    write_the_gates_xcom: r"promote failed: .*what the reviewer read is not what there is now",
    write_the_title: r"promote failed: .*what the reviewer read is not what there is now",
    write_the_version_otherwise: r"^((400|422|gate failed: .*no number of a version.*?)(, |$)){3}",
    trigger_with_a_forged_conf: r"gate failed: .*no record that breakhis registered it with evidence-\w+.*, promote up",
    trigger_with_settings_of_ones_own: r"gate failed.*, promote upstream_failed; editing.*: 4\d\d,",
    approve_ones_own_run: r"promote failed: .*reviewer started it and so cannot decide it",
    approve_ones_own_run_through_a_trigger: r"promote failed: .*reviewer started it and so cannot decide it",
    approve_as_somebody_else: r"viewer: 403, engineer: 403, admin: 403, review (awaiting_input|deferred)",
    answer_twice: r"second answer: 409; promote success, rejected success",
    swap_model_files: r"promote failed: .*changed after evidence-\w+ was recorded: model_files",
    swap_metrics: r"promote failed: .*one of them was changed",
    swap_evidence: r"promote failed: .*was changed: it is not what was recorded under that id",
    change_the_policy: r"promote failed: .*the policy lenient was changed after it was reviewed",
    promote_a_failed_candidate_by_hand: r"^exit status [34]: .*; approved: exit status 4: .*(gates come|is not what)",
    replay_an_old_approval: r"^exit status 0: .*; another version: exit status 4: .*is about made-binary version 1",
    set_the_alias_as_a_trainer: r"^(\S+: 403(, )?){4}$",
    swap_the_champions_files: r"^before: exit status 0; after: exit status 4: .*was recorded: model_files",
    register_what_the_model_does_not_predict: r"^refused: .*does not give the predictions that its run logged",
    register_a_network_with_code: r"^refused: .* names keras\.layers\.Lambda, .*; refused: .* names package\.of\.ones",
    log_code_of_ones_own: r"^refused: .*not this release.s: pyfunc\.py.*; refused: .*requirements\.txt of its mod",
    **page_form.ATTEMPTS,
    write_markdown_into_a_note: r"^(refused: .*?interval_notes\.roc_auc: .*? is nothing that a training.*?(; |$)){3}",
    pass_a_demo_model_off: r"^refused: .*; with the dataset.s name: refused: ",
}
"""Each attempt with the pattern of its right outcome.

Without a pattern, an attempt that failed for another reason, such as a server that is down, would look right.
"""


def rows() -> Iterator[Row]:
    """Yields a row for each attempt. Before and after the attempts, versions become champion by approval."""
    with _start_product() as product:
        for run in ("first", "second"):
            yield _try_promotion(product, run)
        yield _try_page(product)
        for attempt, outcome in ATTEMPTS.items():
            before = _read_outcome(product)
            try:
                happened, tried = attempt(product), True
            except RuntimeError as error:
                happened, tried = f"could not be tried: {error}", False
            promoted = _read_outcome(product) != before
            right = tried and not promoted and re.search(outcome, happened) is not None
            yield Row(str(attempt.__doc__), f"{'PROMOTED; ' if promoted else ''}{happened}", right)
        yield _try_new_review(product)


def _try_promotion(product: AttackedProduct, run: str) -> Row:
    candidate = product.register_candidate()
    product.api("engineer").trigger("promote", run, product.make_conf(candidate))
    product.wait_for_review(run)
    product.answer(run)
    return _make_row(product, candidate, f"{run} champion", product.wait_for_end(run))


def _try_page(product: AttackedProduct) -> Row:
    """Check that an approval by the form on the review page counts."""
    candidate = product.register_candidate()
    run = product.start_promotion(candidate)
    product.wait_for_review(run)
    happened = page_form.answer_by_page(product, run, "reviewer", "Approve")
    return _make_row(product, candidate, "approved on the review page", f"{happened}; {product.wait_for_end(run)}")


def _try_new_review(product: AttackedProduct) -> Row:
    """Check that an approval under another policy is refused, and counts after a review in another run."""
    candidate = product.register_candidate()
    with product.approved_but_not_carried_out(candidate) as run:
        product.world.policy.write_text(POLICY.replace("0.8", "0.7"))
    try:
        refused = product.wait_for_end(run)
        again = product.start_promotion(candidate)
        product.wait_for_review(again)
        product.answer(again)
        return _make_row(
            product, candidate, "reviewed anew under a new policy", f"{refused}; then {product.wait_for_end(again)}"
        )
    finally:
        product.world.policy.write_text(POLICY)


def _make_row(product: AttackedProduct, candidate: dict[str, Any], what: str, happened: str) -> Row:
    champion = _read_outcome(product)[0].get("champion")
    return Row(f"(the way it should be: {what})", happened, champion == candidate["version"])


def _read_outcome(product: AttackedProduct) -> tuple[dict[str, int], list[Any], int]:
    """Returns what an attempt must not change: the champions' aliases, records that promote, and the models' number."""
    models = product.world.client.search_registered_models()
    aliases = {
        alias if model.name == MODEL else f"{model.name} {alias}": int(version)
        for model in models
        for alias, version in model.aliases.items()
        if alias in ("champion", "previous")
    }
    # The stack has made a key for the audit log by now, which these settings read.
    settings = Settings(home=product.stack.home, store=product.world.store.root)
    records = AuditLog(product.world.store, settings).read_records()
    promoting = [r["sequence"] for r in records if r["event"] in (APPROVED, ROLLED_BACK)]
    return aliases, promoting, len({model.name for model in models})


@contextmanager
def _start_product() -> Iterator[AttackedProduct]:
    with tempfile.TemporaryDirectory(prefix="breakhis-trust-") as name:
        folder = Path(name)
        home = folder / "home"
        home.mkdir()
        sets, uri = ("made", "real"), f"sqlite:///{home / 'mlflow.db'}"
        world = RegistryWorld.create(folder, uri, sets, pictures=True, with_starter=False)
        dags = folder / "dags"
        dags.mkdir()
        for dag in ("promote", "rollback", "withdraw", "audit"):
            shutil.copy(PROJECT / "dags" / f"{dag}.py", dags)
        (dags / "again.py").write_text(_AGAIN)
        (dags / "retrain_made.py").write_text(_RETRAIN)
        airflow_server.DAGS = dags
        stack = Stack(Settings(home=home, conf=world.conf, store=world.store.root))
        try:
            stack.up()
            _wait_for_dags(stack)
            # The stack has made a key for the audit log by now, which its stages use.
            key = Settings(home=home, store=world.store.root).audit_key
            world.settings = world.settings.model_copy(update={"audit_key": key})
            world.record_starter()
            yield AttackedProduct(world, stack)
        finally:
            stack.down()


def _wait_for_dags(stack: Stack) -> None:
    wanted = {"promote", "rollback", "withdraw", "audit", "again", "retrain_made"}
    deadline = time.monotonic() + _SECONDS
    while not wanted <= {dag["dag_id"] for dag in stack.api("admin").dags()}:
        if time.monotonic() > deadline:
            raise RuntimeError(f"Airflow has not read {', '.join(sorted(wanted))}")
        time.sleep(1)
