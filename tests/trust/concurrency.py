"""Twenty promotions and rollbacks at once, of three models, by processes that are killed at random moments.

Each decision has a process of its own, as it would have an Airflow task. One that is killed is started again, as
Airflow would; one that is refused because the champion changed since its review is reviewed anew, as the refusal says.
In the end every decision is in the log exactly once, the log is whole, and each model has the one champion that it
names.
MLflow is a server; Airflow's record of the answers is served over HTTP by a stand-in.
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
from ml.promotion.registration import register_run
from ml.registry.registered_model import RegisteredModel, audit_anchors
from tests.helpers.registry_world import RegistryWorld
from tests.trust.rows import Row
from tests.trust.servers import mlflow_server

SETS = ("one", "two", "three")
_KILLS = 15
_FORMER = 2  # champions of each model before it begins, to roll back to


class Decision(NamedTuple):
    """One that somebody has made."""

    model: str
    version: int
    rollback: bool

    @property
    def run(self) -> str:
        return f"{'back' if self.rollback else 'on'}-{self.model}-v{self.version}"


class Record:
    """Airflow's record, over HTTP: runs and answers by the address that they are asked for at."""

    def __init__(self) -> None:
        self.answers: dict[str, Any] = {}
        record = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if self.path == "/auth/token":
                    self._send({"access_token": "t"}, 201)
                else:  # the workers' own: what their reviewer has read and answered
                    self._send({})

            def do_PUT(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                record.answers |= body
                self._send({})

            def do_GET(self) -> None:
                found = record.answers.get(self.path)
                self._send(found if found else {"detail": "not found"}, 200 if found else 404)

            def _send(self, body: Any, status: int = 200) -> None:
                data = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


def _review(decision: Decision, evidence: str, store: Store, settings: Settings) -> None:
    """The reviewer reads what there is now, and says yes."""
    import requests

    number = str(decision.version)
    conf: dict[str, Any] = {"model": decision.model, "version": number}
    if decision.rollback:
        conf["reason"] = "it was better"
        try:
            body = propose_rollback(decision.model, number, conf["reason"], store, settings)["review"]
        except Refused:  # it is the champion just now, and may not be when its turn comes
            body = "there was nothing to read"
    else:
        conf["evidence"] = evidence
        body = judge_version(decision.model, number, store, settings)["review"]
    at = f"/api/v2/dags/{'rollback' if decision.rollback else 'promote'}/dagRuns/{decision.run}"
    answer = {
        "response_received": True,
        "responded_by_user": {"id": "reviewer", "name": "reviewer"},
        "chosen_options": ["Approve"],
        "params_input": {"reason": f"yes to {decision.run}"},
        "responded_at": str(time.time()),
        "body": body,
    }
    told = {at: {"conf": conf, "triggering_user_name": "engineer"}, f"{at}/taskInstances/review/-1/hitlDetails": answer}
    requests.put(settings.airflow_url, json=told, timeout=60).raise_for_status()


def _decide(decision: Decision, evidence: str, settings: Settings) -> None:
    """What an Airflow task would do, over and over: until it is decided, or for good refused."""
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
    """A row a decision, and one for each model and for the log."""
    with tempfile.TemporaryDirectory(prefix="breakhis-trust-") as folder, mlflow_server(Path(folder)) as mlflow_uri:
        record = Record()
        try:
            yield from _rows(Path(folder), mlflow_uri, record, random.Random(seed))
        finally:
            record.server.shutdown()


def _rows(folder: Path, mlflow_uri: str, record: Record, rng: random.Random) -> Iterator[Row]:
    world = RegistryWorld.create(folder, mlflow_uri, SETS, airflow_url=record.url)
    evidence: dict[Decision, str] = {}
    for name in SETS:
        versions = [register_run(world.log_run(0.85 + 0.01 * k, name), world.store, world.settings) for k in range(7)]
        for one in versions:
            decision = Decision(one["model"], one["version"], rollback=False)
            if one["version"] <= _FORMER:
                _review(decision, one["evidence"], world.store, world.settings)
                _decide(decision, one["evidence"], world.settings)
            else:
                evidence[decision] = one["evidence"]
        evidence |= {Decision(versions[0]["model"], k, rollback=True): "" for k in range(1, _FORMER + 1)}
    wanted = list(evidence)[: 20 if len(evidence) >= 20 else None]
    before = {record["sequence"] for record in AuditLog(world.store, world.settings).read_records()}
    kills = _run(wanted, evidence, world, rng)

    log = AuditLog(world.store, world.settings)
    for model in sorted({one.model for one in wanted}):
        reconcile_aliases(model, log, world.settings)
    records = [one for one in log.read_records() if one["sequence"] not in before]
    for decision in wanted:
        event = "rolled back" if decision.rollback else "approved"
        mine = [
            r
            for r in records
            if (r["event"], r["model"], r.get("version")) == (event, decision.model, decision.version)
        ]
        happened = f"in the log {len(mine)} times, killed {kills.get(decision, 0)} times"
        # A rollback to what has become champion meanwhile has nothing to do.
        yield Row(decision.run, happened, len(mine) == 1 or (decision.rollback and not mine))
    for model in sorted({one.model for one in wanted}):
        found = RegisteredModel(model, world.settings).aliases()
        last = [r for r in log.read_model_records(model) if r["event"] == CARRIED_OUT][-1]
        moved = find_alias_fault(model, log, world.settings)
        yield Row(
            f"{model}: champion",
            f"version {found.champion}, by the log {last['champion']}; previous {found.previous}, by the log "
            f"{last['previous']}",
            not moved and (found.champion, found.previous) == (last["champion"], last["previous"]),
        )
    faults = log.verify(audit_anchors(world.settings))
    yield Row(f"the log of {len(records)} new records", "; ".join(faults) or "whole", not faults)
    total = sum(kills.values())
    yield Row("processes killed", f"{total} of {_KILLS}", total == _KILLS)


def _run(
    wanted: list[Decision], evidence: dict[Decision, str], world: RegistryWorld, rng: random.Random
) -> dict[Decision, int]:
    """Run every decision to its end; returns how often the process of each was killed."""
    for decision in wanted:
        _review(decision, evidence[decision], world.store, world.settings)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.trust.preload"])
    kills: dict[Decision, int] = {}
    running: dict[Decision, Any] = {}

    def start(decision: Decision) -> None:
        running[decision] = context.Process(target=_decide, args=(decision, evidence[decision], world.settings))
        running[decision].start()

    for decision in wanted:
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
