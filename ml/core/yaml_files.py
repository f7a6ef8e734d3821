"""Reads the YAML files that users write (sources, training sets, policies, presets) into typed models."""

from pathlib import Path
from typing import Annotated, TypeVar, get_args

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from ml.core.errors import ConfigError
from ml.core.names import suggest_name

NAME_PATTERN = r"^[a-z][a-z0-9]*([_-][a-z0-9]+)*$"
"""Pattern of the names of sources, training sets and policies, which become part of DAG ids and model names."""


class YamlModel(BaseModel):
    """Base class of everything declared in YAML: unknown keys are errors, and values are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _check_schedule(value: str) -> str:
    presets = ("@hourly", "@daily", "@weekly", "@monthly", "@quarterly", "@yearly")
    if value not in presets and len(value.split()) != 5:
        raise ValueError(f"{value!r} is neither {', '.join(presets)} nor five cron fields such as '0 3 * * 1'")
    return value


Schedule = Annotated[str, AfterValidator(_check_schedule)]
"""Schedule of a DAG: one of Airflow's presets or five cron fields, whose values Airflow checks."""

Model = TypeVar("Model", bound=BaseModel)


def read_yaml(path: Path, model: type[Model], *, optional: bool = False) -> Model:
    """Reads one YAML file into ``model``; an ``optional`` file may be missing or empty.

    Raises:
        ConfigError: the file is missing, is no YAML, or is invalid; the message names the file and each wrong key.
    """
    return validate_mapping(read_mapping(path, optional=optional), model, path)


def read_mapping(path: Path, *, optional: bool = False) -> dict[str, object]:
    """Returns the mapping in a YAML file, unvalidated; an empty one if an ``optional`` file is missing or empty.

    Raises:
        ConfigError: the file is missing, is no YAML, or is something other than a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        if optional:
            return {}
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is not valid YAML: {' '.join(str(error).split())}") from None
    if data is None and optional:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected 'key: value' lines, found {type(data).__name__}")
    return data


def validate_mapping(data: dict[str, object], model: type[Model], path: Path) -> Model:
    """Validates a mapping as ``model``; messages name ``path``, and relative paths in the file start from its folder.

    Raises:
        ConfigError: a key is unknown, missing or has an invalid value; the message names the file and each key.
    """
    try:
        return model.model_validate(data, context={"path": path})
    except ValidationError as error:
        raise ConfigError(f"{path}: " + "; ".join(_describe_error(e, model) for e in error.errors())) from None


def find_yaml(folder: Path, reference: str, relative_to: Path | None = None) -> Path:
    """Returns the YAML file of a reference: a bare name is looked up in ``folder``; one that ends in .yaml is a path.

    Raises:
        ConfigError: there is no such file; the message lists the names in ``folder``, and the nearest one.
    """
    if reference.endswith(".yaml"):
        path = Path(reference).expanduser()
        path = path if path.is_absolute() else (relative_to or Path.cwd()) / path
    else:
        path = folder / f"{reference}.yaml"
    if path.is_file():
        return path.resolve()
    known = ", ".join(sorted(p.stem for p in folder.glob("*.yaml"))) or "none"
    meant = suggest_name(path.stem, (other.stem for other in path.parent.glob("*.yaml")))
    raise ConfigError(f"{path}: no such file; in {folder} there are: {known}{meant}")


def _describe_error(error: object, model: type[BaseModel]) -> str:
    assert isinstance(error, dict)
    where = ".".join(str(part) for part in error["loc"]) or "file"
    if error["type"] == "extra_forbidden":
        known = sorted(_nested_model(model, error["loc"][:-1]).model_fields)
        return f"unknown key '{where}' (known: {', '.join(known)})"
    if error["type"] == "missing":
        return f"'{where}' is missing"
    return f"'{where}': {error['msg'].removeprefix('Value error, ')}"


def _nested_model(model: type[BaseModel], keys: tuple[object, ...]) -> type[BaseModel]:
    """Returns the model of the nested block at these keys."""
    for key in keys:
        if not isinstance(key, str):  # an index of a list: its key has already led to the model
            continue
        annotation = model.model_fields[key].annotation
        types = [part for part in (annotation, *get_args(annotation)) if isinstance(part, type)]
        model = next((part for part in types if issubclass(part, BaseModel)), model)
    return model
