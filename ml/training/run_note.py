"""The note of a run in MLflow: what it is, in ten lines of Markdown at the top of its page."""

from collections.abc import Mapping, Sequence
from typing import Any

from ml.core.airflow_pages import build_dag_run_url, build_reviews_url
from ml.core.markdown import escape_markdown, format_link
from ml.core.mlflow_pages import build_run_url
from ml.core.settings import Settings
from ml.core.taxonomy import SIDES
from ml.evaluation.metric_names import CLINICAL_ORDER, GATED_METRICS, METRIC_NAMES

RANDOM_WEIGHTS = "**Random backbone weights**: not fit for any use but trying things."

REPORT = "evaluation/report.html"
"""Path of the report among the run's artifacts."""


def write_run_note(
    facts: Mapping[str, Any],
    metrics: Mapping[str, float],
    intervals: Mapping[str, Sequence[float]],
    *,
    run_id: str,
    experiment_id: str,
    pretrained: bool,
    settings: Settings,
) -> str:
    """Returns the note of a run that was trained to the end.

    Args:
        facts: the run's tags by name, with ``description`` (of the preset) and ``sides``.
        metrics: metrics of the test side by name.
        intervals: their 95% intervals; a metric may lack one.
        run_id: id of the run.
        experiment_id: id of its experiment.
        pretrained: whether the backbone had learnt before.
        settings: addresses of MLflow's and Airflow's pages, and the run of the DAG that this training belongs to.
    """
    shown = {name: escape_markdown(facts[name]) for name in ("set", "task", "dataset", "split", "ledger", "preset")}
    counts = {what: _list_counts(facts["sides"], what) for what in ("images", "cases")}
    weights = f"{escape_markdown(facts['weights_kind'])} ({escape_markdown(facts['weights'])})"
    lines = [
        f"Training set: {shown['set']}, task {shown['task']}, dataset {shown['dataset']}",
        f"Images: {counts['images']}",
        f"Patients: {counts['cases']}; split {shown['split']} of ledger {shown['ledger']}",
        f"Preset: {shown['preset']}, seed {escape_markdown(facts['seed'])}. {escape_markdown(facts['description'])}",
        f"Backbone weights: {weights}",
        f"Result on the test side: {_describe_result(facts['task'], metrics, intervals)}",
        f"Report: {_link_report(run_id, experiment_id, settings)}",
        f"Review: {_link_reviews(settings)}",
        f"Airflow run: {_link_dag_run(settings)}",
    ]
    first = [] if pretrained else [RANDOM_WEIGHTS]
    return "\n".join([*first, *(f"- {line}" for line in lines)])


def _list_counts(sides: Mapping[str, Mapping[str, int]], what: str) -> str:
    of_sides = ", ".join(f"{sides[side][what]:,} {side}" for side in SIDES)
    return f"{sum(sides[side][what] for side in SIDES):,} ({of_sides})"


def _describe_result(task: str, metrics: Mapping[str, float], intervals: Mapping[str, Sequence[float]]) -> str:
    """Returns the clinically first metric that there is, and those by which the version will be gated."""
    first = next((name for name in CLINICAL_ORDER if name in metrics), None)
    gated = [name for known, names in GATED_METRICS.items() if known == task for name in names]
    names = dict.fromkeys(name for name in (first, *gated) if name in metrics)
    return "; ".join(_describe_metric(name, metrics[name], intervals.get(name)) for name in names if name)


def _describe_metric(name: str, value: float, interval: Sequence[float] | None) -> str:
    of = "of patients" if name.startswith("patient_") else "of images"
    ends = f"95% interval {interval[0]:.3f} to {interval[1]:.3f}" if interval else "no interval"
    return f"{METRIC_NAMES[name]} {of} {value:.3f} ({ends})"


def _link_report(run_id: str, experiment_id: str, settings: Settings) -> str:
    if not settings.mlflow_ui:
        return f"artifact {REPORT} of this run"
    return format_link(REPORT, build_run_url(settings.mlflow_ui, experiment_id, run_id, REPORT))


def _link_reviews(settings: Settings) -> str:
    # The version is registered, and its review asked for, after this run has ended.
    if not settings.airflow_ui:
        return "on the page Reviews in Airflow, once the version is registered and its gates have passed"
    return f"{format_link('Reviews', build_reviews_url(settings.airflow_ui))}, once its gates have passed"


def _link_dag_run(settings: Settings) -> str:
    if not settings.dag_run:
        return "none, it was trained from the command line"
    name = f"{settings.dag}, {settings.dag_run}"
    if not settings.airflow_ui:
        return escape_markdown(name)
    return format_link(name, build_dag_run_url(settings.airflow_ui, settings.dag, settings.dag_run))
