"""Buttons on tasks that open what a stage made. The worker works them out from the stage's result when it has run."""

from abc import abstractmethod
from typing import Any
from urllib.parse import quote

from airflow.sdk import BaseOperatorLink

from breakhis_airflow.addresses import page, page_of
from ml.core.settings import read_settings

Json = dict[str, Any]


class _StageLink(BaseOperatorLink):
    """A link made of a stage's result; without a result (the stage failed) there is none."""

    def get_link(self, operator: Any, *, ti_key: Any) -> str:  # noqa: ARG002
        """The address, or an empty string."""
        result = getattr(operator, "stage_result", None)
        return self.address(result) if result else ""

    @abstractmethod
    def address(self, result: Json) -> str:
        """Where the result can be looked at, or an empty string."""


class RunLink(_StageLink):
    """The MLflow run of a training."""

    name = "MLflow run"

    def address(self, result: Json) -> str:
        """The run's page in MLflow."""
        run = result.get("run_id")
        return _mlflow(f"runs/{quote(str(run))}") if run else ""


class ModelVersionLink(_StageLink):
    """The model version that was registered, judged or promoted."""

    name = "MLflow model version"

    def address(self, result: Json) -> str:
        """The version's page in MLflow's registry."""
        if not {"model", "version"} <= result.keys():
            return ""
        return _mlflow(f"models/{quote(str(result['model']))}/versions/{quote(str(result['version']))}")


class ReportLink(_StageLink):
    """The report of a training, among its run's artifacts."""

    name = "Report"

    def address(self, result: Json) -> str:
        """The artifact's page in MLflow."""
        run = result.get("run_id")
        return _mlflow(f"runs/{quote(str(run))}/artifacts/evaluation/report.html") if run else ""


class ReviewLink(_StageLink):
    """The candidate beside the champion, as its reviewer sees it; served by this plugin.

    On a stage it is made of the result, on a review of the question, so that it is there while the review waits.
    """

    name = "Review page"

    def get_link(self, operator: Any, *, ti_key: Any) -> str:
        """The address, or an empty string."""
        asked = getattr(operator, "body", None)
        return page_of(asked) if asked else super().get_link(operator, ti_key=ti_key)

    def address(self, result: Json) -> str:
        """The page of the bundle that was judged."""
        return page(f"reviews/{result['bundle']}/") if result.get("bundle") else ""


class DataDocsLink(_StageLink):
    """The report of a validation, served by this plugin."""

    name = "Data Docs"

    def address(self, result: Json) -> str:
        """The report's first page."""
        return _report(result, "index.html")


class QuarantineLink(_StageLink):
    """What a source brought that cannot be used, a row a file: a page of the same report."""

    name = "Quarantine"

    def address(self, result: Json) -> str:
        """The page; none where the result says that nothing is in quarantine."""
        return _report(result, "quarantine.html") if result.get("quarantined", True) else ""


LINKS: dict[str, tuple[_StageLink, ...]] = {
    "validate": (DataDocsLink(), QuarantineLink()),
    "publish": (DataDocsLink(), QuarantineLink()),
    "train": (RunLink(), ReportLink()),
    "register": (ModelVersionLink(),),
    "gate": (ModelVersionLink(), ReviewLink()),
    "promote": (ModelVersionLink(),),
    "rollback": (ModelVersionLink(), ReviewLink()),
}
"""The links of each stage's tasks."""


def _report(result: Json, name: str) -> str:
    """A page of a validation's report; none where the result names no validation."""
    return page(f"docs/{result['validation']}/{name}") if result.get("validation") else ""


def _mlflow(page: str) -> str:
    """A page of the MLflow server; none where MLflow is a database without a server."""
    ui = read_settings().mlflow_ui
    return f"{ui.rstrip('/')}/#/{page}" if ui else ""
