"""The kinds of input that come through Airflow: YAML in DAG files, confs of runs, reviewers' answers, web pages."""

import importlib.util
import json
import os
import random
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch
from urllib.parse import quote, unquote, urlencode, urlsplit

import click
import requests
from requests.adapters import HTTPAdapter

from ml.core.errors import ConfigError
from ml.core.settings import Settings
from ml.core.store import Json, Store
from ml.promotion.audit_log import AuditLog
from ml.promotion.gates import judge_evidence
from ml.promotion.policies import load_policy
from ml.promotion.reviews import APPROVE, REJECT, parse_reason
from ml.promotion.starters import parse_origin
from tests.fuzz.mutation import ODD_TEXTS, dump_json, mutate_json, mutate_text
from tests.helpers.made_up import evidence

ROOT = Path(__file__).resolve().parents[2]


def copy_conf(scratch: Path) -> Path:
    """Returns a conf folder with the YAML files that are shipped."""
    conf = scratch / "conf"
    for kind in ("sources", "training_sets", "policies"):
        (conf / kind).mkdir(parents=True)
        for file in (ROOT / "dags" / kind).glob("*.yaml"):
            (conf / kind / file.name).write_bytes(file.read_bytes())
    return conf


def write_mutated(file: Path, text: str, rng: random.Random) -> None:
    """Puts a mutated text at a path; or, rarely, what is no file: a link to itself, a folder or a named pipe."""
    if os.path.lexists(file):
        file.rmdir() if file.is_dir() else file.unlink()
    if rng.random() < 0.97:
        file.write_bytes(mutate_text(text, rng))
    else:
        rng.choice((lambda: file.symlink_to(file.name), file.mkdir, lambda: os.mkfifo(file)))()


def _set_environment(scratch: Path) -> None:
    """Sets what Airflow and the settings read when they are first imported."""
    os.environ |= {
        "AIRFLOW_HOME": str(scratch / "airflow"),
        "AIRFLOW__CORE__DAGS_FOLDER": str(ROOT / "dags"),
        "AIRFLOW__CORE__PLUGINS_FOLDER": str(ROOT / "plugins"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__USAGE_DATA_COLLECTION__ENABLED": "False",
        "BREAKHIS_HOME": str(scratch / "home"),
        "BREAKHIS_STORE": (scratch / "store").as_uri(),
        "BREAKHIS_CONF": str(copy_conf(scratch)),
    }


# --- YAML that becomes a DAG --------------------------------------------------------------------------------------


class _DagFile(NamedTuple):
    texts: list[str]
    file: Path
    build: Callable[[Path], dict[str, Any]]


def prepare_dag_file(module: str, file: str, *examples: str) -> Callable[[Path], _DagFile]:
    """Returns what prepares a kind of YAML file of which a DAG file makes DAGs."""

    def prepare(scratch: Path) -> _DagFile:
        _set_environment(scratch)
        from breakhis_airflow.yaml_dags import build_dags

        spec = importlib.util.spec_from_file_location(f"fuzzed_{module}", ROOT / "dags" / f"{module}.py")
        assert spec
        assert spec.loader
        loaded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
        build_one = next(value for name, value in vars(loaded).items() if name.endswith("_dag"))
        path = scratch / "conf" / file
        texts = [name_made(example.read_text()) for pattern in examples for example in sorted(ROOT.glob(pattern))]
        return _DagFile(texts or [_NOTIFICATIONS], path, lambda path: build_dags([path], build_one, prefix=module))

    return prepare


_NOTIFICATIONS = """
on_failure:
  - notifier: airflow.providers.smtp.notifications.smtp.SmtpNotifier
    arguments:
      smtp_conn_id: smtp_default
      from_email: airflow@example.org
      to: [data-team@example.org]
      subject: "{{ failure.subject }}"
      html_content: "{{ failure.html }}"
on_review:
  - notifier: airflow.providers.smtp.notifications.smtp.SmtpNotifier
    arguments: {to: reviewers@example.org, from_email: a@b.org, subject: "{{ review.subject }}", html_content: ""}
"""


def name_made(text: str) -> str:
    """Returns a YAML text whose name agrees with its file, so that what follows is looked at as well."""
    return "\n".join("name: made" if line.startswith("name: ") else line for line in text.splitlines())


def use_dag_file(prepared: _DagFile, rng: random.Random) -> None:
    """Builds the DAG of a mutated file, beside one that is good, and stores it as Airflow does."""
    from airflow.serialization.serialized_objects import DagSerialization

    write_mutated(prepared.file, rng.choice(prepared.texts), rng)
    [dag] = prepared.build(prepared.file).values()
    DagSerialization.to_dict(dag)
    if "invalid" in dag.tags:
        raise ConfigError(dag.description)


# --- confs of runs ------------------------------------------------------------------------------------------------

_CONFS: dict[str, Json] = {
    "promote": {
        **{"model": "made-binary", "version": "1", "evidence": "evidence-0123456789ab"},
        "origin": {"dag": "retrain_demo", "run": "manual__2026"},
    },
    "rollback": {"model": "made-binary", "version": "1", "reason": "it fails on 400X", "although_withdrawn": False},
    "withdraw": {"model": "made-binary", "version": "1", "reason": "its data were mixed up"},
    "retrain_demo": {"preset": "demo", "seed": 3},
    "ingest_demo": {},
    "audit": {},
    "remind": {},
}


def prepare_confs(scratch: Path) -> dict[str, Any]:
    """Returns the DAGs that are shipped."""
    _set_environment(scratch)
    from airflow.dag_processing.dagbag import DagBag

    bag = DagBag(str(ROOT / "dags"))
    assert not bag.import_errors
    return {name: bag.dags[name] for name in _CONFS}


def use_conf(dags: dict[str, Any], rng: random.Random) -> None:
    """Checks a conf as Airflow and our first hook do, and fills it into the command lines of the DAG's tasks."""
    from airflow.sdk.definitions.param import process_params
    from airflow.sdk.exceptions import AirflowFailException, ParamValidationError

    from breakhis_airflow.operators import StageOperator
    from breakhis_airflow.run_conf import refuse_unknown_conf

    name = rng.choice(list(dags))
    dag, conf = dags[name], mutate_json(_CONFS[name], rng)
    conf = conf if isinstance(conf, dict) else {"made": conf}
    parse_origin(conf)
    parse_reason(conf)
    try:
        refuse_unknown_conf({"dag": dag, "dag_run": SimpleNamespace(conf=conf)})
        params = process_params(dag, dag.tasks[0], conf, suppress_exception=False)
        for task in dag.tasks:
            if isinstance(task, StageOperator):
                _parse_command(task, params)
    except AirflowFailException as error:
        raise ConfigError(str(error)) from None
    except ParamValidationError:
        raise ConfigError("Airflow refuses it") from None


def _parse_command(task: Any, params: Any) -> None:
    """Fills a conf into a task's arguments, and splits the command line as the command does: no value is an option."""
    from breakhis_airflow.operators import Job, _check_argument
    from ml.cli import cli

    words = [task.render_template(word, _Context(params=params)) for word in task.arguments]
    for word in words:
        _check_argument(word, task.stage)
    job = Job([task.stage, *words[: task.operands_at]], words[task.operands_at :], "jobs/x.json", {}, {})
    command, rest = cli, job.command("file:///store")[1:]
    while isinstance(command, click.Group):
        command, rest = command.commands[rest[0]], rest[1:]
    options, *_ = command.make_parser(click.Context(command)).parse_args(list(rest))
    assert not options.get("help"), f"{words} asks for help"
    assert options["as_json"], f"{words} leaves its result out"


class _Context(dict[str, Any]):
    """What templates are filled with; of other tasks comes a made-up result."""

    def __init__(self, **values: Any) -> None:
        made = SimpleNamespace(xcom_pull=lambda **_: defaultdict(lambda: "made-0123456789ab"))
        super().__init__(values, ti=made, run_id="manual__2026")


# --- answers of Airflow's API -------------------------------------------------------------------------------------


class _Airflow:
    """Answers every request with JSON of Airflow's, mutated for each input."""

    def __init__(self, store: Store) -> None:
        self.settings = Settings(
            store=store.root,
            airflow_url="http://127.0.0.1:1",
            airflow_user="service",
            airflow_password="x",
            reviewers=("reviewer", "second"),
        )
        conf = {"model": "made-binary", "version": "1", "evidence": "evidence-0", "reason": "it fails on 400X"}
        run = {"dag_run_id": "r", "conf": conf, "triggering_user_name": "engineer", "run_after": "2026-01-01"}
        run |= {"run_type": "asset_triggered", "triggered_by": "rest_api", "state": "success"}
        review = {"response_received": True, "responded_by_user": {"id": "7", "name": "reviewer"}, "body": "text"}
        review |= {"chosen_options": [APPROVE], "params_input": {"reason": "it is good"}, "responded_at": "2026"}
        other = review | {"responded_by_user": {"id": "8", "name": "second"}, "chosen_options": [REJECT]}
        events = [{"source_dag_id": "ingest_demo", "source_run_id": "x"}]
        self._good: dict[str, Any] = {
            "token": {"access_token": "t"},
            "review": review,
            "review_2": other,
            "tries": review,
            "dagRuns": {"dag_runs": [run, {**run, "dag_run_id": "r2"}], "total_entries": 2},
            "run": run,
            "upstreamAssetEvents": {"asset_events": events, "total_entries": 1},
            "taskInstances": {"task_instances": [{"task_id": "review", "try_number": 2}], "total_entries": 1},
            "reviews-asked": {"reviews": ["0199", "0200"]},
        }
        self._answers: dict[str, tuple[int, bytes]] = {}
        patch.object(HTTPAdapter, "send", self._send).start()

    def mutate(self, rng: random.Random) -> None:
        """Makes other answers, one or two of which are odd."""
        self._answers = {name: (200, json.dumps(answer).encode()) for name, answer in self._good.items()}
        for name in rng.sample(list(self._good), rng.randint(1, 2)):
            data = dump_json(mutate_json(self._good[name], rng), rng)
            self._answers[name] = (rng.choice((200, 200, 200, 200, 404, 422, 500)), data)

    def _send(self, request: requests.PreparedRequest, **_: Any) -> requests.Response:
        parts = unquote(urlsplit(str(request.url)).path).split("/")
        name = [part for part in parts if part in self._answers][-1]
        name = "run" if name == "dagRuns" and parts[-1] != name else name
        response = requests.Response()
        response.status_code, response._content = self._answers[name]
        response.request, response.url = request, str(request.url)
        return response


def prepare_answers(scratch: Path) -> _Airflow:
    """Returns the stand-in for Airflow."""
    return _Airflow(Store((scratch / "store").as_uri()))


def use_answers(airflow: _Airflow, rng: random.Random) -> None:
    """Reads the run of a promotion and its answers, as the stage ``promote`` does."""
    from ml.promotion.answers import ReviewRun

    airflow.mutate(rng)
    run = ReviewRun(airflow.settings, "promote", "r")
    run.check_subject("made-binary", "1")
    run.find_unrecorded_rejection("made-binary", "1")
    asked = {"event": "asked", "sequence": 1, "version": 1, "evidence": "evidence-0", "run": "promote/r"}
    records = [asked | {"review": "0199"}]
    run.check_questions_are_there(1, records)
    run.list_settled_reviews(1, records)
    answers = run.read_answers("made-binary", "1", None)
    run.check_approvers_independent(answers, {"dag_runs": [["retrain_demo", "r"]]}, [])


# --- web pages ----------------------------------------------------------------------------------------------------


class _Pages(NamedTuple):
    client: Any
    store: Store
    bundle: Json
    records: dict[Path, bytes]
    waiting: list[Any]


def prepare_pages(scratch: Path) -> _Pages:
    """Returns a client of the pages, for a reader who may see all of them."""
    _set_environment(scratch)
    from airflow.api_fastapi import app as airflow_app
    from airflow.api_fastapi.auth.managers.simple.simple_auth_manager import SimpleAuthManager
    from airflow.api_fastapi.auth.managers.simple.user import SimpleAuthManagerUser
    from airflow.api_fastapi.core_api.security import get_user
    from fastapi import FastAPI
    from fastapi.testclient import TestClient

    from breakhis_airflow import airflow_database
    from breakhis_airflow.airflow_database import AuditCheck
    from breakhis_airflow.web import create_app, find_airflow

    store = Store((scratch / "store").as_uri())
    app = create_app()
    reviewer = SimpleAuthManagerUser(username="reviewer", role="OP")
    app.dependency_overrides |= {get_user: lambda: reviewer, app.state.may_read: lambda: None}
    app.dependency_overrides[find_airflow] = lambda: FastAPI()  # noqa: PLW0108 (its own parameters would be asked for)
    patch.object(airflow_app, "get_auth_manager", SimpleAuthManager).start()
    waiting: list[Any] = []
    patch.object(airflow_database, "read_waiting_reviews", lambda: waiting).start()
    patch.object(airflow_database, "read_run_states", lambda _: {}).start()
    patch.object(airflow_database, "read_last_answer", lambda _: None).start()
    patch.object(airflow_database, "read_audit_check", AuditCheck).start()
    log = AuditLog(store, Settings(home=scratch, store=store.root, audit_key="key"))
    log.append("approved", "made-binary", version=1, by="reviewer", reason="fine", champion=None, evidence="e", of=[])
    log.append("rejected", "made-binary", version=2, by="reviewer", reason="blurred", evidence="f", bundle=None, of=[])
    store.compare_and_set("refs/sources/made.json", {"validation": "validation-0123456789ab"}, None)
    files = [*(scratch / "store" / "audit" / "log").glob("*.json"), scratch / "store" / "refs/sources/made.json"]
    scores = {"images": 5, "cases": 2, "recognised": 1, "metrics": {"accuracy": 0.8}, "intervals": {}}
    facts = {"slices": {"magnification": {"100": scores}}, "artifacts": {"evaluation/roc.png": "0"}}
    facts["validations"] = {"made": "validation-0123456789ab"}
    champion = evidence(version=2, **facts)
    pair = {"metric": "roc_auc", "where": "out of fold", "images": 9, "cases": 4, "champion": 0.95, "candidate": 0.9}
    pair |= {"difference": -0.05, "low": -0.04, "size": 0.043, "power": 0.6, "estimable": True, "reason": ""}
    comparison = {"version": 2, "comparable": True, "reason": "", "pairs": [pair]}
    candidate = evidence(version=3, **facts)
    bundle = {"evidence_id": "evidence-0123456789ab", "evidence": candidate, "champion": champion}
    bundle |= {"comparison": comparison, **judge_evidence(candidate, load_policy("demo", ROOT / "dags"), comparison)}
    client = TestClient(app, follow_redirects=False)
    return _Pages(client, store, bundle, {file: file.read_bytes() for file in files}, waiting)


def use_page(pages: _Pages, rng: random.Random) -> None:
    """Asks for a page by odd names, of an odd bundle, or over an odd audit log."""
    from breakhis_airflow.airflow_database import WaitingReview

    for file, data in pages.records.items():
        file.write_bytes(data)
    pages.waiting.clear()
    kind, made = rng.randrange(5), ""
    paths = ["/reviews/"]
    if kind == 0:
        names = [quote(rng.choice(ODD_TEXTS)[:3000].encode("utf-8", "surrogatepass"), safe="") for _ in range(3)]
        names = [rng.choice((name, "bundle-0123456789ab", "candidate", "made")) for name in names]
        paths = [f"/{rng.choice(('reviews', 'docs', 'sources'))}/" + "/".join(names[: rng.randint(1, 3)])]
        paths += [paths[0] + "/"]
    elif kind == 1:
        content = mutate_json(pages.bundle, rng) if rng.random() < 0.9 else pages.bundle
        if isinstance(content, dict) and "\\ud" not in repr(content):
            try:
                made = pages.store.create("bundle", content, content)
            except ValueError:  # NaN, which no object holds
                return
            pages.waiting.append(WaitingReview("Promote?", made, "2026-11-23 12:00", "/form"))
            paths += [f"/reviews/{made}/", f"/reviews/{made}/candidate/roc.png"]
    elif kind == 2:
        _send_form(pages, rng)
    else:
        file = rng.choice(list(pages.records))
        file.write_bytes(dump_json(mutate_json(json.loads(pages.records[file]), rng), rng))
        paths += ["/sources/made"]
    for path in paths:
        answer = pages.client.get(path)
        assert answer.status_code < 500, f"{answer.status_code}: {answer.text[:200]}"
        if kind == 1 and made in path and answer.status_code >= 400:
            assert made in answer.text, f"a message that names nothing: {answer.text[:200]}"
        assert answer.status_code < 400 or len(answer.text) < 2_000, "a long message"


def _send_form(pages: _Pages, rng: random.Random) -> None:
    """Sends the answer form of a review with odd fields, or something else in its place."""
    from breakhis_airflow.airflow_database import WaitingReview

    made = pages.store.create("bundle", pages.bundle, pages.bundle)
    pages.waiting.append(WaitingReview("Promote?", made, "", "/form", run="r", id="0199", assigned=("reviewer",)))
    page = pages.client.get(f"/reviews/{made}/").text
    token = page.split('name="token" value="')[1].split('"', maxsplit=1)[0]
    fields = {"token": token, "option": rng.choice(("Approve", "Reject")), "reason": "as made"}
    if odd := rng.choice(("", *fields)):
        text = rng.choice(ODD_TEXTS)
        fields[odd] = rng.choice((text, fields[odd] + text, fields[odd][: rng.randrange(len(fields[odd]))]))
    body = urlencode({key: value.encode("utf-8", "surrogatepass") for key, value in fields.items()}).encode()
    if rng.random() < 0.2:
        body = rng.choice(
            (b"", b"%", b"&&=&", b"token", body[: rng.randrange(len(body))], b"a=b&" * 1000, b"\xff" * 99)
        )
    kind = rng.choice(("application/x-www-form-urlencoded",) * 9 + ("application/json",))
    for step in ("confirm", "answer"):
        answer = pages.client.post(f"/reviews/{made}/{step}", content=body, headers={"content-type": kind})
        assert answer.status_code < 500, f"{answer.status_code}: {answer.text[:200]}"
        assert answer.status_code != 303, "answered without the first step"
        assert answer.status_code < 400 or "Your answer was not taken" in answer.text, "no page in words"
