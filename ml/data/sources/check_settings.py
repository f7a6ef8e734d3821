"""What is demanded of a source's images beyond what every later stage relies on, and how its YAML can change that.

The defaults here are what is demanded of every source; :mod:`ml.data.validation.checks` says in which words and rules.
"""

from typing import Any, Literal

from pydantic import Field, field_validator

from ml.core.taxonomy import Subtype
from ml.core.yaml_files import NAME_PATTERN, YamlModel

Severity = Literal["critical", "warning"]

_BLOCKS = "critical: stops publication; warning: is reported."


class CheckSettings(YamlModel):
    """One check, as a source may have it."""

    severity: Severity = Field("critical", description=_BLOCKS)


class ImageSizes(CheckSettings):
    """The published sizes; another is a sign that somebody resized the pictures."""

    severity: Severity = Field("warning", description=_BLOCKS)


class ClassSizes(CheckSettings):
    """What a subtype must have at the least to be trained on and measured."""

    severity: Severity = Field("warning", description=_BLOCKS)
    min_images: int = Field(20, ge=0, description="Images of a subtype.")
    min_cases: int = Field(2, ge=0, description="Cases of a subtype: one to train on, one to test on.")
    subtypes: tuple[Subtype, ...] = Field((), description="Which must be there; default: those that are there.")


class QuarantineRate(CheckSettings):
    """How much may be unusable before something is wrong with the delivery rather than with a few files."""

    limit: float = Field(0.1, ge=0, le=1, description="Largest share of the images that may be in quarantine.")


class ImagesLost(CheckSettings):
    """A delivery that lacks much of the one before is more often an accident than meant."""

    limit: float = Field(0.1, ge=0, le=1, description="Largest share of a subtype's images that may be gone.")


class ImagesGained(CheckSettings):
    """A delivery with much more than the one before deserves a look."""

    severity: Severity = Field("warning", description=_BLOCKS)
    limit: float = Field(1.0, ge=0, description="Largest share that a subtype may grow by; 1.0: twice as many.")


class NearDuplicates(CheckSettings):
    """Pictures that are nearly the same under two patients: one of them has the wrong name, or both are one person."""

    severity: Severity = Field("warning", description=_BLOCKS)
    distance: int = Field(6, ge=0, le=16, description="Bits of 64 in which two perceptual hashes may differ.")


class AdditionalExpectation(CheckSettings):
    """A further expectation of Great Expectations, on the manifest's columns."""

    name: str = Field(pattern=NAME_PATTERN, description="What the check is called in the Data Docs.")
    sentence: str = Field(min_length=10, description="What is demanded and why, for who reads the Data Docs.")
    expectation: str = Field(
        pattern=r"^Expect[A-Za-z]+$", description="Its class, such as ExpectColumnValuesToBeInSet."
    )
    arguments: dict[str, Any] = Field(
        default_factory=dict, description="Its arguments, such as {column: magnification}."
    )


class ValidationSettings(YamlModel):
    """The block ``validation`` of a source's YAML: only what differs from the default stands there."""

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
        names = [one.name for one in value]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"two checks are called {', '.join(sorted(twice))}")
        return value

    def changes(self) -> list[str]:
        """What differs from the default, a sentence each: ``quarantine_rate: limit 0.3 instead of 0.1``."""
        told = []
        for name, about in type(self).model_fields.items():
            mine, usual = getattr(self, name), about.get_default()
            if name == "more":
                told += [f"{one.name}: added" for one in mine]
                continue
            for key in type(mine).model_fields:
                if getattr(mine, key) != getattr(usual, key):
                    told.append(f"{name}: {key} {_shown(getattr(mine, key))} instead of {_shown(getattr(usual, key))}")
        return told


def _shown(value: object) -> str:
    return (", ".join(map(str, value)) or "those that are there") if isinstance(value, tuple) else str(value)
