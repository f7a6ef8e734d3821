"""The question to a reviewer: may this model version become the champion?"""

from collections.abc import Collection
from datetime import timedelta
from typing import Any

from airflow.providers.standard.operators.hitl import HITLOperator
from airflow.sdk import Context, Param
from airflow.sdk.exceptions import AirflowFailException, AirflowSkipException

from breakhis_airflow.addresses import form_of, page_of
from breakhis_airflow.links import ReviewLink
from breakhis_airflow.notifications import Review, tell_of_review
from ml.core.settings import read_settings
from ml.promotion.reviews import APPROVE, MIN_REASON_LENGTH, REJECT, parse_reason


class ReviewOperator(HITLOperator):
    """Wait until one of the configured reviewers approves or rejects, with a reason.

    The task succeeds with either answer: what follows from it is decided by the stage ``promote``, which reads the
    answer from Airflow's own record. An answer without a reason fails the task, which can then be cleared to ask again.
    Airflow can lose an answer that comes within seconds of the question, before its scheduler has noticed that the task
    waits; a retry then asks again.
    The reviewers are the users in the setting BREAKHIS_REVIEWERS. What nobody answers within BREAKHIS_REVIEW_HOURS is
    rejected. Where several have to approve, each has a task of its own, one after the other; those that are not needed,
    and all after a rejection, are skipped.

    :param subject: What is to be decided, in one line. (templated)
    :param body: The evidence, in Markdown. (templated)
    :param number: Whose turn this is, from 1.
    :param approvals: How many have to approve. (templated)
    """

    template_fields: Collection[str] = (*HITLOperator.template_fields, "approvals")
    operator_extra_links = (ReviewLink(),)
    ui_color = "#fdf0d5"

    def __init__(self, *, subject: str, body: str, number: int = 1, approvals: str | int = 1, **kwargs: Any) -> None:
        kwargs.pop("params", None)  # Airflow passes the DAG's own here, which are not the reviewer's to fill in
        self.number = number
        self.approvals = approvals
        super().__init__(
            subject=subject,
            body=body,
            options=[APPROVE, REJECT],
            # No value may be required here: Airflow checks the form before it is shown, not after it is filled in.
            params={
                "reason": Param(
                    None,
                    type=["null", "string"],
                    minLength=MIN_REASON_LENGTH,
                    title="Reason",
                    description="Required: why you approve or reject. It is kept with the decision for good.",
                )
            },
            assigned_users=[{"id": user, "name": user} for user in read_settings().reviewers],
            defaults=[REJECT],  # nobody's silence approves
            response_timeout=timedelta(hours=read_settings().review_hours),
            # Not after minutes, as after a lost server: somebody has just read the evidence.
            **{**kwargs, "retry_delay": timedelta(seconds=10), "retry_exponential_backoff": 0},
        )

    def execute(self, context: Context) -> Any:
        """Ask, if it is this one's turn.

        Raises:
            AirflowSkipException: fewer have to approve, or the one before has rejected.
        """
        if self.number > int(self.approvals):
            raise AirflowSkipException(f"{self.approvals} have to approve")
        for before in self.upstream_list:
            if isinstance(before, ReviewOperator):
                answered = context["ti"].xcom_pull(task_ids=before.task_id)
                if answered and answered["chosen_options"] == [REJECT]:
                    raise AirflowSkipException(f"{before.task_id} was answered with {REJECT}")
        ti = context["ti"]
        form = form_of(ti.dag_id, ti.run_id, ti.task_id)
        tell_of_review(context, Review(self.subject, form, page_of(self.body), read_settings().review_hours))
        return super().execute(context)

    def execute_complete(self, context: Context, event: dict[str, Any]) -> Any:
        """Check the answer; returns ``{chosen_options, params_input, responded_at, responded_by_user}``.

        Raises:
            AirflowFailException: no reason was given, or no single option chosen. Airflow accepts such answers.
        """
        nobody = event.get("responded_by_user") is None and event.get("chosen_options") == [REJECT]
        if "error" not in event and not nobody:
            if not parse_reason(event.get("params_input")):
                self._ask_again("no reason was given")
            if len(event.get("chosen_options") or []) != 1:
                self._ask_again(f"neither {APPROVE} nor {REJECT} was chosen")
        return super().execute_complete(context, event)

    def _ask_again(self, what: str) -> None:
        raise AirflowFailException(
            f"This review does not count: {what}. Nothing was promoted. To be asked again, clear the task "
            f"'{self.task_id}' (with those after it) and answer with a reason of at least {MIN_REASON_LENGTH} letters."
        )
