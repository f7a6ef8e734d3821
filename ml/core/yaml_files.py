"""Reads the YAML files that users write (sources, training sets, policies, presets) into typed models.

The model says what each value is. Where it asks for a text, the value stays as it was written: ``0123``, ``NO`` and
``2024-01-02`` are texts with and without quotes.
"""

import re
import stat
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path, PurePath
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, StringConstraints, ValidationError

from ml.core.errors import ConfigError
from ml.core.messages import MAX_FAULT, cut_text, list_items, quote_value
from ml.core.names import expand_home, resolve_links, suggest_name
from ml.core.text_files import decode_text
from ml.core.yaml_nodes import Block, Items, MisreadValue, Node, Scalar, parse_yaml, read_anything, read_number

NAME_PATTERN = r"^[a-z][a-z0-9]*([_-][a-z0-9]+)*$"
"""Pattern of the names of sources, training sets and policies, which become part of DAG ids and model names."""

MAX_NAME = 200
"""Characters of such a name. With what is put around it, it still has to be the name of a file (255 bytes on most
disks), of a DAG (250) and of a registered model (256)."""

Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN, max_length=MAX_NAME)]
"""Name of something declared in YAML."""


def is_name(text: str) -> bool:
    """Says whether a text can be the name of something declared in YAML; see :data:`Name`."""
    return len(text) <= MAX_NAME and re.fullmatch(NAME_PATTERN, text) is not None


Keys = tuple[str | int, ...]
"""Where a value stands: the keys, and the numbers in lists, that lead to it."""


class YamlModel(BaseModel):
    """Base class of everything declared in YAML: unknown keys are errors, and values are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class KeyedError(ValueError):
    """An error of a validator about a value further inside, so that the message names that one's key and line."""

    def __init__(self, keys: Keys, message: str) -> None:
        super().__init__(message)
        self.keys = keys


def _check_schedule(value: str) -> str:
    presets = ("@hourly", "@daily", "@weekly", "@monthly", "@quarterly", "@yearly")
    if value in presets:
        return value
    fields = value.split()
    if len(fields) != 5:
        raise ValueError(
            f"{quote_value(value)} is neither {', '.join(presets)} nor five cron fields such as '0 3 * * 1'"
        )
    from croniter import CroniterBadDateError, CroniterError, croniter  # what Airflow reads schedules with

    if any(field[:1] in {"r", "R"} for field in fields):
        raise ValueError(f"{quote_value(value)} is at another time whenever the file is read; name the time")
    try:
        croniter(value, datetime(2024, 1, 1, tzinfo=UTC)).get_next(datetime)
    except CroniterBadDateError:
        raise ValueError(f"{quote_value(value)} never comes: no month that it names has such a day") from None
    except (CroniterError, ValueError) as error:
        raise ValueError(
            f"{quote_value(value)} is no time that cron can read: {cut_text(error)}; such as '0 3 * * 1'"
        ) from None
    return value


Schedule = Annotated[str, AfterValidator(_check_schedule)]
"""Schedule of a DAG: one of Airflow's presets, or five cron fields that name a time which comes."""

Model = TypeVar("Model", bound=BaseModel)


MAX_BYTES = 1_000_000
"""Of a YAML file. Those that people write have some thousands."""


def read_yaml(path: Path, model: type[Model], *, optional: bool = False) -> Model:
    """Reads one YAML file into ``model``; an ``optional`` file may be missing or empty.

    Raises:
        ConfigError: the file is missing, is no YAML, or is invalid; the message names the file, and the line and key of
            each mistake.
    """
    return validate_mapping(read_mapping(path, optional=optional), model, path)


def read_mapping(path: Path, *, optional: bool = False) -> Block:
    """Returns the mapping in a YAML file, unvalidated; an empty one if an ``optional`` file is missing or empty.

    Raises:
        ConfigError: the file is missing, is no YAML, has a key twice, or is something other than a mapping.
    """
    empty = Block({}, {}, line=1, size=0)
    try:
        facts = path.stat()
        if not stat.S_ISREG(facts.st_mode):  # opening a named pipe would wait for whoever writes into it
            raise ConfigError(f"{path}: not a file")
        if facts.st_size > MAX_BYTES:  # it would take minutes to parse, also where it is all comments
            raise ConfigError(f"{path}: {facts.st_size:,} bytes; a YAML file has {MAX_BYTES:,} at the most")
        text = decode_text(path.read_bytes())
    except FileNotFoundError:
        if optional:
            return empty
        raise ConfigError(f"{path}: no such file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    root = parse_yaml(text, path)
    if root is None and optional:
        return empty
    if not isinstance(root, Block):
        found = {Items: "list", Scalar: "text"}.get(type(root), "nothing")
        raise ConfigError(f"{path}: expected 'key: value' lines, found {found}")
    return root


def validate_mapping(data: Block | Mapping[str, object], model: type[Model], path: Path) -> Model:
    """Validates a mapping as ``model``; messages name ``path``, and relative paths in the file start from its folder.

    Raises:
        ConfigError: a key is unknown, missing or has an invalid value; the message names the file and each key, and the
            line of those that were read from the file.
    """
    root = data if isinstance(data, Block) else None
    try:
        values = _read_block(root, model, ()) if root else data
        return model.model_validate(values, context={"path": path})
    except MisreadValue as error:
        raise ConfigError(f"{path}: line {error.node.line}: {_join(error.keys)}: {error}") from None
    except ValidationError as error:
        faults = (_describe_error(fault, model, root) for fault in error.errors())
        raise ConfigError(f"{path}: {list_items(faults, '; ', limit=MAX_FAULT)}") from None


def is_yaml_name(name: str) -> bool:
    """Says whether a file of a folder is listed as a YAML file, by its name.

    Those that begin with a dot are not: they are hidden, an editor's lock (``.#a.yaml``, a link that leads nowhere) or
    what macOS keeps beside a file (``._a.yaml``).
    """
    return name.endswith(".yaml") and not name.startswith(".")


def list_yaml(folder: Path) -> list[Path]:
    """Returns the YAML files of a folder, sorted; none if there is no such folder."""
    return sorted(path for path in folder.glob("*.yaml") if is_yaml_name(path.name))


def find_yaml(folder: Path, reference: str, relative_to: Path | None = None) -> Path:
    """Returns the YAML file of a reference: a bare name is looked up in ``folder``; one that ends in .yaml is a path.

    Raises:
        ConfigError: there is no such file; the message lists the names in ``folder``, and the nearest one.
    """
    path = folder / f"{reference}.yaml"
    if not reference.endswith(".yaml") and len(reference) > MAX_NAME:
        raise ConfigError(f"{quote_value(reference)}: a name has {MAX_NAME} characters at the most")
    try:
        if reference.endswith(".yaml"):
            path = (relative_to or Path.cwd()) / expand_home(reference)
        if path.is_file():
            return resolve_links(path)
    except OSError as error:  # the name is too long, or a folder above may not be read
        raise ConfigError(f"{quote_value(reference)}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if path.is_symlink():
        raise ConfigError(f"{cut_text(path)}: a link that leads to no file; remove it, or make it lead to one")
    known = list_items(other.stem for other in list_yaml(folder)) or "none"
    meant = suggest_name(path.stem, (other.stem for other in list_yaml(path.parent)))
    raise ConfigError(f"{cut_text(path)}: no such file; in {folder} there are: {known}{meant}")


# --- values as the model asks for them --------------------------------------------------------------------------------


def _read_node(node: Node, annotation: Any, keys: Keys) -> object:
    """Returns what is written at a node as Python's values, for a field that is annotated so."""
    if isinstance(node, Block):
        return _read_block(node, annotation, keys)
    if isinstance(node, Items):
        # All items of a list or tuple are alike in our models.
        inner = next((get_args(t)[0] for t in _alternatives(annotation) if get_origin(t) in {tuple, list}), Any)
        return [_read_node(item, inner, (*keys, number)) for number, item in enumerate(node.items)]
    types = list(_alternatives(annotation))
    if any(_is_text(one) for one in types):
        return None if node.is_null else node.text
    if bool in types:
        return read_number(node, keys, is_truth=True)
    if int in types or float in types:
        return read_number(node, keys)
    return read_anything(node, keys)


def _read_block(block: Block, annotation: Any, keys: Keys) -> dict[Any, object]:
    if _find_model(annotation) or any(get_origin(one) is dict for one in _alternatives(annotation)):
        return {
            key: _read_node(value, _annotation_inside(annotation, key), (*keys, key))
            for key, value in block.values.items()
        }
    values: dict[Any, object] = {}
    for text, value in block.values.items():
        key = read_anything(block.keys[text], (*keys, text))
        if key in values:
            raise MisreadValue((*keys, text), block.keys[text], "is the same key as another, written otherwise")
        values[key] = _read_node(value, Any, (*keys, text))
    return values


def _alternatives(annotation: Any) -> Iterator[Any]:
    """Yields the types that an annotation allows besides None."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from _alternatives(get_args(annotation)[0])
    elif origin in {Union, UnionType}:
        for one in get_args(annotation):
            yield from _alternatives(one)
    elif annotation is not NoneType:
        yield annotation


def _find_model(annotation: Any) -> type[BaseModel] | None:
    models = (one for one in _alternatives(annotation) if isinstance(one, type) and issubclass(one, BaseModel))
    return next(models, None)


def _annotation_inside(annotation: Any, key: str | int) -> Any:
    """Returns the annotation of what stands under a key; Any where the model has none."""
    model = _find_model(annotation)
    if model:
        field = model.model_fields.get(str(key))
        return field.annotation if field else Any
    inner = (get_args(one) for one in _alternatives(annotation) if get_origin(one) in {dict, tuple, list})
    arguments = next(inner, (Any,))
    return arguments[0] if isinstance(key, int) else arguments[-1]


def _is_text(annotation: Any) -> bool:
    if get_origin(annotation) is Literal:
        return all(isinstance(choice, str) for choice in get_args(annotation))
    return isinstance(annotation, type) and issubclass(annotation, str | PurePath)


# --- messages ---------------------------------------------------------------------------------------------------------


def _describe_error(error: Any, model: type[BaseModel], root: Block | None) -> str:
    keys: Keys = tuple(part for part in error["loc"] if part != "[key]")
    cause = error.get("ctx", {}).get("error")
    if isinstance(cause, KeyedError):
        keys = (*keys, *cause.keys)
    line = _find_line(root, keys)
    return f"line {line}: {_say_what_is_wrong(error, model, keys)}" if line else _say_what_is_wrong(error, model, keys)


def _say_what_is_wrong(error: Any, model: type[BaseModel], keys: Keys) -> str:
    where = _join(keys)
    if error["type"] == "extra_forbidden":
        annotation: Any = model
        for key in keys[:-1]:
            annotation = _annotation_inside(annotation, key)
        within = _find_model(annotation)
        return f"unknown key {where}" + (f" (known: {', '.join(sorted(within.model_fields))})" if within else "")
    if error["type"] == "missing":
        return f"{where} is missing"
    return f"{where}: {error['msg'].removeprefix('Value error, ')}"


def _join(keys: Keys) -> str:
    return quote_value(".".join(map(str, keys))) if keys else "'file'"


def _find_line(root: Block | None, keys: Keys) -> int | None:
    """Returns the line of the last of these keys that stands in the file; None if none of them does."""
    node: Node | None = root
    line = None
    for key in keys:
        if isinstance(node, Block) and str(key) in node.keys:
            line, node = node.keys[str(key)].line, node.values[str(key)]
        elif isinstance(node, Items) and isinstance(key, int) and key < len(node.items):
            node = node.items[key]
            line = node.line
        else:
            break
    return line
