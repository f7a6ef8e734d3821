from contextlib import nullcontext

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ml.core.text_files import decode_text


def is_utf8(data: bytes) -> bool:
    try:
        return b"\0" not in data and not data.startswith((b"\xff\xfe", b"\xfe\xff")) and data.decode() is not None
    except UnicodeDecodeError:
        return False


TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\ufeff"))


@given(TEXTS)
def test_utf8_is_read_with_and_without_a_mark(text):
    assert decode_text(text.encode()) == text
    assert decode_text(text.encode("utf-8-sig")) == text


@given(TEXTS, st.sampled_from(["utf-16", "utf-16-le", "utf-16-be", "utf-32"]))
def test_text_of_letters_in_utf16_is_refused_with_a_remedy(text, encoding):
    with pytest.raises(ValueError, match="save it as UTF-8"):
        decode_text(f"path,patient\n{text}".encode(encoding))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("name,préparation\n".encode("cp1252"), "line 1: the byte 0xe9 is no UTF-8"),
        (b"a,b\n1,2\n3,\x80\n", "line 3: the byte 0x80 is no UTF-8.*Windows-1252; save it as UTF-8"),
        ("a,b\n".encode("utf-16"), "^it is UTF-16; save it as UTF-8"),
        (b"a,b\n1,\0\n", "line 2: there is a null character"),
    ],
)
def test_the_message_names_the_line_and_what_to_do(data, message):
    with pytest.raises(ValueError, match=message):
        decode_text(data)


@given(st.binary())
def test_any_bytes_are_text_or_refused(data):
    with nullcontext() if is_utf8(data) else pytest.raises(ValueError, match="save it as UTF-8") as refused:
        assert decode_text(data).encode() == data.removeprefix(b"\xef\xbb\xbf")
    assert refused is None or not isinstance(refused.value, UnicodeError)
