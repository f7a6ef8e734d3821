"""The verdict: what matters clinically of a bundle, in four lines of plain words and one list of warnings.

The review page and Airflow's form show the same words. Patients come before images, and missed cancers before all else.
"""

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from ml.core.store import Json
from ml.core.taxonomy import LABELS, SUBTYPE_NAMES, SUBTYPES, class_names, label_of
from ml.evaluation.metric_names import CLINICAL_ORDER, METRIC_NAMES, is_worse
from ml.promotion.gates import count_outcomes
from ml.promotion.policies import NonInferiorityRule

_MAX_WORSE = 3  # regressions that the warnings name

_DECISIVE_METRICS = {
    "binary": ("patient_recall", "patient_specificity"),
    "subtype": ("patient_balanced_accuracy", "patient_macro_f1"),
}
"""Metrics whose intervals say how sure one can be of a model."""


class Line(NamedTuple):
    """A line of the verdict."""

    title: str
    text: str
    is_worse: bool = False
    """Whether it tells that the candidate does worse than the champion, or that a class is lost."""


class Regression(NamedTuple):
    """A figure that is worse than the champion's."""

    metric: str
    of_class: str
    """The class, of a class's recall; else empty."""
    before: float
    now: float
    is_beyond_margin: bool


class Verdict(NamedTuple):
    """What a reviewer reads first."""

    lines: tuple[Line, ...]
    warnings: tuple[str, ...]
    """The worst first."""


class _Errors(NamedTuple):
    """How many of a kind were called otherwise."""

    wrong: int
    of: int


def give_verdict(bundle: Json) -> Verdict:
    """Returns the verdict on a bundle.

    Args:
        bundle: as :func:`ml.promotion.judging.judge_version` makes it. Earlier releases recorded less of a version; the
            lines then say what was not recorded.
    """
    evidence, champion = bundle["evidence"], bundle["champion"]
    lines = (
        *describe_errors(evidence, champion),
        describe_lost_classes(evidence, champion),
        _describe_certainty(evidence, bundle["comparison"]),
        Line("Gates", f"{count_outcomes(bundle['gates'])}."),
    )
    return Verdict(lines, tuple(_list_warnings(bundle)))


def rank_clinically(metric: str, of_class: str = "") -> tuple[int, str]:
    """Returns a key that sorts figures by clinical weight: recall of malignant first, then patients, then images."""
    known = len(CLINICAL_ORDER)
    if of_class:
        is_malignant = of_class == LABELS[1] or (of_class in SUBTYPES and label_of(of_class) == LABELS[1])
        return (known if is_malignant else known + 1, of_class)
    return (CLINICAL_ORDER.index(metric) if metric in CLINICAL_ORDER else known + 2, metric)


def list_regressions(evidence: Json, champion: Json | None, margin: float) -> list[Regression]:
    """Returns what is worse than the champion's, by clinical weight; what is worse by more than the margin comes first.

    Compares all metrics of images and patients, and the recall of each class. Of the binary model the latter are the
    metrics recall and specificity, which are not told twice.

    Args:
        evidence: of the candidate.
        champion: evidence of the champion, or None.
        margin: how much worse counts as no worse.
    """
    if not champion:
        return []
    pairs = [(name, "", champion["metrics"].get(name), value) for name, value in evidence["metrics"].items()]
    told = {"recall", "specificity"} <= evidence["metrics"].keys() if evidence["task"] == "binary" else False
    pairs += [
        ("recall", name, champion["per_class"].get(name, scores).get("recall"), scores["recall"])
        for name, scores in evidence["per_class"].items()
        if not told
    ]
    worse = [
        Regression(name, of_class, before, now, abs(now - before) > margin)
        for name, of_class, before, now in pairs
        if before is not None and is_worse(name, before, now)
    ]
    return sorted(worse, key=lambda one: (not one.is_beyond_margin, rank_clinically(one.metric, one.of_class)))


def find_margin(bundle: Json) -> float:
    """Returns how much worse than the champion counts as no worse, by the bundle's policy."""
    policy = bundle.get("policy_content") or {}
    comparison = policy.get("comparison")
    return float(comparison["margin"]) if comparison else NonInferiorityRule().margin


def name_figure(metric: str, of_class: str = "") -> str:
    """Returns the display name of a metric, or of the recall of a class."""
    if of_class:
        return f"recall of {name_class(of_class)}"
    of_whom = " of patients" if metric.startswith("patient_") else ""
    return METRIC_NAMES.get(metric, metric).partition(":")[0] + of_whom


def name_class(name: str) -> str:
    """Returns a class's name in words: ``LC lobular carcinoma``."""
    return f"{name} {SUBTYPE_NAMES[name].replace('_', ' ')}" if name in SUBTYPE_NAMES else name


def describe_errors(evidence: Json, champion: Json | None) -> tuple[Line, ...]:
    """Returns the lines on missed cancers and false alarms, of patients and of images, beside the champion's."""
    own, other = _count_errors(evidence), _count_errors(champion) if champion else None
    lines = []
    for label, title in ((LABELS[1], "Cancers missed"), (LABELS[0], "False alarms")):
        if own is None:
            lines.append(Line(title, "not recorded of this version, which an earlier release registered."))
            continue
        parts, is_worse = [], False
        for unit in ("patients", "images"):
            if (label, unit) not in own:
                continue
            now, before = own[label, unit], (other or {}).get((label, unit))
            parts.append(f"{now.wrong:,} of {now.of:,} {label} {unit}{_compare(now, before, champion)}")
            is_worse = is_worse or (unit == "patients" and before is not None and _share(now) > _share(before))
        lines.append(Line(title, "; ".join(parts) + ".", is_worse))
    return tuple(lines)


def _compare(now: _Errors, before: _Errors | None, champion: Json | None) -> str:
    if not champion:
        return ""
    if before is None:
        return " (champion: not recorded)"
    change = f", {now.wrong - before.wrong:+,}" if now.of == before.of else ""
    return f" (champion {before.wrong:,} of {before.of:,}{change})"


def _share(errors: _Errors) -> float:
    return errors.wrong / errors.of if errors.of else 0.0


def _count_errors(evidence: Json) -> dict[tuple[str, str], _Errors] | None:
    """Returns by true label and unit, patients or images, how many were called the other label; None if unknown.

    Of the subtype model, a malignant subtype that is taken for another malignant one is no missed cancer.
    """
    names, errors = class_names(evidence["task"]), {}
    if confusions := evidence.get("confusions"):
        labels = [name if name in LABELS else label_of(name) for name in names]
        for unit, matrix in (("patients", confusions["cases"]), ("images", confusions["images"])):
            for label in LABELS:
                rows = [matrix[k] for k in range(len(names)) if labels[k] == label]
                wrong = sum(row[k] for row in rows for k in range(len(names)) if labels[k] != label)
                errors[label, unit] = _Errors(int(wrong), int(sum(map(sum, rows))))
        return errors
    if evidence["task"] != "binary":
        return None
    for label in LABELS:
        scores = evidence["per_class"][label]
        if "cases" in scores and scores["cases"] is not None:
            errors[label, "patients"] = _Errors(scores["cases"] - scores["recognised"], scores["cases"])
        support = round(scores["support"])
        errors[label, "images"] = _Errors(support - round(scores["recall"] * support), support)
    return errors


def describe_lost_classes(evidence: Json, champion: Json | None) -> Line:
    """Returns the line on subtypes of which no case was recognised, and on those without a test image."""
    title = "Subtypes never recognised"
    scores, before = _score_subtypes(evidence), _score_subtypes(champion) if champion else {}
    known = {name: one for name, one in scores.items() if one.get("cases")}
    if not known:
        return Line(title, "not recorded of this version, which an earlier release registered.")
    lost = [name for name, one in known.items() if not one["recognised"]]
    told = [f"{name_class(name)} ({_count_cases(known[name], before.get(name))})" for name in lost]
    absent = [name_class(name) for name in SUBTYPES if name not in known]
    text = ", ".join(told) if told else f"none of the {len(known)} on the test side"
    if absent:
        text += f". Not measured, as no test patient has it: {', '.join(absent)}"
    return Line(title, f"{text}.", any((before.get(name) or {}).get("recognised") for name in lost))


def _score_subtypes(evidence: Json) -> Mapping[str, Json]:
    of: Mapping[str, Json] = (
        evidence["per_class"] if evidence["task"] == "subtype" else evidence.get("slices", {}).get("subtype", {})
    )
    return {name: of[name] for name in SUBTYPES if name in of}


def _count_cases(now: Json, before: Json | None) -> str:
    count = f"{now['cases']} case{'s' if now['cases'] != 1 else ''}"
    if before and before.get("recognised"):
        return f"{count}; the champion recognised {before['recognised']} of {before['cases']}"
    return count


def _describe_certainty(evidence: Json, comparison: Json | None) -> Line:
    """Returns the line on the widest interval that matters, and on the power of the comparison."""
    intervals = evidence.get("intervals", {})
    metrics = [name for name in _DECISIVE_METRICS[evidence["task"]] if name in evidence["metrics"]]
    widths = {name: intervals[name][1] - intervals[name][0] for name in metrics if name in intervals}
    without = [name for name in metrics if name not in intervals]
    parts = []
    if widths:
        widest = max(widths, key=lambda name: widths[name])
        low, high = intervals[widest]
        parts.append(
            f"{name_figure(widest)} is {evidence['metrics'][widest]:.2f}, and with other patients could have been "
            f"anything from {low:.2f} to {high:.2f}"
        )
    if without:
        parts.append(f"no interval tells how sure {_join(map(name_figure, without))} is")
    parts.append(_describe_power(comparison))
    return Line("How sure", f"{'; '.join(parts)}.")


def _join(names: Iterator[str]) -> str:
    return " or ".join(names)


def _describe_power(comparison: Json | None) -> str:
    if comparison is None:
        return "there is no champion to compare with"
    pairs = comparison["pairs"]
    powers = [pair["power"] for pair in pairs if pair["power"] is not None and math.isfinite(pair["power"])]
    if not powers:
        return "nothing could be compared with the champion"
    untold = sum(pair["difference"] is None or not pair.get("estimable", True) for pair in pairs)
    told = f", and {untold} of {len(pairs)} comparisons could not be told" if untold else ""
    return (
        f"a version exactly as good as the champion would pass the weakest comparison in {min(powers):.0%} of "
        f"cases{told}"
    )


def _list_warnings(bundle: Json) -> Iterator[str]:
    """Yields the warnings, the worst first."""
    evidence, margin = bundle["evidence"], find_margin(bundle)
    worse = [one for one in list_regressions(evidence, bundle["champion"], margin) if one.is_beyond_margin]
    for one in worse[:_MAX_WORSE]:
        yield (
            f"Worse than the champion by more than the margin of {margin:g}: {name_figure(one.metric, one.of_class)} "
            f"{one.before:.3f} → {one.now:.3f}"
        )
    if len(worse) > _MAX_WORSE:
        yield f"{len(worse) - _MAX_WORSE} further figures are worse by more than the margin, too"
    if evidence["weights"]["kind"] == "random":
        yield "Random backbone weights. This model is for trying the workflow, not for any use"
    if absent := evidence["absent_classes"]:
        yield f"Not measured, since no test image shows it: {', '.join(map(name_class, absent))}"
    yield from bundle["warnings"]
