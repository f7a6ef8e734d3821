"""Answers of Airflow's REST API: the fields that are read, with their types, and the pages of a list.

Airflow, a proxy before it or another server at its address may answer anything. Whatever is not an answer that can be
used is an :class:`ml.core.errors.AirflowError` with the address. A field with a default may be missing, and fields that
are not declared are kept as they are: a newer Airflow adds some.
"""

from collections.abc import Callable
from datetime import datetime
from functools import cache, partial
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, Field, create_model

from ml.core.errors import AirflowError
from ml.core.messages import cut_text, hide_access
from ml.core.strict_json import Shape, check_shape, read_json

Json = dict[str, Any]

MAX_TRIES = 1_000
"""Tries of one task that are looked at."""


def _check_time(text: str) -> str:
    if datetime.fromisoformat(text).tzinfo is None:
        raise ValueError("it has no time zone")
    return text


_Name = Annotated[str, Field(max_length=512)]
_Time = Annotated[str, AfterValidator(_check_time)]


class Object(Shape):
    """Any JSON object."""


class Token(Shape):
    """What a login gives."""

    access_token: Annotated[str, Field(min_length=1, pattern=r"^[\x21-\x7e]+$")]


class Run(Shape):
    """A run of a DAG."""

    state: str | None = None
    conf: Json | None = None
    triggering_user_name: _Name | None = None
    triggered_by: str | None = None
    run_type: str | None = None
    run_after: str | None = None


class StartedRun(Run):
    """A run of a DAG, with its id."""

    dag_run_id: _Name


class TaskInstance(Shape):
    """A task of a run."""

    task_id: _Name
    try_number: Annotated[int, Field(ge=0, le=MAX_TRIES)] = 0
    map_index: int = -1
    state: str | None = None
    start_date: str | None = None


class Reviews(Shape):
    """The ids of a run's reviews, as this package's plugin gives them."""

    reviews: list[_Name]


class _User(Shape):
    id: str | int
    name: _Name


class _AskingTask(Shape):
    id: str = ""
    dag_id: _Name = ""
    dag_run_id: _Name = ""
    task_id: _Name = ""
    state: str | None = None


class Question(Shape):
    """A question to a person, and the answer."""

    response_received: bool | None = None
    responded_by_user: _User | None = None
    responded_at: str | None = None
    chosen_options: list[str] | None = None
    params_input: Json | None = None
    subject: str | None = None
    body: str | None = None
    created_at: str | None = None


class PendingQuestion(Question):
    """A question that nobody has answered."""

    subject: str
    created_at: _Time
    task_instance: _AskingTask


class _AssetEvent(Shape):
    source_dag_id: _Name | None = None
    source_run_id: _Name | None = None


class AssetEvents(Shape):
    """The asset events that started a run."""

    asset_events: list[_AssetEvent]


class _Tag(Shape):
    name: str


class Dag(Shape):
    """A DAG."""

    dag_id: _Name
    description: str | None = None
    tags: list[_Tag] = Field([])
    is_paused: bool | None = None
    has_import_errors: bool | None = None
    last_parsed_time: _Time | None = None


class Pool(Shape):
    """A pool."""

    name: _Name
    slots: int


class BrokenFile(Shape):
    """A DAG file that failed to import."""

    filename: str = ""
    stack_trace: str = ""
    timestamp: _Time | None = None


class XCom(Shape):
    """The value that a task returned."""

    value: Any


class _LogEntry(Shape):
    event: str = ""
    level: str | None = None
    error_detail: list[Any] | None = None


class TaskLog(Shape):
    """The log of one try of a task."""

    content: list[str | _LogEntry]


@cache
def page_of(key: str, item: type[BaseModel]) -> type[BaseModel]:
    """Returns the shape of a page of a list, whose items are under ``key``."""
    return create_model("Page", __base__=Shape, **{key: (list[item], ...), "total_entries": (int | None, None)})  # type: ignore[call-overload,no-any-return,valid-type]


def read_answer(data: bytes, url: str, shape: type[BaseModel]) -> Json:
    """Returns the JSON object that a server has answered.

    Args:
        data: the answer.
        url: the address that was asked, for the error.
        shape: what is read of it.

    Raises:
        AirflowError: it is no JSON object, or a field that is read is of another type. So is reading a key that it
            lacks.
    """
    fail = partial(no_airflow, url)
    answer = read_json(data, fail)
    if not isinstance(answer, dict):
        raise fail("it answered no JSON object")
    check_shape(answer, shape, fail)
    return answer


def read_pages(ask: Callable[[Json], Json], key: str, url: str, page_size: int) -> list[Json]:
    """Returns the items of all pages of a list.

    Args:
        ask: takes ``limit`` and ``offset``, and returns the page.
        key: the items' name in a page.
        url: the list's address, for the error.
        page_size: items to ask for at once.

    Raises:
        AirflowError: a page has the same items as the one before.
    """
    items: list[Json] = []
    before: list[Json] = []
    while True:
        page = ask({"limit": page_size, "offset": len(items)})
        if page[key] and page[key] == before:
            raise AirflowError(
                f"{cut_text(hide_access(url), 300)} answers each page with the same {key}; is there a proxy before it?"
            )
        items += page[key]
        if not page[key] or len(items) >= (page.get("total_entries") or 0):
            return items
        before = page[key]


def no_airflow(url: str, reason: str) -> AirflowError:
    """Returns the error about a server that does not answer as Airflow does."""
    return AirflowError(f"{cut_text(hide_access(url), 300)} is not the API of Airflow 3: {reason}")
