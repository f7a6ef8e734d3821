"""A small client of Airflow's REST API.

The local workflow drives Airflow through it, and promotion reads the reviewer's answer through it. It uses ``requests``
rather than apache-airflow-client: that package has no login (a caller has to request a token from ``POST /auth/token``
anyway), and its generated models reject responses with a value that they do not know yet, such as a task state added by
a newer Airflow. Methods return the API's own JSON as dicts.
"""

import json
from typing import Any
from urllib.parse import quote, urlsplit

import requests
from pydantic import BaseModel

from ml.core import airflow_answers as answers
from ml.core.airflow_answers import page_of, read_answer, read_pages
from ml.core.errors import AirflowError, ConfigError, CredentialsError, TryAgain
from ml.core.messages import cut_text, hide_access, list_items, quote_value
from ml.core.settings import Settings

Json = dict[str, Any]

_PAGE_SIZE = 100
_MAX_DETAIL = 1000
_BEGUN = ["running", "success", "failed"]
"""States of the runs that have begun."""
_LOOPBACK_HOSTS = {"localhost", "127.0.0.1", "::1"}


def connect_airflow(settings: Settings) -> "AirflowApi":
    """Returns Airflow's API as the service account that the settings name.

    Raises:
        ConfigError: Airflow's address or the service account is not set.
    """
    if not (settings.airflow_url and settings.airflow_user):
        raise ConfigError(
            "promotion reads the reviewers' answers from Airflow: set BREAKHIS_AIRFLOW_URL, BREAKHIS_AIRFLOW_USER "
            "and BREAKHIS_AIRFLOW_PASSWORD (in Airflow: the connection breakhis_airflow)"
        )
    return AirflowApi(settings.airflow_url, settings.airflow_user, settings.airflow_password.get_secret_value())


class AirflowApi:
    """Calls Airflow at ``url`` with the rights of ``user``. Logs in at the first call and when the token has expired.

    Every method raises:
        TryAgain: Airflow cannot be reached, is too slow or answers 5xx or 429.
        CredentialsError: the password is wrong, or the user may not do this.
        AirflowError: there is no such DAG, run, task or answer (``status`` 404), the task was answered already or the
            run exists already (409), or the request is invalid (400, 422). Or the server does not answer as Airflow
            does (0): see :mod:`ml.core.airflow_answers`.
    """

    def __init__(self, url: str, user: str, password: str, *, timeout: float = 60.0) -> None:
        self.url = url.rstrip("/")
        self.user = user
        self._password = password
        self._timeout = timeout
        self._token = ""
        self._session = requests.Session()
        # A proxy for outside addresses or a line in ~/.netrc must not affect calls to a server on this machine.
        self._session.trust_env = urlsplit(self.url).hostname not in _LOOPBACK_HOSTS

    @property
    def shown_url(self) -> str:
        """The address as messages show it: cut, without what may grant access."""
        return cut_text(hide_access(self.url))

    # --- the servers --------------------------------------------------------------------------------------------

    def health(self) -> Json:
        """Returns each component's status: ``{"metadatabase": {"status": "healthy"}, …}``. Needs no login."""
        return self._parse_answer(self._send("GET", "/api/v2/monitor/health", login=False), answers.Object)

    def import_errors(self) -> list[Json]:
        """Returns the DAG files that failed to import: ``filename``, ``stack_trace``, ``timestamp``."""
        return self._all("/api/v2/importErrors", "import_errors", answers.BrokenFile)

    def pools(self) -> list[Json]:
        """Returns the pools: ``name``, ``slots`` (-1: without limit), ``occupied_slots`` and more."""
        return self._all("/api/v2/pools", "pools", answers.Pool)

    def set_pool(self, name: str, slots: int, description: str) -> Json:
        """Creates a pool, or changes the existing one. Needs the role op or admin."""
        body = {"slots": slots, "description": description, "include_deferred": False}
        try:
            # Airflow validates a change as a whole pool, so all fields are sent. Only here the name is called "pool".
            return self._call("PATCH", f"/api/v2/pools/{_quote(name)}", body={"pool": name, **body})
        except AirflowError as error:
            if error.status != 404:
                raise
        return self._call("POST", "/api/v2/pools", body={"name": name, **body})

    # --- DAGs and runs ------------------------------------------------------------------------------------------

    def dags(self) -> list[Json]:
        """Returns the DAGs that were parsed: ``dag_id``, ``is_paused``, ``has_import_errors`` and more."""
        return self._all("/api/v2/dags", "dags", answers.Dag)

    def unpause(self, dag: str) -> Json:
        """Unpauses a DAG: it may run by its schedule and by hand."""
        path = f"/api/v2/dags/{_quote(dag)}"
        return self._call("PATCH", path, params={"update_mask": ["is_paused"]}, body={"is_paused": False})

    def trigger(self, dag: str, run_id: str | None = None, conf: Json | None = None) -> Json:
        """Starts a run as this user and returns it, with its ``dag_run_id``. Status 409: a run of that id exists."""
        body: Json = {"logical_date": None, "conf": conf or {}}
        if run_id:
            body["dag_run_id"] = run_id
        try:
            return self._call("POST", f"/api/v2/dags/{_quote(dag)}/dagRuns", answers.StartedRun, body=body)
        except AirflowError as error:
            if error.status != 409:
                raise
            raise AirflowError(
                f"DAG {quote_value(dag)} has a run {quote_value(run_id)} already", 409
            ) from None  # Airflow's is obscure

    def dag_runs(self, dag: str) -> list[Json]:
        """Returns all runs of a DAG, each as :meth:`dag_run` does, with its ``dag_run_id``."""
        return self._all(f"/api/v2/dags/{_quote(dag)}/dagRuns", "dag_runs", answers.StartedRun)

    def list_queued_runs(self, dag: str) -> list[Json]:
        """Returns the runs of a DAG that have not begun, each as :meth:`dag_run` does, with its ``dag_run_id``."""
        return self._all(f"/api/v2/dags/{_quote(dag)}/dagRuns", "dag_runs", answers.StartedRun, {"state": ["queued"]})

    def find_latest_run(self, dag: str) -> Json | None:
        """Returns the run of a DAG that began last, with its ``dag_run_id``; None if there is none."""
        path, shape = f"/api/v2/dags/{_quote(dag)}/dagRuns", page_of("dag_runs", answers.StartedRun)
        runs = self._call("GET", path, shape, params={"order_by": "-start_date", "state": _BEGUN, "limit": 1})
        latest: Json | None = next(iter(runs["dag_runs"]), None)
        return latest

    def dag_run(self, dag: str, run: str) -> Json:
        """Returns one run: ``state`` (queued, running, success, failed), ``conf``, ``triggering_user_name``, dates."""
        return self._call("GET", _run_path(dag, run), answers.Run)

    def upstream_events(self, dag: str, run: str) -> list[Json]:
        """Returns the asset events that started a run: ``source_dag_id``, ``source_run_id`` (None: created by hand)."""
        answer = self._call("GET", f"{_run_path(dag, run)}/upstreamAssetEvents", answers.AssetEvents)
        events: list[Json] = answer["asset_events"]
        return events

    def task_instances(self, dag: str, run: str) -> list[Json]:
        """Returns a run's tasks: ``task_id``, ``map_index``, ``state`` (None: not scheduled), ``try_number``, dates."""
        return self._all(f"{_run_path(dag, run)}/taskInstances", "task_instances", answers.TaskInstance)

    def xcom(self, dag: str, run: str, task: str, map_index: int = -1) -> Any:
        """Returns the value that a task returned. Status 404: it has returned nothing yet."""
        path = f"{_task_path(dag, run, task)}/xcomEntries/return_value"
        value = self._call("GET", path, answers.XCom, params={"map_index": map_index})["value"]
        if not isinstance(value, str):
            return value
        try:
            return json.loads(value)  # the API returns the value as the database stores it
        except ValueError:
            return value

    def task_log(self, dag: str, run: str, task: str, try_number: int = 1, map_index: int = -1) -> list[str]:
        """Returns the lines that a task logged in one try."""
        path = f"{_task_path(dag, run, task)}/logs/{try_number}"
        params = {"full_content": "true", "map_index": map_index}
        content = self._call("GET", path, answers.TaskLog, params=params)["content"]
        return [line for entry in content for line in _format_log_entry(entry)]

    # --- reviews ------------------------------------------------------------------------------------------------

    def hitl_detail(self, dag: str, run: str, task: str) -> Json:
        """Returns Airflow's own record of a question to a person (human in the loop) and of the answer.

        The record has ``options``, ``assigned_users``, ``response_received``, ``chosen_options``, ``params_input``,
        ``responded_at`` and ``responded_by_user`` ``{id, name}`` (None if nobody answered or the default was
        taken); its name is the login name.
        Unlike an XCom, no user can write this record. Status 404: the task never asked.
        """
        return self._call("GET", _hitl_path(dag, run, task), answers.Question)

    def list_hitl_details(self, dag: str, run: str, task: str) -> list[Json]:
        """Returns the record of each time that a task asked; for its fields see :meth:`hitl_detail`.

        Clearing a task has it ask anew, in another try. Airflow keeps what was answered in the tries before. Until it
        asks again, the question of the try before can be answered still: that is in the present record alone.
        """
        tries = [t["try_number"] for t in self.task_instances(dag, run) if t["task_id"] == task]
        own = _hitl_path(dag, run, task)
        paths = [f"{own}/tries/{number}" for number in range(1, max(tries, default=0) + 1)]
        details = []
        for path in [*paths, own]:
            try:
                details.append(self._call("GET", path, answers.Question))
            except AirflowError as error:
                if error.status != 404:  # it asked nothing in that try
                    raise
        return details

    def list_asked_reviews(self, run: str) -> list[str]:
        """Returns the ids of the reviews of a run of the DAG ``promote``, of all tries; none where there is no run.

        Airflow's own API does not give the ids of earlier tries, so this asks the plugin of this package.
        """
        reviews: list[str] = self._call("GET", "/breakhis/reviews-asked", answers.Reviews, params={"run": run})[
            "reviews"
        ]
        return reviews

    def list_pending_questions(self) -> list[Json]:
        """Returns the record of every question that nobody has answered; for its fields see :meth:`hitl_detail`."""
        path = "/api/v2/dags/~/dagRuns/~/hitlDetails"
        return self._all(path, "hitl_details", answers.PendingQuestion, {"response_received": False})

    def answer(self, dag: str, run: str, task: str, option: str, params: Json) -> Json:
        """Answers a question as this user. Status 409: it was answered; CredentialsError: this user was not asked.

        An answer within a second of the task's deferral can fail the task, so scripts wait some seconds.
        """
        body = {"chosen_options": [option], "params_input": params}
        return self._call("PATCH", _hitl_path(dag, run, task), body=body)

    # --- HTTP requests and answers ------------------------------------------------------------------------------

    def _all(
        self, path: str, key: str, item: type[BaseModel] = answers.Object, params: Json | None = None
    ) -> list[Json]:
        """Returns the items under ``key`` of every page."""
        shape = page_of(key, item)
        return read_pages(
            lambda page: self._call("GET", path, shape, params={**(params or {}), **page}),
            key,
            self.url + path,
            _PAGE_SIZE,
        )

    def _call(
        self,
        method: str,
        path: str,
        shape: type[BaseModel] = answers.Object,
        *,
        params: Json | None = None,
        body: Json | None = None,
    ) -> Json:
        if not self._token:
            self._login()
        response = self._send(method, path, params=params, body=body)
        if response.status_code == 401:  # the token has expired, or the server has a new key
            self._login()
            response = self._send(method, path, params=params, body=body)
        return self._parse_answer(response, shape)

    def _login(self) -> None:
        if not self.user or not self._password:
            raise CredentialsError(
                f"no user or password for Airflow at {self.shown_url}; 'breakhis status' shows the users"
            )
        body = {"username": self.user, "password": self._password}
        response = self._send("POST", "/auth/token", body=body, login=False)
        if response.status_code in {401, 403}:
            raise CredentialsError(
                f"Airflow at {self.shown_url} refuses the password of user {self.user!r}; check it (of a local stack: "
                "passwords.json in the home folder)"
            )
        self._token = self._parse_answer(response, answers.Token)["access_token"]

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
                auth=_BearerAuth(self._token) if login else None,
                timeout=self._timeout,
            )
        except (ValueError, requests.TooManyRedirects) as error:  # what requests and urllib3 make of odd addresses
            reason = cut_text(hide_access(error))
            raise AirflowError(f"{self.shown_url!r} is not a valid address of an Airflow server: {reason}") from None
        except requests.RequestException as error:
            raise TryAgain(
                f"Airflow at {self.shown_url} cannot be reached: {_root_cause(error)}; is it running?"
            ) from error
        if response.status_code >= 500 or response.status_code == 429:
            raise TryAgain(
                f"Airflow at {self.shown_url} answered {response.status_code} to {method} {cut_text(path, 600)}"
            )
        return response

    def _parse_answer(self, response: requests.Response, shape: type[BaseModel]) -> Json:
        request = f"{response.request.method} {cut_text(urlsplit(response.url).path, 600)}"
        if response.status_code in {401, 403}:
            raise CredentialsError(f"Airflow does not let user {self.user!r} {request}: {_error_detail(response)}")
        if response.status_code >= 400:
            message = f"Airflow answered {response.status_code} to {request}: {_error_detail(response)}"
            raise AirflowError(message, response.status_code)
        return read_answer(response.content, response.url.partition("?")[0], shape)


class _BearerAuth(requests.auth.AuthBase):
    """Sends the token as a header. Being an auth object, it also keeps requests from reading ~/.netrc."""

    def __init__(self, token: str) -> None:
        self._token = token

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = f"Bearer {self._token}"
        return request


def _quote(name: str) -> str:
    return quote(name, safe="", errors="replace")  # half a character, which no name has


def _run_path(dag: str, run: str) -> str:
    return f"/api/v2/dags/{_quote(dag)}/dagRuns/{_quote(run)}"


def _task_path(dag: str, run: str, task: str) -> str:
    return f"{_run_path(dag, run)}/taskInstances/{_quote(task)}"


def _hitl_path(dag: str, run: str, task: str) -> str:
    return f"{_task_path(dag, run, task)}/-1/hitlDetails"  # -1: a task that is not mapped


def _error_detail(response: requests.Response) -> str:
    """Returns the server's error message: FastAPI puts a string or a list of field errors under ``detail``."""
    try:
        detail = response.json()["detail"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return cut_text(response.text) or cut_text(response.reason)
    if isinstance(detail, list):
        return list_items((_describe_field_error(field) for field in detail if isinstance(field, dict)), "; ")
    if isinstance(detail, dict):
        return cut_text(detail.get("message") or detail.get("reason") or detail, _MAX_DETAIL)
    return cut_text(detail, _MAX_DETAIL)


def _describe_field_error(field: Json) -> str:
    where = field.get("loc")
    return f"{'.'.join(map(str, where)) if isinstance(where, list) else where}: {field.get('msg')}"


def _format_log_entry(entry: Json | str) -> list[str]:
    """Returns the lines of one log entry; a warning or error has its level in front."""
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
    return type(error).__name__ + ": " + cut_text(hide_access(error))
