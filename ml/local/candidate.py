"""A candidate as the workflow follows it, from its registration to the decision about it."""

from dataclasses import dataclass, field
from typing import Any

from ml.local.watch import WAITING_STATES, DagRun
from ml.promotion.reviews import REVIEW_TASK

Json = dict[str, Any]


@dataclass
class Candidate:
    """A model version that a retraining has registered, and what has become of it."""

    task: str
    model: str
    version: str
    run_id: str
    metrics: Json
    promote: DagRun
    gates: list[Json] = field(default_factory=list)
    passed: bool | None = None
    decision: str = ""
    reviewer: str = ""
    reason: str = ""
    champion: str = ""

    @property
    def is_waiting(self) -> bool:
        """Whether its review waits for an answer."""
        return self.promote.task(REVIEW_TASK).get("state") in WAITING_STATES

    @property
    def is_settled(self) -> bool:
        """Whether nothing more happens to it without a person."""
        return self.is_waiting or self.promote.has_ended

    @property
    def failing(self) -> str:
        """The gates that block it, and by how much."""
        return "; ".join(gate["reason"] for gate in self.gates if not gate["passed"])

    def summary(self) -> Json:
        """Returns what has become of it, as the JSON of ``breakhis demo`` has it."""
        names = ("task", "model", "version", "run_id", "metrics", "gates", "passed", "decision", "reviewer", "reason")
        return {**{name: getattr(self, name) for name in names}, "champion": self.champion, "state": self.promote.state}
