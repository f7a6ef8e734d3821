"""What the guides show and lead to is there."""

import re

import pytest

from ml.core.settings import PROJECT

PAGES = [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pictures_and_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
    local = [target for target in targets if not re.match(r"[a-z]+:|/|<", target)]
    assert [target for target in local if not (page.parent / target).exists()] == []


def test_every_picture_is_shown():
    shown = {name for page in PAGES for name in re.findall(r"images/([\w-]+\.png)", page.read_text(encoding="utf-8"))}
    assert {file.name for file in (PROJECT / "docs" / "images").glob("*.png")} == shown
