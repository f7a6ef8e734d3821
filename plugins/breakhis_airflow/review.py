"""The question to a reviewer: may this model version become the champion?"""

from datetime import timedelta
from typing import Any

from airflow.providers.standard.operators.hitl import HITLOperator
from airflow.sdk import Context, Param
from airflow.sdk.exceptions import AirflowFailException

from ml.reviews import APPROVE, REJECT, SHORTEST_REASON, given_reason
from ml.settings import settings


class ReviewOperator(HITLOperator):
    """Wait until one of the configured reviewers approves or rejects, with a reason.

    The task succeeds with either answer: what follows from it is decided by the stage ``promote``, which reads the
    answer from Airflow's own record. An answer without a reason fails the task, which can then be cleared to ask again.
    Airflow can lose an answer that comes within seconds of the question, before its scheduler has noticed that the task
    waits; a retry then asks again.
    The reviewers are the users in the setting BREAKHIS_REVIEWERS.

    :param subject: What is to be decided, in one line. (templated)
    :param body: The evidence, in Markdown. (templated)
    """

    ui_color = "#fdf0d5"

    def __init__(self, *, subject: str, body: str, **kwargs: Any) -> None:
        kwargs.pop("params", None)  # Airflow passes the DAG's own here, which are not the reviewer's to fill in
        super().__init__(
            subject=subject,
            body=body,
            options=[APPROVE, REJECT],
            # No value may be required here: Airflow checks the form before it is shown, not after it is filled in.
            params={
                "reason": Param(
                    None,
                    type=["null", "string"],
                    minLength=SHORTEST_REASON,
                    title="Reason",
                    description="Required: why you approve or reject. It is kept with the decision for good.",
                )
            },
            assigned_users=[{"id": user, "name": user} for user in settings().reviewers],
            # Not after minutes, as after a lost server: somebody has just read the evidence.
            **{**kwargs, "retry_delay": timedelta(seconds=10), "retry_exponential_backoff": 0},
        )

    def execute_complete(self, context: Context, event: dict[str, Any]) -> Any:
        """Check the answer; returns ``{chosen_options, params_input, responded_at, responded_by_user}``.

        Raises:
            AirflowFailException: no reason was given, or no single option chosen. Airflow accepts such answers.
        """
        if "error" not in event:
            if not given_reason(event.get("params_input")):
                self._ask_again("no reason was given")
            if len(event.get("chosen_options") or []) != 1:
                self._ask_again(f"neither {APPROVE} nor {REJECT} was chosen")
        return super().execute_complete(context, event)

    def _ask_again(self, what: str) -> None:
        raise AirflowFailException(
            f"This review does not count: {what}. Nothing was promoted. To be asked again, clear the task "
            f"'{self.task_id}' (with those after it) and answer with a reason of at least {SHORTEST_REASON} letters."
        )
