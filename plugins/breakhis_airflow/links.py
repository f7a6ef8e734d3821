"""Links on tasks that open what a stage has made. The worker makes them of the stage's result once it has run.

Airflow stores a link under the name of its class: renamed, the links of earlier runs would be lost.
"""

from abc import abstractmethod
from typing import Any

from airflow.sdk import BaseOperatorLink

from breakhis_airflow.addresses import build_page_url, build_review_page_url
from ml.core.mlflow_pages import build_run_url, build_version_url
from ml.core.settings import read_settings

Json = dict[str, Any]


class _StageLink(BaseOperatorLink):
    """A link made of a stage's result. There is none without a result, where the stage failed."""

    def get_link(self, operator: Any, *, ti_key: Any) -> str:  # noqa: ARG002
        """Returns the address, or an empty text."""
        result = getattr(operator, "stage_result", None)
        return self.address(result) if result else ""

    @abstractmethod
    def address(self, result: Json) -> str:
        """Returns the address at which the result is shown, or an empty text."""


class RunLink(_StageLink):
    """Leads to the MLflow run of a training."""

    name = "MLflow run"

    def address(self, result: Json) -> str:
        """Returns the run's page in MLflow."""
        return _build_run_url(result)


class ModelVersionLink(_StageLink):
    """Leads to the model version that was registered, judged or promoted."""

    name = "MLflow model version"

    def address(self, result: Json) -> str:
        """Returns the version's page in MLflow's registry."""
        if not {"model", "version"} <= result.keys():
            return ""
        ui = read_settings().mlflow_ui
        return build_version_url(ui, str(result["model"]), result["version"]) if ui else ""


class ReportLink(_StageLink):
    """Leads to the report of a training, among its run's artifacts."""

    name = "Report"

    def address(self, result: Json) -> str:
        """Returns the artifact's page in MLflow."""
        return _build_run_url(result, "evaluation/report.html")


class ReviewLink(_StageLink):
    """Leads to the page of this plugin that shows a reviewer the candidate beside the champion.

    On a stage it is made of the result; on a review, of the question, so that it is there while the review waits.
    """

    name = "Review page"

    def get_link(self, operator: Any, *, ti_key: Any) -> str:
        """Returns the address, or an empty text."""
        body = getattr(operator, "body", None)
        return build_review_page_url(body) if body else super().get_link(operator, ti_key=ti_key)

    def address(self, result: Json) -> str:
        """Returns the page of the evidence bundle that was judged."""
        return build_page_url(f"reviews/{result['bundle']}/") if result.get("bundle") else ""


class DataDocsLink(_StageLink):
    """Leads to the report of a validation, which this plugin serves."""

    name = "Data Docs"

    def address(self, result: Json) -> str:
        """Returns the report's first page."""
        return _build_report_url(result, "index.html")


class QuarantineLink(_StageLink):
    """Leads to the page of the same report that lists the files of a source that cannot be used."""

    name = "Quarantine"

    def address(self, result: Json) -> str:
        """Returns the page; an empty text where the result says that nothing is in quarantine."""
        return _build_report_url(result, "quarantine.html") if result.get("quarantined", True) else ""


STAGE_LINKS: dict[str, tuple[_StageLink, ...]] = {
    "validate": (DataDocsLink(), QuarantineLink()),
    "publish": (DataDocsLink(), QuarantineLink()),
    "train": (RunLink(), ReportLink()),
    "register": (ModelVersionLink(),),
    "gate": (ModelVersionLink(), ReviewLink()),
    "promote": (ModelVersionLink(),),
    "rollback": (ModelVersionLink(), ReviewLink()),
}
"""The links of each stage's tasks."""


def _build_report_url(result: Json, name: str) -> str:
    """Returns a page of a validation's report; an empty text where the result names no validation."""
    return build_page_url(f"docs/{result['validation']}/{name}") if result.get("validation") else ""


def _build_run_url(result: Json, artifact: str = "") -> str:
    """Returns a run's page in MLflow; an empty text where the result names none, or MLflow has no server."""
    ui = read_settings().mlflow_ui
    if not ui or not {"run_id", "experiment_id"} <= result.keys():
        return ""
    return build_run_url(ui, str(result["experiment_id"]), str(result["run_id"]), artifact)
