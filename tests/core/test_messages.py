import pytest
from hypothesis import given
from hypothesis import strategies as st

from ml.core.errors import BreakhisError, Refused
from ml.core.messages import (
    MAX_MESSAGE,
    MAX_TEXT,
    cut_message,
    cut_text,
    hide_access,
    list_items,
    quote_value,
    show_controls,
)

LONG = st.text(max_size=300) | st.text(min_size=1, max_size=5).map(lambda text: text * 1000)
VALUES = st.none() | st.integers() | st.floats() | LONG | st.lists(LONG, max_size=3) | st.binary(max_size=500)


@given(VALUES)
def test_a_value_is_one_line_and_no_longer_than_the_limit(value):
    for shown in (cut_text(value), quote_value(value)):
        assert len(shown.splitlines()) <= 1
    assert len(cut_text(value)) <= MAX_TEXT
    assert len(quote_value(value)) <= 10 * MAX_TEXT + 2  # an escape such as \U0001f600 takes ten characters


@given(st.text(max_size=MAX_TEXT))
def test_a_short_value_is_shown_as_it_is(text):
    assert quote_value(text) == repr(text)
    assert cut_text(text) == " ".join(text.split())


@given(st.lists(st.text(max_size=300), max_size=40), st.sampled_from([", ", "; "]))
def test_a_list_says_how_many_it_leaves_out(items, separator):
    shown = list_items(items, separator)
    assert len(shown) <= 10 * (100 + len(separator)) + 20
    assert shown.endswith(f" and {len(items) - 10} more") == (len(items) > 10)
    if len(items) <= 10 and all(len(item) <= 100 for item in items):
        assert shown == separator.join(" ".join(item.split()) for item in items)


def test_a_list_of_two_and_of_twelve():
    assert list_items(["a", "b"]) == "a, b"
    assert list_items(range(12)) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more"
    assert list_items([]) == ""


@given(st.text(max_size=50), st.text(max_size=50), st.integers(0, 3 * MAX_MESSAGE))
def test_a_message_keeps_its_beginning_and_its_end(head, tail, middle):
    message = head + "x" * middle + tail
    for shown in (cut_message(message), str(Refused(message)), str(BreakhisError(message))):
        assert len(shown) <= MAX_MESSAGE
        assert shown.startswith(head)
        assert shown.endswith(tail)
        if len(message) <= MAX_MESSAGE:
            assert shown == message


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("get https://a.org/b.zip?token=x&y=1, then", "get https://a.org/b.zip?…, then"),
        ("(url: /b?Signature=x)", "(url: /b?…)"),
        (f"http://me:{'secret'}@a.org/b", "http://…@a.org/b"),
        ("get https://a.org/b.zip#token=x", "get https://a.org/b.zip#…"),
        ("get https://a.org/b.zip;token=x, then", "get https://a.org/b.zip;…, then"),
        ("get https://a.org/b.zip?t=x'y)z", "get https://a.org/b.zip?…"),
        (f"http://me:{'se@cret'}@a.org/b", "http://…@a.org/b"),
        ("is it running?", "is it running?"),
        ("it fails; see /a/b; try again", "it fails; see /a/b; try again"),
    ],
)
def test_what_an_address_grants_access_by_is_not_shown(text, shown):
    assert hide_access(text) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\tb\nc — ä", "a\tb\nc — ä"),
        ("demo\x1b[31m", "demo\\x1b[31m"),
        ("a\rb\x00\x7f\x9b\u2028", "a\\rb\\x00\\x7f\\x9b\\u2028"),
    ],
)
def test_control_characters_are_written_out(text, shown):
    assert show_controls(text) == shown
