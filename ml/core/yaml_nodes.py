"""Parses the YAML files that people write, and keeps what they wrote: each value's own text, and each key's line.

What a plain value such as ``0123``, ``NO`` or ``2024-01-02`` means depends on the version of YAML, and on who is asked.
It is decided where the value is used (:mod:`ml.core.yaml_files`): text stays as it was written, and a value that two
versions of YAML read differently is refused where the file's model does not say what it should be.

A key that stands twice is an error, also if ``<<`` brings it along. YAML's libraries let the last one win.
"""

import re
from dataclasses import dataclass
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from ruamel.yaml import YAML, MappingNode, ScalarNode, SequenceNode
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from ml.core.errors import ConfigError
from ml.core.messages import cut_text, quote_value

_MAX_DEPTH = 50
_MAX_VALUES = 100_000
"""More values than people write; a file whose aliases multiply has as many."""

_NULLS = frozenset({"", "~", "null", "Null", "NULL"})
_TAGS = {kind: f"tag:yaml.org,2002:{kind}" for kind in ("str", "map", "seq")}
_OCTAL_OR_SEXAGESIMAL = re.compile(r"[-+]?(0o?[0-9_]+|[0-9][0-9_]*(:[0-9_.]+)+)")
_MAX_PARTS = 10
"""Parts of a number such as 1:30 (YAML 1.1, to the base 60). The library takes seconds for a hundred thousand."""
_SURROGATE = re.compile("[\ud800-\udfff]")
_NEXT_LINE = "\x85"
"""U+0085, which some programs end lines with. To one version of YAML it is such an end, to another part of a text."""
_DECIMAL = re.compile(r"[-+]?((0|[1-9][0-9]*)?(\.[0-9]*)?([eE][-+][0-9]+)?|\.inf|\.nan)", re.IGNORECASE)


@dataclass(frozen=True)
class Scalar:
    """A single value, as it was written."""

    text: str
    line: int
    """Number of its line in the file, from 1."""
    is_plain: bool
    """Whether it stands without quotes, so that YAML may take it for something other than text."""

    @property
    def is_null(self) -> bool:
        """Whether it is nothing: an empty value, ``~`` or ``null``."""
        return self.is_plain and self.text in _NULLS

    @property
    def size(self) -> int:
        """The number of values in it."""
        return 1


@dataclass(frozen=True)
class Items:
    """A list."""

    items: tuple["Node", ...]
    line: int
    size: int


@dataclass(frozen=True)
class Block:
    """A mapping. Keys are found by their text."""

    values: dict[str, "Node"]
    keys: dict[str, Scalar]
    """The keys of ``values`` as they stand in the file."""
    line: int
    size: int

    def texts(self) -> dict[str, Any]:
        """Returns it as Python's mappings and lists, with each value's own text; None for nothing."""
        texts = _to_texts(self)
        assert isinstance(texts, dict)
        return texts


Node = Scalar | Items | Block


class MisreadValue(ValueError):
    """A value that cannot be read as what its place in the file asks for."""

    def __init__(self, keys: tuple[str | int, ...], node: Node, message: str) -> None:
        super().__init__(message)
        self.keys = keys
        self.node = node


def parse_yaml(text: str, path: Path) -> Node | None:
    """Parses the text of the file at ``path``; returns None if there is nothing in it.

    Raises:
        ConfigError: it is no YAML, a key stands twice, or something in it is not meant for such files: tags, keys that
            are no texts, a value within itself. The message names the file, the line and the key.
    """
    if _NEXT_LINE in text:
        line = text[: text.index(_NEXT_LINE)].count("\n") + 1
        problem = 'is not valid YAML: the character U+0085 may end a line or not; remove it, or write it as "\\N"'
        raise ConfigError(f"{path}: line {line}: {problem}")
    parser = YAML(typ="safe", pure=True)
    parser.max_depth = _MAX_DEPTH
    parser.composer.warn_double_anchors = False  # they are refused below
    try:
        root = parser.compose(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}: " if mark else ""
        reasons = " ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError(f"{path}: {where}is not valid YAML: {cut_text(reasons)}") from None
    except Exception as error:  # on some texts the scanner fails by itself: ValueError, OverflowError, IndexError
        raise ConfigError(f"{path}: is not valid YAML: {cut_text(error)}") from None
    return None if root is None else _Conversion(path).convert(root, ())


class _Conversion:
    """Turns the nodes of the library into ours; a node that aliases point to stays one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._done: dict[int, Node] = {}
        self._open: set[int] = set()
        self._anchors: dict[str, int] = {}

    def convert(self, node: Any, keys: tuple[str, ...]) -> Node:
        if id(node) in self._done:
            return self._done[id(node)]
        line = node.start_mark.line + 1
        if id(node) in self._open:
            raise self._refuse(line, keys, "stands within itself")
        self._open.add(id(node))
        if node.anchor and self._anchors.setdefault(node.anchor, line) != line:
            problem = (
                f"the anchor &{cut_text(node.anchor)} stands there twice, first in line {self._anchors[node.anchor]}"
            )
            raise self._refuse(line, keys, problem)
        converted: Node
        if isinstance(node, ScalarNode):
            converted = self._convert_scalar(node, line, keys)
        elif isinstance(node, SequenceNode):
            self._refuse_tag(node, "seq", line, keys)
            items = tuple(self.convert(item, (*keys, str(number))) for number, item in enumerate(node.value))
            converted = Items(items, line, 1 + sum(item.size for item in items))
        else:
            self._refuse_tag(node, "map", line, keys)
            converted = self._convert_mapping(node, line, keys)
        if converted.size > _MAX_VALUES:
            raise self._refuse(line, keys, f"holds more than {_MAX_VALUES:,} values")
        self._open.discard(id(node))
        self._done[id(node)] = converted
        return converted

    def _convert_scalar(self, node: Any, line: int, keys: tuple[str, ...]) -> Scalar:
        if _SURROGATE.search(node.value):
            raise self._refuse(line, keys, "an escaped half of a character; write the character itself")
        if node.style:
            self._refuse_tag(node, "str", line, keys)
            return Scalar(node.value, line, is_plain=False)
        implied = _newer_yaml().resolver.resolve(ScalarNode, node.value, (True, False))
        if str(node.tag) == _TAGS["str"] and str(implied) != _TAGS["str"]:  # !!str 0123
            return Scalar(node.value, line, is_plain=False)
        if node.tag != implied:
            self._refuse_tag(node, "str", line, keys)
        return Scalar(node.value, line, is_plain=True)

    def _convert_mapping(self, node: MappingNode, line: int, keys: tuple[str, ...]) -> Block:
        values: dict[str, Node] = {}
        written: dict[str, Scalar] = {}

        def add(key: Scalar, value: Node, merged_in: int | None = None) -> None:
            before = written.get(key.text)
            if before is not None:
                by_merge = f", by '<<' in line {merged_in}" if merged_in else ""
                problem = f"stands there twice, first in line {before.line}{by_merge}; leave one of them out"
                raise self._refuse(key.line, (*keys, key.text), problem)
            values[key.text], written[key.text] = value, key

        for key_node, value_node in node.value:
            key = self._convert_key(key_node, keys)
            value = self.convert(value_node, (*keys, key.text))
            if not (key.is_plain and key.text == "<<"):
                add(key, value)
                continue
            for merged in value.items if isinstance(value, Items) else (value,):
                if not isinstance(merged, Block):
                    raise self._refuse(key.line, (*keys, "<<"), "merges mappings, and this is none")
                for name, inner in merged.values.items():
                    add(merged.keys[name], inner, key.line)
        return Block(values, written, line, 1 + sum(1 + value.size for value in values.values()))

    def _convert_key(self, node: Any, keys: tuple[str, ...]) -> Scalar:
        line = node.start_mark.line + 1
        if not isinstance(node, ScalarNode):
            problem = "a key must be a text; put it in quotes if the braces or brackets belong to the text"
            raise self._refuse(line, keys, problem)
        key = self._convert_scalar(node, line, keys)
        if key.is_null:
            raise self._refuse(line, keys, f"the key {key.text or '(nothing)'} is no text; put it in quotes")
        return key

    def _refuse_tag(self, node: Any, kind: str, line: int, keys: tuple[str, ...]) -> None:
        if str(node.tag) not in {_TAGS[kind], "!"}:
            tag = str(node.tag).replace("tag:yaml.org,2002:", "!!")
            raise self._refuse(line, keys, f"the tag {cut_text(tag)} has no meaning here; leave it out")

    def _refuse(self, line: int, keys: tuple[str, ...], problem: str) -> ConfigError:
        named = f"{quote_value('.'.join(keys))}: " if keys else ""
        return ConfigError(f"{self._path}: line {line}: {named}{problem}")


def _to_texts(node: Node) -> Any:
    if isinstance(node, Block):
        return {key: _to_texts(value) for key, value in node.values.items()}
    if isinstance(node, Items):
        return [_to_texts(item) for item in node.items]
    return None if node.is_null else node.text


# --- what a plain value means -----------------------------------------------------------------------------------------


def read_number(value: Scalar, keys: tuple[str | int, ...], *, is_truth: bool = False) -> object:
    """Returns the number, or with ``is_truth`` the truth value, that is written there; other texts as they are.

    Earlier releases read YAML 1.1, so ``yes`` is still true and ``12_000`` is a number.

    Raises:
        MisreadValue: YAML 1.1 and 1.2 read another number, or it is a truth value where a number is asked for.
    """
    if not value.is_plain or value.is_null:
        return None if value.is_null else value.text
    _refuse_many_parts(value, keys)
    older, newer = _read_as_older_yaml(value.text), _read_as_newer_yaml(value.text)
    if older != newer and _OCTAL_OR_SEXAGESIMAL.fullmatch(value.text):
        problem = f"YAML 1.1 and 1.2 read {cut_text(value.text)} differently; write it as a plain decimal number"
        raise MisreadValue(keys, value, problem)
    read = newer if isinstance(older, str) and not is_truth else older
    if isinstance(read, date):
        return value.text
    if isinstance(read, bool) and not is_truth:
        raise MisreadValue(keys, value, f"{cut_text(value.text)} is no number")
    return read


def read_anything(value: Scalar, keys: tuple[str | int, ...]) -> object:
    """Returns what is written there, as the text, number, truth value or None that it is to every version of YAML.

    Raises:
        MisreadValue: versions differ, or it is a date, or a number that looks like an id; the message asks for quotes.
    """
    if not value.is_plain or value.is_null:
        return None if value.is_null else value.text
    _refuse_many_parts(value, keys)
    older, newer = _read_as_older_yaml(value.text), _read_as_newer_yaml(value.text)
    if isinstance(older, str) and isinstance(newer, str):
        return value.text
    is_truth = isinstance(older, bool) and older is newer
    is_number = isinstance(older, int | float) and type(older) is type(newer) and _DECIMAL.fullmatch(value.text)
    if is_truth or is_number:
        return older
    shown = cut_text(value.text)
    problem = f"{shown} may be read as text or as something else; put it in quotes: '{shown}'"
    if isinstance(newer, int | float) and not isinstance(newer, bool):
        problem += ", or if it is a number, write it in plain decimals"
    raise MisreadValue(keys, value, problem)


def _refuse_many_parts(value: Scalar, keys: tuple[str | int, ...]) -> None:
    if value.text.count(":") >= _MAX_PARTS and _OCTAL_OR_SEXAGESIMAL.fullmatch(value.text):
        problem = f"{cut_text(value.text)} has more than {_MAX_PARTS} parts; put it in quotes if it is no number"
        raise MisreadValue(keys, value, problem)


@cache
def _newer_yaml() -> YAML:
    return YAML(typ="safe", pure=True)  # YAML 1.2


@cache
def _older_yaml() -> yaml.SafeLoader:
    return yaml.SafeLoader("")  # YAML 1.1; it read these files in earlier releases


def _require_printable(value: object) -> object:
    """Returns a value, unless Python would not print it: it reads hexadecimal numbers of any length, and prints few.

    Raises:
        ValueError: it is a number of thousands of digits.
    """
    if isinstance(value, int):
        str(value)
    return value


def _read_as_newer_yaml(text: str) -> object:
    reader = _newer_yaml()
    try:
        return _require_printable(
            reader.constructor.construct_object(
                ScalarNode(reader.resolver.resolve(ScalarNode, text, (True, False)), text)
            )
        )
    except (YAMLError, ValueError):  # what only looks like a number or a date is text
        return text


def _read_as_older_yaml(text: str) -> object:
    reader = _older_yaml()
    try:
        return _require_printable(
            reader.construct_object(
                yaml.ScalarNode(reader.resolve(yaml.ScalarNode, text, (True, False)), text)  # type: ignore[no-untyped-call]
            )
        )
    except (yaml.YAMLError, ValueError):
        return text
