"""Settings of augmentation in a preset: the number of views of each image, and what varies between them.

They are separate from the code that makes views, so that forms and DAG files read a preset without importing NumPy.
"""

from pydantic import Field, model_validator

from ml.core.yaml_files import YamlModel


class Augmentation(YamlModel):
    """What varies from view to view, and how strongly."""

    flips: bool = Field(description="Mirrored left-right and up-down, each in half of the views.")
    rotations: bool = Field(description="Turned by 0, 90, 180 or 270 degrees.")
    hed: float = Field(
        ge=0,
        lt=1,
        description="Each stain's density times U(1-hed, 1+hed), and 0.2 U(-hed, hed) more, as by other laboratories.",
    )
    brightness: float = Field(ge=0, lt=1, description="U(-brightness, brightness) of the full range is added.")
    contrast: float = Field(ge=0, lt=1, description="Distances from the mean times U(1-contrast, 1+contrast).")


class Views(YamlModel):
    """Number of views of each training image. View 0 is the image itself, the only view that is scored."""

    count: int = Field(ge=1, le=64, description="Views of each training picture; an epoch takes one of them at random.")
    rare_count: int = Field(ge=1, le=64, description="Views of pictures of rare subtypes.")
    rare_below_cases: int = Field(ge=0, description="A subtype with fewer cases to train on is rare.")
    augmentation: Augmentation | None = Field(description="What the views but the first are made by; null with one.")

    @model_validator(mode="after")
    def _check(self) -> "Views":
        if self.augmentation is None and max(self.count, self.rare_count) > 1:
            raise ValueError("more than one view needs an augmentation")
        return self
