"""Mutations of bytes, texts and JSON values. Each takes a random generator, so a seed gives the same inputs again."""

import copy
import json
import random
from typing import Any

ODD_TEXTS = (
    "",
    " ",
    "\t",
    "~",
    "null",
    "NO",
    "on",
    "0123",
    "1e3",
    "12_000",
    "0x1F",
    "1:30",
    ":".join(["1"] * 1_000),
    "-0",
    ".inf",
    ".nan",
    "nan",
    "2024-13-45",
    "2024-01-02",
    "2024-01-02T25:61:61Z",
    "9" * 5000,
    "1e999999999",
    "1." + "0" * 300 + "1",
    "..",
    "../../etc",
    "/",
    "\\",
    "a\x00b",
    "\ufeff",
    "\u202e",
    "é",
    "e\u0301",
    "\U0001f600",
    "\ud800",
    "--help",
    "-",
    "%s{}{{x}}",
    "<b>x</b>",
    "[x](http://y)",
    "| a | b |",
    "`",
    "x" * 100_000,
    "'",
    '"',
    "#",
    "&a",
    "*a",
    "!!python/object:x",
    "!tag",
    "{",
    "[",
    "? x",
    "- ",
    "|\n x",
    ">\n x",
)
ODD_NUMBERS: tuple[Any, ...] = (
    *(0, 1, -1, 2, 0.0, -0.0, 0.5, 1.5, 1e308, -1e308, 1e-320, 2**31, 2**63, 2**64, -(2**63), 10**300),
    *(float("nan"), float("inf"), float("-inf"), True, False, None),
)


def odd_value(rng: random.Random, depth: int = 0) -> Any:
    """Returns a value of any JSON type, often an odd one; lists and mappings may nest."""
    roll = rng.random()
    if roll < 0.35:
        return rng.choice(ODD_TEXTS)
    if roll < 0.7 or depth > 3:
        return rng.choice(ODD_NUMBERS)
    if roll < 0.75:
        deep: Any = 0
        for _ in range(rng.choice((10, 90))):
            deep = [deep]
        return deep
    if roll < 0.85:
        return [odd_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {str(odd_value(rng, 9))[:50]: odd_value(rng, depth + 1) for _ in range(rng.randrange(4))}


def mutate_json(value: Any, rng: random.Random) -> Any:
    """Returns a copy of a JSON value with one to three places changed: removed, replaced, repeated, or added."""
    changed = copy.deepcopy(value)
    for _ in range(rng.randint(1, 3)):
        changed = _mutate_place(changed, rng)
    return changed


def _mutate_place(value: Any, rng: random.Random) -> Any:
    if not isinstance(value, dict | list) or not value or rng.random() < 0.1:
        return odd_value(rng)
    key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
    roll = rng.random()
    if roll < 0.5 and isinstance(value[key], dict | list):
        value[key] = _mutate_place(value[key], rng)
    elif roll < 0.75:
        value[key] = odd_value(rng)
    elif roll < 0.85:
        del value[key]
    elif isinstance(value, dict):
        value[str(odd_value(rng, 9))[:50]] = odd_value(rng)
    else:
        value.insert(key, copy.deepcopy(value[key]))
    return value


def dump_json(value: Any, rng: random.Random) -> bytes:
    """Returns a JSON value as bytes, now and then damaged."""
    data = json.dumps(value).encode()
    if rng.random() < 0.05:
        depth = rng.choice((900, 5_000, 100_000))
        data = data.replace(b"{", b'{"deep": ' + b"[" * depth + b"]" * depth + b", ", 1)
    return mutate_bytes(data, rng) if rng.random() < 0.3 else data


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """Returns bytes with one to eight changes: flipped, cut, repeated, moved, overwritten or filled."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 3, 8))):
        if not changed:
            return bytes(rng.randbytes(rng.randrange(64)))
        start = rng.randrange(len(changed)) if rng.random() < 0.5 else rng.randrange(min(len(changed), 128))
        length = rng.choice((1, 1, 2, 4, 8, 64, 1024))
        kind = rng.randrange(7)
        if kind == 0:
            changed[start] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del changed[start : start + length]
        elif kind == 2:
            changed[start:start] = changed[start : start + length]
        elif kind == 3:
            changed[start : start + length] = rng.randbytes(length)
        elif kind == 4:
            changed[start : start + length] = rng.choice((b"\x00", b"\xff", b"\x7f")) * length
        elif kind == 5:
            del changed[start:]
        else:
            changed[start : start + 4] = rng.choice(ODD_TEXTS).encode("utf-8", "surrogatepass")[:2000]
    return bytes(changed)


def mutate_text(text: str, rng: random.Random) -> bytes:
    """Returns a text of lines as bytes with one to four changes: a line, a value, a key, the encoding, or raw bytes."""
    lines = text.splitlines()
    for _ in range(rng.randint(1, 4)):
        if not lines:
            break
        number, kind = rng.randrange(len(lines)), rng.randrange(8)
        before, colon, value = lines[number].partition(":")
        if kind == 0:
            lines.insert(rng.randrange(len(lines) + 1), lines[number])
        elif kind == 1:
            del lines[number]
        elif kind in {2, 3, 4} and colon:
            lines[number] = f"{before}: {rng.choice(ODD_TEXTS)}"
        elif kind == 5 and colon:
            lines[number] = f"{rng.choice(ODD_TEXTS)}:{value}"
        elif kind == 6:
            lines[number] = rng.choice(("  ", "\t", "- ", "")) + lines[number].strip()
        else:
            lines[number] += rng.choice(ODD_TEXTS)
    changed = "\n".join(lines) + "\n"
    roll = rng.random()
    if roll < 0.05:
        return changed.encode("utf-16", "surrogatepass")
    if roll < 0.1:
        return changed.encode("cp1252", "replace")
    data = changed.encode("utf-8", "surrogatepass")
    return mutate_bytes(data, rng) if roll < 0.2 else data
