"""Gates: a promotion policy, held against the evidence of a model version.

Whatever is missing blocks: no policy, an empty one, a metric or a slice that the evidence lacks or that is no number.
Everything here is a pure function of policy and evidence.
"""

import math
from collections.abc import Iterator
from typing import Any, TypeGuard

from ml.core.errors import ConfigError
from ml.core.store import Json, digest
from ml.core.taxonomy import MAGNIFICATIONS, SUBTYPES, Task, class_names
from ml.evaluation.metric_names import GATED_METRICS, METRIC_NAMES
from ml.promotion.policies import Limit, Policy, RequiredEvidence


def judge_evidence(evidence: Json, policy: Policy | ConfigError, comparison: Json | None = None) -> Json:
    """Hold evidence against a policy; a policy that could not be read blocks with its error.

    Args:
        evidence: of the version.
        policy: of its training set.
        comparison: of it and the champion (:func:`ml.evaluation.comparison.compare_models`); None without a champion.

    Returns:
        ``{passed, gates, warnings, summary, policy, policy_hash, approvals}``. A gate has ``name``, ``metric``,
        ``value``, ``limit``, ``distance`` (how far inside the limit; negative is beyond it), ``passed``, ``reason`` and
        ``warning``.
    """
    if isinstance(policy, ConfigError):
        gates = [_gate("policy", passed=False, reason=f"no usable policy: {policy}")]
        name, policy_hash, approvals = None, None, 1
    else:
        gates = [*_gates(evidence, policy), *_of_comparison(comparison, policy)]
        name, policy_hash, approvals = policy.name, digest(policy.model_dump(mode="json")), policy.approvals
    failing = [gate for gate in gates if not gate["passed"]]
    model = f"{evidence['model']} version {evidence['version']}"
    if failing:
        summary = f"{model} is blocked by {len(failing)} of {len(gates)} gates: " + "; ".join(
            gate["reason"] for gate in failing
        )
    else:
        summary = f"{model} passed all {len(gates)} gates"
    return {
        "passed": not failing,
        "gates": gates,
        "warnings": [gate["warning"] for gate in gates if gate["warning"]],
        "summary": summary,
        "policy": name,
        "policy_hash": policy_hash,
        "approvals": approvals,
    }


def _gates(evidence: Json, policy: Policy) -> Iterator[Json]:
    task: Task = evidence["task"]
    limits = policy.limits(task)
    for metric in GATED_METRICS[task]:
        if metric not in limits:
            why = f"policy {policy.name!r} sets no {task} limit for {metric}"
            yield _gate(f"a limit for {metric}", passed=False, reason=why)
    for metric, limit in limits.items():
        yield _limit(METRIC_NAMES[metric] + _of_whom(metric), metric, limit, evidence)
    for column, of_slice in policy.slice_limits(task).items():
        known = evidence.get("slices", {}).get(column, {})
        for value in _values(column, evidence):
            for metric, limit in of_slice.items():
                where = f"{value}X" if column == "magnification" else value
                name = f"{METRIC_NAMES[metric]} of {column} {where}"
                if value in known:
                    yield _limit(name, metric, limit, known[value])
                else:
                    yield _gate(name, passed=False, metric=metric, reason=f"{name}: no test image")
    if policy.zero_recall == "block":
        # Of how many cases is not told by evidence from before these were counted; then it counts as several.
        told_of = {name: evidence["per_class"].get(name, {}) for name in class_names(task)}
        never = [
            f"{name} ({told.get('cases', 'unknown')} cases)"
            for name, told in told_of.items()
            if not _is_number(told.get("cases", 2)) or (told.get("cases", 2) > 1 and not _is_above_zero(told))
        ]
        reason = f"never recognised: {', '.join(never)}" if never else ""
        yield _gate("every class recognised at least once", passed=not never, reason=reason)
    if policy.absent_classes == "block":
        absent = evidence["absent_classes"]
        reason = f"no test image of {', '.join(absent)}" if absent else ""
        yield _gate("every class in the test side", passed=not absent, reason=reason)
    for required in policy.require:
        reason = _missing(required, evidence)
        yield _gate(_EVIDENCE[required], passed=not reason, reason=reason)
    # Evidence from before a split could be by slide does not say so: it was by case.
    group = evidence.get("split_group", "case")
    reason = f"the split is by {group}; only a split by case can lead to promotion" if group != "case" else ""
    yield _gate("split by case", passed=group == "case", reason=reason)


PRETRAINED = frozenset({"imagenet", "file"})
"""Kinds of backbone weights that were learnt from something; see :class:`ml.training.networks.Weights`."""

_EVIDENCE: dict[RequiredEvidence, str] = {
    "report": "report",
    "model_card": "model card",
    "validated_dataset": "validated dataset",
    "pretrained_weights": "pretrained weights",
}


def _missing(required: RequiredEvidence, evidence: Json) -> str:
    """Why a required piece of evidence does not count, or nothing."""
    if required == "pretrained_weights":
        kind = evidence["weights"]["kind"]
        pretrained = kind in PRETRAINED
        return "" if pretrained else f"backbone weights are {kind}; the policy asks for pretrained ones"
    if required == "validated_dataset":
        passed = evidence.get("validated", {})
        bad = [name for name in evidence["sources"] if passed.get(name) is not True]
        return f"not shown to have passed validation: {', '.join(bad)}" if bad else ""
    file = {"report": "report.html", "model_card": "model_card.md"}[required]
    return "" if f"evaluation/{file}" in evidence.get("artifacts", {}) else f"the run has no evaluation/{file}"


def _values(column: str, evidence: Json) -> list[str]:
    """The values of a column that the test side must have."""
    if column == "magnification":
        return [str(value) for value in MAGNIFICATIONS]
    return list(SUBTYPES) if column == "subtype" else sorted(evidence["sources"])


def _limit(name: str, metric: str, limit: Limit, of: Json) -> Json:
    """Hold a metric, or the worse end of its interval, against a limit."""
    low, note = limit.at_least is not None, ""
    value = of["metrics"].get(metric)
    if limit.of == "interval":
        ends = of.get("intervals", {}).get(metric)
        name = f"{name}, {'lower' if low else 'upper'} end of its 95% interval"
        value = ends[0 if low else 1] if ends else None
        note = of.get("interval_notes", {}).get(metric, "")
    if not _is_number(value):
        reason = f"{name} could not be computed" + (f" ({note})" if note else "")
        return _gate(name, passed=False, metric=metric, limit=limit.bound, reason=reason)
    distance = value - limit.bound if low else limit.bound - value
    passed = distance >= 0
    beyond = "short of" if low else "above"
    reason = "" if passed else f"{name} {value:.4f} is {-distance:.4f} {beyond} {limit.bound:g}"
    return _gate(name, passed=passed, metric=metric, value=value, limit=limit.bound, distance=distance, reason=reason)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_above_zero(of_class: Json) -> bool:
    recall = of_class.get("recall")
    return _is_number(recall) and recall > 0


def _of_comparison(comparison: Json | None, policy: Policy) -> Iterator[Json]:
    if comparison is None:
        return
    champion = f"champion (version {comparison['version']})"
    if not comparison["comparable"]:
        yield _gate(f"not worse than the {champion}", passed=True, warning=comparison["reason"])
        return
    for one in comparison["pairs"]:
        name = f"{METRIC_NAMES[one['metric']]} {one['where']}, not worse than the {champion}"
        told = {"metric": one["metric"], "value": one["low"], "limit": -policy.comparison.margin}
        if not one["estimable"]:
            blocks = policy.comparison.not_estimable == "block"
            why = f"{name}: not estimable: {one['reason']}"
            yield _gate(name, passed=not blocks, reason=why if blocks else "", warning="" if blocks else why, **told)
            continue
        distance = one["low"] + policy.comparison.margin
        passed = distance > 0
        reason = (
            ""
            if passed
            else f"{name}: the difference is {one['difference']:+.4f} and may be as low as {one['low']:+.4f}, which is "
            f"{-distance:.4f} beyond the margin of {policy.comparison.margin:g}"
        )
        yield _gate(name, passed=passed, distance=distance, reason=reason, **told)


def _of_whom(metric: str) -> str:
    return " of patients" if metric.startswith("patient_") else ""


def _gate(name: str, *, passed: bool, reason: str = "", warning: str = "", **more: Any) -> Json:
    return {"name": name, "metric": None, "value": None, "limit": None, "distance": None, **more} | {
        "passed": passed,
        "reason": reason,
        "warning": warning,
    }
