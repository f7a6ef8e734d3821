"""Attempts on the answer form of the review page, by its own requests as a browser sends them."""

import re
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import requests

from ml.core.errors import AirflowError
from ml.promotion.alias_history import NOT_COUNTED
from ml.promotion.audit_log import read_unverified_records
from ml.promotion.reviews import parse_bundle_id

if TYPE_CHECKING:
    from tests.trust.bypass import AttackedProduct

_TOKEN = re.compile(r'name="token" value="([^"]+)"')
_REASON = "read on the page"
_SECONDS = 60.0


class Browser:
    """Somebody who is logged in, and has the review page of a run before them."""

    def __init__(self, product: "AttackedProduct", run: str, user: str) -> None:
        api = product.api(user)
        api.dag_run("promote", run)  # logs in
        self.session = requests.Session()
        self.session.cookies.set("_token", api._token)
        bundle = parse_bundle_id(product.api("admin").hitl_detail("promote", run, "review")["body"])
        self.page = f"{api.url}/breakhis/reviews/{bundle}/"

    def find_token(self) -> str:
        """Returns the token of the form on the page; empty where there is none."""
        return self._parse_token(self.session.get(self.page))

    def confirm(self, token: str, option: str, reason: str = _REASON, **headers: str) -> requests.Response:
        """Send the first step."""
        fields = {"token": token, "option": option, "reason": reason}
        return self.session.post(f"{self.page}confirm", data=fields, headers=headers)

    def send(self, token: str, **headers: str) -> requests.Response:
        """Send the second step."""
        return self.session.post(f"{self.page}answer", data={"token": token}, headers=headers, allow_redirects=False)

    def find_second_token(self, option: str = "Approve") -> str:
        """Go as far as the button of the second step; returns its token."""
        return self._parse_token(self.confirm(self.find_token(), option))

    @staticmethod
    def _parse_token(response: requests.Response) -> str:
        found = _TOKEN.search(response.text)
        return found[1] if found else ""


def answer_by_page(product: "AttackedProduct", run: str, user: str, option: str) -> str:
    """Answer as a reviewer does on the page; returns the status of each step."""
    browser = Browser(product, run, user)
    first = browser.confirm(browser.find_token(), option)
    second = browser.send(browser._parse_token(first))
    return f"confirm {first.status_code}, answer {second.status_code}"


def answer_the_page_as_others(product: "AttackedProduct") -> str:
    """answering on the review page as viewer, engineer and the reviewer who started the run"""
    run = product.start_promotion(product.register_candidate())
    own = product.start_promotion(product.register_candidate(), user="reviewer")
    outcomes = []
    for user, asked in (("viewer", run), ("engineer", run), ("reviewer", own)):
        product.wait_for_review(asked)
        browser = Browser(product, asked, user)
        # The token of a page without a form is of no use either; that of somebody else is not of this user.
        token = browser.find_token() or Browser(product, run, "reviewer").find_token()
        statuses = [browser.confirm(token, option).status_code for option in ("Approve", "Reject")]
        outcomes.append(f"{user} {'a' if browser.find_token() else 'no'} form, {statuses}")
    return f"{'; '.join(outcomes)}; review {product.read_state(run, 'review')}"


def forge_the_page_form(product: "AttackedProduct") -> str:
    """sending the review page's form forged, from another site, without its first step, or endlessly long"""
    run = product.start_promotion(product.register_candidate())
    product.wait_for_review(run)
    browser = Browser(product, run, "reviewer")
    token, second = browser.find_token(), browser.find_second_token()
    statuses = {
        "forged": browser.send(f"{second[:-2]}xx"),
        "other site": browser.send(second, **{"Sec-Fetch-Site": "cross-site"}),
        "other origin": browser.send(second, Origin="https://elsewhere.example"),
        "first step left out": browser.send(token),
        "1 MB": browser.confirm(token, "Approve", "x" * 1_000_000),
        "no reason": browser.confirm(token, "Approve", " "),
        "as JSON": browser.session.post(f"{browser.page}answer", json={"token": second}),
    }
    told = ", ".join(f"{name} {answer.status_code}" for name, answer in statuses.items())
    return f"{told}; review {product.read_state(run, 'review')}"


def replay_a_page_form(product: "AttackedProduct") -> str:
    """sending an approval's old form again after the rejection, and for another candidate"""
    run, other = (product.start_promotion(product.register_candidate()) for _ in range(2))
    product.wait_for_review(run)
    product.wait_for_review(other)
    browser = Browser(product, run, "reviewer")
    old = browser.find_second_token()
    elsewhere = Browser(product, other, "reviewer").send(old)
    rejected = answer_by_page(product, run, "reviewer", "Reject")
    again = browser.send(old)
    ends = f"{product.wait_for_end(run)}, {product.wait_for_end(run, 'rejected')}"
    return f"elsewhere {elsewhere.status_code}; rejected: {rejected}; again {again.status_code}; {ends}"


def answer_without_a_reason(product: "AttackedProduct") -> str:
    """approving without a reason over Airflow's API, three times, then rejecting"""
    run = product.start_promotion(product.register_candidate())
    outcomes = []
    answers: list[dict[str, Any]] = [{}, {"reason": "  "}, {"reason": "ok"}]
    for number, params in enumerate(answers, start=1):
        product.wait_for_review(run)
        with suppress(AirflowError):  # lost: answered before the scheduler has noticed that the task waits
            product.api("reviewer").answer("promote", run, "review", "Approve", params)
        _wait_for_kept(product, run, number)
        outcomes.append(f"{_count_uncounted(product, run)} kept")
    product.wait_for_review(run)
    tries = [t["try_number"] for t in product.api("admin").task_instances("promote", run) if t["task_id"] == "review"]
    browser = Browser(product, run, "reviewer")
    told = "does not count" in browser.session.get(browser.page).text
    rejected = answer_by_page(product, run, "reviewer", "Reject")
    return f"{', '.join(outcomes)}; tries {tries}; told on the page: {told}; {rejected}; {product.wait_for_end(run)}"


def _wait_for_kept(product: "AttackedProduct", run: str, number: int) -> None:
    deadline = time.monotonic() + _SECONDS
    while _count_uncounted(product, run) < number and time.monotonic() < deadline:
        time.sleep(0.5)


def _count_uncounted(product: "AttackedProduct", run: str) -> int:
    records = read_unverified_records(product.world.store)
    return sum((one["event"], one.get("run")) == (NOT_COUNTED, f"promote/{run}") for one in records)


ATTEMPTS: dict[Callable[["AttackedProduct"], str], str] = {
    answer_the_page_as_others: (
        r"^viewer no form, \[403, 403\]; engineer no form, \[403, 403\]; reviewer no form, \[4\d\d, 4\d\d\]; "
        r"review awaiting_input$"
    ),
    forge_the_page_form: (
        r"^forged 403, other site 403, other origin 403, first step left out 403, 1 MB 413, no reason 400, "
        r"as JSON 415; review awaiting_input$"
    ),
    replay_a_page_form: (
        r"^elsewhere 409; rejected: confirm 200, answer 303; again 409; promote success, rejected success"
    ),
    answer_without_a_reason: (
        r"^1 kept, 2 kept, 3 kept; tries \[1\]; told on the page: True; confirm 200, answer 303; promote success"
    ),
}
"""Each attempt with the pattern of its right outcome."""
