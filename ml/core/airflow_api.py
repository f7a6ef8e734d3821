"""A small client of Airflow's REST API: what the local workflow drives and where promotion reads a reviewer's answer.

Written on ``requests`` rather than on apache-airflow-client: that package has no login (a token must be had from
``POST /auth/token`` by hand anyway), and its generated models reject answers with a value they do not know yet, such as
a task state added by a newer Airflow. Answers are the API's own JSON, as dicts.
"""

import json
from typing import Any
from urllib.parse import quote, urlsplit

import requests

from ml.core.errors import AirflowError, CredentialsError, TryAgain

Json = dict[str, Any]

_PAGE = 100
_LOOPBACK = {"localhost", "127.0.0.1", "::1"}


class AirflowApi:
    """Airflow at ``url``, seen with the rights of ``user``. Logs in at the first call and again when the token expires.

    Every method raises:
        TryAgain: Airflow cannot be reached, is too slow or answers 5xx.
        CredentialsError: the password is wrong, or the user may not do this.
        AirflowError: there is no such DAG, run, task or answer (``status`` 404), the task was answered already or the
            run exists already (409), or the request does not fit (400, 422).
    """

    def __init__(self, url: str, user: str, password: str, *, timeout: float = 60.0) -> None:
        self.url = url.rstrip("/")
        self.user = user
        self._password = password
        self._timeout = timeout
        self._token = ""
        self._session = requests.Session()
        # A proxy meant for the outside, or a line in ~/.netrc, must not get between us and a server on this machine.
        self._session.trust_env = urlsplit(self.url).hostname not in _LOOPBACK

    # --- the servers --------------------------------------------------------------------------------------------

    def health(self) -> Json:
        """Status of each component: ``{"metadatabase": {"status": "healthy"}, "scheduler": …}``. Needs no login."""
        return self._json(self._send("GET", "/api/v2/monitor/health", login=False))

    def import_errors(self) -> list[Json]:
        """The DAG files that failed to import: ``filename``, ``stack_trace``, ``timestamp``."""
        return self._all("/api/v2/importErrors", "import_errors")

    def set_pool(self, name: str, slots: int, description: str) -> Json:
        """Make a pool, or change the one there is. Needs the role op or admin."""
        body = {"slots": slots, "description": description, "include_deferred": False}
        try:
            # All fields: Airflow checks a change as if it were a whole pool. And it calls the name "pool" here only.
            return self._call("PATCH", f"/api/v2/pools/{_part(name)}", body={"pool": name, **body})
        except AirflowError as error:
            if error.status != 404:
                raise
        return self._call("POST", "/api/v2/pools", body={"name": name, **body})

    # --- DAGs and runs ------------------------------------------------------------------------------------------

    def dags(self) -> list[Json]:
        """The DAGs that were parsed: ``dag_id``, ``is_paused``, ``has_import_errors`` and more."""
        return self._all("/api/v2/dags", "dags")

    def unpause(self, dag: str) -> Json:
        """Let a DAG run by its schedule and by hand."""
        path = f"/api/v2/dags/{_part(dag)}"
        return self._call("PATCH", path, params={"update_mask": ["is_paused"]}, body={"is_paused": False})

    def trigger(self, dag: str, run_id: str | None = None, conf: Json | None = None) -> Json:
        """Start a run as this user; returns it, with its ``dag_run_id``. Status 409: a run of that id exists."""
        body: Json = {"logical_date": None, "conf": conf or {}}
        if run_id:
            body["dag_run_id"] = run_id
        try:
            return self._call("POST", f"/api/v2/dags/{_part(dag)}/dagRuns", body=body)
        except AirflowError as error:
            if error.status != 409:
                raise
            raise AirflowError(f"DAG {dag!r} has a run {run_id!r} already", 409) from None  # its own text is a riddle

    def dag_run(self, dag: str, run: str) -> Json:
        """One run: ``state`` (queued, running, success, failed), ``conf``, ``triggering_user_name``, dates."""
        return self._call("GET", _run(dag, run))

    def upstream_events(self, dag: str, run: str) -> list[Json]:
        """The asset events that started a run: ``source_dag_id`` and ``source_run_id`` (None of an event by hand)."""
        found: list[Json] = self._call("GET", f"{_run(dag, run)}/upstreamAssetEvents")["asset_events"]
        return found

    def task_instances(self, dag: str, run: str) -> list[Json]:
        """The tasks of a run: ``task_id``, ``map_index``, ``state`` (None until scheduled), ``try_number``, dates."""
        return self._all(f"{_run(dag, run)}/taskInstances", "task_instances")

    def xcom(self, dag: str, run: str, task: str, map_index: int = -1) -> Any:
        """What a task returned. Status 404: it returned nothing (yet)."""
        path = f"{_task(dag, run, task)}/xcomEntries/return_value"
        value = self._call("GET", path, params={"map_index": map_index})["value"]
        if not isinstance(value, str):
            return value
        try:
            return json.loads(value)  # the API hands out the value as it lies in the database
        except ValueError:
            return value

    def task_log(self, dag: str, run: str, task: str, try_number: int = 1, map_index: int = -1) -> list[str]:
        """The lines a task logged in one try."""
        path = f"{_task(dag, run, task)}/logs/{try_number}"
        content = self._call("GET", path, params={"full_content": "true", "map_index": map_index})["content"]
        return [line for entry in content for line in _log_lines(entry)]

    # --- reviews ------------------------------------------------------------------------------------------------

    def hitl_detail(self, dag: str, run: str, task: str) -> Json:
        """Airflow's own record of a question to a person and the answer to it.

        Has ``options``, ``assigned_users``, ``response_received``, ``chosen_options``, ``params_input``,
        ``responded_at`` and ``responded_by_user`` ``{id, name}`` (None where nobody answered or a default was taken),
        of which the name is what somebody logs in as.
        Unlike an XCom, no user can write it. Status 404: the task never asked.
        """
        return self._call("GET", _hitl(dag, run, task))

    def list_pending_questions(self) -> list[Json]:
        """Airflow's record of every question to a person that nobody has answered: see :meth:`hitl_detail`."""
        path = "/api/v2/dags/~/dagRuns/~/hitlDetails"
        return self._all(path, "hitl_details", {"response_received": False})

    def answer(self, dag: str, run: str, task: str, option: str, params: Json) -> Json:
        """Answer a question as this user. Status 409: somebody has answered; CredentialsError: not asked of this user.

        Within a second of the task's parking an answer can fail the task; scripts wait some seconds.
        """
        return self._call("PATCH", _hitl(dag, run, task), body={"chosen_options": [option], "params_input": params})

    # --- talking to the server ----------------------------------------------------------------------------------

    def _all(self, path: str, key: str, params: Json | None = None) -> list[Json]:
        found: list[Json] = []
        while True:
            page = self._call("GET", path, params={**(params or {}), "limit": _PAGE, "offset": len(found)})
            found += page[key]
            if not page[key] or len(found) >= (page.get("total_entries") or 0):
                return found

    def _call(self, method: str, path: str, *, params: Json | None = None, body: Json | None = None) -> Json:
        if not self._token:
            self._login()
        response = self._send(method, path, params=params, body=body)
        if response.status_code == 401:  # the token's day is over, or the server has a new key
            self._login()
            response = self._send(method, path, params=params, body=body)
        return self._json(response)

    def _login(self) -> None:
        if not self.user or not self._password:
            raise CredentialsError(f"no user or password for Airflow at {self.url}; 'breakhis status' shows the users")
        body = {"username": self.user, "password": self._password}
        response = self._send("POST", "/auth/token", body=body, login=False)
        if response.status_code in {401, 403}:
            raise CredentialsError(
                f"Airflow at {self.url} refuses the password of user {self.user!r}; check it (of a local stack: "
                "passwords.json in the home folder)"
            )
        self._token = str(self._json(response)["access_token"])

    def _send(
        self, method: str, path: str, *, params: Json | None = None, body: Json | None = None, login: bool = True
    ) -> requests.Response:
        try:
            response = self._session.request(
                method,
                self.url + path,
                params=params,
                json=body,
                headers={"Accept": "application/json"},
                auth=_Bearer(self._token) if login else None,
                timeout=self._timeout,
            )
        except requests.exceptions.InvalidURL as error:
            raise AirflowError(f"{self.url!r} is no address of an Airflow: {error}") from None
        except requests.RequestException as error:
            raise TryAgain(f"Airflow at {self.url} cannot be reached: {_root_cause(error)}; is it running?") from error
        if response.status_code >= 500 or response.status_code == 429:
            raise TryAgain(f"Airflow at {self.url} answered {response.status_code} to {method} {path}")
        return response

    def _json(self, response: requests.Response) -> Json:
        what = f"{response.request.method} {urlsplit(response.url).path}"
        if response.status_code in {401, 403}:
            raise CredentialsError(f"Airflow does not let user {self.user!r} {what}: {_detail(response)}")
        if response.status_code >= 400:
            message = f"Airflow answered {response.status_code} to {what}: {_detail(response)}"
            raise AirflowError(message, response.status_code)
        try:
            answer = response.json()
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise AirflowError(f"{response.url} is not the API of Airflow 3: it answered no JSON object")
        return answer


class _Bearer(requests.auth.AuthBase):
    """The token as a header; as an auth object it also keeps requests from looking into ~/.netrc."""

    def __init__(self, token: str) -> None:
        self._token = token

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = f"Bearer {self._token}"
        return request


def _part(name: str) -> str:
    return quote(name, safe="")


def _run(dag: str, run: str) -> str:
    return f"/api/v2/dags/{_part(dag)}/dagRuns/{_part(run)}"


def _task(dag: str, run: str, task: str) -> str:
    return f"{_run(dag, run)}/taskInstances/{_part(task)}"


def _hitl(dag: str, run: str, task: str) -> str:
    return f"{_task(dag, run, task)}/-1/hitlDetails"  # -1: a task that is not mapped


def _detail(response: requests.Response) -> str:
    """What the server says is wrong: FastAPI puts a string or a list of field errors under ``detail``."""
    try:
        detail = response.json()["detail"]
    except (ValueError, KeyError, TypeError):
        return response.text.strip()[:300] or response.reason
    if isinstance(detail, list):
        fields = (
            f"{'.'.join(str(p) for p in e.get('loc', ()))}: {e.get('msg')}" for e in detail if isinstance(e, dict)
        )
        return "; ".join(fields)
    if isinstance(detail, dict):
        return str(detail.get("message") or detail.get("reason") or detail)
    return str(detail)


def _log_lines(entry: Json | str) -> list[str]:
    if isinstance(entry, str):
        return entry.splitlines()
    lines = str(entry.get("event", "")).splitlines() or [""]
    level = str(entry.get("level", ""))
    if level in {"warning", "error", "critical"}:
        lines[0] = f"{level.upper()}: {lines[0]}"
    for cause in entry.get("error_detail") or ():
        if isinstance(cause, dict):
            lines.append(f"{cause.get('exc_type')}: {cause.get('exc_value')}")
    return lines


def _root_cause(error: requests.RequestException) -> str:
    if isinstance(error, requests.Timeout):
        return "no answer in time"
    if isinstance(error, requests.ConnectionError) and "refused" in str(error):
        return "connection refused"
    return type(error).__name__ + ": " + str(error)[:200]
