"""The task that asks a reviewer whether a model version may become the champion."""

import os
from collections.abc import Collection
from datetime import UTC, datetime, timedelta
from typing import Any

from airflow.providers.standard.operators.hitl import HITLOperator
from airflow.sdk import Context, Param
from airflow.sdk.exceptions import AirflowSkipException

from breakhis_airflow.addresses import build_answer_form_url, build_review_page_url
from breakhis_airflow.connections import AIRFLOW, AUDIT, PROMOTER, read_connections
from breakhis_airflow.failures import explained_failures
from breakhis_airflow.links import ReviewLink
from breakhis_airflow.notifications import Review, notify_of_review
from ml.core.settings import read_settings
from ml.core.store import Json
from ml.promotion.reviews import APPROVE, MAX_REASON_LENGTH, MIN_REASON_LENGTH, PROMOTE, REJECT, find_answer_problem


class ReviewOperator(HITLOperator):
    """Waits until one of the configured reviewers approves or rejects, with a reason.

    The task succeeds with either answer. The stage ``promote`` then reads the answer from Airflow's own record and
    carries it out. An answer without a reason is kept in the audit log, and the task waits for another one, in the same
    try. Airflow can lose an answer that comes within seconds of the question, before its scheduler has noticed that the
    task waits; a retry then asks again.

    Before a promotion's review is asked, it is recorded in the audit log. A rejection that was given already is final:
    clearing the task has nobody asked again, whether it was answered before the clearing or after it.

    The reviewers are the users in the setting BREAKHIS_REVIEWERS. A review that nobody answers within
    BREAKHIS_REVIEW_HOURS is rejected. Where several have to approve, each has a task of its own, one after the other;
    tasks that are not needed, and all after a rejection, are skipped.

    :param subject: What is to be decided, in one line. (templated)
    :param body: The evidence, in Markdown. (templated)
    :param number: Which of the approvals this is, from 1.
    :param approvals: How many have to approve. (templated)
    """

    template_fields: Collection[str] = (*HITLOperator.template_fields, "approvals")
    operator_extra_links = (ReviewLink(),)
    ui_color = "#fdf0d5"

    def __init__(self, *, subject: str, body: str, number: int = 1, approvals: str | int = 1, **kwargs: Any) -> None:
        kwargs.pop("params", None)  # Airflow passes the DAG's own here, which the reviewer does not fill in
        self.number = number
        self.approvals = approvals
        super().__init__(
            subject=subject,
            body=body,
            options=[APPROVE, REJECT],
            # No value may be required: Airflow checks the form before it is shown, not after it is filled in.
            params={
                "reason": Param(
                    None,
                    type=["null", "string"],
                    minLength=MIN_REASON_LENGTH,
                    maxLength=MAX_REASON_LENGTH,
                    title="Reason",
                    description="Required: why you approve or reject. It is kept with the decision for good.",
                )
            },
            assigned_users=[{"id": user, "name": user} for user in read_settings().reviewers],
            defaults=[REJECT],  # a review without an answer is rejected
            response_timeout=timedelta(hours=read_settings().review_hours),
            # A retry asks at once and not, as after a lost server, minutes later: somebody has just read the evidence.
            **{**kwargs, "retry_delay": timedelta(seconds=10), "retry_exponential_backoff": 0},
        )

    def execute(self, context: Context) -> Any:
        """Asks the reviewers, if this approval is needed.

        Raises:
            AirflowSkipException: fewer approvals are needed, or the review before was answered with a rejection.
        """
        if self.number > int(self.approvals):
            raise AirflowSkipException(f"{self.approvals} have to approve")
        for earlier in self.upstream_list:
            if isinstance(earlier, ReviewOperator):
                answer = context["ti"].xcom_pull(task_ids=earlier.task_id)
                if answer and answer["chosen_options"] == [REJECT]:
                    raise AirflowSkipException(f"{earlier.task_id} was answered with {REJECT}")
        ti = context["ti"]
        if ti.dag_id == PROMOTE and (rejection := self._record_question(context)):
            return self.execute_complete(context, rejection)
        form = build_answer_form_url(ti.dag_id, ti.run_id, ti.task_id)
        notify_of_review(
            context, Review(self.subject, form, build_review_page_url(self.body), read_settings().review_hours)
        )
        return super().execute(context)

    def _record_question(self, context: Context) -> Json | None:
        """Records the question in the audit log, or returns the rejection that it was answered with already."""
        from ml.core.store import Store
        from ml.promotion.answers import is_rejection
        from ml.promotion.questions import record_question

        ti, run = context["ti"], context["dag_run"]
        with explained_failures("recording the question"):
            self._read_connections(PROMOTE)
            # Airflow keeps the question of a cleared task, to be answered until it is asked again. Asking deletes the
            # answer.
            earlier = self._read_question(ti)
            if is_rejection(earlier, run.triggering_user_name):
                self.log.info("%s has rejected it already, which is final", earlier["responded_by_user"]["name"])
                return earlier | {"responded_at": datetime.fromisoformat(earlier["responded_at"])}
            settings = read_settings()
            record_question(run.conf or {}, ti.run_id, str(ti.id), Store(settings.store), settings)
        return None

    def _read_question(self, ti: Any) -> Json:
        """Returns Airflow's record of this task's question and its answer; empty if it was not asked yet."""
        from ml.core.airflow_api import connect_airflow
        from ml.core.errors import AirflowError

        try:
            return connect_airflow(read_settings()).hitl_detail(ti.dag_id, ti.run_id, ti.task_id)
        except AirflowError as error:
            if error.status != 404:
                raise
            return {}

    def execute_complete(self, context: Context, event: dict[str, Any]) -> Any:
        """Returns ``{chosen_options, params_input, responded_at, responded_by_user}``, or waits for another answer.

        Raises:
            TaskAwaitingInput: the answer has no reason, or no single option was chosen. Airflow accepts such answers.
        """
        is_unanswered = event.get("responded_by_user") is None and event.get("chosen_options") == [REJECT]
        if "error" not in event and not is_unanswered and (problem := find_answer_problem(event)):
            self._ask_again(context, event, problem)
        return super().execute_complete(context, event)

    def _ask_again(self, context: Context, event: Json, problem: str) -> None:
        """Keeps an answer that does not count in the audit log, and waits for another one in the same try.

        Asking anew deletes the answer in Airflow. The time to answer does not begin anew.
        """
        from ml.core.store import Store
        from ml.promotion.questions import record_uncounted_answer

        ti, run, who = context["ti"], context["dag_run"], (event.get("responded_by_user") or {}).get("name")
        with explained_failures("recording an answer that does not count"):
            self._read_connections(ti.dag_id)
            settings, asked = read_settings(), datetime.fromisoformat(str(self._read_question(ti)["created_at"]))
            record_uncounted_answer(
                run.conf or {}, f"{ti.dag_id}/{ti.run_id}", str(ti.id), event, problem, Store(settings.store), settings
            )
        left = asked + timedelta(hours=settings.review_hours) - datetime.now(UTC)
        self.response_timeout = max(left, timedelta(minutes=1))
        remark = (
            f"The answer of {who} does not count, since {problem}. Nothing was promoted, and the review is asked again"
        )
        self.log.warning("%s.", remark)
        form = build_answer_form_url(ti.dag_id, ti.run_id, ti.task_id)
        hours = self.response_timeout.total_seconds() / 3600
        notify_of_review(context, Review(self.subject, form, build_review_page_url(self.body), hours, remark=remark))
        super().execute(context)

    def _read_connections(self, dag: str) -> None:
        """Reads what Airflow's connections say into the environment of this process, which ends when it has asked."""
        variables, _ = read_connections([*read_settings().connections, AIRFLOW, AUDIT, PROMOTER], dag)
        os.environ.update(variables)
