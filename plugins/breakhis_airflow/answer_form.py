"""The answer form of a review page: who may answer, which forms are ours, and how an answer reaches Airflow.

An answer is Airflow's own: the form's last step calls Airflow's public API in the same process, as the user who is
logged in. So it needs the same rights, leaves the same record and is in Airflow's log of events, and a promotion goes
by that record as if the answer had been given in Airflow's form.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, quote, urlsplit

from fastapi import Request

from breakhis_airflow.addresses import build_airflow_url
from breakhis_airflow.airflow_database import WaitingReview
from ml.core.messages import cut_text, list_items
from ml.core.store import Json
from ml.promotion.reviews import APPROVE, MAX_REASON_LENGTH, MIN_REASON_LENGTH, REJECT, ROLLBACK, parse_reason

MAX_FORM_BYTES = 100_000
"""Of a form that is sent. A reason of the greatest length fits, of which a browser sends each letter as up to 12."""

_HOURS = 12.0  # that a form can be sent after it was shown
_OK = 200


LOGIN_PROBLEMS = {
    401: "You are not logged in any more. Log in to Airflow in another tab, then go back here and send it again.",
    403: "You are logged in to Airflow as somebody who may not see its DAG promote, so you may not answer either.",
}
"""What is said to who has sent a form, by status."""


GONE = (
    "This form belongs to a review that does not wait for an answer any more: somebody has answered it, or it was "
    "asked anew. Open the review, and read how it stands."
)


class FormRefused(Exception):
    """A form that was not carried out.

    Args:
        message: what is wrong, and what to do.
        status: the answer's status in HTTP.
    """

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


class Permission(NamedTuple):
    """What a user may answer to a review."""

    options: tuple[str, ...]
    obstacle: str
    """Why they may not give the other answers, in words; empty if there are none."""


@dataclass(frozen=True)
class AnswerForm:
    """The form on a review page, for one reader."""

    permission: Permission
    token: str
    """Proves that the form is ours, and was shown to this user about this review."""
    reviewers: tuple[str, ...]
    """Who may answer."""
    min_length: int = MIN_REASON_LENGTH
    max_length: int = MAX_REASON_LENGTH


def make_form(review: WaitingReview, evidence: Json, user: Any) -> AnswerForm:
    """Returns the form for a user.

    Args:
        review: the review that waits.
        evidence: evidence of the version that it is about.
        user: as Airflow's auth manager knows them.
    """
    token = _make_serializer().dumps({"step": "form", "user": user.get_id(), "review": review.id})
    return AnswerForm(find_permission(review, evidence, user), token, review.assigned)


def find_permission(review: WaitingReview, evidence: Json, user: Any) -> Permission:
    """Returns what a user may answer. The promotion checks all of it again, from its own sources.

    Args:
        review: the review that waits.
        evidence: evidence of the version that it is about.
        user: as Airflow's auth manager knows them.
    """
    from airflow.api_fastapi.app import get_auth_manager
    from airflow.api_fastapi.auth.managers.models.resource_details import DagAccessEntity, DagDetails

    manager, name = get_auth_manager(), user.get_name()
    if not review.assigned or not manager.is_authorized_hitl_task(assigned_users=set(review.assigned), user=user):
        return Permission((), f"You are logged in as {name}, who is not one of the reviewers")
    if not manager.is_authorized_dag(
        method="PUT", access_entity=DagAccessEntity.HITL_DETAIL, details=DagDetails(id=review.dag), user=user
    ):
        return Permission((), f"You are logged in as {name}, whose role in Airflow may not answer")
    if name == review.started_by:
        return Permission((), f"You are logged in as {name}, who started this run and so cannot decide it")
    if name in review.approved_by:
        return Permission(
            (), f"You are logged in as {name}, who has approved already; the next has to be somebody else"
        )
    if review.dag != ROLLBACK and name in (evidence.get("starters") or {}).get("users", {}):
        return Permission(
            (REJECT,), f"You are logged in as {name}, who started the training: only others can approve it"
        )
    return Permission((APPROVE, REJECT), "")


def check_first_step(
    fields: Mapping[str, str], review: WaitingReview, evidence: Json, user: Any
) -> tuple[str, str, str]:
    """Check a form that was filled in; returns the option, the reason and the token of the second step.

    Raises:
        FormRefused: the form is not ours, is old, or is of another user or review; the user may not give this answer;
            or there is no reason.
    """
    _read_token(fields.get("token", ""), "form", review, user)
    option, reason = fields.get("option", ""), parse_reason(fields)
    _check_option(option, review, evidence, user)
    if not reason:
        raise FormRefused(f"The answer has no reason of at least {MIN_REASON_LENGTH} letters. Go back and give one.")
    if len(fields["reason"].strip()) > MAX_REASON_LENGTH:
        raise FormRefused(f"The reason is over {MAX_REASON_LENGTH:,} characters. Go back and shorten it.")
    content = {"step": "confirm", "user": user.get_id(), "review": review.id, "option": option, "reason": reason}
    return option, reason, _make_serializer().dumps(content)


def check_second_step(fields: Mapping[str, str], review: WaitingReview, evidence: Json, user: Any) -> tuple[str, str]:
    """Check a confirmation; returns the option and the reason that were confirmed.

    Raises:
        FormRefused: as for the first step.
    """
    content = _read_token(fields.get("token", ""), "confirm", review, user)
    _check_option(content["option"], review, evidence, user)
    return content["option"], content["reason"]


def _check_option(option: str, review: WaitingReview, evidence: Json, user: Any) -> None:
    options, obstacle = find_permission(review, evidence, user)
    if option not in options:
        raise FormRefused(f"{obstacle}." if obstacle else f"Choose {APPROVE} or {REJECT}.", 403 if obstacle else 400)


def _make_serializer() -> Any:
    from airflow.configuration import conf
    from itsdangerous import URLSafeTimedSerializer

    # Airflow asks for one such key on all its servers, and signs its own tokens for pages with it.
    return URLSafeTimedSerializer(conf.get_mandatory_value("api", "secret_key"), salt="breakhis-answer")


def read_review_id(token: str) -> str:
    """Returns the id of the review that a form says it is of, unchecked; empty if it says none."""
    from itsdangerous import BadData

    try:
        _, content = _make_serializer().loads_unsafe(token)
    except BadData:
        return ""
    return str(content.get("review", "")) if isinstance(content, dict) else ""


def _read_token(token: str, step: str, review: WaitingReview, user: Any) -> Json:
    from itsdangerous import BadSignature, SignatureExpired

    try:
        content: Json = _make_serializer().loads(token, max_age=_HOURS * 3600)
    except SignatureExpired:
        raise FormRefused("This form is too old. Go back, read the page as it is now, and answer there.", 403) from None
    except BadSignature:
        raise FormRefused("This form was not made by this page. Open the review, and answer there.", 403) from None
    if (content.get("step"), content.get("user")) != (step, user.get_id()):
        raise FormRefused("This form was shown to another user. Open the review, and answer there.", 403)
    if content["review"] != review.id:
        raise FormRefused(GONE, 409)
    return content


def check_origin(request: Request) -> None:
    """Check that a form was sent by a page of this site, as far as the browser says where it was.

    Raises:
        FormRefused: it was sent by a page of another one.
    """
    site = request.headers.get("sec-fetch-site")
    origin = request.headers.get("origin")
    # Browsers say the former only where the connection is secure. A proxy may have changed the host.
    hosts = (request.headers.get("host"), urlsplit(build_airflow_url("")).netloc)
    is_ours = site == "same-origin" if site else not origin or urlsplit(origin).netloc in hosts
    if not is_ours:
        raise FormRefused("This form was sent by another site. Open the review, and answer there.", 403)


async def read_fields(request: Request) -> dict[str, str]:
    """Returns the fields of a form that was sent; the last of those of one name.

    Raises:
        FormRefused: it is no form, or too long.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/x-www-form-urlencoded":
        raise FormRefused("This is no form of this page. Open the review, and answer there.", 415)
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MAX_FORM_BYTES:
            raise FormRefused(f"The reason is over {MAX_REASON_LENGTH:,} characters. Go back and shorten it.", 413)
    try:
        return dict(parse_qsl(body.decode("ascii"), errors="strict", max_num_fields=20))
    except ValueError:
        raise FormRefused("This is no form of this page. Open the review, and answer there.") from None


async def send_answer(app: Any, review: WaitingReview, option: str, reason: str, request: Request) -> None:
    """Answer a review by Airflow's public API, as the user who sent the form.

    Args:
        app: Airflow's application, of which the API is a part.
        review: the review that waits.
        option: the answer.
        reason: the reason.
        request: has the user's session.

    Raises:
        FormRefused: Airflow does not take the answer; the message quotes what it says.
    """
    import httpx

    run = f"dags/{quote(review.dag, safe='')}/dagRuns/{quote(review.run, safe='')}"
    path = f"/api/v2/{run}/taskInstances/{quote(review.task, safe='')}/-1/hitlDetails"
    token = _read_session(request)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://airflow") as client:
        response = await client.patch(
            path,
            json={"chosen_options": [option], "params_input": {"reason": reason}},
            headers={"Authorization": f"Bearer {token}"} if token else {},
        )
    if response.status_code != _OK:
        raise FormRefused(
            f"Airflow did not take the answer: {_read_detail(response)}. Open the review to see how it stands.",
            response.status_code if response.status_code in (403, 404, 409) else 503,
        )


def _read_session(request: Request) -> str:
    """Returns the token of the user's session, which is empty where Airflow asks for no login."""
    from airflow.api_fastapi.auth.managers.base_auth_manager import COOKIE_NAME_JWT_TOKEN

    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    return str(token if scheme.lower() == "bearer" else request.cookies.get(COOKIE_NAME_JWT_TOKEN, ""))


def _read_detail(response: Any) -> str:
    try:
        detail = response.json()["detail"]
    except (ValueError, KeyError, TypeError):
        return f"status {response.status_code}"
    return list_items(detail) if isinstance(detail, list) else cut_text(detail).rstrip(".")
