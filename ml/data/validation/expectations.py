"""Our own expectations: rules about groups of rows, about file names, and about the whole table.

This is the only module that imports Great Expectations at its top, since its classes derive from it. Only
:mod:`ml.data.validation.suite` imports it, inside a function.
"""

from collections import defaultdict
from typing import Any, ClassVar, Literal

import pandas as pd
from great_expectations.core.metric_domain_types import MetricDomainTypes  # noqa: TID253 (see above)
from great_expectations.execution_engine import PandasExecutionEngine  # noqa: TID253
from great_expectations.expectations.expectation import (  # noqa: TID253
    BatchExpectation,
    ColumnPairMapExpectation,
    MulticolumnMapExpectation,
)
from great_expectations.expectations.metrics.map_metric_provider import (  # noqa: TID253
    ColumnPairMapMetricProvider,
    MulticolumnMapMetricProvider,
    column_pair_condition_partial,
    multicolumn_condition_partial,
)
from great_expectations.expectations.metrics.metric_provider import metric_value  # noqa: TID253
from great_expectations.expectations.metrics.table_metric_provider import TableMetricProvider  # noqa: TID253

from ml.core.taxonomy import parse_name
from ml.data.near_copies import find_near_copies

Cell = tuple[str, int]
"""A subtype at a magnification."""

SuiteParameter = dict[str, str]
Json = dict[str, Any]


class _OneValuePerGroup(ColumnPairMapMetricProvider):  # type: ignore[misc]
    condition_metric_name = "column_pair_values.one_per_group"

    @column_pair_condition_partial(engine=PandasExecutionEngine)  # type: ignore[untyped-decorator]
    def _pandas(cls, column_A: "pd.Series[Any]", column_B: "pd.Series[Any]", **_: Any) -> "pd.Series[bool]":  # noqa: N803, N805
        return column_B.groupby(column_A).transform("nunique") <= 1


class ExpectOneValuePerGroup(ColumnPairMapExpectation):  # type: ignore[misc]
    """All rows with the same value in ``column_A`` have the same value in ``column_B``."""

    map_metric = "column_pair_values.one_per_group"
    success_keys = ("ignore_row_if", "mostly")
    ignore_row_if: str = "both_values_are_missing"


class _AgreesWithFileName(MulticolumnMapMetricProvider):  # type: ignore[misc]
    condition_metric_name = "multicolumn_values.agree_with_file_name"

    @multicolumn_condition_partial(engine=PandasExecutionEngine)  # type: ignore[untyped-decorator]
    def _pandas(cls, column_list: pd.DataFrame, **_: Any) -> "pd.Series[bool]":  # noqa: N805
        path, *named = column_list.columns
        agree = [
            _agrees(str(name).rpartition("/")[2], dict(zip(named, values, strict=True)))
            for name, *values in column_list[[path, *named]].itertuples(index=False)
        ]
        return pd.Series(agree, index=column_list.index, dtype=bool)


def _agrees(name: str, values: dict[str, object]) -> bool:
    """Says whether the columns' values are those of a file name."""
    try:
        parsed = parse_name(name)
    except ValueError:
        return True  # another check reports a name outside the grammar; each fault is reported once
    return all(getattr(parsed, "case" if column == "patient" else column) == value for column, value in values.items())


class ExpectColumnsToAgreeWithFileName(MulticolumnMapExpectation):  # type: ignore[misc]
    """The columns hold what the file name states. The first of ``column_list`` is the path."""

    map_metric = "multicolumn_values.agree_with_file_name"
    success_keys = ("ignore_row_if", "mostly")
    ignore_row_if: Literal["all_values_are_missing", "any_value_is_missing", "never"] = "any_value_is_missing"


class _ImagesPerSlide(TableMetricProvider):  # type: ignore[misc]
    metric_name = "table.images_per_slide"

    @metric_value(engine=PandasExecutionEngine)  # type: ignore[untyped-decorator]
    def _pandas(cls, execution_engine: Any, metric_domain_kwargs: Json, **_: Any) -> list[tuple[str, str, int, int]]:  # noqa: N805
        names = _get_table(execution_engine, metric_domain_kwargs)[["subtype", "slide", "magnification", "seq"]]
        counts = names.drop_duplicates().groupby(["subtype", "slide", "magnification"]).size()
        return [(*key, int(n)) for key, n in zip(counts.index.tolist(), counts, strict=True)]


class _ClassSizes(TableMetricProvider):  # type: ignore[misc]
    metric_name = "table.class_sizes"

    @metric_value(engine=PandasExecutionEngine)  # type: ignore[untyped-decorator]
    def _pandas(cls, execution_engine: Any, metric_domain_kwargs: Json, **_: Any) -> dict[str, tuple[int, int]]:  # noqa: N805
        groups = _get_table(execution_engine, metric_domain_kwargs).groupby("subtype")["patient"]
        return {str(subtype): (len(group), group.nunique()) for subtype, group in groups}


class _Looks(TableMetricProvider):  # type: ignore[misc]
    metric_name = "table.looks"

    @metric_value(engine=PandasExecutionEngine)  # type: ignore[untyped-decorator]
    def _pandas(cls, execution_engine: Any, metric_domain_kwargs: Json, **_: Any) -> list[tuple[str, str, str]]:  # noqa: N805
        table = _get_table(execution_engine, metric_domain_kwargs)
        return list(zip(table["path"], table["patient"], table["perceptual_hash"], strict=True))


def _get_table(execution_engine: Any, domain: Json) -> pd.DataFrame:
    table: pd.DataFrame
    table, _, _ = execution_engine.get_compute_domain(domain_kwargs=domain, domain_type=MetricDomainTypes.TABLE)
    return table


class ExpectImagesToMatchInventory(BatchExpectation):  # type: ignore[misc]
    """Each subtype has at each magnification the published number of images, and so has each of its slides.

    Both arguments are lists of ``[subtype, slide, magnification, images]``. Images that are only in quarantine count
    as present. Comparing slide by slide also finds a missing image that is hidden by a surplus one.
    """

    published: list[list[str | int]]
    only_in_quarantine: list[list[str | int]] | SuiteParameter

    metric_dependencies = ("table.images_per_slide",)
    success_keys: ClassVar[tuple[str, ...]] = ("published", "only_in_quarantine")
    args_keys: ClassVar[tuple[str, ...]] = ("published", "only_in_quarantine")

    def _validate(self, metrics: dict[str, Any], **_: Any) -> dict[str, Any]:
        arguments = self._get_success_kwargs()
        expected: dict[Cell, dict[str, int]] = defaultdict(lambda: defaultdict(int))
        for subtype, slide, magnification, images in arguments["published"]:
            expected[subtype, magnification][slide] += images
        found: dict[Cell, dict[str, int]] = defaultdict(lambda: defaultdict(int))
        for subtype, slide, magnification, images in [
            *metrics["table.images_per_slide"],
            *arguments["only_in_quarantine"],
        ]:
            found[subtype, magnification][slide] += images
        cells = []
        for cell in [*expected, *sorted(found.keys() - expected.keys())]:
            slides = {
                slide: f"{found[cell][slide]} of {expected[cell][slide]}"
                for slide in sorted({*expected[cell], *found[cell]})
                if found[cell][slide] != expected[cell][slide]
            }
            if slides:
                cells.append(
                    {
                        "subtype": cell[0],
                        "magnification": cell[1],
                        "expected": sum(expected[cell].values()),
                        "found": sum(found[cell].values()),
                        "slides": slides,
                    }
                )
        total = sum(sum(slides.values()) for slides in found.values())
        observed = "; ".join(map(_describe_cell, cells)) or f"{total:,} images"
        return {"success": not cells, "result": {"observed_value": observed, "details": {"cells": cells}}}


def _describe_cell(cell: dict[str, Any]) -> str:
    """Describes a subtype at a magnification whose images do not match the inventory."""
    slides = ", ".join(f"{slide}: {count}" for slide, count in cell["slides"].items())
    return (
        f"{cell['subtype']} at {cell['magnification']}X: expected {cell['expected']}, found {cell['found']} "
        f"(slide {slides})"
    )


class ExpectClassSizesToBeAtLeast(BatchExpectation):  # type: ignore[misc]
    """Each subtype has at least so many images and cases: those in ``subtypes``, or all that occur if that is empty."""

    min_images: int
    min_cases: int
    subtypes: list[str]

    metric_dependencies = ("table.class_sizes",)
    success_keys: ClassVar[tuple[str, ...]] = ("min_images", "min_cases", "subtypes")
    args_keys: ClassVar[tuple[str, ...]] = ("min_images", "min_cases", "subtypes")

    def _validate(self, metrics: Json, **_: Any) -> Json:
        arguments, found = self._get_success_kwargs(), metrics["table.class_sizes"]
        sizes = {subtype: found.get(subtype, (0, 0)) for subtype in arguments["subtypes"] or sorted(found)}
        small = {
            subtype: (images, cases)
            for subtype, (images, cases) in sizes.items()
            if images < arguments["min_images"] or cases < arguments["min_cases"]
        }
        wanted = (
            f"at least {_count_noun('image', arguments['min_images'])} of {_count_noun('case', arguments['min_cases'])}"
        )
        details = "; ".join(
            f"{s}: {_count_noun('image', n)} of {_count_noun('case', c)}" for s, (n, c) in small.items()
        )
        smallest = min(found.values(), default=(0, 0))
        observed = (
            f"{details} ({wanted} expected)" if small else f"the smallest has {_count_noun('image', smallest[0])}"
        )
        return {"success": not small, "result": {"observed_value": observed}}


class ExpectQuarantineRateToBeAtMost(BatchExpectation):  # type: ignore[misc]
    """At most the share ``limit`` of all files, those in the table and the ``quarantined``, is in quarantine."""

    limit: float
    quarantined: int | SuiteParameter

    metric_dependencies = ("table.row_count",)
    success_keys: ClassVar[tuple[str, ...]] = ("limit", "quarantined")
    args_keys: ClassVar[tuple[str, ...]] = ("limit", "quarantined")

    def _validate(self, metrics: Json, **_: Any) -> Json:
        arguments = self._get_success_kwargs()
        quarantined = arguments["quarantined"]
        files = metrics["table.row_count"] + quarantined
        share = quarantined / files if files else 0.0
        observed = f"{quarantined:,} of {files:,} files, {share:.1%} (at most {arguments['limit']:.1%})"
        return {"success": share <= arguments["limit"], "result": {"observed_value": observed}}


class ExpectImagesNotToBeLost(BatchExpectation):  # type: ignore[misc]
    """At most the share ``limit`` of the images of each subtype in the version published before is lost.

    ``before`` is ``{subtype: [images, lost images, lost images that are in quarantine]}``; empty where nothing was
    published. The others of the lost ones are gone.
    """

    limit: float
    before: dict[str, list[int]] | SuiteParameter

    metric_dependencies = ("table.row_count",)
    success_keys: ClassVar[tuple[str, ...]] = ("limit", "before")
    args_keys: ClassVar[tuple[str, ...]] = ("limit", "before")

    def _validate(self, metrics: Json, **_: Any) -> Json:  # noqa: ARG002
        arguments = self._get_success_kwargs()
        before = arguments["before"]
        too_many = {subtype for subtype, (images, lost, _) in before.items() if lost > arguments["limit"] * images}
        gone = {subtype: (lost - aside, images) for subtype, (images, lost, aside) in before.items()}
        set_aside = {subtype: (aside, images) for subtype, (images, _, aside) in before.items()}
        details = "; ".join(
            f"{what}: " + ", ".join(f"{subtype} {count:,} of {images:,}" for subtype, (count, images) in some.items())
            for what, counts in (("gone", gone), ("in quarantine", set_aside))
            if (some := {subtype: pair for subtype, pair in counts.items() if pair[0]})
        )
        observed = (
            f"{details} (at most {arguments['limit']:.0%} of a subtype)" if details else _describe_no_change(before)
        )
        return {"success": not too_many, "result": {"observed_value": observed}}


class ExpectImagesNotToMultiply(BatchExpectation):  # type: ignore[misc]
    """No subtype in the version published before has grown by more than the share ``limit``; ``before`` as above."""

    limit: float
    before: dict[str, list[int]] | SuiteParameter

    metric_dependencies = ("table.class_sizes",)
    success_keys: ClassVar[tuple[str, ...]] = ("limit", "before")
    args_keys: ClassVar[tuple[str, ...]] = ("limit", "before")

    def _validate(self, metrics: Json, **_: Any) -> Json:
        arguments, found = self._get_success_kwargs(), metrics["table.class_sizes"]
        grown = {
            subtype: (images, found[subtype][0])
            for subtype, (images, *_) in arguments["before"].items()
            if subtype in found and found[subtype][0] > images * (1 + arguments["limit"])
        }
        details = ", ".join(f"{subtype} from {was:,} to {now:,} images" for subtype, (was, now) in grown.items())
        observed = (
            f"{details} (at most {arguments['limit']:.0%} more)" if grown else _describe_no_change(arguments["before"])
        )
        return {"success": not grown, "result": {"observed_value": observed}}


class ExpectNoNearDuplicatesAcrossPatients(BatchExpectation):  # type: ignore[misc]
    """No two pictures of different patients look the same, also where one is mirrored or turned.

    Two look the same if their perceptual hashes differ in ``distance`` bits or fewer in one of eight orientations.
    """

    distance: int

    metric_dependencies = ("table.looks",)
    success_keys: ClassVar[tuple[str, ...]] = ("distance",)
    args_keys: ClassVar[tuple[str, ...]] = ("distance",)

    def _validate(self, metrics: Json, **_: Any) -> Json:
        paths, patients, hashes = zip(*metrics["table.looks"], strict=True) if metrics["table.looks"] else ((), (), ())
        pairs, shown = find_near_copies(hashes, patients, self._get_success_kwargs()["distance"])
        rows = [
            {
                "path": paths[first],
                "looks_like": paths[second],
                "patients": f"{patients[first]} and {patients[second]}",
                "bits_apart": bits,
            }
            for first, second, bits in shown
        ]
        observed = (
            f"{_count_noun('pair', pairs)} of pictures that look the same under two patients" if pairs else "none"
        )
        return {"success": not pairs, "result": {"observed_value": observed, "details": {"pairs": rows}}}


def _describe_no_change(before: dict[str, list[int]]) -> str:
    """Says that a comparison with the version before found nothing, or that there is no such version."""
    return "within the limit since the version before" if before else "nothing was published before"


def _count_noun(thing: str, count: int) -> str:
    """Returns a count with its noun, in the plural where needed."""
    return f"{count:,} {thing}{'' if count == 1 else 's'}"
