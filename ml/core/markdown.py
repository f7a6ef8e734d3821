"""Text that others wrote, put into Markdown so that it shows as it is and does nothing.

A reviewer reads Markdown in Airflow's form, and everybody who opens a registered version reads its model card. Names,
notes and reasons in them come from runs, YAML files and people. Each passes through :func:`escape_markdown` where the
Markdown is written.
"""

import re
import unicodedata
from urllib.parse import quote

_SPECIAL = re.compile(r"[\\`*_\[\]<|~&]")
"""Characters that begin something within a line: of CommonMark, of GitHub's tables and strikethrough, or of HTML."""

_INTERRUPTED = re.compile(r"(?i)(?<=:)(?=//)|(?<=www)(?=\.)|(?<=@)|(?<=\{)(?=[{%#])")
"""Positions at which a space without width is put. GitHub's Markdown makes a link of a bare address even where its
characters are escaped; and Airflow passes the text through a template engine, Jinja."""

_ZERO_WIDTH_SPACE = "\u200b"


def escape_markdown(text: object, *, limit: int = 200) -> str:
    """Returns a text for a line of Markdown, after other text of that line: it stays text, and on this line.

    Blanks and line breaks become single spaces. Characters that cannot be seen, such as those that turn the direction
    of writing, become a replacement character. A name of letters, digits, hyphens and full stops stays as it is.

    Args:
        text: the text, or a value that is shown as ``str`` shows it.
        limit: in characters; the rest is cut off, with an ellipsis in its place.
    """
    shown = " ".join(str(text).split())
    shown = shown if len(shown) <= limit else f"{shown[: limit - 1]}…"
    shown = "".join("\ufffd" if unicodedata.category(character)[0] == "C" else character for character in shown)
    return _INTERRUPTED.sub(_ZERO_WIDTH_SPACE, _SPECIAL.sub(r"\\\g<0>", shown))


def format_link(text: str, address: str) -> str:
    """Returns a link in Markdown whose text is text and whose address ends where it should."""
    return f"[{escape_markdown(text)}]({quote(address, safe='/:?#@&=%~+,;!-._')})"
