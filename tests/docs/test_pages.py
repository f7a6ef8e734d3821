"""What the pages show and lead to is there: files, pictures and headings."""

import re
from collections import Counter
from pathlib import Path

import pytest

from ml.core.settings import PROJECT

PAGES = [
    *(PROJECT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")),
    *sorted((PROJECT / "docs").glob("*.md")),
]


def prose(page: Path) -> str:
    """A page without what is shown as code, where brackets mean something else."""
    fenced = re.sub(r"^(```|~~~).*?^\1[ \t]*$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"^ {4}.*$", "", fenced, flags=re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """The fragments that lead to a page's headings, as GitHub makes them of their words."""
    found: Counter[str] = Counter()
    names = set()
    for heading in re.findall(r"^#{1,6} +(.+?) *$", prose(page), re.MULTILINE):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        name = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        names.add(f"{name}-{found[name]}" if found[name] else name)
        found[name] += 1
    return names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pictures_and_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)\s]+)", prose(page))
    local = [target.partition("#") for target in targets if not re.match(r"[a-z]+:|/|<", target)]
    files = {target: (page.parent / target).resolve() if target else page for target, _, _ in local}
    assert [target for target, file in files.items() if not file.exists()] == []
    headings = [f"{target}#{name}" for target, _, name in local if name and name not in anchors(files[target])]
    assert headings == []


def test_every_picture_is_shown():
    shown = {name for page in PAGES for name in re.findall(r"images/([\w-]+\.png)", page.read_text(encoding="utf-8"))}
    assert {file.name for file in (PROJECT / "docs" / "images").glob("*.png")} == shown
