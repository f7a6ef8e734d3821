"""What the review pages read of an evidence bundle: its fields, their types and bounds, checked before a page is made.

A bundle is checked against the hash in its name, but whoever writes to the store can make one that has the hash of its
content and holds anything.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ml.core.strict_json import Shape
from ml.core.taxonomy import Task, class_names

_Number = Annotated[float, Field(ge=-1e9, le=1e9, allow_inf_nan=False)]
_Count = Annotated[int, Field(ge=0, le=10**9)]
_Ends = Annotated[list[_Number], Field(min_length=2, max_length=2)]
_Numbers = dict[str, _Number]


class _Part(Shape):
    """Scores of a part of the test images."""

    images: _Count
    cases: _Count
    recognised: _Count | None = None
    metrics: _Numbers
    intervals: dict[str, _Ends]


class _ClassScores(Shape):
    recall: _Number
    precision: _Number
    support: _Number
    cases: _Count | None = None
    recognised: _Count | None = None

    @model_validator(mode="after")
    def _check_counts(self) -> "_ClassScores":
        if (self.cases is None) != (self.recognised is None):
            raise ValueError("it has either cases or recognised, and not both")
        return self


class _Weights(Shape):
    id: str
    kind: str


class _Side(Shape):
    images: _Count
    cases: _Count


class _Sides(Shape):
    train: _Side
    validation: _Side
    test: _Side


_Matrix = list[list[_Count]]


class _Confusions(Shape):
    images: _Matrix
    cases: _Matrix


class _Evidence(Shape):
    """Evidence of a version; earlier releases recorded less."""

    model: str
    version: _Count
    task: Task
    metrics: _Numbers
    intervals: dict[str, _Ends] = Field({})
    interval_notes: dict[str, str] = Field({})
    per_class: dict[str, _ClassScores]
    confusions: _Confusions | None = None
    absent_classes: list[str]
    slices: dict[Literal["magnification", "source", "subtype"], dict[str, _Part]] = Field({})
    weights: _Weights
    sides: _Sides
    dataset: str
    sources: dict[str, str]
    validations: dict[str, str] = Field({})
    artifacts: dict[str, str] = Field({})

    @model_validator(mode="after")
    def _check_classes(self) -> "_Evidence":
        if missing := [name for name in class_names(self.task) if name not in self.per_class]:
            raise ValueError(f"per_class lacks {', '.join(missing)}")
        count = len(class_names(self.task))
        for matrix in (self.confusions.images, self.confusions.cases) if self.confusions else ():
            if len(matrix) != count or any(len(row) != count for row in matrix):
                raise ValueError(f"confusions is no matrix of {count} by {count}")
        return self


class _Gate(Shape):
    name: str
    metric: str | None
    value: _Number | None
    limit: _Number | None
    distance: _Number | None
    passed: bool
    reason: str
    warning: str


class _Pair(Shape):
    metric: str
    where: str
    images: _Count
    cases: _Count
    champion: _Number | None
    candidate: _Number | None
    difference: _Number | None
    low: _Number | None
    size: _Number | None
    power: _Number | None
    reason: str

    @model_validator(mode="after")
    def _check_numbers(self) -> "_Pair":
        numbers = (self.champion, self.candidate, self.low, self.size, self.power)
        if self.difference is not None and None in numbers:
            raise ValueError("it has a difference, and lacks another number")
        return self


class _Rule(Shape):
    margin: _Number


class _PolicyContent(Shape):
    comparison: _Rule | None = None


class _Comparison(Shape):
    pairs: list[_Pair]


class Bundle(Shape):
    """An evidence bundle."""

    evidence_id: str
    evidence: _Evidence
    champion: _Evidence | None
    comparison: _Comparison | None
    gates: list[_Gate]
    warnings: list[str]
    summary: str
    policy: str | None
    policy_content: _PolicyContent | None = None
    approvals: _Count

    @model_validator(mode="after")
    def _check_tasks(self) -> "Bundle":
        if self.champion and self.champion.task != self.evidence.task:
            raise ValueError(f"the champion's task is {self.champion.task}, the candidate's {self.evidence.task}")
        return self
