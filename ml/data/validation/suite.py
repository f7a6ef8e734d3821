"""Runs the suite in Great Expectations, and separates checks that held, failed and crashed."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ml.core.errors import ConfigError
from ml.core.messages import cut_text, list_items, quote_value
from ml.core.store import Json
from ml.data.validation.checks import Check, Rule

if TYPE_CHECKING:
    import pandas as pd

ROWS_SHOWN = 5
"""Number of offending rows that an outcome names; the Data Docs and result.json have more."""


@dataclass(frozen=True)
class Outcome:
    """The outcome of one check.

    ``status`` is ``errored`` if an expectation crashed, so that the result of the check is unknown. ``observed``
    describes the outcome in words. ``unexpected`` counts the offending rows where that makes sense (for the inventory:
    classes at a magnification), and ``rows`` names the first of them by path.
    """

    name: str
    severity: str
    status: Literal["held", "failed", "errored"]
    sentence: str
    observed: str
    unexpected: int | None
    rows: list[Json]

    @property
    def blocks_publication(self) -> bool:
        """Whether this outcome alone keeps the source version from being published."""
        return self.status == "errored" or (self.status == "failed" and self.severity == "critical")

    def to_json(self) -> Json:
        """Returns the entry of object.json, with ``success`` added."""
        return {**asdict(self), "success": self.status == "held"}


def run_suite(
    suite: tuple[Check, ...],
    frame: "pd.DataFrame",
    parameters: Json,
    manifest: str,
    docs: Path,
) -> tuple[list[Outcome], Json]:
    """Checks a manifest's rows and writes Great Expectations' own Data Docs into the folder ``docs``.

    Args:
        suite: the checks.
        frame: the manifest's rows.
        parameters: the values of the parameters that rules name by ``$PARAMETER``.
        manifest: the manifest's id.
        docs: the folder, which is created.

    Returns:
        the outcome of each check, in the suite's order, and Great Expectations' complete result.
    """
    with _hidden_warnings():
        import great_expectations as gx

        context = _create_context(docs)
        expectations = gx.ExpectationSuite(name="breakhis-manifest")
        for check in suite:
            for rule in check.rules:
                expectations.add_expectation(_build_expectation(check, rule))
        expectations = context.suites.add(expectations)
        assets = context.data_sources.add_pandas("manifest")
        batch = assets.add_dataframe_asset("images").add_batch_definition_whole_dataframe(manifest)
        definition = context.validation_definitions.add(
            gx.ValidationDefinition(name=manifest, data=batch, suite=expectations)
        )
        result = definition.run(
            batch_parameters={"dataframe": frame},
            expectation_parameters=parameters,
            result_format={
                "result_format": "COMPLETE",
                "unexpected_index_column_names": ["path"],
                "return_unexpected_index_query": False,
            },
            run_id=gx.RunIdentifier(run_name=manifest),
        )
        complete: Json = result.to_json_dict()
        # Data Docs print values as HTML without escaping them, and folder names come from outside.
        for expectation_result in result.results:
            expectation_result.result = _escape(expectation_result.result)
        (key,) = context.validation_results_store.list_keys()
        context.validation_results_store.set(key, result)
        context.build_data_docs()
    by_check: dict[str, list[Json]] = {check.name: [] for check in suite}
    for expectation_result in complete["results"]:
        by_check[expectation_result["expectation_config"]["meta"]["check"]].append(expectation_result)
    return [_judge(check, by_check[check.name], len(frame)) for check in suite], complete


def _create_context(docs: Path) -> Any:
    """Creates a Great Expectations context in memory, without analytics, whose Data Docs go to a folder."""
    import great_expectations as gx
    from great_expectations.data_context.types.base import (
        DataContextConfig,
        InMemoryStoreBackendDefaults,
        ProgressBarsConfig,
    )

    return gx.get_context(
        mode="ephemeral",
        project_config=DataContextConfig(
            store_backend_defaults=InMemoryStoreBackendDefaults(),
            analytics_enabled=False,
            progress_bars=ProgressBarsConfig(globally=False),
            data_docs_sites={
                "docs": {
                    "class_name": "SiteBuilder",
                    "show_how_to_buttons": False,
                    "store_backend": {
                        "class_name": "TupleFilesystemStoreBackend",
                        "base_directory": str(docs),
                    },
                }
            },
        ),
    )


def _escape(value: Any) -> Any:
    """Escapes all strings in a JSON value for HTML."""
    if isinstance(value, str):
        return escape(value, quote=False)
    if isinstance(value, dict):
        return {key: _escape(item) for key, item in value.items()}
    return [_escape(item) for item in value] if isinstance(value, list | tuple) else value


def verify_expectations(suite: tuple[Check, ...], file: str) -> None:
    """Checks, without any data, that every rule's expectation exists and accepts its arguments.

    Args:
        suite: the checks.
        file: the source's YAML file, for the message.

    Raises:
        ConfigError: names the file, the check and its fault.
    """
    with _hidden_warnings():
        for check in suite:
            try:
                for rule in check.rules:
                    _build_expectation(check, rule)
            except (AttributeError, TypeError, ValueError) as error:  # those of pydantic, in any of its versions
                fault = cut_text(error, 500)
                raise ConfigError(
                    f"{file}: validation: the check {quote_value(check.name)} cannot be made: {fault}"
                ) from None


def _build_expectation(check: Check, rule: Rule) -> Any:
    """Builds the expectation of a rule: one of our own, or else one of Great Expectations."""
    import great_expectations.expectations as built_in

    from ml.data.validation import expectations as our_own

    expectation = getattr(our_own, rule.expectation, None) or getattr(built_in, rule.expectation)
    return expectation(
        **rule.arguments,
        severity=check.severity,
        description=f"{check.name} ({check.severity}): {check.sentence}",
        meta={"check": check.name},
    )


@contextmanager
def _hidden_warnings() -> Iterator[None]:
    """Hides Great Expectations' own warnings, which mean nothing to the user; its errors still show."""
    logger = logging.getLogger("great_expectations")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _judge(check: Check, results: list[Json], rows: int) -> Outcome:
    """Returns the outcome of a check from the results of its expectations; ``rows`` is the manifest's length."""
    head = (check.name, check.severity)
    crashes = list(dict.fromkeys(crash for result in results if (crash := _read_crash(result))))
    if len(results) != len(check.rules):
        crashes.append(f"{len(results)} of {len(check.rules)} expectations were evaluated")
    failures = [result for result in results if not result["success"] and not _read_crash(result)]
    # A critical check that is known to fail has failed, whatever else crashed. Otherwise the crash is reported.
    if crashes and not (failures and check.severity == "critical"):
        return Outcome(*head, "errored", check.sentence, "; ".join(crashes), None, [])
    if not failures:
        return Outcome(*head, "held", check.sentence, _describe_success(results, rows), None, [])
    observed = "; ".join(_describe_failure(result, rows) for result in failures)
    details = [detail for result in failures if (detail := result["result"].get("details"))]
    # Classes at a magnification, 32 at most, or pairs that look alike: all are named.
    rows_named = [row for detail in details for key in ("cells", "pairs") for row in detail.get(key, [])]
    if rows_named:
        return Outcome(*head, "failed", check.sentence, observed, len(rows_named), rows_named)
    counts = [
        int(result["result"]["unexpected_count"]) for result in failures if "unexpected_count" in result["result"]
    ]
    offending = [row for result in failures for row in result["result"].get("unexpected_index_list") or []]
    return Outcome(*head, "failed", check.sentence, observed, sum(counts) if counts else None, offending[:ROWS_SHOWN])


def _read_crash(result: Json) -> str | None:
    """Returns the message of an exception in a result, which is flat or keyed by metric; None without an exception."""
    info = result["exception_info"]
    infos = [info] if "raised_exception" in info else list(info.values())
    messages = [i["exception_message"] or "exception without a message" for i in infos if i["raised_exception"]]
    return str(messages[0]) if messages else None


def _describe_success(results: list[Json], rows: int) -> str:
    """Describes what the expectations of a check that held found."""
    value = results[0]["result"].get("observed_value") if len(results) == 1 else None
    return f"{rows:,} rows" if value is None or isinstance(value, int) else str(value)


def _describe_failure(result: Json, rows: int) -> str:
    """Describes what a failed expectation found."""
    found, arguments = result["result"], result["expectation_config"]["kwargs"]
    column = arguments.get("column")
    details = found.get("details") or {}
    if "cells" in details or isinstance(found.get("observed_value"), str):
        return str(found["observed_value"])
    if "mismatched" in details:
        return "; ".join(
            f"columns {kind}: {list_items(sorted(names))}" for kind, names in sorted(details["mismatched"].items())
        )
    if "unexpected_count" in found:
        prefix = f"column {column}: " if column else ""
        return f"{prefix}{found['unexpected_count']:,} of {rows:,} rows"
    if "type_" in arguments:
        return f"column {column} is of type {found['observed_value']}, not {arguments['type_']}"
    return f"{found['observed_value']} rows"
