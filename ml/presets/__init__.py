"""Presets: the training recipes, one readable YAML each."""

from importlib.resources import as_file, files
from typing import Literal

from pydantic import Field

from ml.errors import ConfigError
from ml.yamlfile import Declared, read_yaml

PresetName = Literal["paper", "demo"]


class Preset(Declared):
    """One recipe. Every field has to be given, so that a file says everything there is to know."""

    name: PresetName
    description: str
    epochs: int = Field(gt=0, le=1000, description="Passes over the training side.")
    batch_size: int = Field(gt=0, description="Images a step.")
    learning_rate: float = Field(gt=0, lt=1, description="Adam's, constant.")
    dropout: float = Field(ge=0, lt=1, description="Share of the hidden units dropped in training.")
    standardize: bool = Field(description="Whether features are standardised by the training side's mean and variance.")
    class_weights: Literal["none", "sqrt"] = Field(description="sqrt: a class weighs 1/sqrt of its share.")
    random_weights_allowed: bool = Field(description="Whether to go on where ImageNet weights cannot be downloaded.")


def load_preset(name: str) -> Preset:
    """A shipped preset by name.

    Raises:
        ConfigError: there is none of that name.
    """
    resource = files("ml.presets").joinpath(f"{name}.yaml")
    if not resource.is_file():
        raise ConfigError(f"no preset {name!r}; there are: {', '.join(preset_names())}")
    with as_file(resource) as path:
        return read_yaml(path, Preset)


def preset_names() -> list[str]:
    """The names of the shipped presets."""
    return sorted(r.name.removesuffix(".yaml") for r in files("ml.presets").iterdir() if r.name.endswith(".yaml"))
