"""Serves the pages under /breakhis to everybody who is logged in to Airflow.

/breakhis/docs/<validation>/…  a validation report in the store
/breakhis/sources/<name>       leads to the report of the source's current version
/breakhis/reviews/…            for users who may see the DAG ``promote``: see :mod:`breakhis_airflow.review_list` and
                               :mod:`breakhis_airflow.review_pages`
/breakhis/reviews/…/confirm    and …/answer take the form on a review page: see :mod:`breakhis_airflow.answer_form`
/breakhis/reviews-asked        for them, too: the ids of a promotion's reviews, as JSON
"""

import base64
import hashlib
import logging
import mimetypes
import re
from functools import partial
from pathlib import PurePosixPath
from typing import Annotated, Any
from urllib.parse import quote

from ml.core.disks import explain_os_error
from ml.core.errors import BreakhisError, StoreError, TryAgain
from ml.core.messages import cut_text, hide_access, quote_value
from ml.core.s3_access import find_outage
from ml.core.settings import read_settings
from ml.core.store import Store
from ml.core.yaml_files import is_name
from ml.promotion.reviews import PROMOTE

log = logging.getLogger(__name__)

_VALIDATION_ID = re.compile(r"validation-[0-9a-f]{12}")
_HEADERS = {
    # A report shows what came with the data, such as file names. A script hidden there would act as the reader, who may
    # be a reviewer. Reports need no script, so none runs.
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; font-src 'self' data:; "
        "form-action 'none'; base-uri 'none'; frame-ancestors 'self'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "private, max-age=3600",  # reports do not change, but readers log out
}
_RUN_FILE_HEADERS = {
    **_HEADERS,
    # Whoever trains writes these files. In a sandbox they do not act as our site, and cannot lead the page elsewhere.
    "Content-Security-Policy": f"{_HEADERS['Content-Security-Policy']}; sandbox allow-popups",
}

_MAX_NAME, _MAX_PATH = 200, 1_000
"""Bytes of a source's name or one part of a path, and of a whole path in a report: file systems take no longer ones."""

_MAX_DETAIL = 1_000
"""Characters of an error on a page."""


def _make_script_headers(script: str) -> dict[str, str]:
    """Returns the headers of a page made for each reader, which may run this script and no other and send its forms."""
    script_hash = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = _HEADERS["Content-Security-Policy"].replace("form-action 'none'", "form-action 'self'")
    policy += f"; script-src 'sha256-{script_hash}'"
    return {**_HEADERS, "Content-Security-Policy": policy, "Cache-Control": "no-store"}


def create_app() -> Any:
    """Returns the FastAPI application."""
    from fastapi import FastAPI

    # Without FastAPI's own pages: they would be open to everybody, and /docs is ours.
    app = FastAPI(title="BreakHis", docs_url=None, redoc_url=None, openapi_url=None)
    _add_error_pages(app)
    _add_reports(app)
    _add_reviews(app)
    _add_answers(app)
    return app


def _add_error_pages(app: Any) -> None:
    """Has the pages say in words what is in the way, where the store, a disk or Airflow's database cannot be read.

    What is damaged or missing is 404: it stays so until somebody acts. Where the same page may come later it is 503.
    """
    from botocore.exceptions import BotoCoreError, ClientError
    from fastapi import Request
    from fastapi.responses import JSONResponse
    from sqlalchemy.exc import SQLAlchemyError
    from urllib3.exceptions import HTTPError

    def say(error: BreakhisError) -> JSONResponse:
        is_gone = isinstance(error, StoreError)
        return JSONResponse({"detail": cut_text(error, _MAX_DETAIL)}, status_code=404 if is_gone else 503)

    @app.exception_handler(BreakhisError)
    def say_own(_: Request, error: BreakhisError) -> JSONResponse:
        """Says an error of ours."""
        return say(error)

    @app.exception_handler(SQLAlchemyError)
    def say_database(_: Request, error: SQLAlchemyError) -> JSONResponse:
        """Says that Airflow's database cannot be asked. The error itself quotes the query, so only the log has it."""
        log.error("Airflow's database cannot be asked", exc_info=error)
        return say(TryAgain(f"Airflow's database cannot be asked ({type(error).__name__}); try again"))

    @app.exception_handler(OSError)
    @app.exception_handler(BotoCoreError)
    @app.exception_handler(ClientError)
    @app.exception_handler(HTTPError)
    def say_storage(_: Request, error: Exception) -> JSONResponse:
        """Says that a disk or the store's S3 server is in the way."""
        log.error("the store cannot be read", exc_info=error)
        cause = explain_os_error(error) if isinstance(error, OSError) else find_outage(error)
        return say(cause or TryAgain(f"the store cannot be read: {cut_text(hide_access(error))}"))


def _add_reports(app: Any) -> None:
    """Adds the pages of validation reports."""
    from airflow.api_fastapi.core_api.security import get_user
    from fastapi import Depends, HTTPException
    from fastapi.responses import FileResponse, RedirectResponse

    @app.get("/docs/{validation}/{path:path}", dependencies=[Depends(get_user)])
    def report(validation: str, path: str) -> FileResponse:
        """Returns a file of a validation's report."""
        try:
            file = find_report_file(Store(read_settings().store), validation, path)
        except StoreError:
            raise HTTPException(404, f"There is no such page in the report of {quote_value(validation)}.") from None
        kind = mimetypes.guess_type(path)[0] or "application/octet-stream"
        return FileResponse(file, media_type=kind, headers=_HEADERS)

    @app.get("/sources/{name}", dependencies=[Depends(get_user)])
    def source(name: str) -> RedirectResponse:
        """Leads to the report of a source's current version."""
        published, _ = Store(read_settings().store).read(f"refs/sources/{name}.json") if is_name(name) else (None, "")
        if not published:
            raise HTTPException(404, f"No version of a source {quote_value(name)} has been published yet.")
        address = f"../docs/{quote(published['validation'], safe='')}/index.html"
        return RedirectResponse(address, headers={"Cache-Control": "no-store"})


def _add_reviews(app: Any) -> None:
    """Adds the review pages, for users who may see the DAG in which reviews are answered."""
    from airflow.api_fastapi.core_api.security import get_user, requires_access_dag
    from fastapi import Depends, Query
    from fastapi.responses import FileResponse, HTMLResponse

    from breakhis_airflow import airflow_database, answer_form, review_list, review_pages

    headers = _make_script_headers(review_pages.SCRIPT)
    may_read = app.state.may_read = requires_access_dag("GET", param_dag_id=PROMOTE)

    @app.get("/reviews-asked", dependencies=[Depends(may_read)])
    def list_asked_reviews(run: str) -> dict[str, list[str]]:
        """Returns the ids of the reviews of a run of the DAG ``promote``: a promotion looks for those that it knows."""
        return {"reviews": airflow_database.read_asked_reviews(run)}

    @app.get("/reviews/", dependencies=[Depends(may_read)])
    def list_reviews(model: str = "", page: int = Query(1, ge=1, le=review_list.MAX_PAGE)) -> HTMLResponse:
        """Shows the reviews that wait, those on their way, and a page of decisions, of one model or of all."""
        store = Store(read_settings().store)
        content = review_list.render_review_list(
            airflow_database.read_waiting_reviews(),
            airflow_database.read_run_states(review_list.list_open_runs(store)),
            airflow_database.read_audit_check(),
            store,
            model=model,
            page=page,
        )
        return HTMLResponse(content, headers=headers)

    @app.get("/reviews/{bundle}/", dependencies=[Depends(may_read)])
    def review(bundle: str, user: Annotated[Any, Depends(get_user)]) -> HTMLResponse:
        """Shows a candidate beside the champion, and the reader's answer form where its review waits."""
        page = review_pages.render_review(
            bundle,
            airflow_database.read_waiting_reviews(),
            airflow_database.read_audit_check(),
            Store(read_settings().store),
            partial(answer_form.make_form, user=user),
            airflow_database.read_last_answer(bundle),
        )
        return HTMLResponse(page, headers=headers)

    @app.get("/reviews/{bundle}/{role}/{name}", dependencies=[Depends(may_read)])
    def evidence_file(bundle: str, role: str, name: str) -> FileResponse:
        """Returns a picture or report of the candidate or the champion."""
        file = review_pages.find_bundle_file(bundle, role, name, Store(read_settings().store))
        return FileResponse(file, media_type=mimetypes.guess_type(name)[0], headers=_RUN_FILE_HEADERS)


def _add_answers(app: Any) -> None:
    """Adds the two steps of the answer form on a review page, for users who may see the reviews."""
    from airflow.api_fastapi.core_api.security import get_user
    from anyio import from_thread
    from fastapi import Depends, Request
    from fastapi.exception_handlers import http_exception_handler
    from fastapi.responses import HTMLResponse, RedirectResponse
    from starlette.exceptions import HTTPException as AnyHTTPException

    from breakhis_airflow import airflow_database, answer_form, review_pages

    headers = _make_script_headers(review_pages.SCRIPT)
    guards = [Depends(app.state.may_read), Depends(answer_form.check_origin)]

    def find_review(bundle: str, token: str) -> airflow_database.WaitingReview:
        named, store = answer_form.read_review_id(token), Store(read_settings().store)
        for review in airflow_database.read_waiting_reviews():
            is_named = (review.bundle, review.id) == (bundle, named) and named
            if is_named and not review_pages.is_settled(review.dag, bundle, store):
                return review
        raise answer_form.FormRefused(answer_form.GONE, 409)

    @app.exception_handler(answer_form.FormRefused)
    def say_refused(_: Request, error: answer_form.FormRefused) -> HTMLResponse:
        """Says why a form was not carried out."""
        return HTMLResponse(review_pages.render_refusal(str(error)), error.status, headers)

    @app.exception_handler(AnyHTTPException)
    async def say_in_words(request: Request, error: AnyHTTPException) -> Any:
        """Says to who has sent a form that they are logged in no more, or may not see reviews."""
        if request.method == "POST" and error.status_code in answer_form.LOGIN_PROBLEMS:
            refusal = review_pages.render_refusal(answer_form.LOGIN_PROBLEMS[error.status_code])
            return HTMLResponse(refusal, error.status_code, headers)
        return await http_exception_handler(request, error)

    @app.post("/reviews/{bundle}/confirm", dependencies=guards)
    def confirm(
        bundle: str,
        user: Annotated[Any, Depends(get_user)],
        fields: Annotated[dict[str, str], Depends(answer_form.read_fields)],
    ) -> HTMLResponse:
        """Shows what is about to be answered, to be confirmed."""
        review = find_review(bundle, fields.get("token", ""))
        content = review_pages.read_bundle(bundle, Store(read_settings().store))
        option, reason, token = answer_form.check_first_step(fields, review, content["evidence"], user)
        page = review_pages.render_confirmation(content["evidence"], review, option, reason, token)
        return HTMLResponse(page, headers=headers)

    @app.post("/reviews/{bundle}/answer", dependencies=guards)
    def answer(
        bundle: str,
        request: Request,
        user: Annotated[Any, Depends(get_user)],
        fields: Annotated[dict[str, str], Depends(answer_form.read_fields)],
        airflow: Annotated[Any, Depends(find_airflow)],
    ) -> RedirectResponse:
        """Answers the review in Airflow, and leads back to its page."""
        review = find_review(bundle, fields.get("token", ""))
        content = review_pages.read_bundle(bundle, Store(read_settings().store))
        option, reason = answer_form.check_second_step(fields, review, content["evidence"], user)
        from_thread.run(answer_form.send_answer, airflow, review, option, reason, request)
        return RedirectResponse("./", 303, {"Cache-Control": "no-store"})

    @app.get("/reviews/{bundle}/confirm", dependencies=[Depends(app.state.may_read)])
    @app.get("/reviews/{bundle}/answer", dependencies=[Depends(app.state.may_read)])
    def back(bundle: str) -> RedirectResponse:  # noqa: ARG001
        """Leads to the review who comes here by a reload or after a login."""
        return RedirectResponse("./", 303)


def find_airflow() -> Any:
    """Returns Airflow's own application, in which this one is mounted."""
    from airflow.api_fastapi.main import app

    return app


def find_report_file(store: Store, validation: str, path: str) -> Any:
    """Returns a file of a validation's report, on the local disk.

    Raises:
        StoreError: ``validation`` is no validation, or ``path`` is no file below its docs/.
    """
    parts = PurePosixPath(path).parts
    is_unsafe = not parts or {"..", "/"} & set(parts) or "\0" in path or "\\" in path
    is_unsafe = is_unsafe or len(path.encode()) > _MAX_PATH or max(len(part.encode()) for part in parts) > _MAX_NAME
    if not _VALIDATION_ID.fullmatch(validation) or is_unsafe:
        raise StoreError(f"{validation}/{path}: no page of a report")
    store.meta(validation)
    file = store.file(validation, "docs/" + "/".join(parts))
    docs = store.path(f"{store.object_key(validation)}/docs")
    # In a local store a link inside the folder could lead out of it; in S3 there are no links.
    if not file.is_file() or (store.root.startswith("file:") and not file.resolve().is_relative_to(docs.resolve())):
        raise StoreError(f"{validation}/{path}: no page of a report")
    return file
