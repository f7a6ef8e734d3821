"""Reading the YAML files that users write (sources, training sets, policies, presets) into typed models."""

from pathlib import Path
from typing import Annotated, TypeVar, get_args

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from ml.core.errors import ConfigError

NAME_PATTERN = r"^[a-z][a-z0-9]*([_-][a-z0-9]+)*$"
"""What a source, training set or policy may be called: it becomes part of DAG ids and model names."""


class YamlModel(BaseModel):
    """Base of everything declared in YAML: unknown keys are errors, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _check_schedule(value: str) -> str:
    presets = ("@hourly", "@daily", "@weekly", "@monthly", "@quarterly", "@yearly")
    if value not in presets and len(value.split()) != 5:
        raise ValueError(f"{value!r} is neither {', '.join(presets)} nor five cron fields such as '0 3 * * 1'")
    return value


Schedule = Annotated[str, AfterValidator(_check_schedule)]
"""When a DAG runs by itself: one of Airflow's presets or a cron line. Its fields' values are for Airflow to check."""

Model = TypeVar("Model", bound=BaseModel)


def read_yaml(path: Path, model: type[Model], *, optional: bool = False) -> Model:
    """Read one YAML file into ``model``; an ``optional`` one may be missing, or say nothing.

    Raises:
        ConfigError: the file is missing, is no YAML, or does not fit; names the file and each offending key.
    """
    return validate_mapping(read_mapping(path, optional=optional), model, path)


def read_mapping(path: Path, *, optional: bool = False) -> dict[str, object]:
    """The mapping in a YAML file, unchecked. An ``optional`` one that is missing or says nothing is empty.

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
    """Fit a mapping into ``model``; ``path`` is for the message and for paths relative to the file.

    Raises:
        ConfigError: names the file and each key that is unknown, missing or has an unusable value.
    """
    try:
        return model.model_validate(data, context={"path": path})
    except ValidationError as error:
        raise ConfigError(f"{path}: " + "; ".join(_explain(e, model) for e in error.errors())) from None


def find_yaml(folder: Path, reference: str, relative_to: Path | None = None) -> Path:
    """The YAML file that a reference means: a bare name is looked up in ``folder``, anything ending in .yaml is a path.

    Raises:
        ConfigError: there is no such file; lists the names there are.
    """
    if reference.endswith(".yaml"):
        path = Path(reference).expanduser()
        path = path if path.is_absolute() else (relative_to or Path.cwd()) / path
    else:
        path = folder / f"{reference}.yaml"
    if path.is_file():
        return path.resolve()
    known = ", ".join(sorted(p.stem for p in folder.glob("*.yaml"))) or "none"
    raise ConfigError(f"{path}: no such file; in {folder} there are: {known}")


def _explain(error: object, model: type[BaseModel]) -> str:
    assert isinstance(error, dict)
    where = ".".join(str(part) for part in error["loc"]) or "file"
    if error["type"] == "extra_forbidden":
        known = sorted(_inner(model, error["loc"][:-1]).model_fields)
        return f"unknown key '{where}' (known: {', '.join(known)})"
    if error["type"] == "missing":
        return f"'{where}' is missing"
    return f"'{where}': {error['msg'].removeprefix('Value error, ')}"


def _inner(model: type[BaseModel], keys: tuple[object, ...]) -> type[BaseModel]:
    """The model of the block that these keys lead to."""
    for key in keys:
        if not isinstance(key, str):  # a place in a list, whose models were found by its name
            continue
        annotation = model.model_fields[key].annotation
        inner = [one for one in (annotation, *get_args(annotation)) if isinstance(one, type)]
        model = next((one for one in inner if issubclass(one, BaseModel)), model)
    return model
