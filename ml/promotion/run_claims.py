"""What a training run says of itself, in its tags and its metrics.json: types, bounds and names.

Anybody who may log to MLflow can write both. What goes on into the evidence, and from there to a reviewer, is a number
within its range, a name of a known list or pattern, or one of the notes that :mod:`ml.evaluation` writes. There is no
free text. Whether it is true is checked elsewhere.
"""

import json
from collections.abc import Mapping
from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from ml.core.errors import Refused
from ml.core.hashes import canonical
from ml.core.messages import quote_value
from ml.core.store import Json
from ml.core.taxonomy import SUBTYPES, Task, class_names
from ml.core.yaml_files import Name
from ml.evaluation.draws import MAX_DRAWS
from ml.evaluation.evaluation import SLICE_COLUMNS
from ml.evaluation.metric_names import METRIC_NAMES

_NOTE = r"(no interval: every draw of patients gives the same|exact interval of \d{1,7} of \d{1,7} cases)"
_CLASS_NOTE = rf"(one case: no interval|no case on this side|(recall|F1): {_NOTE})"
_DAG_RUN_LENGTH, _DAG_RUN_COUNT = 250, 100
_ROUNDING = 1e-9
_RANGES = {"mcc": (-1.0, 1.0), "brier": (0.0, 2.0)}
"""Ranges of metrics, those of patients included, that are not from 0 to 1."""

_Key = TypeVar("_Key", bound=str)


def _check_ranges(values: dict[str, float] | dict[str, list[float]]) -> dict[str, float] | dict[str, list[float]]:
    for name, value in values.items():
        lowest, highest = _RANGES.get(name.removeprefix("patient_"), (0.0, 1.0))
        for number in value if isinstance(value, list) else [value]:
            if not lowest - _ROUNDING <= number <= highest + _ROUNDING:
                raise ValueError(f"{name} is {number}; it lies between {lowest:g} and {highest:g}")
    return values


def _known_metric(name: str) -> str:
    if name not in METRIC_NAMES:
        raise ValueError("no such metric is known")
    return name


_Metric = Annotated[str, AfterValidator(_known_metric)]
_Number = Annotated[float, Field(allow_inf_nan=False)]
_Share = Annotated[float, Field(ge=-_ROUNDING, le=1 + _ROUNDING, allow_inf_nan=False)]
_Count = Annotated[int, Field(ge=0, le=10**9)]
_Ends = Annotated[list[_Number], Field(min_length=2, max_length=2)]
_Metrics = Annotated[dict[_Metric, _Number], AfterValidator(_check_ranges)]
_Intervals = Annotated[dict[_Metric, _Ends], AfterValidator(_check_ranges)]
_Notes = dict[_Metric, Annotated[str, StringConstraints(pattern=f"^{_NOTE}$")]]
_Sha256 = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]


class _Claims(BaseModel):
    """Fields of a JSON object. One with a default may be missing: whether all are there is checked elsewhere."""

    model_config = ConfigDict(extra="forbid", strict=True)


class _Slice(_Claims):
    images: _Count = 0
    cases: _Count = 0
    recognised: _Count = 0
    metrics: _Metrics = {}
    intervals: _Intervals = {}
    interval_notes: _Notes = {}


class _ClassScores(_Claims):
    precision: _Share = 0.0
    recall: _Share = 0.0
    f1: _Share = 0.0
    support: Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)] = 0.0
    cases: _Count = 0
    recognised: _Count = 0
    intervals: dict[Literal["recall", "f1"], Annotated[list[_Share], Field(min_length=2, max_length=2)]] = {}
    note: Annotated[str, StringConstraints(pattern=f"^({_CLASS_NOTE}(; {_CLASS_NOTE})?)?$")] = ""


class _Slices(_Claims):
    magnification: dict[Annotated[str, StringConstraints(pattern=r"^\d{1,5}$")], _Slice] = {}
    source: dict[Name, _Slice] = {}
    subtype: dict[Literal[SUBTYPES], _Slice] = {}  # type: ignore[valid-type]


class _Evaluation(_Claims):
    """The part of a metrics.json that goes into the evidence; earlier releases wrote less."""

    metrics: _Metrics
    intervals: _Intervals = {}
    interval_notes: _Notes = {}
    per_class: dict[str, _ClassScores]
    absent_classes: list[str]
    slices: _Slices = _Slices()
    draws: Annotated[int, Field(ge=0, le=MAX_DRAWS)] = 0


class _Tags(_Claims):
    set: Name
    task: Literal["binary", "subtype"]
    dataset: Annotated[str, StringConstraints(pattern="^dataset-[0-9a-f]{12}$")]
    split: Annotated[str, StringConstraints(pattern="^split-[0-9a-f]{12}$")]
    weights: Annotated[str, StringConstraints(pattern="^weights-[0-9a-f]{12}$")]
    weights_kind: Literal["imagenet", "file", "random"]
    ledger: Name
    preset: Name
    seed: Annotated[str, StringConstraints(pattern=r"^-?\d{1,20}$")]
    code_sha256: _Sha256 | None = None
    lock_sha256: _Sha256 | None = None


def check_tags(name: str, tags: Mapping[str, str]) -> None:
    """Check those of a run's tags that go into the evidence.

    Args:
        name: of the run or version, for the error.
        tags: all of the run's tags.

    Raises:
        Refused: a tag is missing, or is not of its kind.
    """
    prefix = "breakhis."
    content = {key: tags[prefix + key] for key in _Tags.model_fields if prefix + key in tags}
    try:
        _Tags.model_validate(content)
    except ValidationError as error:
        key, reason = _describe_first(error)
        raise Refused(f"{name}: the run's tag {prefix}{key} cannot be used: {reason}; train the model again") from None
    parse_dag_runs(name, tags)


def parse_dag_runs(name: str, tags: Mapping[str, str]) -> list[list[str]]:
    """Returns DAG and run of each training that contributed to the model.

    Raises:
        Refused: the tag does not hold pairs of names, or too many or too long ones.
    """
    text = tags.get("breakhis.dag_runs", "[]")
    try:
        pairs = json.loads(text)
        is_valid = (
            isinstance(pairs, list)
            and len(pairs) <= _DAG_RUN_COUNT
            and all(isinstance(pair, list) and len(pair) == 2 and all(map(_is_id, pair)) for pair in pairs)
        )
    except (ValueError, RecursionError):
        is_valid = False
    if not is_valid:
        raise Refused(f"{name}: its tag breakhis.dag_runs does not name runs: {quote_value(text)}")
    return [[dag, run] for dag, run in pairs]


def _is_id(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= _DAG_RUN_LENGTH and value.isprintable()


def check_evaluation(name: str, evaluation: object, task: Task) -> None:
    """Check the part of a run's metrics.json that goes into the evidence.

    Args:
        name: of the version, for the error.
        evaluation: the content of metrics.json.
        task: the task, which names the classes.

    Raises:
        Refused: a value is not of its kind or out of its range, a name is not known, or a class is missing.
    """
    where = f"{name}: its metrics.json"
    if not isinstance(evaluation, dict):
        raise Refused(f"{where} is not a JSON object")
    try:
        canonical(evaluation)
    except UnicodeEncodeError:
        raise Refused(f"{where} holds half a character, which is no text") from None
    except ValueError:
        raise Refused(f"{where} holds a value that is not a finite number (NaN or infinite)") from None
    classes = set(class_names(task))
    known = {"metrics": set(METRIC_NAMES), "intervals": set(METRIC_NAMES), "absent_classes": classes}
    for key, names in known.items():
        value = evaluation.get(key, ())
        if isinstance(value, dict | list) and (unknown := sorted(set(map(str, value)) - names)):
            raise Refused(f"{where} has unknown {key}: {quote_value(unknown[0], 80)}")
    per_class = evaluation.get("per_class", {})
    if isinstance(per_class, dict) and (missing := [one for one in class_names(task) if one not in per_class]):
        raise Refused(f"{where} lacks the classes {', '.join(missing)}")
    if isinstance(per_class, dict) and (unknown := sorted(set(per_class) - classes)):
        raise Refused(f"{where} has unknown per_class: {quote_value(unknown[0], 80)}")
    content: Json = {key: evaluation[key] for key in _Evaluation.model_fields if key in evaluation}
    try:
        claims = _Evaluation.model_validate(content)
    except ValidationError as error:
        key, reason = _describe_first(error)
        raise Refused(f"{where} cannot be used: {key}: {reason}; train the model again") from None
    if claims.slices.subtype and "subtype" not in SLICE_COLUMNS[task]:
        raise Refused(f"{where} cannot be used: slices.subtype: a {task} model has none; train the model again")


def _describe_first(error: ValidationError) -> tuple[str, str]:
    """Returns where the first fault lies and what it is, both short: they quote what was logged."""
    first = error.errors(include_url=False)[0]
    reason = first["msg"].removeprefix("Value error, ")
    if first["type"] == "string_pattern_mismatch":
        reason = f"{first['input'][:80]!a} is nothing that a training writes there"
    where = ".".join(ascii(part)[1:-1] if isinstance(part, str) else str(part) for part in first["loc"])
    return where[:120], reason[:300]
