"""Presets: the training recipes, one readable YAML each, with a section for each of the two models."""

from importlib.resources import as_file, files
from typing import Any, Literal

from pydantic import Field, FiniteFloat, model_validator

from ml.core.errors import ConfigError
from ml.core.messages import quote_value
from ml.core.taxonomy import Task
from ml.core.yaml_files import YamlModel, is_yaml_name, read_yaml
from ml.data.training_sets import PresetName
from ml.evaluation.draws import MAX_DRAWS, MIN_DRAWS
from ml.images.augmentation_settings import Views


class Head(YamlModel):
    """The head on pooled features: Dense(hidden_units, relu) -> Dropout -> Dense."""

    hidden_units: int = Field(gt=0, description="Units of the hidden layer.")
    dropout: float = Field(ge=0, lt=1, description="Share of the hidden units dropped in training.")
    standardize: bool = Field(
        description="Whether features are standardised by mean and variance of the training images."
    )


class Training(YamlModel):
    """How a head is trained on cached features."""

    epochs: int = Field(
        gt=0, le=1000, description="Passes over the training pictures; the most, where the number is selected."
    )
    batch_size: int = Field(gt=0, description="Images a step.")
    learning_rate: float = Field(gt=0, lt=1, description="Adam's, constant.")
    weight_decay: float = Field(ge=0, lt=1, description="Decoupled weight decay (AdamW); 0: plain Adam.")


class Imbalance(YamlModel):
    """Measures against class imbalance."""

    sampling: Literal["none", "sqrt"] = Field(
        description="sqrt: a class is sampled in proportion to the square root of its share."
    )
    class_weights: Literal["none", "sqrt", "balanced"] = Field(
        description="Weight of a class in the loss: none, 1/sqrt of its share, or 1/its share."
    )
    focal_gamma: float = Field(ge=0, le=10, description="Focal loss' exponent (arXiv:1708.02002); 0: cross-entropy.")
    label_smoothing: float = Field(ge=0, lt=1, description="Share of the target spread over all classes.")
    logit_adjustment: tuple[FiniteFloat, ...] = Field(
        min_length=1,
        description="Strengths tau to select from, on out-of-fold predictions (arXiv:2007.07314): the label is the "
        "class with the highest log(p) - tau log(share). [0] is the highest probability. The subtype model only.",
    )


class Selection(YamlModel):
    """How epochs, calibration and decision rule are selected before the test side is scored."""

    using: Literal["validation", "out_of_fold"] = Field(
        description="validation: on the validation side, and the model is trained on the train side alone. "
        "out_of_fold: on pooled predictions of grouped cross-validation in train and validation; the model is trained "
        "on both."
    )
    folds: int = Field(ge=0, le=20, description="Folds of the cross-validation; 0: none.")
    repeats: int = Field(ge=0, le=20, description="Repeats of the cross-validation, each with other folds; 0: none.")
    choose_epochs: bool = Field(description="Whether the number of epochs is selected (by log-loss).")
    calibrate: bool = Field(
        description="Whether probabilities are corrected for sampling and weights, and by a temperature."
    )

    @model_validator(mode="after")
    def _check(self) -> "Selection":
        if (self.using == "out_of_fold") != (self.folds > 0) or (self.folds > 0) != (self.repeats > 0):
            raise ValueError("using: out_of_fold needs folds and repeats; using: validation has 0 of both")
        if self.folds in {1, 2}:
            raise ValueError("folds: at least 3, so that the selection can be nested")
        return self


class FineTuning(YamlModel):
    """Training of the backbone's upper blocks after the head, with BatchNorm frozen."""

    when: Literal["never", "gpu", "always"] = Field(description="gpu: if TensorFlow sees a GPU.")
    blocks: int = Field(ge=1, le=7, description="Blocks of EfficientNet unfrozen, from the top.")
    epochs: int = Field(gt=0, le=100, description="Passes; the most, where the number is selected (it may be none).")
    batch_size: int = Field(gt=0, description="Images a step.")
    learning_rate: float = Field(gt=0, lt=0.1, description="Adam's, constant.")
    mixed_precision: bool = Field(description="Whether a GPU computes in float16 with float32 weights.")


class Recipe(YamlModel):
    """The recipe of one model."""

    views: Views = Field(description="How often, and how, each training picture is seen.")
    head: Head = Field(description="The head on pooled features.")
    training: Training = Field(description="How the head is trained.")
    imbalance: Imbalance = Field(description="Measures against class imbalance.")
    selection: Selection = Field(description="How epochs, calibration and decision rule are selected.")
    fine_tuning: FineTuning = Field(description="Whether, and how, the backbone's upper blocks are trained as well.")


class Preset(YamlModel):
    """One preset. Every field has to be given, so that a file says everything there is to know."""

    name: PresetName = Field(description="That of the file.")
    description: str = Field(description="One line, for forms and reports.")
    random_weights_allowed: bool = Field(description="Whether to go on if ImageNet weights cannot be downloaded.")
    bootstrap_draws: int = Field(
        ge=0,
        le=MAX_DRAWS,
        description="Draws of the patient bootstrap for 95% intervals. "
        f"A gate on an interval asks for {MIN_DRAWS} at least.",
    )
    binary: Recipe = Field(description="The recipe of the model of benign and malignant.")
    subtype: Recipe = Field(description="The recipe of the model of the eight subtypes.")

    def recipe(self, task: Task) -> Recipe:
        """Returns the recipe of one task's model."""
        return self.binary if task == "binary" else self.subtype

    def with_changes(self, task: Task, **sections: dict[str, Any]) -> "Preset":
        """Returns a copy with other values in one task's recipe, by section, e.g. ``training={"epochs": 2}``."""
        recipe = self.recipe(task)
        changed = {name: getattr(recipe, name).model_copy(update=values) for name, values in sections.items()}
        return self.model_copy(update={task: recipe.model_copy(update=changed)})


def load_preset(name: str) -> Preset:
    """Read a shipped preset by its name.

    Raises:
        ConfigError: there is no preset of that name.
    """
    resource = files("ml.training.presets").joinpath(f"{name}.yaml")
    if not resource.is_file():
        raise ConfigError(f"no preset {quote_value(name)}; there are: {', '.join(preset_names())}")
    with as_file(resource) as path:
        return read_yaml(path, Preset)


def preset_names() -> list[str]:
    """Returns the names of the shipped presets, sorted."""
    names = (resource.name for resource in files("ml.training.presets").iterdir())
    return sorted(name.removesuffix(".yaml") for name in names if is_yaml_name(name))
