"""Promotion policies: the limits that a model version must keep before a reviewer is asked, one YAML file each.

There is no flag that skips a gate. A setting that a policy omits has the strictest sensible default, and an invalid
policy is an error, which blocks.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, FiniteFloat, model_validator

from ml.core.errors import ConfigError
from ml.core.messages import quote_value
from ml.core.taxonomy import TASKS, Task
from ml.core.yaml_files import KeyedError, YamlModel, find_yaml, read_yaml
from ml.evaluation.metric_names import LOWER_IS_BETTER, METRIC_NAMES

BinaryMetric = Literal[
    "accuracy",
    "balanced_accuracy",
    "roc_auc",
    "pr_auc",
    "precision",
    "recall",
    "specificity",
    "f1",
    "micro_f1",
    "macro_f1",
    "weighted_f1",
    "mcc",
    "brier",
    "ece",
    "patient_accuracy",
    "patient_balanced_accuracy",
    "patient_precision",
    "patient_recall",
    "patient_specificity",
    "patient_f1",
    "patient_micro_f1",
    "patient_macro_f1",
    "patient_weighted_f1",
    "patient_mcc",
    "patient_roc_auc",
    "patient_pr_auc",
    "patient_brier",
    "patient_ece",
    "patient_recognition_rate",
]
SubtypeMetric = Literal[
    "accuracy",
    "balanced_accuracy",
    "precision",
    "recall",
    "micro_f1",
    "macro_f1",
    "weighted_f1",
    "mcc",
    "roc_auc_ovr",
    "pr_auc_ovr",
    "brier",
    "ece",
    "patient_accuracy",
    "patient_balanced_accuracy",
    "patient_precision",
    "patient_recall",
    "patient_micro_f1",
    "patient_macro_f1",
    "patient_weighted_f1",
    "patient_mcc",
    "patient_roc_auc_ovr",
    "patient_pr_auc_ovr",
    "patient_brier",
    "patient_ece",
    "patient_recognition_rate",
]
BinarySliceMetric = Literal["accuracy", "balanced_accuracy", "macro_f1", "roc_auc", "recall", "specificity"]
SubtypeSliceMetric = Literal["accuracy", "balanced_accuracy", "macro_f1", "roc_auc_ovr"]

RequiredEvidence = Literal["report", "model_card", "validated_dataset", "pretrained_weights"]
REQUIRED_EVIDENCE: tuple[RequiredEvidence, ...] = ("report", "model_card", "validated_dataset", "pretrained_weights")


class Limit(YamlModel):
    """A bound on one metric; in YAML a bare number is ``at_least`` that number."""

    at_least: FiniteFloat | None = Field(None, description="Smallest value that passes.")
    at_most: FiniteFloat | None = Field(None, description="Largest value that passes; for ece and brier.")
    of: Literal["value", "interval"] = Field(
        "value", description="What has to keep the bound: the value, or the whole 95% interval (its worse end)."
    )

    @model_validator(mode="after")
    def _one_bound(self) -> "Limit":
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError("say one of at_least and at_most")
        return self

    @property
    def bound(self) -> float:
        """Returns the number that the limit sets."""
        bound = self.at_most if self.at_least is None else self.at_least
        assert bound is not None
        return bound


def _expand_number(value: object) -> object:
    """Returns a bare number as the YAML of a lower limit."""
    return {"at_least": value} if isinstance(value, int | float) and not isinstance(value, bool) else value


Bound = Annotated[Limit, BeforeValidator(_expand_number)]


class BinarySlices(YamlModel):
    """Limits of the binary model on slices: every value of a column has to keep them by itself."""

    magnification: dict[BinarySliceMetric, Bound] = Field(
        default_factory=dict, description="Each of 40, 100, 200, 400."
    )
    source: dict[BinarySliceMetric, Bound] = Field(default_factory=dict, description="Each source of the dataset.")
    subtype: dict[Literal["accuracy"], Bound] = Field(default_factory=dict, description="Each of the eight subtypes.")


class SubtypeSlices(YamlModel):
    """Limits of the subtype model on slices. Its classes are the subtypes, so they are no slices."""

    magnification: dict[SubtypeSliceMetric, Bound] = Field(
        default_factory=dict, description="Each of 40, 100, 200, 400."
    )
    source: dict[SubtypeSliceMetric, Bound] = Field(default_factory=dict, description="Each source of the dataset.")


class Slices(YamlModel):
    """Limits on slices of the test side, for the model of each task."""

    binary: BinarySlices = BinarySlices()
    subtype: SubtypeSlices = SubtypeSlices()


class NonInferiorityRule(YamlModel):
    """How much worse than the champion a version may be: a test of non-inferiority, paired by case."""

    margin: float = Field(
        0.05, gt=0, lt=1, description="How much worse than the champion a version may be, in AUC and in macro-F1."
    )
    least_power: float = Field(
        0.5,
        ge=0,
        le=1,
        description="A comparison in which a version as good as the champion passes less often than this says too "
        "little; it is 'not estimable'.",
    )
    not_estimable: Literal["warn", "block"] = Field(
        "warn", description="What becomes of it then: the reviewer reads a warning, or the version is blocked."
    )

    champion_gone: Literal["block", "warn"] = Field(
        "block",
        exclude_if=lambda value: value == "block",  # the hashes of policies without it stay as they were
        description="What becomes of a version where the champion's run was deleted in MLflow and purged, so that "
        "nothing can be compared: it is blocked, or the reviewer reads a warning.",
    )


class Policy(YamlModel):
    """A promotion policy, as in its YAML file."""

    name: str
    description: str = ""
    binary: dict[BinaryMetric, Bound] = Field(
        default_factory=dict, description="Limits of the binary model, on the test side."
    )
    subtype: dict[SubtypeMetric, Bound] = Field(
        default_factory=dict, description="Limits of the subtype model, on the test side."
    )
    slices: Slices = Slices()
    zero_recall: Literal["block", "allow"] = Field(
        "block", description="What to do if a class with two test cases or more is never recognised."
    )
    absent_classes: Literal["block", "allow"] = Field(
        "block", description="What to do if a class has no test image: macro figures then say nothing about it."
    )
    require: tuple[RequiredEvidence, ...] = Field(REQUIRED_EVIDENCE, description="Evidence that has to be there.")
    comparison: NonInferiorityRule = NonInferiorityRule()
    approvals: int = Field(1, ge=1, le=3, description="How many different reviewers have to approve.")

    @model_validator(mode="after")
    def _check_limits(self) -> "Policy":
        for task in TASKS:
            for metric, limit in self.limits(task).items():
                _check_limit(task, metric, limit, (task, metric))
            for column, limits in self.slice_limits(task).items():
                for metric, limit in limits.items():
                    _check_limit(task, metric, limit, ("slices", task, column, metric))
        return self

    def limits(self, task: Task) -> dict[str, Limit]:
        """Returns metric -> limit on the whole test side, for the model of a task."""
        return dict(self.binary) if task == "binary" else dict(self.subtype)  # type: ignore[arg-type]

    def slice_limits(self, task: Task) -> dict[str, dict[str, Limit]]:
        """Returns column -> metric -> limit on slices, for the model of a task; only columns that have limits."""
        slices = self.slices.binary if task == "binary" else self.slices.subtype
        by_column = {column: dict(getattr(slices, column)) for column in slices.__class__.model_fields}
        return {column: limits for column, limits in by_column.items() if limits}


def _check_limit(task: Task, metric: str, limit: Limit, keys: tuple[str, ...]) -> None:
    """Raises KeyedError if a limit has the wrong direction, or if every model keeps it or none can."""
    name, bound = METRIC_NAMES[metric], limit.bound
    if metric in LOWER_IS_BETTER:
        if limit.at_most is None:
            raise KeyedError(keys, f"{metric} is best at 0: say {metric}: {{at_most: {bound:g}}}")
        # The Brier score of the subtype model adds up the errors of all eight probabilities.
        worst = 2 if task == "subtype" and metric.endswith("brier") else 1
        if not 0 < bound < worst:
            effect = "every model keeps" if bound > 0 else "no model keeps"
            raise KeyedError(keys, f"{effect} at_most: {bound:g}; {name} lies between 0 and {worst}: say one within")
        return
    if limit.at_least is None:
        raise KeyedError(keys, f"{metric} is best when it is high: say {metric}: {{at_least: {bound:g}}}")
    if not 0 < bound <= 1:
        # Matthews correlation goes down to -1, but a model that guesses has 0.
        effect = "no model keeps" if bound > 0 else "a model that has learnt nothing keeps"
        raise KeyedError(keys, f"{effect} at_least: {bound:g}; {name}: say more than 0, and at most 1")


def load_policy(reference: str, conf: Path, relative_to: Path | None = None) -> Policy:
    """Read a policy by name (looked up in ``conf``/policies) or by the path of its YAML file.

    Args:
        reference: the name or path.
        conf: the folder with ``policies``.
        relative_to: the folder that a relative path starts from.

    Raises:
        ConfigError: the policy is missing, empty or invalid, or called otherwise than its file.
    """
    file = find_yaml(conf / "policies", reference, relative_to)
    policy = read_yaml(file, Policy)
    if policy.name != file.stem:  # reviewers read the name
        raise ConfigError(f"{file}: 'name' is {quote_value(policy.name)}; call it {file.stem!r} or rename the file")
    return policy
