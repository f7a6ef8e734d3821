"""Decodes text that people wrote or exported. It has to be UTF-8, and where it is not, the error says what to do."""

import codecs

_SAVE = "save it as UTF-8 (in Excel: 'CSV UTF-8'; in Notepad: Save as, Encoding: UTF-8)"


def decode_text(data: bytes) -> str:
    """Returns the text of a file, without the mark that some programs put before UTF-8.

    Raises:
        ValueError: it is in another encoding; the message names the line, and what to save it as.
    """
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError(f"it is UTF-16; {_SAVE}")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        byte = f"0x{data[error.start]:02x}"
        problem = f"line {line}: the byte {byte} is no UTF-8, so the file is in another encoding, such as Windows-1252"
        raise ValueError(f"{problem}; {_SAVE}") from None
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise ValueError(f"line {line}: there is a null character, so it may be UTF-16; {_SAVE}")
    return text
