"""Gates: the checks of a model version's evidence against a promotion policy.

Whatever is missing blocks: the policy, a required limit, or a metric or slice of the evidence; so does a value that is
no number. Everything here is a pure function of policy and evidence.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, TypeGuard

from ml.core.errors import ConfigError
from ml.core.hashes import digest
from ml.core.store import Json
from ml.core.taxonomy import MAGNIFICATIONS, SUBTYPES, Task, class_names
from ml.evaluation.draws import MIN_DRAWS
from ml.evaluation.metric_names import GATED_METRICS, METRIC_NAMES
from ml.promotion.policies import Limit, Policy, RequiredEvidence
from ml.registry.sandbox import ISOLATION_TEXTS, WEAK_ISOLATION

PASSED, UNTOLD, FAILED = "passed", "could not be told", "failed"
"""Outcomes of a gate. One that could not be told lets a version through: it is for the reviewer to judge."""

_ISOLATION = "isolation of the"
"""The name's beginning of the one gate that can be told and has a warning all the same."""


def judge_evidence(evidence: Json, policy: Policy | ConfigError, comparison: Json | None = None) -> Json:
    """Check evidence against a policy. A policy that could not be read blocks with its error.

    Args:
        evidence: evidence of the version.
        policy: policy of its training set, or the error from reading it.
        comparison: result of :func:`ml.promotion.champion_comparison.compare_with_champion`; None without a champion.

    Returns:
        ``{passed, gates, warnings, summary, policy, policy_hash, approvals}``. A gate has ``name``, ``metric``,
        ``value``, ``limit``, ``distance`` (how far inside the limit; negative is beyond it), ``passed``, ``reason`` and
        ``warning``; see :func:`find_outcome`.
    """
    if isinstance(policy, ConfigError):
        gates = [_make_gate("policy", passed=False, reason=f"no usable policy: {policy}")]
        name, policy_hash, approvals = None, None, 1
    else:
        gates = [
            *_judge_limits(evidence, policy),
            *_judge_slices(evidence, policy),
            *_judge_classes(evidence, policy),
            *_judge_required_evidence(evidence, policy),
            *_judge_comparison(comparison, policy),
        ]
        name, policy_hash, approvals = policy.name, digest(policy.model_dump(mode="json")), policy.approvals
    failing = [gate for gate in gates if not gate["passed"]]
    model = f"{evidence['model']} version {evidence['version']}"
    if failing:
        summary = f"{model} is blocked by {len(failing)} of {len(gates)} gates: " + "; ".join(
            gate["reason"] for gate in failing
        )
    else:
        untold = sum(find_outcome(gate) == UNTOLD for gate in gates)
        told = f"passed {len(gates) - untold} gates; {untold} could not be told"
        summary = f"{model} {told if untold else f'passed all {len(gates)} gates'}"
    return {
        "passed": not failing,
        "gates": gates,
        "warnings": [gate["warning"] for gate in gates if gate["warning"]],
        "summary": summary,
        "policy": name,
        "policy_hash": policy_hash,
        "approvals": approvals,
    }


def count_outcomes(gates: Sequence[Json]) -> str:
    """Returns in words how many gates passed, could not be told and failed."""
    outcomes = [find_outcome(gate) for gate in gates]
    return ", ".join(f"{outcomes.count(outcome)} {outcome}" for outcome in (PASSED, UNTOLD, FAILED))


def find_outcome(gate: Json) -> str:
    """Returns ``PASSED``, ``UNTOLD`` or ``FAILED``."""
    if not gate["passed"]:
        return FAILED
    return UNTOLD if gate["warning"] and not gate["name"].startswith(_ISOLATION) else PASSED


def _judge_limits(evidence: Json, policy: Policy) -> Iterator[Json]:
    """Yields a gate for each limit on a metric of the whole test side, and one for each limit that the policy lacks."""
    task: Task = evidence["task"]
    limits = policy.limits(task)
    for metric in GATED_METRICS[task]:
        if metric not in limits:
            reason = f"policy {policy.name!r} sets no {task} limit for {metric}"
            yield _make_gate(f"a limit for {metric}", passed=False, reason=reason)
    for metric, limit in limits.items():
        of_whom = " of patients" if metric.startswith("patient_") else ""
        yield _judge_limit(METRIC_NAMES[metric] + of_whom, metric, limit, evidence, evidence.get("draws"))


def _judge_slices(evidence: Json, policy: Policy) -> Iterator[Json]:
    """Yields a gate for each limit on a metric of a slice of the test side."""
    for column, limits in policy.slice_limits(evidence["task"]).items():
        slices = evidence.get("slices", {}).get(column, {})
        for value in _list_required_values(column, evidence):
            for metric, limit in limits.items():
                title = f"{value}X" if column == "magnification" else value
                name = f"{METRIC_NAMES[metric]} of {column} {title}"
                if value in slices:
                    yield _judge_limit(name, metric, limit, slices[value], evidence.get("draws"))
                else:
                    yield _make_gate(name, passed=False, metric=metric, reason=f"{name}: no test image")


def _judge_classes(evidence: Json, policy: Policy) -> Iterator[Json]:
    """Yields the gates on classes that are never recognised or have no test image."""
    if policy.zero_recall == "block":
        # Older evidence does not count a class's cases; it is then taken to have several.
        by_class = {name: evidence["per_class"].get(name, {}) for name in class_names(evidence["task"])}
        never = [
            f"{name} ({scores.get('cases', 'unknown')} cases)"
            for name, scores in by_class.items()
            if not _is_number(scores.get("cases", 2)) or (scores.get("cases", 2) > 1 and not _is_recognised(scores))
        ]
        reason = f"never recognised: {', '.join(never)}" if never else ""
        yield _make_gate("every class recognised at least once", passed=not never, reason=reason)
    if policy.absent_classes == "block":
        absent = evidence["absent_classes"]
        reason = f"no test image of {', '.join(absent)}" if absent else ""
        yield _make_gate("every class in the test side", passed=not absent, reason=reason)


def _judge_required_evidence(evidence: Json, policy: Policy) -> Iterator[Json]:
    """Yields a gate for each piece of evidence that the policy requires, and the one on the split."""
    for required in policy.require:
        reason = _explain_missing(required, evidence)
        yield _make_gate(_EVIDENCE_GATE_NAMES[required], passed=not reason, reason=reason)
    # Evidence from before a split could be by slide does not name its group: it was by case.
    group = evidence.get("split_group", "case")
    reason = f"the split is by {group}; only a split by case can lead to promotion" if group != "case" else ""
    yield _make_gate("split by case", passed=group == "case", reason=reason)


PRETRAINED = frozenset({"imagenet", "file"})
"""Kinds of backbone weights that are pretrained, not random; see :class:`ml.training.backbone_weights.Weights`."""

_EVIDENCE_GATE_NAMES: dict[RequiredEvidence, str] = {
    "report": "report",
    "model_card": "model card",
    "validated_dataset": "validated dataset",
    "pretrained_weights": "pretrained weights",
}


def _explain_missing(required: RequiredEvidence, evidence: Json) -> str:
    """Returns why a required piece of evidence is missing or does not count; empty if it counts."""
    if required == "pretrained_weights":
        kind = evidence["weights"]["kind"]
        return "" if kind in PRETRAINED else f"backbone weights are {kind}; the policy asks for pretrained ones"
    if required == "validated_dataset":
        passed = evidence.get("validated", {})
        unproven = [name for name in evidence["sources"] if passed.get(name) is not True]
        return f"not shown to have passed validation: {', '.join(unproven)}" if unproven else ""
    file = {"report": "report.html", "model_card": "model_card.md"}[required]
    return "" if f"evaluation/{file}" in evidence.get("artifacts", {}) else f"the run has no evaluation/{file}"


def _list_required_values(column: str, evidence: Json) -> list[str]:
    """Returns the values of a column that the test side must have."""
    if column == "magnification":
        return [str(value) for value in MAGNIFICATIONS]
    return list(SUBTYPES) if column == "subtype" else sorted(evidence["sources"])


def _judge_limit(name: str, metric: str, limit: Limit, scores: Json, draws: int | None) -> Json:
    """Check a metric, or the worse end of its interval, against a limit.

    Args:
        name: name of the gate.
        metric: key of the metric.
        limit: the limit.
        scores: evidence or one of its slices, with ``metrics`` and, where there are any, ``intervals``.
        draws: of how many draws the intervals are, which a run chooses for itself; None where the evidence is of an
            earlier release, which did not record it.
    """
    is_lower_limit, note = limit.at_least is not None, ""
    value = scores["metrics"].get(metric)
    if limit.of == "interval":
        ends = scores.get("intervals", {}).get(metric)
        name = f"{name}, {'lower' if is_lower_limit else 'upper'} end of its 95% interval"
        value = ends[0 if is_lower_limit else 1] if ends else None
        note = scores.get("interval_notes", {}).get(metric, "")
        if draws is None or draws < MIN_DRAWS:
            value = None
            note = f"an interval of {'unknown' if draws is None else draws} draws; {MIN_DRAWS} tell it, at least"
    if not _is_number(value):
        reason = f"{name} could not be computed" + (f" ({note})" if note else "")
        return _make_gate(name, passed=False, metric=metric, limit=limit.bound, reason=reason)
    distance = value - limit.bound if is_lower_limit else limit.bound - value
    passed = distance >= 0
    beyond = "short of" if is_lower_limit else "above"
    reason = "" if passed else f"{name} {value:.4f} is {-distance:.4f} {beyond} {limit.bound:g}"
    return _make_gate(
        name, passed=passed, metric=metric, value=value, limit=limit.bound, distance=distance, reason=reason
    )


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_recognised(class_scores: Json) -> bool:
    recall = class_scores.get("recall")
    return _is_number(recall) and recall > 0


def _judge_comparison(comparison: Json | None, policy: Policy) -> Iterator[Json]:
    """Yields a gate for each compared metric: the difference's lower end must be above minus the margin.

    Candidate and champion that cannot be compared, or a difference that cannot be estimated, are a warning, unless the
    policy blocks the latter. So is a champion whose logged code ran with little or no isolation. A champion whose run
    is gone blocks, unless the policy only warns.
    """
    if comparison is None:
        return
    champion = f"champion (version {comparison['version']})"
    if not comparison["comparable"]:
        blocks = comparison.get("gone", False) and policy.comparison.champion_gone == "block"
        reason, warning = (comparison["reason"], "") if blocks else ("", comparison["reason"])
        yield _make_gate(f"not worse than the {champion}", passed=not blocks, reason=reason, warning=warning)
        return
    isolation = comparison.get("isolation")  # missing where no logged code had to run
    if isolation in WEAK_ISOLATION:
        warning = (
            f"to classify images that came after it, the {champion} ran its logged code {ISOLATION_TEXTS[isolation]}"
        )
        yield _make_gate(f"{_ISOLATION} {champion}", passed=True, warning=warning)
    for pair in comparison["pairs"]:
        name = f"{METRIC_NAMES[pair['metric']]} {pair['where']}, not worse than the {champion}"
        figures = {"metric": pair["metric"], "value": pair["low"], "limit": -policy.comparison.margin}
        if not pair["estimable"]:
            blocks = policy.comparison.not_estimable == "block"
            text = f"{name}: not estimable: {pair['reason']}"
            reason, warning = (text, "") if blocks else ("", text)
            yield _make_gate(name, passed=not blocks, reason=reason, warning=warning, **figures)
            continue
        distance = pair["low"] + policy.comparison.margin
        passed = distance > 0
        reason = (
            ""
            if passed
            else f"{name}: the difference is {pair['difference']:+.4f} and may be as low as {pair['low']:+.4f}, which "
            f"is {-distance:.4f} beyond the margin of {policy.comparison.margin:g}"
        )
        yield _make_gate(name, passed=passed, distance=distance, reason=reason, **figures)


def _make_gate(name: str, *, passed: bool, reason: str = "", warning: str = "", **figures: Any) -> Json:
    return {"name": name, "metric": None, "value": None, "limit": None, "distance": None, **figures} | {
        "passed": passed,
        "reason": reason,
        "warning": warning,
    }
