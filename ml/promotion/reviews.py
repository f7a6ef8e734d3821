"""What a review is: the question that Airflow puts to a reviewer, and what counts as an answer to it.

Asked by the Airflow plugin, read by the promotion, and answered by ``breakhis demo``.
"""

import re
from collections.abc import Mapping

from ml.core.store import Json, digest
from ml.core.taxonomy import SIDES, class_names
from ml.evaluation.metric_names import LOWER_IS_BETTER, METRIC_NAMES

PROMOTE, ROLLBACK, WITHDRAW = "promote", "rollback", "withdraw"
"""The DAGs in which something is decided."""

REVIEW_TASK = "review"
"""Where the question is asked, and asked first where several have to answer."""

MAX_APPROVALS = 3

APPROVE, REJECT = "Approve", "Reject"


def review_tasks(dag: str) -> tuple[str, ...]:
    """The tasks of a DAG that put the question, each to another person."""
    return (
        (REVIEW_TASK, *(f"{REVIEW_TASK}_{k}" for k in range(2, MAX_APPROVALS + 1)))
        if dag == PROMOTE
        else (REVIEW_TASK,)
    )


BUNDLE_PATTERN = r"bundle-[0-9a-f]{12}"
"""The pattern of a bundle's id."""

MIN_REASON_LENGTH = 3
"""Characters, less blanks around them."""


_JUDGED = re.compile(rf"judged as `({BUNDLE_PATTERN})`(?: \(SHA-256 `[0-9a-f]{{64}}`\))?\. Your answer is [^`]*\Z")


def parse_bundle_id(body: str | None) -> str | None:
    """The bundle that a review is about, by the last words of its body: what comes before them, others have said."""
    found = _JUDGED.search(body or "")
    return found[1] if found else None


def format_rollback_title(model: str, version: int, champion: int | None) -> str:
    """The headline of a rollback's review."""
    return f"Go back to {model} version {version}, in place of {f'version {champion}' if champion else 'none'}?"


def parse_reason(params: Mapping[str, object] | None) -> str:
    """The reason in an answer's parameters, which Airflow does not check; empty if there is none worth the name."""
    reason = (params or {}).get("reason")
    stripped = reason.strip() if isinstance(reason, str) else ""
    return stripped if len(stripped) >= MIN_REASON_LENGTH else ""


def review_page_path(bundle: str) -> str:
    """Where the page of a bundle is served, below Airflow's own address."""
    return f"/breakhis/reviews/{bundle}/"


def format_review_title(evidence: Json) -> str:
    """The headline of a review."""
    return f"Promote {evidence['model']} version {evidence['version']} to champion?"


def format_rollback_body(
    version: Json, evidence_id: str, champion: Json | None, reason: str, bundles: Mapping[int, str]
) -> str:
    """What a reviewer reads before confirming a rollback, as Markdown.

    Args:
        version: evidence of the former champion.
        evidence_id: its hash.
        champion: evidence of the version that is champion now, or None.
        reason: why somebody asks for it.
        bundles: version -> the bundle that it was approved on, where that is known.
    """
    now = champion["metrics"] if champion else {}
    title = f"version {champion['version']}" if champion else "none"
    lines = [
        f"**{version['model']} version {version['version']}** was champion once and would be again, at once. "
        f"The champion now: {title}.",
        "",
        f"Asked for because: {reason}",
        "",
        "| metric, test | former champion | champion now |",
        "|---|---|---|",
        *(
            f"| {METRIC_NAMES.get(name, name)}{' of patients' if name.startswith('patient_') else ''} | {value:.4f} "
            f"| {f'{now[name]:.4f}' if name in now else ''} |"
            for name, value in version["metrics"].items()
        ),
        "",
    ]
    shown = [one["version"] for one in (version, champion) if one and one["version"] in bundles]
    if shown:
        links = [f"- [What version {number} was approved on]({review_page_path(bundles[number])})" for number in shown]
        lines += ["### Look closer", "", *links, ""]
    judged = f", judged as `{bundles[version['version']]}`" if version["version"] in bundles else ""
    lines += [
        f"Evidence `{evidence_id}`{judged}. Your answer is recorded with your name and reason.",
    ]
    return "\n".join(lines)


def format_review_body(bundle: Json, bundle_id: str, links: Mapping[str, str]) -> str:
    """What a reviewer reads before deciding, as Markdown.

    Args:
        bundle: the evidence bundle that :func:`ml.promotion.evidence.judge` made.
        bundle_id: its hash.
        links: text -> address.
    """
    evidence, champion = bundle["evidence"], bundle["champion"]
    old = champion["metrics"] if champion else {}
    lines = [
        f"**{evidence['model']} version {evidence['version']}** would become champion"
        + (f" in place of version {champion['version']}." if champion else "; there is no champion yet."),
        "",
    ]
    if evidence["weights"]["kind"] == "random":
        lines += ["> **Random backbone weights.** This model is for trying the workflow, not for any use.", ""]
    lines += [*_worse(bundle), *_warnings(bundle)]
    lines += ["### Gates", "", "| gate | value | limit | inside by | |", "|---|---|---|---|---|"]
    for gate in bundle["gates"]:
        value, limit, distance = (
            "" if gate[key] is None else f"{gate[key]:{form}}"
            for key, form in (("value", ".4f"), ("limit", "g"), ("distance", "+.4f"))
        )
        lines.append(f"| {gate['name']} | {value} | {limit} | {distance} | {_outcome(gate)} |")
    lines += ["", f"Policy: {bundle['policy']} (`{bundle['policy_hash']}`)", "", *_comparison(bundle)]
    lines += ["### Data", ""]
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
            told = f"{ends[0]:.4f} to {ends[1]:.4f}" if ends else ""
            interval = "; ".join(filter(None, (told, evidence.get("interval_notes", {}).get(metric))))
            before = f"{old[metric]:.4f}" if metric in old else ""
            change = f"{value - old[metric]:+.4f}" if metric in old else ""
            lines.append(f"| {METRIC_NAMES.get(metric, metric)} | {value:.4f} | {interval} | {before} | {change} |")
        lines.append("")
    lines += [
        "| class | cases recognised | recall | precision | F1 | test images |",
        "|---|---|---|---|---|---|",
        *(
            f"| {name} | {_cases(c)} | {c['recall']:.3f} | {c['precision']:.3f} | {c['f1']:.3f} | {c['support']:.0f} |"
            for name, c in ((name, evidence["per_class"][name]) for name in class_names(evidence["task"]))
        ),
        "",
    ]
    links = {
        "Review page: candidate and champion side by side, with pictures": review_page_path(bundle_id),
        "The candidate's whole report": f"{review_page_path(bundle_id)}candidate/report.html",
        **links,
    }
    lines += ["### Look closer", "", *(f"- [{text}]({address})" for text, address in links.items()), ""]
    lines += [
        f"Evidence `{bundle['evidence_id']}`, judged as `{bundle_id}` (SHA-256 `{digest(bundle)}`). Your answer is "
        "recorded with your name and reason, and holds for exactly this.",
    ]
    return "\n".join(lines)


def _outcome(gate: Json) -> str:
    if not gate["passed"]:
        return "FAILED"
    return "warning" if gate["warning"] else "passed"


def _warnings(bundle: Json) -> list[str]:
    return [line for warning in bundle["warnings"] for line in (f"> **Warning.** {warning}", "")]


def list_regressions(evidence: Json, champion: Json | None) -> list[tuple[str, str, float, float]]:
    """What is worse than the champion's: (metric, the class it is of or "", before, now).

    All metrics of images and patients, and the recall of each class.
    """
    if not champion:
        return []
    pairs = [(name, "", champion["metrics"].get(name), value) for name, value in evidence["metrics"].items()]
    pairs += [
        ("recall", name, champion["per_class"].get(name, told).get("recall"), told["recall"])
        for name, told in evidence["per_class"].items()
    ]
    return [
        (name, of, before, now)
        for name, of, before, now in pairs
        if before is not None and name != "threshold" and now != before and (now > before) == (name in LOWER_IS_BETTER)
    ]


def _worse(bundle: Json) -> list[str]:
    if not bundle["champion"]:
        return []
    worse = []
    for name, of_class, before, now in list_regressions(bundle["evidence"], bundle["champion"]):
        of_whom = " of patients" if name.startswith("patient_") else ""
        what = f"recall of {of_class}" if of_class else f"{METRIC_NAMES.get(name, name)}{of_whom}"
        digits = 3 if of_class else 4
        worse.append(f"{what} {before:.{digits}f} → {now:.{digits}f}")
    return ["### What got worse", "", *(f"- {line}" for line in worse or ["Nothing that was measured."]), ""]


def _comparison(bundle: Json) -> list[str]:
    told = bundle["comparison"]
    if not told or not told["pairs"]:
        return []
    lines = [
        f"### Beside the champion, version {told['version']}",
        "",
        "On the same images, paired by case. *At least* is the lower end of the difference; a version that is worse by "
        "the margin passes in the share of draws under *size*, one as good as the champion in that under *power*.",
        "",
        "| metric | images (cases) | champion | candidate | difference | at least | size | power |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in told["pairs"]:
        name = f"{METRIC_NAMES[one['metric']]}, {one['where']}"
        if one["difference"] is None:
            lines.append(f"| {name} | {one['images']} ({one['cases']}) | | | not estimable | | | |")
            continue
        lines.append(
            f"| {name} | {one['images']} ({one['cases']}) | {one['champion']:.4f} | {one['candidate']:.4f} "
            f"| {one['difference']:+.4f} | {one['low']:+.4f} | {one['size']:.1%} | {one['power']:.0%} |"
        )
    return [*lines, ""]


def _cases(of_class: Json) -> str:
    return f"{of_class['recognised']} of {of_class['cases']}" if "cases" in of_class else ""
