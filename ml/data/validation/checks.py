"""The checks that a manifest must pass: the whole suite, with one entry per check.

These are plain declarations, so that the suite's version is known without importing Great Expectations, which takes
seven seconds. A rule names an expectation of Great Expectations or of ``ml.data.validation.expectations``, with its
arguments.
"""

import hashlib
import re
from dataclasses import asdict, dataclass
from importlib.resources import files
from typing import Any, NamedTuple

from ml.core.hashes import digest
from ml.core.taxonomy import IMAGE_SIZES, MAGNIFICATIONS, NAME_PATTERN, SUBTYPES, label_of, read_inventory
from ml.data.manifest import MANIFEST_TYPES
from ml.data.sources.check_settings import AdditionalExpectation, Severity, ValidationSettings

NAMED_COLUMNS = ("label", "subtype", "slide", "patient", "magnification", "seq")
"""The columns of a manifest that a BreakHis file name states."""

ONLY_IN_QUARANTINE = "only_in_quarantine"
"""Name of the inventory check's parameter: ``[subtype, slide, magnification, images]`` for each slide and magnification
with images that are in quarantine and not in the manifest."""

QUARANTINED = "quarantined"
"""Name of the quarantine rate's parameter: the number of files in quarantine."""

BEFORE = "images_before"
"""Name of the parameter of comparisons with the version published before: the number of its images of each subtype, and
how many of these are lost, and how many of the lost ones are in quarantine; empty where nothing was published."""


class Rule(NamedTuple):
    """An expectation by its class name, with its keyword arguments."""

    expectation: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Check:
    """A named check of the manifest.

    A failed ``critical`` check blocks the source version, a failed ``warning`` is only reported. ``sentence`` tells a
    reader of the Data Docs what is required and why. A check holds if all its rules hold.
    """

    name: str
    severity: Severity
    sentence: str
    rules: tuple[Rule, ...]


def build_suite(
    whole_breakhis: bool, layout: str = "breakhis", demands: ValidationSettings | None = None
) -> tuple[Check, ...]:
    """Builds the suite, in the order in which its checks are reported.

    Args:
        whole_breakhis: the source claims to be all of BreakHis, so its images are counted against the inventory.
        layout: the source's layout; checks of BreakHis' file names do not apply to a table.
        demands: the settings and further checks of the source's YAML; default: the default settings.
    """
    settings = demands or ValidationSettings()
    suite: tuple[Check, ...] = (*_table_checks(), *_name_checks(), *_label_checks(), *_picture_checks(settings))
    if layout == "table":
        suite = (*(check for check in suite if check.name not in _BREAKHIS_CHECKS), _ANY_MAGNIFICATION)
    if whole_breakhis:
        suite = (*suite, _inventory_check(settings.inventory.severity))
    return (*suite, *_delivery_checks(settings), *map(_additional_check, settings.more))


def _table_checks() -> tuple[Check, ...]:
    """Returns the checks of the table as a whole: its columns, rows and cells."""
    return (
        Check(
            "schema",
            "critical",
            "The table has exactly the manifest's columns, each of its type, since every later stage reads them.",
            (
                Rule("ExpectTableColumnsToMatchSet", {"column_set": list(MANIFEST_TYPES), "exact_match": True}),
                *(
                    Rule("ExpectColumnValuesToBeOfType", {"column": column, "type_": kind})
                    for column, kind in MANIFEST_TYPES.items()
                ),
            ),
        ),
        Check(
            "rows",
            "critical",
            "There is at least one image: an empty table would pass every check that looks at rows.",
            (Rule("ExpectTableRowCountToBeBetween", {"min_value": 1}),),
        ),
        Check(
            "not_null",
            "critical",
            "No cell is empty: an image without label, case or hash can be neither split nor traced.",
            tuple(Rule("ExpectColumnValuesToNotBeNull", {"column": column}) for column in MANIFEST_TYPES),
        ),
    )


def _name_checks() -> tuple[Check, ...]:
    """Returns the checks of the file names, and of what they state."""
    return (
        Check(
            "file_names",
            "critical",
            "Every file name follows the BreakHis grammar: slide, subtype and magnification stand nowhere else.",
            (Rule("ExpectColumnValuesToMatchRegex", {"column": "path", "regex": _path_regex()}),),
        ),
        Check(
            "names_agree",
            "critical",
            "Label, subtype, slide, case, magnification and number in the table are those of the file name.",
            (Rule("ExpectColumnsToAgreeWithFileName", {"column_list": ["path", *NAMED_COLUMNS]}),),
        ),
    )


def _label_checks() -> tuple[Check, ...]:
    """Returns the checks of the labels and patients of slides."""
    return (
        Check(
            "subtype_per_slide",
            "critical",
            "A slide has one subtype: of a slide under two nobody can say which label is right.",
            (Rule("ExpectOneValuePerGroup", {"column_A": "slide", "column_B": "subtype"}),),
        ),
        Check(
            "patient_per_slide",
            "critical",
            "A slide belongs to one patient: else one patient's images could be in training and in test.",
            (Rule("ExpectOneValuePerGroup", {"column_A": "slide", "column_B": "patient"}),),
        ),
        Check(
            "label_of_subtype",
            "critical",
            "The label is the one that belongs to the subtype, for example malignant for DC.",
            (
                Rule(
                    "ExpectColumnPairValuesToBeInSet",
                    {
                        "column_A": "subtype",
                        "column_B": "label",
                        "value_pairs_set": [[subtype, label_of(subtype)] for subtype in SUBTYPES],
                    },
                ),
            ),
        ),
    )


def _picture_checks(settings: ValidationSettings) -> tuple[Check, ...]:
    """Returns the checks of the pictures: magnification, size and copies."""
    return (
        Check(
            "magnifications",
            "critical",
            "The magnification is one that BreakHis was photographed at: 40, 100, 200 or 400 times.",
            (Rule("ExpectColumnValuesToBeInSet", {"column": "magnification", "value_set": list(MAGNIFICATIONS)}),),
        ),
        Check(
            "image_sizes",
            settings.image_sizes.severity,
            "The picture has the published size; others were resized by someone and have lost detail.",
            (
                Rule(
                    "ExpectColumnPairValuesToBeInSet",
                    {
                        "column_A": "width",
                        "column_B": "height",
                        "value_pairs_set": [list(size) for size in IMAGE_SIZES],
                    },
                ),
            ),
        ),
        Check(
            "unique_pixels",
            "critical",
            "No picture is there twice, under whatever name: copies would count double and could be in train and test.",
            (Rule("ExpectColumnValuesToBeUnique", {"column": "pixel_sha256"}),),
        ),
        Check(
            "unique_names",
            "critical",
            "No file name is there twice: the same name in two folders is the same image.",
            (
                Rule(
                    "ExpectCompoundColumnsToBeUnique",
                    {"column_list": ["subtype", "slide", "magnification", "seq"]},
                ),
            ),
        ),
    )


def _inventory_check(severity: Severity) -> Check:
    """Returns the check that compares the number of images with BreakHis' inventory."""
    return Check(
        "inventory",
        severity,
        "Every class has at every magnification the images BreakHis was published with, quarantined ones included.",
        (
            Rule(
                "ExpectImagesToMatchInventory",
                {
                    "published": [list(row) for row in read_inventory()],
                    "only_in_quarantine": {"$PARAMETER": ONLY_IN_QUARANTINE},
                },
            ),
        ),
    )


def _delivery_checks(settings: ValidationSettings) -> tuple[Check, ...]:
    """Returns the checks of the delivery as a whole, with the source's own limits."""
    sizes = settings.class_sizes
    return (
        Check(
            "class_sizes",
            sizes.severity,
            "Every subtype has enough images and cases: with one case it cannot be in training and in test.",
            (
                Rule(
                    "ExpectClassSizesToBeAtLeast",
                    {
                        "min_images": sizes.min_images,
                        "min_cases": sizes.min_cases,
                        "subtypes": list(sizes.subtypes),
                    },
                ),
            ),
        ),
        Check(
            "quarantine_rate",
            settings.quarantine_rate.severity,
            "Little is in quarantine: if much is, something is wrong with the delivery, not with a few files.",
            (
                Rule(
                    "ExpectQuarantineRateToBeAtMost",
                    {"limit": settings.quarantine_rate.limit, "quarantined": {"$PARAMETER": QUARANTINED}},
                ),
            ),
        ),
        Check(
            "images_lost",
            settings.images_lost.severity,
            "The images of the version published before are still there: a delivery that lacks many is an accident "
            "until somebody says otherwise.",
            (
                Rule(
                    "ExpectImagesNotToBeLost",
                    {"limit": settings.images_lost.limit, "before": {"$PARAMETER": BEFORE}},
                ),
            ),
        ),
        Check(
            "images_gained",
            settings.images_gained.severity,
            "No subtype has grown beyond what a delivery usually brings.",
            (
                Rule(
                    "ExpectImagesNotToMultiply",
                    {"limit": settings.images_gained.limit, "before": {"$PARAMETER": BEFORE}},
                ),
            ),
        ),
        Check(
            "near_duplicates",
            settings.near_duplicates.severity,
            "No two patients have pictures that look the same: one has a wrong name, or both are one person.",
            (Rule("ExpectNoNearDuplicatesAcrossPatients", {"distance": settings.near_duplicates.distance}),),
        ),
    )


def _additional_check(expectation: AdditionalExpectation) -> Check:
    """Returns the check of a further expectation in the source's YAML."""
    return Check(
        expectation.name,
        expectation.severity,
        expectation.sentence,
        (Rule(expectation.expectation, expectation.arguments),),
    )


_BREAKHIS_CHECKS = frozenset({"file_names", "names_agree", "magnifications", "image_sizes"})
"""Names of the checks that compare the manifest with BreakHis' file names and photography."""

_ANY_MAGNIFICATION = Check(
    "magnifications",
    "critical",
    "The magnification is one that a microscope has.",
    (Rule("ExpectColumnValuesToBeBetween", {"column": "magnification", "min_value": 1, "max_value": 2000}),),
)


def suite_version(suite: tuple[Check, ...]) -> str:
    """Returns 12 hex digits that change with any check of the suite and with the code of our own expectations."""
    code = files("ml.data.validation").joinpath("expectations.py").read_bytes()
    code += files("ml.data").joinpath("near_copies.py").read_bytes()
    return digest([[asdict(check) for check in suite], hashlib.sha256(code).hexdigest()])[:12]


def _path_regex() -> str:
    """Returns the grammar of file names as a regular expression for paths."""
    # A path may have folders before the name. Groups become non-capturing, since pandas warns of capturing ones.
    return "(?:^|/)" + re.sub(r"\((?!\?)", "(?:", NAME_PATTERN) + r"\Z"
