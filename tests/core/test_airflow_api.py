"""The client against a small server that answers as Airflow does."""

import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from ml.core.airflow_api import AirflowApi
from ml.core.errors import AirflowError, CredentialsError, TryAgain

PASSWORD = "correct"


class FakeAirflow(ThreadingHTTPServer):
    """Answers what ``routes`` says: (method, raw path) -> (status, JSON) or a function of query and body."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.routes: dict[tuple[str, str], Any] = {}
        self.requests: list[tuple[str, str, dict[str, list[str]], Any]] = []
        self.tokens: list[str] = []
        self.leads_to = ""
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away before the answer is part of a test."""

    def bodies(self, method: str) -> list[Any]:
        return [body for verb, path, _, body in self.requests if verb == method and path != "/auth/token"]


class _Handler(BaseHTTPRequestHandler):
    server: FakeAirflow

    def _do(self) -> None:
        parts = urlsplit(self.path)
        query = parse_qs(parts.query)
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else None
        self.server.requests.append((self.command, parts.path, query, body))
        status, answer = self._answer(parts.path, query, body)
        payload = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        if self.server.leads_to:
            self.send_header("Location", self.server.leads_to)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    do_GET = do_POST = do_PATCH = _do  # noqa: N815

    def _answer(self, path: str, query: Any, body: Any) -> tuple[int, Any]:
        if path == "/auth/token":
            if token := self.server.routes.get((self.command, path)):
                return token
            if body["password"] != PASSWORD:
                return 401, {"detail": "Invalid credentials"}
            self.server.tokens.append(f"token-{len(self.server.tokens)}")
            return 201, {"access_token": self.server.tokens[-1]}
        if path != "/api/v2/monitor/health":
            last = self.server.tokens[-1] if self.server.tokens else None
            if self.headers.get("Authorization") != f"Bearer {last}":
                return 401, {"detail": "Invalid JWT token"}
        route = self.server.routes.get((self.command, path), (404, {"detail": f"{path} was not found"}))
        return route(query, body) if callable(route) else route

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def airflow() -> Iterator[FakeAirflow]:
    server = FakeAirflow()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def api(airflow: FakeAirflow) -> AirflowApi:
    return AirflowApi(airflow.url, "engineer", PASSWORD)


def test_logs_in_once_and_again_when_the_token_has_expired(airflow: FakeAirflow, api: AirflowApi) -> None:
    airflow.routes["GET", "/api/v2/dags/d/dagRuns/r"] = (200, {"state": "running"})
    assert api.dag_run("d", "r") == {"state": "running"}
    api.dag_run("d", "r")
    assert airflow.tokens == ["token-0"]
    airflow.tokens.append("of somebody else")  # ours is not accepted any longer
    assert api.dag_run("d", "r")["state"] == "running"
    assert airflow.tokens[-1] == "token-2"


def test_health_needs_no_login(airflow: FakeAirflow) -> None:
    airflow.routes["GET", "/api/v2/monitor/health"] = (200, {"metadatabase": {"status": "healthy"}})
    assert AirflowApi(airflow.url, "", "").health()["metadatabase"]["status"] == "healthy"


def test_a_wrong_password_names_its_user_and_where_to_look(airflow: FakeAirflow) -> None:
    with pytest.raises(CredentialsError, match=r"password of user 'reviewer'.*passwords\.json"):
        AirflowApi(airflow.url, "reviewer", "wrong").dag_run("d", "r")


def test_an_empty_password_is_an_error(airflow: FakeAirflow) -> None:
    with pytest.raises(CredentialsError, match="no user or password"):
        AirflowApi(airflow.url, "reviewer", "").dag_run("d", "r")


def test_forbidden_carries_the_servers_reason(airflow: FakeAirflow, api: AirflowApi) -> None:
    path = "/api/v2/dags/promote/dagRuns/m-v1/taskInstances/review/-1/hitlDetails"
    airflow.routes["PATCH", path] = (403, {"detail": "User=engineer is not a respondent for the task."})
    with pytest.raises(CredentialsError, match=r"'engineer'.*not a respondent"):
        api.answer("promote", "m-v1", "review", "Approve", {"reason": "good"})


def test_a_missing_resource_is_an_error_with_its_status(api: AirflowApi) -> None:
    with pytest.raises(AirflowError, match=r"404.*was not found") as caught:
        api.hitl_detail("promote", "m-v1", "review")
    assert caught.value.status == 404


def test_a_run_that_exists_is_named(airflow: FakeAirflow, api: AirflowApi) -> None:
    airflow.routes["POST", "/api/v2/dags/promote/dagRuns"] = (409, {"detail": {"reason": "Unique constraint"}})
    with pytest.raises(AirflowError, match="'promote' has a run 'm-v1' already") as caught:
        api.trigger("promote", "m-v1")
    assert caught.value.status == 409


def test_rejected_fields_are_spelled_out(airflow: FakeAirflow, api: AirflowApi) -> None:
    detail = [{"loc": ["body", "conf"], "msg": "must be a dictionary"}]
    airflow.routes["POST", "/api/v2/dags/d/dagRuns"] = (422, {"detail": detail})
    with pytest.raises(AirflowError, match=r"422.*body\.conf: must be a dictionary"):
        api.trigger("d")


@pytest.mark.parametrize("status", [500, 502, 503, 429])
def test_server_errors_may_be_tried_again(airflow: FakeAirflow, api: AirflowApi, status: int) -> None:
    airflow.routes["GET", "/api/v2/dags/d/dagRuns/r"] = (status, b"oops")
    with pytest.raises(TryAgain, match=str(status)):
        api.dag_run("d", "r")


def test_a_refused_connection_may_be_tried_again() -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with pytest.raises(TryAgain, match="connection refused"):
        AirflowApi(f"http://127.0.0.1:{port}", "engineer", PASSWORD).dag_run("d", "r")


def test_a_server_that_does_not_answer_in_time_may_be_tried_again(airflow: FakeAirflow) -> None:
    gate = threading.Event()
    airflow.routes["GET", "/api/v2/monitor/health"] = lambda query, body: (gate.wait(5) and 200, {})
    with pytest.raises(TryAgain, match="no answer in time"):
        AirflowApi(airflow.url, "", "", timeout=0.2).health()
    gate.set()


def test_an_answer_that_is_no_json_is_not_airflows(airflow: FakeAirflow) -> None:
    airflow.routes["GET", "/api/v2/monitor/health"] = (200, b"<html>hello</html>")
    with pytest.raises(AirflowError, match="not the API of Airflow"):
        AirflowApi(airflow.url, "", "").health()


@pytest.mark.parametrize(
    "answer", [b"<html>Log in</html>", b"\xff", b'["token"]', {}, {"access_token": None}, {"access_token": ["a"]}]
)
def test_what_is_no_token_is_not_airflows(airflow: FakeAirflow, api: AirflowApi, answer: Any) -> None:
    airflow.routes["POST", "/auth/token"] = (200, answer)
    with pytest.raises(AirflowError, match=r"http.*/auth/token is not the API of Airflow 3"):
        api.dags()


@pytest.mark.parametrize("answer", [{}, {"dags": None}, {"dags": {"a": 1}}])
def test_a_page_without_its_items_is_not_airflows(airflow: FakeAirflow, api: AirflowApi, answer: Any) -> None:
    airflow.routes["GET", "/api/v2/dags"] = (200, answer)
    with pytest.raises(AirflowError, match=r"http.*/api/v2/dags is not the API of Airflow 3"):
        api.dags()


@pytest.mark.parametrize("address", ["/api/v2/monitor/health", "file:///etc/passwd", "http://[::1", "http://\xff"])
def test_a_server_that_leads_elsewhere_is_named(airflow: FakeAirflow, address: str) -> None:
    airflow.routes["GET", "/api/v2/monitor/health"] = (302, {})
    airflow.leads_to = address
    with pytest.raises(AirflowError, match=f"{airflow.url}.* is not a valid address of an Airflow server"):
        AirflowApi(airflow.url, "", "").health()


def test_an_address_is_told_without_its_password() -> None:
    api = AirflowApi("http://me:hunter2@127.0.0.1:9", "", "")
    for call in (api.health, api.pools):
        with pytest.raises((TryAgain, CredentialsError), match=r"http://…@127\.0\.0\.1:9") as error:
            call()
        assert "hunter2" not in str(error.value)


def test_an_invalid_url_is_named() -> None:
    with pytest.raises(AirflowError, match="not a valid address of an Airflow"):
        AirflowApi("http://", "u", "p").health()


def test_proxies_are_not_used_for_a_local_server(
    airflow: FakeAirflow, monkeypatch: pytest.MonkeyPatch, api: AirflowApi
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    airflow.routes["GET", "/api/v2/monitor/health"] = (200, {})
    assert api.health() == {}


def test_ids_are_quoted(airflow: FakeAirflow, api: AirflowApi) -> None:
    airflow.routes["GET", "/api/v2/dags/d/dagRuns/manual__2026-11-22T21%3A00%3A00%2B00%3A00"] = (200, {"state": "x"})
    assert api.dag_run("d", "manual__2026-11-22T21:00:00+00:00")["state"] == "x"


def test_all_pages_are_read(airflow: FakeAirflow, api: AirflowApi) -> None:
    def page(query: dict[str, list[str]], body: Any) -> tuple[int, Any]:
        offset, limit = int(query["offset"][0]), int(query["limit"][0])
        return 200, {"dags": [{"dag_id": f"d{n}"} for n in range(230)][offset : offset + limit], "total_entries": 230}

    airflow.routes["GET", "/api/v2/dags"] = page
    assert [dag["dag_id"] for dag in api.dags()] == [f"d{n}" for n in range(230)]


def test_trigger_sends_id_and_conf_without_a_logical_date(airflow: FakeAirflow, api: AirflowApi) -> None:
    airflow.routes["POST", "/api/v2/dags/promote/dagRuns"] = (200, {"dag_run_id": "m-v1"})
    api.trigger("promote", "m-v1", {"model": "m"})
    api.trigger("promote")
    assert airflow.bodies("POST") == [
        {"logical_date": None, "conf": {"model": "m"}, "dag_run_id": "m-v1"},
        {"logical_date": None, "conf": {}},
    ]


def test_answer_sends_option_and_params(airflow: FakeAirflow, api: AirflowApi) -> None:
    airflow.routes["PATCH", "/api/v2/dags/promote/dagRuns/m-v1/taskInstances/review/-1/hitlDetails"] = (200, {})
    api.answer("promote", "m-v1", "review", "Approve", {"reason": "good"})
    assert airflow.bodies("PATCH") == [{"chosen_options": ["Approve"], "params_input": {"reason": "good"}}]


@pytest.mark.parametrize(
    ("stored", "value"),
    [('{"a": 1}', {"a": 1}), ({"a": 1}, {"a": 1}), ("plain text", "plain text"), (None, None), ('"text"', "text")],
)
def test_xcom_is_decoded_if_it_is_json(airflow: FakeAirflow, api: AirflowApi, stored: Any, value: Any) -> None:
    path = "/api/v2/dags/d/dagRuns/r/taskInstances/t/xcomEntries/return_value"
    airflow.routes["GET", path] = (200, {"value": stored})
    assert api.xcom("d", "r", "t") == value


def test_pool_is_changed_or_created(airflow: FakeAirflow, api: AirflowApi) -> None:
    fields = {"slots": 2, "description": "GPUs", "include_deferred": False}
    airflow.routes["POST", "/api/v2/pools"] = (201, {"name": "gpu"})
    api.set_pool("gpu", 2, "GPUs")
    assert airflow.bodies("POST") == [{"name": "gpu", **fields}]
    airflow.routes["PATCH", "/api/v2/pools/gpu"] = (200, {"name": "gpu"})
    api.set_pool("gpu", 2, "GPUs")
    assert airflow.bodies("PATCH")[-1] == {"pool": "gpu", **fields}
    assert len(airflow.bodies("POST")) == 1


def test_pool_that_may_not_be_changed(airflow: FakeAirflow, api: AirflowApi) -> None:
    airflow.routes["PATCH", "/api/v2/pools/gpu"] = (403, {"detail": "Forbidden"})
    with pytest.raises(CredentialsError, match="Forbidden"):
        api.set_pool("gpu", 2, "GPUs")


def test_log_lines_of_text_records_and_errors(airflow: FakeAirflow, api: AirflowApi) -> None:
    content = [
        "plain",
        {"event": "two\nlines", "level": "info"},
        {"event": "Task failed", "level": "error", "error_detail": [{"exc_type": "ValueError", "exc_value": "no"}]},
    ]
    airflow.routes["GET", "/api/v2/dags/d/dagRuns/r/taskInstances/t/logs/2"] = (200, {"content": content})
    assert api.task_log("d", "r", "t", 2) == ["plain", "two", "lines", "ERROR: Task failed", "ValueError: no"]


def test_unpause_touches_nothing_else(airflow: FakeAirflow, api: AirflowApi) -> None:
    airflow.routes["PATCH", "/api/v2/dags/d"] = (200, {"is_paused": False})
    api.unpause("d")
    assert airflow.requests[-1][2:] == ({"update_mask": ["is_paused"]}, {"is_paused": False})


def test_all_answers_of_a_task_are_read_of_the_tries_before_too(airflow, api):
    run = "/api/v2/dags/promote/dagRuns/m-v1"
    tasks = [{"task_id": "review", "try_number": 3}, {"task_id": "gate", "try_number": 9}]
    airflow.routes["GET", f"{run}/taskInstances"] = (200, {"task_instances": tasks, "total_entries": 2})
    details = f"{run}/taskInstances/review/-1/hitlDetails"
    airflow.routes["GET", f"{details}/tries/1"] = (200, {"chosen_options": ["Reject"]})
    airflow.routes["GET", f"{details}/tries/3"] = (200, {"chosen_options": ["Approve"]})  # the second try asked nothing
    airflow.routes["GET", details] = (200, {"chosen_options": None})  # it was cleared, and not asked again yet
    found = api.list_hitl_details("promote", "m-v1", "review")
    assert [detail["chosen_options"] for detail in found] == [["Reject"], ["Approve"], None]
    assert api.list_hitl_details("promote", "m-v1", "review_2") == []


def test_the_ids_of_reviews_come_from_our_plugin(airflow, api):
    known = {"m-v1 of 2026-11-22T21:00:00+00:00": ["id-1", "id-2"]}
    airflow.routes["GET", "/breakhis/reviews-asked"] = lambda query, _: (200, {"reviews": known[query["run"][0]]})
    assert api.list_asked_reviews(*known) == ["id-1", "id-2"]
    airflow.routes["GET", "/breakhis/reviews-asked"] = (200, {})
    with pytest.raises(AirflowError, match="reviews-asked is not the API of Airflow 3: reviews: Field required"):
        api.list_asked_reviews("m-v1")


def test_all_runs_of_a_dag_are_listed(airflow, api):
    runs = [{"dag_run_id": f"m-v{k}"} for k in range(3)]

    def page(query, body):
        offset = int(query["offset"][0])
        return 200, {"dag_runs": runs[offset : offset + 2], "total_entries": 3}

    airflow.routes["GET", "/api/v2/dags/promote/dagRuns"] = page
    assert api.dag_runs("promote") == runs


def test_runs_are_found_by_state_and_start(airflow, api):
    asked = []

    def answer(query, body):
        asked.append((query["state"], query.get("order_by")))
        return 200, {"dag_runs": [{"dag_run_id": "m-v1"}] if len(asked) < 3 else [], "total_entries": 1}

    airflow.routes["GET", "/api/v2/dags/promote/dagRuns"] = answer
    assert api.list_queued_runs("promote") == [{"dag_run_id": "m-v1"}]
    assert api.find_latest_run("promote") == {"dag_run_id": "m-v1"}
    assert api.find_latest_run("promote") is None
    assert asked[:2] == [(["queued"], None), (["running", "success", "failed"], ["-start_date"])]


RUN = "/api/v2/dags/promote/dagRuns/r"


@pytest.mark.parametrize(
    ("path", "answer", "call", "words"),
    [
        (RUN, {"conf": ["x"]}, lambda api: api.dag_run("promote", "r"), "conf: "),
        (RUN, {"conf": 5}, lambda api: api.dag_run("promote", "r"), "conf: .*, not 5"),
        (RUN, {"triggering_user_name": {"a": 1}}, lambda api: api.dag_run("promote", "r"), "triggering_user_name: "),
        (RUN, {"run_after": 7}, lambda api: api.dag_run("promote", "r"), "run_after: "),
        (RUN, b"[" * 100_000, lambda api: api.dag_run("promote", "r"), "it is nested too deeply"),
        (RUN, b'{"conf": {"a": "\\ud800"}}', lambda api: api.dag_run("promote", "r"), ".*surrogates not allowed"),
        (
            f"{RUN}/upstreamAssetEvents",
            {},
            lambda api: api.upstream_events("promote", "r"),
            "asset_events: Field required",
        ),
        (
            f"{RUN}/upstreamAssetEvents",
            {"asset_events": [7]},
            lambda api: api.upstream_events("promote", "r"),
            r"asset_events\.0: .*, not 7",
        ),
        (
            f"{RUN}/taskInstances/t/-1/hitlDetails",
            {"responded_by_user": {"id": "7"}},
            lambda api: api.hitl_detail("promote", "r", "t"),
            r"responded_by_user\.name: Field required",
        ),
        (
            f"{RUN}/taskInstances/t/-1/hitlDetails",
            {"chosen_options": "Approve"},
            lambda api: api.hitl_detail("promote", "r", "t"),
            "chosen_options: ",
        ),
        (
            f"{RUN}/taskInstances",
            {"task_instances": [{"task_id": "t", "try_number": 10**9}]},
            lambda api: api.list_hitl_details("promote", "r", "t"),
            r"task_instances\.0\.try_number: .*1000",
        ),
        (f"{RUN}/taskInstances/t/xcomEntries/return_value", {}, lambda api: api.xcom("promote", "r", "t"), "value: "),
        (f"{RUN}/taskInstances/t/logs/1", {"content": 3}, lambda api: api.task_log("promote", "r", "t"), "content: "),
    ],
)
def test_an_answer_of_another_shape_is_named_with_its_address(airflow, api, path, answer, call, words):
    airflow.routes["GET", path] = (200, answer)
    with pytest.raises(AirflowError, match=f"^{airflow.url}{path}.* is not the API of Airflow 3: {words}"):
        call(api)


def test_a_key_that_an_answer_lacks_is_named_with_its_address(airflow, api):
    airflow.routes["GET", RUN] = (200, {"conf": None})
    with pytest.raises(AirflowError, match=f"{airflow.url}{RUN} is not the API of Airflow 3: it has no 'state'"):
        api.dag_run("promote", "r")["state"]


def test_pages_that_never_end_do(airflow, api):
    airflow.routes["GET", "/api/v2/dags"] = (200, {"dags": [{"dag_id": "d"}], "total_entries": 10**9})
    with pytest.raises(AirflowError, match=f"{airflow.url}/api/v2/dags answers each page with the same dags"):
        api.dags()
    assert len([path for _, path, _, _ in airflow.requests if path == "/api/v2/dags"]) == 2


@pytest.mark.parametrize("detail", [[{"loc": 5, "msg": "no"}], {"message": ["a"]}, 7, None, [7]])
def test_a_refusal_of_any_shape_is_told(airflow, api, detail):
    airflow.routes["GET", RUN] = (422, {"detail": detail})
    with pytest.raises(AirflowError, match=f"Airflow answered 422 to GET {RUN}: "):
        api.dag_run("promote", "r")


def test_a_name_with_half_a_character_is_no_name(api):
    with pytest.raises(AirflowError, match="404"):
        api.dag_run("\ud800", "r")
