"""Buttons on tasks that open what a stage made. The worker works them out from the stage's result when it has run."""

from abc import abstractmethod
from typing import Any
from urllib.parse import quote, urljoin

from airflow.sdk import BaseOperatorLink

from ml.settings import settings

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


class DataDocsLink(_StageLink):
    """The report of a validation, served by this plugin."""

    name = "Data Docs"

    def address(self, result: Json) -> str:
        """The report's first page."""
        from airflow.sdk.configuration import conf

        from breakhis_airflow.web import PREFIX

        if not result.get("validation"):
            return ""
        base = conf.get("api", "base_url", fallback="/").rstrip("/") + "/"
        return urljoin(base, f"{PREFIX.lstrip('/')}/docs/{quote(str(result['validation']))}/index.html")


LINKS: dict[str, tuple[_StageLink, ...]] = {
    "validate": (DataDocsLink(),),
    "train": (RunLink(),),
    "register": (ModelVersionLink(),),
    "gate": (ModelVersionLink(),),
    "promote": (ModelVersionLink(),),
}
"""The links of each stage's tasks."""


def _mlflow(page: str) -> str:
    """A page of the MLflow server; none where MLflow is a database without a server."""
    ui = settings().mlflow_ui
    return f"{ui.rstrip('/')}/#/{page}" if ui else ""
