"""What a reviewer is asked: title and text of each review, as Airflow's form shows them."""

from collections.abc import Iterable, Mapping

from ml.core.hashes import digest
from ml.core.markdown import escape_markdown, format_link
from ml.core.store import Json
from ml.core.taxonomy import SIDES, class_names
from ml.evaluation.metric_names import METRIC_NAMES
from ml.promotion.gates import FAILED, find_outcome
from ml.promotion.reviews import review_page_path
from ml.promotion.verdict import (
    Line,
    Verdict,
    describe_errors,
    describe_lost_classes,
    find_margin,
    give_verdict,
    list_regressions,
    name_figure,
    rank_clinically,
)

_MAX_REASON_LENGTH, _MAX_WARNING_LENGTH = 2_000, 1_000
"""In characters, of what is shown of each to a reviewer; the audit log keeps a reason as a whole."""


def format_rollback_title(model: str, version: int, champion: int | None) -> str:
    """Returns the title of a rollback's review; ``champion`` is the version that it would replace, or None."""
    return f"Go back to {model} version {version}, in place of {f'version {champion}' if champion else 'none'}?"


def format_review_title(evidence: Json) -> str:
    """Returns the title of a promotion's review."""
    return f"Promote {evidence['model']} version {evidence['version']} to champion?"


def format_rollback_body(
    version: Json,
    evidence_id: str,
    champion: Json | None,
    reason: str,
    bundles: Mapping[int, str],
    withdrawal: Json | None = None,
) -> str:
    """Returns what a reviewer reads before confirming a rollback, as Markdown.

    Args:
        version: evidence of the former champion.
        evidence_id: id of that evidence.
        champion: evidence of the version that is champion now, or None.
        reason: why the rollback is asked for.
        bundles: version -> id of the bundle that it was approved on, where that is known.
        withdrawal: audit record of the version's withdrawal, or None.
    """
    withdrawn = withdrawal and (
        f"> **Withdrawn.** {escape_markdown(withdrawal['by'])} withdrew this version on {withdrawal['at'][:10]}: "
        f"{escape_markdown(withdrawal['reason'], limit=_MAX_REASON_LENGTH)}. Whoever asks to go back to it knew that."
    )
    champion_metrics = champion["metrics"] if champion else {}
    title = f"version {champion['version']}" if champion else "none"
    lines = [
        f"**{escape_markdown(version['model'])} version {version['version']}** was champion once and would be again, "
        f"at once. The champion now: {title}.",
        "",
        *([withdrawn, ""] if withdrawn else []),
        f"Asked for because: {escape_markdown(reason, limit=_MAX_REASON_LENGTH)}",
        "",
        *_format_lines(_compare_versions(version, champion)),
        "",
        "| metric, test | former champion | champion now |",
        "|---|---|---|",
        *(
            f"| {_title_metric(name)}{' of patients' if name.startswith('patient_') else ''} | {value:.4f} "
            f"| {f'{champion_metrics[name]:.4f}' if name in champion_metrics else ''} |"
            for name, value in sorted(version["metrics"].items(), key=lambda metric: rank_clinically(metric[0]))
        ),
        "",
    ]
    approved = [one["version"] for one in (version, champion) if one and one["version"] in bundles]
    if approved:
        links = [
            f"- {format_link(f'What version {number} was approved on', review_page_path(bundles[number]))}"
            for number in approved
        ]
        lines += ["### Look closer", "", *links, ""]
    judged = f", judged as `{bundles[version['version']]}`" if version["version"] in bundles else ""
    lines += [
        f"Evidence `{evidence_id}`{judged}. Your answer is recorded with your name and reason.",
    ]
    return "\n".join(lines)


def _compare_versions(version: Json, champion: Json | None) -> list[Line]:
    """Returns what the two get wrong; of a champion whose evidence cannot be read nothing is told."""
    known = champion if champion and "task" in champion else None
    return [*describe_errors(version, known), describe_lost_classes(version, known)]


def format_review_body(bundle: Json, bundle_id: str, links: Mapping[str, str]) -> str:
    """Returns what a reviewer reads before deciding, as Markdown.

    A promotion compares this text with the one that the reviewer has read, so the same bundle must always give the same
    text.

    Args:
        bundle: the bundle that :func:`ml.promotion.judging.judge_version` made.
        bundle_id: its id.
        links: text -> address.
    """
    evidence, champion = bundle["evidence"], bundle["champion"]
    lines = [
        f"**{escape_markdown(evidence['model'])} version {evidence['version']}** would become champion"
        + (f" in place of version {champion['version']}." if champion else "; there is no champion yet."),
        "",
    ]
    lines += _format_verdict(give_verdict(bundle))
    lines += [*_format_regressions(bundle), *_format_gates(bundle), *_format_comparison(bundle)]
    lines += [*_format_metrics(evidence, champion["metrics"] if champion else {}), *_format_classes(evidence)]
    lines += _format_data(evidence)
    links = {
        "Review page: candidate and champion side by side, with pictures": review_page_path(bundle_id),
        "The candidate's whole report": f"{review_page_path(bundle_id)}candidate/report.html",
        **links,
    }
    lines += ["### Look closer", "", *(f"- {format_link(text, address)}" for text, address in links.items()), ""]
    lines += [
        f"Evidence `{bundle['evidence_id']}`, judged as `{bundle_id}` (SHA-256 `{digest(bundle)}`). Your answer is "
        "recorded with your name and reason, and holds for exactly this.",
    ]
    return "\n".join(lines)


def _title_metric(name: str) -> str:
    """Returns the display name of a metric, as Markdown; one that this release does not know keeps its own."""
    return METRIC_NAMES.get(name) or escape_markdown(name)


def _format_verdict(verdict: Verdict) -> list[str]:
    """Returns the lines that come first, and one box of warnings, the worst first."""
    lines = [*_format_lines(verdict.lines), ""]
    if verdict.warnings:
        lines += ["> **Warnings**", ">"]
        lines += [f"> - ⚠ {escape_markdown(warning, limit=_MAX_WARNING_LENGTH)}" for warning in verdict.warnings]
        lines.append("")
    return lines


def _format_lines(lines: Iterable[Line]) -> list[str]:
    return [f"- **{line.title}:** {escape_markdown(line.text, limit=_MAX_WARNING_LENGTH)}" for line in lines]


def _format_gates(bundle: Json) -> list[str]:
    lines = ["### Gates", "", "| gate | value | limit | inside by | |", "|---|---|---|---|---|"]
    for gate in bundle["gates"]:
        value, limit, distance = (
            "" if gate[key] is None else f"{gate[key]:{form}}"
            for key, form in (("value", ".4f"), ("limit", "g"), ("distance", "+.4f"))
        )
        outcome = find_outcome(gate)
        shown = "**FAILED**" if outcome == FAILED else outcome
        lines.append(f"| {escape_markdown(gate['name'])} | {value} | {limit} | {distance} | {shown} |")
    return [*lines, "", f"Policy: {escape_markdown(bundle['policy'])} (`{bundle['policy_hash']}`)", ""]


def _format_data(evidence: Json) -> list[str]:
    """Returns the section on the dataset and its split."""
    lines = ["### Data", "", "| side | images | cases |", "|---|---|---|"]
    # In the order of SIDES: a stored object comes back in alphabetical order.
    sides = ((side, evidence["sides"][side]) for side in SIDES)
    lines += [f"| {side} | {counts['images']} | {counts['cases']} |" for side, counts in sides]
    shown = {key: escape_markdown(evidence.get(key, "")) for key in ("dataset", "split", "split_group", "split_method")}
    sources = ", ".join(
        f"{escape_markdown(name)} ({escape_markdown(version)})" for name, version in evidence["sources"].items()
    )
    split = f"{shown['split']}, by {shown['split_group'] or 'case'}"
    if "split_method" in evidence:
        split += f" with the method {shown['split_method']}"
    lines += ["", f"Dataset {shown['dataset']} of {sources}; {split}.", ""]
    if evidence["absent_classes"]:
        absent = ", ".join(escape_markdown(name) for name in evidence["absent_classes"])
        lines += [f"**Not measured, no test image:** {absent}.", ""]
    return lines


def _format_metrics(evidence: Json, champion_metrics: Mapping[str, float]) -> list[str]:
    """Returns the tables of test metrics, of images and of patients, beside the champion's."""
    lines = []
    for title, of_patients in (("### Test metrics, of patients", True), ("### Test metrics, of images", False)):
        metrics = [metric for metric in evidence["metrics"] if metric.startswith("patient_") == of_patients]
        metrics.sort(key=rank_clinically)
        if not metrics:  # evidence from before metrics of patients were computed
            continue
        lines += [title, "", "| metric | candidate | 95% interval | champion | change |", "|---|---|---|---|---|"]
        for metric in metrics:
            value, ends = evidence["metrics"][metric], evidence.get("intervals", {}).get(metric)
            range_text = f"{ends[0]:.4f} to {ends[1]:.4f}" if ends else ""
            note = escape_markdown(evidence.get("interval_notes", {}).get(metric, ""))
            interval = "; ".join(filter(None, (range_text, note)))
            before = f"{champion_metrics[metric]:.4f}" if metric in champion_metrics else ""
            change = f"{value - champion_metrics[metric]:+.4f}" if metric in champion_metrics else ""
            lines.append(f"| {_title_metric(metric)} | {value:.4f} | {interval} | {before} | {change} |")
        lines.append("")
    return lines


def _format_classes(evidence: Json) -> list[str]:
    """Returns the table of test metrics by class."""
    lines = ["| class | cases recognised | recall | precision | F1 | test images |", "|---|---|---|---|---|---|"]
    for name in class_names(evidence["task"]):
        scores = evidence["per_class"][name]
        recognised = f"{scores['recognised']} of {scores['cases']}" if "cases" in scores else ""
        lines.append(
            f"| {name} | {recognised} | {scores['recall']:.3f} | {scores['precision']:.3f} | {scores['f1']:.3f} "
            f"| {scores['support']:.0f} |"
        )
    return [*lines, ""]


def _format_regressions(bundle: Json) -> list[str]:
    if not bundle["champion"]:
        return []
    regressions = [
        f"{'**' if one.is_beyond_margin else ''}{escape_markdown(name_figure(one.metric, one.of_class))} "
        f"{one.before:.4f} → {one.now:.4f}{'**, by more than the margin' if one.is_beyond_margin else ''}"
        for one in list_regressions(bundle["evidence"], bundle["champion"], find_margin(bundle))
    ]
    return ["### What got worse", "", *(f"- {line}" for line in regressions or ["Nothing that was measured."]), ""]


def _format_comparison(bundle: Json) -> list[str]:
    """Returns the table of the non-inferiority comparison with the champion."""
    comparison = bundle["comparison"]
    if not comparison or not comparison["pairs"]:
        return []
    lines = [
        f"### Beside the champion, version {comparison['version']}",
        "",
        "On the same images, paired by case. *At least* is the lower end of the difference; a version that is worse by "
        "the margin passes in the share of draws under *size*, one as good as the champion in that under *power*.",
        "",
        "| metric | images (cases) | champion | candidate | difference | at least | size | power |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for pair in comparison["pairs"]:
        name = f"{_title_metric(pair['metric'])}, {escape_markdown(pair['where'])}"
        if pair["difference"] is None:
            lines.append(f"| {name} | {pair['images']} ({pair['cases']}) | | | not estimable | | | |")
            continue
        lines.append(
            f"| {name} | {pair['images']} ({pair['cases']}) | {pair['champion']:.4f} | {pair['candidate']:.4f} "
            f"| {pair['difference']:+.4f} | {pair['low']:+.4f} | {pair['size']:.1%} | {pair['power']:.0%} |"
        )
    return [*lines, ""]
