"""Gates: a promotion policy, held against the evidence of a model version.

Whatever is missing blocks: no policy, an empty one, a metric that the evidence lacks or that is no number. Everything
here is a pure function of policy and evidence.
"""

import math
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, FiniteFloat

from ml.errors import ConfigError
from ml.store import Json, digest
from ml.taxonomy import SIDES, Task, classes
from ml.yamlfile import Declared, find, read_yaml

REQUIRED_FLOORS: dict[Task, tuple[str, str]] = {
    "binary": ("roc_auc", "macro_f1"),
    "subtype": ("roc_auc_ovr", "macro_f1"),
}
"""A policy without a floor for each of these blocks."""

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
]

METRIC_NAMES = {
    "accuracy": "accuracy",
    "roc_auc": "ROC AUC",
    "pr_auc": "PR AUC",
    "precision": "precision",
    "recall": "recall (sensitivity)",
    "specificity": "specificity",
    "f1": "F1",
    "micro_f1": "micro-F1",
    "macro_f1": "macro-F1",
    "roc_auc_ovr": "ROC AUC, one against the rest",
    "threshold": "threshold",
    "balanced_accuracy": "balanced accuracy",
    "weighted_f1": "weighted F1",
    "mcc": "Matthews correlation",
    "brier": "Brier score (0 is best)",
    "ece": "calibration error, ECE (0 is best)",
    "pr_auc_ovr": "PR AUC, one against the rest",
    "patient_accuracy": "accuracy",
    "patient_balanced_accuracy": "balanced accuracy",
    "patient_recall": "recall (sensitivity)",
    "patient_specificity": "specificity",
    "patient_macro_f1": "macro-F1",
    "patient_roc_auc": "ROC AUC",
    "patient_pr_auc": "PR AUC",
    "patient_roc_auc_ovr": "ROC AUC, one against the rest",
    "patient_recognition_rate": "recognition rate: mean share of a patient's images that are right",
}
"""What people call a metric; those of patients stand in tables of their own."""


class Policy(Declared):
    """One policy YAML: what a model version has to reach on the test side before a reviewer is asked."""

    name: str
    description: str = ""
    binary: dict[BinaryMetric, FiniteFloat] = Field(default_factory=dict, description="Smallest value of each metric.")
    subtype: dict[SubtypeMetric, FiniteFloat] = Field(
        default_factory=dict, description="Smallest value of each metric."
    )
    pretrained_weights: bool = Field(True, description="Whether the backbone's weights must be pretrained.")
    absent_classes: Literal["block", "allow"] = Field(
        "block", description="What to do if a class has no test image: macro figures then say nothing about it."
    )

    def floors(self, task: Task) -> dict[str, float]:
        """The floors of one task's model."""
        return dict(self.binary) if task == "binary" else dict(self.subtype)  # type: ignore[arg-type]


def load_policy(reference: str, conf: Path, relative_to: Path | None = None) -> Policy:
    """Read a policy by name (looked up in ``conf``/policies) or by the path of its YAML.

    Raises:
        ConfigError: missing, empty or invalid.
    """
    return read_yaml(find(conf / "policies", reference, relative_to), Policy)


def judge_evidence(evidence: Json, policy: Policy | ConfigError) -> Json:
    """Hold evidence against a policy; a policy that could not be read blocks with its error.

    Returns:
        ``{passed, gates, summary, policy, policy_hash}``. A gate has ``name``, ``metric``, ``value``, ``limit``,
        ``distance`` (value - limit; negative is short of it), ``passed`` and ``reason``.
    """
    if isinstance(policy, ConfigError):
        gates = [_gate("policy", passed=False, reason=f"no usable policy: {policy}")]
        name, policy_hash = None, None
    else:
        gates = _gates(evidence, policy)
        name, policy_hash = policy.name, digest(policy.model_dump())
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
        "summary": summary,
        "policy": name,
        "policy_hash": policy_hash,
    }


def _gates(evidence: Json, policy: Policy) -> list[Json]:
    task: Task = evidence["task"]
    floors = policy.floors(task)
    gates = [
        _gate(f"floor for {metric}", passed=False, reason=f"policy {policy.name!r} sets no {task} floor for {metric}")
        for metric in REQUIRED_FLOORS[task]
        if metric not in floors
    ]
    gates += [_floor(metric, limit, evidence["metrics"].get(metric)) for metric, limit in floors.items()]
    if policy.pretrained_weights:
        kind = evidence["weights"]["kind"]
        reason = f"backbone weights are {kind}; the policy asks for pretrained ones" if kind == "random" else ""
        gates.append(_gate("pretrained weights", passed=kind != "random", reason=reason))
    # Evidence from before a split could be by slide does not say so: it was by case.
    group = evidence.get("split_group", "case")
    reason = f"the split is by {group}; only a split by case can lead to promotion" if group != "case" else ""
    gates.append(_gate("split by case", passed=group == "case", reason=reason))
    absent = evidence["absent_classes"]
    if policy.absent_classes == "block":
        reason = f"no test image of {', '.join(absent)}" if absent else ""
        gates.append(_gate("every class in the test side", passed=not absent, reason=reason))
    return gates


def _floor(metric: str, limit: float, value: Any) -> Json:
    name = METRIC_NAMES[metric]
    if not isinstance(value, int | float) or not math.isfinite(value):
        return _gate(name, passed=False, metric=metric, limit=limit, reason=f"{name} could not be computed")
    distance = value - limit
    passed = distance >= 0
    reason = "" if passed else f"{name} {value:.4f} is {-distance:.4f} short of {limit:g}"
    return _gate(name, passed=passed, metric=metric, value=value, limit=limit, distance=distance, reason=reason)


def _gate(name: str, *, passed: bool, reason: str, **more: Any) -> Json:
    return {"name": name, "metric": None, "value": None, "limit": None, "distance": None, **more} | {
        "passed": passed,
        "reason": reason,
    }


def review_title(evidence: Json) -> str:
    """The headline of a review."""
    return f"Promote {evidence['model']} version {evidence['version']} to champion?"


def review_body(evidence: Json, verdict: Json, champion: Json | None, links: dict[str, str]) -> str:
    """What a reviewer reads before deciding, as Markdown.

    Args:
        evidence: of the candidate.
        verdict: what :func:`judge_evidence` said.
        champion: the evidence of the version that would be replaced, or None.
        links: text -> address.
    """
    old = champion["metrics"] if champion else {}
    lines = [
        f"**{evidence['model']} version {evidence['version']}** would become champion"
        + (f" in place of version {champion['version']}." if champion else "; there is no champion yet."),
        "",
    ]
    if evidence["weights"]["kind"] == "random":
        lines += ["> **Random backbone weights.** This model is for trying the workflow, not for any use.", ""]
    lines += ["### Gates", "", "| gate | value | at least | distance | |", "|---|---|---|---|---|"]
    for gate in verdict["gates"]:
        value, limit, distance = (
            "" if gate[key] is None else f"{gate[key]:{form}}"
            for key, form in (("value", ".4f"), ("limit", "g"), ("distance", "+.4f"))
        )
        lines.append(
            f"| {gate['name']} | {value} | {limit} | {distance} | {'passed' if gate['passed'] else 'FAILED'} |"
        )
    lines += ["", f"Policy: {verdict['policy']}", "", "### Data", ""]
    lines += ["| side | images | cases |", "|---|---|---|"]
    sides = ((side, evidence["sides"][side]) for side in SIDES)  # a stored object comes back in alphabetical order
    lines += [f"| {side} | {n['images']} | {n['cases']} |" for side, n in sides]
    sources = ", ".join(f"{name} ({version})" for name, version in evidence["sources"].items())
    split = f"{evidence['split']}, by {evidence.get('split_group', 'case')}"
    if "split_method" in evidence:
        split += f" with the method {evidence['split_method']}"
    lines += ["", f"Dataset {evidence['dataset']} of {sources}; {split}.", ""]
    if evidence["absent_classes"]:
        lines += [f"**Not measured, no test image:** {', '.join(evidence['absent_classes'])}.", ""]
    of_patients = {metric: metric.startswith("patient_") for metric in evidence["metrics"]}
    for title, which in (("### Test metrics, of images", False), ("### Test metrics, of patients", True)):
        shown = [metric for metric, patient in of_patients.items() if patient == which]
        if not shown:  # evidence from before patients were measured
            continue
        lines += [title, "", "| metric | candidate | 95% interval | champion | change |", "|---|---|---|---|---|"]
        for metric in shown:
            value, ends = evidence["metrics"][metric], evidence.get("intervals", {}).get(metric)
            interval = f"{ends[0]:.4f} to {ends[1]:.4f}" if ends else ""
            before = f"{old[metric]:.4f}" if metric in old else ""
            change = f"{value - old[metric]:+.4f}" if metric in old else ""
            lines.append(f"| {METRIC_NAMES.get(metric, metric)} | {value:.4f} | {interval} | {before} | {change} |")
        lines.append("")
    lines += [
        "| class | cases recognised | recall | precision | F1 | test images |",
        "|---|---|---|---|---|---|",
        *(
            f"| {name} | {_cases(c)} | {c['recall']:.3f} | {c['precision']:.3f} | {c['f1']:.3f} | {c['support']:.0f} |"
            for name, c in ((name, evidence["per_class"][name]) for name in classes(evidence["task"]))
        ),
        "",
    ]
    if links:
        lines += ["### Look closer", "", *(f"- [{text}]({address})" for text, address in links.items()), ""]
    lines += [
        f"Evidence `{evidence['id']}`. Your answer is recorded with your name and reason, and holds for exactly this "
        "evidence.",
    ]
    return "\n".join(lines)


def _cases(of_class: Json) -> str:
    return f"{of_class['recognised']} of {of_class['cases']}" if "cases" in of_class else ""
