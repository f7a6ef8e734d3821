"""Data Docs that can be read without a network.

Great Expectations' pages load their style, their icons and even the list on their front page by scripts from the
internet. This module removes those references and adds a small style sheet. The front page is our own: the checks, what
they found, the quarantine, and links to Great Expectations' pages.
"""

import re
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from html import escape
from importlib.metadata import version as version_of
from pathlib import Path
from shutil import rmtree
from typing import TYPE_CHECKING

from ml.core.store import Json
from ml.data.validation.suite import Outcome

if TYPE_CHECKING:
    import pandas as pd

FILES_SHOWN = 5
"""Number of quarantined files that the front page names for each reason; quarantine.html names all."""

_REMOVED_TAGS = re.compile(
    r"<(script|style|footer)\b.*?</\1>|<link\b[^>]*>|<img\b[^>]*>",
    re.DOTALL | re.IGNORECASE,
)
"""What is removed from Great Expectations' pages: scripts, styles, pictures and an invitation to a newsletter."""

_HEAD = """
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; form-action 'none'">
<style>
body { font: 15px/1.5 system-ui, sans-serif; margin: 0; color: #1c2733; background: #fff; }
header.breakhis, main.breakhis, body > .container-fluid { max-width: 1240px; margin: 0 auto; padding: 0 24px; }
header.breakhis { padding-top: 20px; } main.breakhis { padding-bottom: 40px; }
h1 { font-size: 24px; margin: 0 0 8px; } h2 { font-size: 18px; margin: 28px 0 8px; }
h4, h5, h6 { margin: 16px 0 4px; font-size: 16px; } .alert h5 { font-size: 18px; }
table { border-collapse: collapse; width: 100%; } table.facts { width: auto; }
th { text-align: left; background: #eef2f6; white-space: nowrap; }
th, td { padding: 6px 10px; border: 1px solid #d5dde5; vertical-align: top; }
li, td table td, .show-scrollbars code, td:nth-child(3) .show-scrollbars { overflow-wrap: anywhere; }
code { font-family: ui-monospace, monospace; font-size: 13px; } td > code, td > .verdict { white-space: nowrap; }
ul { margin: 4px 0; padding-left: 20px; }
table.files { table-layout: fixed; } table.files td { overflow-wrap: anywhere; }
table.files th { width: 9%; } table.files th:nth-child(1) { width: 30%; } table.files th:nth-child(7) { width: 10%; }
table.files th:nth-child(2) { width: 15%; } table.files th:nth-child(3) { width: 18%; }
.verdict { display: inline-block; padding: 2px 10px; border-radius: 4px; color: #fff; font-weight: 600; }
.held { background: #1b7f3b; } .warned { background: #a86400; } .failed, .errored { background: #b3261e; }
.badge { background: #eef2f6; border-radius: 3px; padding: 0 5px; } .text-danger { color: #b3261e; }
.text-success { color: #1b7f3b; } .text-warning { color: #a86400; }
i.fas { font-style: normal; font-weight: 600; white-space: nowrap; }
.fa-check-circle::before { content: "✓ held"; } .fa-times::before { content: "✗ failed"; }
.fa-exclamation-triangle::before { content: "! crashed"; }
body > nav.navbar, .card:has(.btn-group), thead[hidden], .col-lg-2 > .mb-4, a[data-toggle] { display: none; }
body > .container-fluid > .row { display: flex; gap: 24px; margin-top: 16px; }
body > .container-fluid > .row > .col-lg-2 { flex: 0 0 170px; }
body > .container-fluid > .row > .col-lg-10 { flex: 1; min-width: 0; }
.col-lg-2 ul { list-style: none; padding: 0; } .ge-section { margin-bottom: 24px; }
</style>
"""
"""The style of our pages and Great Expectations', and a ban on scripts, since none of these pages needs one."""


def finish_docs(
    docs: Path, outcomes: Sequence[Outcome], manifest: Json, quarantine: "pd.DataFrame", suite: str, changes: list[str]
) -> None:
    """Makes the site that Great Expectations wrote into ``docs`` self-contained; adds its front page and quarantine.

    Args:
        docs: the site's folder.
        outcomes: the outcomes of the checks.
        manifest: the manifest's object.json.
        quarantine: the manifest's quarantine table.
        suite: the suite's version.
        changes: the settings of the source's YAML that are not the default.
    """
    rmtree(docs / "static", ignore_errors=True)  # 4 MB of fonts and animated pictures that no page refers to any more
    _clean_pages(docs, outcomes, manifest)
    pages = {
        "validations/**/*.html": "Each expectation with the rows it did not hold for",
        "expectations/*.html": "The suite: everything that is expected",
    }
    links = [
        f'<li><a href="{escape(page.relative_to(docs).as_posix())}">{text}</a></li>'
        for pattern, text in pages.items()
        for page in docs.glob(pattern)
    ]
    reasons = ", ".join(f"{reason}: {files:,}" for reason, files in manifest["quarantined"].items())
    facts = {
        "Source": manifest["source"],
        "Manifest": manifest["id"],
        "Raw version": manifest["raw"],
        "Laid out as": manifest["tree"],
        "Images": f"{manifest['images']:,}",
        "Further copies of the same images": f"{manifest['duplicates']:,}",
        "In quarantine": f"{len(quarantine):,}" + (f" ({reasons})" if reasons else ""),
        "Claims to be whole BreakHis": "yes" if manifest["inventory"] else "no",
        "Trusted labels": ", ".join(f"slide {slide}: {subtype}" for slide, subtype in manifest["trust"].items())
        or "none",
        **_describe_scaling(manifest),
        "Suite": f"{suite}, Great Expectations {version_of('great-expectations')}",
        "Checked": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }
    body = [
        _render_table(([f"<th>{escape(key)}</th>", _render_cell(value)] for key, value in facts.items()), css="facts"),
        "<h2>Validation results</h2><ul>",
        *links,
        "</ul><h2>Checks</h2>",
        _render_changes(changes, manifest["file"]),
        _render_table(
            (_render_check(outcome, changes) for outcome in outcomes),
            head=("Result", "Check", "Severity", "What is demanded", "What was found"),
        ),
        '<h2>Quarantine</h2><p><a href="quarantine.html">Every file in quarantine</a></p>',
        _render_reasons(quarantine),
    ]
    title = f"Validation of {manifest['id']}"
    _write_page(docs / "index.html", title, _render_header(manifest, outcomes), "".join(body))
    back = _render_header(manifest, outcomes, '<p><a href="index.html">All checks</a></p>')
    listed = f"<h2>Quarantine</h2><p>{escape(facts['In quarantine'])}</p>{_render_files(quarantine)}"
    _write_page(docs / "quarantine.html", f"Quarantine of {manifest['id']}", back, listed)


def _describe_scaling(manifest: Json) -> dict[str, str]:
    """Returns the fact of how deeper pictures became 8-bit, where the source says so."""
    bits = manifest.get("significant_bits")
    return {"Pictures of 16 bits a channel": f"scaled to 8, of {bits} significant bits"} if bits else {}


def _clean_pages(docs: Path, outcomes: Sequence[Outcome], manifest: Json) -> None:
    """Removes the references to the internet from Great Expectations' pages; adds our style and header."""
    for page in docs.rglob("*.html"):
        path_to_top = "../" * (len(page.relative_to(docs).parts) - 1)
        header = _render_header(
            manifest, outcomes, f'<p><a href="{path_to_top}index.html">All checks and the quarantine</a></p>'
        )
        html = _REMOVED_TAGS.sub("", page.read_text(encoding="utf-8"))
        html = html.replace("</head>", f"{_HEAD}</head>", 1).replace(
            "<body>", f'<body><header class="breakhis">{header}</header>', 1
        )
        page.write_text(html, encoding="utf-8")


def _write_page(page: Path, title: str, header: str, body: str) -> None:
    page.write_text(
        f'<!DOCTYPE html><html lang="en"><head><meta charset="UTF-8"><title>{escape(title)}</title>{_HEAD}</head><body>'
        f'<header class="breakhis">{header}</header><main class="breakhis">{body}</main></body></html>',
        encoding="utf-8",
    )


def _render_changes(changes: list[str], file: str) -> str:
    """Returns the list of what the source's YAML changes or adds, so that every reader sees it."""
    if not changes:
        return ""
    listed = "".join(f"<li>{escape(change)}</li>" for change in changes)
    return f'<p><span class="verdict warned">changed by {escape(file)}</span></p><ul>{listed}</ul>'


def _render_header(manifest: Json, outcomes: Iterable[Outcome], more: str = "") -> str:
    title = f"Validation of <code>{escape(manifest['id'])}</code> from source {escape(manifest['source'])}"
    return f"<h1>{title}</h1>{_render_verdict(list(outcomes))}{more}"


def _render_verdict(outcomes: list[Outcome]) -> str:
    blocking = [outcome for outcome in outcomes if outcome.blocks_publication]
    warned = [outcome for outcome in outcomes if outcome.status == "failed" and not outcome.blocks_publication]
    if blocking:
        css, words = (
            "failed",
            "did not pass: " + ", ".join(f"{outcome.name} {_status_word(outcome)}" for outcome in blocking),
        )
    elif warned:
        css, words = "warned", "passed, with a warning from " + ", ".join(outcome.name for outcome in warned)
    else:
        css, words = "held", "passed"
    return f'<p><span class="verdict {css}">{escape(words)}</span></p>'


def _status_word(outcome: Outcome) -> str:
    return {"held": "held", "failed": "failed", "errored": "crashed"}[outcome.status]


def _render_check(outcome: Outcome, changes: list[str]) -> list[str]:
    css = "warned" if outcome.status == "failed" and not outcome.blocks_publication else outcome.status
    found = escape(outcome.observed)
    paths = [
        f"<li><code>{escape(str(row['path']))}</code>{_render_values(row)}</li>"
        for row in outcome.rows
        if "path" in row
    ]
    if paths:
        found += f"<ul>{''.join(paths)}</ul>"
    return [
        f'<td><span class="verdict {css}">{_status_word(outcome)}</span></td>',
        f"<td><code>{escape(outcome.name)}</code></td>",
        _render_cell(
            outcome.severity + (" (changed)" if any(c.startswith(f"{outcome.name}:") for c in changes) else "")
        ),
        _render_cell(outcome.sentence),
        f"<td>{found}</td>",
    ]


def _render_values(row: Json) -> str:
    values = ", ".join(f"{column} {value}" for column, value in row.items() if column != "path")
    return f": {escape(values)}" if values else ""


def _render_reasons(quarantine: "pd.DataFrame") -> str:
    if quarantine.empty:
        return "<p>Nothing is in quarantine.</p>"
    rows = []
    for reason, group in quarantine.groupby("reason"):
        shown = group.head(FILES_SHOWN)
        files = "".join(
            f"<li><code>{escape(str(path))}</code>: {escape(str(detail))}</li>"
            for path, detail in zip(shown["path"], shown["detail"], strict=True)
        )
        more = f"<li>and {len(group) - FILES_SHOWN:,} more</li>" if len(group) > FILES_SHOWN else ""
        rows.append([_render_cell(str(reason)), _render_cell(f"{len(group):,}"), f"<td><ul>{files}{more}</ul></td>"])
    return _render_table(rows, head=("Reason", "Files", "Which"))


def _render_files(quarantine: "pd.DataFrame") -> str:
    columns = ["path", "reason", "detail", "patient", "slide", "subtype", "magnification"]
    cells = quarantine[columns].astype(object).where(quarantine[columns].notna(), "").itertuples(index=False)
    return _render_table(([_render_cell(str(value)) for value in row] for row in cells), head=columns, css="files")


def _render_cell(text: str) -> str:
    return f"<td>{escape(text)}</td>"


def _render_table(rows: Iterable[Sequence[str]], head: Sequence[str] = (), css: str = "") -> str:
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    return f'<table class="{css}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>'
