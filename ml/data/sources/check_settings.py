"""Settings of the checks of a source's images, which its YAML can change.

The defaults here hold for every source. Checks of what every later stage relies on have no settings;
:mod:`ml.data.validation.checks` declares the checks with their sentences and rules.
"""

from typing import Any, Literal

from pydantic import Field, field_validator

from ml.core.messages import list_items
from ml.core.taxonomy import Subtype
from ml.core.yaml_files import Name, YamlModel

Severity = Literal["critical", "warning"]

_SEVERITY_HELP = "critical: stops publication; warning: is reported."


class CheckSettings(YamlModel):
    """The settings of one check."""

    severity: Severity = Field("critical", description=_SEVERITY_HELP)


class ImageSizes(CheckSettings):
    """The published image sizes; another size is a sign that somebody resized the pictures."""

    severity: Severity = Field("warning", description=_SEVERITY_HELP)


class ClassSizes(CheckSettings):
    """The least that a subtype needs to be trained on and measured."""

    severity: Severity = Field("warning", description=_SEVERITY_HELP)
    min_images: int = Field(20, ge=0, description="Images of a subtype.")
    min_cases: int = Field(2, ge=0, description="Cases of a subtype: one to train on, one to test on.")
    subtypes: tuple[Subtype, ...] = Field((), description="Which must be there; default: those that are there.")


class QuarantineRate(CheckSettings):
    """The share of unusable files above which the whole delivery is suspect, rather than a few files."""

    limit: float = Field(0.1, ge=0, le=1, description="Largest share of the images that may be in quarantine.")


class ImagesLost(CheckSettings):
    """A delivery that lacks much of the one before is more often an accident than intended."""

    limit: float = Field(0.1, ge=0, le=1, description="Largest share of a subtype's images that may be gone.")


class ImagesGained(CheckSettings):
    """A delivery with many more images than the one before should be looked at."""

    severity: Severity = Field("warning", description=_SEVERITY_HELP)
    limit: float = Field(1.0, ge=0, description="Largest share that a subtype may grow by; 1.0: twice as many.")


class NearDuplicates(CheckSettings):
    """Pictures of two patients that are nearly the same: one has a wrong name, or both patients are one person."""

    severity: Severity = Field("warning", description=_SEVERITY_HELP)
    distance: int = Field(
        6,
        ge=0,
        le=16,
        description="Bits of 64 in which two perceptual hashes may differ, in any of eight orientations. Distances are "
        "even, so an odd number is as the even one below it.",
    )


class AdditionalExpectation(CheckSettings):
    """A further expectation of Great Expectations, on the manifest's columns."""

    name: Name = Field(description="What the check is called in the Data Docs.")
    sentence: str = Field(min_length=10, description="What is demanded and why, for who reads the Data Docs.")
    expectation: str = Field(
        pattern=r"^Expect[A-Za-z]+$", description="Its class, such as ExpectColumnValuesToBeInSet."
    )
    arguments: dict[str, Any] = Field(
        default_factory=dict, description="Its arguments, such as {column: magnification}."
    )


class ValidationSettings(YamlModel):
    """The block ``validation`` of a source's YAML, which holds only what differs from the default."""

    inventory: CheckSettings = Field(
        CheckSettings(), description="The published counts, of a source with inventory: true."
    )
    image_sizes: ImageSizes = ImageSizes()
    class_sizes: ClassSizes = ClassSizes()
    quarantine_rate: QuarantineRate = QuarantineRate()
    images_lost: ImagesLost = ImagesLost()
    images_gained: ImagesGained = ImagesGained()
    near_duplicates: NearDuplicates = NearDuplicates()
    more: tuple[AdditionalExpectation, ...] = Field((), description="Further expectations.")

    @field_validator("more", mode="after")
    @classmethod
    def _distinct(cls, value: tuple[AdditionalExpectation, ...]) -> tuple[AdditionalExpectation, ...]:
        names = [check.name for check in value]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"two checks are called {list_items(sorted(twice))}")
        return value

    def changes(self) -> list[str]:
        """Returns a line for each setting that is not the default: ``quarantine_rate: limit 0.3 instead of 0.1``."""
        changes = []
        for name, field in type(self).model_fields.items():
            current, default = getattr(self, name), field.get_default()
            if name == "more":
                changes += [f"{check.name}: added" for check in current]
                continue
            for key in type(current).model_fields:
                value, usual = getattr(current, key), getattr(default, key)
                if value != usual:
                    changes.append(f"{name}: {key} {_format_value(value)} instead of {_format_value(usual)}")
        return changes


def _format_value(value: object) -> str:
    return (", ".join(map(str, value)) or "those that are there") if isinstance(value, tuple) else str(value)
