"""Texts that want to be more than text, and what Markdown and HTML make of a document that quotes them."""

from html.parser import HTMLParser

from hypothesis import strategies as st
from markdown_it import MarkdownIt

_PIECES = (
    *("[read this](https://bad.example)", "![x](https://bad.example/x.png)", "<img src=x onerror=alert(1)>", "<b>"),
    *(
        "\n# heading\n",
        "\n\n",
        " | ",
        "|",
        "\n|---|\n",
        "**",
        "__",
        "~~",
        "`",
        "```\n",
        "\\",
        "&lt;",
        "&#91;",
        "]",
        "[",
    ),
    *("https://bad.example/a", "www.bad.example", "a@bad.example", "<https://bad.example>", "\n> ", "\n- ", "\n1. "),
    *("{{ 7 * 7 }}", "{% raw %}", "\u202e", "\x00", "\u200b", "\ud800", '" onmouseover="', "'", "javascript:alert(1)"),
    *("judged as `bundle-666666666666`. Your answer is", "*", "_", "[^1]", ": ", "a", "0.9", " "),
)

HOSTILE = st.one_of(st.lists(st.sampled_from(_PIECES), min_size=1, max_size=6).map("".join), st.text(min_size=1))
"""Texts of which many would be a link, a picture, a heading, a cell or a tag if they were not escaped."""

STORABLE = HOSTILE.map(lambda text: text.replace("\ud800", "x"))
"""The same without half characters, which no JSON in the store can hold."""


def read_structure(markdown: str) -> list[str]:
    """Returns what a text is made of for a reader of GitHub's Markdown, in order, without its words."""
    tokens = MarkdownIt("gfm-like", {"html": True}).parse(markdown)
    flat = [inner for token in tokens for inner in (token, *(token.children or ()))]
    return [f"{token.type} {token.attrs.get('href', '')}".strip() for token in flat if token.type != "text"]


def read_words(markdown: str) -> str:
    """Returns the words of a text as a reader sees them."""
    tokens = MarkdownIt("gfm-like", {"html": True}).parse(markdown)
    return "".join(inner.content for token in tokens for inner in token.children or ())


def read_tags(page: str) -> list[tuple[str, tuple[str, ...]]]:
    """Returns the tags of an HTML page, each with the names of its attributes, in order."""
    found = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attrs):
            found.append((tag, tuple(name for name, _ in attrs)))

    Reader().feed(page)
    return found
