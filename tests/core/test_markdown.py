"""Text of others in Markdown shows as it is and does nothing."""

import re

import pytest
from hypothesis import assume, example, given

from ml.core.markdown import escape_markdown, format_link
from tests.helpers.hostile_text import HOSTILE, read_structure, read_words

# As Airflow's Markdown makes links of bare addresses once all else is read (mdast-util-gfm-autolink-literal).
_BARE_ADDRESS = re.compile(r"(https?://|www(?=\.))([-.\w]+)|[-.\w+]+@[-\w]+(?:\.[-\w]+)+", re.IGNORECASE)

PLACES = (
    *("| one | {} | two |", "- before {} after", "> **Warning.** {}", "> - ⚠ {}"),
    *("**{} version 3** would", "words ({})."),
)
TABLE = "| a | b | c |\n|---|---|---|\n"


@pytest.mark.parametrize("place", PLACES)
@given(text=HOSTILE)
@example(text="[a](https://b.example)")
@example(text="a|b")
def test_any_text_stays_text(place, text):
    before = TABLE if place.startswith("|") else ""
    escaped = escape_markdown(text)
    assume(escaped or not place.startswith("**"))  # a name is never blank, and before a blank nothing is bold
    line = before + place.format(escaped)
    assert read_structure(line) == read_structure(before + place.format("x"))
    assert not _BARE_ADDRESS.search(read_words(line))
    for opening in ("{{", "{%", "{#"):  # Jinja's
        assert opening not in escaped


@given(text=HOSTILE)
def test_the_address_of_a_link_is_what_was_given(text):
    line = f"- {format_link(text, 'https://good.example/' + text.encode(errors='replace').decode())}"
    links = [one for one in read_structure(line) if one.startswith("link_open")]
    assert len(links) == 1
    assert links[0].startswith("link_open https://good.example/")


@pytest.mark.parametrize(
    "text", ["made-binary", "version-0123456789ab", "exact interval of 2 of 2 cases", "of 400X", ""]
)
def test_plain_names_stay_as_they_are(text):
    assert escape_markdown(text) == text


def test_a_long_text_is_cut_off():
    assert escape_markdown("a" * 300) == "a" * 199 + "…"
    assert escape_markdown("a\n b\u202e", limit=5) == "a b\ufffd"
