"""Twenty promotions and rollbacks of three models at once, by processes that are killed at random moments.

Each decision has a process of its own, as it would have an Airflow task. A killed process is started again, as by
Airflow. A decision that is refused because the champion changed since its review is reviewed anew, as the refusal says.
In the end every decision is in the log exactly once, the log is whole, and each model has the champion that it names.
MLflow is a server; a stand-in serves Airflow's record of the answers over HTTP.
"""

import json
import multiprocessing
import random
import re
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

from ml.core.errors import Refused, TryAgain
from ml.core.settings import Settings
from ml.core.store import Store
from ml.promotion.alias_history import CARRIED_OUT
from ml.promotion.audit_log import AuditLog
from ml.promotion.champion import find_alias_fault, reconcile_aliases
from ml.promotion.decisions import promote_version, propose_rollback, roll_back
from ml.promotion.judging import judge_version
from ml.registry.registered_model import RegisteredModel, audit_anchors
from tests.helpers.registry_world import RegistryWorld
from tests.trust.rows import Row
from tests.trust.servers import mlflow_server

SETS = ("one", "two", "three")
_KILLS = 15
_FORMER_CHAMPIONS = 2  # of each model before the decisions begin, to roll back to


class Decision(NamedTuple):
    """An approved promotion or rollback."""

    model: str
    version: int
    rollback: bool

    @property
    def run(self) -> str:
        return f"{'back' if self.rollback else 'on'}-{self.model}-v{self.version}"


class AirflowStandIn:
    """Serves Airflow's record over HTTP: runs and answers, by the path that they are read at."""

    def __init__(self) -> None:
        self.answers: dict[str, Any] = {}
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if self.path == "/auth/token":
                    self._send({"access_token": "t"}, 201)
                else:  # the processes' own requests, by which they put answers here
                    self._send({})

            def do_PUT(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                stand_in.answers |= body
                self._send({})

            def do_GET(self) -> None:
                answer = stand_in.find(self.path.partition("?")[0])
                self._send(answer if answer else {"detail": "not found"}, 200 if answer else 404)

            def _send(self, body: Any, status: int = 200) -> None:
                data = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self._start(Handler)

    def find(self, path: str) -> Any:
        """Returns what Airflow answers to a request for this path; None where it has nothing there."""
        if path.endswith("/dagRuns"):
            prefix = f"{path}/"
            runs = {key.removeprefix(prefix): run for key, run in self.answers.items() if key.startswith(prefix)}
            listed = [run | {"dag_run_id": name} for name, run in runs.items() if "/" not in name]
            return {"dag_runs": listed, "total_entries": len(listed)}
        if path.endswith("/taskInstances"):
            return {"task_instances": [{"task_id": "review", "try_number": 1}], "total_entries": 1}
        return self.answers.get(path.removesuffix("/tries/1"))

    def _start(self, handler: type[BaseHTTPRequestHandler]) -> None:
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


def _review(decision: Decision, evidence: str, store: Store, settings: Settings) -> None:
    """Approve the present review body, as its reviewer would."""
    import requests

    number = str(decision.version)
    conf: dict[str, Any] = {"model": decision.model, "version": number}
    if decision.rollback:
        conf["reason"] = "it was better"
        try:
            asked = propose_rollback(decision.model, number, conf["reason"], store, settings)
        except Refused:  # it is champion at the moment, but may not be when it is decided
            asked = {"title": "", "review": "there was nothing to read"}
    else:
        conf["evidence"] = evidence
        asked = judge_version(decision.model, number, store, settings)
    path = f"/api/v2/dags/{'rollback' if decision.rollback else 'promote'}/dagRuns/{decision.run}"
    answer = {
        "response_received": True,
        "responded_by_user": {"id": "reviewer", "name": "reviewer"},
        "chosen_options": ["Approve"],
        "params_input": {"reason": f"yes to {decision.run}"},
        "responded_at": str(time.time()),
        "subject": asked["title"],
        "body": asked["review"],
    }
    run = {"conf": conf, "triggering_user_name": "engineer"}
    record = {path: run, f"{path}/taskInstances/review/-1/hitlDetails": answer}
    requests.put(settings.airflow_url, json=record, timeout=60).raise_for_status()


def _decide(decision: Decision, evidence: str, settings: Settings) -> None:
    """Do what an Airflow task would, over and over, until the decision is carried out or finally refused."""
    store = Store(settings.store)
    rng = random.Random(decision.run)
    while True:
        try:
            if decision.rollback:
                done = roll_back(decision.model, str(decision.version), decision.run, store, settings)
            else:
                done = promote_version(
                    decision.model, str(decision.version), decision.run, store, settings, evidence=evidence
                )
        except TryAgain:
            time.sleep(rng.random())
        except Refused as refusal:
            if "is the champion already" in str(refusal):
                return
            if not re.search(r"judged and reviewed anew|confirmed anew", str(refusal)):
                raise
            _review(decision, evidence, store, settings)
        else:
            assert done["version"] == decision.version
            return


def rows(seed: int = 0) -> Iterator[Row]:
    """Yields a row for each decision, for each model, for the log and for the killed processes."""
    with tempfile.TemporaryDirectory(prefix="breakhis-trust-") as folder, mlflow_server(Path(folder)) as mlflow_uri:
        airflow = AirflowStandIn()
        try:
            yield from _rows(Path(folder), mlflow_uri, airflow, random.Random(seed))
        finally:
            airflow.server.shutdown()


def _rows(folder: Path, mlflow_uri: str, airflow: AirflowStandIn, rng: random.Random) -> Iterator[Row]:
    world = RegistryWorld.create(folder, mlflow_uri, SETS, airflow_url=airflow.url)
    evidence: dict[Decision, str] = {}
    for name in SETS:
        versions = [world.register(world.log_run(0.85 + 0.01 * k, name)) for k in range(7)]
        for version in versions:
            decision = Decision(version["model"], version["version"], rollback=False)
            if version["version"] <= _FORMER_CHAMPIONS:
                _review(decision, version["evidence"], world.store, world.settings)
                _decide(decision, version["evidence"], world.settings)
            else:
                evidence[decision] = version["evidence"]
        evidence |= {Decision(versions[0]["model"], k, rollback=True): "" for k in range(1, _FORMER_CHAMPIONS + 1)}
    decisions = list(evidence)[: 20 if len(evidence) >= 20 else None]
    before = {record["sequence"] for record in AuditLog(world.store, world.settings).read_records()}
    kills = _run_and_kill(decisions, evidence, world, rng)

    log = AuditLog(world.store, world.settings)
    for model in sorted({decision.model for decision in decisions}):
        reconcile_aliases(RegisteredModel(model, world.settings), log)
    records = [record for record in log.read_records() if record["sequence"] not in before]
    for decision in decisions:
        event = "rolled back" if decision.rollback else "approved"
        own_records = [
            r
            for r in records
            if (r["event"], r["model"], r.get("version")) == (event, decision.model, decision.version)
        ]
        happened = f"in the log {len(own_records)} times, killed {kills.get(decision, 0)} times"
        # A rollback to a version that has become champion meanwhile has nothing to do.
        yield Row(decision.run, happened, len(own_records) == 1 or (decision.rollback and not own_records))
    for model in sorted({decision.model for decision in decisions}):
        current = RegisteredModel(model, world.settings).aliases()
        last = [r for r in log.read_model_records(model) if r["event"] == CARRIED_OUT][-1]
        alias_fault = find_alias_fault(RegisteredModel(model, world.settings), log)
        yield Row(
            f"{model}: champion",
            f"version {current.champion}, by the log {last['champion']}; previous {current.previous}, by the log "
            f"{last['previous']}",
            not alias_fault and (current.champion, current.previous) == (last["champion"], last["previous"]),
        )
    faults = log.verify(audit_anchors(world.settings))
    yield Row(f"the log of {len(records)} new records", "; ".join(faults) or "whole", not faults)
    total = sum(kills.values())
    yield Row("processes killed", f"{total} of {_KILLS}", total == _KILLS)


def _run_and_kill(
    decisions: list[Decision], evidence: dict[Decision, str], world: RegistryWorld, rng: random.Random
) -> dict[Decision, int]:
    """Run every decision to its end; returns how often the process of each was killed."""
    for decision in decisions:
        _review(decision, evidence[decision], world.store, world.settings)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.trust.preload"])
    kills: dict[Decision, int] = {}
    running: dict[Decision, Any] = {}

    def start(decision: Decision) -> None:
        running[decision] = context.Process(target=_decide, args=(decision, evidence[decision], world.settings))
        running[decision].start()

    for decision in decisions:
        start(decision)
    next_kill = time.monotonic() + 2
    while running:
        time.sleep(0.05)
        for decision, process in list(running.items()):
            if process.exitcode is None:
                continue
            del running[decision]
            if process.exitcode == -signal.SIGKILL:
                start(decision)
            elif process.exitcode:
                raise RuntimeError(f"{decision.run} ended with {process.exitcode}")
        if running and sum(kills.values()) < _KILLS and time.monotonic() > next_kill:
            victim = rng.choice(sorted(running))
            running[victim].kill()
            kills[victim] = kills.get(victim, 0) + 1
            next_kill = time.monotonic() + rng.uniform(0.2, 1.5)
    return kills
