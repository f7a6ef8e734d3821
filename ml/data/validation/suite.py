"""Running the suite in Great Expectations, and telling held, failed and crashed apart."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ml.core.errors import ConfigError
from ml.core.store import Json
from ml.data.validation.checks import Check, Rule

if TYPE_CHECKING:
    import pandas as pd

ROWS_SHOWN = 5
"""How many offending rows an outcome names; the Data Docs and result.json have more."""


@dataclass(frozen=True)
class Outcome:
    """What became of one check.

    ``status`` is ``errored`` where an expectation crashed, so that nobody knows whether the demand is met.
    ``observed`` says it in words, ``unexpected`` counts the offending rows (for the inventory: classes at a
    magnification) where that makes sense, and ``rows`` names the first of them by path.
    """

    name: str
    severity: str
    status: Literal["held", "failed", "errored"]
    sentence: str
    observed: str
    unexpected: int | None
    rows: list[Json]

    @property
    def blocks(self) -> bool:
        """Whether this alone keeps the source version from being published."""
        return self.status == "errored" or (self.status == "failed" and self.severity == "critical")

    def to_json(self) -> Json:
        """As it stands in object.json, with ``success`` added."""
        return {**asdict(self), "success": self.status == "held"}


def run_suite(
    suite: tuple[Check, ...],
    frame: "pd.DataFrame",
    parameters: Json,
    manifest: str,
    docs: Path,
) -> tuple[list[Outcome], Json]:
    """Check a manifest's rows and write Great Expectations' own Data Docs into the folder ``docs``.

    Args:
        suite: what is demanded.
        frame: the manifest's rows.
        parameters: what the rules ask for by ``$PARAMETER``.
        manifest: its id.
        docs: a folder that is made.

    Returns:
        an outcome a check, in the suite's order, and Great Expectations' complete result.
    """
    with _quiet():
        import great_expectations as gx
        from great_expectations.data_context.types.base import (
            DataContextConfig,
            InMemoryStoreBackendDefaults,
            ProgressBarsConfig,
        )

        context = gx.get_context(
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
        expectations = gx.ExpectationSuite(name="breakhis-manifest")
        for check in suite:
            for rule in check.rules:
                expectations.add_expectation(_expectation(check, rule))
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
        # Data Docs print what they are given as HTML, and folder names come from outside.
        for one in result.results:
            one.result = _escaped(one.result)
        (key,) = context.validation_results_store.list_keys()
        context.validation_results_store.set(key, result)
        context.build_data_docs()
    by_check: dict[str, list[Json]] = {check.name: [] for check in suite}
    for one in complete["results"]:
        by_check[one["expectation_config"]["meta"]["check"]].append(one)
    return [_outcome(check, by_check[check.name], len(frame)) for check in suite], complete


def _escaped(value: Any) -> Any:
    if isinstance(value, str):
        return escape(value, quote=False)
    if isinstance(value, dict):
        return {key: _escaped(one) for key, one in value.items()}
    return [_escaped(one) for one in value] if isinstance(value, list | tuple) else value


def verify_expectations(suite: tuple[Check, ...], file: str) -> None:
    """Check that every rule's expectation exists and takes its arguments, without any data.

    Args:
        suite: what is demanded.
        file: the source's YAML, for the message.

    Raises:
        ConfigError: names the file, the check and what is wrong with it.
    """
    with _quiet():
        for check in suite:
            try:
                for rule in check.rules:
                    _expectation(check, rule)
            except (AttributeError, TypeError, ValueError) as error:  # pydantic's, in whichever of its versions
                why = " ".join(str(error).split())
                raise ConfigError(f"{file}: validation: the check {check.name!r} cannot be made: {why}") from None


def _expectation(check: Check, rule: Rule) -> Any:
    import great_expectations.expectations as theirs

    from ml.data.validation import expectations as ours

    kind = getattr(ours, rule.expectation, None) or getattr(theirs, rule.expectation)
    return kind(
        **rule.arguments,
        severity=check.severity,
        description=f"{check.name} ({check.severity}): {check.sentence}",
        meta={"check": check.name},
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Great Expectations' own warnings from the user, to whom they say nothing; its errors still show."""
    logger = logging.getLogger("great_expectations")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _outcome(check: Check, results: list[Json], rows: int) -> Outcome:
    told = (check.name, check.severity)
    crashes = list(dict.fromkeys(crash for one in results if (crash := _crash(one))))
    if len(results) != len(check.rules):
        crashes.append(f"{len(results)} of {len(check.rules)} expectations were evaluated")
    failures = [one for one in results if not one["success"] and not _crash(one)]
    # A critical demand that is known to be broken is broken, whatever else crashed. Otherwise a crash is the news.
    if crashes and not (failures and check.severity == "critical"):
        return Outcome(*told, "errored", check.sentence, "; ".join(crashes), None, [])
    if not failures:
        return Outcome(*told, "held", check.sentence, _observed_when_held(results, rows), None, [])
    observed = "; ".join(_observed(one, rows) for one in failures)
    details = [detail for one in failures if (detail := one["result"].get("details"))]
    # Classes at a magnification, 32 at most, or pairs that look alike: every one that is there is named.
    rows_named = [row for detail in details for key in ("cells", "pairs") for row in detail.get(key, [])]
    if rows_named:
        return Outcome(*told, "failed", check.sentence, observed, len(rows_named), rows_named)
    counts = [int(one["result"]["unexpected_count"]) for one in failures if "unexpected_count" in one["result"]]
    offending = [row for one in failures for row in one["result"].get("unexpected_index_list") or []]
    return Outcome(*told, "failed", check.sentence, observed, sum(counts) if counts else None, offending[:ROWS_SHOWN])


def _crash(result: Json) -> str | None:
    """The message of the exception in an expectation's result, which is flat or keyed by metric."""
    info = result["exception_info"]
    found = [info] if "raised_exception" in info else list(info.values())
    messages = [one["exception_message"] or "exception without a message" for one in found if one["raised_exception"]]
    return str(messages[0]) if messages else None


def _observed_when_held(results: list[Json], rows: int) -> str:
    value = results[0]["result"].get("observed_value") if len(results) == 1 else None
    return f"{rows:,} rows" if value is None or isinstance(value, int) else str(value)


def _observed(result: Json, rows: int) -> str:
    """What a failed expectation found, in words."""
    found, arguments = result["result"], result["expectation_config"]["kwargs"]
    column = arguments.get("column")
    details = found.get("details") or {}
    if "cells" in details or isinstance(found.get("observed_value"), str):
        return str(found["observed_value"])
    if "mismatched" in details:
        return "; ".join(
            f"columns {kind}: {', '.join(sorted(names))}" for kind, names in sorted(details["mismatched"].items())
        )
    if "unexpected_count" in found:
        prefix = f"column {column}: " if column else ""
        return f"{prefix}{found['unexpected_count']:,} of {rows:,} rows"
    if "type_" in arguments:
        return f"column {column} is of type {found['observed_value']}, not {arguments['type_']}"
    return f"{found['observed_value']} rows"
