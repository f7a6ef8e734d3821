"""Our own expectations: rules about groups of rows, about file names, and about the whole table.

This is the one module that imports Great Expectations at its top, since classes must derive from it. Only
:mod:`ml.validation.suite` imports it, inside a function.
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

from ml.taxonomy import parse_name

Cell = tuple[str, int]
"""Subtype and magnification."""

SuiteParameter = dict[str, str]


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
        path, *told = column_list.columns
        agree = [
            _agrees(str(name).rpartition("/")[2], dict(zip(told, values, strict=True)))
            for name, *values in column_list[[path, *told]].itertuples(index=False)
        ]
        return pd.Series(agree, index=column_list.index, dtype=bool)


def _agrees(name: str, values: dict[str, object]) -> bool:
    try:
        parsed = parse_name(name)
    except ValueError:
        return True  # a name outside the grammar is another check's finding; one fault is reported once
    return all(getattr(parsed, "case" if column == "patient" else column) == value for column, value in values.items())


class ExpectColumnsToAgreeWithFileName(MulticolumnMapExpectation):  # type: ignore[misc]
    """The columns hold what the file name says. The first of ``column_list`` is the path, the others are told by it."""

    map_metric = "multicolumn_values.agree_with_file_name"
    success_keys = ("ignore_row_if", "mostly")
    ignore_row_if: Literal["all_values_are_missing", "any_value_is_missing", "never"] = "any_value_is_missing"


class _ImagesPerSlide(TableMetricProvider):  # type: ignore[misc]
    metric_name = "table.images_per_slide"

    @metric_value(engine=PandasExecutionEngine)  # type: ignore[untyped-decorator]
    def _pandas(
        cls,  # noqa: N805
        execution_engine: Any,
        metric_domain_kwargs: dict[str, Any],
        **_: Any,
    ) -> list[tuple[str, str, int, int]]:
        table, _, _ = execution_engine.get_compute_domain(
            domain_kwargs=metric_domain_kwargs, domain_type=MetricDomainTypes.TABLE
        )
        names = table[["subtype", "slide", "magnification", "seq"]].drop_duplicates()
        counts = names.groupby(["subtype", "slide", "magnification"]).size()
        return [(subtype, slide, int(mag), int(n)) for (subtype, slide, mag), n in counts.items()]


class ExpectImagesToMatchInventory(BatchExpectation):  # type: ignore[misc]
    """Each subtype has at each magnification the published images, and each of its slides its own.

    Both arguments are lists of ``[subtype, slide, magnification, images]``. Images that are only in quarantine count
    as being there. Comparing slide by slide also finds an image too many that hides one that is missing.
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
        observed = "; ".join(map(_in_words, cells)) or f"{total:,} images"
        return {"success": not cells, "result": {"observed_value": observed, "details": {"cells": cells}}}


def _in_words(cell: dict[str, Any]) -> str:
    slides = ", ".join(f"{slide}: {count}" for slide, count in cell["slides"].items())
    return (
        f"{cell['subtype']} at {cell['magnification']}X: expected {cell['expected']}, found {cell['found']} "
        f"(slide {slides})"
    )
